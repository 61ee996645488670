// A spiking layer's drive on the matrix units: spikes of 16 samples at all spike steps times the weights.

#pragma once
#include "spiking.h"

#if HAS_TILES
namespace {

struct TileLayer {
    int64_t K, N;
    Operand<PLANES> weight;
    const float* bias;  // (Np)
};

// All layers' weights as right operands.
struct TileLayers {
    TileLayer of[MAX_LAYERS];
    explicit TileLayers(const Net& net) {
        int64_t bytes = 0;
        for (int l = 0; l < net.layers; l++) bytes += bytes_of(net.widths[l], net.widths[l + 1]);
        char* place = scratch<0>(bytes);
        for (int l = 0; l < net.layers; l++) {
            const int64_t K = net.widths[l], N = net.widths[l + 1];
            const Operand<PLANES> weight{reinterpret_cast<bf16*>(place), blocks_of(K)};
            float* bias = reinterpret_cast<float*>(weight.tile(tiles_of(N)));
            pack_right(COLUMNS, net.weights[l], N, K, N, weight);
            std::memset(bias, 0, padded(N) * sizeof(float));
            std::memcpy(bias, net.biases[l], N * sizeof(float));
            of[l] = {K, N, weight, bias};
            place += bytes_of(K, N);
        }
    }
    static int64_t bytes_of(int64_t K, int64_t N) {
        return Operand<PLANES>::bytes(tiles_of(N), blocks_of(K)) + padded(N) * int64_t(sizeof(float));
    }
};

// 1.0 in the lanes whose word has its bit t set.
inline void store_spikes(bf16* to, __m512i words, int t) {
    const __mmask16 fired = _mm512_test_epi32_mask(words, _mm512_set1_epi32(int(1u << t)));
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm256_maskz_set1_epi16(fired, 0x3f80));
}

// Spikes of up to 16 samples, from their words (count, Kp): row tile t holds step t.
void spikes_by_sample(const int32_t* words, int64_t K, int64_t count, int T, Operand<1> out) {
    const int64_t Kp = padded(K);
    for (int64_t b = 0; b < SIDE; b++)
        for (int64_t k = 0; k < out.blocks * DEPTH; k += W) {
            const __m512i word = _mm512_maskz_loadu_epi32(b < count ? first_lanes(K - k) : 0, words + b * Kp + k);
            for (int t = 0; t < T; t++) store_spikes(out.tile(t, k / DEPTH) + b * DEPTH + k % DEPTH, word, t);
        }
}

inline void run_layer(const Store& st, int layer, const TileLayer& l, int64_t from, int64_t to) {
    const Net& net = *st.net;
    const int T = net.spike_steps;
    const int64_t blocks = blocks_of(l.K), Np = padded(l.N), tiles = tiles_of(to - from), square = SIDE * SIDE;
    const Operand<1> spikes{reinterpret_cast<bf16*>(scratch<2>(Operand<1>::bytes(tiles * T, blocks))), blocks};
    for (int64_t b = from, tile = 0; b < to; b += SIDE, tile++)
        spikes_by_sample(st.words[layer] + b * padded(l.K), l.K, to - b, T, {spikes.tile(tile * T), blocks});
    float* drive = reinterpret_cast<float*>(scratch<3>(tiles * T * square * sizeof(float)));
    for (int64_t n = 0; n < Np; n += SIDE) {
        product(spikes, tiles * T, l.weight, n / SIDE, {l.bias + n, 0, 0, drive, square, SIDE});
        for (int64_t b = from; b < to; b++) {
            float* voltage = st.voltage[layer] + (st.keeps ? st.square(layer, b, n) : 0);
            const float* own = drive + (b - from) / SIDE * T * square + (b - from) % SIDE * SIDE;
            store(st.words[layer + 1] + b * Np + n, membranes(net, own, square, voltage, square));
        }
    }
}

}  // namespace
#endif

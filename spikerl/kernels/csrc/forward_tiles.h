// A spiking layer's drive on AMX: spikes of 16 samples at all spike steps times the weights.

#pragma once
#include "spiking.h"

#if HAS_TILES
namespace {

// Depth blocks of 16 samples' spikes that fit the first-level cache with their weights.
constexpr int64_t PART = 6;
// With more depth blocks than this, all samples share one column of weights in the second-level cache instead.
constexpr int64_t MAX_PARTED = 12;

struct TileLayer {
    int64_t K, N;
    Operand<PLANES> weight;
    const float* bias;  // (Np)
};

// All layers' weights as right operands.
struct TileLayers {
    Scratch memory;
    TileLayer of[MAX_LAYERS];
    explicit TileLayers(const Net& net) {
        for (int l = 0; l < net.layers; l++) {
            const int64_t K = net.widths[l], N = net.widths[l + 1];
            const auto weight = Operand<PLANES>::allocate(memory, tiles_of(N), blocks_of(K));
            float* bias = memory.array<float>(padded(N));
            pack_right(COLUMNS, net.weights[l], N, K, N, weight);
            copy_padded(net.biases[l], N, padded(N), bias);
            of[l] = {K, N, weight, bias};
        }
    }
};

// 1.0 in the lanes whose word has bit t set.
inline void store_spikes(bf16* to, __m512i words, int t) {
    const __mmask16 fired = _mm512_test_epi32_mask(words, _mm512_set1_epi32(int(1u << t)));
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), _mm256_maskz_set1_epi16(fired, 0x3f80));
}

// Spikes of up to 16 samples, from their words (count, Kp): row tile t holds step t.
void pack_spikes_by_sample(const int32_t* words, int64_t K, int64_t count, int T, Operand<1> out) {
    const int64_t Kp = padded(K);
    for (int64_t b = 0; b < SIDE; b++)
        for (int64_t k = 0; k < out.blocks * DEPTH; k += W) {
            const __m512i word = _mm512_maskz_loadu_epi32(b < count ? lane_mask(K - k) : 0, words + b * Kp + k);
            for (int t = 0; t < T; t++) store_spikes(out.tile(t, k / DEPTH) + b * DEPTH + k % DEPTH, word, t);
        }
}

// One layer of samples `from` to `to`, at most `part` depth blocks at a time.
inline void run_layer(const Activations& acts, int layer, const TileLayer& l, int64_t from, int64_t to, int64_t part) {
    const int T = acts.net->spike_steps;
    const int64_t blocks = blocks_of(l.K), Np = padded(l.N), rows = tiles_of(to - from) * T, square = SIDE * SIDE;
    Scratch memory;
    const auto spikes = Operand<1>::allocate(memory, rows, blocks);
    for (int64_t b = from, row = 0; b < to; b += SIDE, row += T)
        pack_spikes_by_sample(acts.words[layer] + b * padded(l.K), l.K, to - b, T, {spikes.tile(row), blocks});
    float* drives = memory.array<float>(Np / SIDE * rows * square);
    const int64_t parts = (blocks + part - 1) / part;
    for (int64_t p = 0; p < parts; p++)
        for (int64_t n = 0; n < Np; n += SIDE) {
            float* drive = drives + n / SIDE * rows * square;
            const Accumulators from_bias{l.bias + n, 0, 0, drive, square, SIDE};
            const Accumulators from_sums{drive, square, SIDE, drive, square, SIDE};
            multiply(spikes, rows, l.weight, n / SIDE, blocks * p / parts, blocks * (p + 1) / parts,
                     p ? from_sums : from_bias);
            if (p < parts - 1) continue;
            for (int64_t b = from; b < to; b++) {
                float* voltage = acts.voltage[layer] + (acts.for_backward ? acts.square_offset(layer, b, n) : 0);
                const float* own = drive + (b - from) / SIDE * T * square + (b - from) % SIDE * SIDE;
                store(acts.words[layer + 1] + b * Np + n, scan(acts.neurons[layer], T, own, square, voltage, square));
            }
        }
}

inline void run_layer(const Activations& acts, int layer, const TileLayer& l, int64_t from, int64_t to) {
    const int64_t blocks = blocks_of(l.K);
    if (blocks > MAX_PARTED) return run_layer(acts, layer, l, from, to, blocks);
    for (int64_t b = from; b < to; b += SIDE) run_layer(acts, layer, l, b, std::min(to, b + SIDE), PART);
}

}  // namespace
#endif

// A spiking layer's gradients on the matrix units.

#pragma once
#include "backward.h"
#include "forward_tiles.h"

#if HAS_TILES
namespace {

constexpr int64_t TOGETHER = 8;  // tiles of samples whose spikes and gradients stay in the second cache

// Spikes of the inputs as rows, samples and steps as columns: 16 samples at one step are half a block, and the
// halves of a tile's steps follow each other. Words are (count, Kp).
void spikes_by_input(const int32_t* words, int64_t K, int64_t count, int T, int64_t half, Operand<1> out) {
    const int64_t Kp = padded(K);
    alignas(64) int32_t square[SIDE * SIDE];
    for (int64_t k = 0; k < K; k += SIDE) {
        for (int64_t b = 0; b < SIDE; b++) {
            const __mmask16 there = b < count ? first_lanes(K - k) : 0;
            _mm512_store_si512(square + b * SIDE, _mm512_maskz_loadu_epi32(there, words + b * Kp + k));
        }
        float* bits = reinterpret_cast<float*>(square);
        transpose(bits, SIDE, bits, SIDE);
        for (int64_t r = 0; r < SIDE; r++) {
            const __m512i word = _mm512_load_si512(square + r * SIDE);
            for (int t = 0; t < T; t++)
                store_spikes(out.tile(k / SIDE, (half + t) / 2) + r * DEPTH + (half + t) % 2 * SIDE, word, t);
        }
    }
}

// Gradients of drives lie as voltages do: squares of 16 samples and 16 neurons at all steps.
struct Squares {
    float* first;
    int64_t T, columns;  // of squares
    float* at(int64_t tile, int64_t n) const { return first + (tile * columns + n) * T * SIDE * SIDE; }
};

// Gradients of a layer's weights and biases, from those of its drives.
void weight_gradients(const Store& st, int layer, const Layer& l, Squares grad, float* grad_weight, float* grad_bias,
                      int threads) {
    const int T = st.net->spike_steps;
    const int64_t B = st.samples, K_tiles = tiles_of(l.K), N_tiles = tiles_of(l.N), square = SIDE * SIDE;
    const int64_t most = tiles_of(B) < TOGETHER ? tiles_of(B) : TOGETHER, blocks = (most * T + 1) / 2;
    const int64_t sums_bytes = N_tiles * (K_tiles * square + SIDE) * int64_t(sizeof(float));
    char* memory = scratch<4>(sums_bytes + Operand<1>::bytes(K_tiles, blocks));
    float *sums = reinterpret_cast<float*>(memory), *biases = sums + N_tiles * K_tiles * square;
    bf16* left = reinterpret_cast<bf16*>(memory + sums_bytes);
    std::memset(biases, 0, N_tiles * SIDE * sizeof(float));
    for (int64_t first = 0; first < tiles_of(B); first += TOGETHER) {
        const int64_t tiles = tiles_of(B) - first < TOGETHER ? tiles_of(B) - first : TOGETHER;
        const int64_t halves = tiles * T, used = (halves + 1) / 2;
        const Operand<1> spikes{left, used};
        if (halves % 2)  // nobody writes the last half
            for (int64_t k = 0; k < K_tiles; k++) std::memset(spikes.tile(k, used - 1), 0, SIZE * sizeof(bf16));
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int64_t b = (first + tile) * SIDE, count = B - b < SIDE ? B - b : SIDE;
            spikes_by_input(st.words[layer] + b * padded(l.K), l.K, count, T, tile * T, spikes);
        }
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t n = 0; n < N_tiles; n++) {
            const Tiles registers;
            const int64_t bytes = Operand<PLANES>::bytes(1, used);
            const Operand<PLANES> drives{reinterpret_cast<bf16*>(scratch<5>(bytes)), used};
            if (halves % 2) std::memset(drives.tile(0, used - 1), 0, PLANES * SIZE * sizeof(bf16));
            vec sum = load(biases + n * SIDE);
            for (int64_t tile = 0; tile < tiles; tile++) {
                const int64_t b = (first + tile) * SIDE, count = B - b < SIDE ? B - b : SIDE;
                const float* g = grad.at(first + tile, n);
                for (int64_t half = tile * T; half < (tile + 1) * T; half++, g += square) {
                    bf16* pair = drives.tile(0, half / 2) + half % 2 * SIZE / 2;
                    for (int64_t i = 0; i < SIDE; i += 2, pair += DEPTH) {
                        const vec one = i < count ? load(g + i * SIDE) : vec{};
                        const vec two = i + 1 < count ? load(g + (i + 1) * SIDE) : vec{};
                        sum += one + two;
                        put_pair<PLANES>(reinterpret_cast<__m512>(one), reinterpret_cast<__m512>(two), pair);
                    }
                }
            }
            store(biases + n * SIDE, sum);
            float* own = sums + n * K_tiles * square;
            const bool more = first > 0;
            product(spikes, K_tiles, drives, 0,
                    {more ? own : ZEROS, more ? square : 0, more ? SIDE : 0, own, square, SIDE});
        }
    }
    for (int64_t k = 0; k < l.K; k++)
        for (int64_t n = 0; n < N_tiles; n++)
            _mm512_mask_storeu_ps(grad_weight + k * l.N + n * SIDE, first_lanes(l.N - n * SIDE),
                                  _mm512_load_ps(sums + (n * K_tiles * SIDE + k) * SIDE));
    std::memcpy(grad_bias, biases, l.N * sizeof(float));
}

// A layer's weights as the right operand of its inputs' gradients.
Operand<PLANES> weights_by_output(const Layer& l) {
    const int64_t blocks = blocks_of(l.N), bytes = Operand<PLANES>::bytes(tiles_of(l.K), blocks);
    const Operand<PLANES> packed{reinterpret_cast<bf16*>(scratch<4>(bytes)), blocks};
    pack_right(ROWS, l.weight, l.N, l.N, l.K, packed);
    return packed;
}

// Gradients of the drives of the layer below, from those of this layer's.
void drive_gradients(const Store& st, int layer, const Layer& l, Squares grad, Squares out, int threads) {
    const int64_t B = st.samples, T = grad.T, square = SIDE * SIDE, tiles = tiles_of(B);
    const Operand<PLANES> weights = weights_by_output(l);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (tiles > 1)
    for (int64_t tile = 0; tile < tiles; tile++) {
        const Tiles registers;
        const int64_t count = B - tile * SIDE < SIDE ? B - tile * SIDE : SIDE;
        const int64_t bytes = Operand<PLANES>::bytes(T, weights.blocks);
        char* memory = scratch<5>(bytes + T * square * sizeof(float));
        const Operand<PLANES> drives{reinterpret_cast<bf16*>(memory), weights.blocks};
        float* spikes = reinterpret_cast<float*>(memory + bytes);
        for (int64_t n = 0; n < grad.columns; n += 2)
            for (int64_t t = 0; t < T; t++)
                for (int64_t i = 0; i < SIDE; i++) {
                    const int64_t place = t * square + i * SIDE;
                    const __mmask16 one = i < count ? first_lanes(l.N - n * SIDE) : 0;
                    const __mmask16 two = i < count ? first_lanes(l.N - n * SIDE - SIDE) : 0;
                    put_row<PLANES>(_mm512_maskz_loadu_ps(one, grad.at(tile, n) + place),
                                    _mm512_maskz_loadu_ps(two, grad.at(tile, n + 1) + place),
                                    drives.tile(t, n / 2) + i * DEPTH);
                }
        for (int64_t k = 0; k < out.columns; k++) {
            product(drives, T, weights, k, {ZEROS, 0, 0, spikes, square, SIDE});
            const float* voltage = st.voltage[layer - 1] + st.square(layer - 1, tile * SIDE, k * SIDE);
            for (int64_t i = 0; i < count * SIDE; i += SIDE)
                scan_back(*st.net, SIDE, square, spikes + i, square, voltage + i, out.at(tile, k) + i, nullptr);
        }
    }
}

// Gradients of the first layer's inputs, `out` (B and up to 15 more rows, Kp), from those of its drives, (B, Np).
void input_gradients(const Layer& l, int64_t B, const float* grad, float* out, int threads) {
    const Operand<PLANES> weights = weights_by_output(l);
    const int64_t Kp = padded(l.K), bytes = Operand<PLANES>::bytes(tiles_of(B), weights.blocks);
    const Operand<PLANES> drives{reinterpret_cast<bf16*>(scratch<5>(bytes)), weights.blocks};
    pack_left(ROWS, grad, l.Np, B, l.N, drives);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t k = 0; k < Kp; k += SIDE) {
        const Tiles registers;
        product(drives, tiles_of(B), weights, k / SIDE, {ZEROS, 0, 0, out + k, SIDE * Kp, Kp});
    }
}

// As `through_events`.
const float* through_tiles(const Store& st, const float* encoder_weight, const Decoded& decoded, const Gradients& out,
                           int threads) {
    const Net& net = *st.net;
    const int64_t B = st.samples, rows = tiles_of(B) * SIDE, T = net.spike_steps, square = SIDE * SIDE;
    int64_t widest = 0;
    for (int l = 0; l <= net.layers; l++) widest = padded(net.widths[l]) > widest ? padded(net.widths[l]) : widest;
    float* memory = reinterpret_cast<float*>(scratch<3>((2 * T + 1) * rows * widest * sizeof(float)));
    float *above = memory, *below = memory + rows * T * widest, *collapsed = memory + 2 * rows * T * widest;
    const int last = net.layers - 1;
    const Squares top_grad{above, T, tiles_of(net.widths[net.layers])};
    decoded.each(st, out, [&](int64_t b, const float* top) {
        for (int64_t n = 0; n < top_grad.columns; n++)
            scan_back(net, SIDE, square, top + n * SIDE, 0, st.voltage[last] + st.square(last, b, n * SIDE),
                      top_grad.at(b / SIDE, n) + b % SIDE * SIDE, nullptr);
    });
    for (int layer = last; layer >= 0; layer--) {
        const int64_t outputs = net.widths[layer + 1];
        const Layer l{net.widths[layer], outputs, padded(outputs), net.weights[layer]};
        const Squares grad{above, T, tiles_of(outputs)};
        weight_gradients(st, layer, l, grad, out.weight(layer), out.bias(layer), threads);
        if (layer > 0) {
            drive_gradients(st, layer, l, grad, {below, T, tiles_of(l.K)}, threads);
        } else {
            for (int64_t tile = 0; tile < tiles_of(B); tile++)
                for (int64_t n = 0; n < grad.columns; n++)
                    for (int64_t i = 0; i < SIDE; i++) {
                        vec sum = {};
                        for (int64_t t = 0; t < T; t++)
                            sum += encoder_weight[t] * load(grad.at(tile, n) + t * square + i * SIDE);
                        store(collapsed + (tile * SIDE + i) * l.Np + n * SIDE, sum);
                    }
            input_gradients(l, B, collapsed, below, threads);
        }
        std::swap(above, below);
    }
    return above;
}

}  // namespace
#endif

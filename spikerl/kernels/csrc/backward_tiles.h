// The backward pass on AMX.

#pragma once
#include "backward.h"
#include "forward_tiles.h"

#if HAS_TILES
namespace {

constexpr int64_t TILES_PER_PASS = 8;  // tiles of samples whose spikes and gradients fit the second-level cache

// Packs spikes as a left operand whose rows are inputs and whose depth is (steps, samples): 16 samples at one step are
// half a depth block, and the halves for the T steps follow each other from `half` on. `words`: (count, Kp).
void pack_spikes_by_input(const int32_t* words, int64_t K, int64_t count, int T, int64_t half, Operand<1> out) {
    const int64_t Kp = padded(K);
    alignas(64) int32_t square[SIDE * SIDE];
    for (int64_t k = 0; k < K; k += SIDE) {
        for (int64_t b = 0; b < SIDE; b++) {
            const __mmask16 lanes = b < count ? lane_mask(K - k) : 0;
            _mm512_store_si512(square + b * SIDE, _mm512_maskz_loadu_epi32(lanes, words + b * Kp + k));
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

// Gradients of drives, stored as voltages are: a block (T, 16, 16) for 16 samples and 16 neurons.
struct DriveGradients {
    float* data;
    int64_t T, columns;  // blocks of neurons
    float* at(int64_t tile, int64_t n) const { return data + (tile * columns + n) * T * SIDE * SIDE; }
};

// Gradients of a layer's weights and biases, from those of its drives.
void weight_gradients(const Activations& acts, int layer, const Layer& l, DriveGradients grad, float* grad_weight,
                      float* grad_bias, int threads) {
    const int T = acts.net->spike_steps;
    const int64_t B = acts.samples, K_tiles = tiles_of(l.K), N_tiles = tiles_of(l.N), square = SIDE * SIDE;
    const int64_t pass_blocks = (std::min(tiles_of(B), TILES_PER_PASS) * T + 1) / 2;
    Scratch memory;
    float *sums = memory.array<float>(N_tiles * K_tiles * square), *biases = memory.array<float>(N_tiles * SIDE);
    bf16* const packed = Operand<1>::allocate(memory, K_tiles, pass_blocks).data;
    std::memset(biases, 0, N_tiles * SIDE * sizeof(float));
    for (int64_t first = 0; first < tiles_of(B); first += TILES_PER_PASS) {
        const int64_t tiles = std::min(TILES_PER_PASS, tiles_of(B) - first);
        const int64_t halves = tiles * T, blocks = (halves + 1) / 2;
        const Operand<1> spikes{packed, blocks};
        if (halves % 2)  // the last half has no spikes
            for (int64_t k = 0; k < K_tiles; k++) std::memset(spikes.tile(k, blocks - 1), 0, SIZE * sizeof(bf16));
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int64_t b = (first + tile) * SIDE, count = std::min(SIDE, B - b);
            pack_spikes_by_input(acts.words[layer] + b * padded(l.K), l.K, count, T, tile * T, spikes);
        }
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int64_t n = 0; n < N_tiles; n++) {
            const TileRegisters registers;
            Scratch of_thread;
            const auto drives = Operand<PLANES>::allocate(of_thread, 1, blocks);
            if (halves % 2) std::memset(drives.tile(0, blocks - 1), 0, PLANES * SIZE * sizeof(bf16));
            vec sum = load(biases + n * SIDE);
            for (int64_t tile = 0; tile < tiles; tile++) {
                const int64_t b = (first + tile) * SIDE, count = std::min(SIDE, B - b);
                const float* g = grad.at(first + tile, n);
                for (int64_t half = tile * T; half < (tile + 1) * T; half++, g += square) {
                    bf16* pair = drives.tile(0, half / 2) + half % 2 * SIZE / 2;
                    for (int64_t i = 0; i < SIDE; i += 2, pair += DEPTH) {
                        const vec even = i < count ? load(g + i * SIDE) : vec{};
                        const vec odd = i + 1 < count ? load(g + (i + 1) * SIDE) : vec{};
                        sum += even + odd;
                        store_planes<PLANES, Interleave>(reinterpret_cast<__m512>(even),
                                                         reinterpret_cast<__m512>(odd), pair);
                    }
                }
            }
            store(biases + n * SIDE, sum);
            float* own = sums + n * K_tiles * square;
            const bool continues = first > 0;
            multiply(spikes, K_tiles, drives, 0,
                     {continues ? own : ZEROS, continues ? square : 0, continues ? SIDE : 0, own, square, SIDE});
        }
    }
    for (int64_t k = 0; k < l.K; k++)
        for (int64_t n = 0; n < N_tiles; n++)
            _mm512_mask_storeu_ps(grad_weight + k * l.N + n * SIDE, lane_mask(l.N - n * SIDE),
                                  _mm512_load_ps(sums + (n * K_tiles * SIDE + k) * SIDE));
    std::memcpy(grad_bias, biases, l.N * sizeof(float));
}

// A layer's weights as the right operand that gives its inputs' gradients.
Operand<PLANES> pack_weights_by_output(const Layer& l, Scratch& memory) {
    const auto packed = Operand<PLANES>::allocate(memory, tiles_of(l.K), blocks_of(l.N));
    pack_right(ROWS, l.weight, l.N, l.N, l.K, packed);
    return packed;
}

// Gradients of the drives of the layer below, `out`, from those of this layer, `grad`; `by_decay` (B): each sample's
// gradient of the lower layer's voltage_decay.
void drive_gradients(const Activations& acts, int layer, const Layer& l, const ActionGradients& actions,
                     DriveGradients grad, DriveGradients out, float* by_decay, int threads) {
    const int64_t B = acts.samples, T = grad.T, square = SIDE * SIDE, tiles = tiles_of(B);
    Scratch memory;
    const Operand<PLANES> weights = pack_weights_by_output(l, memory);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (tiles > 1)
    for (int64_t tile = 0; tile < tiles; tile++) {
        const TileRegisters registers;
        const int64_t count = std::min(SIDE, B - tile * SIDE);
        Scratch of_thread;
        const auto drives = Operand<PLANES>::allocate(of_thread, T, weights.blocks);
        float* grad_spikes = of_thread.array<float>(T * square);
        float* own_decay = by_decay + tile * SIDE;
        std::memset(own_decay, 0, count * sizeof(float));
        for (int64_t n = 0; n < grad.columns; n += 2)
            for (int64_t t = 0; t < T; t++)
                for (int64_t i = 0; i < SIDE; i++) {
                    const int64_t row = t * square + i * SIDE;
                    const __mmask16 first = i < count ? lane_mask(l.N - n * SIDE) : 0;
                    const __mmask16 second = i < count ? lane_mask(l.N - n * SIDE - SIDE) : 0;
                    store_planes<PLANES, Concatenate>(_mm512_maskz_loadu_ps(first, grad.at(tile, n) + row),
                                                      _mm512_maskz_loadu_ps(second, grad.at(tile, n + 1) + row),
                                                      drives.tile(t, n / 2) + i * DEPTH);
                }
        for (int64_t k = 0; k < out.columns; k++) {
            multiply(drives, T, weights, k, {ZEROS, 0, 0, grad_spikes, square, SIDE});
            actions.add_cost(layer - 1, grad_spikes, T * SIDE, SIDE, std::min(SIDE, l.K - k * SIDE));
            const float* voltage = acts.voltage[layer - 1] + acts.square_offset(layer - 1, tile * SIDE, k * SIDE);
            for (int64_t b = 0, i = 0; b < count; b++, i += SIDE)
                own_decay[b] += scan_back(acts.neurons[layer - 1], int(T), SIDE, square, grad_spikes + i, square,
                                          voltage + i, out.at(tile, k) + i, nullptr);
        }
    }
}

// Gradients of the first layer's inputs, `out` (B in whole tiles, Kp), from those of its drives, (B, Np).
void input_gradients(const Layer& l, int64_t B, const float* grad, float* out, int threads) {
    Scratch memory;
    const Operand<PLANES> weights = pack_weights_by_output(l, memory);
    const int64_t Kp = padded(l.K);
    const auto drives = Operand<PLANES>::allocate(memory, tiles_of(B), weights.blocks);
    pack_left(ROWS, grad, l.Np, B, l.N, drives);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t k = 0; k < Kp; k += SIDE) {
        const TileRegisters registers;
        multiply(drives, tiles_of(B), weights, k / SIDE, {ZEROS, 0, 0, out + k, SIDE * Kp, Kp});
    }
}

// As backward_events.
const float* backward_tiles(const Activations& acts, const float* encoder_weight, const ActionGradients& actions,
                            const Gradients& out, Scratch& memory, int threads) {
    const Net& net = *acts.net;
    const int64_t B = acts.samples, rows = tiles_of(B) * SIDE, T = net.spike_steps, square = SIDE * SIDE;
    const int64_t widest = widest_layer(net);
    float *above = memory.array<float>(rows * T * widest), *below = memory.array<float>(rows * T * widest);
    float* summed = memory.array<float>(rows * widest);  // drive gradients, summed with the steps' weights
    float* by_decay = memory.array<float>(B);             // each sample's gradient of a layer's voltage_decay
    std::memset(by_decay, 0, B * sizeof(float));
    const int last = net.layers - 1;
    const DriveGradients last_grad{above, T, tiles_of(net.widths[net.layers])};
    actions.decoder_backward(acts, out, [&](int64_t b, const float* grad_spikes) {
        for (int64_t n = 0; n < last_grad.columns; n++)
            by_decay[b] += scan_back(acts.neurons[last], int(T), SIDE, square, grad_spikes + n * SIDE, 0,
                                     acts.voltage[last] + acts.square_offset(last, b, n * SIDE),
                                     last_grad.at(b / SIDE, n) + b % SIDE * SIDE, nullptr);
    });
    for (int layer = last; layer >= 0; layer--) {
        const Layer l(net, layer);
        const DriveGradients grad{above, T, tiles_of(l.N)};
        out.put_decay(acts, layer, by_decay);
        weight_gradients(acts, layer, l, grad, out.weight(layer), out.bias(layer), threads);
        if (layer > 0) {
            drive_gradients(acts, layer, l, actions, grad, {below, T, tiles_of(l.K)}, by_decay, threads);
        } else {
            for (int64_t b = 0; b < B; b++)
                for (int64_t n = 0; n < grad.columns; n++) {
                    const float* g = grad.at(b / SIDE, n) + b % SIDE * SIDE;
                    vec sum = {};
                    for (int64_t t = 0; t < T; t++) sum += encoder_weight[t] * load(g + t * square);
                    store(summed + b * l.Np + n * SIDE, sum);
                }
            input_gradients(l, B, summed, below, threads);
        }
        std::swap(above, below);
    }
    return above;
}

}  // namespace
#endif

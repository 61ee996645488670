// A population-coded spiking actor on the CPU, event-driven.
//
// The spikes of a neuron over the T spike steps of a decision are the bits of one word. The weights of inputs with
// equal words are summed first, and the sum is added to the drive at each step of that word: no product with 0 is
// formed, and a weight is read once however often its input fires. The backward pass reads the same lists for weight
// gradients, and sums input gradients over those neurons alone that still have a gradient: a neuron has none after its
// last step inside the surrogate window.
//
// Every source is compiled once for each instruction set; the vector width follows from the flags. The order of sums
// over a batch does not depend on the number of threads, so results are bitwise equal.
//
// Shapes   B samples, T spike steps, K inputs and N neurons of a layer, O observation entries, A actions.
//          Weights are input-major (K, N). Rows of neurons are padded to whole vectors (Kp, Np).

#pragma once
#include <type_traits>

#include "memory.h"
#include "neurons.h"
#include "tiles.h"

namespace {

constexpr int CHUNK = 8;                   // spike steps that one list of events covers, at most
constexpr int MAX_LAYERS = 16;
constexpr int BLOCK = 2;                   // vectors of neurons that are computed together
constexpr int64_t SAMPLE_BLOCK = 16;       // samples per block of weights in the first-level cache
constexpr int64_t TILE_SAMPLE_BLOCK = 64;  // samples per AMX operand of weights in the second-level cache
constexpr int64_t MAX_UNPACKED = 4;        // samples up to which packing weights costs more than it gains

// Calls `f` with the number of steps of a chunk as a compile-time constant.
template <class F>
inline void with_steps(int steps, F f) {
    switch (steps) {
        case 1: return f(std::integral_constant<int, 1>{});
        case 2: return f(std::integral_constant<int, 2>{});
        case 3: return f(std::integral_constant<int, 3>{});
        case 4: return f(std::integral_constant<int, 4>{});
        case 5: return f(std::integral_constant<int, 5>{});
        case 6: return f(std::integral_constant<int, 6>{});
        case 7: return f(std::integral_constant<int, 7>{});
        case 8: return f(std::integral_constant<int, 8>{});
    }
}
static_assert(CHUNK == 8, "with_steps covers the steps of a chunk");

// 1.0 at the steps of a chunk at which a word's bit is set.
struct Bits {
    float of[1 << CHUNK][CHUNK];
    constexpr Bits() : of() {
        for (int word = 0; word < 1 << CHUNK; word++)
            for (int t = 0; t < CHUNK; t++) of[word][t] = float(word >> t & 1);
    }
};
constexpr Bits BITS;

}  // namespace

extern "C" {

struct Net {
    int32_t obs_dim, pop_size, act_dim, out_pop_size, spike_steps, layers;
    float encoder_threshold;
    Neurons neurons;
    const float* const* decay_logits;  // one for each layer if the neurons learn their voltage_decay; else null
    const int32_t* widths;  // (layers + 1): of the encoder and of every layer
    const float *mean, *std;
    const float* const* weights;
    const float* const* biases;
    const float *out_weight, *out_bias;
    int32_t analog;         // whether the encoder gives its activities at every spike step; else spikes
    int32_t squashes;       // whether spikerl_act applies tanh to the observation; for batches the caller does
    int32_t exit_steps;     // k of early exit, see snn/early_exit.py; 0: the decision is the last step's action
    float exit_threshold;
};
}

namespace {

// Whether a batch is computed from lists of events; otherwise on AMX.
inline bool uses_events(const Net& net, int64_t B) { return !HAS_TILES || B <= MAX_UNPACKED || net.analog; }

// The neurons of a layer, which may learn their own voltage_decay: the sigmoid of a parameter.
inline Neurons neurons_of(const Net& net, int layer) {
    Neurons k = net.neurons;
    if (net.decay_logits) k.voltage_decay = 1.0f / (1.0f + std::exp(-*net.decay_logits[layer]));
    return k;
}

struct Segment {
    int32_t word, end;  // inputs of the list up to `end` have this word
};

// The inputs of one sample that fired in a chunk, ordered by word.
struct Events {
    int32_t* count;  // of segments
    Segment* segments;
    int32_t* inputs;
};

// What the forward pass computes for `samples` samples and the backward pass reads, in one block of memory.
struct Activations {
    Arena memory;
    const Net* net;
    Neurons neurons[MAX_LAYERS];
    int64_t samples, chunks;
    bool for_backward;               // else voltages are not read later, and all samples share one place for them
    bool has_events;
    float* activity;                 // (B, K0p) of the encoder
    int32_t* words[MAX_LAYERS + 1];  // (B, Kp) of the encoder and of every layer
    float* voltage[MAX_LAYERS];      // (B, T, Np); on AMX in squares, see `square_offset`
    int32_t* counts[MAX_LAYERS];     // events of a layer's inputs: (B, chunks)
    Segment* segments[MAX_LAYERS];   // (B, chunks, K + 1)
    int32_t* inputs[MAX_LAYERS];     // (B, chunks, K)

    Activations(const Net* net_, int64_t samples_, bool for_backward_, bool has_events_, char* base)
        : memory(base), net(net_), samples(samples_), for_backward(for_backward_), has_events(has_events_) {
        const int64_t T = net->spike_steps, square_rows = for_backward ? padded(samples) : W;
        const int64_t voltage_rows = !has_events ? square_rows : for_backward ? samples : 1;
        chunks = (T + CHUNK - 1) / CHUNK;
        activity = memory.array<float>(samples * padded(net->widths[0]));
        for (int l = 0; l <= net->layers; l++) {
            const int64_t K = net->widths[l];
            words[l] = memory.array<int32_t>(samples * padded(K));
            if (l > 0) voltage[l - 1] = memory.array<float>(voltage_rows * T * padded(K));
            if (l < net->layers) neurons[l] = neurons_of(*net, l);
            if (l == net->layers || !has_events) continue;
            counts[l] = memory.array<int32_t>(samples * chunks);
            segments[l] = memory.array<Segment>(samples * chunks * (K + 1));
            inputs[l] = memory.array<int32_t>(samples * chunks * K);
        }
    }

    Events events(int layer, int64_t b, int64_t chunk) const {
        const int64_t row = b * chunks + chunk, K = net->widths[layer];
        return {counts[layer] + row, segments[layer] + row * (K + 1), inputs[layer] + row * K};
    }

    // On AMX, voltages of W samples and W neurons form a block (T, W, W): the place of sample b and neuron n at step 0.
    int64_t square_offset(int layer, int64_t b, int64_t n) const {
        const int64_t Np = padded(net->widths[layer + 1]);
        return ((b / W * (Np / W) + n / W) * net->spike_steps * W + b % W) * W;
    }

    int64_t first_step(int64_t chunk) const { return net->spike_steps * chunk / chunks; }
};

// A layer's sizes and weights, and the copies that the forward pass makes of them.
struct Layer {
    int64_t K, N, Np;
    const float* weight;            // (K, N)
    const float* bias = nullptr;    // (Np)
    const float* last = nullptr;    // the last row of `weight`, padded: vectors may not read beyond its end
    const float* packed = nullptr;  // null if weights are used in place

    Layer(const Net& net, int layer)
        : K(net.widths[layer]), N(net.widths[layer + 1]), Np(padded(N)), weight(net.weights[layer]) {}
    Layer() = default;
};

// Columns of a layer's weights in place: row k begins at `first + k * stride`. Only the last row is a padded copy, as
// whole vectors are read.
struct UnpackedColumns {
    const float* first;
    int64_t stride;
    const float* last;
    int64_t last_row;
    const float* row(int64_t k) const { return k == last_row ? last : first + k * stride; }
};

// V vectors of columns, packed row after row.
template <int V>
struct PackedColumns {
    const float* first;
    const float* row(int64_t k) const { return first + k * V * W; }
};

// Rows of a matrix that are multiplied at once with V vectors of columns: as many sums as registers hold.
template <int V>
constexpr int ROWS_AT_ONCE = W == 16 ? 16 / V : V == 4 ? 2 : 4;

// out (rows, out_stride) = left (rows, K) times K rows of V vectors of columns, R rows at a time.
template <int V, class Columns, int R = ROWS_AT_ONCE<V>>
void multiply_dense(int64_t from, int64_t to, int64_t K, const float* left, int64_t stride, const Columns& columns,
                    float* out, int64_t out_stride) {
    for (; to - from >= R; from += R) {
        vec sums[R][V] = {};
        for (int64_t k = 0; k < K; k++) {
            const float* row = columns.row(k);
#pragma GCC unroll 16
            for (int r = 0; r < R; r++)
                for (int j = 0; j < V; j++) sums[r][j] += load(row + j * W) * left[(from + r) * stride + k];
        }
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
            for (int j = 0; j < V; j++) store(out + (from + r) * out_stride + j * W, sums[r][j]);
    }
    if constexpr (R > 1) multiply_dense<V, Columns, R / 2>(from, to, K, left, stride, columns, out, out_stride);
}

inline int64_t widest_layer(const Net& net) {
    return padded(*std::max_element(net.widths, net.widths + net.layers + 1));
}

}  // namespace

// Dense ReLU networks, several of one shape side by side, and their gradients. They give values of (observation,
// action), one output each, or actions, the tanh of a network's outputs.
//
// Products are formed over lists of the units that are not 0 (critics_lists.h), or on AMX (critics_tiles.h). The order
// of a sum does not depend on the number of threads.
//
// Shapes   C networks, B samples, O observation and A action entries, I inputs and N outputs of a layer, M outputs of a
//          network. Weights are (C, I, N). Rows of units are padded to whole panels (Ip, Np).

#pragma once
#include <cmath>

#include "memory.h"
#include "tiles.h"

extern "C" {

struct Critic {
    int32_t networks, layers, obs_dim, act_dim;
    const int32_t* widths;  // (layers + 1): of the input, of every hidden layer, and of the outputs
    const float* const* weights;
    const float* const* biases;
    int32_t planes;  // bf16 planes of a number in a product: 3 for float32; 1 for bf16, which needs AMX
};
}

namespace {

constexpr int VECTORS = 4;
constexpr int64_t PANEL = VECTORS * W;  // columns that are computed together

constexpr int64_t whole_panels(int64_t n) { return (n + PANEL - 1) / PANEL * PANEL; }

// The units of each row that are not 0: `counts` (B), `index` and `value` (B, Np).
struct Lists {
    int32_t *counts, *index;
    float* value;
    int64_t Np;

    static Lists allocate(Scratch& memory, int64_t B, int64_t Np) {
        // An append writes a whole vector, also beyond the end of its row.
        return {memory.array<int32_t>(B), memory.array<int32_t>(B * Np + W), memory.array<float>(B * Np + W), Np};
    }
    // Units n to n + W of row b, where `active`.
    void add(int64_t b, int64_t n, vec v, ivec active) const {
        const int64_t end = b * Np + counts[b];
        append(index + end, iota(int32_t(n)), active);
        counts[b] += append(reinterpret_cast<int32_t*>(value + end), reinterpret_cast<ivec>(v), active);
    }
};

struct Layer {
    int64_t I, N, Np;
    const float *weight, *bias;
};

// One network in a call: its inputs, units, values and gradients.
struct Network {
    const Critic* critic;
    int64_t c, B;
    const float* x;                        // (B, I)
    std::vector<float*> hidden;            // (B, Np) of every hidden layer
    std::vector<float*> grad_hidden;       // gradients before the ReLU, (B, Np), where needed
    std::vector<Lists> grad_hidden_lists;  // the same as lists, where products are formed over those
    float *values, *grad;                  // (B, M), and the gradient of these

    Layer layer(int64_t l) const {
        const int64_t I = critic->widths[l], N = critic->widths[l + 1];
        return {I, N, whole_panels(N), critic->weights[l] + c * I * N, critic->biases[l] + c * N};
    }
    // A layer's input, and the stride between its rows.
    const float* input(int64_t l) const { return l ? hidden[l - 1] : x; }
    int64_t input_stride(int64_t l) const { return l ? whole_panels(critic->widths[l]) : critic->widths[0]; }
    int64_t last() const { return critic->layers - 1; }
    int64_t outputs() const { return critic->widths[critic->layers]; }
};

enum GradientsOf { NOTHING, INPUTS, PARAMETERS };

// Size of the array for a hidden layer's units (B, Np), with W more rows because whole tiles are read and written.
inline int64_t hidden_size(const Critic& critic, int64_t l, int64_t B) {
    return (B + W) * whole_panels(critic.widths[l + 1]);
}

// The networks, with memory for a call that computes these gradients, and their input (B, O + A). Unless it is null,
// `saved` holds the hidden units, which a forward call leaves there for a backward call.
inline std::vector<Network> prepare(const Critic& critic, int64_t B, const float* obs, const float* act,
                                    GradientsOf gradients, bool lists, Scratch& memory, char* saved = nullptr) {
    Arena own(saved);
    const int64_t O = critic.obs_dim, A = critic.act_dim;
    float* x = memory.array<float>(B * critic.widths[0]);
    for (int64_t b = 0; b < B; b++) {
        std::memcpy(x + b * (O + A), obs + b * O, O * sizeof(float));
        if (A > 0) std::memcpy(x + b * (O + A) + O, act + b * A, A * sizeof(float));
    }
    std::vector<Network> nets;
    for (int64_t c = 0; c < critic.networks; c++) {
        Network net{&critic, c, B, x, {}, {}, {}, nullptr, nullptr};
        for (int64_t l = 0; l < net.last(); l++) {
            const int64_t Np = net.layer(l).Np, size = hidden_size(critic, l, B);
            net.hidden.push_back(saved ? own.array<float>(size) : memory.array<float>(size));
            if (gradients == PARAMETERS || (gradients == INPUTS && !lists))
                net.grad_hidden.push_back(memory.array<float>(size));
            if (gradients != NOTHING && lists) net.grad_hidden_lists.push_back(Lists::allocate(memory, B, Np));
        }
        net.values = memory.array<float>(B * net.outputs());
        net.grad = memory.array<float>(B * net.outputs());
        nets.push_back(net);
    }
    return nets;
}

// The last layer's weights by output, (M, Ip).
inline float* transpose_last_weights(const Layer& layer, Scratch& memory) {
    const int64_t Ip = whole_panels(layer.I), M = layer.N;
    float* weight = memory.array<float>(M * Ip);
    std::memset(weight, 0, M * Ip * sizeof(float));
    for (int64_t k = 0; k < layer.I; k++)
        for (int64_t m = 0; m < M; m++) weight[m * Ip + k] = layer.weight[k * M + m];
    return weight;
}

// Values of rows `from` to `to`, from the last hidden layer.
inline void last_forward(const Network& net, int64_t from, int64_t to) {
    const Layer layer = net.layer(net.last());
    const int64_t Ip = whole_panels(layer.I), M = layer.N;
    Scratch memory;
    const float* weight = transpose_last_weights(layer, memory);
    for (int64_t b = from; b < to; b++)
        for (int64_t m = 0; m < M; m++) {
            vec sum = {};
            for (int64_t k = 0; k < layer.I; k += W)  // not up to Ip: on AMX, hidden units beyond are not set
                sum += load(net.hidden.back() + b * Ip + k) * load(weight + m * Ip + k);
            float value = layer.bias[m];
            for (int k = 0; k < W; k++) value += sum[k];
            net.values[b * M + m] = value;
        }
}

// Gradients of the last layer's weights and biases.
inline void last_weight_gradients(const Network& net, float* grad_weight, float* grad_bias) {
    const Layer layer = net.layer(net.last());
    const int64_t Ip = whole_panels(layer.I), M = layer.N;
    for (int64_t m = 0; m < M; m++) {
        grad_bias[m] = 0.0f;
        for (int64_t b = 0; b < net.B; b++) grad_bias[m] += net.grad[b * M + m];
        for (int64_t i = 0; i < layer.I; i += W) {
            vec sum = {};
            for (int64_t b = 0; b < net.B; b++) sum += load(net.hidden.back() + b * Ip + i) * net.grad[b * M + m];
            for (int64_t k = 0; k < W && i + k < layer.I; k++) grad_weight[(i + k) * M + m] = sum[k];
        }
    }
}

}  // namespace

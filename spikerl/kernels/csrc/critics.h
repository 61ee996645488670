// ReLU networks, several of one shape side by side, and their gradients: values of (observation, action), one output
// each; or actions, the tanh of a network's outputs.
//
// Their products run over lists of the units that are not 0 (critics_lists.h), or on matrix units (critics_tiles.h). A
// sum is formed in one order whatever the number of threads.
//
// Shapes   C networks, B samples, O observation and A action entries, I inputs and N outputs of a layer, M outputs of a
//          network. Weights are (C, I, N). Rows of units are padded to whole panels (Np).

#pragma once
#include <cmath>

#include "tiles.h"

extern "C" {

struct Critic {
    int32_t networks, layers, obs_dim, act_dim;
    const int32_t* widths;  // layers + 1: of the input, of every hidden layer, and of the outputs
    const float* const* weights;
    const float* const* biases;
    int32_t planes;  // of the numbers that a product takes: 3 is float32, 1 is bf16, which takes matrix units
};
}

namespace {

constexpr int VECTORS = 4;
constexpr int64_t PANEL = VECTORS * W;  // columns that are computed together

constexpr int64_t whole_panels(int64_t n) { return (n + PANEL - 1) / PANEL * PANEL; }

// Units that are not 0, of each row: `counts` (B), `index` and `value` (B, Np).
struct Lists {
    int32_t *counts, *index;
    float* value;
    int64_t Np;

    void add(int64_t b, int64_t n, vec v, ivec active) const {
        const int64_t end = b * Np + counts[b];
        append(index + end, counting_from(int32_t(n)), active);
        counts[b] += append(reinterpret_cast<int32_t*>(value + end), reinterpret_cast<ivec>(v), active);
    }
};

struct Layer {
    int64_t I, N, Np;
    const float *weight, *bias;
};

// Everything of one network that a call computes, in memory of the calling thread.
struct Network {
    const Critic* critic;
    int64_t c, B;
    const float* x;                  // (B, I)
    std::vector<float*> hidden;      // (B, Np) of every hidden layer
    std::vector<float*> drives;      // gradients of their drives, (B, Np), where something needs them
    std::vector<Lists> gradients;    // the same as lists, where products run over those
    float *values, *grad;            // (B, M), and of the values

    Layer layer(int64_t l) const {
        const int64_t I = critic->widths[l], N = critic->widths[l + 1];
        return {I, N, whole_panels(N), critic->weights[l] + c * I * N, critic->biases[l] + c * N};
    }
    int64_t last() const { return critic->layers - 1; }
    int64_t outputs() const { return critic->widths[critic->layers]; }
};

// Carves arrays out of a block; with no block, counts its bytes.
struct Block {
    char* base;
    int64_t bytes = 0;

    template <class X>
    X* take(int64_t count) {
        X* place = reinterpret_cast<X*>(base + bytes);
        bytes += (count * int64_t(sizeof(X)) + 63) / 64 * 64;
        return place;
    }
};

inline Lists take_lists(Block& block, int64_t B, int64_t Np) {
    // An append writes a whole vector, beyond the end of its row too.
    return {block.take<int32_t>(B), block.take<int32_t>(B * Np + W), block.take<float>(B * Np + W), Np};
}

// What a call differentiates by.
enum By { NOTHING, INPUTS, PARAMETERS };

inline std::vector<Network> place(const Critic& critic, int64_t B, By by, bool lists, Block& block) {
    std::vector<Network> nets;
    const float* x = block.take<float>(B * critic.widths[0]);
    for (int64_t c = 0; c < critic.networks; c++) {
        Network net{&critic, c, B, x, {}, {}, {}, nullptr, nullptr};
        for (int64_t l = 0; l < net.last(); l++) {
            const int64_t Np = net.layer(l).Np;
            net.hidden.push_back(block.take<float>((B + W) * Np));  // whole tiles are read and written
            if (by == PARAMETERS || (by == INPUTS && !lists)) net.drives.push_back(block.take<float>((B + W) * Np));
            if (by != NOTHING && lists) net.gradients.push_back(take_lists(block, B, Np));
        }
        net.values = block.take<float>(B * net.outputs());
        net.grad = block.take<float>(B * net.outputs());
        nets.push_back(net);
    }
    return nets;
}

inline std::vector<Network> start(const Critic& critic, int64_t B, const float* obs, const float* act, By by, bool lists) {
    Block counted{nullptr};
    place(critic, B, by, lists, counted);
    Block block{scratch<20>(counted.bytes)};
    std::vector<Network> nets = place(critic, B, by, lists, block);
    const int64_t O = critic.obs_dim, A = critic.act_dim;
    float* x = const_cast<float*>(nets[0].x);
    for (int64_t b = 0; b < B; b++, x += O + A) {
        std::memcpy(x, obs + b * O, O * sizeof(float));
        if (A > 0) std::memcpy(x + O, act + b * A, A * sizeof(float));
    }
    return nets;
}

// The last layer's weights by output, (M, Ip).
inline float* by_output(const Layer& layer) {
    const int64_t Ip = whole_panels(layer.I), M = layer.N;
    float* weight = reinterpret_cast<float*>(scratch<24>(M * Ip * sizeof(float)));
    std::memset(weight, 0, M * Ip * sizeof(float));
    for (int64_t k = 0; k < layer.I; k++)
        for (int64_t m = 0; m < M; m++) weight[m * Ip + k] = layer.weight[k * M + m];
    return weight;
}

// Values of rows `from` to `to`, from the last hidden layer.
inline void last_values(const Network& net, int64_t from, int64_t to) {
    const Layer layer = net.layer(net.last());
    const int64_t Ip = whole_panels(layer.I), M = layer.N;
    const float* weight = by_output(layer);
    for (int64_t b = from; b < to; b++)
        for (int64_t m = 0; m < M; m++) {
            vec sum = {};
            for (int64_t k = 0; k < layer.I; k += W)  // nobody wrote what lies further
                sum += load(net.hidden.back() + b * Ip + k) * load(weight + m * Ip + k);
            float value = layer.bias[m];
            for (int k = 0; k < W; k++) value += sum[k];
            net.values[b * M + m] = value;
        }
}

// Gradients of the last layer's weights and biases.
inline void last_gradients(const Network& net, float* grad_weight, float* grad_bias) {
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

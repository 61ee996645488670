// Shared by the event-driven backward pass and the one on AMX.

#pragma once
#include <utility>

#include "spiking.h"

namespace {

// Where the gradient of each parameter goes.
struct Gradients {
    float *mean, *std;
    float* const* layers;
    float* const* decay_logits;  // one for each layer if neurons learn their decays
    float *out_weight, *out_bias;
    Gradients(const Net& net, float* const* grads)
        : mean(grads[0]), std(grads[1]), layers(grads + 2), decay_logits(layers + 2 * net.layers) {
        float* const* decoder = decay_logits + (net.decay_logits ? net.layers : 0);
        out_weight = decoder[0], out_bias = decoder[1];
    }
    float* weight(int layer) const { return layers[2 * layer]; }
    float* bias(int layer) const { return layers[2 * layer + 1]; }

    // Writes the gradient of a layer's decay logit from `by_decay` (B), each sample's gradient of its voltage_decay.
    void put_decay(const Activations& acts, int layer, const float* by_decay) const {
        if (!acts.net->decay_logits) return;
        const float decay = acts.neurons[layer].voltage_decay;
        double sum = 0.0;
        for (int64_t b = 0; b < acts.samples; b++) sum += by_decay[b];
        *decay_logits[layer] = float(sum) * decay * (1.0f - decay);
    }
};

// Actions (null if they are not squashed) and their gradient, (B, A); `by_spike` (layers): the gradient of the spike
// cost with respect to a single spike of each layer, null if spikes cost nothing.
struct ActionGradients {
    const float *act, *grad, *by_spike;

    // Adds the spike cost's gradient to the gradients of a layer's spikes, `rows` rows of `count` neurons.
    void add_cost(int layer, float* grad_spikes, int64_t rows, int64_t stride, int64_t count) const {
        if (!by_spike) return;
        for (int64_t row = 0; row < rows; row++)
            for (int64_t n = 0; n < count; n++) grad_spikes[row * stride + n] += by_spike[layer];
    }

    // Writes the decoder's gradients; calls `f(b, grad_spikes)` for each sample with the gradient of the last layer's
    // spikes, (Np), which is the same at each step.
    template <class F>
    void decoder_backward(const Activations& acts, const Gradients& out, F f) const {
        const Net& net = *acts.net;
        const int64_t A = net.act_dim, T = net.spike_steps, N = net.widths[net.layers], Np = padded(N);
        std::memset(out.out_weight, 0, N * sizeof(float));
        std::memset(out.out_bias, 0, A * sizeof(float));
        Scratch memory;
        float* grad_spikes = memory.array<float>(Np);
        std::memset(grad_spikes, 0, Np * sizeof(float));
        for (int64_t b = 0; b < acts.samples; b++) {
            const int32_t* words = acts.words[net.layers] + b * Np;
            for (int64_t a = 0, n = 0; a < A; a++) {
                const float y = act ? act[b * A + a] : 0.0f, g = grad[b * A + a] * (1.0f - y * y);
                out.out_bias[a] += g;
                for (int64_t p = 0; p < net.out_pop_size; p++, n++) {
                    out.out_weight[n] += g * (float(__builtin_popcount(words[n])) / float(T));
                    grad_spikes[n] = g * net.out_weight[n] / float(T);
                }
            }
            add_cost(net.layers - 1, grad_spikes, 1, Np, N);
            f(b, grad_spikes);
        }
    }
};

}  // namespace

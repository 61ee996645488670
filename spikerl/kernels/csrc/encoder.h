// Receptive fields: their activities, the encoder's spikes, and the backward pass.

#pragma once
#include "spiking.h"

namespace {

// Activities and words of the encoder for one sample. With uniform draws (K0 for each step) it is a Poisson coder,
// whose inputs fire where the draw is below their activity.
inline void encode(const Activations& acts, int64_t b, const float* obs, const float* uniform,
                   int64_t uniform_stride) {
    const Net& net = *acts.net;
    const int64_t K = net.widths[0], Kp = padded(K);
    float* activity = acts.activity + b * Kp;
    int32_t* words = acts.words[0] + b * Kp;
    store(activity + Kp - W, vec{});  // clears the padding, whose old values may be denormal, and slow
    for (int64_t o = 0, k = 0; o < net.obs_dim; o++)
        for (int64_t p = 0; p < net.pop_size; p++, k++) activity[k] = obs[o];
    float last_mean[W] = {}, last_std[W], last_uniform[W] = {};  // the last vectors, padded
    store(last_std, broadcast(1.0f));
    const int64_t last = Kp - W;
    std::memcpy(last_mean, net.mean + last, (K - last) * sizeof(float));
    std::memcpy(last_std, net.std + last, (K - last) * sizeof(float));
    for (int64_t k = 0; k < Kp; k += W) {
        vec mean = load(k == last ? last_mean : net.mean + k), std = load(k == last ? last_std : net.std + k);
        vec distance = load(activity + k) - mean;
        vec a = exp_of(distance * distance * -0.5f / (std * std));
        store(activity + k, a);
        if (net.analog) continue;
        vec v = {};
        ivec word = {};
        for (int t = 0; t < net.spike_steps; t++) {
            ivec fired;
            if (uniform) {
                const float* u = uniform + t * uniform_stride + k;
                if (k == last) std::memcpy(last_uniform, u, (K - last) * sizeof(float)), u = last_uniform;
                fired = load(u) < a;
            } else {
                v += a;
                fired = v > net.encoder_threshold;
                v = fired ? v - net.encoder_threshold : v;
            }
            word |= fired & int32_t(1u << t);
        }
        store(words + k, word);
    }
}

// Weights w_t of the spikes' gradients in the gradient of their neuron's activity, dA = sum over t of w_t d(spike t).
// A spike's gradient passes unchanged to the voltage, so w_t = dv_t / dA = sum over i <= t of (1 - threshold)^i for the
// deterministic coder. w_t = 1 for the Poisson coder, and for currents, which are the activity itself.
struct EncoderWeights {
    float of[MAX_STEPS];
    EncoderWeights(const Net& net, bool poisson) {
        float power = 1.0f, total = 0.0f;
        for (int t = 0; t < net.spike_steps; t++, power *= 1.0f - net.encoder_threshold)
            of[t] = poisson || net.analog ? 1.0f : total += power;
    }
};

// Gradients of the fields' means and standard deviations, (K0), from those of activities, (B, K0p).
inline void field_gradients(const Activations& acts, const float* obs, const float* grad_activity, float* mean,
                            float* std) {
    const Net& net = *acts.net;
    const int64_t K0 = net.widths[0], K0p = padded(K0);
    std::memset(mean, 0, K0 * sizeof(float));
    std::memset(std, 0, K0 * sizeof(float));
    Scratch memory;
    float *inverse = memory.array<float>(K0), *obs_of = memory.array<float>(K0);
    for (int64_t k = 0; k < K0; k++) inverse[k] = 1.0f / net.std[k];
    for (int64_t b = 0; b < acts.samples; b++) {
        const float *activity = acts.activity + b * K0p, *grad = grad_activity + b * K0p;
        for (int64_t o = 0, k = 0; o < net.obs_dim; o++)
            for (int64_t p = 0; p < net.pop_size; p++, k++) obs_of[k] = obs[b * net.obs_dim + o];
#pragma GCC ivdep
        for (int64_t k = 0; k < K0; k++) {
            const float z = (obs_of[k] - net.mean[k]) * inverse[k];
            const float g = grad[k] * activity[k] * z * inverse[k];
            mean[k] += g;
            std[k] += g * z;
        }
    }
}

}  // namespace

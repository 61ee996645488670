// SAC's policy, a Gaussian whose samples are squashed by tanh: samples, log probabilities, and gradients.

#include <cmath>

#include "memory.h"
#include "vectors.h"

namespace {

// log(1 + x) for 0 <= x <= 1: 2 artanh(x / (2 + x)).
inline vec log1p_of(vec x) {
    const vec s = x / (x + 2.0f), z = s * s;
    vec p = z * (2.0f / 13) + 2.0f / 11;
    p = p * z + 2.0f / 9;
    p = p * z + 2.0f / 7;
    p = p * z + 2.0f / 5;
    p = p * z + 2.0f / 3;
    return p * z * s + s * 2.0f;
}

// For W entries: actions, their terms of log pi without the constant, and `spread`, u - mean.
inline void sample(const float* mean, const float* log_std, const float* noise, float low, float high, float* act,
                   float* term, float* spread) {
    vec l = load(log_std);
    const vec eps = load(noise);
    l = l < low ? broadcast(low) : l;
    l = l > high ? broadcast(high) : l;
    const vec inverse = exp_of(l > 0.0f ? -l : l), z = (l > 0.0f ? 1.0f / inverse : inverse) * eps;
    const vec u = load(mean) + z, size = u < 0.0f ? -u : u;
    const vec e = exp_of(size * -2.0f), a = (1.0f - e) / (1.0f + e);
    store(act, u < 0.0f ? -a : a);
    store(term, eps * eps * -0.5f - l + (size + log1p_of(e)) * 2.0f);
    store(spread, z);
}

}  // namespace

extern "C" {

// act (B, A) = tanh(u) with u = mean + exp(log_std) noise, log_std clipped to [low, high]; log_prob (B): the log
// probability of each action, the sum over entries of
//     -noise^2 / 2 - log_std - log(2 pi) / 2 - log(1 - tanh(u)^2),   log(1 - tanh(u)^2) = 2 (log 2 - |u| - log(1 + exp(-2 |u|))).
// `spread` (B, A) receives u - mean, for the backward pass.
void spikerl_squashed(int64_t B, int64_t A, const float* mean, const float* log_std, const float* noise, float low,
                      float high, float* act, float* log_prob, float* spread) {
    const int64_t n = B * A, whole = n / W * W;
    Scratch memory;
    float* terms = memory.array<float>(padded(n));
    for (int64_t i = 0; i < whole; i += W)
        sample(mean + i, log_std + i, noise + i, low, high, act + i, terms + i, spread + i);
    if (whole < n) {
        float in[3][W], out[2][W];
        const float* from[3] = {mean, log_std, noise};
        for (int k = 0; k < 3; k++) copy_padded(from[k] + whole, n - whole, W, in[k]);
        sample(in[0], in[1], in[2], low, high, out[0], terms + whole, out[1]);
        std::memcpy(act + whole, out[0], (n - whole) * sizeof(float));
        std::memcpy(spread + whole, out[1], (n - whole) * sizeof(float));
    }
    const float same = float(A) * -2.305232894f;  // -log(2 pi) / 2 - 2 log 2
    for (int64_t b = 0; b < B; b++) {
        float sum = same;
        for (int64_t a = 0; a < A; a++) sum += terms[b * A + a];
        log_prob[b] = sum;
    }
}

// Gradients with respect to mean and log_std (B, A) from those with respect to actions (B, A) and log_prob (B):
// d log_prob / du = 2 tanh(u); a log_std outside [low, high] has no gradient.
void spikerl_squashed_backward(int64_t B, int64_t A, const float* log_std, const float* act, const float* spread,
                               const float* by_act, const float* by_log_prob, float low, float high, float* by_mean,
                               float* by_log_std) {
    for (int64_t b = 0; b < B; b++)
        for (int64_t i = b * A; i < (b + 1) * A; i++) {
            const float a = act[i], by_u = by_act[i] * (1.0f - a * a) + by_log_prob[b] * 2.0f * a;
            by_mean[i] = by_u;
            by_log_std[i] = log_std[i] < low || log_std[i] > high ? 0.0f : by_u * spread[i] - by_log_prob[b];
        }
}
}

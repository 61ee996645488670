// Parameter updates (all parameters of a network are one vector), and noise on actions.

#include <cmath>

#include "vectors.h"
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace {

// While it lives, denormal numbers (below 1e-38) are 0. Adam's mean of a weight without a gradient decays into them and
// stays there by rounding; each costs as much as some hundred normal numbers.
struct NoDenormals {
#if defined(__SSE2__)
    const unsigned before = _mm_getcsr();
    NoDenormals() { _mm_setcsr(before | 0x8040); }  // flush to zero, denormals are zero
    ~NoDenormals() { _mm_setcsr(before); }
#endif
};

// Calls `vector(i)` for every whole vector of n floats, `scalar(i)` for every float beyond the last.
template <class F, class G>
void for_each(int64_t n, F vector, G scalar) {
    int64_t i = 0;
    for (; n - i >= W; i += W) vector(i);
    for (; i < n; i++) scalar(i);
}

float sum_of_squares(const float* x, int64_t n) {
    vec sums[4] = {};
    int64_t i = 0;
    for (; n - i >= 4 * W; i += 4 * W)
        for (int u = 0; u < 4; u++) {
            const vec v = load(x + i + u * W);
            sums[u] += v * v;
        }
    float total = 0.0f;
    for (; i < n; i++) total += x[i] * x[i];
    const vec sum = sums[0] + sums[1] + (sums[2] + sums[3]);
    for (int j = 0; j < W; j++) total += sum[j];
    return total;
}

inline vec sqrt_lanes(vec x) {
    for (int i = 0; i < W; i++) x[i] = std::sqrt(x[i]);
    return x;
}

}  // namespace

extern "C" {

// One step of Adam (betas 0.9, 0.999; eps 1e-8; Kingma and Ba, 2015) with a gradient (n), which the loss follows in
// memory. The gradient is first clipped to a norm of `max_norm`, which may be infinite. If gradient or loss is not
// finite, `masked` becomes 1; if `masked` is 1, nothing else changes.
void spikerl_adam(int64_t n, float* weights, float* grad, float* mean, float* square, float* step, float lr,
                  float max_norm, float* masked) {
    const NoDenormals no_denormals;
    const float sum = sum_of_squares(grad, n), loss = grad[n];
    if (!(sum + loss * loss < INFINITY)) *masked = 1.0f;
    if (*masked > 0.0f) return;
    const float factor = max_norm / (std::sqrt(sum) + 1e-6f);
    if (factor < 1.0f)
        for (int64_t i = 0; i < n; i++) grad[i] *= factor;
    *step += 1.0f;
    const double mean_correction = 1.0 - std::pow(0.9, double(*step));
    const double square_correction = 1.0 - std::pow(0.999, double(*step));
    const float rate = float(lr / mean_correction), inverse = float(1.0 / std::sqrt(square_correction));
    auto update = [&](auto g, auto& m, auto& v, auto& w, auto sqrt_of) {
        m += (g - m) * 0.1f;
        v = v * 0.999f + g * g * 0.001f;
        w -= m * rate / (sqrt_of(v) * inverse + 1e-8f);
    };
    for_each(
        n,
        [&](int64_t i) {
            vec g = load(grad + i), m = load(mean + i), v = load(square + i), w = load(weights + i);
            update(g, m, v, w, sqrt_lanes);
            store(mean + i, m), store(square + i, v), store(weights + i, w);
        },
        [&](int64_t i) { update(grad[i], mean[i], square[i], weights[i], [](float x) { return std::sqrt(x); }); });
}

// noise (n) <- clip(act + clip(std noise, -bound, bound), -1, 1). NaN stays.
void spikerl_add_clipped_noise(int64_t n, const float* act, float* noise, float std, float bound) {
    for (int64_t i = 0; i < n; i++) noise[i] = clip(act[i] + clip(noise[i] * std, -bound, bound), -1.0f, 1.0f);
}

// target <- (1 - tau) target + tau online, unless masked; computed from the nearer end, so that tau = 1 copies exactly.
void spikerl_polyak(int64_t n, float* target, const float* online, float tau, const float* masked) {
    if (*masked > 0.0f) return;
    for_each(
        n,
        [&](int64_t i) {
            const vec t = load(target + i), o = load(online + i), apart = o - t;
            store(target + i, tau < 0.5f ? t + apart * tau : o - apart * (1.0f - tau));
        },
        [&](int64_t i) {
            const float t = target[i], o = online[i], apart = o - t;
            target[i] = tau < 0.5f ? t + apart * tau : o - apart * (1.0f - tau);
        });
}
}

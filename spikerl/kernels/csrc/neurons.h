// Neurons over all spike steps of a decision: one scan forward and one back, whose neuron and surrogate are template
// arguments. The equations are those of spikerl/snn/neurons.py and spikerl/snn/surrogates.py.
//
// A neuron struct holds the state of W neurons before a spike step. `step(k, x)` computes from their drive x the
// voltage v and the `threshold` to compare it with. `Back` goes from the last spike step to the first, and maps the
// gradient of a step's spikes to that of its drive; it needs only the voltages, from which the rest of the state
// follows.

#pragma once
#include <cmath>

#include "vectors.h"

extern "C" {

// Constants of a layer's neurons. Those that an equation does not have are not read.
struct Neurons {
    int32_t equation, surrogate;  // numbers of `with_neuron` and `with_surrogate`
    float current_decay, voltage_decay, threshold;
    float scale;  // of the surrogate: its window or slope
    float start;  // voltage before the first spike step
    float adaptation, adaptation_decay;
    float theta_v, theta_u, theta_r, theta_s;
};
}

namespace {

constexpr int MAX_STEPS = 32;  // spike steps, the bits of a word

// --- surrogates: grad times d spike / d excess, excess = voltage - threshold; `passes`: lanes where that is not 0 ----

struct Rect {
    float window;
    vec times(vec excess, vec grad, ivec& passes) const {
        passes = (excess < window) & (excess > -window);
        return passes ? grad : vec{};
    }
};

struct Triangle {
    float slope;
    vec times(vec excess, vec grad, ivec& passes) const {
        const vec left = 1.0f - slope * (excess < 0.0f ? -excess : excess);
        passes = left > 0.0f;
        return passes ? grad * (slope * left) : vec{};
    }
};

struct Sigmoid {
    float slope;
    vec times(vec excess, vec grad, ivec& passes) const {
        const vec e = exp_of(slope * (excess < 0.0f ? excess : -excess)), whole = 1.0f + e;
        passes = e > 0.0f;
        return grad * (slope * (e / (whole * whole)));
    }
};

struct Atan {
    float slope;
    vec times(vec excess, vec grad, ivec& passes) const {
        const vec x = excess * (1.57079632679f * slope);
        passes = ~ivec{};
        return grad * (0.5f * slope / (1.0f + x * x));
    }
};

// Calls `f` with the surrogate.
template <class F>
inline __attribute__((always_inline)) void with_surrogate(const Neurons& k, F f) {
    switch (k.surrogate) {
        case 0: return f(Rect{k.scale});
        case 1: return f(Triangle{k.scale});
        case 2: return f(Sigmoid{k.scale});
        case 3: return f(Atan{k.scale});
    }
}

// --- neurons ----------------------------------------------------------------------------------------------------------

// c = dc c + x;  v = dv r(v, o) + c;  o = [v > th], with r(v, o) = v (1 - o) or, SOFT, v - th o.
//   gv = s'(v - th) (grad - kept dr/do) + kept dr/dv;  kept = dv gv_next;  out = dc out_next + gv
// LEARNS: the gradient of dv is the sum of gv_next r(v, o).
template <bool SOFT, bool LEARNS = false>
struct LIF {
    static constexpr bool learns = LEARNS;
    vec c = {}, v, threshold;
    ivec fired;

    explicit LIF(const Neurons& k) : v(broadcast(k.start)), threshold(broadcast(k.threshold)), fired(ivec{}) {}

    void step(const Neurons& k, vec x) {
        c = c * k.current_decay + x;
        v = (fired ? (SOFT ? v - k.threshold : vec{}) : v) * k.voltage_decay + c;
    }

    struct Back {
        vec gc = {}, gv = {}, decay = {};
        Back(const Neurons&, int, const float*, int64_t) {}

        template <class Surrogate>
        vec step(const Neurons& k, int, vec v, vec grad, const Surrogate& surrogate, ivec& passes) {
            const vec excess = v - k.threshold, kept = gv * k.voltage_decay;
            const ivec fired = excess > 0.0f;
            if (LEARNS) decay += gv * (fired ? (SOFT ? excess : vec{}) : v);
            const vec spike = SOFT ? grad - kept * k.threshold : grad - kept * v;
            gv = surrogate.times(excess, spike, passes) + (SOFT ? kept : fired ? vec{} : kept);
            return gc = gc * k.current_decay + gv;
        }
    };
};

// a = da a + o;  v = dv r(v, o) + x;  o = [v > th + beta a].
//   ge = s'(v - th - beta a) (grad + ga_next - kept dr/do);  ga = da ga_next - beta ge;  out = gv = ge + kept dr/dv
template <bool SOFT>
struct ALIF {
    static constexpr bool learns = false;
    vec a = {}, v, threshold;
    ivec fired;

    explicit ALIF(const Neurons& k) : v(broadcast(k.start)), threshold(vec{}), fired(ivec{}) {}

    void adapt(const Neurons& k) {
        a = a * k.adaptation_decay + (fired ? broadcast(1.0f) : vec{});
        threshold = a * k.adaptation + k.threshold;
    }

    void step(const Neurons& k, vec x) {
        adapt(k);
        v = (fired ? (SOFT ? v - k.threshold : vec{}) : v) * k.voltage_decay + x;
    }

    struct Back {
        vec ga = {}, gv = {}, thresholds[MAX_STEPS];

        Back(const Neurons& k, int steps, const float* voltage, int64_t stride) {
            ALIF forward(k);
            for (int t = 0; t < steps; t++) {
                forward.adapt(k);
                thresholds[t] = forward.threshold;
                forward.fired = load(voltage + t * stride) > forward.threshold;
            }
        }

        template <class Surrogate>
        vec step(const Neurons& k, int t, vec v, vec grad, const Surrogate& surrogate, ivec& passes) {
            const vec excess = v - thresholds[t], kept = gv * k.voltage_decay;
            const ivec fired = excess > 0.0f;
            const vec spike = grad + ga - kept * (SOFT ? broadcast(k.threshold) : v);
            const vec ge = surrogate.times(excess, spike, passes);
            ga = ga * k.adaptation_decay - ge * k.adaptation;
            return gv = ge + (SOFT ? kept : fired ? vec{} : kept);
        }
    };
};

// c = dc c + x;  v' = (1 - o) v + th_r o;  u' = u + th_s o;  v = v' + v'^2 - v' - u' + c;  u = u' + th_v v' - th_u u'.
//   gv' = 2 v' gv_next + th_v gu_next;  gu = (1 - th_u) gu_next - gv_next
//   gv = s'(v - th) (grad + (th_r - v) gv' + th_s gu) + (1 - o) gv';  out = dc out_next + gv
struct Dynamic {
    static constexpr bool learns = false;
    vec c = {}, u = {}, v, threshold;
    ivec fired;

    explicit Dynamic(const Neurons& k) : v(broadcast(k.start)), threshold(broadcast(k.threshold)), fired(ivec{}) {}

    void step(const Neurons& k, vec x) {
        c = c * k.current_decay + x;
        const vec from = fired ? broadcast(k.theta_r) : v, recovery = fired ? u + k.theta_s : u;
        v = from + from * from - from - recovery + c;
        u = recovery + from * k.theta_v - recovery * k.theta_u;
    }

    struct Back {
        vec gc = {}, gv = {}, gu = {};
        Back(const Neurons&, int, const float*, int64_t) {}

        template <class Surrogate>
        vec step(const Neurons& k, int, vec v, vec grad, const Surrogate& surrogate, ivec& passes) {
            const vec excess = v - k.threshold;
            const ivec fired = excess > 0.0f;
            const vec by_from = 2.0f * (fired ? broadcast(k.theta_r) : v) * gv + gu * k.theta_v;
            gu = gu * (1.0f - k.theta_u) - gv;
            const vec spike = grad + by_from * (k.theta_r - v) + gu * k.theta_s;
            gv = surrogate.times(excess, spike, passes) + (fired ? vec{} : by_from);
            return gc = gc * k.current_decay + gv;
        }
    };
};

// Calls `f` with a neuron at rest.
template <class F>
inline __attribute__((always_inline)) void with_neuron(const Neurons& k, F f) {
    switch (k.equation) {
        case 0: return f(LIF<false>(k));
        case 1: return f(LIF<true>(k));
        case 2: return f(LIF<false, true>(k));
        case 3: return f(LIF<true, true>(k));
        case 4: return f(ALIF<false>(k));
        case 5: return f(ALIF<true>(k));
        case 6: return f(Dynamic(k));
    }
}

// W neurons over all spike steps, from their drive: voltages, and the words of their spikes.
inline ivec scan(const Neurons& neurons, int steps, const float* drive, int64_t drive_stride, float* voltage,
                 int64_t stride) {
    ivec word = {};
    const Neurons k = neurons;  // a copy, which the stores below cannot alias
    with_neuron(k, [&](auto neuron) __attribute__((always_inline)) {
        for (int t = 0; t < steps; t++) {
            neuron.step(k, load(drive + t * drive_stride));
            neuron.fired = neuron.v > neuron.threshold;
            word |= neuron.fired & int32_t(1u << t);
            store(voltage + t * stride, neuron.v);
        }
    });
    return word;
}

// Gradients of the drive of `count` neurons, `out` (T, Np), from those of their spikes, `grad`: (T, Np), or, where
// `stride` is 0, (Np) for every t. After the last step at which the surrogate passes a gradient, a neuron has none:
// `active_steps` (Np), unless null, receives the number of steps up to that one. Returns the gradient of voltage_decay,
// summed over the neurons, if that is learned.
__attribute__((noinline)) float scan_back(const Neurons& neurons, int steps, int64_t count, int64_t Np,
                                          const float* grad, int64_t stride, const float* voltage, float* out,
                                          int32_t* active_steps) {
    float decay = 0.0f;
    const Neurons k = neurons;  // a copy, which the stores below cannot alias
    with_neuron(k, [&](auto neuron) __attribute__((always_inline)) {
        with_surrogate(k, [&](auto surrogate) __attribute__((always_inline)) {
            for (int64_t n = 0; n < count; n += W) {
                typename decltype(neuron)::Back back(k, steps, voltage + n, Np);
                ivec active = {};
                for (int t = steps - 1; t >= 0; t--) {
                    ivec passes;
                    const vec v = load(voltage + t * Np + n), g = load(grad + t * stride + n);
                    store(out + t * Np + n, back.step(k, t, v, g, surrogate, passes));
                    active = active == 0 ? passes & (t + 1) : active;
                }
                if (active_steps) store(active_steps + n, active);
                if constexpr (decltype(neuron)::learns)
                    for (int i = 0; i < W; i++) decay += back.decay[i];
            }
        });
    });
    return decay;
}

}  // namespace

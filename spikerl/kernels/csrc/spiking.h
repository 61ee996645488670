// A population-coded spiking actor on the CPU, driven by events.
//
// The spikes of a neuron over the T spike steps of a decision are the bits of one word. Inputs whose
// words agree are summed first; the sum is then added into the steps of that word: nothing is multiplied
// by zero, and a weight is read once however often its input fires. Backward, a weight's gradient is read
// from the same lists, and an input's gradient is formed only at the steps at which its voltage lay inside
// the surrogate window.
//
// One translation unit, compiled once for each instruction set; the vector width follows from the flags.
// Sums over a batch run in one order whatever the number of threads, so results are the same bits.
//
// Shapes   B samples, T spike steps, K inputs and N neurons of a layer, O observation entries, A actions.
//          Weights are input-major (K, N). Rows of neurons are padded to whole vectors (Kp, Np).

#pragma once
#include "tiles.h"

namespace {

constexpr int CHUNK = 8;         // spike steps that one list of events covers, at most
constexpr int MAX_STEPS = 32;    // spike steps, the bits of a word
constexpr int MAX_LAYERS = 16;
constexpr int BLOCK = 2;         // vectors of neurons that are computed together
constexpr int64_t TILE = 16;     // samples that meet a block of weights while it lies in the first cache
constexpr int64_t PASS = 64;     // samples that meet a matrix unit's weights while those lie in the second cache
constexpr int64_t DIRECT = 4;    // up to so many samples, packing weights costs more than it gains

// Whether so many samples go by lists of events; else on the processor's matrix units.
constexpr bool by_events(int64_t B) { return !HAS_TILES || B <= DIRECT; }

// Of the steps of a chunk, 1.0 where a word has its bit set.
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
    float encoder_threshold, current_decay, voltage_decay, threshold, window;
    const int32_t* widths;  // layers + 1: of the encoder and of every layer
    const float *mean, *std;
    const float* const* weights;
    const float* const* biases;
    const float *out_weight, *out_bias;
    int32_t squashes;  // one action is of tanh(observation); elsewhere the caller has applied it
};
}

namespace {

struct Segment {
    int32_t word, end;  // inputs up to `end` of the list have this word
};

// The inputs of one sample and chunk that fired, ordered by word.
struct Events {
    int32_t* count;  // of segments
    Segment* segments;
    int32_t* inputs;
};

// Where everything that backward needs lies in one block of memory, for `samples` samples.
struct Store {
    const Net* net;
    int64_t samples, chunks;
    bool keeps;  // voltages; else all samples write to one place, which nobody reads
    bool lists;  // of events
    float* activity;                  // (B, K0p)
    int32_t* words[MAX_LAYERS + 1];   // (B, Kp) of the encoder and of every layer
    float* voltage[MAX_LAYERS];       // (B, T, Np); on matrix units squares, see `square`
    int32_t* counts[MAX_LAYERS];      // events of a layer's inputs: (B, chunks)
    Segment* segments[MAX_LAYERS];    // (B, chunks, K + 1)
    int32_t* inputs[MAX_LAYERS];      // (B, chunks, K)
    int64_t bytes = 0;

    Store(const Net* n, int64_t samples_, bool keeps_, bool lists_, char* base)
        : net(n), samples(samples_), keeps(keeps_), lists(lists_) {
        int64_t T = n->spike_steps;
        chunks = (T + CHUNK - 1) / CHUNK;
        activity = take<float>(base, samples * padded(n->widths[0]));
        for (int l = 0; l <= n->layers; l++) {
            int64_t K = n->widths[l];
            words[l] = take<int32_t>(base, samples * padded(K));
            const int64_t kept = lists ? (keeps ? samples : 1) : (keeps ? (samples + W - 1) / W * W : W);
            if (l > 0) voltage[l - 1] = take<float>(base, kept * T * padded(K));
            if (l == n->layers || !lists) continue;
            counts[l] = take<int32_t>(base, samples * chunks);
            segments[l] = take<Segment>(base, samples * chunks * (K + 1));
            inputs[l] = take<int32_t>(base, samples * chunks * K);
        }
    }

    template <class X>
    X* take(char* base, int64_t count) {
        X* place = reinterpret_cast<X*>(base + bytes);
        bytes += (count * int64_t(sizeof(X)) + 63) / 64 * 64;
        return place;
    }

    Events events(int layer, int64_t b, int64_t chunk) const {
        int64_t row = b * chunks + chunk, K = net->widths[layer];
        return {counts[layer] + row, segments[layer] + row * (K + 1), inputs[layer] + row * K};
    }

    // On matrix units W neurons of W samples lie together at all steps, (T, W, W).
    int64_t square(int layer, int64_t b, int64_t n) const {
        const int64_t Np = padded(net->widths[layer + 1]);
        return ((b / W * (Np / W) + n / W) * net->spike_steps * W + b % W) * W;
    }

    int64_t first_step(int64_t chunk) const { return net->spike_steps * chunk / chunks; }
};

// A layer's sizes and weights, and what the forward pass makes of them.
struct Layer {
    int64_t K, N, Np;
    const float* weight;            // (K, N)
    const float* bias = nullptr;    // (Np)
    const float* last = nullptr;    // the last row of `weight`, padded: it alone may not be read beyond its end
    const float* packed = nullptr;  // null: use the weights as they are
};

// The words of W neurons, and their voltages, from their drives.
inline ivec membranes(const Net& net, const float* drive, int64_t drive_step, float* voltage, int64_t step) {
    vec c = {}, v = {};
    ivec fired = {}, word = {};
    for (int t = 0; t < net.spike_steps; t++) {
        c = c * net.current_decay + load(drive + t * drive_step);
        v = (fired ? vec{} : v) * net.voltage_decay + c;
        fired = v > net.threshold;
        word |= fired & int32_t(1u << t);
        store(voltage + t * step, v);
    }
    return word;
}

// Gradients of the drive of `count` neurons, `out` (T, Np), from those of their spikes, `grad`: (T, Np), or,
// where `step` is 0, (Np) for every t. Beyond the last step at which a voltage lies inside the surrogate window,
// its neuron has no gradient: `live` (Np) is the number of steps that have one.
//   gv = [|v - threshold| < window] (grad - kept v) + kept (1 - o);  kept = voltage_decay gv_next
//   out = current_decay out_next + gv
inline void scan_back(const Net& net, int64_t count, int64_t Np, const float* grad, int64_t step,
               const float* voltage, float* out, int32_t* live) {
    for (int64_t n = 0; n < count; n += W) {
        vec gc = {}, gv = {};
        ivec steps = {};
        for (int32_t t = net.spike_steps - 1; t >= 0; t--) {
            vec v = load(voltage + t * Np + n), excess = v - net.threshold;
            ivec inside = (excess < net.window) & (excess > -net.window);
            steps = steps == 0 ? inside & (t + 1) : steps;
            vec kept = gv * net.voltage_decay;
            vec spike = load(grad + t * step + n) - kept * v;
            gv = (inside ? spike : vec{}) + (excess > 0.0f ? vec{} : kept);
            gc = gc * net.current_decay + gv;
            store(out + t * Np + n, gc);
        }
        if (live) store(live + n, steps);
    }
}

}  // namespace

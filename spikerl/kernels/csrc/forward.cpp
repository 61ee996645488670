// Forward: from normalised observations to actions.

#include <cmath>

#include "encoder.h"
#include "forward_events.h"
#include "forward_tiles.h"

namespace {

// Voltages and words of neurons n to n + V W of one layer and sample, from their drive.
template <int V>
inline void run_scans(const Activations& acts, int layer, int64_t b, int64_t n, const float* drive, int64_t stride) {
    const int T = acts.net->spike_steps;
    const int64_t Np = padded(acts.net->widths[layer + 1]);
    int32_t* words = acts.words[layer + 1] + b * Np + n;
    float* voltage = acts.voltage[layer] + (acts.for_backward ? b : 0) * T * Np + n;
    for (int j = 0; j < V; j++)
        store(words + j * W, scan(acts.neurons[layer], T, drive + j * W, stride, voltage + j * W, Np));
}

// Runs neurons n to n + V W of the first layer for samples `from` to `to`, driven by equal currents at every step.
template <int V, class Columns>
void run_currents(const Activations& acts, int64_t from, int64_t to, int64_t n, const Columns& columns,
                  const float* bias) {
    const int64_t K = acts.net->widths[0], Kp = padded(K);
    float drive[SAMPLE_BLOCK * V * W];
    multiply_dense<V>(0, to - from, K, acts.activity + from * Kp, Kp, columns, drive, V * W);
    for (int64_t b = from; b < to; b++) {
        float* own = drive + (b - from) * V * W;
        for (int j = 0; j < V; j++) store(own + j * W, load(own + j * W) + load(bias + j * W));
        run_scans<V>(acts, 0, b, n, own, 0);
    }
}

// Rate decoder: one sample's action from its first `steps` spike steps.
void decode_first(const Activations& acts, int64_t b, int steps, float* act, bool squash) {
    const Net& net = *acts.net;
    const int32_t* words = acts.words[net.layers] + b * padded(net.widths[net.layers]);
    const uint32_t mask = ~0u >> (MAX_STEPS - steps);
    const float* weight = net.out_weight;
    for (int64_t a = 0; a < net.act_dim; a++) {
        float sum = 0.0f;
        for (int64_t p = 0; p < net.out_pop_size; p++)
            sum += float(__builtin_popcount(uint32_t(*words++) & mask)) / float(steps) * *weight++;
        act[a] = squash ? std::tanh(sum + net.out_bias[a]) : sum + net.out_bias[a];
    }
}

// The action of the first spike step at which it has settled (early exit), or of the last. All steps have been
// computed: whole words cost little more than parts of them, and a step's spikes do not depend on later steps.
void decode(const Activations& acts, int64_t b, float* act, bool squash) {
    const Net& net = *acts.net;
    if (!net.exit_steps || !squash) return decode_first(acts, b, net.spike_steps, act, squash);
    Scratch memory;
    const int64_t A = net.act_dim;
    float* now = memory.array<float>(net.spike_steps * A);
    for (int t = 0;; t++, now += A) {
        decode_first(acts, b, t + 1, now, true);
        if (t + 1 == net.spike_steps) break;
        bool settled = t >= net.exit_steps;
        for (int j = 1; settled && j <= net.exit_steps; j++)
            for (int64_t a = 0; a < A; a++) settled &= std::abs(now[a] - now[a - j * A]) < net.exit_threshold;
        if (settled) break;
    }
    std::memcpy(act, now, A * sizeof(float));
}

void run_layer(const Activations& acts, int layer, const Layer& l, int64_t from, int64_t to) {
    const bool currents = layer == 0 && acts.net->analog;
    if (!currents) list_inputs(acts, layer, l.K, from, to);
    for_each_columns(l, [&](auto V, int64_t n, const auto& columns) {
        if (currents) return run_currents<V>(acts, from, to, n, columns, l.bias + n);
        for (int64_t b = from; b < to; b++) {
            float drive[MAX_STEPS * V * W];
            add_inputs<V>(acts, layer, b, columns, l.bias + n, drive);
            run_scans<V>(acts, layer, b, n, drive, V * W);
        }
    });
}

// Encodes and decodes blocks of samples, and in between calls `run_layers(activations, from, to)`. Activations lie in
// `saved` if a backward pass follows.
template <class F>
void for_each_block(const Net& net, int64_t B, const float* obs, const float* uniform, float* act, char* saved,
                    bool squash, int threads, F run_layers) {
    const bool has_events = uses_events(net, B);
    const int64_t share = (B + threads - 1) / threads;
    const int64_t multiple = (share + SAMPLE_BLOCK - 1) / SAMPLE_BLOCK * SAMPLE_BLOCK;
    const int64_t size = has_events ? SAMPLE_BLOCK : std::min(multiple, TILE_SAMPLE_BLOCK);
    const int64_t blocks = (B + size - 1) / size, samples = std::min(size, B);
    const int64_t bytes = saved ? 0 : Activations(&net, samples, false, has_events, nullptr).memory.used;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (blocks > 1)
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t first = block * size, count = std::min(size, B - first), from = saved ? first : 0;
        Scratch memory;
        const Activations acts = saved ? Activations(&net, B, true, has_events, saved)
                                       : Activations(&net, samples, false, has_events, memory.array<char>(bytes));
        for (int64_t i = 0; i < count; i++) {
            const float* u = uniform ? uniform + (first + i) * net.widths[0] : nullptr;
            encode(acts, from + i, obs + (first + i) * net.obs_dim, u, B * net.widths[0]);
        }
        run_layers(acts, from, from + count);
        for (int64_t i = 0; i < count; i++) decode(acts, from + i, act + (first + i) * net.act_dim, squash);
    }
}

void forward(const Net& net, int64_t B, const float* obs, const float* uniform, float* act, char* saved,
             bool squash, int threads) {
#if HAS_TILES
    if (!uses_events(net, B)) {
        const TileLayers layers(net);
        for_each_block(net, B, obs, uniform, act, saved, squash, threads,
                       [&](const Activations& acts, int64_t from, int64_t to) {
                           const TileRegisters registers;
                           for (int l = 0; l < net.layers; l++) run_layer(acts, l, layers.of[l], from, to);
                       });
        return;
    }
#endif
    const Layers layers(net, B > MAX_UNPACKED);
    for_each_block(net, B, obs, uniform, act, saved, squash, threads,
                   [&](const Activations& acts, int64_t from, int64_t to) {
                       for (int l = 0; l < net.layers; l++) run_layer(acts, l, layers.of[l], from, to);
                   });
}

}  // namespace

extern "C" {

// From an action in [-1, 1] to the environment's units: low + (act + 1) half_range, clipped to [min, max].
struct Units {
    const double *low, *half_range;
    const float *min, *max;
};

// One action (A), in the environment's units, from one raw observation (O): (obs - norm[0]) / norm[1], clipped to
// [-bound, bound], then the network. Returns false, without an action, if the observation is not finite.
bool spikerl_act(const Net* net, const Units* units, const double* obs, const float* norm, float bound, float* act) {
    const int64_t O = net->obs_dim;
    Scratch memory;
    float* normalised = memory.array<float>(O);
    for (int64_t o = 0; o < O; o++) {
        if (!std::isfinite(obs[o])) return false;
        const float z = clip((float(obs[o]) - norm[o]) / norm[O + o], -bound, bound);
        normalised[o] = net->squashes ? std::tanh(z) : z;
    }
    forward(*net, 1, normalised, nullptr, act, nullptr, true, 1);
    for (int64_t a = 0; a < net->act_dim; a++) {
        const float y = float(units->low[a] + double(act[a] + 1.0f) * units->half_range[a]);
        act[a] = clip(y, units->min[a], units->max[a]);
    }
    return true;
}

// Bytes of what spikerl_forward saves and spikerl_backward reads for B samples.
int64_t spikerl_saved_bytes(const Net* net, int64_t B) {
    return Activations(net, B, true, uses_events(*net, B), nullptr).memory.used;
}

// act (B, A) from normalised observations (B, O). With `uniform` (T, B, K0) the encoder is a Poisson coder; `saved` is
// null if no backward pass follows; without `squash`, act holds the values before tanh.
void spikerl_forward(const Net* net, int64_t B, const float* obs, const float* uniform, float* act,
                     char* saved, bool squash, int threads) {
    forward(*net, B, obs, uniform, act, saved, squash, threads);
}
}

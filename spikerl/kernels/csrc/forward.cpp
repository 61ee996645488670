// Forward: from normalised observations to actions.

#include <cmath>

#include "forward_tiles.h"

namespace {

// Counting sort of the inputs that fired in a chunk, by their words. The two halves of the inputs have counters of
// their own, because a counter that was just written takes some cycles to be read again.
void list_events(const int32_t* words, int64_t K, int first, int steps, Events events) {
    int32_t position[2][1 << CHUNK];
    for (auto& half : position) std::memset(half, 0, sizeof(int32_t) << steps);
    Scratch memory;
    int32_t* fired = memory.array<int32_t>(padded(K) + W);
    const int32_t mask = (1 << steps) - 1;
    const ivec lanes = iota(0);
    int32_t count = 0;
    for (int32_t k = 0; k < K; k += W) {  // input << CHUNK | word
        ivec word = load(words + k) >> first & mask;
        if (K - k < W) word = lanes < int32_t(K - k) ? word : ivec{};
        count += append(fired + count, (lanes + k) << CHUNK | word, word != 0);
    }
    const int32_t half = count / 2, *upper = fired + half;
    for (int32_t i = 0; i < half; i++) {
        position[0][fired[i] & mask]++;
        position[1][upper[i] & mask]++;
    }
    if (count % 2) position[1][upper[half] & mask]++;
    int32_t next = 0, segments = 0;
    for (int32_t word = 1; word <= mask; word++) {
        const int32_t first_count = position[0][word], second_count = position[1][word];
        position[0][word] = next;
        position[1][word] = next + first_count;
        next += first_count + second_count;
        events.segments[segments] = {word, next};
        segments += first_count + second_count > 0;
    }
    *events.count = segments;
    for (int32_t i = 0; i < half; i++) {
        events.inputs[position[0][fired[i] & mask]++] = fired[i] >> CHUNK;
        events.inputs[position[1][upper[i] & mask]++] = upper[i] >> CHUNK;
    }
    if (count % 2) events.inputs[position[1][upper[half] & mask]++] = upper[half] >> CHUNK;
}

// Columns `from` to `to` of a layer's weights in blocks of `width` columns, (blocks, K, width), zero beyond N.
void pack(const Layer& l, int64_t from, int64_t to, int64_t width, float* out) {
    for (int64_t n = from; n < to; n += width)
        for (int64_t k = 0; k < l.K; k++, out += width) copy_padded(l.weight + k * l.N + n, l.N - n, width, out);
}

// drive[t] += the weights of all inputs that fired at step t, for the S steps of a chunk and V vectors.
template <int S, int V, class Columns>
inline void gather(Events events, const Columns& columns, float* drive) {
    vec sums[S][V];
    for (int t = 0; t < S; t++)
        for (int j = 0; j < V; j++) sums[t][j] = load(drive + (t * V + j) * W);
    int32_t i = 0;
    for (int32_t s = 0; s < *events.count; s++) {
        const Segment segment = events.segments[s];
        vec even[V], odd[V];
        for (int j = 0; j < V; j++) even[j] = odd[j] = vec{};
        for (; i + 1 < segment.end; i += 2) {
            const float *row = columns.row(events.inputs[i]), *next = columns.row(events.inputs[i + 1]);
            for (int j = 0; j < V; j++) {
                even[j] += load(row + j * W);
                odd[j] += load(next + j * W);
            }
        }
        if (i < segment.end) {
            const float* row = columns.row(events.inputs[i++]);
            for (int j = 0; j < V; j++) even[j] += load(row + j * W);
        }
        const float* bits = BITS.of[segment.word];
        for (int j = 0; j < V; j++) even[j] += odd[j];
        for (int t = 0; t < S; t++)
            for (int j = 0; j < V; j++) sums[t][j] += bits[t] * even[j];
    }
    for (int t = 0; t < S; t++)
        for (int j = 0; j < V; j++) store(drive + (t * V + j) * W, sums[t][j]);
}

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

// Neurons n to n + V W of the first layer, of samples `from` to `to`, driven by the same currents at every step.
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

// Neurons n to n + V W of one layer and sample: drive, voltages and words.
template <int V, class Columns>
void run_neurons(const Activations& acts, int layer, int64_t b, int64_t n, const Columns& columns, const float* bias) {
    const int T = acts.net->spike_steps;
    float drive[MAX_STEPS * V * W];
    for (int t = 0; t < T; t++)
        for (int j = 0; j < V; j++) store(drive + (t * V + j) * W, load(bias + j * W));
    for (int64_t c = 0; c < acts.chunks; c++) {
        const int64_t first = acts.first_step(c);
        with_steps(int(acts.first_step(c + 1) - first), [&](auto S) {
            gather<S, V>(acts.events(layer, b, c), columns, drive + first * V * W);
        });
    }
    run_scans<V>(acts, layer, b, n, drive, V * W);
}

// Activities and words of the encoder for one sample. With uniform draws (K0 for each step) it is a Poisson coder,
// whose inputs fire where the draw is below their activity.
void encode(const Activations& acts, int64_t b, const float* obs, const float* uniform, int64_t uniform_stride) {
    const Net& net = *acts.net;
    const int64_t K = net.widths[0], Kp = padded(K);
    float* activity = acts.activity + b * Kp;
    int32_t* words = acts.words[0] + b * Kp;
    store(activity + Kp - W, vec{});  // the padding: what lies in memory may be denormal, and slow
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

// Rate decoder: what one sample's first `steps` spike steps give.
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

// The action of the first spike step at which it has settled. All steps were computed: their words cost little more
// than those of some, and which steps are read does not change what they hold.
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

// All layers' weights, padded, and packed where that pays or an unpacked read would leave the matrix.
struct Layers {
    Scratch memory;
    Layer of[MAX_LAYERS];
    Layers(const Net& net, bool packs_all) {
        for (int i = 0; i < net.layers; i++) {
            Layer l(net, i);
            float *bias = memory.array<float>(l.Np), *last = memory.array<float>(l.Np);
            copy_padded(net.biases[i], l.N, l.Np, bias);
            copy_padded(l.weight + (l.K - 1) * l.N, l.N, l.Np, last);
            l.bias = bias, l.last = last;
            if (packs_all || 2 * l.N < l.Np) {  // of few columns, a vector from the second last row leaves it too
                float* packed = memory.array<float>(l.K * l.Np);
                const int64_t end = l.Np / (BLOCK * W) * (BLOCK * W);  // of whole blocks
                pack(l, 0, end, BLOCK * W, packed);
                pack(l, end, l.Np, W, packed + end * l.K);
                l.packed = packed;
            }
            of[i] = l;
        }
    }
};

// Blocks of V vectors of a layer's neurons from n on, as many as there are; the first neuron beyond them.
template <int V>
int64_t run_blocks(const Activations& acts, int layer, const Layer& l, int64_t n, int64_t from, int64_t to) {
    for (; l.Np - n >= V * W; n += V * W) {
        const auto run = [&](const auto& columns) {
            if (layer == 0 && acts.net->analog) return run_currents<V>(acts, from, to, n, columns, l.bias + n);
            for (int64_t b = from; b < to; b++) run_neurons<V>(acts, layer, b, n, columns, l.bias + n);
        };
        if (l.packed) run(PackedColumns<V>{l.packed + n * l.K});
        else run(UnpackedColumns{l.weight + n, l.N, l.last + n, l.K - 1});
    }
    return n;
}

void run_layer(const Activations& acts, int layer, const Layer& l, int64_t from, int64_t to) {
    for (int64_t b = from; b < to && !(layer == 0 && acts.net->analog); b++)
        for (int64_t c = 0; c < acts.chunks; c++) {
            const int first = int(acts.first_step(c)), steps = int(acts.first_step(c + 1)) - first;
            list_events(acts.words[layer] + b * padded(l.K), l.K, first, steps, acts.events(layer, b, c));
        }
    int64_t n = l.packed ? 0 : run_blocks<4>(acts, layer, l, 0, from, to);
    n = run_blocks<BLOCK>(acts, layer, l, n, from, to);
    run_blocks<1>(acts, layer, l, n, from, to);
}

// Encodes and decodes blocks of samples, and in between calls `run_layers(activations, from, to)`. Activations lie in
// `saved` where a backward pass follows.
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

// From an action in [-1, 1] to the environment's units: low + (act + 1) half_range, between the bounds.
struct Units {
    const double *low, *half_range;
    const float *min, *max;
};

// One action (A), in the environment's units, from one raw observation (O): (obs - norm[0]) / norm[1], clipped to
// [-clip, clip], then the network. False, and no action, where the observation is not finite.
bool spikerl_act(const Net* net, const Units* units, const double* obs, const float* norm, float clip, float* act) {
    const int64_t O = net->obs_dim;
    Scratch memory;
    float* normalised = memory.array<float>(O);
    for (int64_t o = 0; o < O; o++) {
        if (!std::isfinite(obs[o])) return false;
        const float z = (float(obs[o]) - norm[o]) / norm[O + o];
        const float clipped = z > clip ? clip : z < -clip ? -clip : z;
        normalised[o] = net->squashes ? std::tanh(clipped) : clipped;
    }
    forward(*net, 1, normalised, nullptr, act, nullptr, true, 1);
    for (int64_t a = 0; a < net->act_dim; a++) {
        const float y = float(units->low[a] + double(act[a] + 1.0f) * units->half_range[a]);
        act[a] = y < units->min[a] ? units->min[a] : y > units->max[a] ? units->max[a] : y;
    }
    return true;
}

// Bytes of what spikerl_forward saves and spikerl_backward reads for B samples.
int64_t spikerl_saved_bytes(const Net* net, int64_t B) {
    return Activations(net, B, true, uses_events(*net, B), nullptr).memory.used;
}

// act (B, A) from normalised observations (B, O). With `uniform` (T, B, K0) the encoder is a Poisson coder; `saved` is
// null where no gradient is wanted; without `squash`, act is that before tanh.
void spikerl_forward(const Net* net, int64_t B, const float* obs, const float* uniform, float* act,
                     char* saved, bool squash, int threads) {
    forward(*net, B, obs, uniform, act, saved, squash, threads);
}

// One layer of M neurons (a multiple of 16) over T spike steps, from its drive (T, M): spikes and voltages (T, M).
void spikerl_scan(const Neurons* neurons, int steps, int64_t M, const float* drive, float* spikes, float* voltage,
                  int threads) {
#pragma omp parallel for num_threads(threads) if (M > 4096)
    for (int64_t m = 0; m < M; m += W) {
        const ivec word = scan(*neurons, steps, drive + m, M, voltage + m, M);
        for (int t = 0; t < steps; t++) store(spikes + t * M + m, (word >> t & 1) != 0 ? broadcast(1.0f) : vec{});
    }
}
}

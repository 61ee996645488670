// Forward: from normalised observations to actions.

#include <cmath>

#include "forward_tiles.h"

namespace {

// exp(x) for x <= 0, within 2 units in the last place; 0 below -87.
inline vec exp_of(vec x) {
    vec scaled = x * 1.44269504088896341f - 0.5f;
    ivec n = __builtin_convertvector(scaled > -127.0f ? scaled : all(-127.0f), ivec);
    vec whole = __builtin_convertvector(n, vec);
    vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    vec power = reinterpret_cast<vec>((n + 127) << 23);
    return x < -87.0f ? vec{} : p * power;
}

// Counting sort of the inputs that fired in a chunk, by their words. Two halves of them are counted and placed
// side by side, because a counter's last value takes some cycles to come back from memory.
void list_events(const int32_t* words, int64_t K, int first, int steps, Events events) {
    int32_t place[2][1 << CHUNK];
    for (auto& half : place) std::memset(half, 0, sizeof(int32_t) << steps);
    int32_t* fired = reinterpret_cast<int32_t*>(scratch<7>((padded(K) + W) * sizeof(int32_t)));
    const int32_t mask = (1 << steps) - 1;
    const ivec lanes = counting_from(0);
    int32_t count = 0;
    for (int32_t k = 0; k < K; k += W) {  // input << CHUNK | word
        ivec word = load(words + k) >> first & mask;
        if (K - k < W) word = lanes < int32_t(K - k) ? word : ivec{};
        count += append(fired + count, (lanes + k) << CHUNK | word, word != 0);
    }
    const int32_t half = count / 2, *later = fired + half;
    for (int32_t i = 0; i < half; i++) {
        place[0][fired[i] & mask]++;
        place[1][later[i] & mask]++;
    }
    if (count % 2) place[1][later[half] & mask]++;
    int32_t begin = 0, segments = 0;
    for (int32_t word = 1; word <= mask; word++) {
        const int32_t one = place[0][word], two = place[1][word];
        place[0][word] = begin;
        place[1][word] = begin + one;
        begin += one + two;
        events.segments[segments] = {word, begin};
        segments += one + two > 0;
    }
    *events.count = segments;
    for (int32_t i = 0; i < half; i++) {
        events.inputs[place[0][fired[i] & mask]++] = fired[i] >> CHUNK;
        events.inputs[place[1][later[i] & mask]++] = later[i] >> CHUNK;
    }
    if (count % 2) events.inputs[place[1][later[half] & mask]++] = later[half] >> CHUNK;
}

// Columns `from` to `to` of a layer's weights, one block after the other, (blocks, K, width); zero beyond N.
void pack(const float* weight, int64_t K, int64_t N, int64_t from, int64_t to, int64_t width, float* out) {
    for (int64_t n = from; n < to; n += width) {
        int64_t there = N - n < width ? N - n : width;
        for (int64_t k = 0; k < K; k++, out += width) {
            if (there == width) {  // a call of memcpy takes longer
                for (int64_t i = 0; i < width; i += W) store(out + i, load(weight + k * N + n + i));
                continue;
            }
            std::memcpy(out, weight + k * N + n, there * sizeof(float));
            std::memset(out + there, 0, (width - there) * sizeof(float));
        }
    }
}

// Columns of a layer's weights as they lie: row k begins at `first + k * stride`, but for the last at `last`, which
// may be read to the end of a whole vector.
struct InPlace {
    const float* first;
    int64_t stride;
    const float* last;
    int64_t last_row;
    const float* row(int64_t k) const { return k == last_row ? last : first + k * stride; }
};

// V vectors of columns packed one row after the other.
template <int V>
struct Packed {
    const float* first;
    const float* row(int64_t k) const { return first + k * V * W; }
};

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
            const float *one = columns.row(events.inputs[i]), *two = columns.row(events.inputs[i + 1]);
            for (int j = 0; j < V; j++) {
                even[j] += load(one + j * W);
                odd[j] += load(two + j * W);
            }
        }
        if (i < segment.end) {
            const float* one = columns.row(events.inputs[i++]);
            for (int j = 0; j < V; j++) even[j] += load(one + j * W);
        }
        const float* bits = BITS.of[segment.word];
        for (int j = 0; j < V; j++) even[j] += odd[j];
        for (int t = 0; t < S; t++)
            for (int j = 0; j < V; j++) sums[t][j] += bits[t] * even[j];
    }
    for (int t = 0; t < S; t++)
        for (int j = 0; j < V; j++) store(drive + (t * V + j) * W, sums[t][j]);
}

template <int V, class Columns>
inline void gather(int steps, Events events, const Columns& columns, float* drive) {
    switch (steps) {
        case 1: return gather<1, V>(events, columns, drive);
        case 2: return gather<2, V>(events, columns, drive);
        case 3: return gather<3, V>(events, columns, drive);
        case 4: return gather<4, V>(events, columns, drive);
        case 5: return gather<5, V>(events, columns, drive);
        case 6: return gather<6, V>(events, columns, drive);
        case 7: return gather<7, V>(events, columns, drive);
        case 8: return gather<8, V>(events, columns, drive);
    }
}

// One layer's neurons n0 to n0 + V W of one sample: drive, membranes, words and voltages.
template <int V, class Columns>
void neurons(const Store& st, int layer, int64_t b, int64_t n0, const Columns& columns,
             const float* bias) {
    const Net& net = *st.net;
    const int T = net.spike_steps;
    const int64_t Np = padded(net.widths[layer + 1]);
    float drive[MAX_STEPS * V * W];
    for (int t = 0; t < T; t++)
        for (int j = 0; j < V; j++) store(drive + (t * V + j) * W, load(bias + j * W));
    for (int64_t c = 0; c < st.chunks; c++) {
        int64_t first = st.first_step(c);
        int steps = int(st.first_step(c + 1) - first);
        gather<V>(steps, st.events(layer, b, c), columns, drive + first * V * W);
    }
    int32_t* words = st.words[layer + 1] + b * Np + n0;
    float* voltage = st.voltage[layer] + (st.keeps ? b : 0) * T * Np + n0;
    for (int j = 0; j < V; j++) store(words + j * W, membranes(net, drive + j * W, V * W, voltage + j * W, Np));
}

// Input words of one sample. Poisson: uniforms (T, B, K0) are given, and an input fires below its activity.
void encode(const Store& st, int64_t b, const float* obs, const float* uniform, int64_t uniform_step) {
    const Net& net = *st.net;
    const int64_t K = net.widths[0], Kp = padded(K);
    float* activity = st.activity + b * Kp;
    int32_t* words = st.words[0] + b * Kp;
    for (int64_t o = 0, k = 0; o < net.obs_dim; o++)
        for (int64_t p = 0; p < net.pop_size; p++, k++) activity[k] = obs[o];
    float last[3][W] = {};  // the last vector of the parameters, padded
    for (int i = 0; i < W; i++) last[1][i] = 1.0f;
    const int64_t tail = Kp - W;
    std::memcpy(last[0], net.mean + tail, (K - tail) * sizeof(float));
    std::memcpy(last[1], net.std + tail, (K - tail) * sizeof(float));
    for (int64_t k = 0; k < Kp; k += W) {
        vec mean = load(k == tail ? last[0] : net.mean + k), std = load(k == tail ? last[1] : net.std + k);
        vec distance = load(activity + k) - mean;
        vec a = exp_of(distance * distance * -0.5f / (std * std));
        store(activity + k, a);
        vec v = {};
        ivec word = {};
        for (int t = 0; t < net.spike_steps; t++) {
            ivec fired;
            if (uniform) {
                const float* u = uniform + t * uniform_step + k;
                if (k == tail) std::memcpy(last[2], u, (K - tail) * sizeof(float)), u = last[2];
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

void decode(const Store& st, int64_t b, float* act, bool squash) {
    const Net& net = *st.net;
    const int32_t* words = st.words[net.layers] + b * padded(net.widths[net.layers]);
    const float* weight = net.out_weight;
    for (int64_t a = 0; a < net.act_dim; a++) {
        float sum = 0.0f;
        for (int64_t p = 0; p < net.out_pop_size; p++)
            sum += float(__builtin_popcount(*words++)) / float(net.spike_steps) * *weight++;
        act[a] = squash ? std::tanh(sum + net.out_bias[a]) : sum + net.out_bias[a];
    }
}


// All layers' weights as a call needs them.
struct Layers {
    Layer of[MAX_LAYERS];
    Layers(const Net& net, bool packs_all) {
        // Of few columns, a vector from a row before the last reaches beyond the end too.
        auto packs_layer = [&](int l) { return packs_all || 2 * net.widths[l + 1] < padded(net.widths[l + 1]); };
        int64_t floats = 0;
        for (int l = 0; l < net.layers; l++)
            floats += padded(net.widths[l + 1]) * (2 + (packs_layer(l) ? net.widths[l] : 0)) + W;
        float* place = reinterpret_cast<float*>(scratch<0>(floats * sizeof(float)));
        for (int l = 0; l < net.layers; l++) {
            const bool packs = packs_layer(l);
            int64_t K = net.widths[l], N = net.widths[l + 1], Np = padded(N);
            float *bias = place, *last = place + Np, *packed = packs ? last + Np : nullptr;
            place = last + Np + (packs ? K * Np : 0);
            std::memset(bias, 0, 2 * Np * sizeof(float));
            std::memcpy(bias, net.biases[l], N * sizeof(float));
            std::memcpy(last, net.weights[l] + (K - 1) * N, N * sizeof(float));
            if (packs) {
                int64_t whole = Np / (BLOCK * W) * (BLOCK * W);
                pack(net.weights[l], K, N, 0, whole, BLOCK * W, packed);
                pack(net.weights[l], K, N, whole, Np, W, packed + whole * K);
            }
            of[l] = {K, N, Np, net.weights[l], bias, last, packed};
        }
    }
};

template <int V>
int64_t run_blocks(const Store& st, int layer, const Layer& l, int64_t n, int64_t from, int64_t to) {
    for (; l.Np - n >= V * W; n += V * W) {
        const Packed<V> packed{l.packed + n * l.K};
        const InPlace in_place{l.weight + n, l.N, l.last + n, l.K - 1};
        for (int64_t b = from; b < to; b++)
            if (l.packed) neurons<V>(st, layer, b, n, packed, l.bias + n);
            else neurons<V>(st, layer, b, n, in_place, l.bias + n);
    }
    return n;
}

void run_layer(const Store& st, int layer, const Layer& l, int64_t from, int64_t to) {
    for (int64_t b = from; b < to; b++)
        for (int64_t c = 0; c < st.chunks; c++) {
            int first = int(st.first_step(c)), steps = int(st.first_step(c + 1)) - first;
            list_events(st.words[layer] + b * padded(l.K), l.K, first, steps, st.events(layer, b, c));
        }
    int64_t n = l.packed ? 0 : run_blocks<4>(st, layer, l, 0, from, to);
    n = run_blocks<BLOCK>(st, layer, l, n, from, to);
    run_blocks<1>(st, layer, l, n, from, to);
}

// `run(store, from, to)` all layers of some samples, tile after tile.
template <class Run>
void each_tile(const Net& net, int64_t B, const float* obs, const float* uniform, float* act, char* saved,
               bool squash, int threads, Run run) {
    const bool lists = by_events(B);
    const int64_t share = (B + threads - 1) / threads, whole = (share + TILE - 1) / TILE * TILE;
    const int64_t size = lists ? TILE : whole < PASS ? whole : PASS, most = B < size ? B : size;
    const int64_t tiles = (B + size - 1) / size;
    const int64_t step = B * net.widths[0];
    const int64_t bytes = saved ? 0 : Store(&net, most, false, lists, nullptr).bytes;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (tiles > 1)
    for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t first = tile * size, count = B - first < size ? B - first : size;
        const Store st = saved ? Store(&net, B, true, lists, saved)
                               : Store(&net, most, false, lists, scratch<1>(bytes));
        const int64_t from = saved ? first : 0;
        for (int64_t i = 0; i < count; i++) {
            const float* u = uniform ? uniform + (first + i) * net.widths[0] : nullptr;
            encode(st, from + i, obs + (first + i) * net.obs_dim, u, step);
        }
        run(st, from, from + count);
        for (int64_t i = 0; i < count; i++) decode(st, from + i, act + (first + i) * net.act_dim, squash);
    }
}

void forward(const Net& net, int64_t B, const float* obs, const float* uniform, float* act, char* saved,
             bool squash, int threads) {
#if HAS_TILES
    if (!by_events(B)) {
        const TileLayers layers(net);
        each_tile(net, B, obs, uniform, act, saved, squash, threads, [&](const Store& st, int64_t from, int64_t to) {
            const Tiles tiles;
            for (int l = 0; l < net.layers; l++) run_layer(st, l, layers.of[l], from, to);
        });
        return;
    }
#endif
    const Layers layers(net, B > DIRECT);
    each_tile(net, B, obs, uniform, act, saved, squash, threads, [&](const Store& st, int64_t from, int64_t to) {
        for (int l = 0; l < net.layers; l++) run_layer(st, l, layers.of[l], from, to);
    });
}

}  // namespace

extern "C" {

// How an action gets its environment's units: low + (act + 1) half_range, between the bounds.
struct Units {
    const double *low, *half_range;
    const float *least, *most;
};

// One action (A), in its environment's units, from one raw observation (O): (obs - norm[0]) / norm[1], within
// [-clip, clip], then the network. False, and no action, where the observation is not finite.
bool spikerl_act(const Net* net, const Units* units, const double* obs, const float* norm, float clip, float* act) {
    const int64_t O = net->obs_dim;
    float* normal = reinterpret_cast<float*>(scratch<8>(O * sizeof(float)));
    for (int64_t o = 0; o < O; o++) {
        if (!std::isfinite(obs[o])) return false;
        const float z = (float(obs[o]) - norm[o]) / norm[O + o];
        const float within = z > clip ? clip : z < -clip ? -clip : z;
        normal[o] = net->squashes ? std::tanh(within) : within;
    }
    forward(*net, 1, normal, nullptr, act, nullptr, true, 1);
    for (int64_t a = 0; a < net->act_dim; a++) {
        const float y = float(units->low[a] + double(act[a] + 1.0f) * units->half_range[a]);
        act[a] = y < units->least[a] ? units->least[a] : y > units->most[a] ? units->most[a] : y;
    }
    return true;
}

// Bytes that `forward` fills and `backward` reads for B samples.
int64_t spikerl_saved_bytes(const Net* net, int64_t B) { return Store(net, B, true, by_events(B), nullptr).bytes; }

// act (B, A) from normalised observations (B, O); `uniform` (T, B, K0) makes the encoder a Poisson coder;
// `saved` is null where no gradient is wanted; without `squash`, act is before its tanh.
void spikerl_forward(const Net* net, int64_t B, const float* obs, const float* uniform, float* act,
                     char* saved, bool squash, int threads) {
    forward(*net, B, obs, uniform, act, saved, squash, threads);
}

// One layer of M neurons (a multiple of 16) over T spike steps, from its drive (T, M): spikes and voltages (T, M).
void spikerl_scan(const Net* net, int64_t M, const float* drive, float* spikes, float* voltage, int threads) {
#pragma omp parallel for num_threads(threads) if (M > 4096)
    for (int64_t m = 0; m < M; m += W) {
        const ivec word = membranes(*net, drive + m, M, voltage + m, M);
        for (int t = 0; t < net->spike_steps; t++)
            store(spikes + t * M + m, (word >> t & 1) != 0 ? all(1.0f) : vec{});
    }
}
}

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

#include <cmath>
#include "vectors.h"

namespace {

// One bit for each lane of a comparison's result.
inline uint32_t bits_of(ivec mask) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
#elif defined(__AVX2__)
    return _mm256_movemask_ps(reinterpret_cast<__m256>(mask));
#else
    uint32_t bits = 0;
    for (int i = 0; i < W; i++) bits |= uint32_t(mask[i] & 1) << i;
    return bits;
#endif
}

// Appends to `list` the lanes of `values` that `mask` marks; how many.
inline int append(int32_t* list, ivec values, ivec mask) {
#if defined(__AVX512F__)
    const __mmask16 bits = __mmask16(bits_of(mask));
    store(list, reinterpret_cast<ivec>(_mm512_maskz_compress_epi32(bits, reinterpret_cast<__m512i>(values))));
    return __builtin_popcount(bits);
#else
    int count = 0;
    for (uint32_t bits = bits_of(mask); bits; bits &= bits - 1) list[count++] = values[__builtin_ctz(bits)];
    return count;
#endif
}

inline ivec counting_from(int32_t first) {
    ivec lanes;
    for (int i = 0; i < W; i++) lanes[i] = first + i;
    return lanes;
}

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

constexpr int CHUNK = 8;         // spike steps that one list of events covers, at most
constexpr int MAX_STEPS = 32;    // spike steps, the bits of a word
constexpr int MAX_LAYERS = 16;
constexpr int BLOCK = 2;         // vectors of neurons that are computed together
constexpr int64_t TILE = 16;     // samples that meet a block of weights while it lies in the first cache
constexpr int64_t DIRECT = 4;    // up to so many samples, packing weights costs more than it gains

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
    float* activity;                  // (B, K0p)
    int32_t* words[MAX_LAYERS + 1];   // (B, Kp) of the encoder and of every layer
    float* voltage[MAX_LAYERS];       // (B, T, Np)
    int32_t* counts[MAX_LAYERS];      // events of a layer's inputs: (B, chunks)
    Segment* segments[MAX_LAYERS];    // (B, chunks, K + 1)
    int32_t* inputs[MAX_LAYERS];      // (B, chunks, K)
    int64_t bytes = 0;

    Store(const Net* n, int64_t samples_, bool keeps_, char* base) : net(n), samples(samples_), keeps(keeps_) {
        int64_t T = n->spike_steps;
        chunks = (T + CHUNK - 1) / CHUNK;
        activity = take<float>(base, samples * padded(n->widths[0]));
        for (int l = 0; l <= n->layers; l++) {
            int64_t K = n->widths[l];
            words[l] = take<int32_t>(base, samples * padded(K));
            if (l > 0) voltage[l - 1] = take<float>(base, (keeps ? samples : 1) * T * padded(K));
            if (l == n->layers) break;
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

    int64_t first_step(int64_t chunk) const { return net->spike_steps * chunk / chunks; }
};

// --- forward ----------------------------------------------------------------------------------------

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
            std::memcpy(out, weight + k * N + n, there * sizeof(float));
            std::memset(out + there, 0, (width - there) * sizeof(float));
        }
    }
}

// Columns of a layer's weights: row k begins at `first + k * stride`, but for the last at `last`, which may
// be read to the end of a whole vector.
struct Columns {
    const float* first;
    int64_t stride;
    const float* last;
    int64_t last_row;
    const float* row(int64_t k) const { return k == last_row ? last : first + k * stride; }
};

// drive[t] += the weights of all inputs that fired at step t, for the S steps of a chunk and V vectors.
template <int S, int V>
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

template <int V>
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

// One layer's neurons n0 to n0 + V W of one sample: drive, membranes, words and voltages.
template <int V>
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

void decode(const Store& st, int64_t b, float* act) {
    const Net& net = *st.net;
    const int32_t* words = st.words[net.layers] + b * padded(net.widths[net.layers]);
    const float* weight = net.out_weight;
    for (int64_t a = 0; a < net.act_dim; a++) {
        float sum = 0.0f;
        for (int64_t p = 0; p < net.out_pop_size; p++)
            sum += float(__builtin_popcount(*words++)) / float(net.spike_steps) * *weight++;
        act[a] = std::tanh(sum + net.out_bias[a]);
    }
}


// A layer's weights as a call needs them.
struct Layer {
    int64_t K, N, Np;
    const float* weight;  // (K, N)
    const float* bias;    // (Np)
    const float* last;    // the last row of `weight`, padded: only it may not be read beyond its end
    const float* packed;  // null: use the weights as they are
    const float* row(int64_t k) const { return k == K - 1 ? last : weight + k * N; }
};

struct Layers {
    Layer of[MAX_LAYERS];
    Layers(const Net& net, bool packs) {
        int64_t floats = 0;
        for (int l = 0; l < net.layers; l++)
            floats += padded(net.widths[l + 1]) * (2 + (packs ? net.widths[l] : 0)) + W;
        float* place = reinterpret_cast<float*>(scratch<0>(floats * sizeof(float)));
        for (int l = 0; l < net.layers; l++) {
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
        Columns columns = l.packed ? Columns{l.packed + n * l.K, V * W, nullptr, -1}
                                   : Columns{l.weight + n, l.N, l.last + n, l.K - 1};
        for (int64_t b = from; b < to; b++) neurons<V>(st, layer, b, n, columns, l.bias + n);
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

void forward(const Net& net, int64_t B, const float* obs, const float* uniform, float* act, char* saved,
             int threads) {
    const Layers layers(net, B > DIRECT);
    const int64_t tiles = (B + TILE - 1) / TILE;
    const int64_t step = B * net.widths[0];
    const int64_t bytes = saved ? 0 : Store(&net, B < TILE ? B : TILE, false, nullptr).bytes;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (tiles > 1)
    for (int64_t tile = 0; tile < tiles; tile++) {
        const int64_t first = tile * TILE, count = B - first < TILE ? B - first : TILE;
        const Store st = saved ? Store(&net, B, true, saved)
                               : Store(&net, B < TILE ? B : TILE, false, scratch<1>(bytes));
        const int64_t from = saved ? first : 0;
        for (int64_t i = 0; i < count; i++) {
            const float* u = uniform ? uniform + (first + i) * net.widths[0] : nullptr;
            encode(st, from + i, obs + (first + i) * net.obs_dim, u, step);
        }
        for (int l = 0; l < net.layers; l++) run_layer(st, l, layers.of[l], from, from + count);
        for (int64_t i = 0; i < count; i++) decode(st, from + i, act + (first + i) * net.act_dim);
    }
}

// --- backward ---------------------------------------------------------------------------------------

struct Gradients {
    float *mean, *std, *out_weight, *out_bias;
    float* const* weights;
    float* const* biases;
};

// Gradients of the drive of `count` neurons, `out` (T, Np), from those of their spikes, `grad`: (T, Np), or,
// where `step` is 0, (Np) for every t. Beyond the last step at which a voltage lies inside the surrogate window,
// its neuron has no gradient: `live` (Np) is the number of steps that have one.
//   gv = [|v - threshold| < window] (grad - kept v) + kept (1 - o);  kept = voltage_decay gv_next
//   out = current_decay out_next + gv
void scan_back(const Net& net, int64_t count, int64_t Np, const float* grad, int64_t step,
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

// Neurons ordered by how many steps of a chunk have a gradient, most first: those with at least s of them
// are the first `upto[s]`.
struct Live {
    int32_t upto[CHUNK + 1];
    const int32_t* neurons;
    const float* grad;  // of the drive at the chunk's first step
};

Live list_live(const int32_t* live, int64_t N, int first, int steps, int32_t* neurons, const float* grad) {
    Live out{{}, neurons, grad};
    const ivec lanes = counting_from(0);
    int32_t count = 0;
    for (int32_t s = steps; s > 0; s--) {
        for (int32_t n = 0; n < N; n += W) {
            ivec left = load(live + n) - first;
            count += append(neurons + count, lanes + n, (s == steps ? left >= s : left == s) & (lanes + n < int32_t(N)));
        }
        out.upto[s] = count;
    }
    return out;
}

// sums[t] += grad[t, n] * weights of n, for the neurons that have a gradient at step t of a chunk of S.
template <int S, int V, int SUMS>
inline void spread(const Live& live, const float* columns, int64_t Np, int32_t i, vec (&sums)[SUMS][V]) {
    if constexpr (S == 1) {  // several sums, for one would wait for itself
        vec other[3][V] = {};
        for (; i + 3 < live.upto[1]; i += 4)
            for (int u = 0; u < 4; u++) {
                const int32_t n = live.neurons[i + u];
                const float* row = columns + int64_t(n) * V * W;
                vec* sum = u ? other[u - 1] : sums[0];
                for (int j = 0; j < V; j++) sum[j] += load(row + j * W) * live.grad[n];
            }
        for (int j = 0; j < V; j++) sums[0][j] += other[0][j] + (other[1][j] + other[2][j]);
    }
    for (; i < live.upto[S]; i++) {
        const int32_t n = live.neurons[i];
        const float* row = columns + int64_t(n) * V * W;
        for (int t = 0; t < S; t++)
            for (int j = 0; j < V; j++) sums[t][j] += load(row + j * W) * live.grad[t * Np + n];
    }
    if constexpr (S > 1) spread<S - 1, V>(live, columns, Np, i, sums);
}

template <int S, int V>
void spread(const Live& live, const float* columns, int64_t Np, float* out, int64_t Kp) {
    vec sums[S][V] = {};
    spread<S, V>(live, columns, Np, 0, sums);
    for (int t = 0; t < S; t++)
        for (int j = 0; j < V; j++) store(out + t * Kp + j * W, sums[t][j]);
}

template <int V>
void spread(int steps, const Live& live, const float* columns, int64_t Np, float* out, int64_t Kp) {
    switch (steps) {
        case 1: return spread<1, V>(live, columns, Np, out, Kp);
        case 2: return spread<2, V>(live, columns, Np, out, Kp);
        case 3: return spread<3, V>(live, columns, Np, out, Kp);
        case 4: return spread<4, V>(live, columns, Np, out, Kp);
        case 5: return spread<5, V>(live, columns, Np, out, Kp);
        case 6: return spread<6, V>(live, columns, Np, out, Kp);
        case 7: return spread<7, V>(live, columns, Np, out, Kp);
        case 8: return spread<8, V>(live, columns, Np, out, Kp);
    }
}

// A layer's weights by neuron, blocks of inputs from k one after the other, (blocks, N, V W), zero beyond K.
template <int V>
int64_t by_blocks(const Layer& l, int64_t k, float* out) {
    const int64_t width = V * W;
    for (; padded(l.K) - k >= width; k += width) {
        const int64_t there = l.K - k < width ? l.K - k : width;
        if (there < width) std::memset(out + k * l.N, 0, l.N * width * sizeof(float));
        transpose(l.weight + k * l.N, l.N, there, l.N, out + k * l.N, width);
    }
    return k;
}

// Gradients of a tile's inputs, `out` (samples, rows, Kp), from those of its drives, (rows, Np) for each sample.
struct Spread {
    const Layer& l;
    int64_t rows, chunks, Kp;
    const float* by_neuron;
    float *out, *collapsed;
    Live* lives;
    int32_t* neurons;

    Spread(const Layer& layer, int64_t rows_, const float* by_neuron_)
        : l(layer), rows(rows_), chunks((rows_ + CHUNK - 1) / CHUNK), Kp(padded(layer.K)), by_neuron(by_neuron_) {
        out = reinterpret_cast<float*>(scratch<5>(TILE * (rows * Kp + l.Np) * sizeof(float)));
        collapsed = out + TILE * rows * Kp;
        lives = reinterpret_cast<Live*>(scratch<6>(TILE * chunks * sizeof(Live)));
        neurons = reinterpret_cast<int32_t*>(scratch<7>((TILE * chunks * l.Np + W) * sizeof(int32_t)));
    }

    int first_step(int64_t chunk) const { return int(rows * chunk / chunks); }

    void take(int64_t i, const float* grad, const int32_t* live) {
        for (int64_t c = 0; c < chunks; c++) {
            const int64_t at = i * chunks + c;
            const int first = first_step(c);
            lives[at] = list_live(live, l.N, first, first_step(c + 1) - first, neurons + at * l.Np,
                                  grad + first * l.Np);
        }
    }

    template <int V>
    int64_t blocks(int64_t k, int64_t count) {
        for (; Kp - k >= V * W; k += V * W)
            for (int64_t i = 0; i < count; i++)
                for (int64_t c = 0; c < chunks; c++) {
                    const int first = first_step(c);
                    spread<V>(first_step(c + 1) - first, lives[i * chunks + c], by_neuron + k * l.N, l.Np,
                              out + (i * rows + first) * Kp + k, Kp);
                }
        return k;
    }

    void run(int64_t count) { blocks<1>(blocks<BLOCK>(0, count), count); }
};

// block (K, V W) += for every input of the events, the gradients of the steps at which it fired.
template <int S, int V>
inline void scatter(Events events, const float* grad, int64_t Np, float* block) {
    vec g[S][V];
    for (int t = 0; t < S; t++)
        for (int j = 0; j < V; j++) g[t][j] = load(grad + t * Np + j * W);
    int32_t i = 0;
    for (int32_t s = 0; s < *events.count; s++) {
        const Segment segment = events.segments[s];
        const float* bits = BITS.of[segment.word];
        vec sum[V];
        for (int j = 0; j < V; j++) {
            sum[j] = bits[0] * g[0][j];
            for (int t = 1; t < S; t++) sum[j] += bits[t] * g[t][j];
        }
        for (; i < segment.end; i++) {
            float* row = block + int64_t(events.inputs[i]) * V * W;
            for (int j = 0; j < V; j++) store(row + j * W, load(row + j * W) + sum[j]);
        }
    }
}

template <int V>
inline void scatter(int steps, Events events, const float* grad, int64_t Np, float* block) {
    switch (steps) {
        case 1: return scatter<1, V>(events, grad, Np, block);
        case 2: return scatter<2, V>(events, grad, Np, block);
        case 3: return scatter<3, V>(events, grad, Np, block);
        case 4: return scatter<4, V>(events, grad, Np, block);
        case 5: return scatter<5, V>(events, grad, Np, block);
        case 6: return scatter<6, V>(events, grad, Np, block);
        case 7: return scatter<7, V>(events, grad, Np, block);
        case 8: return scatter<8, V>(events, grad, Np, block);
    }
}

// Gradients of a layer's weights and biases for neurons n to n + V W, over the whole batch.
template <int V>
void weight_gradients(const Store& st, int layer, const Layer& l, int64_t n, const float* grad,
                      float* grad_weight, float* grad_bias) {
    const int64_t T = st.net->spike_steps, width = V * W;
    const int64_t there = l.N - n < width ? l.N - n : width;
    float* block = reinterpret_cast<float*>(scratch<2>(l.K * width * sizeof(float)));
    std::memset(block, 0, l.K * width * sizeof(float));
    vec bias[V] = {};
    for (int64_t b = 0; b < st.samples; b++) {
        const float* g = grad + b * T * l.Np + n;
        for (int64_t c = 0; c < st.chunks; c++) {
            const int64_t first = st.first_step(c), steps = st.first_step(c + 1) - first;
            scatter<V>(int(steps), st.events(layer, b, c), g + first * l.Np, l.Np, block);
        }
        for (int64_t t = 0; t < T; t++)
            for (int j = 0; j < V; j++) bias[j] += load(g + t * l.Np + j * W);
    }
    for (int64_t k = 0; k < l.K; k++)
        std::memcpy(grad_weight + k * l.N + n, block + k * width, there * sizeof(float));
    std::memcpy(grad_bias + n, bias, there * sizeof(float));
}

void backward(const Net& net, int64_t B, const float* obs, bool poisson, const float* act,
              const float* grad_act, char* saved, const Gradients& out, int threads) {
    const Store st(&net, B, true, saved);
    const Layers layers(net, false);
    const int64_t T = net.spike_steps, tiles = (B + TILE - 1) / TILE, K0 = net.widths[0];
    int64_t widest = 0;
    for (int l = 0; l <= net.layers; l++) widest = padded(net.widths[l]) > widest ? padded(net.widths[l]) : widest;
    // Gradients of the drives of two neighbouring layers, and of one sample's spikes for each thread.
    float* memory = reinterpret_cast<float*>(scratch<3>(2 * B * T * widest * sizeof(float)));
    float *above = memory, *below = memory + B * T * widest;
    int32_t* lives = reinterpret_cast<int32_t*>(scratch<8>(B * widest * sizeof(int32_t)));
    // The encoder's spikes pass their gradients on: dA = sum over t of d(spike t) times w_t, where w_t =
    // dv_t / dA = sum over i <= t of (1 - threshold)^i for the deterministic coder, and 1 for Poisson.
    float weight[MAX_STEPS], power = 1.0f, total = 0.0f;
    for (int64_t t = 0; t < T; t++, power *= 1.0f - net.encoder_threshold)
        weight[t] = poisson ? 1.0f : total += power;

    const int64_t N = net.widths[net.layers], Np = padded(N);
    std::memset(out.out_weight, 0, N * sizeof(float));
    std::memset(out.out_bias, 0, net.act_dim * sizeof(float));
    float* top = reinterpret_cast<float*>(scratch<5>(Np * sizeof(float)));
    std::memset(top, 0, Np * sizeof(float));
    for (int64_t b = 0; b < B; b++) {
        const int32_t* words = st.words[net.layers] + b * Np;
        for (int64_t a = 0, n = 0; a < net.act_dim; a++) {
            const float y = act[b * net.act_dim + a], g = grad_act[b * net.act_dim + a] * (1.0f - y * y);
            out.out_bias[a] += g;
            for (int64_t p = 0; p < net.out_pop_size; p++, n++) {
                out.out_weight[n] += g * (float(__builtin_popcount(words[n])) / float(T));
                top[n] = g * net.out_weight[n] / float(T);
            }
        }
        scan_back(net, Np, Np, top, 0, st.voltage[net.layers - 1] + b * T * Np, above + b * T * Np,
                  lives + b * widest);
    }
    for (int layer = net.layers - 1; layer >= 0; layer--) {
        const Layer& l = layers.of[layer];
        const int64_t blocks = (l.Np + BLOCK * W - 1) / (BLOCK * W);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t n = block * BLOCK * W;
            if (l.Np - n >= BLOCK * W)
                weight_gradients<BLOCK>(st, layer, l, n, above, out.weights[layer], out.biases[layer]);
            else
                weight_gradients<1>(st, layer, l, n, above, out.weights[layer], out.biases[layer]);
        }
        const int64_t Kp = padded(l.K), rows = layer == 0 ? 1 : T;
        float* by_neuron = reinterpret_cast<float*>(scratch<4>(Kp * l.N * sizeof(float)));
        by_blocks<1>(l, by_blocks<BLOCK>(l, 0, by_neuron), by_neuron);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (tiles > 1)
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int64_t first = tile * TILE, count = B - first < TILE ? B - first : TILE;
            Spread spread(l, rows, by_neuron);
            for (int64_t i = 0; i < count; i++) {
                const float* drive = above + (first + i) * T * l.Np;
                const int32_t* live = lives + (first + i) * widest;
                if (layer > 0) {
                    spread.take(i, drive, live);
                    continue;
                }
                for (int64_t n = 0; n < l.Np; n += W) {
                    vec s = {};
                    for (int64_t t = 0; t < T; t++) s += weight[t] * load(drive + t * l.Np + n);
                    store(spread.collapsed + i * l.Np + n, s);
                }
                spread.take(i, spread.collapsed + i * l.Np, live);
            }
            spread.run(count);
            for (int64_t i = 0; i < count; i++) {
                const int64_t b = first + i;
                const float* grad = spread.out + i * rows * Kp;
                if (layer > 0)
                    scan_back(net, Kp, Kp, grad, Kp, st.voltage[layer - 1] + b * T * Kp, below + b * T * Kp,
                              lives + b * widest);
                else
                    std::memcpy(below + b * Kp, grad, Kp * sizeof(float));
            }
        }
        float* other = above;
        above = below, below = other;
    }
    const float* input = above;  // (B, K0p) now
    const int64_t K0p = padded(K0);
    std::memset(out.mean, 0, K0 * sizeof(float));
    std::memset(out.std, 0, K0 * sizeof(float));
    for (int64_t b = 0; b < B; b++) {
        const float *activity = st.activity + b * K0p, *grad = input + b * K0p;
        for (int64_t o = 0, k = 0; o < net.obs_dim; o++)
            for (int64_t p = 0; p < net.pop_size; p++, k++) {
                const float inverse = 1.0f / net.std[k];
                const float z = (obs[b * net.obs_dim + o] - net.mean[k]) * inverse;
                const float g = grad[k] * activity[k] * z * inverse;
                out.mean[k] += g;
                out.std[k] += g * z;
            }
    }
}

}  // namespace

extern "C" {

// One action (A) from one raw observation (O): (obs - norm[0]) / norm[1], within [-clip, clip], then the network.
// False, and no action, where the observation is not finite.
bool spikerl_act(const Net* net, const double* obs, const float* norm, float clip, float* act) {
    const int64_t O = net->obs_dim;
    float* normal = reinterpret_cast<float*>(scratch<8>(O * sizeof(float)));
    for (int64_t o = 0; o < O; o++) {
        if (!std::isfinite(obs[o])) return false;
        const float z = (float(obs[o]) - norm[o]) / norm[O + o];
        normal[o] = z > clip ? clip : z < -clip ? -clip : z;
    }
    forward(*net, 1, normal, nullptr, act, nullptr, 1);
    return true;
}

// Bytes that `forward` fills and `backward` reads for B samples.
int64_t spikerl_saved_bytes(const Net* net, int64_t B) { return Store(net, B, true, nullptr).bytes; }

// act (B, A) from normalised observations (B, O); `uniform` (T, B, K0) makes the encoder a Poisson coder;
// `saved` is null where no gradient is wanted.
void spikerl_forward(const Net* net, int64_t B, const float* obs, const float* uniform, float* act,
                     char* saved, int threads) {
    forward(*net, B, obs, uniform, act, saved, threads);
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

// Gradients of the drive (T, M) from those of the spikes.
void spikerl_scan_back(const Net* net, int64_t M, const float* grad, const float* voltage, float* out,
                       int threads) {
#pragma omp parallel for num_threads(threads) if (M > 4096)
    for (int64_t m = 0; m < M; m += 16) scan_back(*net, 16, M, grad + m, M, voltage + m, out + m, nullptr);
}

// Gradients of all parameters; `saved` as `spikerl_forward` left it.
void spikerl_backward(const Net* net, int64_t B, const float* obs, int poisson, const float* act,
                      const float* grad_act, char* saved, float* mean, float* std, float* const* weights,
                      float* const* biases, float* out_weight, float* out_bias, int threads) {
    Gradients out{mean, std, out_weight, out_bias, weights, biases};
    backward(*net, B, obs, poisson, act, grad_act, saved, out, threads);
}
}

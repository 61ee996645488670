// A spiking layer's drive from lists of events.

#pragma once
#include "spiking.h"

namespace {

// Counting sort of the inputs that fired in a chunk, by their words. The two halves of the inputs have counters of
// their own, because a counter that was just written takes some cycles to be read again.
inline void list_events(const int32_t* words, int64_t K, int first, int steps, Events events) {
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
inline void pack(const Layer& l, int64_t from, int64_t to, int64_t width, float* out) {
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

// Lists a layer's inputs, of samples `from` to `to`.
inline void list_inputs(const Activations& acts, int layer, int64_t K, int64_t from, int64_t to) {
    for (int64_t b = from; b < to; b++)
        for (int64_t c = 0; c < acts.chunks; c++) {
            const int first = int(acts.first_step(c)), steps = int(acts.first_step(c + 1)) - first;
            list_events(acts.words[layer] + b * padded(K), K, first, steps, acts.events(layer, b, c));
        }
}

// drive (T, V W) of one sample: bias, and the weights of all inputs at the steps at which they fire.
template <int V, class Columns>
inline void add_inputs(const Activations& acts, int layer, int64_t b, const Columns& columns, const float* bias,
                       float* drive) {
    for (int t = 0; t < acts.net->spike_steps; t++)
        for (int j = 0; j < V; j++) store(drive + (t * V + j) * W, load(bias + j * W));
    for (int64_t c = 0; c < acts.chunks; c++) {
        const int64_t first = acts.first_step(c);
        with_steps(int(acts.first_step(c + 1) - first), [&](auto S) {
            gather<S, V>(acts.events(layer, b, c), columns, drive + first * V * W);
        });
    }
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
            if (packs_all || 2 * l.N < l.Np) {  // with few columns, a vector from the second last row crosses the end
                float* packed = memory.array<float>(l.K * l.Np);
                const int64_t end = l.Np / (BLOCK * W) * (BLOCK * W);  // end of the whole blocks
                pack(l, 0, end, BLOCK * W, packed);
                pack(l, end, l.Np, W, packed + end * l.K);
                l.packed = packed;
            }
            of[i] = l;
        }
    }
};

// Calls `f(V, n, columns)` for every block of V vectors of a layer's columns from n on; returns the first column left.
template <int V, class F>
int64_t for_each_columns(const Layer& l, int64_t n, F f) {
    for (; l.Np - n >= V * W; n += V * W)
        if (l.packed) f(std::integral_constant<int, V>{}, n, PackedColumns<V>{l.packed + n * l.K});
        else f(std::integral_constant<int, V>{}, n, UnpackedColumns{l.weight + n, l.N, l.last + n, l.K - 1});
    return n;
}

// The same over all columns.
template <class F>
void for_each_columns(const Layer& l, F f) {
    int64_t n = l.packed ? 0 : for_each_columns<4>(l, 0, f);
    n = for_each_columns<BLOCK>(l, n, f);
    for_each_columns<1>(l, n, f);
}

}  // namespace

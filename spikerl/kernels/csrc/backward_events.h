// Gradients of a spiking layer's weights and inputs from lists of events.

#pragma once
#include "spiking.h"

namespace {

// Neurons ordered by how many of a chunk's first steps may have a gradient, most first: those with at least s such
// steps are the first `count[s]`.
struct ActiveNeurons {
    int32_t count[CHUNK + 1];
    const int32_t* neurons;
    const float* grad;  // of the drive at the chunk's first step
};

// Writes the list to `neurons`, a whole vector at a time.
inline ActiveNeurons list_active(const int32_t* active_steps, int64_t N, int first, int steps, int32_t* neurons,
                          const float* grad) {
    ActiveNeurons out{{}, neurons, grad};
    const ivec lanes = iota(0);
    int32_t count = 0;
    for (int32_t s = steps; s > 0; s--) {
        for (int32_t n = 0; n < N; n += W) {
            const ivec left = load(active_steps + n) - first, selected = s == steps ? left >= s : left == s;
            count += append(neurons + count, lanes + n, selected & (lanes + n < int32_t(N)));
        }
        out.count[s] = count;
    }
    return out;
}

// sums[t] += grad[t, n] * the weights of neuron n, for the neurons that have a gradient at step t of a chunk of S, from
// entry i of their list on.
template <int S, int V, int ROWS>
inline void add_active(const ActiveNeurons& active, const float* weights, int64_t Np, int32_t i, vec (&sums)[ROWS][V]) {
    if constexpr (S == 1) {  // several sums, because consecutive additions to one wait for each other
        vec other[3][V] = {};
        for (; i + 3 < active.count[1]; i += 4)
            for (int u = 0; u < 4; u++) {
                const int32_t n = active.neurons[i + u];
                const float* row = weights + int64_t(n) * V * W;
                vec* sum = u ? other[u - 1] : sums[0];
                for (int j = 0; j < V; j++) sum[j] += load(row + j * W) * active.grad[n];
            }
        for (int j = 0; j < V; j++) sums[0][j] += other[0][j] + (other[1][j] + other[2][j]);
    }
    for (; i < active.count[S]; i++) {
        const int32_t n = active.neurons[i];
        const float* row = weights + int64_t(n) * V * W;
        for (int t = 0; t < S; t++)
            for (int j = 0; j < V; j++) sums[t][j] += load(row + j * W) * active.grad[t * Np + n];
    }
    if constexpr (S > 1) add_active<S - 1, V>(active, weights, Np, i, sums);
}

// out (S, Kp) = grad (S, Np) times N rows of V vectors of weights, over the active neurons.
template <int S, int V>
void multiply_active(const ActiveNeurons& active, const float* weights, int64_t Np, float* out, int64_t Kp) {
    vec sums[S][V] = {};
    add_active<S, V>(active, weights, Np, 0, sums);
    for (int t = 0; t < S; t++)
        for (int j = 0; j < V; j++) store(out + t * Kp + j * W, sums[t][j]);
}

// Packs a layer's weights by neuron, in blocks of V vectors of inputs from k on, (blocks, N, V W), zero beyond K;
// returns the first input beyond the blocks.
template <int V>
int64_t pack_by_neuron(const Layer& l, int64_t k, float* out) {
    for (; padded(l.K) - k >= V * W; k += V * W)
        transpose_padded(l.weight + k * l.N, l.K - k, l.N, V * W, out + k * l.N);
    return k;
}

// Gradients of a layer's inputs for a block of samples, `out` (samples, rows, Kp), from those of its drives, (rows, Np)
// for each sample.
struct InputGradients {
    Scratch memory;
    const Layer& l;
    const int64_t rows, chunks, Kp;
    const float* by_neuron;
    float* const out;
    float* const summed;  // (samples, Np): drive gradients summed over the steps, if a single product is formed of them
    ActiveNeurons* const active;
    int32_t* const neurons;

    InputGradients(const Layer& layer, int64_t rows_, const float* by_neuron_)
        : l(layer),
          rows(rows_),
          chunks((rows + CHUNK - 1) / CHUNK),
          Kp(padded(l.K)),
          by_neuron(by_neuron_),
          out(memory.array<float>(SAMPLE_BLOCK * rows * Kp)),
          summed(memory.array<float>(SAMPLE_BLOCK * l.Np)),
          active(memory.array<ActiveNeurons>(SAMPLE_BLOCK * chunks)),
          neurons(memory.array<int32_t>(SAMPLE_BLOCK * chunks * l.Np + W)) {}

    int first_step(int64_t chunk) const { return int(rows * chunk / chunks); }

    void list_sample(int64_t i, const float* grad, const int32_t* active_steps) {
        for (int64_t c = 0; c < chunks; c++) {
            const int64_t at = i * chunks + c;
            const int first = first_step(c);
            active[at] = list_active(active_steps, l.N, first, first_step(c + 1) - first, neurons + at * l.Np,
                                     grad + first * l.Np);
        }
    }

    template <int V>
    int64_t run_blocks(int64_t k, int64_t count) {
        for (; Kp - k >= V * W; k += V * W)
            for (int64_t i = 0; i < count; i++)
                for (int64_t c = 0; c < chunks; c++) {
                    const int first = first_step(c);
                    with_steps(first_step(c + 1) - first, [&](auto S) {
                        multiply_active<S, V>(active[i * chunks + c], by_neuron + k * l.N, l.Np,
                                              out + (i * rows + first) * Kp + k, Kp);
                    });
                }
        return k;
    }

    template <int V>
    void multiply(int64_t count, int64_t k) {
        multiply_dense<V>(0, count, l.N, summed, l.Np, PackedColumns<V>{by_neuron + k * l.N}, out + k, Kp);
    }

    void run(int64_t count) { run_blocks<1>(run_blocks<BLOCK>(0, count), count); }

    // Multiplies `summed` as a dense matrix, since few of its entries are 0.
    void run_dense(int64_t count) {
        int64_t k = 0;
        for (; Kp - k >= BLOCK * W; k += BLOCK * W) multiply<BLOCK>(count, k);
        for (; k < Kp; k += W) multiply<1>(count, k);
    }
};

// block (K, V W): each input that fired adds the drive gradients of the steps at which it did.
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

// Copies the gradients of weights, `block` (K, V W), and of biases of neurons n to n + V W to their places.
template <int V>
void put_columns(const Layer& l, int64_t n, const float* block, const vec* bias, float* grad_weight, float* grad_bias) {
    const int64_t width = V * W, count = std::min(width, l.N - n);
    for (int64_t k = 0; k < l.K; k++) {
        float* row = grad_weight + k * l.N + n;
        if (count < width) std::memcpy(row, block + k * width, count * sizeof(float));
        else
            for (int j = 0; j < V; j++) store(row + j * W, load(block + k * width + j * W));
    }
    std::memcpy(grad_bias + n, bias, count * sizeof(float));
}

// Gradients of a layer's weights and biases for neurons n to n + V W, over the whole batch.
template <int V>
void weight_gradients(const Activations& acts, int layer, const Layer& l, int64_t n, const float* grad,
                      float* grad_weight, float* grad_bias) {
    const int64_t T = acts.net->spike_steps, width = V * W;
    Scratch memory;
    float* block = memory.array<float>(l.K * width);
    std::memset(block, 0, l.K * width * sizeof(float));
    vec bias[V] = {};
    for (int64_t b = 0; b < acts.samples; b++) {
        const float* g = grad + b * T * l.Np + n;
        if (b + 1 < acts.samples) {  // prefetch the next sample: hardware does not follow these strides
            for (int64_t t = T; t < 2 * T; t++)
                for (int j = 0; j < V; j++) __builtin_prefetch(g + t * l.Np + j * W);
            const Events next = acts.events(layer, b + 1, 0);
            for (int64_t i = 0; i < 8; i++) __builtin_prefetch(next.inputs + i * 16);
            for (int64_t i = 0; i < 3; i++) __builtin_prefetch(next.segments + i * 8);
            __builtin_prefetch(next.count);
        }
        for (int64_t c = 0; c < acts.chunks; c++) {
            const int64_t first = acts.first_step(c);
            with_steps(int(acts.first_step(c + 1) - first), [&](auto S) {
                scatter<S, V>(acts.events(layer, b, c), g + first * l.Np, l.Np, block);
            });
        }
        for (int64_t t = 0; t < T; t++)
            for (int j = 0; j < V; j++) bias[j] += load(g + t * l.Np + j * W);
    }
    put_columns<V>(l, n, block, bias, grad_weight, grad_bias);
}

// The same for a layer driven by equal currents at every step: `by_input` (K, Bp) are its inputs, `summed` (B, Np) its
// drive gradients summed over the steps.
template <int V>
void weight_gradients(const Layer& l, int64_t n, int64_t B, const float* by_input, const float* summed,
                      float* grad_weight, float* grad_bias) {
    Scratch memory;
    float* block = memory.array<float>(l.K * V * W);
    const UnpackedColumns columns{summed + n, l.Np, nullptr, -1};
    multiply_dense<V>(0, l.K, B, by_input, padded(B), columns, block, V * W);
    vec bias[V] = {};
    for (int64_t b = 0; b < B; b++)
        for (int j = 0; j < V; j++) bias[j] += load(columns.row(b) + j * W);
    put_columns<V>(l, n, block, bias, grad_weight, grad_bias);
}

// The encoder's activities by neuron, (K0, Bp).
inline const float* transposed_activities(const Activations& acts, Scratch& memory) {
    const int64_t K = acts.net->widths[0], Kp = padded(K), Bp = padded(acts.samples);
    float* by_neuron = memory.array<float>(K * Bp);
    transpose(acts.activity, Kp, acts.samples, K, by_neuron, Bp);
    return by_neuron;
}

// Drives' gradients (B, T, Np) added up over the steps, (B, Np).
inline const float* sums_over_steps(const Activations& acts, const float* grad, int64_t Np, Scratch& memory) {
    const int64_t B = acts.samples, T = acts.net->spike_steps;
    float* summed = memory.array<float>(B * Np);
    for (int64_t b = 0; b < B; b++)
        for (int64_t n = 0; n < Np; n += W) {
            vec sum = {};
            for (int64_t t = 0; t < T; t++) sum += load(grad + (b * T + t) * Np + n);
            store(summed + b * Np + n, sum);
        }
    return summed;
}

// Gradients of a layer's weights and biases from those of its drives, (B, T, Np).
inline void weight_gradients(const Activations& acts, int layer, const Layer& l, const float* grad, float* grad_weight,
                             float* grad_bias, int threads) {
    const int64_t B = acts.samples, columns = (l.Np + BLOCK * W - 1) / (BLOCK * W);
    const bool currents = layer == 0 && acts.net->analog;
    Scratch memory;
    const float* by_input = currents ? transposed_activities(acts, memory) : nullptr;
    const float* summed = currents ? sums_over_steps(acts, grad, l.Np, memory) : nullptr;
    const auto run = [&](auto V, int64_t n) {
        if (currents) weight_gradients<V>(l, n, B, by_input, summed, grad_weight, grad_bias);
        else weight_gradients<V>(acts, layer, l, n, grad, grad_weight, grad_bias);
    };
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t column = 0; column < columns; column++) {
        const int64_t n = column * BLOCK * W;
        if (l.Np - n >= BLOCK * W) run(std::integral_constant<int, BLOCK>{}, n);
        else run(std::integral_constant<int, 1>{}, n);
    }
}

// Calls `f(b, input_grad)` for each sample with the gradients of its inputs, from those of its drives, `grad`
// (B, T, Np). They are (T, Kp), computed from the first `active_steps` (B, steps_stride) steps of each neuron; or, with
// `step_weight` (T), their sum over the steps with these weights, (Kp).
template <class F>
void input_gradients(const Layer& l, int64_t B, int64_t T, const float* grad, const int32_t* active_steps,
                     int64_t steps_stride, const float* step_weight, int threads, F f) {
    const int64_t Kp = padded(l.K), rows = step_weight ? 1 : T, blocks = (B + SAMPLE_BLOCK - 1) / SAMPLE_BLOCK;
    Scratch memory;
    float* by_neuron = memory.array<float>(Kp * l.N);
    pack_by_neuron<1>(l, pack_by_neuron<BLOCK>(l, 0, by_neuron), by_neuron);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (blocks > 1)
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t first = block * SAMPLE_BLOCK, count = std::min(SAMPLE_BLOCK, B - first);
        InputGradients inputs(l, rows, by_neuron);
        for (int64_t i = 0; i < count; i++) {
            const float* drive = grad + (first + i) * T * l.Np;
            if (!step_weight) {
                inputs.list_sample(i, drive, active_steps + (first + i) * steps_stride);
                continue;
            }
            for (int64_t n = 0; n < l.Np; n += W) {
                vec sum = {};
                for (int64_t t = 0; t < T; t++) sum += step_weight[t] * load(drive + t * l.Np + n);
                store(inputs.summed + i * l.Np + n, sum);
            }
        }
        if (step_weight) inputs.run_dense(count);
        else inputs.run(count);
        for (int64_t i = 0; i < count; i++) f(first + i, inputs.out + i * rows * Kp);
    }
}

}  // namespace

// Backward: gradients of all parameters from those of the actions.

#include "backward.h"
#include "backward_tiles.h"

namespace {

// Neurons ordered by how many steps of a chunk have a gradient, most first: those with at least s of them are the first
// `count[s]`.
struct ActiveNeurons {
    int32_t count[CHUNK + 1];
    const int32_t* neurons;
    const float* grad;  // of the drive at the chunk's first step
};

// Appends to `neurons`, which is written a whole vector at a time.
ActiveNeurons list_active(const int32_t* active_steps, int64_t N, int first, int steps, int32_t* neurons,
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

// A layer's weights by neuron, in blocks of V vectors of inputs from k on, (blocks, N, V W), zero beyond K; the first
// input beyond the blocks.
template <int V>
int64_t pack_by_neuron(const Layer& l, int64_t k, float* out) {
    for (; padded(l.K) - k >= V * W; k += V * W)
        transpose_padded(l.weight + k * l.N, l.K - k, l.N, V * W, out + k * l.N);
    return k;
}

// Gradients of the inputs of a block of samples, `out` (samples, rows, Kp), from those of its drives, (rows, Np) for
// each sample.
struct InputGradients {
    Scratch memory;
    const Layer& l;
    const int64_t rows, chunks, Kp;
    const float* by_neuron;
    float* const out;
    float* const summed;  // (samples, Np): drives' gradients, where they are the same product for all steps
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

    // Of `summed`, in which few neurons have no gradient.
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

// Puts gradients of weights, (K, V W), and of biases where those of neurons n to n + V W belong.
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

// The same of a layer that is driven by the same currents at every step: `by_input` (K, Bp) are its inputs, `summed`
// (B, Np) its drives' gradients over all steps.
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
const float* transposed_activities(const Activations& acts, Scratch& memory) {
    const int64_t K = acts.net->widths[0], Kp = padded(K), Bp = padded(acts.samples);
    float* by_neuron = memory.array<float>(K * Bp);
    transpose(acts.activity, Kp, acts.samples, K, by_neuron, Bp);
    return by_neuron;
}

// Drives' gradients (B, T, Np) added up over the steps, (B, Np).
const float* sums_over_steps(const Activations& acts, const float* grad, int64_t Np, Scratch& memory) {
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

// Gradients of all layers' weights, and of the encoder's activities, (B, K0p), which are returned; from those of the
// actions. A spike at step t passes encoder_weight[t] of its gradient on to the activity.
const float* backward_events(const Activations& acts, const float* encoder_weight, const ActionGradients& actions,
                             const Gradients& out, Scratch& memory, int threads) {
    const Net& net = *acts.net;
    const int64_t B = acts.samples, T = net.spike_steps, blocks = (B + SAMPLE_BLOCK - 1) / SAMPLE_BLOCK;
    const int64_t widest = widest_layer(net);
    // Gradients of the drives of two consecutive layers.
    float *above = memory.array<float>(B * T * widest), *below = memory.array<float>(B * T * widest);
    int32_t* active_steps = memory.array<int32_t>(B * widest);
    float* by_decay = memory.array<float>(B);  // gradients by a layer's decay
    const int64_t Np = padded(net.widths[net.layers]);
    const int last = net.layers - 1;
    actions.decoder_backward(acts, out, [&](int64_t b, const float* grad_spikes) {
        by_decay[b] = scan_back(acts.neurons[last], int(T), Np, Np, grad_spikes, 0, acts.voltage[last] + b * T * Np,
                                above + b * T * Np, active_steps + b * widest);
    });
    for (int layer = last; layer >= 0; layer--) {
        out.put_decay(acts, layer, by_decay);
        const Layer l(net, layer);
        const int64_t columns = (l.Np + BLOCK * W - 1) / (BLOCK * W);
        const float *by_input = nullptr, *summed = nullptr;  // of a layer that currents drive
        if (layer == 0 && net.analog) {
            by_input = transposed_activities(acts, memory);
            summed = sums_over_steps(acts, above, l.Np, memory);
        }
        const auto weights = [&](auto V, int64_t n) {
            if (summed) weight_gradients<V>(l, n, B, by_input, summed, out.weight(0), out.bias(0));
            else weight_gradients<V>(acts, layer, l, n, above, out.weight(layer), out.bias(layer));
        };
#pragma omp parallel for schedule(dynamic) num_threads(threads)
        for (int64_t column = 0; column < columns; column++) {
            const int64_t n = column * BLOCK * W;
            if (l.Np - n >= BLOCK * W) weights(std::integral_constant<int, BLOCK>{}, n);
            else weights(std::integral_constant<int, 1>{}, n);
        }
        const int64_t Kp = padded(l.K), rows = layer == 0 ? 1 : T;
        Scratch of_layer;
        float* by_neuron = of_layer.array<float>(Kp * l.N);
        pack_by_neuron<1>(l, pack_by_neuron<BLOCK>(l, 0, by_neuron), by_neuron);
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (blocks > 1)
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t first = block * SAMPLE_BLOCK, count = std::min(SAMPLE_BLOCK, B - first);
            InputGradients inputs(l, rows, by_neuron);
            for (int64_t i = 0; i < count; i++) {
                const float* drive = above + (first + i) * T * l.Np;
                if (layer > 0) {
                    inputs.list_sample(i, drive, active_steps + (first + i) * widest);
                    continue;
                }
                for (int64_t n = 0; n < l.Np; n += W) {
                    vec sum = {};
                    for (int64_t t = 0; t < T; t++) sum += encoder_weight[t] * load(drive + t * l.Np + n);
                    store(inputs.summed + i * l.Np + n, sum);
                }
            }
            if (layer > 0) inputs.run(count);
            else inputs.run_dense(count);
            for (int64_t i = 0; i < count; i++) {
                const int64_t b = first + i;
                float* grad = inputs.out + i * rows * Kp;
                if (layer == 0) {
                    std::memcpy(below + b * Kp, grad, Kp * sizeof(float));
                    continue;
                }
                actions.add_cost(layer - 1, grad, T, Kp, l.K);
                by_decay[b] = scan_back(acts.neurons[layer - 1], int(T), Kp, Kp, grad, Kp,
                                        acts.voltage[layer - 1] + b * T * Kp, below + b * T * Kp,
                                        active_steps + b * widest);
            }
        }
        std::swap(above, below);
    }
    return above;
}

void backward(const Net& net, int64_t B, const float* obs, bool poisson, const ActionGradients& actions, char* saved,
              const Gradients& out, int threads) {
    const Activations acts(&net, B, true, uses_events(net, B), saved);
    const int64_t T = net.spike_steps, K0 = net.widths[0], K0p = padded(K0);
    // The encoder's spikes have a straight-through gradient: dA = sum over t of d(spike t) times w_t, where w_t =
    // dv_t / dA = sum over i <= t of (1 - threshold)^i for the deterministic coder, and 1 for Poisson; and dA is the sum of
    // the gradients of all steps' currents.
    float weight[MAX_STEPS], power = 1.0f, total = 0.0f;
    for (int64_t t = 0; t < T; t++, power *= 1.0f - net.encoder_threshold)
        weight[t] = poisson || net.analog ? 1.0f : total += power;
    Scratch memory;
#if HAS_TILES
    const float* grad_activity = uses_events(net, B) ? backward_events(acts, weight, actions, out, memory, threads)
                                                : backward_tiles(acts, weight, actions, out, memory, threads);
#else
    const float* grad_activity = backward_events(acts, weight, actions, out, memory, threads);
#endif
    std::memset(out.mean, 0, K0 * sizeof(float));
    std::memset(out.std, 0, K0 * sizeof(float));
    float *inverse = memory.array<float>(K0), *obs_of = memory.array<float>(K0);
    for (int64_t k = 0; k < K0; k++) inverse[k] = 1.0f / net.std[k];
    for (int64_t b = 0; b < B; b++) {
        const float *activity = acts.activity + b * K0p, *grad = grad_activity + b * K0p;
        for (int64_t o = 0, k = 0; o < net.obs_dim; o++)
            for (int64_t p = 0; p < net.pop_size; p++, k++) obs_of[k] = obs[b * net.obs_dim + o];
#pragma GCC ivdep
        for (int64_t k = 0; k < K0; k++) {
            const float z = (obs_of[k] - net.mean[k]) * inverse[k];
            const float g = grad[k] * activity[k] * z * inverse[k];
            out.mean[k] += g;
            out.std[k] += g * z;
        }
    }
}

}  // namespace

extern "C" {

// Gradients of the drive (T, M) from those of the spikes. Returns the gradient by voltage_decay, where that is learned.
float spikerl_scan_back(const Neurons* neurons, int steps, int64_t M, const float* grad, const float* voltage,
                        float* out, int threads) {
    Scratch memory;
    float* by_decay = memory.array<float>(M / 16);
#pragma omp parallel for num_threads(threads) if (M > 4096)
    for (int64_t m = 0; m < M; m += 16)
        by_decay[m / 16] = scan_back(*neurons, steps, 16, M, grad + m, M, voltage + m, out + m, nullptr);
    double sum = 0.0;
    for (int64_t i = 0; i < M / 16; i++) sum += by_decay[i];
    return float(sum);
}

// Gradients of all parameters, `grads`: the encoder's means and standard deviations, each layer's weights and biases,
// each layer's decay where it is learned, the decoder's; `saved` as spikerl_forward left it; `act` is null where that did not squash, `by_spike` (layers), the
// gradient by each spike of a layer, where spikes cost nothing.
void spikerl_backward(const Net* net, int64_t B, const float* obs, int poisson, const float* act, const float* grad_act,
                      const float* by_spike, char* saved, float* const* grads, int threads) {
    backward(*net, B, obs, poisson, {act, grad_act, by_spike}, saved, Gradients(*net, grads), threads);
}

// Spikes of each layer over all samples and steps, from `saved` as spikerl_forward left it.
void spikerl_count_spikes(const Net* net, int64_t B, char* saved, int64_t* counts) {
    const Activations acts(net, B, true, uses_events(*net, B), saved);
    for (int layer = 1; layer <= net->layers; layer++) {
        const int64_t N = net->widths[layer], Np = padded(N);
        int64_t count = 0;
        for (int64_t b = 0; b < B; b++)
            for (int64_t n = 0; n < N; n++) count += __builtin_popcount(acts.words[layer][b * Np + n]);
        counts[layer - 1] = count;
    }
}
}

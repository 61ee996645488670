// Backward: gradients of all parameters.

#include "backward.h"
#include "backward_tiles.h"

namespace {

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

// out (samples, Kp) = grad (samples, Np) times N rows of V vectors of columns, R samples at once.
template <int R, int V>
void dense(int64_t from, int64_t to, int64_t N, const float* grad, int64_t Np, const float* columns, float* out,
           int64_t Kp) {
    for (; to - from >= R; from += R) {
        vec sums[R][V] = {};
        for (int64_t n = 0; n < N; n++)
#pragma GCC unroll 8
            for (int r = 0; r < R; r++)
                for (int j = 0; j < V; j++) sums[r][j] += load(columns + (n * V + j) * W) * grad[(from + r) * Np + n];
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
            for (int j = 0; j < V; j++) store(out + (from + r) * Kp + j * W, sums[r][j]);
    }
    if constexpr (R > 1) dense<R / 2, V>(from, to, N, grad, Np, columns, out, Kp);
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

    // Of `collapsed`, in which few neurons have no gradient.
    void run_dense(int64_t count) {
        constexpr int R = W == 16 ? 8 : 4;
        int64_t k = 0;
        for (; Kp - k >= BLOCK * W; k += BLOCK * W)
            dense<R, BLOCK>(0, count, l.N, collapsed, l.Np, by_neuron + k * l.N, out + k, Kp);
        for (; k < Kp; k += W) dense<R, 1>(0, count, l.N, collapsed, l.Np, by_neuron + k * l.N, out + k, Kp);
    }
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
        if (b + 1 < st.samples) {  // the next one's; no processor foresees these strides
            for (int64_t t = T; t < 2 * T; t++)
                for (int j = 0; j < V; j++) __builtin_prefetch(g + t * l.Np + j * W);
            const Events next = st.events(layer, b + 1, 0);
            for (int64_t i = 0; i < 8; i++) __builtin_prefetch(next.inputs + i * 16);
            for (int64_t i = 0; i < 3; i++) __builtin_prefetch(next.segments + i * 8);
            __builtin_prefetch(next.count);
        }
        for (int64_t c = 0; c < st.chunks; c++) {
            const int64_t first = st.first_step(c), steps = st.first_step(c + 1) - first;
            scatter<V>(int(steps), st.events(layer, b, c), g + first * l.Np, l.Np, block);
        }
        for (int64_t t = 0; t < T; t++)
            for (int j = 0; j < V; j++) bias[j] += load(g + t * l.Np + j * W);
    }
    for (int64_t k = 0; k < l.K; k++) {
        float* place = grad_weight + k * l.N + n;
        if (there < width) std::memcpy(place, block + k * width, there * sizeof(float));
        else
            for (int j = 0; j < V; j++) store(place + j * W, load(block + k * width + j * W));
    }
    std::memcpy(grad_bias + n, bias, there * sizeof(float));
}

// Gradients of the encoder's activities, (B, K0p), and of all layers' weights, from those of the actions.
const float* through_events(const Store& st, const float* encoder_weight, const Decoded& decoded, const Gradients& out,
                            int threads) {
    const Net& net = *st.net;
    const int64_t B = st.samples, T = net.spike_steps, tiles = (B + TILE - 1) / TILE;
    int64_t widest = 0;
    for (int l = 0; l <= net.layers; l++) widest = padded(net.widths[l]) > widest ? padded(net.widths[l]) : widest;
    // Gradients of the drives of two neighbouring layers, and of one sample's spikes for each thread.
    float* memory = reinterpret_cast<float*>(scratch<3>(2 * B * T * widest * sizeof(float)));
    float *above = memory, *below = memory + B * T * widest;
    int32_t* lives = reinterpret_cast<int32_t*>(scratch<8>(B * widest * sizeof(int32_t)));
    const int64_t Np = padded(net.widths[net.layers]);
    decoded.each(st, out, [&](int64_t b, const float* top) {
        scan_back(net, Np, Np, top, 0, st.voltage[net.layers - 1] + b * T * Np, above + b * T * Np,
                  lives + b * widest);
    });
    for (int layer = net.layers - 1; layer >= 0; layer--) {
        const int64_t outputs = net.widths[layer + 1];
        const Layer l{net.widths[layer], outputs, padded(outputs), net.weights[layer]};
        const int64_t blocks = (l.Np + BLOCK * W - 1) / (BLOCK * W);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
        for (int64_t block = 0; block < blocks; block++) {
            const int64_t n = block * BLOCK * W;
            if (l.Np - n >= BLOCK * W)
                weight_gradients<BLOCK>(st, layer, l, n, above, out.weight(layer), out.bias(layer));
            else
                weight_gradients<1>(st, layer, l, n, above, out.weight(layer), out.bias(layer));
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
                    vec sum = {};
                    for (int64_t t = 0; t < T; t++) sum += encoder_weight[t] * load(drive + t * l.Np + n);
                    store(spread.collapsed + i * l.Np + n, sum);
                }
            }
            if (layer > 0) spread.run(count);
            else spread.run_dense(count);
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
        std::swap(above, below);
    }
    return above;
}

void backward(const Net& net, int64_t B, const float* obs, bool poisson, const float* act,
              const float* grad_act, char* saved, const Gradients& out, int threads) {
    const Store st(&net, B, true, by_events(B), saved);
    const int64_t T = net.spike_steps, K0 = net.widths[0];
    // The encoder's spikes pass their gradients on: dA = sum over t of d(spike t) times w_t, where w_t =
    // dv_t / dA = sum over i <= t of (1 - threshold)^i for the deterministic coder, and 1 for Poisson.
    float weight[MAX_STEPS], power = 1.0f, total = 0.0f;
    for (int64_t t = 0; t < T; t++, power *= 1.0f - net.encoder_threshold)
        weight[t] = poisson ? 1.0f : total += power;
    const Decoded decoded{act, grad_act};
#if HAS_TILES
    const float* input = by_events(B) ? through_events(st, weight, decoded, out, threads)
                                      : through_tiles(st, weight, decoded, out, threads);
#else
    const float* input = through_events(st, weight, decoded, out, threads);
#endif
    const int64_t K0p = padded(K0);
    std::memset(out.mean, 0, K0 * sizeof(float));
    std::memset(out.std, 0, K0 * sizeof(float));
    float *inverse = reinterpret_cast<float*>(scratch<5>(2 * K0 * sizeof(float))), *seen = inverse + K0;
    for (int64_t k = 0; k < K0; k++) inverse[k] = 1.0f / net.std[k];
    for (int64_t b = 0; b < B; b++) {
        const float *activity = st.activity + b * K0p, *grad = input + b * K0p;
        for (int64_t o = 0, k = 0; o < net.obs_dim; o++)
            for (int64_t p = 0; p < net.pop_size; p++, k++) seen[k] = obs[b * net.obs_dim + o];
#pragma GCC ivdep
        for (int64_t k = 0; k < K0; k++) {
            const float z = (seen[k] - net.mean[k]) * inverse[k];
            const float g = grad[k] * activity[k] * z * inverse[k];
            out.mean[k] += g;
            out.std[k] += g * z;
        }
    }
}

}  // namespace

extern "C" {

// Gradients of the drive (T, M) from those of the spikes.
void spikerl_scan_back(const Net* net, int64_t M, const float* grad, const float* voltage, float* out,
                       int threads) {
#pragma omp parallel for num_threads(threads) if (M > 4096)
    for (int64_t m = 0; m < M; m += 16) scan_back(*net, 16, M, grad + m, M, voltage + m, out + m, nullptr);
}

// Gradients of all parameters, `grads`: the encoder's means and deviations, each layer's weights and biases, the
// decoder's; `saved` as `spikerl_forward` left it; `act` is null where that did not squash.
void spikerl_backward(const Net* net, int64_t B, const float* obs, int poisson, const float* act,
                      const float* grad_act, char* saved, float* const* grads, int threads) {
    backward(*net, B, obs, poisson, act, grad_act, saved, Gradients(*net, grads), threads);
}
}

// ReLU networks, several of one shape side by side, and their gradients: values of (observation, action), one output
// each; or actions, the tanh of a network's outputs.
//
// A hidden unit that is 0 neither adds to the next layer nor has a gradient. Each sample lists the units that are
// not; all products but the first layer's run over such lists, as a spiking layer runs over its events. A sum is
// formed in one order whatever the number of threads.
//
// Shapes   C networks, B samples, O observation and A action entries, I inputs and N outputs of a layer, M outputs of a
//          network. Weights are (C, I, N). Rows of units are padded to whole panels (Np).

#include <cmath>

#include "vectors.h"

extern "C" {

struct Critic {
    int32_t networks, layers, obs_dim, act_dim;
    const int32_t* widths;  // layers + 1: of the input, of every hidden layer, and of the outputs
    const float* const* weights;
    const float* const* biases;
};
}

namespace {

constexpr int VECTORS = 4;
constexpr int64_t PANEL = VECTORS * W;        // columns that are computed together
constexpr int64_t PART = 128;                 // rows of a panel that are used together, out of the first cache
constexpr int ROWS = W == 16 ? 14 : 6;        // of a dense product: with two vectors, most of the registers

constexpr int64_t whole_panels(int64_t n) { return (n + PANEL - 1) / PANEL * PANEL; }

// Units that are not 0, of each row: `counts` (B), `index` and `value` (B, Np).
struct Lists {
    int32_t *counts, *index;
    float* value;
    int64_t Np;

    void add(int64_t b, int64_t n, vec v, ivec active) const {
        const int64_t end = b * Np + counts[b];
        append(index + end, counting_from(int32_t(n)), active);
        counts[b] += append(reinterpret_cast<int32_t*>(value + end), reinterpret_cast<ivec>(v), active);
    }
};

struct Layer {
    int64_t I, N, Np;
    const float *weight, *bias;
};

// Everything of one network that a call computes, in memory of the calling thread.
struct Network {
    const Critic* critic;
    int64_t c, B;
    const float* x;                  // (B, I)
    std::vector<float*> hidden;      // (B, Np) of every hidden layer
    std::vector<Lists> gradients;    // of the hidden layers' drives, where inputs need theirs,
    std::vector<float*> drives;      // and with zeros, (B, Np), where parameters do
    float *values, *grad;            // (B, M), and of the values

    Layer layer(int64_t l) const {
        const int64_t I = critic->widths[l], N = critic->widths[l + 1];
        return {I, N, whole_panels(N), critic->weights[l] + c * I * N, critic->biases[l] + c * N};
    }
    int64_t last() const { return critic->layers - 1; }
    int64_t outputs() const { return critic->widths[critic->layers]; }
};

// Carves arrays out of a block; with no block, counts its bytes.
struct Block {
    char* base;
    int64_t bytes = 0;

    template <class X>
    X* take(int64_t count) {
        X* place = reinterpret_cast<X*>(base + bytes);
        bytes += (count * int64_t(sizeof(X)) + 63) / 64 * 64;
        return place;
    }
};

Lists take_lists(Block& block, int64_t B, int64_t Np) {
    // An append writes a whole vector, beyond the end of its row too.
    return {block.take<int32_t>(B), block.take<int32_t>(B * Np + W), block.take<float>(B * Np + W), Np};
}

// What a call differentiates by.
enum By { NOTHING, INPUTS, PARAMETERS };

std::vector<Network> place(const Critic& critic, int64_t B, By by, Block& block) {
    std::vector<Network> nets;
    const float* x = block.take<float>(B * critic.widths[0]);
    for (int64_t c = 0; c < critic.networks; c++) {
        Network net{&critic, c, B, x, {}, {}, {}, nullptr, nullptr};
        for (int64_t l = 0; l < net.last(); l++) {
            const int64_t Np = net.layer(l).Np;
            net.hidden.push_back(block.take<float>(B * Np));
            if (by != NOTHING) net.gradients.push_back(take_lists(block, B, Np));
            if (by == PARAMETERS) net.drives.push_back(block.take<float>((B + W) * Np));
        }
        net.values = block.take<float>(B * net.outputs());
        net.grad = block.take<float>(B * net.outputs());
        nets.push_back(net);
    }
    return nets;
}

std::vector<Network> start(const Critic& critic, int64_t B, const float* obs, const float* act, By by) {
    Block counted{nullptr};
    place(critic, B, by, counted);
    Block block{scratch<20>(counted.bytes)};
    std::vector<Network> nets = place(critic, B, by, block);
    const int64_t O = critic.obs_dim, A = critic.act_dim;
    float* x = const_cast<float*>(nets[0].x);
    for (int64_t b = 0; b < B; b++, x += O + A) {
        std::memcpy(x, obs + b * O, O * sizeof(float));
        if (A > 0) std::memcpy(x + O, act + b * A, A * sizeof(float));
    }
    return nets;
}

// Columns n to n + PANEL of a layer's weights, for inputs `from` to `to`, (to - from, PANEL), zero beyond N.
void pack(const Layer& l, int64_t from, int64_t to, int64_t n, float* panel) {
    const int64_t there = l.N - n < PANEL ? l.N - n : PANEL;
    for (int64_t i = from; i < to; i++, panel += PANEL) {
        if (there == PANEL) {
            for (int j = 0; j < VECTORS; j++) store(panel + j * W, load(l.weight + i * l.N + n + j * W));
        } else {
            std::memcpy(panel, l.weight + i * l.N + n, there * sizeof(float));
            std::memset(panel + there, 0, (PANEL - there) * sizeof(float));
        }
    }
}

// Weights of inputs i to i + `width` by output, (N, width), zero beyond I.
void pack_by_output(const Layer& l, int64_t i, int64_t width, float* panel) {
    const int64_t there = l.I - i < width ? l.I - i : width;
    if (there < width) std::memset(panel, 0, l.N * width * sizeof(float));
    transpose(l.weight + i * l.N, l.N, there, l.N, panel, width);
}

// sum += value[i] * panel[index[i]] over a list.
template <int V>
inline void add_rows(const int32_t* index, const float* value, int64_t count, const float* panel, vec (&sum)[V]) {
    constexpr int WAYS = V > 2 ? 2 : 4 / V;  // sums at once, for one would wait for itself
    vec other[WAYS][V] = {};
    int64_t i = 0;
    for (; i + WAYS <= count; i += WAYS)
        for (int u = 0; u < WAYS; u++)
            for (int j = 0; j < V; j++) other[u][j] += load(panel + index[i + u] * V * W + j * W) * value[i + u];
    for (; i < count; i++)
        for (int j = 0; j < V; j++) sum[j] += load(panel + index[i] * V * W + j * W) * value[i];
    for (int u = 0; u < WAYS; u++)
        for (int j = 0; j < V; j++) sum[j] += other[u][j];
}

// R rows of ReLU(x W + b), for two vectors of a panel's columns.
template <int R>
void dense_rows(int64_t b, int64_t to, int64_t I, const float* x, const float* panel, const vec* bias, float* out,
                int64_t Np) {
    for (; to - b >= R; b += R) {
        vec sums[R][2];
#pragma GCC unroll 32
        for (int r = 0; r < R; r++) sums[r][0] = bias[0], sums[r][1] = bias[1];
        for (int64_t i = 0; i < I; i++) {
            const vec one = load(panel + i * PANEL), two = load(panel + i * PANEL + W);
#pragma GCC unroll 32
            for (int r = 0; r < R; r++) {
                const float a = x[(b + r) * I + i];
                sums[r][0] += a * one, sums[r][1] += a * two;
            }
        }
#pragma GCC unroll 32
        for (int r = 0; r < R; r++)
            for (int j = 0; j < 2; j++) {
                const vec v = sums[r][j];
                store(out + (b + r) * Np + j * W, v > 0.0f ? v : vec{});
            }
    }
    if constexpr (R > 1) dense_rows<(R > 8 ? 8 : R / 2)>(b, to, I, x, panel, bias, out, Np);
}

// Biases n to n + PANEL of a layer, zero beyond N.
struct Bias {
    vec of[VECTORS] = {};
    Bias(const Layer& l, int64_t n) {
        std::memcpy(of, l.bias + n, (l.N - n < PANEL ? l.N - n : PANEL) * sizeof(float));
    }
};

// Rows `from` to `to` of all hidden layers and of the values.
void forward(const Network& net, int64_t from, int64_t to) {
    const int64_t rows = to - from;
    for (int64_t l = 0; l < net.last(); l++) {
        const Layer layer = net.layer(l);
        float* panel = reinterpret_cast<float*>(scratch<21>(layer.I * PANEL * sizeof(float)));
        float* out = net.hidden[l] + from * layer.Np;
        if (l == 0) {
            for (int64_t n = 0; n < layer.Np; n += PANEL) {
                pack(layer, 0, layer.I, n, panel);
                const Bias bias(layer, n);
                for (int j = 0; j < VECTORS; j += 2)
                    dense_rows<ROWS>(0, rows, layer.I, net.x + from * layer.I, panel + j * W, bias.of + j,
                                     out + n + j * W, layer.Np);
            }
            continue;
        }
        Block counted{nullptr};
        take_lists(counted, rows, PART);
        Block block{scratch<22>(counted.bytes)};
        const Lists inputs = take_lists(block, rows, PART);
        const int64_t Ip = whole_panels(layer.I);
        for (int64_t first = 0; first < layer.I; first += PART) {
            const int64_t end = layer.I - first < PART ? layer.I : first + PART;
            std::memset(inputs.counts, 0, rows * sizeof(int32_t));
            for (int64_t b = 0; b < rows; b++)
                for (int64_t n = first; n < end; n += W) {
                    const vec v = load(net.hidden[l - 1] + (from + b) * Ip + n);
                    inputs.add(b, n - first, v, v > 0.0f);
                }
            for (int64_t n = 0; n < layer.Np; n += PANEL) {
                pack(layer, first, end, n, panel);
                const Bias bias(layer, n);
                for (int64_t b = 0; b < rows; b++) {
                    float* sums = out + b * layer.Np + n;
                    vec sum[VECTORS];
                    for (int j = 0; j < VECTORS; j++) sum[j] = first ? load(sums + j * W) : bias.of[j];
                    add_rows(inputs.index + b * PART, inputs.value + b * PART, inputs.counts[b], panel, sum);
                    for (int j = 0; j < VECTORS; j++)
                        store(sums + j * W, end < layer.I ? sum[j] : sum[j] > 0.0f ? sum[j] : vec{});
                }
            }
        }
    }
    const Layer layer = net.layer(net.last());
    const int64_t Ip = whole_panels(layer.I), M = layer.N;
    float* weight = reinterpret_cast<float*>(scratch<21>(M * Ip * sizeof(float)));  // by output
    std::memset(weight, 0, M * Ip * sizeof(float));
    for (int64_t k = 0; k < layer.I; k++)
        for (int64_t m = 0; m < M; m++) weight[m * Ip + k] = layer.weight[k * M + m];
    for (int64_t b = from; b < to; b++)
        for (int64_t m = 0; m < M; m++) {
            vec sum = {};
            for (int64_t k = 0; k < Ip; k += W) sum += load(net.hidden.back() + b * Ip + k) * load(weight + m * Ip + k);
            float value = layer.bias[m];
            for (int k = 0; k < W; k++) value += sum[k];
            net.values[b * M + m] = value;
        }
}

// Rows `from` to `to` of the gradients of all hidden layers' drives, from those of the values.
void backward(const Network& net, int64_t from, int64_t to) {
    for (int64_t l = net.last(); l > 0; l--) {
        const Layer layer = net.layer(l);
        const int64_t Ip = whole_panels(layer.I);
        const float* units = net.hidden[l - 1];
        const Lists& below = net.gradients[l - 1];
        float* drives = net.drives.empty() ? nullptr : net.drives[l - 1];
        const bool lists = l > 1 || !drives;
        std::memset(below.counts + from, 0, (to - from) * sizeof(int32_t));
        float* panel = reinterpret_cast<float*>(scratch<21>(layer.N * PANEL * sizeof(float)));
        for (int64_t i = 0; i < Ip; i += PANEL) {
            pack_by_output(layer, i, PANEL, panel);
            for (int64_t b = from; b < to; b++) {
                vec sum[VECTORS] = {};
                if (l == net.last()) {
                    const float* grad = net.grad + b * layer.N;
                    if (layer.N == 1 && grad[0] == 0.0f && !drives) continue;
                    for (int64_t m = 0; m < layer.N; m++)
                        for (int j = 0; j < VECTORS; j++) sum[j] += load(panel + m * PANEL + j * W) * grad[m];
                } else {
                    const Lists& above = net.gradients[l];
                    const int64_t row = b * above.Np;
                    add_rows(above.index + row, above.value + row, above.counts[b], panel, sum);
                }
                ivec active[VECTORS];
                for (int j = 0; j < VECTORS; j++) active[j] = load(units + b * Ip + i + j * W) > 0.0f;
                if (drives)
                    for (int j = 0; j < VECTORS; j++) store(drives + b * Ip + i + j * W, active[j] ? sum[j] : vec{});
                if (lists)
                    for (int j = 0; j < VECTORS; j++) below.add(b, i + j * W, sum[j], active[j]);
            }
        }
    }
}

// Gradients of a hidden layer's weights and biases, for outputs `from` to `to`, `from` being a multiple of W.
void weight_gradients(const Network& net, int64_t l, int64_t from, int64_t to, float* grad_weight, float* grad_bias) {
    const Layer layer = net.layer(l);
    const float* drives = net.drives[l];
    const int64_t B = net.B, outputs = to - from, input_step = l ? whole_panels(layer.I) : layer.I;
    const float* input = l ? net.hidden[l - 1] : net.x;
    // By output, the samples at which it has a gradient; rows are filled side by side, and an append writes whole vectors.
    const int64_t stride = padded(B) + W;
    Block counted{nullptr};
    take_lists(counted, padded(outputs), stride), counted.take<float>(B * PANEL);
    Block block{scratch<23>(counted.bytes)};
    const Lists by_output = take_lists(block, padded(outputs), stride);
    float* panel = block.take<float>(B * PANEL);
    std::memset(by_output.counts, 0, padded(outputs) * sizeof(int32_t));
    for (int64_t n = 0; n < outputs; n += W) {
        const float* own = drives + from + n;
        float square[W * W], sums[W];
        vec bias = {};
        for (int64_t b = 0; b < B; b += W) {
            const int64_t rows = B - b < W ? B - b : W;
            transpose(own + b * layer.Np, layer.Np, square, W);  // of rows beyond the last too
            for (int64_t r = 0; r < rows; r++) bias += load(own + (b + r) * layer.Np);
            for (int64_t k = 0; k < W; k++) {
                const vec v = load(square + k * W);
                by_output.add(n + k, b, v, (v != 0.0f) & (counting_from(0) < int32_t(rows)));
            }
        }
        store(sums, bias);
        std::memcpy(grad_bias + from + n, sums, (outputs - n < W ? outputs - n : W) * sizeof(float));
    }
    float rows[W * PANEL], columns[PANEL * W];
    for (int64_t i = 0; i < layer.I; i += PANEL) {
        const int64_t inputs = layer.I - i < PANEL ? layer.I - i : PANEL;
        for (int64_t b = 0; b < B; b++) {
            const float* row = input + b * input_step + i;
            if (inputs == PANEL) {
                for (int j = 0; j < VECTORS; j++) store(panel + b * PANEL + j * W, load(row + j * W));
            } else {
                std::memcpy(panel + b * PANEL, row, inputs * sizeof(float));
                std::memset(panel + b * PANEL + inputs, 0, (PANEL - inputs) * sizeof(float));
            }
        }
        for (int64_t n = 0; n < outputs; n += W) {
            const int64_t some = outputs - n < W ? outputs - n : W;
            for (int64_t k = 0; k < some; k++) {
                vec sum[VECTORS] = {};
                const int64_t row = (n + k) * stride;
                add_rows(by_output.index + row, by_output.value + row, by_output.counts[n + k], panel, sum);
                for (int j = 0; j < VECTORS; j++) store(rows + k * PANEL + j * W, sum[j]);
            }
            for (int j = 0; j < VECTORS; j++) transpose(rows + j * W, PANEL, columns + j * W * W, W);
            for (int64_t k = 0; k < inputs; k++) {
                float* place = grad_weight + (i + k) * layer.N + from + n;
                if (some == W) store(place, load(columns + k * W));
                else std::memcpy(place, columns + k * W, some * sizeof(float));
            }
        }
    }
}

// Gradients of the last layer's weights and biases.
void last_gradients(const Network& net, float* grad_weight, float* grad_bias) {
    const Layer layer = net.layer(net.last());
    const int64_t Ip = whole_panels(layer.I), M = layer.N;
    for (int64_t m = 0; m < M; m++) {
        grad_bias[m] = 0.0f;
        for (int64_t b = 0; b < net.B; b++) grad_bias[m] += net.grad[b * M + m];
        for (int64_t i = 0; i < layer.I; i += W) {
            vec sum = {};
            for (int64_t b = 0; b < net.B; b++) sum += load(net.hidden.back() + b * Ip + i) * net.grad[b * M + m];
            for (int64_t k = 0; k < W && i + k < layer.I; k++) grad_weight[(i + k) * M + m] = sum[k];
        }
    }
}

// What a thread takes at once: one network, and a share of something that counts `size`, in multiples of `unit`.
struct Job {
    int64_t network, from, to;
    Job(int64_t i, int64_t networks, int64_t size, int64_t unit, int threads) {
        const int64_t shares = count(networks, threads) / networks, units = (size + unit - 1) / unit;
        network = i / shares;
        from = units * (i % shares) / shares * unit;
        to = units * (i % shares + 1) / shares * unit;
        to = to < size ? to : size;
    }
    static int64_t count(int64_t networks, int threads) { return networks * ((threads + networks - 1) / networks); }
};

template <class F>
void share_rows(const std::vector<Network>& nets, int threads, F work) {
    const int64_t jobs = Job::count(int64_t(nets.size()), threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < jobs; i++) {
        const Job job(i, int64_t(nets.size()), nets[0].B, 1, threads);
        work(nets[job.network], job.from, job.to);
    }
}

// Gradients of all weights and biases, from those of the drives and of the outputs.
void parameter_gradients(const std::vector<Network>& nets, float* const* grad_weights, float* const* grad_biases,
                         int threads) {
    const Critic& critic = *nets[0].critic;
    const int64_t jobs = Job::count(int64_t(nets.size()), threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < jobs; i++)
        for (int64_t l = 0; l < critic.layers; l++) {
            const bool last = l == critic.layers - 1;  // it has few outputs, which one thread takes
            const Job job(i, int64_t(nets.size()), last ? 1 : critic.widths[l + 1], W, threads);
            const Network& net = nets[job.network];
            const Layer layer = net.layer(l);
            float* grad_weight = grad_weights[l] + net.c * layer.I * layer.N;
            float* grad_bias = grad_biases[l] + net.c * layer.N;
            if (job.from == job.to) continue;
            if (last) last_gradients(net, grad_weight, grad_bias);
            else weight_gradients(net, l, job.from, job.to, grad_weight, grad_bias);
        }
}

}  // namespace

extern "C" {

// Values (C, B) of observations (B, O) and actions (B, A).
void spikerl_values(const Critic* critic, int64_t B, const float* obs, const float* act, float* values, int threads) {
    const auto nets = start(*critic, B, obs, act, NOTHING);
    share_rows(nets, threads, forward);
    for (const Network& net : nets) std::memcpy(values + net.c * B, net.values, B * sizeof(float));
}

// `weight` times the networks' mean squared errors, summed: `loss`, and its gradients; the mean of all values.
void spikerl_regress(const Critic* critic, int64_t B, const float* obs, const float* act, const float* target,
                     float weight, float* const* grad_weights, float* const* grad_biases, float* loss, float* mean,
                     int threads) {
    const auto nets = start(*critic, B, obs, act, PARAMETERS);
    share_rows(nets, threads, [&](const Network& net, int64_t from, int64_t to) {
        forward(net, from, to);
        for (int64_t b = from; b < to; b++) net.grad[b] = 2.0f * weight * (net.values[b] - target[b]) / float(B);
        backward(net, from, to);
    });
    parameter_gradients(nets, grad_weights, grad_biases, threads);
    double squares = 0.0, sum = 0.0;
    for (const Network& net : nets)
        for (int64_t b = 0; b < B; b++) {
            const double error = double(net.values[b]) - double(target[b]);
            squares += error * error, sum += net.values[b];
        }
    *loss = float(squares * weight / double(B));
    *mean = float(sum / double(B * critic->networks));
}

// The mean over samples of the least of the networks' values, and `weight` times its gradient by the actions (B, A).
float spikerl_value_gradient(const Critic* critic, int64_t B, const float* obs, const float* act, float weight,
                             float* grad_act, int threads) {
    const auto nets = start(*critic, B, obs, act, INPUTS);
    share_rows(nets, threads, forward);
    double sum = 0.0;
    for (int64_t b = 0; b < B; b++) {
        const Network* least = &nets[0];
        for (const Network& net : nets) {
            net.grad[b] = 0.0f;
            if (net.values[b] < least->values[b]) least = &net;
        }
        least->grad[b] = weight / float(B);
        sum += least->values[b];
    }
    share_rows(nets, threads, backward);
    const int64_t O = critic->obs_dim, A = critic->act_dim;
    std::memset(grad_act, 0, B * A * sizeof(float));
    for (const Network& net : nets) {
        const Layer layer = net.layer(0);
        const Lists& lists = net.gradients[0];
        float* panel = reinterpret_cast<float*>(scratch<21>(layer.N * W * sizeof(float)));
        for (int64_t a = 0; a < A; a += W) {
            pack_by_output(layer, O + a, W, panel);
            for (int64_t b = 0; b < B; b++) {
                vec total[1] = {};
                add_rows(lists.index + b * lists.Np, lists.value + b * lists.Np, lists.counts[b], panel, total);
                for (int64_t k = 0; k < W && a + k < A; k++) grad_act[b * A + a + k] += total[0][k];
            }
        }
    }
    return float(sum / double(B));
}

// Actions (B, M) of observations (B, O) from one network: tanh of its outputs.
void spikerl_dense_actions(const Critic* critic, int64_t B, const float* obs, float* act, int threads) {
    const auto nets = start(*critic, B, obs, nullptr, NOTHING);
    share_rows(nets, threads, forward);
    for (int64_t i = 0; i < B * nets[0].outputs(); i++) act[i] = std::tanh(nets[0].values[i]);
}

// `weight` times the mean squared error of those actions from `goal` (B, M): `loss`, and its gradients.
void spikerl_imitate(const Critic* critic, int64_t B, const float* obs, const float* goal, float weight,
                     float* const* grad_weights, float* const* grad_biases, float* loss, int threads) {
    const auto nets = start(*critic, B, obs, nullptr, PARAMETERS);
    const int64_t M = nets[0].outputs();
    share_rows(nets, threads, [&](const Network& net, int64_t from, int64_t to) {
        forward(net, from, to);
        for (int64_t i = from * M; i < to * M; i++) {
            const float act = net.values[i] = std::tanh(net.values[i]);
            net.grad[i] = 2.0f * weight * (act - goal[i]) * (1.0f - act * act) / float(B * M);
        }
        backward(net, from, to);
    });
    parameter_gradients(nets, grad_weights, grad_biases, threads);
    double squares = 0.0;
    for (int64_t i = 0; i < B * M; i++) {
        const double error = double(nets[0].values[i]) - double(goal[i]);
        squares += error * error;
    }
    *loss = float(squares * weight / double(B * M));
}
}

// A hidden unit that is 0 adds nothing to the next layer and has no gradient. Each sample lists its units that are not
// 0; all products but the first layer's are formed over these lists, as those of a spiking layer are over its events.

#pragma once
#include "critics.h"

namespace {
namespace by_lists {

constexpr int64_t ROW_MULTIPLE = 1;     // threads share rows in multiples of this
constexpr int64_t PART = 128;           // rows of a panel that fit the first-level cache
constexpr int ROWS = W == 16 ? 14 : 6;  // of a dense product at once: with two vectors each, most of the registers

// Columns n to n + PANEL of a layer's weights, for inputs `from` to `to`, (to - from, PANEL), zero beyond N.
void pack(const Layer& l, int64_t from, int64_t to, int64_t n, float* panel) {
    for (int64_t i = from; i < to; i++, panel += PANEL) copy_padded(l.weight + i * l.N + n, l.N - n, PANEL, panel);
}

// sum += value[i] * panel[index[i]] over a list.
template <int V>
inline void add_rows(const int32_t* index, const float* value, int64_t count, const float* panel, vec (&sum)[V]) {
    constexpr int U = V > 2 ? 2 : 4 / V;  // sums at once, because consecutive additions to one wait for each other
    vec other[U][V] = {};
    int64_t i = 0;
    for (; i + U <= count; i += U)
        for (int u = 0; u < U; u++)
            for (int j = 0; j < V; j++) other[u][j] += load(panel + index[i + u] * V * W + j * W) * value[i + u];
    for (; i < count; i++)
        for (int j = 0; j < V; j++) sum[j] += load(panel + index[i] * V * W + j * W) * value[i];
    for (int u = 0; u < U; u++)
        for (int j = 0; j < V; j++) sum[j] += other[u][j];
}

// Rows b to `to` of ReLU(x W + b), R at a time, for two vectors of a panel's columns.
template <int R>
void dense_rows(int64_t b, int64_t to, int64_t I, const float* x, const float* panel, const vec* bias, float* out,
                int64_t Np) {
    for (; to - b >= R; b += R) {
        vec sums[R][2];
#pragma GCC unroll 32
        for (int r = 0; r < R; r++) sums[r][0] = bias[0], sums[r][1] = bias[1];
        for (int64_t i = 0; i < I; i++) {
            const vec first = load(panel + i * PANEL), second = load(panel + i * PANEL + W);
#pragma GCC unroll 32
            for (int r = 0; r < R; r++) {
                const float a = x[(b + r) * I + i];
                sums[r][0] += a * first, sums[r][1] += a * second;
            }
        }
#pragma GCC unroll 32
        for (int r = 0; r < R; r++)
            for (int j = 0; j < 2; j++) store(out + (b + r) * Np + j * W, relu(sums[r][j]));
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
        Scratch memory;
        // Has rows for whole vectors of inputs: a list includes inputs beyond the last one if the padding is NaN.
        float* panel = memory.array<float>(padded(layer.I) * PANEL);
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
        const Lists inputs = Lists::allocate(memory, rows, PART);
        const int64_t Ip = whole_panels(layer.I);
        for (int64_t first = 0; first < layer.I; first += PART) {
            const int64_t end = std::min(layer.I, first + PART);
            std::memset(inputs.counts, 0, rows * sizeof(int32_t));
            for (int64_t b = 0; b < rows; b++)
                for (int64_t n = first; n < end; n += W) {
                    const vec v = load(net.hidden[l - 1] + (from + b) * Ip + n);
                    inputs.add(b, n - first, v, ~(v <= 0.0f));
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
                        store(sums + j * W, end < layer.I ? sum[j] : relu(sum[j]));
                }
            }
        }
    }
    last_forward(net, from, to);
}

// Rows `from` to `to` of the gradients before all ReLUs, from those of the values.
void backward(const Network& net, int64_t from, int64_t to) {
    for (int64_t l = net.last(); l > 0; l--) {
        const Layer layer = net.layer(l);
        const int64_t Ip = whole_panels(layer.I);
        const float* units = net.hidden[l - 1];
        const Lists& below = net.grad_hidden_lists[l - 1];
        float* grads = net.grad_hidden.empty() ? nullptr : net.grad_hidden[l - 1];
        const bool lists = l > 1 || !grads;
        std::memset(below.counts + from, 0, (to - from) * sizeof(int32_t));
        Scratch memory;
        float* panel = memory.array<float>(layer.N * PANEL);
        for (int64_t i = 0; i < Ip; i += PANEL) {
            transpose_padded(layer.weight + i * layer.N, layer.I - i, layer.N, PANEL, panel);
            for (int64_t b = from; b < to; b++) {
                vec sum[VECTORS] = {};
                if (l == net.last()) {
                    const float* grad = net.grad + b * layer.N;
                    if (layer.N == 1 && grad[0] == 0.0f && !grads) continue;
                    for (int64_t m = 0; m < layer.N; m++)
                        for (int j = 0; j < VECTORS; j++) sum[j] += load(panel + m * PANEL + j * W) * grad[m];
                } else {
                    const Lists& above = net.grad_hidden_lists[l];
                    const int64_t row = b * above.Np;
                    add_rows(above.index + row, above.value + row, above.counts[b], panel, sum);
                }
                ivec active[VECTORS];
                for (int j = 0; j < VECTORS; j++) active[j] = load(units + b * Ip + i + j * W) > 0.0f;
                if (grads)
                    for (int j = 0; j < VECTORS; j++) store(grads + b * Ip + i + j * W, active[j] ? sum[j] : vec{});
                if (lists)
                    for (int j = 0; j < VECTORS; j++) below.add(b, i + j * W, sum[j], active[j]);
            }
        }
    }
}

// Gradients of a hidden layer's weights and biases, for outputs `from` to `to`, `from` being a multiple of W.
void weight_gradients(const Network& net, int64_t l, int64_t from, int64_t to, float* grad_weight, float* grad_bias) {
    const Layer layer = net.layer(l);
    const float* input = net.input(l);
    const int64_t B = net.B, outputs = to - from, input_stride = net.input_stride(l);
    // For each output, the samples that have a gradient. The stride has W entries more, as appends write whole vectors.
    const int64_t stride = padded(B) + W;
    Scratch memory;
    const Lists by_output = Lists::allocate(memory, padded(outputs), stride);
    float* panel = memory.array<float>(B * PANEL);
    std::memset(by_output.counts, 0, padded(outputs) * sizeof(int32_t));
    for (int64_t n = 0; n < outputs; n += W) {
        const float* own = net.grad_hidden[l] + from + n;
        float square[W * W], sums[W];
        vec bias = {};
        for (int64_t b = 0; b < B; b += W) {
            const int64_t rows = std::min<int64_t>(W, B - b);
            transpose(own + b * layer.Np, layer.Np, square, W);  // includes rows beyond the last
            for (int64_t r = 0; r < rows; r++) bias += load(own + (b + r) * layer.Np);
            for (int64_t k = 0; k < W; k++) {
                const vec v = load(square + k * W);
                by_output.add(n + k, b, v, (v != 0.0f) & (iota(0) < int32_t(rows)));
            }
        }
        store(sums, bias);
        std::memcpy(grad_bias + from + n, sums, std::min<int64_t>(W, outputs - n) * sizeof(float));
    }
    float rows[W * PANEL], columns[PANEL * W];
    for (int64_t i = 0; i < layer.I; i += PANEL) {
        const int64_t inputs = std::min(PANEL, layer.I - i);
        for (int64_t b = 0; b < B; b++)
            copy_padded(input + b * input_stride + i, layer.I - i, PANEL, panel + b * PANEL);
        for (int64_t n = 0; n < outputs; n += W) {
            const int64_t count = std::min<int64_t>(W, outputs - n);
            for (int64_t k = 0; k < count; k++) {
                vec sum[VECTORS] = {};
                const int64_t row = (n + k) * stride;
                add_rows(by_output.index + row, by_output.value + row, by_output.counts[n + k], panel, sum);
                for (int j = 0; j < VECTORS; j++) store(rows + k * PANEL + j * W, sum[j]);
            }
            for (int j = 0; j < VECTORS; j++) transpose(rows + j * W, PANEL, columns + j * W * W, W);
            for (int64_t k = 0; k < inputs; k++) {
                float* out = grad_weight + (i + k) * layer.N + from + n;
                if (count == W) store(out, load(columns + k * W));
                else std::memcpy(out, columns + k * W, count * sizeof(float));
            }
        }
    }
}

// grad_act (B, A) += this network's gradient of the actions.
void add_action_gradients(const Network& net, float* grad_act) {
    const int64_t O = net.critic->obs_dim, A = net.critic->act_dim;
    const Layer layer = net.layer(0);
    const Lists& lists = net.grad_hidden_lists[0];
    Scratch memory;
    float* panel = memory.array<float>(layer.N * W);
    for (int64_t a = 0; a < A; a += W) {
        transpose_padded(layer.weight + (O + a) * layer.N, A - a, layer.N, W, panel);
        for (int64_t b = 0; b < net.B; b++) {
            vec sum[1] = {};
            add_rows(lists.index + b * lists.Np, lists.value + b * lists.Np, lists.counts[b], panel, sum);
            for (int64_t k = 0; k < W && a + k < A; k++) grad_act[b * A + a + k] += sum[0][k];
        }
    }
}

}  // namespace by_lists
}  // namespace

// Several ReLU networks of one shape side by side, forward and backward: the critics.
//
// Products are blocked in registers and read their operands where they lie; bias, ReLU and the ReLU's mask are
// applied while a block of the result is still in registers. A sum is formed in one order by one thread.
//
// Shapes   C networks, B samples, I inputs and N outputs of a layer. Weights are (C, I, N).

#include "vectors.h"

namespace {

// What becomes of a result: + bias (N), at most `relu`; or 0 where `mask` (M, N) is not above 0.
struct Finish {
    const float* bias;
    bool relu;
    const float* mask;
};

// a[m, k] lies at m row + k step.
struct Left {
    const float* at;
    int64_t row, step;
};

inline vec part(const float* p, int64_t lanes) {
    if (lanes == W) return load(p);
    vec v = {};
    std::memcpy(&v, p, lanes * sizeof(float));
    return v;
}

// out[m, n] = sum over k of a[m, k] b[k, n] for R rows and V vectors, of the last of which `lanes` count. Rows of b
// lie `b_step` apart, those of out and mask N.
template <int R, int V>
void block(int64_t K, Left a, const float* b, int64_t b_step, int64_t N, float* out, int64_t lanes, Finish finish) {
    vec sums[R][V];
#pragma GCC unroll 32
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int j = 0; j < V; j++) sums[r][j] = vec{};
    for (int64_t k = 0; k < K; k++) {
        vec row[V];
#pragma GCC unroll 4
        for (int j = 0; j < V; j++) row[j] = V > 1 ? load(b + k * b_step + j * W) : part(b + k * b_step, lanes);
#pragma GCC unroll 32
        for (int r = 0; r < R; r++)
#pragma GCC unroll 4
            for (int j = 0; j < V; j++) sums[r][j] += a.at[r * a.row + k * a.step] * row[j];
    }
#pragma GCC unroll 32
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int j = 0; j < V; j++) {
            vec v = sums[r][j];
            if (finish.bias) v += part(finish.bias + j * W, lanes);
            if (finish.relu) v = v > 0.0f ? v : vec{};
            if (finish.mask) v = part(finish.mask + r * N + j * W, lanes) > 0.0f ? v : vec{};
            if (lanes == W) store(out + r * N + j * W, v);
            else std::memcpy(out + r * N + j * W, &v, lanes * sizeof(float));
        }
}

// Rows `m` to `to` of V vectors of columns, in blocks of R rows, and the rest in smaller ones.
template <int R, int V>
void column(int64_t m, int64_t to, int64_t K, Left a, const float* b, int64_t b_step, int64_t N, float* out,
            int64_t lanes, Finish finish) {
    for (; to - m >= R; m += R) {
        Finish own = finish;
        if (own.mask) own.mask += m * N;
        block<R, V>(K, {a.at + m * a.row, a.row, a.step}, b, b_step, N, out + m * N, lanes, own);
    }
    if constexpr (R > 1) column<(R > 8 ? 8 : R / 2), V>(m, to, K, a, b, b_step, N, out, lanes, finish);
}

// Rows `from` to `to` of out (M, N) = a (M, K) b (K, N).
void product(int64_t from, int64_t to, int64_t N, int64_t K, Left a, const float* b, float* out, Finish finish) {
    constexpr int R = W == 16 ? 14 : 6;  // with two vectors, most of the registers
    constexpr int64_t PANEL = 2 * W;
    if (N == 1 && a.step == 1 && !finish.mask) {
        for (int64_t m = from; m < to; m++) {
            const float* row = a.at + m * a.row;
            vec sum = {};
            int64_t k = 0;
            for (; K - k >= W; k += W) sum += load(row + k) * load(b + k);
            float total = finish.bias ? *finish.bias : 0.0f;
            for (int i = 0; i < W; i++) total += sum[i];
            for (; k < K; k++) total += row[k] * b[k];
            out[m] = finish.relu && total < 0.0f ? 0.0f : total;
        }
        return;
    }
    float* panel = reinterpret_cast<float*>(scratch<21>(K * PANEL * sizeof(float)));
    for (int64_t n = 0; n < N;) {
        const int64_t left = N - n, width = left >= PANEL ? PANEL : left < W ? left : W;
        Finish own{finish.bias ? finish.bias + n : nullptr, finish.relu, finish.mask ? finish.mask + n : nullptr};
        if (width == PANEL && to - from > R) {  // columns that are read again lie better side by side
            for (int64_t k = 0; k < K; k++)
                for (int j = 0; j < 2; j++) store(panel + k * PANEL + j * W, load(b + k * N + n + j * W));
            column<R, 2>(from, to, K, a, panel, PANEL, N, out + n, W, own);
        } else if (width == PANEL) {
            column<R, 2>(from, to, K, a, b + n, N, N, out + n, W, own);
        } else {
            column<R, 1>(from, to, K, a, b + n, N, N, out + n, width, own);
        }
        n += width;
    }
}

// One network's rows that a thread takes at once.
struct Job {
    int64_t c, from, to;
    Job(int64_t i, int64_t networks, int64_t rows, int threads) {
        const int64_t shares = count(networks, threads) / networks;
        c = i / shares;
        from = rows * (i % shares) / shares, to = rows * (i % shares + 1) / shares;
    }
    static int64_t count(int64_t networks, int threads) { return networks * ((threads + networks - 1) / networks); }
};

}  // namespace

extern "C" {

// `values[l]` (C, B, N) for each layer, ReLU after all but the last, from `x` (B, I).
void spikerl_mlp_forward(int64_t C, int64_t layers, const int32_t* widths, int64_t B, const float* x,
                         const float* const* weights, const float* const* biases, float* const* values,
                         int threads) {
    const int64_t jobs = Job::count(C, threads);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < jobs; i++) {
        const Job job(i, C, B, threads);
        for (int64_t l = 0; l < layers; l++) {
            const int64_t I = widths[l], N = widths[l + 1];
            const float* in = l ? values[l - 1] + job.c * B * I : x;
            product(job.from, job.to, N, I, {in, I, 1}, weights[l] + job.c * I * N, values[l] + job.c * B * N,
                    {biases[l] + job.c * N, l < layers - 1, nullptr});
        }
    }
}

// From `grad` (C, B, N), the gradient of the last layer's values: that of `x` for each network, (C, B, I), where
// `grad_x` is not null, and those of the parameters, where `grad_weights` is not.
void spikerl_mlp_backward(int64_t C, int64_t layers, const int32_t* widths, int64_t B, const float* x,
                          const float* const* weights, const float* const* values, const float* grad,
                          float* grad_x, float* const* grad_weights,
                          float* const* grad_biases, int threads) {
    const int64_t jobs = Job::count(C, threads);
    int64_t widest = 0;
    for (int64_t l = 1; l < layers; l++) widest = widths[l] > widest ? widths[l] : widest;
    // Gradients of the values of two neighbouring layers, by turns.
    float* memory = reinterpret_cast<float*>(scratch<22>(2 * C * B * widest * sizeof(float)));
    const float* g = grad;
    for (int64_t l = layers - 1; l >= 0; l--) {
        const int64_t I = widths[l], N = widths[l + 1];
        float* below = l ? memory + l % 2 * C * B * widest : grad_x;
        const bool goes_on = l > 0 || grad_x;
        float* by_output = reinterpret_cast<float*>(scratch<20>(goes_on ? C * I * N * sizeof(float) : 0));
        for (int64_t c = 0; goes_on && c < C; c++)
            transpose(weights[l] + c * I * N, N, I, N, by_output + c * I * N, I);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
        for (int64_t i = 0; i < jobs; i++) {
            if (grad_weights) {
                const Job job(i, C, I, threads);
                const float* in = l ? values[l - 1] + job.c * B * I : x;
                if (N > 1)
                    product(job.from, job.to, N, B, {in, 1, I}, g + job.c * B * N, grad_weights[l] + job.c * I * N,
                            {nullptr, false, nullptr});
                else if (job.from == 0)
                    product(0, 1, I, B, {g + job.c * B, 0, 1}, in, grad_weights[l] + job.c * I,
                            {nullptr, false, nullptr});
                float* bias = grad_biases[l] + job.c * N;
                if (job.from == 0) std::memset(bias, 0, N * sizeof(float));
                for (int64_t b = 0; job.from == 0 && b < B; b++)
                    for (int64_t n = 0; n < N; n++) bias[n] += g[(job.c * B + b) * N + n];
            }
            if (goes_on) {
                const Job job(i, C, B, threads);
                product(job.from, job.to, I, N, {g + job.c * B * N, N, 1}, by_output + job.c * I * N,
                        below + job.c * B * I, {nullptr, false, l ? values[l - 1] + job.c * B * I : nullptr});
            }
        }
        g = below;
    }
}
}

// Batch normalisation of drives: operations on every row of x (R, N), and sums over the rows.

#include "memory.h"
#include "vectors.h"

extern "C" {

// sums (2, N): the sums over rows of x and of its squares.
void spikerl_row_sums(int64_t R, int64_t N, const float* x, double* sums) {
    double *sum = sums, *square = sums + N;
    std::memset(sums, 0, 2 * N * sizeof(double));
    for (int64_t r = 0; r < R; r++, x += N)
#pragma GCC ivdep
        for (int64_t n = 0; n < N; n++) {
            const double v = x[n];
            sum[n] += v;
            square[n] += v * v;
        }
}

// y = (x - mean) factor + beta
void spikerl_row_affine(int64_t R, int64_t N, const float* x, const float* mean, const float* factor, const float* beta,
                        float* y) {
    for (int64_t r = 0; r < R; r++, x += N, y += N)
#pragma GCC ivdep
        for (int64_t n = 0; n < N; n++) y[n] = (x[n] - mean[n]) * factor[n] + beta[n];
}

// z = (x - mean) inverse;  y = z gamma + beta
void spikerl_row_normalise(int64_t R, int64_t N, const float* x, const float* mean, const float* inverse,
                           const float* gamma, const float* beta, float* z, float* y) {
    for (int64_t r = 0; r < R; r++, x += N, y += N, z += N)
#pragma GCC ivdep
        for (int64_t n = 0; n < N; n++) {
            z[n] = (x[n] - mean[n]) * inverse[n];
            y[n] = z[n] * gamma[n] + beta[n];
        }
}

// sums (2, N): the sums over rows of g and of g z.
void spikerl_row_gradient_sums(int64_t R, int64_t N, const float* g, const float* z, float* sums) {
    Scratch memory;
    double *sum = memory.array<double>(2 * N), *product = sum + N;
    std::memset(sum, 0, 2 * N * sizeof(double));
    for (int64_t r = 0; r < R; r++, g += N, z += N)
#pragma GCC ivdep
        for (int64_t n = 0; n < N; n++) {
            sum[n] += g[n];
            product[n] += double(g[n]) * z[n];
        }
    for (int64_t n = 0; n < 2 * N; n++) sums[n] = float(sum[n]);
}

// out = factor (g - mean_g - z mean_gz), the means (2, N)
void spikerl_row_gradient(int64_t R, int64_t N, const float* g, const float* z, const float* factor, const float* means,
                          float* out) {
    for (int64_t r = 0; r < R; r++, g += N, z += N, out += N)
#pragma GCC ivdep
        for (int64_t n = 0; n < N; n++) out[n] = factor[n] * (g[n] - means[n] - z[n] * means[N + n]);
}
}

// Vectors as wide as the registers of the target instruction set.

#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;  // floats of a vector
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vec __attribute__((vector_size(W * 4)));
typedef int32_t ivec __attribute__((vector_size(W * 4)));
typedef float unaligned_vec __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t unaligned_ivec __attribute__((vector_size(W * 4), aligned(4), may_alias));

inline vec load(const float* p) { return *reinterpret_cast<const unaligned_vec*>(p); }
inline void store(float* p, vec v) { *reinterpret_cast<unaligned_vec*>(p) = v; }
inline ivec load(const int32_t* p) { return *reinterpret_cast<const unaligned_ivec*>(p); }
inline void store(int32_t* p, ivec v) { *reinterpret_cast<unaligned_ivec*>(p) = v; }
inline vec broadcast(float x) { return x - vec{}; }

inline ivec iota(int32_t first) {
    ivec lanes;
    for (int i = 0; i < W; i++) lanes[i] = first + i;
    return lanes;
}

inline float clip(float x, float low, float high) { return x < low ? low : x > high ? high : x; }  // NaN stays
inline vec relu(vec v) { return v <= 0.0f ? vec{} : v; }  // NaN stays

// exp(x) for x <= 0, within 2 units in the last place; 0 below -87.
inline vec exp_of(vec x) {
    vec scaled = x * 1.44269504088896341f - 0.5f;
    ivec n = __builtin_convertvector(scaled > -127.0f ? scaled : broadcast(-127.0f), ivec);
    vec exponent = __builtin_convertvector(n, vec);
    vec r = x - exponent * 0.693359375f + exponent * 2.12194440e-4f;
    vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    vec power = reinterpret_cast<vec>((n + 127) << 23);
    return x < -87.0f ? vec{} : p * power;
}

constexpr int64_t padded(int64_t n) { return (n + W - 1) / W * W; }

// One bit for each lane of a comparison's result.
inline uint32_t lane_bits(ivec mask) {
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

#if defined(__AVX2__) && !defined(__AVX512F__)
// For every mask of 8 lanes, the numbers of the lanes that it selects, a byte each, from the lowest byte on.
struct SelectedLanes {
    uint64_t of[256];
    constexpr SelectedLanes() : of() {
        for (uint64_t bits = 0; bits < 256; bits++)
            for (uint64_t lane = 0, count = 0; lane < 8; lane++)
                if (bits >> lane & 1) of[bits] |= lane << 8 * count++;
    }
};
alignas(64) constexpr SelectedLanes SELECTED_LANES;
#endif

// Appends the lanes of `values` that `mask` selects to `list` and returns how many. May write a whole vector.
inline int append(int32_t* list, ivec values, ivec mask) {
    const uint32_t bits = lane_bits(mask);
#if defined(__AVX512F__)
    const __m512i selected = _mm512_maskz_compress_epi32(__mmask16(bits), reinterpret_cast<__m512i>(values));
    store(list, reinterpret_cast<ivec>(selected));
    return __builtin_popcount(bits);
#elif defined(__AVX2__)
    const __m128i lanes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(SELECTED_LANES.of + bits));
    const __m256i all = reinterpret_cast<__m256i>(values);
    store(list, reinterpret_cast<ivec>(_mm256_permutevar8x32_epi32(all, _mm256_cvtepu8_epi32(lanes))));
    return __builtin_popcount(bits);
#else
    typedef int32_t anything __attribute__((may_alias));  // `list` may hold floats
    anything* to = list;
    int count = 0;
    for (uint32_t rest = bits; rest; rest &= rest - 1) to[count++] = values[__builtin_ctz(rest)];
    return count;
#endif
}

#if defined(__AVX512F__)
#define INTERLEAVE_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define INTERLEAVE_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
#define INTERLEAVE_LOW 0, 8, 1, 9, 2, 10, 3, 11
#define INTERLEAVE_HIGH 4, 12, 5, 13, 6, 14, 7, 15
#else
#define INTERLEAVE_LOW 0, 4, 1, 5
#define INTERLEAVE_HIGH 2, 6, 3, 7
#endif

// to (W, W) = the transpose of from (W, W): the first half of the rows is interleaved with the last, log2(W) times.
inline void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
    vec a[W], b[W];
    for (int r = 0; r < W; r++) a[r] = load(from + r * from_stride);
    for (int width = 1; width < W; width *= 2) {
        for (int r = 0; r < W / 2; r++) {
            b[2 * r] = __builtin_shufflevector(a[r], a[r + W / 2], INTERLEAVE_LOW);
            b[2 * r + 1] = __builtin_shufflevector(a[r], a[r + W / 2], INTERLEAVE_HIGH);
        }
        for (int r = 0; r < W; r++) a[r] = b[r];
    }
    for (int r = 0; r < W; r++) store(to + r * to_stride, a[r]);
}

// to (N, I) = the transpose of from (I, N).
inline void transpose(const float* from, int64_t from_stride, int64_t I, int64_t N, float* to, int64_t to_stride) {
    const int64_t rows = I / W * W, columns = N / W * W;
    for (int64_t i = 0; i < rows; i += W)
        for (int64_t n = 0; n < columns; n += W)
            transpose(from + i * from_stride + n, from_stride, to + n * to_stride + i, to_stride);
    for (int64_t i = 0; i < I; i++)
        for (int64_t n = i < rows ? columns : 0; n < N; n++) to[n * to_stride + i] = from[i * from_stride + n];
}

// to (N, width) = the transpose of up to `width` rows of from (I, N), zero beyond I.
inline void transpose_padded(const float* from, int64_t I, int64_t N, int64_t width, float* to) {
    if (I < width) std::memset(to, 0, N * width * sizeof(float));
    transpose(from, N, std::min(I, width), N, to, width);
}

// to (width), a multiple of W = up to `width` of from (count), zero beyond `count`.
inline void copy_padded(const float* from, int64_t count, int64_t width, float* to) {
    if (count >= width) {  // faster than a call of memcpy
        for (int64_t i = 0; i < width; i += W) store(to + i, load(from + i));
    } else {
        std::memcpy(to, from, count * sizeof(float));
        std::memset(to + count, 0, (width - count) * sizeof(float));
    }
}

}  // namespace

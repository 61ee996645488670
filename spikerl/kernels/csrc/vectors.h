// Vectors of as many floats as a register of the instruction set has that this is compiled for.

#pragma once
#include <cstdint>
#include <cstring>
#include <vector>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX2__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vec __attribute__((vector_size(W * 4)));
typedef int32_t ivec __attribute__((vector_size(W * 4)));
typedef float loose_vec __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t loose_ivec __attribute__((vector_size(W * 4), aligned(4), may_alias));

inline vec load(const float* p) { return *reinterpret_cast<const loose_vec*>(p); }
inline void store(float* p, vec v) { *reinterpret_cast<loose_vec*>(p) = v; }
inline ivec load(const int32_t* p) { return *reinterpret_cast<const loose_ivec*>(p); }
inline void store(int32_t* p, ivec v) { *reinterpret_cast<loose_ivec*>(p) = v; }
inline vec all(float x) { return x - vec{}; }

constexpr int64_t padded(int64_t n) { return (n + W - 1) / W * W; }

// Memory of the calling thread; the contents are whatever they were.
template <int USE>
char* scratch(int64_t bytes) {
    thread_local std::vector<char> memory;
    if (int64_t(memory.size()) < bytes + 64) memory.resize(bytes + 64);
    return memory.data() + 64 - reinterpret_cast<uintptr_t>(memory.data()) % 64;
}

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

#if defined(__AVX512F__)
#define FIRST_HALVES 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define LAST_HALVES 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif defined(__AVX2__)
#define FIRST_HALVES 0, 8, 1, 9, 2, 10, 3, 11
#define LAST_HALVES 4, 12, 5, 13, 6, 14, 7, 15
#else
#define FIRST_HALVES 0, 4, 1, 5
#define LAST_HALVES 2, 6, 3, 7
#endif

// W rows become W columns: interleaving the first half of the rows with the last, log2(W) times.
inline void transpose(const float* from, int64_t from_step, float* to, int64_t to_step) {
    vec a[W], b[W];
    for (int r = 0; r < W; r++) a[r] = load(from + r * from_step);
    for (int width = 1; width < W; width *= 2) {
        for (int r = 0; r < W / 2; r++) {
            b[2 * r] = __builtin_shufflevector(a[r], a[r + W / 2], FIRST_HALVES);
            b[2 * r + 1] = __builtin_shufflevector(a[r], a[r + W / 2], LAST_HALVES);
        }
        for (int r = 0; r < W; r++) a[r] = b[r];
    }
    for (int r = 0; r < W; r++) store(to + r * to_step, a[r]);
}

// to[n, i] = from[i, n] for I rows and N columns.
inline void transpose(const float* from, int64_t from_step, int64_t I, int64_t N, float* to, int64_t to_step) {
    const int64_t rows = I / W * W, columns = N / W * W;
    for (int64_t i = 0; i < rows; i += W)
        for (int64_t n = 0; n < columns; n += W)
            transpose(from + i * from_step + n, from_step, to + n * to_step + i, to_step);
    for (int64_t i = 0; i < I; i++)
        for (int64_t n = i < rows ? columns : 0; n < N; n++) to[n * to_step + i] = from[i * from_step + n];
}

}  // namespace

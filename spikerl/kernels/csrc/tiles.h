// Matrix products on AMX: tiles of 16 x 32 bf16 numbers, sums in float32.
//
// A float32 number is the sum of three bf16 numbers, its planes: the number rounded to 8 bits, the remainder rounded to
// 8 bits, and the last 8 bits. A spike is exactly a bf16 number. Spikes times float32 weights thus take 3 tile
// products, which are exact, and two float32 matrices take 6: the terms left out are below 2^-25 of each product, as
// the second and third planes are below 2^-9 and 2^-18 of a number. With one plane, rounded to nearest, the product is
// one of bf16 matrices.
//
// A left operand is stored as tiles of 16 rows and 32 columns, (row tiles, depth blocks, planes, 16, 32), a right one
// as pairs of neighbouring rows, (column tiles, depth blocks, planes, 16, 16, 2); both are zero beyond the matrix.

#pragma once
#include "memory.h"
#include "vectors.h"

#if defined(__AMX_BF16__)
#define HAS_TILES 1

namespace {

constexpr int64_t SIDE = 16;   // rows of a tile, and columns of a result
constexpr int64_t DEPTH = 32;  // numbers that one tile product sums over
constexpr int64_t SIZE = SIDE * DEPTH;
constexpr int PLANES = 3;  // of a float32 number

typedef uint16_t bf16;

constexpr int64_t tiles_of(int64_t n) { return (n + SIDE - 1) / SIDE; }
constexpr int64_t blocks_of(int64_t n) { return (n + DEPTH - 1) / DEPTH; }

// While it lives, the calling thread's tile registers have 16 rows of 64 bytes.
struct TileRegisters {
    struct Config {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    TileRegisters() {
        // constexpr, because GCC assumes that the instruction reads 8 bytes and may drop stores of the others.
        alignas(64) static constexpr Config config{};
        _tile_loadconfig(&config);
    }
    ~TileRegisters() { _tile_release(); }
    TileRegisters(const TileRegisters&) = delete;
};

// A packed operand of P planes. The stride between tiles is an odd number of blocks, because tiles an even number apart
// would map to the same sets of a cache.
template <int P>
struct Operand {
    bf16* data;
    int64_t blocks;
    int64_t stride() const { return (blocks | 1) * P * SIZE; }
    bf16* tile(int64_t i, int64_t block = 0) const { return data + i * stride() + block * P * SIZE; }
    static Operand allocate(Scratch& memory, int64_t tiles, int64_t blocks) {
        return {memory.array<bf16>(tiles * (blocks | 1) * P * SIZE), blocks};
    }
};

// The planes of 16 numbers, each in the upper half of its lane.
template <int P>
inline void split(__m512 x, __m512i (&planes)[P]) {
    if constexpr (P == 1) {
        const __m256i rounded = reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x));
        planes[0] = _mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16);
    } else {
        const __m512i upper = _mm512_set1_epi32(int(0xffff0000)), half = _mm512_set1_epi32(0x8000);
        for (int p = 0; p < P; p++) {
            planes[p] = _mm512_and_si512(_mm512_add_epi32(_mm512_castps_si512(x), half), upper);
            x = _mm512_sub_ps(x, _mm512_castsi512_ps(planes[p]));
        }
    }
}

// The first n lanes.
inline __mmask16 lane_mask(int64_t n) { return n >= W ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

// Packs planes of two vectors into 32 bf16 numbers: the first vector's 16, then the second's.
struct Concatenate {
    __m512i operator()(__m512i a, __m512i b) const {
        alignas(64) static constexpr struct UpperHalves {
            uint16_t index[32];
            constexpr UpperHalves() : index() {
                for (int i = 0; i < 32; i++) index[i] = uint16_t(2 * i + 1);
            }
        } upper_halves;
        return _mm512_permutex2var_epi16(a, _mm512_load_si512(upper_halves.index), b);
    }
};

// Packs planes of two vectors into 16 pairs.
struct Interleave {
    __m512i operator()(__m512i a, __m512i b) const { return _mm512_or_si512(_mm512_srli_epi32(a, 16), b); }
};

// Stores 32 numbers in every plane of a tile: with Concatenate a row of a left operand from its two halves, with
// Interleave a pair of rows of a right operand.
template <int P, class Pack>
inline void store_planes(__m512 a, __m512 b, bf16* out) {
    __m512i first[P], second[P];
    split<P>(a, first);
    split<P>(b, second);
    for (int p = 0; p < P; p++) _mm512_store_si512(out + p * SIZE, Pack()(first[p], second[p]));
}

// Converts tiles of a left operand to those of a right operand, and back, by transposing pairs of numbers.
template <int P>
void transpose_tiles(int64_t tiles, Operand<P> out) {
    for (int64_t i = 0; i < tiles; i++)
        for (int64_t plane = 0; plane < out.blocks * P; plane++) {
            float* square = reinterpret_cast<float*>(out.tile(i) + plane * SIZE);
            transpose(square, W, square, W);
        }
}

// x (M, D), row-major, as rows of tiles.
template <int P>
void pack_rows(const float* x, int64_t stride, int64_t M, int64_t D, Operand<P> out) {
    for (int64_t m = 0; m < tiles_of(M) * SIDE; m++)
        for (int64_t d = 0; d < D; d += DEPTH) {
            const __mmask16 first = m < M ? lane_mask(D - d) : 0, second = m < M ? lane_mask(D - d - W) : 0;
            const float* row = x + m * stride + d;
            store_planes<P, Concatenate>(_mm512_maskz_loadu_ps(first, row), _mm512_maskz_loadu_ps(second, row + W),
                                         out.tile(m / SIDE, d / DEPTH) + m % SIDE * DEPTH);
        }
}

// x (D, N), row-major, as pairs of rows.
template <int P>
void pack_pairs(const float* x, int64_t stride, int64_t D, int64_t N, Operand<P> out) {
    for (int64_t d = 0; d < out.blocks * DEPTH; d += 2)
        for (int64_t n = 0; n < N; n += SIDE) {
            const __mmask16 lanes = lane_mask(N - n), first = d < D ? lanes : 0, second = d + 1 < D ? lanes : 0;
            const float* row = x + d * stride + n;
            store_planes<P, Interleave>(_mm512_maskz_loadu_ps(first, row), _mm512_maskz_loadu_ps(second, row + stride),
                                        out.tile(n / SIDE, d / DEPTH) + d % DEPTH * SIDE);
        }
}

enum Axis { ROWS, COLUMNS };

// The rows of x (M, D), or the columns of x (D, M), as a left operand of M rows.
template <int P>
void pack_left(Axis axis, const float* x, int64_t stride, int64_t M, int64_t D, Operand<P> out) {
    if (axis == ROWS) pack_rows(x, stride, M, D, out);
    else pack_pairs(x, stride, D, M, out), transpose_tiles(tiles_of(M), out);
}

// The columns of x (D, N), or the rows of x (N, D), as a right operand of N columns.
template <int P>
void pack_right(Axis axis, const float* x, int64_t stride, int64_t D, int64_t N, Operand<P> out) {
    if (axis == COLUMNS) pack_pairs(x, stride, D, N, out);
    else pack_rows(x, stride, N, D, out), transpose_tiles(tiles_of(N), out);
}

// Initial values of sums and their destination; strides from one row tile to the next and from row to row.
struct Accumulators {
    const float* from;
    int64_t from_tile, from_row;
    float* to;
    int64_t to_tile, to_row;
};

// R row tiles times one column tile, summed over all depth blocks. Instructions name their tile registers: hence macros
// in place of a loop.
template <int R, int PL, int PR>
inline void multiply_tiles(const bf16* left, int64_t left_stride, const bf16* right, int64_t blocks,
                           Accumulators sums) {
#define FOR_EACH_ROW(DO)       \
    DO(0)                      \
    if constexpr (R > 1) DO(1) \
    if constexpr (R > 2) DO(2) \
    if constexpr (R > 3) DO(3) \
    if constexpr (R > 4) DO(4) \
    if constexpr (R > 5) DO(5)
#define LOAD(r) _tile_loadd(r, sums.from + r * sums.from_tile, sums.from_row * 4);
#define STORE(r) _tile_stored(r, sums.to + r * sums.to_tile, sums.to_row * 4);
#define ADD_PRODUCT(r)                             \
    {                                              \
        _tile_loadd(6, row + r * left_stride, 64); \
        _tile_dpbf16ps(r, 6, 7);                   \
    }
    asm volatile("" ::: "memory");  // the intrinsics do not tell GCC which memory tile loads read
    FOR_EACH_ROW(LOAD)
    for (int64_t block = 0; block < blocks; block++, left += PL * SIZE, right += PR * SIZE)
        for (int r = 0; r < PR; r++) {
            _tile_loadd(7, right + r * SIZE, 64);
            for (int l = 0; l < PL && l + r < PLANES; l++) {
                const bf16* row = left + l * SIZE;
                FOR_EACH_ROW(ADD_PRODUCT)
            }
        }
    FOR_EACH_ROW(STORE)
#undef FOR_EACH_ROW
#undef LOAD
#undef STORE
#undef ADD_PRODUCT
}

alignas(64) constexpr float ZEROS[SIDE] = {};

// `rows` row tiles of `left` times one column tile of `right`, over depth blocks `from` to `to`.
template <int PL, int PR>
void multiply(Operand<PL> left, int64_t rows, Operand<PR> right, int64_t column, int64_t from, int64_t to,
              Accumulators sums) {
    constexpr int64_t MAX_ROWS = 6;  // row tiles whose sums fit into the tile registers
    const int64_t groups = (rows + MAX_ROWS - 1) / MAX_ROWS;
    for (int64_t g = 0; g < groups; g++) {
        const int64_t first = rows * g / groups, count = rows * (g + 1) / groups - first;
        const Accumulators group{sums.from + first * sums.from_tile, sums.from_tile, sums.from_row,
                                 sums.to + first * sums.to_tile,     sums.to_tile,   sums.to_row};
        auto run = [&](auto multiply_group) {
            multiply_group(left.tile(first, from), left.stride(), right.tile(column, from), to - from, group);
        };
        switch (count) {
            case 1: run(multiply_tiles<1, PL, PR>); break;
            case 2: run(multiply_tiles<2, PL, PR>); break;
            case 3: run(multiply_tiles<3, PL, PR>); break;
            case 4: run(multiply_tiles<4, PL, PR>); break;
            case 5: run(multiply_tiles<5, PL, PR>); break;
            case 6: run(multiply_tiles<6, PL, PR>); break;
        }
    }
}

template <int PL, int PR>
void multiply(Operand<PL> left, int64_t rows, Operand<PR> right, int64_t column, Accumulators sums) {
    multiply(left, rows, right, column, 0, left.blocks, sums);
}

}  // namespace
#else
#define HAS_TILES 0
#endif

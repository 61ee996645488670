// Products on the matrix units of a processor (AMX): tiles of 16 x 32 bf16 numbers, sums in float32.
//
// A float32 number is the sum of three bf16 numbers, its planes: itself rounded to 8 bits, what that left rounded to 8
// bits, and the last 8. A spike is one. A product of spikes and weights is therefore exact in 3 products of tiles, as
// if it were of float32 numbers; one of float32 numbers takes 6: what is left out is below 2^-25 of each product, the
// planes being below 2^-9 and 2^-18 of a number. With one plane, rounded to nearest, a product is one of bf16 numbers.
//
// Left operands lie as tiles of 16 rows and 32 columns, (row tiles, depth blocks, planes, 16, 32), right ones as pairs
// of neighbouring rows, (column tiles, depth blocks, planes, 16, 16, 2); both are zero beyond the matrix.

#pragma once
#include "vectors.h"

#if defined(__AMX_BF16__)
#define HAS_TILES 1

namespace {

constexpr int64_t SIDE = 16;        // rows of a tile, and columns of a result
constexpr int64_t DEPTH = 32;       // numbers that one product of tiles sums over
constexpr int64_t SIZE = SIDE * DEPTH;
constexpr int PLANES = 3;           // of a float32 number

typedef uint16_t bf16;

constexpr int64_t tiles_of(int64_t n) { return (n + SIDE - 1) / SIDE; }
constexpr int64_t blocks_of(int64_t n) { return (n + DEPTH - 1) / DEPTH; }

// While it lives, the calling thread's tiles are 16 rows of 64 bytes.
struct Tiles {
    struct Config {
        uint8_t palette = 1, start = 0, reserved[14] = {};
        uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
        uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    Tiles() {
        // Constant, for GCC believes that the instruction reads 8 bytes and may leave out stores of the others.
        alignas(64) static constexpr Config config{};
        _tile_loadconfig(&config);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
};

// A packed operand. Between two tiles of a column lies an odd number of blocks: an even one would send them to the
// same places of a cache.
template <int P>
struct Operand {
    bf16* first;
    int64_t blocks;
    int64_t step() const { return (blocks | 1) * P * SIZE; }
    bf16* tile(int64_t i, int64_t block = 0) const { return first + i * step() + block * P * SIZE; }
    static int64_t bytes(int64_t tiles, int64_t blocks) {
        return tiles * (blocks | 1) * P * SIZE * int64_t(sizeof(bf16));
    }
};

// The planes of numbers, each in the upper half of its lane.
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

inline __mmask16 first_lanes(int64_t n) { return n >= W ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

// Two vectors of planes as 32 neighbours: numbers 0 to 15 and 16 to 31 of a row.
inline __m512i neighbours(__m512i a, __m512i b) {
    alignas(64) static constexpr struct Odd {
        uint16_t of[32];
        constexpr Odd() : of() {
            for (int i = 0; i < 32; i++) of[i] = uint16_t(2 * i + 1);
        }
    } upper_halves;
    return _mm512_permutex2var_epi16(a, _mm512_load_si512(upper_halves.of), b);
}

// Two vectors of planes as 16 pairs: the numbers of two rows, column by column.
inline __m512i pairs(__m512i a, __m512i b) { return _mm512_or_si512(_mm512_srli_epi32(a, 16), b); }

// A row of a left operand's tile, from the halves of its 32 numbers.
template <int P>
inline void put_row(__m512 a, __m512 b, bf16* row) {
    __m512i first[P], last[P];
    split<P>(a, first);
    split<P>(b, last);
    for (int p = 0; p < P; p++) _mm512_store_si512(row + p * SIZE, neighbours(first[p], last[p]));
}

// A pair of rows of a right operand's tile.
template <int P>
inline void put_pair(__m512 a, __m512 b, bf16* pair) {
    __m512i first[P], last[P];
    split<P>(a, first);
    split<P>(b, last);
    for (int p = 0; p < P; p++) _mm512_store_si512(pair + p * SIZE, pairs(first[p], last[p]));
}

// Pairs of numbers of a left operand's tile become those of a right one's, and the other way round.
template <int P>
inline void flip(bf16* tile) {
    for (int p = 0; p < P; p++) {
        float* square = reinterpret_cast<float*>(tile + p * SIZE);
        transpose(square, W, square, W);
    }
}

// x (M, D), row after row as it lies in memory, as rows of tiles: row tile m, block d.
template <int P>
void pack_rows(const float* x, int64_t step, int64_t M, int64_t D, Operand<P> out) {
    for (int64_t m = 0; m < tiles_of(M) * SIDE; m++)
        for (int64_t d = 0; d < D; d += DEPTH) {
            const __mmask16 one = m < M ? first_lanes(D - d) : 0, two = m < M ? first_lanes(D - d - W) : 0;
            const float* row = x + m * step + d;
            put_row<P>(_mm512_maskz_loadu_ps(one, row), _mm512_maskz_loadu_ps(two, row + W),
                       out.tile(m / SIDE, d / DEPTH) + m % SIDE * DEPTH);
        }
}

// x (D, N) as pairs of rows: column tile n, block d.
template <int P>
void pack_pairs(const float* x, int64_t step, int64_t D, int64_t N, Operand<P> out) {
    for (int64_t d = 0; d < out.blocks * DEPTH; d += 2)
        for (int64_t n = 0; n < N; n += SIDE) {
            const __mmask16 there = first_lanes(N - n), one = d < D ? there : 0, two = d + 1 < D ? there : 0;
            const float* row = x + d * step + n;
            put_pair<P>(_mm512_maskz_loadu_ps(one, row), _mm512_maskz_loadu_ps(two, row + step),
                        out.tile(n / SIDE, d / DEPTH) + d % DEPTH * SIDE);
        }
}

template <int P>
void flip_all(int64_t tiles, Operand<P> out) {
    for (int64_t i = 0; i < tiles; i++)
        for (int64_t block = 0; block < out.blocks; block++) flip<P>(out.tile(i, block));
}

enum Of { ROWS, COLUMNS };

// The rows of x (M, D), or the columns of x (D, M), as a left operand of M rows.
template <int P>
void pack_left(Of of, const float* x, int64_t step, int64_t M, int64_t D, Operand<P> out) {
    if (of == ROWS) pack_rows(x, step, M, D, out);
    else pack_pairs(x, step, D, M, out), flip_all(tiles_of(M), out);
}

// The columns of x (D, N), or the rows of x (N, D), as a right operand of N columns.
template <int P>
void pack_right(Of of, const float* x, int64_t step, int64_t D, int64_t N, Operand<P> out) {
    if (of == COLUMNS) pack_pairs(x, step, D, N, out);
    else pack_rows(x, step, N, D, out), flip_all(tiles_of(N), out);
}

// Where sums begin and where they go, from one row tile to the next and from row to row.
struct Sums {
    const float* from;
    int64_t from_tile, from_row;
    float* to;
    int64_t to_tile, to_row;
};

// Sums of R row tiles and one column tile over all depth blocks. Instructions name their tiles: hence no loop.
template <int R, int PL, int PR>
inline void multiply(const bf16* left, int64_t left_step, const bf16* right, int64_t blocks, Sums s) {
#define EACH_ROW(DO)           \
    DO(0)                      \
    if constexpr (R > 1) DO(1) \
    if constexpr (R > 2) DO(2) \
    if constexpr (R > 3) DO(3) \
    if constexpr (R > 4) DO(4) \
    if constexpr (R > 5) DO(5)
#define BEGIN(r) _tile_loadd(r, s.from + r * s.from_tile, s.from_row * 4);
#define END(r) _tile_stored(r, s.to + r * s.to_tile, s.to_row * 4);
#define ADD(r)                                   \
    {                                            \
        _tile_loadd(6, row + r * left_step, 64); \
        _tile_dpbf16ps(r, 6, 7);                 \
    }
    asm volatile("" ::: "memory");  // loads of tiles name no memory that they read
    EACH_ROW(BEGIN)
    for (int64_t block = 0; block < blocks; block++, left += PL * SIZE, right += PR * SIZE)
        for (int r = 0; r < PR; r++) {
            _tile_loadd(7, right + r * SIZE, 64);
            for (int l = 0; l < PL && l + r < PLANES; l++) {
                const bf16* row = left + l * SIZE;
                EACH_ROW(ADD)
            }
        }
    EACH_ROW(END)
#undef EACH_ROW
#undef BEGIN
#undef END
#undef ADD
}

alignas(64) constexpr float ZEROS[SIDE] = {};

// `rows` row tiles of left times one column tile of right, over blocks `from` to `to`.
template <int PL, int PR>
void product(Operand<PL> left, int64_t rows, Operand<PR> right, int64_t column, int64_t from, int64_t to, Sums s) {
    constexpr int64_t MOST = 6;  // row tiles whose sums are kept in registers
    const int64_t groups = (rows + MOST - 1) / MOST;
    for (int64_t g = 0; g < groups; g++) {
        const int64_t first = rows * g / groups, count = rows * (g + 1) / groups - first;
        const Sums here{s.from + first * s.from_tile, s.from_tile, s.from_row,
                        s.to + first * s.to_tile,     s.to_tile,   s.to_row};
        auto run = [&](auto multiply) {
            multiply(left.tile(first, from), left.step(), right.tile(column, from), to - from, here);
        };
        switch (count) {
            case 1: run(multiply<1, PL, PR>); break;
            case 2: run(multiply<2, PL, PR>); break;
            case 3: run(multiply<3, PL, PR>); break;
            case 4: run(multiply<4, PL, PR>); break;
            case 5: run(multiply<5, PL, PR>); break;
            case 6: run(multiply<6, PL, PR>); break;
        }
    }
}

template <int PL, int PR>
void product(Operand<PL> left, int64_t rows, Operand<PR> right, int64_t column, Sums s) {
    product(left, rows, right, column, 0, left.blocks, s);
}

}  // namespace
#else
#define HAS_TILES 0
#endif

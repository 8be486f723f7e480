// Matrices as the matrix unit takes them: rows of 32 values of bfloat, and columns in pairs of rows. Values of bfloat are
// one plane of it; values of float are PLANES of it, each of the next eight bits of theirs, whose sum they are.
#pragma once

#include "block.h"
#include "lanes.h"
#include "matrix_unit.h"

namespace turnout {

constexpr int HALF_GROUP = UNIT_BYTES / 2;               // inner columns that are multiplied at once
constexpr int HALF_TILE = UNIT_ROWS * HALF_GROUP;        // values of a tile of bfloat
constexpr int HALF_PANEL = 2 * UNIT_ROWS;                // outer columns of two tiles of a weight
constexpr int UNIT_BLOCK_ROWS = 2 * UNIT_ROWS;           // rows that are multiplied at once

constexpr int PLANES = 3;                                // of a float: 24 bits by 8

inline long half_groups(long columns) { return (columns + HALF_GROUP - 1) / HALF_GROUP; }
constexpr long HALF_PLANE = UNIT_BLOCK_ROWS * HALF_GROUP;  // values, from a plane of a block's value to the next plane's

// In floats, of a block of whole tiles.
template <int P>
size_t half_block_floats(long rows, long columns) {
  return (rows + UNIT_BLOCK_ROWS - 1) / UNIT_BLOCK_ROWS * half_groups(columns) * P * HALF_PLANE / 2;
}

// Rows by columns, [32 rows][group of columns][plane][row][HALF_GROUP]: what is multiplied with a panel lies together.
// Columns past the last are zero, rows past it anything.
template <int P>
struct HalfBlock {
  bfloat* values;
  long rows, groups;

  bfloat* at(long group, long row) const {
    return values + (row / UNIT_BLOCK_ROWS * groups + group) * P * HALF_PLANE + row % UNIT_BLOCK_ROWS * HALF_GROUP;
  }
  // The groups from some group on.
  HalfBlock from(long group) const { return {at(group, 0), rows, groups}; }
};

#if defined(TURNOUT_MATRIX_UNIT)

// To the nearest, ties to even; NaN stays.
inline void store_half(bfloat* p, vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh((__m512)v));
}
inline void store_halves(bfloat* p, vec low, vec high) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low));
}
inline __mmask32 first_lanes(long n) { return n >= 32 ? ~__mmask32(0) : n <= 0 ? 0 : (__mmask32(1) << n) - 1; }

// n values of float as bfloat.
inline void to_half(bfloat* out, const float* x, long n) {
  long c = 0;
  for (; c + LANES <= n; c += LANES) store_half(out + c, load(x + c));
  if (c == n) return;
  const __m512 rest = _mm512_maskz_loadu_ps(first_lanes(n - c), x + c);
  _mm256_mask_storeu_epi16(out + c, first_lanes(n - c), (__m256i)_mm512_cvtneps_pbh(rest));
}

// What is left of x without its next eight bits, which `upper` are.
inline __m512i upper_bits(__m512i x) { return _mm512_and_si512(x, _mm512_set1_epi32(int(0xFFFF0000))); }
inline vec below_upper(vec x) { return x - (vec)upper_bits((__m512i)x); }
// The upper halves of 32 words.
inline __m512i upper_halves(vec low, vec high) {
  alignas(64) static const uint16_t odd[] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31,
                                             33, 35, 37, 39, 41, 43, 45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16((__m512i)low, _mm512_load_si512(odd), (__m512i)high);
}

// 32 values of a block: rounded where there is one plane, else the bits of each.
template <int P>
inline void put_halves(bfloat* to, vec low, vec high) {
  if (P == 1) return store_halves(to, low, high);
#pragma GCC unroll 3
  for (int p = 0; p < P; p++, to += HALF_PLANE) {
    _mm512_storeu_si512(to, upper_halves(low, high));
    low = below_upper(low), high = below_upper(high);
  }
}
// 16 values, likewise.
template <int P>
inline void put_half(bfloat* to, vec v) {
  if (P == 1) return store_half(to, v);
#pragma GCC unroll 3
  for (int p = 0; p < P; p++, to += HALF_PLANE, v = below_upper(v))
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_srli_epi32((__m512i)v, 16)));
}

// 16 values of a block.
template <int P>
inline vec whole_values(const bfloat* from) {
  vec sum = {};
#pragma GCC unroll 3
  for (int p = P - 1; p >= 0; p--) sum += load(from + p * HALF_PLANE);
  return sum;
}

// 16 values of which `n` are there.
inline vec first_values(const float* x, long n) { return (vec)_mm512_maskz_loadu_ps(__mmask16(first_lanes(n)), x); }

// A plane of 32 values of which `n` are there.
template <int P>
inline __m512i half_group(const bfloat* x, long n, int) {
  return _mm512_maskz_loadu_epi16(first_lanes(n), x);
}
template <int P>
inline __m512i half_group(const float* x, long n, int plane) {
  vec low = first_values(x, n), high = first_values(x + LANES, n - LANES);
  if (P == 1) return (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  for (int p = 0; p < plane; p++) low = below_upper(low), high = below_upper(high);
  return upper_halves(low, high);
}

// The values of two rows side by side, of the first 16 columns or the second.
inline __m512i pair_columns(__m512i even, __m512i odd, int half) {
  alignas(64) static const uint16_t order[] = {
      0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
      11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
      22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  return _mm512_permutex2var_epi16(even, _mm512_load_si512(order + half * 32), odd);
}

// Row r of the block is row token[r] of x, rounded where it has to be.
template <int P, class X>
void gather_half(const HalfBlock<P>& block, const X* x, long columns, const int32_t* token) {
  for (int r = 0; r < block.rows; r++) {
    const X* row = x + token[r] * columns;
    if (r + 4 < block.rows)
      for (long c = 0; c < columns; c += long(64 / sizeof(X))) __builtin_prefetch(x + token[r + 4] * columns + c, 0, 2);
    for (long c = 0; c < columns; c += HALF_GROUP)
#pragma GCC unroll 3
      for (int p = 0; p < P; p++)
        _mm512_storeu_si512(block.at(c / HALF_GROUP, r) + p * HALF_PLANE, half_group<P>(row + c, columns - c, p));
  }
}

#endif

}  // namespace turnout

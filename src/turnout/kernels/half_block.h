// Matrices of bfloat as the matrix unit takes them: rows of 32 values, and columns in pairs of rows.
#pragma once

#include "block.h"
#include "lanes.h"
#include "matrix_unit.h"

namespace turnout {

constexpr int HALF_GROUP = UNIT_BYTES / 2;               // inner columns that are multiplied at once
constexpr int HALF_TILE = UNIT_ROWS * HALF_GROUP;        // values of a tile of bfloat
constexpr int HALF_PANEL = 2 * UNIT_ROWS;                // outer columns of two tiles of a weight
constexpr int UNIT_BLOCK_ROWS = 2 * UNIT_ROWS;           // rows that are multiplied at once

inline long half_groups(long columns) { return (columns + HALF_GROUP - 1) / HALF_GROUP; }
// In floats, of a block with room for whole tiles after its last row.
inline size_t half_block_floats(long rows, long columns) {
  return size_t(half_groups(columns) * rows + UNIT_BLOCK_ROWS) * HALF_GROUP / 2;
}

// Rows by columns, [group of columns][row][HALF_GROUP]; columns past the last are zero.
struct HalfBlock {
  bfloat* values;
  long rows;

  bfloat* at(long group, long row) const { return values + (group * rows + row) * HALF_GROUP; }
  long group_bytes() const { return rows * UNIT_BYTES; }
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

inline __m512i half_group(const bfloat* x, long columns) { return _mm512_maskz_loadu_epi16(first_lanes(columns), x); }
inline __m512i half_group(const float* x, long columns) {
  const __m512 low = _mm512_maskz_loadu_ps(__mmask16(first_lanes(columns)), x);
  const __m512 high = _mm512_maskz_loadu_ps(__mmask16(first_lanes(columns - LANES)), x + LANES);
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
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
template <class X>
void gather_half(const HalfBlock& block, const X* x, long columns, const int32_t* token) {
  for (int r = 0; r < block.rows; r++) {
    const X* row = x + token[r] * columns;
    if (r + 4 < block.rows)
      for (long c = 0; c < columns; c += long(64 / sizeof(X))) __builtin_prefetch(x + token[r + 4] * columns + c, 0, 2);
    for (long c = 0; c < columns; c += HALF_GROUP)
      _mm512_storeu_si512(block.at(c / HALF_GROUP, r), half_group(row + c, columns - c));
  }
}

#endif

}  // namespace turnout

// Matrices turned for products over their rows, or with a weight's transpose: by exchanges of words of two.
#pragma once

#include "half_panels.h"

namespace turnout {

#if defined(TURNOUT_MATRIX_UNIT)

// Columns to rows of 16 x 16 words, by exchanging ever larger squares (Eklundh 1972).
inline void turn_words(__m512i (&row)[UNIT_ROWS]) {
#pragma GCC unroll 4
  for (int bit = 0; bit < 4; bit++) {
#pragma GCC unroll 16
    for (int i = 0; i < UNIT_ROWS; i++) {
      if (i & (1 << bit)) continue;
      const __m512i one = row[i], other = row[i + (1 << bit)];
      row[i] = _mm512_permutex2var_epi32(one, (__m512i)PICKS.low[bit], other);
      row[i + (1 << bit)] = _mm512_permutex2var_epi32(one, (__m512i)PICKS.high[bit], other);
    }
  }
}

// Rows first .. first + 31 of half a group of a plane's columns, in pairs of rows; rows past the last are zero.
template <int P>
inline void pairs_of_rows(const HalfBlock<P>& block, int plane, long group, long first, int half,
                          __m512i (&pairs)[UNIT_ROWS]) {
  const __m512i none = _mm512_setzero_si512();
#pragma GCC unroll 16
  for (int i = 0; i < UNIT_ROWS; i++) {
    const long row = first + 2 * i;
    const __m512i even = row < block.rows ? _mm512_loadu_si512(block.at(group, row) + plane * HALF_PLANE) : none;
    const __m512i odd = row + 1 < block.rows ? _mm512_loadu_si512(block.at(group, row + 1) + plane * HALF_PLANE) : none;
    pairs[i] = pair_columns(even, odd, half);
  }
}

// A group of a block's columns as a panel, for a product over the block's rows.
template <int P>
void pack_rows(bfloat* panel, const HalfBlock<P>& block, long group) {
  for (long first = 0; first < block.rows; first += HALF_GROUP)
    for (int plane = 0; plane < P; plane++)
      for (int half = 0; half < 2; half++, panel += HALF_TILE) {
        __m512i pairs[UNIT_ROWS];
        pairs_of_rows(block, plane, group, first, half, pairs);
#pragma GCC unroll 16
        for (int i = 0; i < UNIT_ROWS; i++) _mm512_store_si512(panel + i * HALF_GROUP, pairs[i]);
      }
}

// `turned` becomes the block's transpose: a row for each column of its groups, room for which it has.
template <int P>
void turn_block(const HalfBlock<P>& turned, const HalfBlock<P>& block, long groups) {
  for (long group = 0; group < groups; group++)
    for (long first = 0; first < block.rows; first += HALF_GROUP)
      for (int plane = 0; plane < P; plane++)
        for (int half = 0; half < 2; half++) {
          __m512i pairs[UNIT_ROWS];
          pairs_of_rows(block, plane, group, first, half, pairs);
          turn_words(pairs);
          bfloat* const to = turned.at(first / HALF_GROUP, group * HALF_GROUP + half * UNIT_ROWS) + plane * HALF_PLANE;
#pragma GCC unroll 16
          for (int i = 0; i < UNIT_ROWS; i++) _mm512_storeu_si512(to + i * HALF_GROUP, pairs[i]);
        }
}

// A panel of the transpose of a weight: its rows w, w + row_step, ... become `columns` columns, of `depth` values each.
template <int P, class W>
void pack_turned(bfloat* panel, const W* w, long row_step, long depth, long columns) {
  for (long k = 0; k < depth; k += HALF_GROUP)
    for (int plane = 0; plane < P; plane++)
      for (int tile = 0; tile < 2; tile++, panel += HALF_TILE) {
        __m512i rows[UNIT_ROWS];
#pragma GCC unroll 16
        for (int i = 0; i < UNIT_ROWS; i++) {
          const long column = tile * UNIT_ROWS + i;
          const W* from = w + column * row_step + k;
          rows[i] = column < columns ? half_group<P>(from, depth - k, plane) : _mm512_setzero_si512();
        }
        turn_words(rows);
#pragma GCC unroll 16
        for (int i = 0; i < UNIT_ROWS; i++) _mm512_store_si512(panel + i * HALF_GROUP, rows[i]);
      }
}

#endif

}  // namespace turnout

// Squares of 32 rows and columns as the matrix unit takes them, in every role a matrix has in products: words of two
// columns make it a left factor and, turned, its transpose a right one; words of two rows make it a right factor and,
// turned, its transpose a left one.
#pragma once

#include "half_panels.h"
#include "half_tile.h"

namespace turnout {

#if defined(TURNOUT_MATRIX_UNIT)

// Columns to rows of 16 x 16 words, which are floats or two values of bfloat. Quarters of lines are exchanged as they are
// loaded, which keeps them from the one port that shuffles; what is left are four words of four lines.
inline void turn_tile(void* turned, const void* tile) {
  for (int quarter = 0; quarter < 4; quarter++) {
    __m512i line[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
      const auto part = [&](int four) {
        return _mm_load_si128(static_cast<const __m128i*>(tile) + (four * 4 + i) * 4 + quarter);
      };
      line[i] = _mm512_inserti32x4(_mm512_castsi128_si512(part(0)), part(1), 1);
      line[i] = _mm512_inserti32x4(_mm512_inserti32x4(line[i], part(2), 2), part(3), 3);
    }
    const __m512i low = _mm512_unpacklo_epi32(line[0], line[1]), high = _mm512_unpackhi_epi32(line[0], line[1]);
    const __m512i next_low = _mm512_unpacklo_epi32(line[2], line[3]), next_high = _mm512_unpackhi_epi32(line[2], line[3]);
    __m512i* const to = static_cast<__m512i*>(turned) + quarter * 4;
    _mm512_store_si512(to, _mm512_unpacklo_epi64(low, next_low));
    _mm512_store_si512(to + 1, _mm512_unpackhi_epi64(low, next_low));
    _mm512_store_si512(to + 2, _mm512_unpacklo_epi64(high, next_high));
    _mm512_store_si512(to + 3, _mm512_unpackhi_epi64(high, next_high));
  }
}

// Sums to their transpose.
inline void turn_sums(HalfSums& turned, const HalfSums& sums) {
  for (int tile = 0; tile < 2; tile++)
    for (int half = 0; half < 2; half++)
      turn_tile(turned.sum[half][tile * UNIT_ROWS], sums.sum[tile][half * UNIT_ROWS]);
}

// Up to 32 rows of a matrix, a group of columns at a time; rows past the last are zeros.
template <class T>
class HalfRows {
 public:
  // Row i begins at `place(i)`.
  template <class Place>
  HalfRows(long rows, Place place) : rows_(int(std::min<long>(rows, UNIT_BLOCK_ROWS))) {
    alignas(64) static const T zeros[HALF_GROUP] = {};
    for (int i = 0; i < UNIT_BLOCK_ROWS; i++) row_[i] = i < rows_ ? place(i) : zeros;
  }
  const T* operator[](int i) const { return row_[i]; }
  void go_on() {
    for (int i = 0; i < rows_; i++) row_[i] += HALF_GROUP;
  }

 private:
  const int rows_;
  const T* row_[UNIT_BLOCK_ROWS];
};

// 32 lines of words in all planes, as a group of a block or of a panel has them.
template <class T>
struct HalfSquare {
  static constexpr int P = sizeof(T) == sizeof(bfloat) ? 1 : PLANES;
  alignas(64) bfloat word[P * HALF_PLANE];
};

// Words of floats' planes, of each lane of `low` and of `high`.
inline void put_words(bfloat* to, vec low, vec high) {
#pragma GCC unroll 3
  for (int p = 0; p < PLANES; p++, to += HALF_PLANE) {
    _mm512_store_si512(to, _mm512_or_si512(_mm512_srli_epi32((__m512i)low, 16), upper_bits((__m512i)high)));
    low = below_upper(low), high = below_upper(high);
  }
}

// A line for each row: of floats words of columns j and j + 16. Of the columns `n` are there.
inline void pair_columns(bfloat* to, const HalfRows<bfloat>& rows, long n) {
  for (int i = 0; i < UNIT_BLOCK_ROWS; i++)
    _mm512_store_si512(to + i * HALF_GROUP, _mm512_maskz_loadu_epi16(first_lanes(n), rows[i]));
}
inline void pair_columns(bfloat* to, const HalfRows<float>& rows, long n) {
  if (n >= HALF_GROUP)
    for (int i = 0; i < UNIT_BLOCK_ROWS; i++) put_words(to + i * HALF_GROUP, load(rows[i]), load(rows[i] + LANES));
  else
    for (int i = 0; i < UNIT_BLOCK_ROWS; i++)
      put_words(to + i * HALF_GROUP, first_values(rows[i], n), first_values(rows[i] + LANES, n - LANES));
}

// A line for each two rows and 16 columns.
inline void pair_rows(bfloat* to, const HalfRows<bfloat>& rows, long n) {
  for (int i = 0; i < UNIT_ROWS; i++) {
    const __m512i even = _mm512_maskz_loadu_epi16(first_lanes(n), rows[2 * i]);
    const __m512i odd = _mm512_maskz_loadu_epi16(first_lanes(n), rows[2 * i + 1]);
    for (int tile = 0; tile < 2; tile++)
      _mm512_store_si512(to + tile * HALF_TILE + i * HALF_GROUP, pair_columns(even, odd, tile));
  }
}
inline void pair_rows(bfloat* to, const HalfRows<float>& rows, long n) {
  for (int i = 0; i < UNIT_ROWS; i++)
    for (int tile = 0; tile < 2; tile++) {
      const float *const even = rows[2 * i] + tile * LANES, *const odd = rows[2 * i + 1] + tile * LANES;
      bfloat* const line = to + tile * HALF_TILE + i * HALF_GROUP;
      if (n >= HALF_GROUP)
        put_words(line, load(even), load(odd));
      else
        put_words(line, first_values(even, n - tile * LANES), first_values(odd, n - tile * LANES));
    }
}

template <class T>
void turn_square(bfloat* turned, const HalfSquare<T>& square) {
  for (long at = 0; at < HalfSquare<T>::P * HALF_PLANE; at += HALF_TILE) turn_tile(turned + at, square.word + at);
}
template <class T>
void pair_columns_turned(bfloat* to, const HalfRows<T>& rows, long n) {
  HalfSquare<T> square;
  pair_columns(square.word, rows, n);
  turn_square(to, square);
}
template <class T>
void pair_rows_turned(bfloat* to, const HalfRows<T>& rows, long n) {
  HalfSquare<T> square;
  pair_rows(square.word, rows, n);
  turn_square(to, square);
}

// Rows w, w + step, ... as a block's.
template <int P, class W>
void split_rows(const HalfBlock<P>& block, const W* w, long step, long columns) {
  for (long first = 0; first < block.rows; first += UNIT_BLOCK_ROWS) {
    HalfRows<W> rows(block.rows - first, [&](int i) { return w + (first + i) * step; });
    for (long c = 0; c < columns; c += HALF_GROUP, rows.go_on())
      pair_columns(block.at(c / HALF_GROUP, first), rows, columns - c);
  }
}

#endif

}  // namespace turnout

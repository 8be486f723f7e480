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

// Row r of the block is row token[r] of x.
inline void gather_half(const HalfBlock& block, const bfloat* x, long columns, const int32_t* token) {
  for (int r = 0; r < block.rows; r++) {
    const bfloat* row = x + token[r] * columns;
    if (r + 4 < block.rows)
      for (long c = 0; c < columns; c += HALF_GROUP) __builtin_prefetch(x + token[r + 4] * columns + c, 0, 2);
    for (long c = 0; c < columns; c += HALF_GROUP)
      _mm512_storeu_si512(block.at(c / HALF_GROUP, r), _mm512_maskz_loadu_epi16(first_lanes(columns - c), row + c));
  }
}

// Panels of a weight, each of two tiles of columns, packed in pairs of rows: [group of rows][tile][16 pairs][16][2].
// Many side by side, as reading a line of each row is half as fast as reading eight that lie together.
class HalfPanels {
 public:
  // Columns from `w` on, of which there are `left`; `second`: from a tile of a gate to what it gates, or 0.
  HalfPanels(const bfloat* w, long row_step, long depth, long left, long second)
      : number(int(std::min(most(depth), (left + width(second) - 1) / width(second)))),
        w_(w),
        row_step_(row_step),
        depth_(depth),
        left_(left),
        second_(second) {}

  const int number;

  static size_t floats(long depth) { return size_t(std::max(ROOM, 2 * size(depth)) / 2); }  // and of any smaller one
  static long width(bool gated) { return gated ? UNIT_ROWS : HALF_PANEL; }  // columns, of a gate where there is one
  static long strip(long depth, bool gated) { return most(depth) * width(gated); }
  const bfloat* panel(const bfloat* room, int which) const { return room + which * size(depth_); }

  // What is beyond w is zero.
  void pack(bfloat* room) const {
    for (long k = 0; k < half_groups(depth_) * HALF_GROUP; k += 2) {
      bfloat* const to = room + k / HALF_GROUP * 2 * HALF_TILE + k % HALF_GROUP / 2 * HALF_GROUP;
      if (second_) {
        for (int p = 0; p < number; p += 2) {
          const bool both = p + 1 < number;
          pack_line(to + p * size(depth_), both ? size(depth_) : 0, k, p * UNIT_ROWS, left_);
          pack_line(to + p * size(depth_) + HALF_TILE, both ? size(depth_) : 0, k, second_ + p * UNIT_ROWS,
                    second_ + left_);
        }
      } else {
        for (int p = 0; p < number; p++) pack_line(to + p * size(depth_), HALF_TILE, k, p * HALF_PANEL, left_);
      }
    }
  }

 private:
  static constexpr long LINE = UNIT_BYTES / 2, ROOM = 128 << 10;  // values of the panels that are packed at once

  static long size(long depth) { return half_groups(depth) * 2 * HALF_TILE; }
  static long most(long depth) { return std::max(2L, std::min(8L, ROOM / size(depth) / 2 * 2)); }

  // Rows k and k + 1 of a line of columns: its first half, and the second `next` further; 0: there is none.
  void pack_line(bfloat* to, long next, long k, long column, long end) const {
    alignas(64) static const uint16_t order[] = {
        0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
        11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
        22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    const __mmask32 mask = first_lanes(end - column);
    const bfloat* from = w_ + k * row_step_ + column;
    const __m512i even = _mm512_maskz_loadu_epi16(k < depth_ ? mask : 0, from);
    const __m512i odd = _mm512_maskz_loadu_epi16(k + 1 < depth_ ? mask : 0, from + row_step_);
    if (next) _mm512_store_si512(to + next, _mm512_permutex2var_epi16(even, _mm512_load_si512(order + 32), odd));
    _mm512_store_si512(to, _mm512_permutex2var_epi16(even, _mm512_load_si512(order), odd));
  }

  const bfloat* const w_;
  const long row_step_, depth_, left_, second_;
};

#endif

}  // namespace turnout

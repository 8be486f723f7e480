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

// Two panels of a weight, each of two tiles of columns, packed in pairs of rows: [group of rows][tile][16 pairs][16][2].
// Of each row two whole lines are read, which with a gate are of the gate and of what it gates.
class HalfPanels {
 public:
  // Columns from `w` on, of which there are `left`; `second`: from a tile of a gate to what it gates, or 0.
  HalfPanels(const bfloat* w, long row_step, long depth, long left, long second)
      : w_(w), row_step_(row_step), depth_(depth), gated_(second) {
    start_[1] = second ? second : LINE;
    left_[0] = left;
    left_[1] = second ? left : left - LINE;
  }

  static size_t floats(long depth) { return size_t(half_groups(depth)) * 2 * HALF_TILE; }  // for both
  const bfloat* panel(const bfloat* room, int number) const { return room + number * panel_size(); }

  void pack(bfloat* room) const {
    const long next = gated_ ? panel_size() : HALF_TILE;  // from the first half of a line to the second
    for (int line = 0; line < 2; line++)
      if (left_[line] > 0 || gated_)
        pack_line(room + line * (gated_ ? HALF_TILE : panel_size()), next, w_ + start_[line], first_lanes(left_[line]));
  }

  // Rows [first, end), into the second cache.
  void fetch(long first, long end) const {
    for (long k = first; k < std::min(end, depth_); k++) {
      fetch_line(w_ + k * row_step_);
      if (left_[1] > 0) fetch_line(w_ + k * row_step_ + start_[1]);
    }
  }
  long depth() const { return depth_; }

 private:
  static constexpr long LINE = UNIT_BYTES / 2;

  // GCC 12 takes a function that does nothing but __builtin_prefetch for one without effects.
  static void fetch_line(const bfloat* p) { asm volatile("prefetcht1 %0" ::"m"(*p)); }
  long panel_size() const { return half_groups(depth_) * 2 * HALF_TILE; }

  // What is beyond w is zero.
  void pack_line(bfloat* out, long next, const bfloat* w, __mmask32 mask) const {
    alignas(64) static const uint16_t order[] = {
        0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47,
        16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
    const __m512i low = _mm512_load_si512(order), high = _mm512_load_si512(order + 32);
    for (long k = 0; k < half_groups(depth_) * HALF_GROUP; k += 2) {
      const __m512i even = k < depth_ ? _mm512_maskz_loadu_epi16(mask, w + k * row_step_) : _mm512_setzero_si512();
      const __m512i odd =
          k + 1 < depth_ ? _mm512_maskz_loadu_epi16(mask, w + (k + 1) * row_step_) : _mm512_setzero_si512();
      bfloat* const to = out + k / HALF_GROUP * 2 * HALF_TILE + k % HALF_GROUP / 2 * HALF_GROUP;
      _mm512_store_si512(to, _mm512_permutex2var_epi16(even, low, odd));
      _mm512_store_si512(to + next, _mm512_permutex2var_epi16(even, high, odd));
    }
  }

  const bfloat* const w_;
  const long row_step_, depth_;
  const bool gated_;
  long start_[2] = {0, 0}, left_[2];
};

#endif

}  // namespace turnout

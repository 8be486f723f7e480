// Panels of weights for the matrix unit: two tiles of columns, packed in pairs of rows, [group of rows][tile][16][16][2].
#pragma once

#include "activation.h"
#include "half_block.h"
#include "job.h"

namespace turnout {

#if defined(TURNOUT_MATRIX_UNIT)

// Panels that are packed at once, in a thread's own room. Of a gate and what it gates each has a tile.
class PanelStrip {
 public:
  PanelStrip(long depth, long left, bool gated)
      : number(int(std::min(most(depth), (left + width(gated) - 1) / width(gated)))), depth_(depth), gated_(gated) {}

  const int number;

  static size_t floats(long depth) { return size_t(std::max(ROOM, 2 * size(depth)) / 2); }  // and of any smaller one
  static long width(bool gated) { return gated ? UNIT_ROWS : HALF_PANEL; }  // columns, of a gate where there is one
  static long strip(long depth, bool gated) { return most(depth) * width(gated); }
  const bfloat* panel(const bfloat* room, int which) const { return room + which * size(depth_); }

 protected:
  static long size(long depth) { return half_groups(depth) * 2 * HALF_TILE; }

  const long depth_;
  const bool gated_;

 private:
  static constexpr long ROOM = 128 << 10;  // values

  static long most(long depth) { return std::max(2L, std::min(8L, ROOM / size(depth) / 2 * 2)); }
};

// Of a weight in bfloat, row by row. Many panels side by side, as reading a line of each row is half as fast as reading
// eight that lie together.
class HalfPanels : public PanelStrip {
 public:
  // Columns from `w` on, of which there are `left`; `second`: from a gate to what it gates, or 0.
  HalfPanels(const bfloat* w, long row_step, long depth, long left, long second)
      : PanelStrip(depth, left, second), w_(w), row_step_(row_step), left_(left), second_(second) {}

  // What is beyond w is zero.
  void pack(bfloat* room) const {
    for (long k = 0; k < half_groups(depth_) * HALF_GROUP; k += 2) {
      bfloat* const to = room + k / HALF_GROUP * 2 * HALF_TILE + k % HALF_GROUP / 2 * HALF_GROUP;
      if (gated_) {
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
  // Rows k and k + 1 of a line of columns: its first half, and the second `next` further; 0: there is none.
  void pack_line(bfloat* to, long next, long k, long column, long end) const {
    const __mmask32 mask = first_lanes(end - column);
    const bfloat* from = w_ + k * row_step_ + column;
    const __m512i even = _mm512_maskz_loadu_epi16(k < depth_ ? mask : 0, from);
    const __m512i odd = _mm512_maskz_loadu_epi16(k + 1 < depth_ ? mask : 0, from + row_step_);
    if (next) _mm512_store_si512(to + next, pair_columns(even, odd, 1));
    _mm512_store_si512(to, pair_columns(even, odd, 0));
  }

  const bfloat* const w_;
  const long row_step_, left_, second_;
};

// The experts' weights in bfloat, as panels.
class HalfWeights {
 public:
  typedef HalfPanels Panels;
  explicit HalfWeights(const Job& job) : job(job), before_(activation(job.kind).parts * job.hidden) {}

  const Job& job;

  // Columns of the first product from j to `end`.
  HalfPanels up(int expert, long j, long end) const {
    const bfloat* w = static_cast<const bfloat*>(job.up) + expert * job.dim * before_ + j;
    return HalfPanels(w, before_, job.dim, end - j, before_ - job.hidden);
  }
  // Columns of the second from d on, of its rows from f to `end`.
  HalfPanels down(int expert, long d, long f, long end) const {
    const bfloat* w = static_cast<const bfloat*>(job.down) + (expert * job.hidden + f) * job.dim + d;
    return HalfPanels(w, job.dim, end - f, job.dim - d, 0);
  }

 private:
  const long before_;
};

#endif

}  // namespace turnout

// Panels of weights for the matrix unit: two tiles of columns, packed in pairs of rows,
// [group of rows][plane][tile][16][16][2].
#pragma once

#include "activation.h"
#include "half_block.h"
#include "job.h"

namespace turnout {

#if defined(TURNOUT_MATRIX_UNIT)

// Memory that is read soon, fetched a share at a time: up to two pieces of some rows each.
class Ahead {
 public:
  void add(const void* from, long rows, long bytes, long step) {
    if (rows > 0 && bytes > 0) piece_[pieces_++] = {static_cast<const char*>(from), rows, (bytes + 63) / 64, step};
  }
  // All of it in so many shares.
  void spread(long shares) {
    long lines = 0;
    for (int p = 0; p < pieces_; p++) lines += piece_[p].rows * piece_[p].lines;
    share_ = lines / std::max(1l, shares) + 1;
  }
  void go_on() {
    for (long left = share_; left > 0 && at_ < pieces_; left--) {
      const Piece& piece = piece_[at_];
      __builtin_prefetch(piece.from + row_ * piece.step + line_ * 64, 0, 2);
      if (++line_ < piece.lines) continue;
      line_ = 0;
      if (++row_ < piece.rows) continue;
      row_ = 0;
      at_++;
    }
  }

 private:
  struct Piece {
    const char* from;
    long rows, lines, step;  // lines of a row; bytes from a row to the next
  };
  Piece piece_[2];
  int pieces_ = 0, at_ = 0;
  long row_ = 0, line_ = 0, share_ = 0;
};

// Panels that are packed at once, in a thread's own room. Of a gate and what it gates each has a tile.
template <int P>
class PanelStrip {
 public:
  static constexpr int planes = P;

  PanelStrip(long depth, long left, bool gated)
      : number(int(std::min(most(depth), (left + width(gated) - 1) / width(gated)))), depth_(depth), gated_(gated) {}

  const int number;

  static size_t floats(long depth) { return size_t(std::max(ROOM, 2 * size(depth)) / 2); }  // and of any smaller one
  static long width(bool gated) { return gated ? UNIT_ROWS : HALF_PANEL; }  // columns, of a gate where there is one
  static long strip(long depth, bool gated) { return most(depth) * width(gated); }
  const bfloat* panel(const bfloat* room, int which) const { return room + which * size(depth_); }

 protected:
  static long size(long depth) { return half_groups(depth) * P * 2 * HALF_TILE + 5 * HALF_GROUP; }

  const long depth_;
  const bool gated_;

 private:
  static constexpr long ROOM = (P == 1 ? 128 : 512) << 10;  // values

  static long most(long depth) { return std::max(2L, std::min(8L, ROOM / size(depth) / 2 * 2)); }
};

// Of a weight row by row. Many panels side by side, as reading a line of each row is half as fast as reading eight that
// lie together.
template <class W>
class HalfPanels : public PanelStrip<sizeof(W) == 2 ? 1 : PLANES> {
 public:
  typedef PanelStrip<sizeof(W) == 2 ? 1 : PLANES> Strip;
  using Strip::number;

  // Columns from `w` on, of which there are `left`; `second`: from a gate to what it gates, or 0.
  HalfPanels(const W* w, long row_step, long depth, long left, long second)
      : Strip(depth, left, second), w_(w), row_step_(row_step), left_(left), second_(second) {}

  // What these panels are packed from, to be fetched before that.
  void tell(Ahead& ahead) const {
    const long bytes = std::min(left_, number * Strip::width(gated_)) * long(sizeof(W));
    ahead.add(w_, depth_, bytes, row_step_ * long(sizeof(W)));
    if (gated_) ahead.add(w_ + second_, depth_, bytes, row_step_ * long(sizeof(W)));
  }

  // What is beyond w is zero.
  void pack(bfloat* room) const {
    for (long k = 0; k < half_groups(depth_) * HALF_GROUP; k += 2) {
      bfloat* const to = room + k / HALF_GROUP * Strip::planes * 2 * HALF_TILE + k % HALF_GROUP / 2 * HALF_GROUP;
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
    const W* from = w_ + k * row_step_ + column;
    put_pairs(to, next, from, k < depth_ ? end - column : 0, k + 1 < depth_ ? end - column : 0);
  }
  void put_pairs(bfloat* to, long next, const bfloat* from, long n, long n_odd) const {
    const __m512i even = _mm512_maskz_loadu_epi16(first_lanes(n), from);
    const __m512i odd = _mm512_maskz_loadu_epi16(first_lanes(n_odd), from + row_step_);
    if (next) _mm512_store_si512(to + next, pair_columns(even, odd, 1));
    _mm512_store_si512(to, pair_columns(even, odd, 0));
  }
  void put_pairs(bfloat* to, long next, const float* from, long n, long n_odd) const {
    for (int half = 0; half < (next ? 2 : 1); half++, to += next, from += LANES, n -= LANES, n_odd -= LANES) {
      __builtin_prefetch(from + 8 * row_step_, 0, 3);
      __builtin_prefetch(from + 9 * row_step_, 0, 3);
      vec even = first_values(from, n), odd = first_values(from + row_step_, n_odd);
      bfloat* place = to;
#pragma GCC unroll 3
      for (int p = 0; p < Strip::planes; p++, place += 2 * HALF_TILE) {
        const __m512i first = _mm512_srli_epi32((__m512i)even, 16);
        _mm512_store_si512(place, _mm512_or_si512(first, upper_bits((__m512i)odd)));
        even = below_upper(even), odd = below_upper(odd);
      }
    }
  }

  using Strip::depth_;
  using Strip::gated_;
  using Strip::size;
  const W* const w_;
  const long row_step_, left_, second_;
};

// The experts' weights, as panels.
template <class W>
class HalfWeights {
 public:
  typedef HalfPanels<W> Panels;
  explicit HalfWeights(const Job& job) : job(job), before_(activation(job.kind).parts * job.hidden) {}

  const Job& job;

  // Columns of the first product from j to `end`.
  Panels up(int expert, long j, long end) const {
    const W* w = static_cast<const W*>(job.up) + expert * job.dim * before_ + j;
    return Panels(w, before_, job.dim, end - j, before_ - job.hidden);
  }
  // Columns of the second from d on, of its rows from f to `end`.
  Panels down(int expert, long d, long f, long end) const {
    const W* w = static_cast<const W*>(job.down) + (expert * job.hidden + f) * job.dim + d;
    return Panels(w, job.dim, end - f, job.dim - d, 0);
  }

 private:
  const long before_;
};

#endif

}  // namespace turnout

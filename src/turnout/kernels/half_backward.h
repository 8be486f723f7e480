// The backward pass on the matrix unit: what backward.h does, with rows, weights and their gradients of T: of bfloat, or
// of float in planes of it.
//
// Products over the rows of a block, for the gradients of weights, take one factor's columns as rows (half_turns.h) and
// the other's rows in pairs; products with a weight's transpose exchange words of two of its columns.
#pragma once

#include <vector>

#include "biases.h"
#include "half_activation.h"
#include "half_gradients.h"
#include "half_turns.h"
#include "relay.h"

namespace turnout {

#if defined(TURNOUT_MATRIX_UNIT)

template <class T>
class HalfBackward {
  static constexpr int P = sizeof(T) == sizeof(bfloat) ? 1 : PLANES;
  typedef HalfBlock<P> Rows;

 public:
  explicit HalfBackward(const Job& job)
      : job_(job),
        routes_(job.routes, job.tokens, job.experts, job.assignments),
        parts_(activation(job.kind).parts),
        slopes_(half_slopes<P>(job.kind)),
        before_(parts_ * job.hidden),
        gradients_(job, routes_, before_),
        units_(units_of_experts(routes_, job, gradients_.are_short())),
        relay_(units_),
        sums_(job, routes_, P == 1 ? nullptr : job.d_x, units_, P == 1 ? reinterpret_cast<bfloat*>(job.d_x) : nullptr) {}

  void run() {
    long rows = 0;
    for (int e = 0; e < job_.experts; e++)
      if (blocks(e).parts) rows = std::max<long>(rows, blocks(e).size(0));
    const long wide = half_groups(job_.dim) * HALF_GROUP, chunk = std::min(job_.hidden, CHUNK_COLUMNS);
    const long tiles = (rows + UNIT_BLOCK_ROWS - 1) / UNIT_BLOCK_ROWS, panel = half_groups(rows) * P * 2 * HALF_TILE;
    const long depths[] = {job_.dim, rows, parts_ * half_groups(chunk) * HALF_GROUP};
    panel_ = 0;
    for (long depth : depths) panel_ = std::max(panel_, half_groups(depth) * P * 2 * HALF_TILE + 5 * HALF_GROUP);
    const size_t sizes[] = {half_block_floats<P>(rows, job_.dim),
                            half_block_floats<P>(rows, job_.dim),
                            half_block_floats<P>(wide, rows),
                            size_t(out_panels() * panel / 2),
                            half_block_floats<P>(rows, chunk),
                            half_block_floats<P>(rows, parts_ * half_groups(chunk) * HALF_GROUP),
                            half_block_floats<P>(half_groups(chunk) * HALF_GROUP, rows),
                            size_t(STRIP * panel_ / 2),
                            size_t(out_panels() * tiles * (sizeof(HalfSums) / 4)),
                            size_t(rows * LANES),
                            size_t(rows)};
    size_t each = 0;
    for (size_t size : sizes) each += Workspace::padded(size);
    Workspace space(job_.threads * each + Workspace::padded(sums_.floats()) + gradients_.floats());
    for (int i = 0; i < job_.threads; i++) {
      float* taken[11];
      for (int p = 0; p < 11; p++) taken[p] = space.take(sizes[p]);
      const auto half = [&](int p) { return reinterpret_cast<bfloat*>(taken[p]); };
      scratch_.push_back({half(0), half(1), half(2), half(3), half(4), half(5), half(6), half(7),
                          reinterpret_cast<HalfSums*>(taken[8]), taken[9], taken[10]});
    }
    sums_.use(space.take(sums_.floats()));
    gradients_.use(space.take(gradients_.floats()));
    Schedule schedule;
    sums_.plan(schedule);
    for (int e = 0; e < job_.experts; e++)
      if (routes_.start[e] == routes_.start[e + 1]) schedule.add({FILL, e});
    schedule.run(*this, int(job_.threads), job_.parallel);
  }

  void operator()(const Task& task, int worker) {
    if (task.kind == COMPUTE) part(task.index, scratch_[worker]);
    if (task.kind == ADD_UP) sums_.add_up(task.index);
    if (task.kind == CLEAR) sums_.clear(task.index);
    if (task.kind == FILL) gradients_.clear(task.index);
  }

 private:
  static constexpr int64_t CHUNK_COLUMNS = 256;  // of h at a time
  static constexpr int STRIP = 8;                // panels that are packed at once
  static_assert(CHUNK_COLUMNS <= STRIP * HALF_PANEL, "a chunk's columns are packed at once");

  struct Scratch {
    bfloat *x, *d_y;
    bfloat *x_turned, *d_y_panels;  // for the products over rows
    bfloat *h, *d_before, *h_turned, *panel;
    HalfSums* d_x;
    float *dot, *weight;
  };
  struct Block {
    int unit, expert, first, rows;
    bool add;  // to what earlier blocks have left
  };

  Split blocks(int expert) const { return blocks_of_expert(routes_, job_, expert); }
  bool gated() const { return parts_ == 2; }
  long out_panels() const { return (job_.dim + HALF_PANEL - 1) / HALF_PANEL; }
  long saved_panels() const { return (job_.hidden + half_saved_width(gated()) - 1) / half_saved_width(gated()); }

  void part(int index, const Scratch& s) {
    const Tiles tiles(true);
    const Unit& unit = units_[index];
    const Split split = blocks(unit.expert);
    const int start = routes_.start[unit.expert];
    relay_.in_turn(index, [&] {
      if (!unit.first_block) gradients_.open(unit.expert);
    });
    const HalfGradients g = gradients_.of(unit.expert);
    for (int b = unit.first_block; b < unit.end_block; b++)
      block({index, unit.expert, start + split.begin(b), split.size(b), b > 0}, g, s);
    if (unit.end_block < split.parts) return;
    // the last block has its turn after all others had theirs, and read what was saved
    gradients_.close(unit.expert);
    const size_t rows = routes_.start[unit.expert + 1] - start, bytes = rows * saved_panels() * HALF_PANEL * sizeof(T);
    if (job_.give_back) give_back(saved_of(unit.expert, 0, start), bytes);
  }

  void block(const Block& b, const HalfGradients& g, const Scratch& s) {
    const int32_t* const token = routes_.token + b.first;
    const Rows x = x_of(b, s.x), d_y = x_of(b, s.d_y), x_turned = turned_of(b, s.x_turned, job_.dim);
    gather_half(d_y, reinterpret_cast<const T*>(job_.d_y), job_.dim, token);
    if (job_.d_up) {
      gather_half(x, reinterpret_cast<const T*>(job_.x), job_.dim, token);
      turn_block(x_turned, x, half_groups(job_.dim));
    }
    if (job_.d_down)
      for (long p = 0; p < out_panels(); p++) pack_rows(s.d_y_panels + p * rows_panel(b), d_y, p);
    for (int r = 0; r < b.rows; r++) s.weight[r] = job_.weight[routes_.assignment[b.first + r]];
    std::memset(s.dot, 0, sizeof(float) * LANES * b.rows);
    for (long f = 0; f < job_.hidden; f += CHUNK_COLUMNS) {
      const long width = std::min(job_.hidden - f, CHUNK_COLUMNS);
      for (long j = 0; j < width; j += STRIP * HALF_PANEL) h_panels(b, s, f, j, width);
      down_chunk(b, g, s, f, width);
      for (int part = 0; part < parts_; part++) up_chunk(b, g, s, f, width, part);
      if (job_.d_x)
        for (long d = 0; d < job_.dim; d += STRIP * HALF_PANEL) x_panels(b, s, f, width, d);
    }
    finish(b, g, s);
  }

  long rows_panel(const Block& b) const { return half_groups(b.rows) * P * 2 * HALF_TILE; }
  Rows x_of(const Block& b, bfloat* values) const { return {values, b.rows, half_groups(job_.dim)}; }
  Rows h_of(const Block& b, const Scratch& s, long width) const { return {s.h, b.rows, half_groups(width)}; }
  Rows before_of(const Block& b, const Scratch& s, long width, int part) const {
    return Rows{s.d_before, b.rows, parts_ * half_groups(width)}.from(part * half_groups(width));
  }
  // A row for each of so many columns.
  static Rows turned_of(const Block& b, bfloat* values, long columns) {
    return {values, half_groups(columns) * HALF_GROUP, half_groups(b.rows)};
  }
  Held<P>* saved_of(int expert, long panel, int row) const {
    return half_saved(reinterpret_cast<Held<P>*>(job_.saved), routes_, expert, saved_panels(), panel, row);
  }

  // Panels of a strip that begins with `done` of `all` columns behind it.
  static int panels_of(long done, long all) {
    return int(std::min<long>(STRIP, (all - done + HALF_PANEL - 1) / HALF_PANEL));
  }

  // A strip of columns of h and of the gradients before the activation: d_y down^T, and what the activation makes.
  void h_panels(const Block& b, const Scratch& s, long f, long j, long width) const {
    const Rows d_y = x_of(b, s.d_y);
    const T* down = static_cast<const T*>(job_.down) + (b.expert * job_.hidden + f) * job_.dim;
    const int panels = panels_of(j, width);
    for (int p = 0; p < panels; p++) {
      const long column = j + p * HALF_PANEL;
      pack_turned<P>(s.panel + p * panel_, down + column * job_.dim, job_.dim, job_.dim, width - column);
    }
    for (int r = 0; r < b.rows; r += UNIT_BLOCK_ROWS)
      for (int p = 0; p < panels; p++) {
        HalfSums dh;
        multiply_half(d_y, r, s.panel + p * panel_, half_groups(job_.dim), false, dh);
        h_tile(b, s, dh, r, f, j + p * HALF_PANEL, width);
      }
  }

  void h_tile(const Block& b, const Scratch& s, const HalfSums& dh, int r, long f, long j, long width) const {
    const int rows = std::min(UNIT_BLOCK_ROWS, b.rows - r);
    const long panel = (f + j) / half_saved_width(gated()), group = j / HALF_GROUP;
    const Held<P>* const saved = saved_of(b.expert, panel, b.first + r);
    // of the second tile's gates, which may be past the last panel
    const Held<P>* const second = panel + 1 < saved_panels() ? saved_of(b.expert, panel + 1, b.first + r) : nullptr;
    slopes_(dh, saved, gated() ? second : saved + UNIT_ROWS, s.weight + r, rows, h_of(b, s, width).at(group, r),
            before_of(b, s, width, 0).at(group, r), gated() ? before_of(b, s, width, 1).at(group, r) : nullptr,
            s.dot + r * LANES);
  }

  // Rows [f, f + width) of the gradient of down: h^T d_y.
  void down_chunk(const Block& b, const HalfGradients& g, const Scratch& s, long f, long width) {
    const Rows h = h_of(b, s, width), turned = turned_of(b, s.h_turned, width);
    if (job_.d_down) turn_block(turned, h, half_groups(width));
    relay_.in_turn(b.unit, [&] {
      for (long d = 0; job_.d_down && d < job_.dim; d += STRIP * HALF_PANEL)
        over_rows(b, turned, width, s.d_y_panels + d / HALF_PANEL * rows_panel(b), rows_panel(b), job_.dim - d, g.down,
                  g.half_down, f * job_.dim + d, job_.dim);
    });
  }

  // Columns [f, f + width) of a part of the gradient of up: x^T d_before; and of its bias's.
  void up_chunk(const Block& b, const HalfGradients& g, const Scratch& s, long f, long width, int part) {
    const Rows d_before = before_of(b, s, width, part);
    const Rows x_turned = turned_of(b, s.x_turned, job_.dim);
    const long column = part * job_.hidden + f;
    for (int p = 0; job_.d_up && p < panels_of(0, width); p++) pack_rows(s.panel + p * panel_, d_before, p);
    relay_.in_turn(b.unit, [&] {
      if (job_.d_up) over_rows(b, x_turned, job_.dim, s.panel, panel_, width, g.up, g.half_up, column, before_);
      if (g.up_bias) add_block(d_before, width, g.up_bias + column);
    });
  }

  // A product over the rows of a block, to `size` rows of a gradient and up to a strip of its columns.
  void over_rows(const Block& b, const Rows& turned, long size, const bfloat* panels, long panel, long columns,
                 float* sum, bfloat* half, long place, long step) const {
    for (long i = 0; i < size; i += UNIT_BLOCK_ROWS)
      for (int p = 0; p < panels_of(0, columns); p++) {
        const int rows = int(std::min<long>(UNIT_BLOCK_ROWS, size - i));
        const long at = place + i * step + p * HALF_PANEL;
        HalfSums sums;
        multiply_half(turned, i, panels + p * panel, half_groups(b.rows), false, sums);
        put_gradient(sums, rows, columns - p * HALF_PANEL, sum ? sum + at : nullptr, half ? half + at : nullptr, step,
                     b.add);
      }
  }

  // A strip of columns of d_x, from d on: what a chunk's gradients before the activation add to them.
  void x_panels(const Block& b, const Scratch& s, long f, long width, long d) const {
    const T* up = static_cast<const T*>(job_.up) + (b.expert * job_.dim + d) * before_ + f;
    const long groups = half_groups(width), tiles = (b.rows + UNIT_BLOCK_ROWS - 1) / UNIT_BLOCK_ROWS;
    const int panels = panels_of(d, job_.dim);
    for (int p = 0; p < panels; p++)
      for (int part = 0; part < parts_; part++)
        pack_turned<P>(s.panel + p * panel_ + part * groups * P * 2 * HALF_TILE,
                       up + p * HALF_PANEL * before_ + part * job_.hidden, before_, width,
                       job_.dim - d - p * HALF_PANEL);
    const Rows d_before = before_of(b, s, width, 0);
    for (int t = 0; t < tiles; t++)
      for (int p = 0; p < panels; p++)
        multiply_half(d_before, t * UNIT_BLOCK_ROWS, s.panel + p * panel_, parts_ * groups, f > 0,
                      s.d_x[(d / HALF_PANEL + p) * tiles + t]);
  }

  void finish(const Block& b, const HalfGradients& g, const Scratch& s) {
    const float* bias = job_.down_bias ? job_.down_bias + b.expert * job_.dim : nullptr;
    const auto d_y = [&](int r) { return reinterpret_cast<const T*>(job_.d_y) + routes_.token[b.first + r] * job_.dim; };
    for (int r = 0; r < b.rows; r++) {
      const float through_bias = bias ? inner(d_y(r), bias, job_.dim) : 0.0f;
      if (job_.d_weight) job_.d_weight[routes_.assignment[b.first + r]] = total(load(s.dot + r * LANES)) + through_bias;
      if (job_.d_x) put_x(b, r, s);
    }
    relay_.in_turn(b.unit, [&] {
      for (int r = 0; g.down_bias && r < b.rows; r++) add_scaled(g.down_bias, d_y(r), s.weight[r], job_.dim);
    });
  }

  void put_x(const Block& b, int r, const Scratch& s) const {
    const long tiles = (b.rows + UNIT_BLOCK_ROWS - 1) / UNIT_BLOCK_ROWS;
    const int row = b.first + r, i = r % UNIT_BLOCK_ROWS;
    for (long d = 0; d < job_.dim; d += HALF_PANEL) {
      const HalfSums& sums = s.d_x[d / HALF_PANEL * tiles + r / UNIT_BLOCK_ROWS];
      const __m512 low = (__m512)load(sums.sum[0][i]), high = (__m512)load(sums.sum[1][i]);
      const __mmask32 mask = first_lanes(job_.dim - d);
      if (P == 1 && sums_.direct()) {
        _mm512_mask_storeu_epi16(sums_.half_place(row) + d, mask, (__m512i)_mm512_cvtne2ps_pbh(high, low));
      } else {
        float* const place = sums_.place(b.unit, row) + d;
        _mm512_mask_storeu_ps(place, __mmask16(mask), low);
        _mm512_mask_storeu_ps(place + UNIT_ROWS, __mmask16(mask >> UNIT_ROWS), high);
      }
    }
  }

  const Job& job_;
  const Routes routes_;
  const int parts_;
  const HalfSlopes<P> slopes_;
  const long before_;  // columns before the activation
  long panel_ = 0;     // values of the largest panel, and from one of a strip to the next
  HalfWeightGradients<T> gradients_;
  const std::vector<Unit> units_;
  Relay relay_;
  RowSums sums_;
  std::vector<Scratch> scratch_;
};

#endif

}  // namespace turnout

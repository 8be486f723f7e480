// The backward pass on the matrix unit: what backward.h does, with rows, weights and their gradients in bfloat.
//
// Products over the rows of a block, for the gradients of weights, take one factor's columns as rows (half_turns.h) and
// the other's rows in pairs; products with a weight's transpose exchange words of two of its columns.
#pragma once

#include <vector>

#include "half_activation.h"
#include "half_gradients.h"
#include "half_turns.h"

namespace turnout {

#if defined(TURNOUT_MATRIX_UNIT)

class HalfBackward {
 public:
  explicit HalfBackward(const Job& job)
      : job_(job),
        routes_(job.routes, job.tokens, job.experts, job.assignments),
        parts_(activation(job.kind).parts),
        slopes_(half_slopes(job.kind)),
        before_(parts_ * job.hidden),
        units_(parts_of_experts(routes_, job)),
        gradients_(job, routes_, units_, before_),
        sums_(job, routes_, nullptr, units_, reinterpret_cast<bfloat*>(job.d_x)) {}

  void run() {
    long rows = 0;
    for (int e = 0; e < job_.experts; e++)
      if (blocks(e).parts) rows = std::max<long>(rows, blocks(e).size(0));
    const long wide = half_groups(job_.dim) * HALF_GROUP, chunk = std::min(job_.hidden, CHUNK_COLUMNS);
    const long tiles = (rows + UNIT_BLOCK_ROWS - 1) / UNIT_BLOCK_ROWS, panel = half_groups(rows) * 2 * HALF_TILE;
    const long deepest = std::max({half_groups(job_.dim), half_groups(rows), parts_ * half_groups(chunk)});
    const size_t sizes[] = {half_block_floats(rows, job_.dim),
                            half_block_floats(rows, job_.dim),
                            half_block_floats(wide, rows),
                            size_t(out_panels() * panel / 2),
                            half_block_floats(rows, chunk),
                            half_block_floats(rows, parts_ * half_groups(chunk) * HALF_GROUP),
                            half_block_floats(half_groups(chunk) * HALF_GROUP, rows),
                            size_t(deepest * HALF_TILE),
                            size_t(out_panels() * tiles * (sizeof(HalfSums) / 4)),
                            size_t(rows * LANES),
                            size_t(rows),
                            gradients_.thread_floats()};
    size_t each = 0;
    for (size_t size : sizes) each += Workspace::padded(size);
    Workspace space(job_.threads * each + Workspace::padded(sums_.floats()) + gradients_.floats());
    for (int i = 0; i < job_.threads; i++) {
      float* taken[12];
      for (int p = 0; p < 12; p++) taken[p] = space.take(sizes[p]);
      const auto half = [&](int p) { return reinterpret_cast<bfloat*>(taken[p]); };
      scratch_.push_back({half(0), half(1), half(2), half(3), half(4), half(5), half(6), half(7),
                          reinterpret_cast<HalfSums*>(taken[8]), taken[9], taken[10], taken[11]});
    }
    sums_.use(space.take(sums_.floats()));
    gradients_.use(space.take(gradients_.floats()));
    Schedule schedule;
    plan(schedule);
    schedule.run(*this, int(job_.threads), job_.parallel);
  }

  void operator()(const Task& task, int worker) {
    if (task.kind == COMPUTE) part(task.index, scratch_[worker]);
    if (task.kind == ADD_UP) sums_.add_up(task.index);
    if (task.kind == CLEAR) sums_.clear(task.index);
    if (task.kind == REDUCE) gradients_.reduce(task.index);
    if (task.kind == FILL) gradients_.clear(task.index);
  }

 private:
  static constexpr int64_t CHUNK_COLUMNS = 256;  // of h at a time

  struct Scratch {
    bfloat *x, *d_y;
    bfloat *x_turned, *d_y_panels;  // for the products over rows
    bfloat *h, *d_before, *h_turned, *panel;
    HalfSums* d_x;
    float *dot, *weight, *gradients;
  };
  struct Block {
    int unit, expert, first, rows;
    bool add;  // to what an earlier block has left
  };

  Split blocks(int expert) const { return blocks_of_expert(routes_, job_, expert); }
  bool gated() const { return parts_ == 2; }
  long out_panels() const { return (job_.dim + HALF_PANEL - 1) / HALF_PANEL; }
  long saved_panels() const { return (job_.hidden + half_saved_width(gated()) - 1) / half_saved_width(gated()); }

  void plan(Schedule& schedule) {
    std::vector<int> group_of(job_.experts, -1), also;
    for (const Unit& unit : units_)
      if (unit.part == 1) group_of[unit.expert] = schedule.group();
    for (const Unit& unit : units_) also.push_back(group_of[unit.expert]);
    sums_.plan(schedule, also);
    for (int e = 0; e < job_.experts; e++) {
      if (group_of[e] >= 0) schedule.add({REDUCE, e, group_of[e]});
      if (routes_.start[e] == routes_.start[e + 1]) schedule.add({FILL, e});
    }
  }

  void part(int index, const Scratch& s) const {
    const Tiles tiles(true);
    const Unit& unit = units_[index];
    const Split split = blocks(unit.expert);
    const int start = routes_.start[unit.expert];
    const HalfGradients g = gradients_.of(unit, split.parts == 1, s.gradients);
    if (g.up_bias) std::memset(g.up_bias, 0, before_ * sizeof(float));
    if (g.down_bias) std::memset(g.down_bias, 0, job_.dim * sizeof(float));
    for (int b = unit.first_block; b < unit.end_block; b++)
      block({index, unit.expert, start + split.begin(b), split.size(b), b > unit.first_block}, g, s);
    if (gradients_.parts(unit.expert) > 1) return;
    if (split.parts > 1) gradients_.round(unit.expert, g);
    const size_t size = saved_panels() * HALF_PANEL;
    if (job_.give_back) give_back(saved_of(unit.expert, 0, start), unit.rows * size * sizeof(bfloat));
  }

  void block(const Block& b, const HalfGradients& g, const Scratch& s) const {
    const int32_t* const token = routes_.token + b.first;
    const HalfBlock x = {s.x, b.rows}, d_y = {s.d_y, b.rows}, x_turned = {s.x_turned, half_groups(job_.dim) * HALF_GROUP};
    gather_half(d_y, reinterpret_cast<const bfloat*>(job_.d_y), job_.dim, token);
    if (job_.d_up) {
      gather_half(x, reinterpret_cast<const bfloat*>(job_.x), job_.dim, token);
      turn_block(x_turned, x, half_groups(job_.dim));
    }
    if (job_.d_down)
      for (long p = 0; p < out_panels(); p++) pack_rows(s.d_y_panels + p * rows_panel(b), d_y, p);
    for (int r = 0; r < b.rows; r++) s.weight[r] = job_.weight[routes_.assignment[b.first + r]];
    std::memset(s.dot, 0, sizeof(float) * LANES * b.rows);
    for (long f = 0; f < job_.hidden; f += CHUNK_COLUMNS) {
      const long width = std::min(job_.hidden - f, CHUNK_COLUMNS);
      for (long j = 0; j < width; j += HALF_PANEL) h_panel(b, s, f, j, width);
      if (job_.d_down) down_chunk(b, g, s, f, width);
      if (job_.d_up || job_.d_up_bias)
        for (int part = 0; part < parts_; part++) up_chunk(b, g, s, f, width, part);
      if (job_.d_x)
        for (long d = 0; d < job_.dim; d += HALF_PANEL) x_panel(b, s, f, width, d);
    }
    finish(b, g, s);
  }

  long rows_panel(const Block& b) const { return half_groups(b.rows) * 2 * HALF_TILE; }
  HalfBlock before_of(const Block& b, const Scratch& s, long width, int part) const {
    return {s.d_before + part * half_groups(width) * b.rows * HALF_GROUP, b.rows};
  }
  bfloat* saved_of(int expert, long panel, int row) const {
    return half_saved(reinterpret_cast<bfloat*>(job_.saved), routes_, expert, saved_panels(), panel, row);
  }

  // HALF_PANEL columns of h and of the gradients before the activation: d_y down^T, and what the activation makes.
  void h_panel(const Block& b, const Scratch& s, long f, long j, long width) const {
    const HalfBlock d_y = {s.d_y, b.rows}, h = {s.h, b.rows};
    const bfloat* down = static_cast<const bfloat*>(job_.down) + (b.expert * job_.hidden + f + j) * job_.dim;
    pack_turned(s.panel, down, job_.dim, job_.dim, width - j);
    const long panel = (f + j) / half_saved_width(gated()), group = j / HALF_GROUP;
    for (int r = 0; r < b.rows; r += UNIT_BLOCK_ROWS) {
      const int rows = std::min(UNIT_BLOCK_ROWS, b.rows - r);
      HalfSums dh;
      multiply_half(d_y.at(0, r), d_y.group_bytes(), s.panel, half_groups(job_.dim), rows > UNIT_ROWS, false, dh);
      const bfloat* const saved = saved_of(b.expert, panel, b.first + r);
      // of the second tile's gates, which may be past the last panel
      const bfloat* const second = panel + 1 < saved_panels() ? saved_of(b.expert, panel + 1, b.first + r) : nullptr;
      slopes_(dh, saved, gated() ? second : saved + UNIT_ROWS, s.weight + r, rows, h.at(group, r),
              before_of(b, s, width, 0).at(group, r), gated() ? before_of(b, s, width, 1).at(group, r) : nullptr,
              s.dot + r * LANES);
    }
  }

  // Rows [f, f + width) of the gradient of down: h^T d_y.
  void down_chunk(const Block& b, const HalfGradients& g, const Scratch& s, long f, long width) const {
    const HalfBlock h = {s.h, b.rows}, turned = {s.h_turned, half_groups(width) * HALF_GROUP};
    turn_block(turned, h, half_groups(width));
    for (long d = 0; d < job_.dim; d += HALF_PANEL)
      over_rows(b, turned, width, s.d_y_panels + d / HALF_PANEL * rows_panel(b), job_.dim - d, g.down, g.half_down,
                f * job_.dim + d, job_.dim);
  }

  // Columns [f, f + width) of a part of the gradient of up: x^T d_before; and of its bias's.
  void up_chunk(const Block& b, const HalfGradients& g, const Scratch& s, long f, long width, int part) const {
    const HalfBlock d_before = before_of(b, s, width, part);
    const HalfBlock x_turned = {s.x_turned, half_groups(job_.dim) * HALF_GROUP};
    for (long j = 0; j < width; j += HALF_PANEL) {
      const long column = part * job_.hidden + f + j, left = width - j;
      if (job_.d_up) {
        pack_rows(s.panel, d_before, j / HALF_GROUP);
        over_rows(b, x_turned, job_.dim, s.panel, left, g.up, g.half_up, column, before_);
      }
      if (g.up_bias)
        for (int r = 0; r < b.rows; r++)
          for (long c = 0; c < std::min<long>(left, HALF_PANEL); c++)
            g.up_bias[column + c] += value(d_before.at(j / HALF_GROUP, r)[c]);
    }
  }

  // A product over the rows of a block, to `size` rows of a gradient and as many columns as a panel has.
  void over_rows(const Block& b, const HalfBlock& turned, long size, const bfloat* panel, long columns, float* sum,
                 bfloat* half, long place, long step) const {
    for (long i = 0; i < size; i += UNIT_BLOCK_ROWS) {
      const int rows = int(std::min<long>(UNIT_BLOCK_ROWS, size - i));
      HalfSums sums;
      multiply_half(turned.at(0, i), turned.group_bytes(), panel, half_groups(b.rows), rows > UNIT_ROWS, false, sums);
      put_gradient(sums, rows, columns, sum ? sum + place + i * step : nullptr, half ? half + place + i * step : nullptr,
                   step, b.add);
    }
  }

  // HALF_PANEL columns of d_x, from d on: what a chunk's gradients before the activation add to them.
  void x_panel(const Block& b, const Scratch& s, long f, long width, long d) const {
    const bfloat* up = static_cast<const bfloat*>(job_.up) + (b.expert * job_.dim + d) * before_ + f;
    const long groups = half_groups(width), tiles = (b.rows + UNIT_BLOCK_ROWS - 1) / UNIT_BLOCK_ROWS;
    for (int part = 0; part < parts_; part++)
      pack_turned(s.panel + part * groups * 2 * HALF_TILE, up + part * job_.hidden, before_, width, job_.dim - d);
    const HalfBlock d_before = before_of(b, s, width, 0);
    for (int t = 0; t < tiles; t++) {
      const int r = t * UNIT_BLOCK_ROWS;
      multiply_half(d_before.at(0, r), d_before.group_bytes(), s.panel, parts_ * groups, b.rows - r > UNIT_ROWS, f > 0,
                    s.d_x[d / HALF_PANEL * tiles + t]);
    }
  }

  void finish(const Block& b, const HalfGradients& g, const Scratch& s) const {
    const float* bias = job_.down_bias ? job_.down_bias + b.expert * job_.dim : nullptr;
    for (int r = 0; r < b.rows; r++) {
      const bfloat* d_y = reinterpret_cast<const bfloat*>(job_.d_y) + routes_.token[b.first + r] * job_.dim;
      float through_bias = 0;
      if (bias)
        for (long d = 0; d < job_.dim; d++) through_bias += value(d_y[d]) * bias[d];
      if (job_.d_weight) job_.d_weight[routes_.assignment[b.first + r]] = total(load(s.dot + r * LANES)) + through_bias;
      if (g.down_bias)
        for (long d = 0; d < job_.dim; d++) g.down_bias[d] += s.weight[r] * value(d_y[d]);
      if (job_.d_x) put_x(b, r, s);
    }
  }

  void put_x(const Block& b, int r, const Scratch& s) const {
    const long tiles = (b.rows + UNIT_BLOCK_ROWS - 1) / UNIT_BLOCK_ROWS;
    const int row = b.first + r, i = r % UNIT_BLOCK_ROWS;
    for (long d = 0; d < job_.dim; d += HALF_PANEL) {
      const HalfSums& sums = s.d_x[d / HALF_PANEL * tiles + r / UNIT_BLOCK_ROWS];
      const __m512 low = (__m512)load(sums.sum[0][i]), high = (__m512)load(sums.sum[1][i]);
      const __mmask32 mask = first_lanes(job_.dim - d);
      if (sums_.direct()) {
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
  const HalfSlopes slopes_;
  const long before_;  // columns before the activation
  const std::vector<Unit> units_;
  HalfWeightGradients gradients_;
  RowSums sums_;
  std::vector<Scratch> scratch_;
};

#endif

}  // namespace turnout

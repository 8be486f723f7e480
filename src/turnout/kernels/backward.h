// Gradients of everything the forward pass read, from its output's gradient and the saved values before the activation.
//
// With dh = d_y down^T, the weight of an assignment has the gradient dh . h, so the experts' outputs are not needed
// again (as in SonicMoE, Guo et al. 2025, arXiv:2512.14080); each expert's weight gradient is written once, in place.
#pragma once

#include <vector>

#include "activation.h"
#include "block.h"
#include "row_sums.h"
#include "tile.h"

namespace turnout {

template <class W>
class Backward {
 public:
  explicit Backward(const Job& job)
      : job_(job),
        routes_(job.routes, job.tokens, job.experts, job.assignments),
        act_(activation(job.kind)),
        before_(act_.parts * job.hidden),
        out_step_(padded_dim(job.dim)) {}

  void run() {
    const std::vector<Unit> units = parts_of_experts(routes_, job_);
    units_ = &units;
    for (const Unit& unit : units)
      if (unit.part) part_of_extra_.push_back({unit.expert, unit.part});
    num_extra_ = int(part_of_extra_.size());
    RowSums sums(job_, routes_, job_.d_x, units);
    sums_ = &sums;
    const size_t rows = largest_block();
    const size_t sizes[] = {size_t(block_size(rows, job_.dim)), size_t(block_size(rows, job_.dim)), rows * STEP,
                            act_.parts * rows * STEP, rows * out_step_,
                            size_t(act_.parts * std::max<long>(job_.dim, CHUNK) * TILE_COLUMNS), rows * LANES, rows, rows * PACKED};
    size_t each = 0;
    for (size_t size : sizes) each += Workspace::padded(size);
    const size_t part = part_floats();
    Workspace space(job_.threads * each + Workspace::padded(sums.floats()) + num_extra_ * part);
    for (int i = 0; i < job_.threads; i++) {
      Scratch s;
      float** pieces[] = {&s.x, &s.d_y, &s.h, &s.d_before, &s.d_x, &s.panel, &s.dot, &s.weight, &s.packed};
      for (int p = 0; p < 9; p++) *pieces[p] = space.take(sizes[p]);
      scratch_.push_back(s);
    }
    sums.use(space.take(sums.floats()));
    extra_ = space.take(num_extra_ * part);
    Schedule schedule;
    plan(schedule, sums);
    schedule.run(*this, int(job_.threads), job_.parallel);
  }

  void operator()(const Task& task, int worker) {
    if (task.kind == COMPUTE) part(task.index, scratch_[worker]);
    if (task.kind == ADD_UP) sums_->add_up(task.index);
    if (task.kind == CLEAR) sums_->clear(task.index);
    if (task.kind == REDUCE) reduce(task.index);
    if (task.kind == FILL) each_gradient(task.index, 0, [](float* sum, size_t n) { std::memset(sum, 0, n * 4); });
  }

 private:
  struct Scratch {
    float *x, *d_y, *h, *d_before, *d_x, *panel, *dot, *weight, *packed;
  };
  struct Gradients {  // of one expert, or one part's share of them; null where not wanted
    float *up, *down, *up_bias, *down_bias;
  };

  Split blocks_of(int expert) const { return blocks_of_expert(routes_, job_, expert); }

  size_t largest_block() const {
    int rows = 0;
    for (int e = 0; e < job_.experts; e++)
      if (blocks_of(e).parts) rows = std::max(rows, blocks_of(e).size(0));
    return rows;
  }

  void plan(Schedule& schedule, RowSums& sums) {
    std::vector<int> group_of(job_.experts, -1), also;
    for (const Unit& unit : *units_) {
      if (unit.part == 1) group_of[unit.expert] = schedule.group();
    }
    for (const Unit& unit : *units_) also.push_back(group_of[unit.expert]);
    sums.plan(schedule, also);
    for (int e = 0; e < job_.experts; e++) {
      if (group_of[e] >= 0) schedule.add({REDUCE, e, group_of[e]});
      if (routes_.start[e] == routes_.start[e + 1]) schedule.add({FILL, e});
    }
  }

  size_t part_floats() const {
    return Workspace::padded(job_.dim * before_) + Workspace::padded(job_.hidden * job_.dim) +
           Workspace::padded(before_) + Workspace::padded(job_.dim);
  }

  Gradients gradients(int expert, int part) const {
    const auto own = [&](float* all, size_t size) { return all ? all + expert * size : nullptr; };
    const size_t sizes[] = {size_t(job_.dim * before_), size_t(job_.hidden * job_.dim), size_t(before_),
                            size_t(job_.dim)};
    if (part == 0)
      return {own(job_.d_up, sizes[0]), own(job_.d_down, sizes[1]), own(job_.d_up_bias, sizes[2]),
              own(job_.d_down_bias, sizes[3])};
    size_t number = 0;
    while (part_of_extra_[number].expert != expert || part_of_extra_[number].part != part) number++;
    float* share = extra_ + number * part_floats();
    float* pieces[4];
    for (int i = 0; i < 4; i++) {
      pieces[i] = share;
      share += Workspace::padded(sizes[i]);
    }
    return {job_.d_up ? pieces[0] : nullptr, job_.d_down ? pieces[1] : nullptr, job_.d_up_bias ? pieces[2] : nullptr,
            job_.d_down_bias ? pieces[3] : nullptr};
  }

  template <class Action>
  void each_gradient(int expert, int part, Action action) const {
    const Gradients g = gradients(expert, part);
    if (g.up) action(g.up, job_.dim * before_);
    if (g.down) action(g.down, job_.hidden * job_.dim);
    if (g.up_bias) action(g.up_bias, before_);
    if (g.down_bias) action(g.down_bias, job_.dim);
  }

  void reduce(int expert) const {
    const Gradients sum = gradients(expert, 0);
    for (const Extra& extra : part_of_extra_) {
      if (extra.expert != expert) continue;
      const Gradients share = gradients(expert, extra.part);
      add(sum.up, share.up, job_.dim * before_);
      add(sum.down, share.down, job_.hidden * job_.dim);
      add(sum.up_bias, share.up_bias, before_);
      add(sum.down_bias, share.down_bias, job_.dim);
    }
  }

  static void add(float* __restrict__ sum, const float* __restrict__ share, long n) {
    if (sum)
      for (long i = 0; i < n; i++) sum[i] += share[i];
  }

  void part(int index, const Scratch& s) const {
    const Unit& unit = (*units_)[index];
    const Split blocks = blocks_of(unit.expert);
    const Gradients g = gradients(unit.expert, unit.part);
    if (g.up_bias) std::memset(g.up_bias, 0, before_ * sizeof(float));
    if (g.down_bias) std::memset(g.down_bias, 0, job_.dim * sizeof(float));
    const bool alone = blocks.parts == 1 && job_.experts * job_.dim * job_.hidden > LARGE;
    for (int b = unit.first_block; b < unit.end_block; b++)
      block(index, routes_.start[unit.expert] + blocks.begin(b), blocks.size(b), g,
            b > unit.first_block ? ADD : alone ? STREAM : SET, s);
  }

  void block(int index, int first, int rows, const Gradients& g, Put put, const Scratch& s) const {
    const int expert = (*units_)[index].expert, parts = act_.parts;
    const W* up = static_cast<const W*>(job_.up) + expert * job_.dim * before_;
    const W* down = static_cast<const W*>(job_.down) + expert * job_.hidden * job_.dim;
    const long panels = (job_.hidden + TILE_COLUMNS - 1) / TILE_COLUMNS;
    const float* saved = job_.saved + first * panels * parts * TILE_COLUMNS;
    if (g.up) gather(s.x, job_.x, job_.dim, routes_.token + first, rows);
    gather(s.d_y, job_.d_y, job_.dim, routes_.token + first, rows);
    for (int r = 0; r < rows; r++) s.weight[r] = job_.weight[routes_.assignment[first + r]];
    std::memset(s.dot, 0, sizeof(float) * LANES * rows);
    for (long f = 0; f < job_.hidden; f += CHUNK) {
      const int width = int(std::min<long>(CHUNK, job_.hidden - f));
      for (int j = 0; j < width; j += TILE_COLUMNS)
        h_panel(rows, s, down + (f + j) * job_.dim, int(std::min(TILE_COLUMNS, width - j)), j,
                saved + (f + j) / TILE_COLUMNS * rows * parts * TILE_COLUMNS);
      if (g.down) multiply_columns(s.h, width, s.d_y, job_.dim, rows, s.packed, g.down + f * job_.dim, job_.dim, put);
      for (int part = 0; part < parts; part++) {
        const float* d_before = s.d_before + part * long(rows) * STEP;
        const long column = part * job_.hidden + f;
        if (g.up) multiply_columns(s.x, job_.dim, d_before, width, rows, s.packed, g.up + column, before_, put);
        if (g.up_bias) add_rows(d_before, width, rows, g.up_bias + column);
      }
      if (job_.d_x)
        for (long d = 0; d < job_.dim; d += TILE_COLUMNS)
          x_panel(rows, s, up + d * before_ + f, width, d, f ? ADD : SET);
    }
    finish(index, first, rows, g, s);
    if (job_.give_back) give_back(const_cast<float*>(saved), rows * panels * parts * TILE_COLUMNS * sizeof(float));
  }

  // TILE_COLUMNS columns of h and of the gradients before the activation: d_y down^T, and what the activation makes.
  void h_panel(int rows, const Scratch& s, const W* down, int columns, int j, const float* saved) const {
    pack_transposed(s.panel, down, job_.dim, columns, int(job_.dim));
    // the rows of the panel to come lie together
    const char* ahead = reinterpret_cast<const char*>(down + TILE_COLUMNS * job_.dim);
    alignas(64) float dh[TILE_ROWS * TILE_COLUMNS];
    const Split tiles(rows, TILE_ROWS);
    for (int t = 0; t < tiles.parts; t++) {
      const int first = tiles.begin(t);
      const Product product = {s.d_y + first * STEP, long(rows) * STEP, s.panel, TILE_COLUMNS,
                               int(chunks_of(job_.dim)), CHUNK, last_chunk(job_.dim), ahead, 128};
      ahead += job_.dim / 8 * 128;
      rows_tile(tiles.size(t))(product, dh, TILE_COLUMNS, SET);
      act_.backward(dh, saved + first * act_.parts * TILE_COLUMNS, s.weight + first, tiles.size(t),
                    s.h + first * STEP + j, s.d_before + first * STEP + j, long(rows) * STEP, s.dot + first * LANES);
    }
  }

  // TILE_COLUMNS columns of d_x, from d on: what `width` columns before the activation, gate and up, add to them.
  void x_panel(int rows, const Scratch& s, const W* up, int width, long d, Put put) const {
    const int columns = int(std::min<long>(TILE_COLUMNS, job_.dim - d));
    for (int part = 0; part < act_.parts; part++)
      pack_transposed(s.panel + part * width * TILE_COLUMNS, up + part * job_.hidden, before_, columns, width);
    const Split tiles(rows, TILE_ROWS);
    for (int t = 0; t < tiles.parts; t++) {
      const Product product = {s.d_before + tiles.begin(t) * STEP, long(rows) * STEP, s.panel, TILE_COLUMNS, act_.parts, width, width,
                               reinterpret_cast<const char*>(s.panel), 0};
      put_tile(rows_tile(tiles.size(t)), product, tiles.size(t), columns, s.d_x + tiles.begin(t) * out_step_ + d,
               out_step_, put);
    }
  }

  static void add_rows(const float* block, int columns, int rows, float* __restrict__ sum) {
    for (int r = 0; r < rows; r++)
      for (int j = 0; j < columns; j++) sum[j] += block[r * STEP + j];
  }

  void finish(int index, int first, int rows, const Gradients& g, const Scratch& s) const {
    const int expert = (*units_)[index].expert;
    const float* bias = job_.down_bias ? job_.down_bias + expert * job_.dim : nullptr;
    for (int r = 0; r < rows; r++) {
      const float* __restrict__ d_y = job_.d_y + routes_.token[first + r] * job_.dim;
      float through_bias = 0;
      if (bias)
        for (long d = 0; d < job_.dim; d++) through_bias += d_y[d] * bias[d];
      if (job_.d_weight) job_.d_weight[routes_.assignment[first + r]] = total(load(s.dot + r * LANES)) + through_bias;
      if (g.down_bias)
        for (long d = 0; d < job_.dim; d++) g.down_bias[d] += s.weight[r] * d_y[d];
      if (job_.d_x) std::memcpy(sums_->place(index, first + r), s.d_x + r * out_step_, job_.dim * sizeof(float));
    }
  }

  static constexpr long LARGE = 4 << 20;  // weights: beyond it gradients do not stay in any cache

  struct Extra {
    int expert, part;
  };

  const Job& job_;
  const Routes routes_;
  const Activation& act_;
  const long before_, out_step_;
  const std::vector<Unit>* units_ = nullptr;
  RowSums* sums_ = nullptr;
  std::vector<Scratch> scratch_;
  std::vector<Extra> part_of_extra_;  // shares of parts after the first
  int num_extra_ = 0;
  float* extra_ = nullptr;
};

}  // namespace turnout

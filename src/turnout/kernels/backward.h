// Gradients of everything the forward pass read, from its output's gradient and the saved values before the activation.
//
// With dh = d_y down^T, the weight of an assignment has the gradient dh . h, so the experts' outputs are not needed
// again (as in SonicMoE, Guo et al. 2025, arXiv:2512.14080); each expert's weight gradient is written once, in place.
#pragma once

#include <vector>

#include "activation.h"
#include "biases.h"
#include "block.h"
#include "relay.h"
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
    const std::vector<Unit> units = units_of_experts(routes_, job_);
    units_ = &units;
    Relay relay(units);
    relay_ = &relay;
    RowSums sums(job_, routes_, job_.d_x, units);
    sums_ = &sums;
    const size_t rows = largest_block();
    const size_t sizes[] = {size_t(block_size(rows, job_.dim)), size_t(block_size(rows, job_.dim)), rows * STEP,
                            act_.parts * rows * STEP, rows * out_step_,
                            size_t(act_.parts * std::max<long>(job_.dim, CHUNK) * TILE_COLUMNS), rows * LANES, rows, rows * PACKED};
    size_t each = 0;
    for (size_t size : sizes) each += Workspace::padded(size);
    Workspace space(job_.threads * each + Workspace::padded(sums.floats()));
    for (int i = 0; i < job_.threads; i++) {
      Scratch s;
      float** pieces[] = {&s.x, &s.d_y, &s.h, &s.d_before, &s.d_x, &s.panel, &s.dot, &s.weight, &s.packed};
      for (int p = 0; p < 9; p++) *pieces[p] = space.take(sizes[p]);
      scratch_.push_back(s);
    }
    sums.use(space.take(sums.floats()));
    Schedule schedule;
    sums.plan(schedule);
    for (int e = 0; e < job_.experts; e++)
      if (routes_.start[e] == routes_.start[e + 1]) schedule.add({FILL, e});
    schedule.run(*this, int(job_.threads), job_.parallel);
  }

  void operator()(const Task& task, int worker) {
    if (task.kind == COMPUTE) part(task.index, scratch_[worker]);
    if (task.kind == ADD_UP) sums_->add_up(task.index);
    if (task.kind == CLEAR) sums_->clear(task.index);
    if (task.kind == FILL) clear(task.index);
  }

 private:
  struct Scratch {
    float *x, *d_y, *h, *d_before, *d_x, *panel, *dot, *weight, *packed;
  };
  struct Gradients {  // of one expert; null where not wanted
    float *up, *down, *up_bias, *down_bias;
  };

  Split blocks_of(int expert) const { return blocks_of_expert(routes_, job_, expert); }

  size_t largest_block() const {
    int rows = 0;
    for (int e = 0; e < job_.experts; e++)
      if (blocks_of(e).parts) rows = std::max(rows, blocks_of(e).size(0));
    return rows;
  }

  Gradients gradients(int expert) const {
    const auto own = [&](float* all, long size) { return all ? all + expert * size : nullptr; };
    return {own(job_.d_up, job_.dim * before_), own(job_.d_down, job_.hidden * job_.dim), own(job_.d_up_bias, before_),
            own(job_.d_down_bias, job_.dim)};
  }

  // Of an expert without rows.
  void clear(int expert) const {
    const Gradients g = gradients(expert);
    if (g.up) std::memset(g.up, 0, job_.dim * before_ * sizeof(float));
    if (g.down) std::memset(g.down, 0, job_.hidden * job_.dim * sizeof(float));
    clear_biases(g);
  }
  void clear_biases(const Gradients& g) const {
    if (g.up_bias) std::memset(g.up_bias, 0, before_ * sizeof(float));
    if (g.down_bias) std::memset(g.down_bias, 0, job_.dim * sizeof(float));
  }

  void part(int index, const Scratch& s) const {
    const Unit& unit = (*units_)[index];
    const Split blocks = blocks_of(unit.expert);
    const Gradients g = gradients(unit.expert);
    relay_->in_turn(index, [&] {
      if (!unit.first_block) clear_biases(g);
    });
    const bool alone = blocks.parts == 1 && job_.experts * job_.dim * job_.hidden > LARGE;
    for (int b = unit.first_block; b < unit.end_block; b++)
      block(index, routes_.start[unit.expert] + blocks.begin(b), blocks.size(b), g, b ? ADD : alone ? STREAM : SET, s);
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
      add_chunk(index, rows, f, width, g, put, s);
      if (job_.d_x)
        for (long d = 0; d < job_.dim; d += TILE_COLUMNS)
          x_panel(rows, s, up + d * before_ + f, width, d, f ? ADD : SET);
    }
    finish(index, first, rows, g, s);
    if (job_.give_back) give_back(const_cast<float*>(saved), rows * panels * parts * TILE_COLUMNS * sizeof(float));
  }

  // What a block's columns [f, f + width) of h, and of the gradients before the activation, add to gradients of weights.
  void add_chunk(int index, int rows, long f, int width, const Gradients& g, Put put, const Scratch& s) const {
    relay_->in_turn(index, [&] {
      if (g.down) multiply_columns(s.h, width, s.d_y, job_.dim, rows, s.packed, g.down + f * job_.dim, job_.dim, put);
    });
    for (int part = 0; part < act_.parts; part++)
      relay_->in_turn(index, [&] {
        const float* d_before = s.d_before + part * long(rows) * STEP;
        const long column = part * job_.hidden + f;
        if (g.up) multiply_columns(s.x, job_.dim, d_before, width, rows, s.packed, g.up + column, before_, put);
        if (g.up_bias) add_rows(d_before, width, rows, g.up_bias + column);
      });
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
    // two lines of each row of the panel to come
    const char* ahead = reinterpret_cast<const char*>(up + TILE_COLUMNS * before_);
    for (int t = 0; t < tiles.parts; t++, ahead += 128) {
      const Product product = {s.d_before + tiles.begin(t) * STEP, long(rows) * STEP, s.panel, TILE_COLUMNS, act_.parts, width, width,
                               ahead, before_ * long(sizeof(W))};
      put_tile(rows_tile(tiles.size(t)), product, tiles.size(t), columns, s.d_x + tiles.begin(t) * out_step_ + d,
               out_step_, put);
    }
  }

  static void add_rows(const float* block, int columns, int rows, float* __restrict__ sum) {
    for (int r = 0; r < rows; r++)
      for (int j = 0; j < columns; j++) sum[j] += block[r * STEP + j];
  }

  void finish(int index, int first, int rows, const Gradients& g, const Scratch& s) const {
    const float* bias = job_.down_bias ? job_.down_bias + (*units_)[index].expert * job_.dim : nullptr;
    const auto d_y = [&](int r) { return job_.d_y + routes_.token[first + r] * job_.dim; };
    for (int r = 0; r < rows; r++) {
      const float through_bias = bias ? inner(d_y(r), bias, job_.dim) : 0.0f;
      if (job_.d_weight) job_.d_weight[routes_.assignment[first + r]] = total(load(s.dot + r * LANES)) + through_bias;
      if (job_.d_x) std::memcpy(sums_->place(index, first + r), s.d_x + r * out_step_, job_.dim * sizeof(float));
    }
    relay_->in_turn(index, [&] {
      for (int r = 0; g.down_bias && r < rows; r++) add_scaled(g.down_bias, d_y(r), s.weight[r], job_.dim);
    });
  }

  static constexpr long LARGE = 4 << 20;  // weights: beyond it gradients do not stay in any cache

  const Job& job_;
  const Routes routes_;
  const Activation& act_;
  const long before_, out_step_;
  const std::vector<Unit>* units_ = nullptr;
  RowSums* sums_ = nullptr;
  Relay* relay_ = nullptr;
  std::vector<Scratch> scratch_;
};

}  // namespace turnout

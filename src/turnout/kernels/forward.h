// y[t] = sum over the token's rows of weight * (act(x up + bias) down + bias), block of rows by block of rows.
#pragma once

#include <vector>

#include "activation.h"
#include "block.h"
#include "row_sums.h"
#include "tile.h"

namespace turnout {

template <class W>
class Forward {
 public:
  explicit Forward(const Job& job)
      : job_(job),
        routes_(job.routes, job.tokens, job.experts, job.assignments),
        act_(activation(job.kind)),
        before_(act_.parts * job.hidden),
        out_step_(padded_dim(job.dim)) {}

  void run() {
    const std::vector<Unit> units = blocks();
    units_ = &units;
    RowSums sums(job_, routes_, job_.y, units);
    sums_ = &sums;
    long rows = 0;
    for (const Unit& unit : units) rows = std::max<long>(rows, unit.rows);
    const size_t sizes[] = {size_t(block_size(rows, job_.dim)), size_t(rows * STEP), size_t(rows * out_step_),
                            size_t(2 * panel_size())};
    size_t each = 0;
    for (size_t size : sizes) each += Workspace::padded(size);
    Workspace space(job_.threads * each + Workspace::padded(sums.floats()));
    for (int i = 0; i < job_.threads; i++)
      scratch_.push_back({space.take(sizes[0]), space.take(sizes[1]), space.take(sizes[2]), space.take(sizes[3])});
    sums.use(space.take(sums.floats()));
    Schedule schedule;
    sums.plan(schedule);
    schedule.run(*this, int(job_.threads), job_.parallel);
  }

  void operator()(const Task& task, int worker) {
    if (task.kind == COMPUTE) block(task.index, scratch_[worker]);
    if (task.kind == ADD_UP) sums_->add_up(task.index);
    if (task.kind == CLEAR) sums_->clear(task.index);
  }

 private:
  struct Scratch {
    float *x, *h, *out, *panel;
  };

  std::vector<Unit> blocks() const {
    std::vector<Unit> found;
    for (int e = 0; e < job_.experts; e++) {
      const Split split(routes_.start[e + 1] - routes_.start[e], most_rows(job_.dim));
      for (int b = 0; b < split.parts; b++) found.push_back({e, routes_.start[e] + split.begin(b), split.size(b)});
    }
    return found;
  }

  void block(int index, const Scratch& s) const {
    const Unit& unit = (*units_)[index];
    const W* up = static_cast<const W*>(job_.up) + unit.expert * job_.dim * before_;
    const W* down = static_cast<const W*>(job_.down) + unit.expert * job_.hidden * job_.dim;
    gather(s.x, job_.x, job_.dim, routes_.token + unit.first, unit.rows);
    float* panels[] = {s.panel, s.panel + panel_size()};
    Packer<W> next;
    int turn = 0;
    begin_up(next, up, 0, panels[0]);
    next.finish();
    for (long f = 0; f < job_.hidden; f += CHUNK) {
      const int width = int(std::min<long>(CHUNK, job_.hidden - f));
      for (int j = 0; j < width; j += TILE_COLUMNS) {
        const float* panel = panels[turn];
        turn = 1 - turn;
        if (j + TILE_COLUMNS < width)
          begin_up(next, up, f + j + TILE_COLUMNS, panels[turn]);
        else
          begin_down(next, down, f, 0, width, panels[turn]);
        up_panel(unit, s, panel, f + j, s.h + j, next);
      }
      for (long d = 0; d < job_.dim; d += TILE_COLUMNS) {
        const float* panel = panels[turn];
        turn = 1 - turn;
        if (d + TILE_COLUMNS < job_.dim)
          begin_down(next, down, f, d + TILE_COLUMNS, width, panels[turn]);
        else if (f + CHUNK < job_.hidden)
          begin_up(next, up, f + CHUNK, panels[turn]);
        else
          next.idle();
        down_panel(unit, s, panel, d, width, f ? ADD : SET, next);
      }
    }
    finish(index, s);
  }

  long panel_size() const { return act_.parts * std::max<long>(job_.dim, CHUNK) * TILE_COLUMNS; }

  void begin_up(Packer<W>& next, const W* up, long f, float* panel) const {
    const int columns = int(std::min<long>(TILE_COLUMNS, job_.hidden - f));
    next.begin(up + f, job_.hidden, act_.parts, before_, int(job_.dim), columns, panel);
  }

  void begin_down(Packer<W>& next, const W* down, long f, long d, int depth, float* panel) const {
    const int columns = int(std::min<long>(TILE_COLUMNS, job_.dim - d));
    next.begin(down + f * job_.dim + d, 0, 1, job_.dim, depth, columns, panel);
  }

  // TILE_COLUMNS columns of h, from f on: up, its bias, what is saved of it, the activation.
  void up_panel(const Unit& unit, const Scratch& s, const float* panel, long f, float* h, Packer<W>& next) const {
    const int parts = act_.parts, columns = int(std::min<long>(TILE_COLUMNS, job_.hidden - f));
    alignas(64) float before[2 * TILE_ROWS * TILE_COLUMNS], bias[2 * TILE_COLUMNS] = {};
    for (int part = 0; job_.up_bias && part < parts; part++)
      std::memcpy(bias + part * TILE_COLUMNS, job_.up_bias + unit.expert * before_ + part * job_.hidden + f,
                  columns * sizeof(float));
    const long panels = (job_.hidden + TILE_COLUMNS - 1) / TILE_COLUMNS;
    const long row_size = parts * TILE_COLUMNS;
    float* saved = job_.saved ? job_.saved + (unit.first * panels + f / TILE_COLUMNS * unit.rows) * row_size : nullptr;
    const Split tiles(unit.rows, TILE_ROWS);
    const int share = next.share(tiles.parts);
    for (int t = 0; t < tiles.parts; t++) {
      const int rows = tiles.size(t), first = tiles.begin(t);
      for (int part = 0; part < parts; part++) {
        const Product product = {s.x + first * STEP, long(unit.rows) * STEP,
                                 panel + part * job_.dim * TILE_COLUMNS, TILE_COLUMNS,
                                 int(chunks_of(job_.dim)), CHUNK, last_chunk(job_.dim),
                                 next.ahead(part, share), next.ahead_step()};
        rows_tile(rows)(product, before + part * TILE_ROWS * TILE_COLUMNS, TILE_COLUMNS, SET);
      }
      next.pack(share);
      act_.forward(before, rows, job_.up_bias ? bias : nullptr, saved ? saved + first * row_size : nullptr,
                   h + first * STEP);
    }
  }

  // TILE_COLUMNS columns of the output, from d on: what `depth` columns of h add to them.
  void down_panel(const Unit& unit, const Scratch& s, const float* panel, long d, int depth, Put put,
                  Packer<W>& next) const {
    const int columns = int(std::min<long>(TILE_COLUMNS, job_.dim - d));
    const Split tiles(unit.rows, TILE_ROWS);
    const int share = next.share(tiles.parts);
    for (int t = 0; t < tiles.parts; t++) {
      const int rows = tiles.size(t), first = tiles.begin(t);
      const Product product = {s.h + first * STEP, 0, panel, TILE_COLUMNS, 1, depth, depth,
                               next.ahead(t % 2, share), next.ahead_step()};
      put_tile(rows_tile(rows), product, rows, columns, s.out + first * out_step_ + d, out_step_, put);
      next.pack(share);
    }
  }

  void finish(int index, const Scratch& s) const {
    const Unit& unit = (*units_)[index];
    const float* bias = job_.down_bias ? job_.down_bias + unit.expert * job_.dim : nullptr;
    for (int r = 0; r < unit.rows; r++) {
      const float weight = job_.weight[routes_.assignment[unit.first + r]];
      float* __restrict__ row = sums_->place(index, unit.first + r);
      const float* __restrict__ from = s.out + r * out_step_;
      for (long d = 0; d < job_.dim; d++) row[d] = weight * (bias ? from[d] + bias[d] : from[d]);
    }
  }

  const Job& job_;
  const Routes routes_;
  const Activation& act_;
  const long before_, out_step_;  // columns before the activation; from a row of `out` to the next
  const std::vector<Unit>* units_ = nullptr;
  RowSums* sums_ = nullptr;
  std::vector<Scratch> scratch_;
};

}  // namespace turnout

// The backward pass on the matrix unit: what backward.h does, with rows, weights and their gradients of T: of bfloat, or
// of float in planes of it.
//
// Products with a weight's transpose are computed transposed: down d_y^T in place of d_y down^T, and up d_before^T. The
// weight is then the left factor, read as it lies, and what is turned (half_turns.h) are rows, of which a small expert has
// fewer. Products over the rows of a block, for the gradients of weights, take one factor's columns as rows and the
// other's rows in pairs.
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
  static constexpr long SQUARE = P * HALF_PLANE;  // values of 32 rows and columns

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
    const long tiles = tiles_of(rows), panel = half_groups(rows) * SQUARE;
    const long before = parts_ * half_groups(chunk) * HALF_GROUP;
    const size_t sizes[] = {half_block_floats<P>(rows, job_.dim),
                            half_block_floats<P>(wide, rows),
                            size_t(out_panels() * panel / 2),
                            half_block_floats<P>(half_groups(chunk) * HALF_GROUP, rows),
                            size_t(parts_ * half_groups(chunk) * panel / 2),
                            half_block_floats<P>(rows, before),
                            half_block_floats<P>(STRIP * UNIT_BLOCK_ROWS, std::max(job_.dim, before)),
                            size_t(out_panels() * tiles * (sizeof(HalfSums) / 4)),
                            size_t(rows * LANES),
                            size_t(rows)};
    size_t each = 0;
    for (size_t size : sizes) each += Workspace::padded(size);
    Workspace space(job_.threads * each + Workspace::padded(sums_.floats()) + gradients_.floats());
    for (int i = 0; i < job_.threads; i++) {
      float* taken[10];
      for (int p = 0; p < 10; p++) taken[p] = space.take(sizes[p]);
      const auto half = [&](int p) { return reinterpret_cast<bfloat*>(taken[p]); };
      scratch_.push_back({half(0), half(1), half(2), half(3), half(4), half(5), half(6),
                          reinterpret_cast<HalfSums*>(taken[7]), taken[8], taken[9]});
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
  static constexpr int STRIP = 8;                // tiles of a weight's rows that are split at once,
  static constexpr int SHORT_STRIP = 2;          // or so many where the rows of a block are no more than FEW_TILES
  static constexpr int FEW_TILES = 8;
  static_assert(CHUNK_COLUMNS <= STRIP * HALF_PANEL, "a chunk's gradients are one strip of panels");

  struct Scratch {
    bfloat* d_y_turned;
    bfloat *x_turned, *d_y_panels, *h_turned, *d_before_panels;  // for the products over rows
    bfloat *d_before_turned, *weights;
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
    Ahead ahead;
    tell_down(b, ahead, 0);
    ahead.spread(tiles_of(b.rows) * half_groups(job_.dim));
    for (int r = 0; r < b.rows; r += UNIT_BLOCK_ROWS) take_rows(b, r, s, ahead);
    for (int r = 0; r < b.rows; r++) s.weight[r] = job_.weight[routes_.assignment[b.first + r]];
    std::memset(s.dot, 0, sizeof(float) * LANES * b.rows);
    for (long f = 0; f < job_.hidden; f += CHUNK_COLUMNS) {
      const long width = std::min(job_.hidden - f, CHUNK_COLUMNS);
      for (long j = 0; j < width; j += strip_rows(b)) h_strip(b, s, f, j, width);
      down_chunk(b, g, s, f, width);
      for (int part = 0; part < parts_; part++) up_chunk(b, g, s, f, width, part);
      if (job_.d_x)
        for (long d = 0; d < job_.dim; d += strip_rows(b)) x_strip(b, s, f, width, d);
    }
    finish(b, g, s);
  }

  // Up to 32 rows of x and d_y from r on, as factors.
  void take_rows(const Block& b, int r, const Scratch& s, Ahead& ahead) const {
    const int32_t* const token = routes_.token + b.first + r;
    const auto rows_of = [&](const float* matrix) {
      return HalfRows<T>(b.rows - r, [=](int i) { return reinterpret_cast<const T*>(matrix) + token[i] * job_.dim; });
    };
    HalfRows<T> x = rows_of(job_.x), d_y = rows_of(job_.d_y);
    const Rows x_turned = turned_of(b, s.x_turned, job_.dim);
    const int next_end = std::min(2 * UNIT_BLOCK_ROWS, b.rows - r);
    for (long g = 0; g < half_groups(job_.dim); g++, x.go_on(), d_y.go_on()) {
      const long c = g * HALF_GROUP;
      for (int i = UNIT_BLOCK_ROWS; i < next_end; i++)
        for (const float* matrix : {job_.x, job_.d_y})
          for (long line = c; line < c + HALF_GROUP; line += long(64 / sizeof(T)))
            __builtin_prefetch(reinterpret_cast<const T*>(matrix) + token[i] * job_.dim + line, 0, 3);
      ahead.go_on();
      if (job_.d_up) pair_rows_turned(x_turned.at(r / HALF_GROUP, c), x, job_.dim - c);
      if (job_.d_down) pair_rows(panel_of(b, s.d_y_panels, g, r), d_y, job_.dim - c);
      pair_columns_turned(turned_panel(s.d_y_turned, half_groups(job_.dim), r) + g * SQUARE, d_y, job_.dim - c);
    }
  }

  // In a panel of 32 columns, for a product over rows, those from r on.
  bfloat* panel_of(const Block& b, bfloat* panels, long which, long row) const {
    return panels + (which * half_groups(b.rows) + row / HALF_GROUP) * SQUARE;
  }
  // The panel that has 32 rows as columns.
  static bfloat* turned_panel(bfloat* panels, long groups, long row) {
    return panels + row / UNIT_BLOCK_ROWS * groups * SQUARE;
  }
  // A row for each of so many columns.
  static Rows turned_of(const Block& b, bfloat* values, long columns) {
    return {values, half_groups(columns) * HALF_GROUP, half_groups(b.rows)};
  }
  T* saved_of(int expert, long panel, int row) const {
    return half_saved(reinterpret_cast<T*>(job_.saved), routes_, expert, saved_panels(), panel, row);
  }

  // Short strips are split while their panels stay in the second cache, and the next is fetched meanwhile; of many rows
  // panels are read from beyond it, for every strip.
  static bool is_short(const Block& b) { return b.rows <= FEW_TILES * UNIT_BLOCK_ROWS; }
  static long strip_rows(const Block& b) { return (is_short(b) ? SHORT_STRIP : STRIP) * UNIT_BLOCK_ROWS; }
  static int tiles_of(long rows) { return int((rows + UNIT_BLOCK_ROWS - 1) / UNIT_BLOCK_ROWS); }

  // What a strip of down from row f on is split from, and one of up from row d on, of a chunk's columns.
  void tell_down(const Block& b, Ahead& ahead, long f) const {
    if (!is_short(b)) return;
    const long rows = std::min(strip_rows(b), job_.hidden - f), bytes = job_.dim * long(sizeof(T));
    ahead.add(static_cast<const T*>(job_.down) + (b.expert * job_.hidden + f) * job_.dim, rows, bytes, bytes);
  }
  void tell_up(const Block& b, Ahead& ahead, long d, long f, long width) const {
    if (!job_.d_x || !is_short(b)) return;
    const long rows = std::min(strip_rows(b), job_.dim - d);
    const T* up = static_cast<const T*>(job_.up) + (b.expert * job_.dim + d) * before_ + f;
    for (int part = 0; part < parts_; part++)
      ahead.add(up + part * job_.hidden, rows, width * long(sizeof(T)), before_ * long(sizeof(T)));
  }

  // A strip of columns of h and of the gradients before the activation: d_y down^T, and what the activation makes.
  void h_strip(const Block& b, const Scratch& s, long f, long j, long width) const {
    const Rows down = {s.weights, std::min(strip_rows(b), width - j), half_groups(job_.dim)};
    split_rows(down, static_cast<const T*>(job_.down) + (b.expert * job_.hidden + f + j) * job_.dim, job_.dim, job_.dim);
    Ahead ahead;
    if (j + down.rows < width)
      tell_down(b, ahead, f + j + down.rows);
    else
      tell_up(b, ahead, 0, f, width);
    ahead.spread(tiles_of(b.rows) * tiles_of(down.rows) * down.groups);
    for (int r = 0; r < b.rows; r += UNIT_BLOCK_ROWS)
      for (long i = 0; i < down.rows; i += UNIT_BLOCK_ROWS) {
        HalfSums sums, dh;
        multiply_columns(down, i, turned_panel(s.d_y_turned, down.groups, r), b.rows - r, false, sums, ahead);
        turn_sums(dh, sums);
        h_tile(b, s, dh, r, f, j + i, width);
      }
  }

  void h_tile(const Block& b, const Scratch& s, const HalfSums& dh, int r, long f, long j, long width) const {
    const int rows = std::min(UNIT_BLOCK_ROWS, b.rows - r);
    const long panel = (f + j) / half_saved_width(gated()), group = j / HALF_GROUP, groups = half_groups(width);
    const T* const saved = saved_of(b.expert, panel, b.first + r);
    // of the second tile's gates, which may be past the last panel
    const T* const second = panel + 1 < saved_panels() ? saved_of(b.expert, panel + 1, b.first + r) : nullptr;
    alignas(64) T h[UNIT_BLOCK_ROWS][HALF_GROUP], d_before[2][UNIT_BLOCK_ROWS][HALF_GROUP];
    slopes_(dh, saved, gated() ? second : saved + UNIT_ROWS, s.weight + r, rows, h[0], d_before[0][0], d_before[1][0],
            s.dot + r * LANES);
    const auto rows_of = [&](const T(&tile)[UNIT_BLOCK_ROWS][HALF_GROUP]) {
      return HalfRows<T>(rows, [&](int i) { return tile[i]; });
    };
    if (job_.d_down) pair_rows_turned(turned_of(b, s.h_turned, width).at(r / HALF_GROUP, j), rows_of(h), HALF_GROUP);
    for (int part = 0; part < parts_; part++) {
      const HalfRows<T> own = rows_of(d_before[part]);
      const long at = part * groups + group;
      pair_rows(panel_of(b, s.d_before_panels, at, r), own, HALF_GROUP);
      if (job_.d_x)
        pair_columns_turned(turned_panel(s.d_before_turned, parts_ * groups, r) + at * SQUARE, own, HALF_GROUP);
    }
  }

  // Rows [f, f + width) of the gradient of down: h^T d_y.
  void down_chunk(const Block& b, const HalfGradients& g, const Scratch& s, long f, long width) {
    relay_.in_turn(b.unit, [&] {
      for (long d = 0; job_.d_down && d < job_.dim; d += STRIP * HALF_PANEL)
        over_rows(b, turned_of(b, s.h_turned, width), width, panel_of(b, s.d_y_panels, d / HALF_PANEL, 0),
                  std::min<long>(STRIP * HALF_PANEL, job_.dim - d), g.down, g.half_down, f * job_.dim + d, job_.dim);
    });
  }

  // Columns [f, f + width) of a part of the gradient of up: x^T d_before; and of its bias's.
  void up_chunk(const Block& b, const HalfGradients& g, const Scratch& s, long f, long width, int part) {
    const bfloat* const panels = panel_of(b, s.d_before_panels, part * half_groups(width), 0);
    const long column = part * job_.hidden + f, groups = half_groups(b.rows);
    relay_.in_turn(b.unit, [&] {
      if (job_.d_up)
        over_rows(b, turned_of(b, s.x_turned, job_.dim), job_.dim, panels, width, g.up, g.half_up, column, before_);
      for (long j = 0; g.up_bias && j < width; j += HALF_PANEL)
        add_panel<P>(panels + j / HALF_PANEL * groups * SQUARE, groups, width - j, g.up_bias + column + j);
    });
  }

  // A product over the rows of a block, to `size` rows of a gradient and so many columns. What one tile of it is goes to
  // the gradient while the next is multiplied.
  void over_rows(const Block& b, const Rows& turned, long size, const bfloat* panels, long columns, float* sum,
                 bfloat* half, long place, long step) const {
    const int share = int((UNIT_BLOCK_ROWS + turned.groups - 1) / turned.groups);
    PutGradient puts[2];
    int turn = 0;
    for (long i = 0; i < size; i += UNIT_BLOCK_ROWS)
      for (long c = 0; c < columns; c += HALF_PANEL, turn ^= 1) {
        const long at = place + i * step + c;
        puts[turn].begin(int(std::min<long>(UNIT_BLOCK_ROWS, size - i)), columns - c, sum ? sum + at : nullptr,
                         half ? half + at : nullptr, step, b.add, share);
        multiply_half(turned, i, panels + c / HALF_PANEL * turned.groups * SQUARE, false, puts[turn].sums, puts[turn ^ 1]);
      }
    puts[turn ^ 1].finish();
  }

  // A strip of columns of d_x, from d on, turned: what a chunk's gradients before the activation add to them.
  void x_strip(const Block& b, const Scratch& s, long f, long width, long d) const {
    const long groups = half_groups(width), tiles = tiles_of(b.rows);
    const Rows up = {s.weights, std::min(strip_rows(b), job_.dim - d), parts_ * groups};
    const T* const from = static_cast<const T*>(job_.up) + (b.expert * job_.dim + d) * before_ + f;
    for (int part = 0; part < parts_; part++) split_rows(up.from(part * groups), from + part * job_.hidden, before_, width);
    Ahead ahead;
    if (d + up.rows < job_.dim)
      tell_up(b, ahead, d + up.rows, f, width);
    else
      tell_down(b, ahead, f + width);
    ahead.spread(tiles * tiles_of(up.rows) * up.groups);
    for (int r = 0; r < b.rows; r += UNIT_BLOCK_ROWS)
      for (long i = 0; i < up.rows; i += UNIT_BLOCK_ROWS)
        multiply_columns(up, i, turned_panel(s.d_before_turned, up.groups, r), b.rows - r, f > 0,
                         s.d_x[(d + i) / HALF_PANEL * tiles + r / UNIT_BLOCK_ROWS], ahead);
  }

  void finish(const Block& b, const HalfGradients& g, const Scratch& s) {
    const float* bias = job_.down_bias ? job_.down_bias + b.expert * job_.dim : nullptr;
    const auto d_y = [&](int r) { return reinterpret_cast<const T*>(job_.d_y) + routes_.token[b.first + r] * job_.dim; };
    for (int r = 0; r < b.rows; r++) {
      const float through_bias = bias ? inner(d_y(r), bias, job_.dim) : 0.0f;
      if (job_.d_weight) job_.d_weight[routes_.assignment[b.first + r]] = total(load(s.dot + r * LANES)) + through_bias;
    }
    for (int r = 0; job_.d_x && r < b.rows; r += UNIT_BLOCK_ROWS) put_x(b, r, s);
    relay_.in_turn(b.unit, [&] {
      for (int r = 0; g.down_bias && r < b.rows; r++) add_scaled(g.down_bias, d_y(r), s.weight[r], job_.dim);
    });
  }

  // Up to 32 rows of d_x from r on.
  void put_x(const Block& b, int r, const Scratch& s) const {
    const long tiles = tiles_of(b.rows);
    const int rows = std::min(UNIT_BLOCK_ROWS, b.rows - r);
    for (long d = 0; d < job_.dim; d += HALF_PANEL) {
      HalfSums sums;
      turn_sums(sums, s.d_x[d / HALF_PANEL * tiles + r / UNIT_BLOCK_ROWS]);
      for (int i = 0; i < rows; i++) put_columns(b, r + i, d, load(sums.sum[0][i]), load(sums.sum[1][i]));
    }
  }

  void put_columns(const Block& b, int r, long d, vec low, vec high) const {
    const int row = b.first + r;
    if (P == 1 && sums_.direct())
      put_line(sums_.half_place(row) + d, low, high, job_.dim - d, sums_.streams());
    else
      put_line(sums_.place(b.unit, row) + d, low, high, job_.dim - d, sums_.streams());
  }

  const Job& job_;
  const Routes routes_;
  const int parts_;
  const HalfSlopes<P> slopes_;
  const long before_;  // columns before the activation
  HalfWeightGradients<T> gradients_;
  const std::vector<Unit> units_;
  Relay relay_;
  RowSums sums_;
  std::vector<Scratch> scratch_;
};

#endif

}  // namespace turnout

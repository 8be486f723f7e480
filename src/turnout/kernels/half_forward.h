// The forward pass in bfloat on the matrix unit: products summed in float, the activations between them rounded.
#pragma once

#include <vector>

#include "activation.h"
#include "half_tile.h"
#include "row_sums.h"

namespace turnout {

#if defined(TURNOUT_MATRIX_UNIT)

// Consecutive rows of one expert are a unit: x and a chunk of h stay in the second cache.
inline std::vector<Unit> half_units(const Routes& routes, const Job& job, long row_bytes) {
  constexpr long CACHE_BYTES = 1536 << 10;
  const long most = std::max(64L, std::min(512L, CACHE_BYTES / row_bytes / UNIT_BLOCK_ROWS * UNIT_BLOCK_ROWS));
  std::vector<Unit> found;
  for (int e = 0; e < job.experts; e++) {
    const Split split(routes.start[e + 1] - routes.start[e], int(most));
    for (int b = 0; b < split.parts; b++) found.push_back({e, routes.start[e] + split.begin(b), split.size(b)});
  }
  return found;
}

class HalfForward {
 public:
  explicit HalfForward(const Job& job)
      : job_(job),
        routes_(job.routes, job.tokens, job.experts, job.assignments),
        act_(activation(job.kind)),
        before_(act_.parts * job.hidden),
        units_(half_units(routes_, job, 2 * (job.dim + std::min(job.hidden, CHUNK_COLUMNS)))),
        sums_(job, routes_, nullptr, units_, reinterpret_cast<bfloat*>(job.y)) {}

  void run() {
    long rows = 0;
    for (const Unit& unit : units_) rows = std::max<long>(rows, unit.rows);
    const long chunk = std::min(job_.hidden, CHUNK_COLUMNS), tiles = (rows + UNIT_BLOCK_ROWS - 1) / UNIT_BLOCK_ROWS;
    const size_t sizes[] = {half_block_floats(rows, job_.dim), half_block_floats(rows, chunk),
                            HalfPanels::floats(std::max(job_.dim, chunk)),
                            size_t(job_.hidden > chunk ? out_panels() * tiles * (sizeof(HalfSums) / 4) : 0)};
    size_t each = 0;
    for (size_t size : sizes) each += Workspace::padded(size);
    Workspace space(job_.threads * each + Workspace::padded(sums_.floats()));
    for (int i = 0; i < job_.threads; i++) {
      Scratch s;
      s.x = reinterpret_cast<bfloat*>(space.take(sizes[0]));
      s.h = reinterpret_cast<bfloat*>(space.take(sizes[1]));
      s.panels = reinterpret_cast<bfloat*>(space.take(sizes[2]));
      s.out = reinterpret_cast<HalfSums*>(space.take(sizes[3]));
      scratch_.push_back(s);
    }
    sums_.use(space.take(sums_.floats()));
    Schedule schedule;
    sums_.plan(schedule, std::vector<int>(units_.size(), -1));
    schedule.run(*this, int(job_.threads), job_.parallel);
  }

  void operator()(const Task& task, int worker) {
    if (task.kind == COMPUTE) block(task.index, scratch_[worker]);
    if (task.kind == ADD_UP) sums_.add_up(task.index);
    if (task.kind == CLEAR) sums_.clear(task.index);
  }

 private:
  static constexpr int64_t CHUNK_COLUMNS = 256;  // of h at a time

  struct Scratch {
    bfloat *x, *h, *panels;
    HalfSums* out;  // where more than one chunk adds to it
  };

  bool gated() const { return act_.parts == 2; }
  long width() const { return HalfPanels::width(gated()); }  // columns of h that a panel gives
  long out_panels() const { return (job_.dim + HALF_PANEL - 1) / HALF_PANEL; }

  void block(int index, const Scratch& s) const {
    const Tiles tiles(true);
    const Unit& unit = units_[index];
    const HalfBlock x = {s.x, unit.rows}, h = {s.h, unit.rows};
    gather_half(x, reinterpret_cast<const bfloat*>(job_.x), job_.dim, routes_.token + unit.first);
    for (long f = 0; f < job_.hidden; f += CHUNK_COLUMNS) {
      const long end = std::min(job_.hidden, f + CHUNK_COLUMNS);
      for (long j = f; j < end; j += HalfPanels::strip(job_.dim, gated())) up_panels(unit, x, h, j, f, end, s);
      // what is beyond the last panel but in its group
      const long columns = (end - f + width() - 1) / width() * width();
      if (columns % HALF_GROUP)
        for (int r = 0; r < unit.rows; r++) _mm256_storeu_si256(half_line(h, columns, r), _mm256_setzero_si256());
      for (long d = 0; d < job_.dim; d += HalfPanels::strip(end - f, false)) down_panels(index, h, d, f, end, s);
    }
  }

  static __m256i* half_line(const HalfBlock& h, long column, int row) {
    return reinterpret_cast<__m256i*>(h.at(column / HALF_GROUP, row) + column % HALF_GROUP);
  }

  // Panels of h from column j on, of the chunk [f, end): up, its bias, the activation.
  void up_panels(const Unit& unit, const HalfBlock& x, const HalfBlock& h, long j, long f, long end,
                 const Scratch& s) const {
    const bfloat* up = static_cast<const bfloat*>(job_.up) + unit.expert * job_.dim * before_ + j;
    const HalfPanels panels(up, before_, job_.dim, end - j, gated() ? job_.hidden : 0);
    panels.pack(s.panels);
    for (int p = 0; p < panels.number; p++, j += width())
      for (int r = 0; r < unit.rows; r += UNIT_BLOCK_ROWS) {
        const int rows = std::min(UNIT_BLOCK_ROWS, unit.rows - r);
        HalfSums sums;
        multiply_half(x.at(0, r), x.group_bytes(), panels.panel(s.panels, p), half_groups(job_.dim), rows > UNIT_ROWS,
                      false, sums);
        if (job_.up_bias) add_bias(unit.expert, j, rows, sums);
        activate(sums, rows, h, j - f, r);
      }
  }

  void add_bias(int expert, long j, int rows, HalfSums& sums) const {
    const float* bias = job_.up_bias + expert * before_ + j;
    const long second = gated() ? job_.hidden : UNIT_ROWS, left = job_.hidden - j;
    for (int tile = 0; tile < 2; tile++, bias += second) {
      const long columns = gated() ? left : left - tile * UNIT_ROWS;
      const vec added = (vec)_mm512_maskz_loadu_ps(__mmask16(first_lanes(columns)), bias);
      for (int i = 0; i < rows; i++) store(sums.sum[tile][i], load(sums.sum[tile][i]) + added);
    }
  }

  void activate(HalfSums& sums, int rows, const HalfBlock& h, long column, int first) const {
    float(*const value)[UNIT_ROWS] = sums.sum[0];
    if (gated()) {
      act_.line(value[0], sums.sum[1][0], value[0], rows * UNIT_ROWS);
      for (int i = 0; i < rows; i++)
        store_half(h.at(column / HALF_GROUP, first + i) + column % HALF_GROUP, load(value[i]));
      return;
    }
    for (int tile = 0; tile < 2; tile++) {
      float* const own = sums.sum[tile][0];
      act_.line(own, own, own, rows * UNIT_ROWS);
    }
    for (int i = 0; i < rows; i++)
      store_halves(h.at(column / HALF_GROUP, first + i), load(value[i]), load(sums.sum[1][i]));
  }

  // Panels of the output from column d on: what the chunk [f, end) of h adds to them; weighted after the last.
  void down_panels(int index, const HalfBlock& h, long d, long f, long end, const Scratch& s) const {
    const Unit& unit = units_[index];
    const bfloat* down = static_cast<const bfloat*>(job_.down) + (unit.expert * job_.hidden + f) * job_.dim + d;
    const HalfPanels panels(down, job_.dim, end - f, job_.dim - d, 0);
    panels.pack(s.panels);
    const int tiles = (unit.rows + UNIT_BLOCK_ROWS - 1) / UNIT_BLOCK_ROWS;
    for (int p = 0; p < panels.number; p++, d += HALF_PANEL)
      for (int t = 0; t < tiles; t++) {
        const int r = t * UNIT_BLOCK_ROWS, rows = std::min(UNIT_BLOCK_ROWS, unit.rows - r);
        HalfSums own;
        HalfSums& sums = job_.hidden <= CHUNK_COLUMNS ? own : s.out[d / HALF_PANEL * tiles + t];
        multiply_half(h.at(0, r), h.group_bytes(), panels.panel(s.panels, p), half_groups(end - f), rows > UNIT_ROWS,
                      f > 0, sums);
        if (end == job_.hidden) put(index, sums, r, rows, d);
      }
  }

  void put(int index, const HalfSums& sums, int r, int rows, long d) const {
    const Unit& unit = units_[index];
    const long columns = job_.dim - d;
    const __mmask16 mask[] = {__mmask16(first_lanes(columns)), __mmask16(first_lanes(columns - UNIT_ROWS))};
    const float* added = job_.down_bias ? job_.down_bias + unit.expert * job_.dim + d : nullptr;
    vec bias[2] = {};
    for (int tile = 0; added && tile < 2; tile++)
      bias[tile] = (vec)_mm512_maskz_loadu_ps(mask[tile], added + tile * UNIT_ROWS);
    for (int i = 0; i < rows; i++) {
      const int row = unit.first + r + i;
      const float weight = job_.weight[routes_.assignment[row]];
      for (int tile = 0; tile < 2; tile++) {
        const vec value = (load(sums.sum[tile][i]) + bias[tile]) * weight;
        const long column = d + tile * UNIT_ROWS;
        if (sums_.direct())
          _mm256_mask_storeu_epi16(sums_.half_place(row) + column, mask[tile],
                                   (__m256i)_mm512_cvtneps_pbh((__m512)value));
        else
          _mm512_mask_storeu_ps(sums_.place(index, row) + column, mask[tile], (__m512)value);
      }
    }
  }

  const Job& job_;
  const Routes routes_;
  const Activation& act_;
  const long before_;  // columns before the activation
  const std::vector<Unit> units_;
  RowSums sums_;
  std::vector<Scratch> scratch_;
};

#endif

}  // namespace turnout

// The forward pass on the matrix unit: rows and weights in bfloat, products summed in float. Weights are what `Weights`
// makes panels of; tokens and outputs are bfloat, or float.
#pragma once

#include <vector>

#include "half_activation.h"
#include "half_panels.h"
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

template <class Weights>
class HalfForward {
 public:
  explicit HalfForward(const Weights& weights)
      : weights_(weights),
        job_(weights.job),
        routes_(job_.routes, job_.tokens, job_.experts, job_.assignments),
        parts_(activation(job_.kind).parts),
        activate_(half_activation(job_.kind)),
        before_(parts_ * job_.hidden),
        units_(half_units(routes_, job_, 2 * (job_.dim + std::min(job_.hidden, CHUNK_COLUMNS)))),
        sums_(job_, routes_, job_.half_rows ? nullptr : job_.y, units_,
              job_.half_rows ? reinterpret_cast<bfloat*>(job_.y) : nullptr) {}

  void run() {
    long rows = 0;
    for (const Unit& unit : units_) rows = std::max<long>(rows, unit.rows);
    const long chunk = std::min(job_.hidden, CHUNK_COLUMNS), tiles = (rows + UNIT_BLOCK_ROWS - 1) / UNIT_BLOCK_ROWS;
    const size_t sizes[] = {half_block_floats(rows, job_.dim), half_block_floats(rows, chunk),
                            Panels::floats(std::max(job_.dim, chunk)),
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
  typedef typename Weights::Panels Panels;
  static constexpr int64_t CHUNK_COLUMNS = 256;  // of h at a time

  struct Scratch {
    bfloat *x, *h, *panels;
    HalfSums* out;  // where more than one chunk adds to it
  };

  bool gated() const { return parts_ == 2; }
  long width() const { return Panels::width(gated()); }  // columns of h that a panel gives
  long out_panels() const { return (job_.dim + HALF_PANEL - 1) / HALF_PANEL; }

  void block(int index, const Scratch& s) const {
    const Tiles tiles(true);
    const Unit& unit = units_[index];
    const HalfBlock x = {s.x, unit.rows}, h = {s.h, unit.rows};
    if (job_.half_rows)
      gather_half(x, reinterpret_cast<const bfloat*>(job_.x), job_.dim, routes_.token + unit.first);
    else
      gather_half(x, job_.x, job_.dim, routes_.token + unit.first);
    for (long f = 0; f < job_.hidden; f += CHUNK_COLUMNS) {
      const long end = std::min(job_.hidden, f + CHUNK_COLUMNS);
      for (long j = f; j < end; j += Panels::strip(job_.dim, gated())) up_panels(unit, x, h, j, f, end, s);
      // what is beyond the last panel but in its group
      const long columns = (end - f + width() - 1) / width() * width();
      if (columns % HALF_GROUP)
        for (int r = 0; r < unit.rows; r++) _mm256_storeu_si256(half_line(h, columns, r), _mm256_setzero_si256());
      for (long d = 0; d < job_.dim; d += Panels::strip(end - f, false)) down_panels(index, h, d, f, end, s);
    }
  }

  static __m256i* half_line(const HalfBlock& h, long column, int row) {
    return reinterpret_cast<__m256i*>(h.at(column / HALF_GROUP, row) + column % HALF_GROUP);
  }

  // Panels of h from column j on, of the chunk [f, end): up, its bias, the activation.
  void up_panels(const Unit& unit, const HalfBlock& x, const HalfBlock& h, long j, long f, long end,
                 const Scratch& s) const {
    const Panels panels = weights_.up(unit.expert, j, end);
    panels.pack(s.panels);
    for (int p = 0; p < panels.number; p++, j += width())
      for (int r = 0; r < unit.rows; r += UNIT_BLOCK_ROWS) {
        const int rows = std::min(UNIT_BLOCK_ROWS, unit.rows - r);
        HalfSums sums;
        multiply_half(x.at(0, r), x.group_bytes(), panels.panel(s.panels, p), half_groups(job_.dim), rows > UNIT_ROWS,
                      false, sums);
        if (job_.up_bias) add_bias(unit.expert, j, rows, sums);
        if (job_.saved) save(unit, j, r, rows, sums);
        activate_(sums, rows, h.at((j - f) / HALF_GROUP, r) + (j - f) % HALF_GROUP);
      }
  }

  void save(const Unit& unit, long j, int r, int rows, const HalfSums& sums) const {
    const long panels = (job_.hidden + width() - 1) / width();
    bfloat* to = half_saved(reinterpret_cast<bfloat*>(job_.saved), routes_, unit.expert, panels, j / width(),
                            unit.first + r);
    for (int i = 0; i < rows; i++) {
      vec first = load(sums.sum[0][i]), second = load(sums.sum[1][i]);
      if (job_.kind == SWIGLU_CLAMPED) stay_clamped(first, second);
      store_halves(to + i * HALF_PANEL, first, second);
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

  // Panels of the output from column d on: what the chunk [f, end) of h adds to them; weighted after the last.
  void down_panels(int index, const HalfBlock& h, long d, long f, long end, const Scratch& s) const {
    const Unit& unit = units_[index];
    const Panels panels = weights_.down(unit.expert, d, f, end);
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
        if (sums_.direct() && job_.half_rows)
          _mm256_mask_storeu_epi16(sums_.half_place(row) + column, mask[tile],
                                   (__m256i)_mm512_cvtneps_pbh((__m512)value));
        else
          _mm512_mask_storeu_ps(sums_.place(index, row) + column, mask[tile], (__m512)value);
      }
    }
  }

  const Weights weights_;
  const Job& job_;
  const Routes routes_;
  const int parts_;
  const HalfActivation activate_;
  const long before_;  // columns before the activation
  const std::vector<Unit> units_;
  RowSums sums_;
  std::vector<Scratch> scratch_;
};

#endif

}  // namespace turnout

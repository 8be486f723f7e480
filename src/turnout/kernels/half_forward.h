// The forward pass on the matrix unit: rows and weights in planes of bfloat, products summed in float. Weights are what
// `Weights` makes panels of; tokens and outputs are bfloat, or float.
#pragma once

#include <vector>

#include "half_activation.h"
#include "half_panels.h"
#include "row_sums.h"

namespace turnout {

#if defined(TURNOUT_MATRIX_UNIT)

// Consecutive rows of one expert are a unit: x and a chunk of h stay in the second cache.
inline std::vector<Unit> half_units(const Routes& routes, const Job& job, long row_bytes) {
  constexpr long CACHE_BYTES = 2560 << 10;
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
        activate_(half_activation<P>(job_.kind)),
        before_(parts_ * job_.hidden),
        units_(half_units(routes_, job_, 2 * P * (job_.dim + std::min(job_.hidden, CHUNK_COLUMNS)))),
        sums_(job_, routes_, job_.half_rows ? nullptr : job_.y, units_,
              job_.half_rows ? reinterpret_cast<bfloat*>(job_.y) : nullptr) {}

  void run() {
    long rows = 0;
    for (const Unit& unit : units_) rows = std::max<long>(rows, unit.rows);
    const long chunk = std::min(job_.hidden, CHUNK_COLUMNS), tiles = (rows + UNIT_BLOCK_ROWS - 1) / UNIT_BLOCK_ROWS;
    const size_t sizes[] = {half_block_floats<P>(rows, job_.dim), half_block_floats<P>(rows, chunk),
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
    sums_.plan(schedule);
    schedule.run(*this, int(job_.threads), job_.parallel);
  }

  void operator()(const Task& task, int worker) {
    if (task.kind == COMPUTE) block(task.index, scratch_[worker]);
    if (task.kind == ADD_UP) sums_.add_up(task.index);
    if (task.kind == CLEAR) sums_.clear(task.index);
  }

 private:
  typedef typename Weights::Panels Panels;
  static constexpr int P = Panels::planes;
  typedef HalfBlock<P> Rows;
  static constexpr int64_t CHUNK_COLUMNS = 256;  // of h at a time

  struct Scratch {
    bfloat *x, *h, *panels;
    HalfSums* out;  // where more than one chunk adds to it
  };

  static int tiles_of(const Unit& unit) { return (unit.rows + UNIT_BLOCK_ROWS - 1) / UNIT_BLOCK_ROWS; }
  bool gated() const { return parts_ == 2; }
  long width() const { return Panels::width(gated()); }  // columns of h that a panel gives
  long out_panels() const { return (job_.dim + HALF_PANEL - 1) / HALF_PANEL; }

  void block(int index, const Scratch& s) const {
    const Tiles tiles(true);
    const Unit& unit = units_[index];
    const Rows x = {s.x, unit.rows, half_groups(job_.dim)};
    if (job_.half_rows)
      gather_half(x, reinterpret_cast<const bfloat*>(job_.x), job_.dim, routes_.token + unit.first);
    else
      gather_half(x, job_.x, job_.dim, routes_.token + unit.first);
    for (long f = 0; f < job_.hidden; f += CHUNK_COLUMNS) {
      const long end = std::min(job_.hidden, f + CHUNK_COLUMNS);
      const Rows h = {s.h, unit.rows, half_groups(end - f)};
      for (long j = f; j < end; j += Panels::strip(job_.dim, gated())) up_panels(unit, x, h, j, f, end, s);
      // what is beyond the last panel but in its group
      const long columns = (end - f + width() - 1) / width() * width();
      if (columns % HALF_GROUP)
        for (int r = 0; r < unit.rows; r++)
          put_half<P>(h.at(columns / HALF_GROUP, r) + columns % HALF_GROUP, vec{});
      for (long d = 0; d < job_.dim; d += Panels::strip(end - f, false)) down_panels(index, h, d, f, end, s);
    }
  }

  // Panels of h from column j on, of the chunk [f, end): up, its bias, the activation.
  void up_panels(const Unit& unit, const Rows& x, const Rows& h, long j, long f, long end,
                 const Scratch& s) const {
    const Panels panels = weights_.up(unit.expert, j, end);
    panels.pack(s.panels);
    const long after = j + panels.number * width();
    Ahead ahead;
    (after < end ? weights_.up(unit.expert, after, end) : weights_.down(unit.expert, 0, f, end)).tell(ahead);
    ahead.spread(panels.number * tiles_of(unit));
    for (int r = 0; r < unit.rows; r += UNIT_BLOCK_ROWS)
      for (int p = 0; p < panels.number; p++) up_tile(unit, x, h, panels, p, r, j, f, s, ahead);
  }

  // Of the panel p of those from column j on, the rows from r on.
  void up_tile(const Unit& unit, const Rows& x, const Rows& h, const Panels& panels, int p, int r, long j, long f,
               const Scratch& s, Ahead& ahead) const {
    const int rows = std::min(UNIT_BLOCK_ROWS, unit.rows - r);
    j += p * width();
    HalfSums sums;
    multiply_half(x, r, panels.panel(s.panels, p), half_groups(job_.dim), false, sums);
    if (job_.up_bias) add_bias(unit.expert, j, rows, sums);
    if (job_.saved) save(unit, j, r, rows, sums);
    ahead.go_on();
    activate_(sums, rows, h.at((j - f) / HALF_GROUP, r) + (j - f) % HALF_GROUP);
  }

  void save(const Unit& unit, long j, int r, int rows, const HalfSums& sums) const {
    const long panels = (job_.hidden + width() - 1) / width();
    Held<P>* to = half_saved(reinterpret_cast<Held<P>*>(job_.saved), routes_, unit.expert, panels, j / width(),
                             unit.first + r);
    for (int i = 0; i < rows; i++, to += HALF_PANEL) {
      vec first = load(sums.sum[0][i]), second = load(sums.sum[1][i]);
      if (P == 1 && job_.kind == SWIGLU_CLAMPED) stay_clamped(first, second);
      hold(to, first, second);
    }
  }
  static void hold(bfloat* to, vec first, vec second) { store_halves(to, first, second); }
  static void hold(float* to, vec first, vec second) {
    store(to, first);
    store(to + UNIT_ROWS, second);
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
  void down_panels(int index, const Rows& h, long d, long f, long end, const Scratch& s) const {
    const Unit& unit = units_[index];
    const Panels panels = weights_.down(unit.expert, d, f, end);
    panels.pack(s.panels);
    const long after = d + panels.number * HALF_PANEL, next = std::min(job_.hidden, end + CHUNK_COLUMNS);
    Ahead ahead;
    (after < job_.dim ? weights_.down(unit.expert, after, f, end) : weights_.up(unit.expert, end, next)).tell(ahead);
    ahead.spread(panels.number * tiles_of(unit));
    for (int t = 0; t < tiles_of(unit); t++)
      for (int p = 0; p < panels.number; p++) down_tile(index, h, panels, p, t, d, f, end, s, ahead);
  }

  void down_tile(int index, const Rows& h, const Panels& panels, int p, int t, long d, long f, long end,
                 const Scratch& s, Ahead& ahead) const {
    const Unit& unit = units_[index];
    const int tiles = tiles_of(unit);
    const int r = t * UNIT_BLOCK_ROWS, rows = std::min(UNIT_BLOCK_ROWS, unit.rows - r);
    d += p * HALF_PANEL;
    HalfSums own;
    HalfSums& sums = job_.hidden <= CHUNK_COLUMNS ? own : s.out[d / HALF_PANEL * tiles + t];
    multiply_half(h, r, panels.panel(s.panels, p), half_groups(end - f), f > 0, sums);
    ahead.go_on();
    if (end == job_.hidden) put(index, sums, r, rows, d);
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

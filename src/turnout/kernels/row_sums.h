// Each token's rows added up in a fixed order, by waves: while one is computed, the one before it is added.
#pragma once

#include <algorithm>
#include <climits>
#include <cstring>
#include <vector>

#include "half_block.h"
#include "job.h"
#include "routes.h"
#include "schedule.h"

namespace turnout {

enum TaskKind { COMPUTE, ADD_UP, CLEAR, FILL };

struct Unit {  // consecutive rows of one expert, the work of one task
  int expert, first, rows;
  int part = 0, first_block = 0, end_block = 1;  // units of an expert that has several follow one another
};

// Where the rows of a matrix (T, D) come from; with a single row for each token they go there straight.
class RowSums {
 public:
  // Into `out`, or rounded once into `half_out`; neither: nothing is wanted.
  RowSums(const Job& job, const Routes& routes, float* out, const std::vector<Unit>& units, bfloat* half_out = nullptr)
      : routes_(routes), units_(units), out_(out), half_out_(half_out), tokens_(job.tokens), dim_(job.dim) {
    direct_ = *routes.single || !(out || half_out);
    chunks_ = std::max<long>(1, std::min<long>(tokens_ / 64, 4 * job.threads));
    long all = 0, largest = 0;
    for (const Unit& unit : units) {
      all += unit.rows;
      largest = std::max<long>(largest, unit.rows);
    }
    const long half = std::max(HALF_FLOATS / dim_, largest);
    const long most = direct_ || all <= 2 * half ? all : half;
    for (int u = 0; u < int(units.size()); u++) {
      if (waves_.empty() || waves_.back().rows + units[u].rows > most) {
        waves_.push_back({u, u, units[u].first, 0, long(waves_.size() % 2) * half * dim_});
      }
      waves_.back().end_unit = u + 1;
      waves_.back().rows += units[u].rows;
      wave_of_.push_back(int(waves_.size()) - 1);
    }
    rows_floats_ = direct_ ? 0 : (waves_.size() > 1 ? 2 * half : all) * dim_;
  }

  size_t floats() const { return rows_floats_ + (half_out_ && !direct_ ? tokens_ * dim_ : 0); }
  void use(float* buffer) {
    buffer_ = buffer;
    if (half_out_) out_ = buffer + rows_floats_;
  }
  bool direct() const { return direct_; }

  // Where row `row` of a unit is to be written.
  float* place(int unit, int row) const {
    if (direct_) return out_ + routes_.token[row] * dim_;
    const Wave& wave = waves_[wave_of_[unit]];
    return buffer_ + wave.place + (row - wave.first_row) * dim_;
  }

  // The same of a row that is written straight.
  bfloat* half_place(int row) const { return half_out_ + routes_.token[row] * dim_; }

  // The units' tasks, largest first within a wave, those of an expert together; and those that add up.
  void plan(Schedule& schedule) {
    std::vector<int> added;
    int computed = -1;
    for (int w = 0; w < int(waves_.size()); w++) {
      std::vector<int> order;
      for (int u = waves_[w].first_unit; u < waves_[w].end_unit; u++) order.push_back(u);
      std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return urgency(w, a) > urgency(w, b); });
      const int group = schedule.group();
      for (int u : order) schedule.add({COMPUTE, u, w > 1 && !direct_ ? added[w - 2] : -1, group});
      if (w > 0) add_up_after(schedule, w - 1, computed, added);
      computed = group;
    }
    if (!waves_.empty()) add_up_after(schedule, int(waves_.size()) - 1, computed, added);
    plan_clears(schedule);
  }

  // The tasks that add up alone, where a single wave has all rows and group `computed` writes them.
  void plan_sums(Schedule& schedule, int computed) const {
    std::vector<int> added;
    if (!waves_.empty()) add_up_after(schedule, 0, computed, added);
    plan_clears(schedule);
  }

  // The rows of one wave, of one part of the tokens.
  void add_up(int index) const {
    const int w = index / chunks_;
    const Wave& wave = waves_[w];
    const long end_row = wave.first_row + wave.rows;
    for (long t = first_token(index % chunks_); t < first_token(index % chunks_ + 1); t++) {
      float* __restrict__ sum = out_ + t * dim_;
      bool fresh = w == 0;
      for (int i = routes_.token_start[t]; i < routes_.token_start[t + 1]; i++) {
        const long row = routes_.row[i];
        if (row < wave.first_row || row >= end_row) continue;
        const float* __restrict__ from = buffer_ + wave.place + (row - wave.first_row) * dim_;
        if (fresh)
          std::memcpy(sum, from, dim_ * sizeof(float));
        else
          for (long d = 0; d < dim_; d++) sum[d] += from[d];
        fresh = false;
      }
      if (fresh) std::memset(sum, 0, dim_ * sizeof(float));
#if defined(TURNOUT_MATRIX_UNIT)
      if (half_out_ && w + 1 == int(waves_.size())) to_half(half_out_ + t * dim_, sum, dim_);
#endif
    }
  }

  // Zeros for tokens without a row, where the others are written straight.
  void clear(int chunk) const {
    for (long t = first_token(chunk); t < first_token(chunk + 1); t++)
      if (routes_.token_start[t] == routes_.token_start[t + 1]) {
        if (half_out_)
          std::memset(half_out_ + t * dim_, 0, dim_ * sizeof(bfloat));
        else
          std::memset(out_ + t * dim_, 0, dim_ * sizeof(float));
      }
  }

 private:
  static constexpr long HALF_FLOATS = 3 << 20;  // of 12 MiB: two of them hold what is computed and what is added

  struct Wave {
    int first_unit, end_unit, first_row;
    long rows, place;
  };

  // Rows of the first of the expert's units; more than any where that one is in an earlier wave.
  long urgency(int wave, int unit) const {
    const int first = unit - units_[unit].part;
    return first < waves_[wave].first_unit ? LONG_MAX : units_[first].rows;
  }

  long first_token(int chunk) const { return tokens_ * chunk / chunks_; }

  void plan_clears(Schedule& schedule) const {
    if (!direct_ || !(out_ || half_out_)) return;
    for (int chunk = 0; chunk < chunks_; chunk++) schedule.add({CLEAR, chunk});
  }

  void add_up_after(Schedule& schedule, int wave, int computed, std::vector<int>& added) const {
    added.push_back(schedule.group());
    if (direct_) return;
    for (int chunk = 0; chunk < chunks_; chunk++)
      schedule.add({ADD_UP, wave * chunks_ + chunk, computed, added.back(), wave ? added[wave - 1] : -1});
  }

  const Routes& routes_;
  const std::vector<Unit>& units_;
  float* out_;
  bfloat* half_out_;
  const long tokens_, dim_;
  bool direct_;
  int chunks_;
  std::vector<Wave> waves_;
  std::vector<int> wave_of_;
  size_t rows_floats_;
  float* buffer_ = nullptr;
};

// Rows of an expert that are computed together: a block of them stays near the processor.
inline int most_rows(long dim) { return int(std::max<long>(128, std::min<long>(640, (1 << 20) / dim))); }

inline Split blocks_of_expert(const Routes& routes, const Job& job, int expert) {
  return Split(routes.start[expert + 1] - routes.start[expert], most_rows(job.dim));
}

// Of the backward pass: an expert is the work of one thread; of several, block by block (relay.h), where it has a large
// share of all rows, or all are `by_blocks`.
inline std::vector<Unit> units_of_experts(const Routes& routes, const Job& job, bool by_blocks = false) {
  std::vector<Unit> found;
  const long all = routes.start[job.experts];
  for (int e = 0; e < job.experts; e++) {
    const Split blocks = blocks_of_expert(routes, job, e);
    const int first = routes.start[e], rows = routes.start[e + 1] - first;
    if (!rows) continue;
    if (job.threads > 1 && (by_blocks || long(rows) * 2 * job.threads > all))
      for (int b = 0; b < blocks.parts; b++) found.push_back({e, first + blocks.begin(b), blocks.size(b), b, b, b + 1});
    else
      found.push_back({e, first, rows, 0, 0, blocks.parts});
  }
  return found;
}

inline long padded_dim(long dim) { return (dim + LANES - 1) / LANES * LANES; }

}  // namespace turnout

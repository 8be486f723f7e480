// Rows of scores, one for each token: the best experts.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "lanes.h"
#include "schedule.h"

namespace turnout {

class Scores {
 public:
  Scores(const float* scores, long rows, long experts, int threads, Parallel parallel)
      : scores_(scores), rows_(rows), experts_(experts), threads_(threads), parallel_(parallel) {}

  // The k highest of each row, best first, of equals the lower index; NaN is higher than everything.
  void best(int k, int64_t* picks) {
    k_ = k;
    picks_ = picks;
    const long parts = (rows_ + PART - 1) / PART;
    Schedule schedule;
    for (long part = 0; part < parts; part++) schedule.add({0, int(part)});
    schedule.run(*this, int(std::min<long>(threads_, parts)), parallel_);
  }

  void operator()(const Task& task, int) {
    const long first = task.index * PART, end = std::min(rows_, first + PART);
    std::vector<float> left(k_ > 1 ? experts_ : 0);
    for (long r = first; r < end; r++) pick(scores_ + r * experts_, left.data(), picks_ + r * k_);
  }

 private:
  static constexpr long PART = 512;  // rows of a task

  void pick(const float* row, float* left, int64_t* picks) const {
    if (k_ > 1) {
      std::memcpy(left, row, experts_ * sizeof(float));
      row = left;
    }
    for (int choice = 0; choice < k_; choice++) {
      picks[choice] = highest(row);
      if (k_ > 1) left[picks[choice]] = -std::numeric_limits<float>::infinity();
    }
  }

  long highest(const float* row) const {
    float most = row[0];
    long e = 0;
    if (experts_ >= LANES) {
      vec lane_most = load(row);
      for (e = LANES; e + LANES <= experts_; e += LANES) {
        const vec next = load(row + e);
        // once NaN, always NaN
        lane_most = (lane_most >= next) | (lane_most != lane_most) ? lane_most : next;
      }
      most = lane_most[0];
      for (int lane = 1; lane < LANES; lane++) most = higher(most, lane_most[lane]);
    }
    for (; e < experts_; e++) most = higher(most, row[e]);
    long found = 0;
    while (!(row[found] == most || (most != most && row[found] != row[found]))) found++;
    return found;
  }

  static float higher(float a, float b) { return a >= b || a != a ? a : b; }

  const float* scores_;
  const long rows_, experts_;
  const int threads_;
  const Parallel parallel_;
  int k_ = 1;
  int64_t* picks_ = nullptr;
};

}  // namespace turnout

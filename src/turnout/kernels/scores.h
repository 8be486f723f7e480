// Rows of scores, one for each token: the best experts.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "lanes.h"
#include "schedule.h"

namespace turnout {

// Of all rows, by threads: each(first, end), `part` of them at a time.
template <class Each>
class InParts {
 public:
  InParts(long rows, Each each, long part) : rows_(rows), part_(part), each_(each) {}
  void run(int64_t threads, Parallel parallel) {
    const long parts = (rows_ + part_ - 1) / part_;
    Schedule schedule;
    for (long part = 0; part < parts; part++) schedule.add({0, int(part)});
    schedule.run(*this, int(std::min<long>(threads, parts)), parallel);
  }
  void operator()(const Task& task, int) {
    each_(task.index * part_, std::min(rows_, (task.index + 1) * part_));
  }

 private:
  const long rows_, part_;
  Each each_;
};

template <class Each>
void in_parts(long rows, int64_t threads, Parallel parallel, Each each, long part = 512) {
  InParts<Each>(rows, each, part).run(threads, parallel);
}

inline float higher(float a, float b) { return a >= b || a != a ? a : b; }

inline float highest(const float* row, long experts) {
  float most = row[0];
  long e = 0;
  if (experts >= LANES) {
    vec lane_most = load(row);
    for (e = LANES; e + LANES <= experts; e += LANES) {
      const vec next = load(row + e);
      // once NaN, always NaN
      lane_most = (lane_most >= next) | (lane_most != lane_most) ? lane_most : next;
    }
    most = lane_most[0];
    for (int lane = 1; lane < LANES; lane++) most = higher(most, lane_most[lane]);
  }
  for (; e < experts; e++) most = higher(most, row[e]);
  return most;
}

// The k highest of a row, best first, of equals the lower index; NaN is higher than everything. `left`: room for a row.
inline void pick_best(const float* row, long experts, int k, float* left, int64_t* picks) {
  if (k > 1) {
    std::memcpy(left, row, experts * sizeof(float));
    row = left;
  }
  for (int choice = 0; choice < k; choice++) {
    const float most = highest(row, experts);
    long found = 0;
    while (!(row[found] == most || (most != most && row[found] != row[found]))) found++;
    picks[choice] = found;
    if (k > 1) left[found] = -std::numeric_limits<float>::infinity();
  }
}

inline void best_of_rows(const float* scores, long rows, long experts, int k, int64_t* picks, int64_t threads,
                         Parallel parallel) {
  in_parts(rows, threads, parallel, [=](long first, long end) {
    std::vector<float> left(k > 1 ? experts : 0);
    for (long r = first; r < end; r++) pick_best(scores + r * experts, experts, k, left.data(), picks + r * k);
  });
}

}  // namespace turnout

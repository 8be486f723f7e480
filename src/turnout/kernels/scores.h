// Rows of scores, one for each token: the best experts, and what the statistics say of a row.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "lanes.h"
#include "schedule.h"

namespace turnout {

// ln x for normal positive numbers. Polynomial of Cephes' logf.
inline vec logarithm(vec x) {
  const ints bits = (ints)x;
  // exponent and mantissa such that the mantissa is from 1 / sqrt 2 to sqrt 2
  const ints exponent = (bits - 0x3F3504F3) >> 23;
  const vec e = __builtin_convertvector(exponent, vec);
  const vec m = (vec)(bits - (exponent << 23)) - 1.0f;
  const vec z = m * m;
  vec p = m * 7.0376836292e-2f - 1.1514610310e-1f;
  p = p * m + 1.1676998740e-1f;
  p = p * m - 1.2420140846e-1f;
  p = p * m + 1.4249322787e-1f;
  p = p * m - 1.6668057665e-1f;
  p = p * m + 2.0000714765e-1f;
  p = p * m - 2.4999993993e-1f;
  p = p * m + 3.3333331174e-1f;
  p = p * m * z - e * 2.12194440e-4f - z * 0.5f;
  return m + p + e * 0.693359375f;
}

class Scores {
 public:
  Scores(const float* scores, long rows, long experts, int threads, Parallel parallel)
      : scores_(scores), rows_(rows), experts_(experts), threads_(threads), parallel_(parallel) {}

  // The k highest of each row, best first, of equals the lower index; NaN is higher than everything.
  void best(int k, int64_t* picks) {
    k_ = k;
    picks_ = picks;
    each_part(0);
  }

  // Sums over rows of the entropy, and of the best score minus the second; scores are from 0 to 1.
  void summarize(float* sums) {
    entropy_.assign(parts(), 0.0);
    margin_.assign(parts(), 0.0);
    each_part(1);
    double entropy = 0, margin = 0;
    for (long part = 0; part < parts(); part++) {
      entropy += entropy_[part];
      margin += margin_[part];
    }
    sums[0] = float(entropy);
    sums[1] = float(margin);
  }

  void operator()(const Task& task, int) {
    const long first = task.index * PART, end = std::min(rows_, first + PART);
    std::vector<float> left(k_ > 1 ? experts_ : 0);
    for (long r = first; r < end; r++) {
      if (task.kind == 0)
        pick(scores_ + r * experts_, left.data(), picks_ + r * k_);
      else
        add(scores_ + r * experts_, entropy_[task.index], margin_[task.index]);
    }
  }

 private:
  static constexpr long PART = 512;  // rows: a fixed number, so that sums do not depend on the threads

  long parts() const { return (rows_ + PART - 1) / PART; }

  void each_part(int kind) {
    Schedule schedule;
    for (long part = 0; part < parts(); part++) schedule.add({kind, int(part)});
    schedule.run(*this, int(std::min<long>(threads_, parts())), parallel_);
  }

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

  void add(const float* row, double& entropy, double& margin) const {
    const float lowest = -std::numeric_limits<float>::infinity();
    vec sum = {}, first = splat(lowest), second = {};
    for (long e = 0; e < experts_; e += LANES) {
      vec p;
      if (e + LANES <= experts_) {
        p = load(row + e);
      } else {
        alignas(64) float rest[LANES] = {};
        std::memcpy(rest, row + e, (experts_ - e) * sizeof(float));
        p = load(rest);
      }
      const vec tiny = splat(1.2e-38f);
      // of less than the least normal number nothing is left, and of NaN everything
      sum -= p < tiny ? vec{} : p * logarithm(p);
      const vec lower = first < p ? first : p;
      second = second < lower ? lower : second;
      first = first < p ? p : first;
    }
    entropy += total(sum);
    float best = first[0], next = second[0];
    for (int lane = 1; lane < LANES; lane++) {
      const float one = first[lane], other = second[lane];
      if (other > next) next = other;
      if (one > best) {
        if (best > next) next = best;
        best = one;
      } else if (one > next) {
        next = one;
      }
    }
    margin += best - next;
  }

  const float* scores_;
  const long rows_, experts_;
  const int threads_;
  const Parallel parallel_;
  int k_ = 1;
  int64_t* picks_ = nullptr;
  std::vector<double> entropy_, margin_;
};

}  // namespace turnout

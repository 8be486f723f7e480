// Softmax, the best k of each row and their weights in one pass over the logits, and the gradient of all that.
#pragma once

#include "scores.h"

namespace turnout {

// The order of the fields is that of `_gates` in gate_kernel.py.
struct Gates {
  int64_t rows, experts, k, renormalize, threads;
  Parallel parallel;
  const float* logits;    // (R, E); from here on of the forward pass
  const int64_t* token;   // (R), or null: row r is token r
  float* scores;          // (R, E), softmax of the logits; read backward
  float* weight;          // (R, K), of the chosen scores, or softmax of the chosen logits; read backward
  int64_t* expert;        // (R, K), best first; read backward
  int64_t* token_of;      // (R, K)
  int64_t* choice;        // (R, K)
  const float* d_scores;  // (R, E) or null; from here on of the backward pass
  const float* d_weight;  // (R, K) or null
  float* d_logits;        // (R, E)
};
static_assert(sizeof(Gates) == 16 * sizeof(int64_t), "gate_kernel.py fills NUM_GATES fields, of eight bytes each");

// out = e^(x - most) over their sum; x may be out.
inline void softmax(const float* x, long n, float most, float* out) {
  vec sums = {};
  long e = 0;
  const auto power = [most](vec values) {
    const vec below = values - most;
    return below < -87.0f ? vec{} : exponential(below);
  };
  for (; e + LANES <= n; e += LANES) {
    const vec value = power(load(x + e));
    store(out + e, value);
    sums += value;
  }
  float sum = total(sums);
  if (e < n) {
    alignas(64) float rest[LANES] = {};
    std::memcpy(rest, x + e, (n - e) * sizeof(float));
    store(rest, power(load(rest)));
    for (long i = 0; i < n - e; i++) sum += rest[i];
    std::memcpy(out + e, rest, (n - e) * sizeof(float));
  }
  for (e = 0; e < n; e++) out[e] /= sum;
}

inline void choose_rows(const Gates& g) {
  in_parts(g.rows, g.threads, g.parallel, [&g](long first, long end) {
    std::vector<float> left(g.k > 1 ? g.experts : 0);
    for (long r = first; r < end; r++) {
      const float* logits = g.logits + r * g.experts;
      float *scores = g.scores + r * g.experts, *weight = g.weight + r * g.k;
      int64_t* expert = g.expert + r * g.k;
      pick_best(logits, g.experts, int(g.k), left.data(), expert);
      softmax(logits, g.experts, logits[expert[0]], scores);
      for (long choice = 0; choice < g.k; choice++) {
        weight[choice] = (g.renormalize ? logits : scores)[expert[choice]];
        g.token_of[r * g.k + choice] = g.token ? g.token[r] : r;
        g.choice[r * g.k + choice] = choice;
      }
      if (g.renormalize) softmax(weight, g.k, weight[0], weight);
    }
  });
}

// d_logits = scores (d - sum of scores d), for the gradient d of the scores; likewise for chosen logits of their own.
inline void logits_gradient(const Gates& g) {
  in_parts(g.rows, g.threads, g.parallel, [&g](long first, long end) {
    for (long r = first; r < end; r++) {
      const float *__restrict__ scores = g.scores + r * g.experts, *weight = g.weight + r * g.k;
      const float* __restrict__ d_scores = g.d_scores ? g.d_scores + r * g.experts : nullptr;
      const float* d_weight = g.d_weight ? g.d_weight + r * g.k : nullptr;
      const int64_t* expert = g.expert + r * g.k;
      float* __restrict__ d_logits = g.d_logits + r * g.experts;
      float all = 0, chosen = 0;
      if (d_scores) {
        vec sums = {};
        long e = 0;
        for (; e + LANES <= g.experts; e += LANES) sums += load(scores + e) * load(d_scores + e);
        all = total(sums);
        for (; e < g.experts; e++) all += scores[e] * d_scores[e];
      }
      for (long choice = 0; d_weight && choice < g.k; choice++)
        (g.renormalize ? chosen : all) += (g.renormalize ? weight[choice] : scores[expert[choice]]) * d_weight[choice];
      if (d_scores)
        for (long e = 0; e < g.experts; e++) d_logits[e] = scores[e] * (d_scores[e] - all);
      else if (all != 0)  // NaN, too
        for (long e = 0; e < g.experts; e++) d_logits[e] = -scores[e] * all;
      else
        std::memset(d_logits, 0, g.experts * sizeof(float));
      for (long choice = 0; d_weight && choice < g.k; choice++)
        d_logits[expert[choice]] += g.renormalize ? weight[choice] * (d_weight[choice] - chosen)
                                                  : scores[expert[choice]] * d_weight[choice];
    }
  });
}

}  // namespace turnout

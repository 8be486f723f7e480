// A layer of few tokens in one call: scores, choices, the order of the rows, experts.
#pragma once

#include "gates.h"
#include "int8_products.h"
#include "routes.h"

namespace turnout {

// What does not change from call to call. The order of the fields is that of `few` in kernel.py.
struct Few {
  const void* score;        // (E, D), of bfloat where half_score
  const float* score_bias;  // (E) or null
  int64_t half_score;
  int64_t digits;  // of activations, for weights of 8 bits; 0: weights are numbers
  Gates gates;     // its sizes apart from rows
  Int8Job own;
};
static_assert(sizeof(Few) == 4 * sizeof(int64_t) + sizeof(Gates) + sizeof(Int8Job), "kernel.py packs them side by side");

// What does.
struct Tokens {
  const void* x;   // (T, D), of bfloat where own.job.half_rows, as y
  void* y;
  int64_t* found;  // expert, token and choice of each assignment; floats: its weight, scores (T, E), logits (T, E)
  int64_t count, threads;
};

constexpr long PART_SCORES = 1 << 18;  // weights of scores that a thread reads at a time

// sum[i] = x[i] . w for M rows of x, each in an order of its own that does not depend on M.
template <int M, class W>
inline void dots(const float* x, long x_step, const W* w, long n, float* sum) {
  vec sums[M][2] = {};
  long c = 0;
  for (; c + 2 * LANES <= n; c += 2 * LANES) {
    const vec w0 = load(w + c), w1 = load(w + c + LANES);
#pragma GCC unroll 4
    for (int i = 0; i < M; i++) {
      sums[i][0] += load(x + i * x_step + c) * w0;
      sums[i][1] += load(x + i * x_step + c + LANES) * w1;
    }
  }
  for (int i = 0; i < M; i++) {
    sum[i] = total(sums[i][0] + sums[i][1]);
    for (long rest = c; rest < n; rest++) sum[i] += x[i * x_step + rest] * value(w[rest]);
  }
}

template <class W>
void score_rows(const Gates& g, const float* x, const W* score, const float* bias, long dim, float* logits) {
  const long rows = g.rows;
  const auto each = [=, &g](long first, long end) {
    for (long e = first; e < end; e++)
      for (long r = 0; r < rows; r += 4) {
        float sum[4];
        switch (std::min(4l, rows - r)) {
          case 1: dots<1>(x + r * dim, dim, score + e * dim, dim, sum); break;
          case 2: dots<2>(x + r * dim, dim, score + e * dim, dim, sum); break;
          case 3: dots<3>(x + r * dim, dim, score + e * dim, dim, sum); break;
          default: dots<4>(x + r * dim, dim, score + e * dim, dim, sum);
        }
        for (long i = 0; i < std::min(4l, rows - r); i++)
          logits[(r + i) * g.experts + e] = bias ? sum[i] + bias[e] : sum[i];
      }
  };
  in_parts(g.experts, g.threads, g.parallel, each, std::max(1l, PART_SCORES / dim));
}

// experts(job, routes ready, x and y of float) for what the router chooses.
template <class Experts>
void few_tokens(const Few& few, const Tokens& tokens, Experts experts) {
  Gates g = few.gates;
  Int8Job own = few.own;
  Job& job = own.job;
  g.rows = job.tokens = tokens.count, g.threads = job.threads = tokens.threads;
  const long num = job.assignments = tokens.count * g.k;
  g.expert = tokens.found, g.token_of = g.expert + num, g.choice = g.token_of + num;
  g.weight = reinterpret_cast<float*>(g.choice + num), g.scores = g.weight + num;
  float* const logits = g.scores + g.rows * g.experts;
  g.logits = logits;
  std::vector<float> x, y;
  if (job.half_rows) {
    const long size = job.tokens * job.dim;
    x.resize(size), y.resize(size);
    for (long i = 0; i < size; i++) x[i] = value(static_cast<const bfloat*>(tokens.x)[i]);
    job.x = x.data(), job.y = y.data(), job.half_rows = 0;
  } else {
    job.x = static_cast<const float*>(tokens.x), job.y = static_cast<float*>(tokens.y);
  }
  if (few.half_score)
    score_rows(g, job.x, static_cast<const bfloat*>(few.score), few.score_bias, job.dim, logits);
  else
    score_rows(g, job.x, static_cast<const float*>(few.score), few.score_bias, job.dim, logits);
  choose_rows(g);
  std::vector<int32_t> routes(3 + job.experts + job.tokens + 3 * job.assignments);
  sort_routes(g.expert, g.token_of, nullptr, job.assignments, job.tokens, job.experts, routes.data());
  job.routes = routes.data(), job.weight = g.weight;
  experts(own);
  for (size_t i = 0; i < y.size(); i++) static_cast<bfloat*>(tokens.y)[i] = rounded(y[i]);
}

}  // namespace turnout

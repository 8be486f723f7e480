// The forward pass of a few tokens: no tiles, no packing; each weight is read once, in the order it lies in memory.
#pragma once

#include <vector>

#include "activation.h"
#include "row_sums.h"

namespace turnout {

// out[i][c] += sum over k < K of x[i][k] w[k][c], for M rows of x; `fetch`: the K rows of w after these, meanwhile.
template <int M, int K, class W>
inline void add_products(const float* x, long x_step, const W* w, long w_step, long columns, float* out, long out_step,
                         bool fetch) {
  vec factor[M][K];
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) factor[i][k] = splat(x[i * x_step + k]);
  long c = 0;
  for (; c + LANES <= columns; c += LANES) {
    vec row[K];
#pragma GCC unroll 8
    for (int k = 0; k < K; k++) {
      row[k] = load(w + k * w_step + c);
      if (fetch) __builtin_prefetch(w + (K + k) * w_step + c, 0, 2);
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; i++) {
      vec sum = load(out + i * out_step + c);
#pragma GCC unroll 8
      for (int k = 0; k < K; k++) sum += factor[i][k] * row[k];
      store(out + i * out_step + c, sum);
    }
  }
  for (; c < columns; c++)
    for (int i = 0; i < M; i++)
      for (int k = 0; k < K; k++) out[i * out_step + c] += x[i * x_step + k] * value(w[k * w_step + c]);
}

template <int K, class W>
inline void add_rows_of(int rows, const float* x, long x_step, const W* w, long w_step, long columns, float* out,
                        long out_step) {
  for (int i = 0; i < rows; i += 8) {
    const float* from = x + i * x_step;
    float* to = out + i * out_step;
    const bool fetch = i == 0;
    switch (std::min(8, rows - i)) {
      case 1: add_products<1, K>(from, x_step, w, w_step, columns, to, out_step, fetch); break;
      case 2: add_products<2, K>(from, x_step, w, w_step, columns, to, out_step, fetch); break;
      case 3: add_products<3, K>(from, x_step, w, w_step, columns, to, out_step, fetch); break;
      case 4: add_products<4, K>(from, x_step, w, w_step, columns, to, out_step, fetch); break;
      case 5: add_products<5, K>(from, x_step, w, w_step, columns, to, out_step, fetch); break;
      case 6: add_products<6, K>(from, x_step, w, w_step, columns, to, out_step, fetch); break;
      case 7: add_products<7, K>(from, x_step, w, w_step, columns, to, out_step, fetch); break;
      default: add_products<8, K>(from, x_step, w, w_step, columns, to, out_step, fetch);
    }
  }
}

// out (rows, columns) += x (rows, depth) w (depth, columns), in stretches long enough for the memory.
template <class W>
void multiply_few(int rows, const float* x, long x_step, const W* w, long w_step, long depth, long columns, float* out,
                  long out_step) {
  const long most = rows <= 2 ? 8192 : rows <= 6 ? 4096 : 1024;
  for (long c = 0; c < columns; c += most) {
    const long width = std::min(most, columns - c);
    long k = 0;
    // three and four sums read and written again are worth more rows of w each time; of more, factors lie in memory
    for (; (rows == 3 || rows == 4) && k + 8 <= depth; k += 8)
      add_rows_of<8>(rows, x + k, x_step, w + k * w_step + c, w_step, width, out + c, out_step);
    for (; k + 4 <= depth; k += 4)
      add_rows_of<4>(rows, x + k, x_step, w + k * w_step + c, w_step, width, out + c, out_step);
    for (; k < depth; k++)
      add_rows_of<1>(rows, x + k, x_step, w + k * w_step + c, w_step, width, out + c, out_step);
  }
}

template <class W>
class Decode {
 public:
  explicit Decode(const Job& job)
      : job_(job),
        routes_(job.routes, job.tokens, job.experts, job.assignments),
        act_(activation(job.kind)),
        before_(act_.parts * job.hidden) {}

  static constexpr long MOST_WIDTH = 2048;  // of the hidden layer at a time, so that its values stay in cache

  bool fits() const {
    for (int e = 0; e < job_.experts; e++)
      if (routes_.start[e + 1] - routes_.start[e] > FEW_ROWS) return false;
    return !job_.saved;
  }

  void run() {
    plan_slices();
    const size_t x_size = FEW_ROWS * job_.dim, before_size = act_.parts * FEW_ROWS * MOST_WIDTH;
    const size_t partial_size = size_t(slices_) * routes_.start[job_.experts] * job_.dim;
    Workspace space(job_.threads * (Workspace::padded(x_size) + Workspace::padded(before_size)) +
                    Workspace::padded(partial_size));
    for (int i = 0; i < job_.threads; i++) scratch_.push_back({space.take(x_size), space.take(before_size)});
    partial_ = space.take(partial_size);
    Schedule schedule;
    const int computed = schedule.group();
    for (int u = 0; u < int(units_.size()); u++) schedule.add({COMPUTE, u, -1, computed});
    chunks_ = int(std::max<int64_t>(1, std::min(job_.tokens, job_.threads)));
    for (int chunk = 0; chunk < chunks_; chunk++) schedule.add({ADD_UP, chunk, computed});
    schedule.run(*this, int(job_.threads), job_.parallel);
  }

  void operator()(const Task& task, int worker) {
    if (task.kind == COMPUTE) slice(units_[task.index], scratch_[worker]);
    if (task.kind == ADD_UP) add_up(task.index);
  }

 private:
  struct Scratch {
    float *x, *before;
  };
  struct Slice {
    int expert, number;
    long width;
  };

  // Whole experts, which are read fastest, as many for each thread; those left over are shared, each by all threads.
  void plan_slices() {
    std::vector<int> touched;
    for (int e = 0; e < job_.experts; e++)
      if (routes_.start[e + 1] > routes_.start[e]) touched.push_back(e);
    const long experts = touched.size(), shared = experts % job_.threads;
    const long share = (job_.hidden + job_.threads - 1) / job_.threads;
    slices_of_.assign(job_.experts, 0);
    for (long i = 0; i < experts; i++) {
      const long width = i < experts - shared ? MOST_WIDTH : std::clamp((share + 63) / 64 * 64, 64l, MOST_WIDTH);
      const int slices = int((job_.hidden + width - 1) / width);
      for (int number = 0; number < slices; number++) units_.push_back({touched[i], number, width});
      slices_of_[touched[i]] = slices;
      slices_ = std::max(slices_, slices);
    }
  }

  void slice(const Slice& unit, const Scratch& s) const {
    const long dim = job_.dim, hidden = job_.hidden, width = unit.width, f = unit.number * width;
    const long columns = std::min(width, hidden - f);
    const int first = routes_.start[unit.expert], rows = routes_.start[unit.expert + 1] - first;
    for (int r = 0; r < rows; r++)
      std::memcpy(s.x + r * dim, job_.x + routes_.token[first + r] * dim, dim * sizeof(float));
    // of a whole expert the parts lie side by side, and are read as one
    const bool whole = columns == hidden && hidden % LANES == 0;
    const long step = whole ? before_ : width, second = whole ? hidden : rows * width;
    std::memset(s.before, 0, act_.parts * rows * (whole ? hidden : width) * sizeof(float));
    for (int part = 0; part < act_.parts; part++) {
      float* before = s.before + part * second;
      if (job_.up_bias)
        for (int r = 0; r < rows; r++)
          std::memcpy(before + r * step, job_.up_bias + unit.expert * before_ + part * hidden + f,
                      columns * sizeof(float));
      const W* up = static_cast<const W*>(job_.up) + unit.expert * dim * before_ + part * hidden + f;
      if (!whole) multiply_few(rows, s.x, dim, up, before_, dim, columns, before, width);
    }
    float* h = s.before;
    if (whole) {
      const W* up = static_cast<const W*>(job_.up) + unit.expert * dim * before_;
      multiply_few(rows, s.x, dim, up, before_, dim, before_, s.before, before_);
      for (int r = 0; r < rows; r++, h += before_) act_.line(h, h + (act_.parts - 1) * hidden, h, int(hidden));
      h = s.before;
    } else {
      act_.line(h, s.before + (act_.parts - 1) * second, h, int(rows * width));
    }
    float* out = partial_ + (long(unit.number) * routes_.start[job_.experts] + first) * dim;
    for (int r = 0; r < rows; r++) {
      if (job_.down_bias && unit.number == 0)
        std::memcpy(out + r * dim, job_.down_bias + unit.expert * dim, dim * sizeof(float));
      else
        std::memset(out + r * dim, 0, dim * sizeof(float));
    }
    const W* down = static_cast<const W*>(job_.down) + (unit.expert * hidden + f) * dim;
    multiply_few(rows, h, step, down, dim, columns, dim, out, dim);
  }

  void add_up(int chunk) const {
    const long dim = job_.dim;
    for (long t = job_.tokens * chunk / chunks_; t < job_.tokens * (chunk + 1) / chunks_; t++) {
      float* __restrict__ sum = job_.y + t * dim;
      std::memset(sum, 0, dim * sizeof(float));
      for (int i = routes_.token_start[t]; i < routes_.token_start[t + 1]; i++) {
        const long row = routes_.row[i];
        const float weight = job_.weight[routes_.assignment[row]];
        const int expert = int(std::upper_bound(routes_.start, routes_.start + job_.experts, row) - routes_.start) - 1;
        for (int number = 0; number < slices_of_[expert]; number++) {
          const float* __restrict__ from = partial_ + (long(number) * routes_.start[job_.experts] + row) * dim;
          for (long d = 0; d < dim; d++) sum[d] += weight * from[d];
        }
      }
    }
  }

  const Job& job_;
  const Routes routes_;
  const Activation& act_;
  const long before_;
  int slices_ = 1, chunks_ = 1;  // slices: of an expert, at most
  std::vector<int> slices_of_;
  std::vector<Slice> units_;
  std::vector<Scratch> scratch_;
  float* partial_ = nullptr;
};

}  // namespace turnout

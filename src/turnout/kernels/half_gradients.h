// Where the backward pass on the matrix unit puts the gradients of an expert's weights.
#pragma once

#include <vector>

#include "half_tile.h"
#include "row_sums.h"

namespace turnout {

#if defined(TURNOUT_MATRIX_UNIT)

// Of one expert: sums in float, or places where what is computed at once is rounded to; null where not wanted.
struct HalfGradients {
  float *up, *down, *up_bias, *down_bias;
  bfloat *half_up, *half_down;
};

// A tile of sums to row `row` and columns from `column` on, of which there are `columns`: as they are, added, or rounded.
inline void put_gradient(const HalfSums& sums, int rows, long columns, float* sum, bfloat* half, long step, bool add) {
  const __mmask32 mask = first_lanes(columns);
  if (half) {
    const bool streams = columns >= HALF_PANEL && uintptr_t(half) % 64 == 0 && step % HALF_PANEL == 0;
    for (int i = 0; i < rows; i++, half += step) {
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)load(sums.sum[1][i]), (__m512)load(sums.sum[0][i]));
      if (streams)
        _mm512_stream_si512(reinterpret_cast<__m512i*>(half), both);
      else
        _mm512_mask_storeu_epi16(half, mask, both);
    }
    return;
  }
  const bool streams = columns >= HALF_PANEL && uintptr_t(sum) % 64 == 0 && step % UNIT_ROWS == 0;
  for (int i = 0; i < rows; i++, sum += step)
    for (int tile = 0; tile < 2; tile++) {
      float* const to = sum + tile * UNIT_ROWS;
      const __mmask16 own = __mmask16(mask >> (tile * UNIT_ROWS));
      vec value = load(sums.sum[tile][i]);
      if (add) value += (vec)_mm512_maskz_loadu_ps(own, to);
      if (streams && !add)
        stream(to, value);
      else
        _mm512_mask_storeu_ps(to, own, (__m512)value);
    }
}

// The gradients of all experts' weights, of T. Of float they are written and added up in place. Of bfloat an expert whose
// rows are one block has them rounded at once; of one with more they are added up in the room of a thread. Where an expert
// is the work of several threads each part has a room, whatever T.
template <class T>
class HalfWeightGradients {
  static constexpr bool ROUNDED = sizeof(T) == sizeof(bfloat);

 public:
  HalfWeightGradients(const Job& job, const Routes& routes, const std::vector<Unit>& units, long before)
      : job_(job),
        up_(job.d_up ? job.dim * before : 0),
        down_(job.d_down ? job.hidden * job.dim : 0),
        up_bias_(job.d_up_bias ? before : 0),
        down_bias_(job.d_down_bias ? job.dim : 0),
        first_share_(job.experts, -1),
        parts_(job.experts, 0) {
    for (const Unit& unit : units) {
      parts_[unit.expert]++;
      in_blocks_ |= blocks_of_expert(routes, job, unit.expert).parts > 1;
    }
    for (int e = 0; e < job.experts; e++)
      if (parts_[e] > 1) {
        first_share_[e] = shares_;
        shares_ += parts_[e];
      }
  }

  int parts(int expert) const { return parts_[expert]; }
  size_t thread_floats() const { return ROUNDED && in_blocks_ ? share_floats() : 0; }
  size_t floats() const { return shares_ * share_floats(); }
  void use(float* shares) { room_ = shares; }

  // For one part's sums, of all its blocks; `own`: room of the thread.
  HalfGradients of(const Unit& unit, bool one_block, float* own) const {
    const int expert = unit.expert;
    if (parts_[expert] > 1) return in_share(room_ + (first_share_[expert] + unit.part) * share_floats());
    HalfGradients g = one_block || !ROUNDED ? HalfGradients{} : in_share(own);
    g.up_bias = job_.d_up_bias ? job_.d_up_bias + expert * up_bias_ : nullptr;
    g.down_bias = job_.d_down_bias ? job_.d_down_bias + expert * down_bias_ : nullptr;
    if (one_block || !ROUNDED) {
      place(g.up, g.half_up, up_of(expert));
      place(g.down, g.half_down, down_of(expert));
    }
    return g;
  }

  // Sums in float, rounded to where they belong.
  void round(int expert, const HalfGradients& g) const {
    if (up_) put(up_of(expert), g.up, up_);
    if (down_) put(down_of(expert), g.down, down_);
  }

  // The parts of an expert, in their order.
  void reduce(int expert) const {
    float* const share = room_ + first_share_[expert] * share_floats();
    for (int part = 1; part < parts_[expert]; part++) {
      const float* __restrict__ other = share + part * share_floats();
      for (size_t i = 0; i < share_floats(); i++) share[i] += other[i];
    }
    const HalfGradients sum = in_share(share);
    round(expert, sum);
    if (up_bias_) std::memcpy(job_.d_up_bias + expert * up_bias_, sum.up_bias, up_bias_ * sizeof(float));
    if (down_bias_) std::memcpy(job_.d_down_bias + expert * down_bias_, sum.down_bias, down_bias_ * sizeof(float));
  }

  // Of an expert without rows.
  void clear(int expert) const {
    if (up_) std::memset(up_of(expert), 0, up_ * sizeof(T));
    if (down_) std::memset(down_of(expert), 0, down_ * sizeof(T));
    if (up_bias_) std::memset(job_.d_up_bias + expert * up_bias_, 0, up_bias_ * sizeof(float));
    if (down_bias_) std::memset(job_.d_down_bias + expert * down_bias_, 0, down_bias_ * sizeof(float));
  }

 private:
  size_t share_floats() const {
    return Workspace::padded(up_) + Workspace::padded(down_) + Workspace::padded(up_bias_) +
           Workspace::padded(down_bias_);
  }
  HalfGradients in_share(float* share) const {
    float* const down = share + Workspace::padded(up_);
    float* const up_bias = down + Workspace::padded(down_);
    float* const down_bias = up_bias + Workspace::padded(up_bias_);
    return {up_ ? share : nullptr, down_ ? down : nullptr, up_bias_ ? up_bias : nullptr,
            down_bias_ ? down_bias : nullptr, nullptr, nullptr};
  }
  T* up_of(int expert) const { return up_ ? reinterpret_cast<T*>(job_.d_up) + expert * up_ : nullptr; }
  T* down_of(int expert) const { return down_ ? reinterpret_cast<T*>(job_.d_down) + expert * down_ : nullptr; }

  static void place(float*&, bfloat*& half, bfloat* to) { half = to; }
  static void place(float*& sum, bfloat*&, float* to) { sum = to; }
  static void put(bfloat* to, const float* from, size_t n) { to_half(to, from, n); }
  static void put(float* to, const float* from, size_t n) {
    if (to != from) std::memcpy(to, from, n * sizeof(float));
  }

  const Job& job_;
  const size_t up_, down_, up_bias_, down_bias_;  // of an expert; 0 where not wanted
  std::vector<int> first_share_, parts_;
  int shares_ = 0;
  bool in_blocks_ = false;
  float* room_ = nullptr;
};

#endif

}  // namespace turnout

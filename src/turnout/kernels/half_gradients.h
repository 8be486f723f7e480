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
// rows are one block has them rounded at once; of one with more they are added up in a room for its sums in float. There
// are no more rooms than ROOM_BYTES have place for, or half the memory of all gradients, or one.
template <class T>
class HalfWeightGradients {
  static constexpr bool ROUNDED = sizeof(T) == sizeof(bfloat);

 public:
  HalfWeightGradients(const Job& job, const Routes& routes, long before)
      : job_(job),
        up_(job.d_up ? job.dim * before : 0),
        down_(job.d_down ? job.hidden * job.dim : 0),
        up_bias_(job.d_up_bias ? before : 0),
        down_bias_(job.d_down_bias ? job.dim : 0),
        needs_room_(job.experts, false),
        room_of_(job.experts, -1) {
    if (!ROUNDED || !room_floats()) return;
    long needed = 0;
    for (int e = 0; e < job.experts; e++) {
      needs_room_[e] = blocks_of_expert(routes, job, e).parts > 1;
      needed += needs_room_[e];
    }
    needed = std::min<long>(needed, job.threads);
    const size_t most = std::max(ROOM_BYTES, job.experts * (up_ + down_) * sizeof(T) / 2);
    busy_.assign(std::min<long>(needed, std::max<long>(1, most / (room_floats() * sizeof(float)))), 0);
    are_short_ = long(busy_.size()) < needed;
  }

  // Whether there are fewer rooms than threads that want one: then several are to compute an expert's blocks.
  bool are_short() const { return are_short_; }
  size_t floats() const { return busy_.size() * room_floats(); }
  void use(float* rooms) { rooms_ = rooms; }

  // Before an expert's first block, and after its last. A room that is busy becomes free, as those who are in it have
  // blocks that stand earlier in the schedule, all of them (RowSums::plan).
  void open(int expert) {
    clear_biases(expert);
    if (!needs_room_[expert]) return;
    for (int room = 0;; room = (room + 1) % int(busy_.size())) {
      char none = 0;
      if (__atomic_compare_exchange_n(&busy_[room], &none, 1, false, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED)) {
        room_of_[expert] = room;
        return;
      }
      sched_yield();
    }
  }
  void close(int expert) {
    if (!needs_room_[expert]) return;
    const HalfGradients sum = of(expert);
    if (up_) put(up_of(expert), sum.up, up_);
    if (down_) put(down_of(expert), sum.down, down_);
    __atomic_store_n(&busy_[room_of_[expert]], 0, __ATOMIC_RELEASE);
  }

  // Where the blocks of an expert that is open add.
  HalfGradients of(int expert) const {
    HalfGradients g = {};
    g.up_bias = up_bias_ ? job_.d_up_bias + expert * up_bias_ : nullptr;
    g.down_bias = down_bias_ ? job_.d_down_bias + expert * down_bias_ : nullptr;
    if (needs_room_[expert]) {
      float* const room = rooms_ + room_of_[expert] * room_floats();
      g.up = up_ ? room : nullptr;
      g.down = down_ ? room + Workspace::padded(up_) : nullptr;
    } else {
      place(g.up, g.half_up, up_of(expert));
      place(g.down, g.half_down, down_of(expert));
    }
    return g;
  }

  // Of an expert without rows.
  void clear(int expert) const {
    if (up_) std::memset(up_of(expert), 0, up_ * sizeof(T));
    if (down_) std::memset(down_of(expert), 0, down_ * sizeof(T));
    clear_biases(expert);
  }

 private:
  static constexpr size_t ROOM_BYTES = size_t(64) << 20;

  size_t room_floats() const { return Workspace::padded(up_) + Workspace::padded(down_); }
  void clear_biases(int expert) const {
    if (up_bias_) std::memset(job_.d_up_bias + expert * up_bias_, 0, up_bias_ * sizeof(float));
    if (down_bias_) std::memset(job_.d_down_bias + expert * down_bias_, 0, down_bias_ * sizeof(float));
  }
  T* up_of(int expert) const { return up_ ? reinterpret_cast<T*>(job_.d_up) + expert * up_ : nullptr; }
  T* down_of(int expert) const { return down_ ? reinterpret_cast<T*>(job_.d_down) + expert * down_ : nullptr; }

  static void place(float*&, bfloat*& half, bfloat* to) { half = to; }
  static void place(float*& sum, bfloat*&, float* to) { sum = to; }
  static void put(bfloat* to, const float* from, size_t n) { to_half(to, from, n); }
  static void put(float*, const float*, size_t) {}  // is in place

  const Job& job_;
  const size_t up_, down_, up_bias_, down_bias_;  // of an expert; 0 where not wanted
  std::vector<char> needs_room_;                  // of each expert
  std::vector<int> room_of_;
  std::vector<char> busy_;  // of each room
  bool are_short_ = false;
  float* rooms_ = nullptr;
};

#endif

}  // namespace turnout

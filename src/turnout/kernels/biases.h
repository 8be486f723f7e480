// What biases add to the backward pass: sums over rows and columns of what other products use.
#pragma once

#include "half_block.h"
#include "lanes.h"

namespace turnout {

// sum[i] += factor * row[i]
template <class T>
inline void add_scaled(float* sum, const T* row, float factor, long n) {
  long i = 0;
  for (; i + LANES <= n; i += LANES) store(sum + i, load(sum + i) + load(row + i) * factor);
  for (; i < n; i++) sum[i] += value(row[i]) * factor;
}

// row . other
template <class T>
inline float inner(const T* row, const float* other, long n) {
  vec sums[2] = {};
  long i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES)
    for (int half = 0; half < 2; half++) sums[half] += load(row + i + half * LANES) * load(other + i + half * LANES);
  float sum = total(sums[0] + sums[1]);
  for (; i < n; i++) sum += value(row[i]) * other[i];
  return sum;
}

#if defined(TURNOUT_MATRIX_UNIT)

// sum[c] += column c of the block, row after row.
template <int P>
inline void add_block(const HalfBlock<P>& block, long columns, float* sum) {
  for (long c = 0; c < columns; c += HALF_GROUP) {
    vec sums[2] = {first_values(sum + c, columns - c), first_values(sum + c + LANES, columns - c - LANES)};
    for (long r = 0; r < block.rows; r++) {
      const bfloat* const from = block.at(c / HALF_GROUP, r);
      for (int half = 0; half < 2; half++) sums[half] += whole_values<P>(from + half * LANES);
    }
    for (int half = 0; half < 2; half++)
      _mm512_mask_storeu_ps(sum + c + half * LANES, __mmask16(first_lanes(columns - c - half * LANES)), (__m512)sums[half]);
  }
}

#endif

}  // namespace turnout

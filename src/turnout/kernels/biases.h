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

// sum[c] += column c of up to 32 columns in pairs of rows, row after row; so many groups of rows.
template <int P>
inline void add_panel(const bfloat* panel, long groups, long columns, float* sum) {
  for (int tile = 0; tile < 2; tile++, panel += HALF_TILE, sum += UNIT_ROWS, columns -= UNIT_ROWS) {
    vec all = first_values(sum, columns);
    for (long line = 0; line < groups * UNIT_ROWS; line++) {
      const bfloat* const from = panel + line / UNIT_ROWS * P * HALF_PLANE + line % UNIT_ROWS * HALF_GROUP;
      vec even = {}, odd = {};
#pragma GCC unroll 3
      for (int p = P - 1; p >= 0; p--) {
        const __m512i words = _mm512_load_si512(from + p * HALF_PLANE);
        even += (vec)_mm512_slli_epi32(words, 16);
        odd += (vec)upper_bits(words);
      }
      all += even;
      all += odd;
    }
    _mm512_mask_storeu_ps(sum, __mmask16(first_lanes(columns)), (__m512)all);
  }
}

#endif

}  // namespace turnout

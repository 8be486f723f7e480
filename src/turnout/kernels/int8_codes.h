// Rows of float to codes of 8 or 15 bits, with a scale for each row and group, so that no outlier costs other groups.
#pragma once

#include "int8_tile.h"

namespace turnout {

inline int32_t largest_of(ints v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_epi32((__m512i)v);
#else
  int32_t largest = v[0];
  for (int lane = 1; lane < LANES; lane++) largest = v[lane] > largest ? v[lane] : largest;
  return largest;
#endif
}

inline int32_t sum_of(ints v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_epi32((__m512i)v);
#else
  int32_t sum = 0;
  for (int lane = 0; lane < LANES; lane++) sum += v[lane];
  return sum;
#endif
}

// The largest |x| of a group as the bits of a float, which order as the numbers do, infinity and NaN last.
inline int32_t largest_bits(const float* x) {
  ints most = {};
  for (int j = 0; j < GROUP; j += LANES) {
    const ints size = (ints)load(x + j) & 0x7FFFFFFF;
    most = size > most ? size : most;
  }
  return largest_of(most);
}

// Whole numbers that are bytes.
inline void store_bytes(int8_t* p, ints v) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)v));
#else
  typedef int8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
  *reinterpret_cast<bytes*>(p) = __builtin_convertvector(v, bytes);
#endif
}

inline float float_of(int32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// What a code of the group stands for: of 8 bits the finest, of 15 bits a power of two.
template <int DIGITS>
inline float code_scale(int32_t largest) {
  constexpr int32_t NEGLIGIBLE = 0x0DA24260;  // 1e-30: beyond it 1 / scale is no float
  if (largest < NEGLIGIBLE) return 0;
  if (DIGITS == 1) return float_of(largest) / 127;
  return float_of((largest & 0x7F800000) - (13 << 23));
}

// Group `group` of row `row`: GROUP values of x. A value that is not finite makes the scale, and so the result, NaN.
template <int DIGITS>
inline void encode(const float* x, const Codes<DIGITS>& codes, long group, long row) {
  const float magic = 12582912.0f;  // adding it rounds to whole numbers, which then stand in the low bits
  const int32_t largest = largest_bits(x);
  const bool finite = largest < 0x7F800000;
  const float scale = finite ? code_scale<DIGITS>(largest) : float_of(0x7FC00000);
  const float inverse = finite && scale > 0 ? 1 / scale : 0;
  int8_t* to = codes.codes(group, row);
  ints sum = {};
  for (int j = 0; j < GROUP; j += LANES) {
    const vec value = finite ? load(x + j) : vec{};
    const ints code = (ints)(value * inverse + magic) - 0x4B400000;
    sum += code;
    const ints high = DIGITS == 1 ? code : (code + 128) >> 8;
    store_bytes(to + j, high);
    if (DIGITS == 2) store_bytes(to + GROUP + j, code - (high << 8));
  }
  codes.scales(group, row)[0] = scale;
  codes.scales(group, row)[1] = scale * float(sum_of(sum));
}

// A whole row of `columns` values, the last group filled up with zeros.
template <int DIGITS>
inline void encode_row(const float* x, long columns, const Codes<DIGITS>& codes, long row) {
  long c = 0;
  for (; c + GROUP <= columns; c += GROUP) encode(x + c, codes, c / GROUP, row);
  if (c == columns) return;
  alignas(64) float last[GROUP] = {};
  std::memcpy(last, x + c, (columns - c) * sizeof(float));
  encode(last, codes, c / GROUP, row);
}

}  // namespace turnout

// Products with weights of 8 bits: whole sums of a group of inner columns, then scaled and added in float.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <utility>

#include "lanes.h"

namespace turnout {

constexpr int GROUP = 32;         // inner columns that share a scale
constexpr int PANEL = 32;         // columns of a weight that lie together
constexpr int QUADS = GROUP / 4;  // four inner columns are multiplied and added at once
constexpr long PANEL_BYTES = GROUP * PANEL;
constexpr long AHEAD = 8192;  // bytes from what is read to what is fetched meanwhile
constexpr int CODE_ROWS = LANES == 16 ? 12 : 4;  // of 32 registers: 24 sums, two of weights and one of x; or 8, 2 and 1

inline ints load_ints(const void* p) {
  typedef int32_t loose_ints __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
  return *static_cast<const loose_ints*>(p);
}

// sum + w0 x0 + w1 x1 + w2 x2 + w3 x3 in each lane, bytes of w unsigned and of x signed.
inline ints dot(ints sum, ints w, ints x) {
#if defined(__AVX512VNNI__)
  return (ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)w, (__m512i)x);
#elif defined(__AVXVNNI__) && !defined(__AVX512F__)
  return (ints)_mm256_dpbusd_avx_epi32((__m256i)sum, (__m256i)w, (__m256i)x);
#elif defined(__AVX512BW__)
  const __m512i even = _mm512_srai_epi16(_mm512_slli_epi16((__m512i)x, 8), 8), odd = _mm512_srai_epi16((__m512i)x, 8);
  const __m512i w_even = _mm512_and_si512((__m512i)w, _mm512_set1_epi16(255)), w_odd = _mm512_srli_epi16((__m512i)w, 8);
  return sum + (ints)_mm512_madd_epi16(w_even, even) + (ints)_mm512_madd_epi16(w_odd, odd);
#elif defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i even = _mm256_srai_epi16(_mm256_slli_epi16((__m256i)x, 8), 8), odd = _mm256_srai_epi16((__m256i)x, 8);
  const __m256i w_even = _mm256_and_si256((__m256i)w, _mm256_set1_epi16(255)), w_odd = _mm256_srli_epi16((__m256i)w, 8);
  return sum + (ints)_mm256_madd_epi16(w_even, even) + (ints)_mm256_madd_epi16(w_odd, odd);
#else
  for (int byte = 0; byte < 4; byte++) sum += (ints)((words)w >> (8 * byte) & 255) * (x << (24 - 8 * byte) >> 24);
  return sum;
#endif
}

// Sums of one digit begin at START. Where a product and a sum are one step, START is a float's 1.5 * 2^23, whose low bits
// are whole numbers, and to scale it away is exact: a scale has 13 bits, so that its product with START is a float.
#if defined(__FMA__)
constexpr int32_t START = 0x4B400000;
inline vec scaled(ints sum, vec scale) { return (vec)sum * scale + scale * -12582912.0f; }
#else
constexpr int32_t START = 0;
inline vec scaled(ints sum, vec scale) { return __builtin_convertvector(sum, vec) * scale; }
#endif

// Rows of x as codes: x = scale * code in each group, where code has one digit, or two of base 256, each a signed byte.
template <int DIGITS>
struct Codes {
  int8_t* code;  // [group][rows][DIGITS][GROUP], the higher digit first
  float* scale;  // [group][rows][2]: scale, and scale * sum of the codes
  long rows;     // of the whole block

  int8_t* codes(long group, long row) const { return code + (group * rows + row) * DIGITS * GROUP; }
  float* scales(long group, long row) const { return scale + (group * rows + row) * 2; }
};

// What a panel of a weight holds: w = scale * (code - zero) in each group and column.
struct Panel {
  const uint8_t* code;   // [group][QUADS][PANEL][4]
  const uint8_t* scale;  // [group][2][PANEL]: scale of a column's base, zero
  const bfloat* base;    // [PANEL]
  int groups;
  bool fetch;  // from memory, while it is read: only the first rows of a block find it outside of the cache
};

// LANES bytes; by hand, as GCC 12 widens them one by one.
inline words widened(const uint8_t* p) {
#if defined(__AVX512F__)
  return (words)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (words)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  typedef uint8_t bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
  return __builtin_convertvector(*reinterpret_cast<const bytes*>(p), words);
#endif
}
// A byte of four bits of exponent and four of fraction, of the largest scale in a column: 240 stands for 1.
inline vec scale_of(const uint8_t* p, vec base) { return (vec)((widened(p) << 19) + (112 << 23)) * base; }
inline vec zero_of(const uint8_t* p) { return __builtin_convertvector((ints)widened(p), vec); }

// out[i][j] = sum over inner columns of x[first + i] w[j], for ROWS rows and PANEL columns.
template <int DIGITS, int ROWS, bool FETCH>
void code_tile(const Codes<DIGITS>& x, long first, const Panel& panel, float* out, long out_step) {
  constexpr int LINES = ROWS * DIGITS;
  for (int column = 0; column < PANEL; column += TILE_COLUMNS) {
    // in registers while the rows are few
    vec all[ROWS][2] = {};
    const vec base[] = {load(panel.base + column), load(panel.base + column + LANES)};
    for (int g = 0; g < panel.groups; g++) {
      ints sum[LINES][2];
#pragma GCC unroll 12
      for (int i = 0; i < LINES; i++) sum[i][0] = sum[i][1] = (DIGITS == 1 ? START : 0) - ints{};
      const int8_t* from = x.codes(g, first);
      const uint8_t* w = panel.code + g * PANEL_BYTES + column * 4;
      for (int q = 0; q < QUADS; q++, w += PANEL * 4) {
        const ints w0 = load_ints(w), w1 = load_ints(w + LANES * 4);
        __builtin_prefetch(w + (FETCH ? AHEAD : PANEL_BYTES), 0, FETCH ? 2 : 3);
        __builtin_prefetch(w + LANES * 4 + (FETCH ? AHEAD : PANEL_BYTES), 0, FETCH ? 2 : 3);
#pragma GCC unroll 12
        for (int i = 0; i < LINES; i++) {
          int32_t four;
          std::memcpy(&four, from + i * GROUP + q * 4, 4);
          const ints spread = four - ints{};
          sum[i][0] = dot(sum[i][0], w0, spread);
          sum[i][1] = dot(sum[i][1], w1, spread);
        }
      }
      const uint8_t* scales = panel.scale + g * 2 * PANEL + column;
      if (FETCH) __builtin_prefetch(scales + AHEAD / 16, 0, 2);
      const float* own = x.scales(g, first);
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        const vec scale = scale_of(scales + half * LANES, base[half]);
        const vec low = -scale * zero_of(scales + PANEL + half * LANES);
#pragma GCC unroll 12
        for (int r = 0; r < ROWS; r++) {
          const ints high = sum[r * DIGITS][half], lower = sum[r * DIGITS + DIGITS - 1][half];
          const vec whole =
              DIGITS == 1 ? scaled(lower, scale) : __builtin_convertvector((high << 8) + lower, vec) * scale;
          all[r][half] = all[r][half] + low * own[2 * r + 1] + whole * own[2 * r];
        }
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < ROWS; r++)
      for (int half = 0; half < 2; half++) store(out + r * out_step + column + half * LANES, all[r][half]);
  }
}

template <int DIGITS>
using CodeTile = void (*)(const Codes<DIGITS>&, long, const Panel&, float*, long);

// The tile for so many rows, from 1 to CODE_ROWS / DIGITS.
template <int DIGITS, int... ROWS>
CodeTile<DIGITS> code_tile_of(int rows, bool fetch, std::integer_sequence<int, ROWS...>) {
  static const CodeTile<DIGITS> table[2][sizeof...(ROWS)] = {{code_tile<DIGITS, ROWS + 1, false>...},
                                                             {code_tile<DIGITS, ROWS + 1, true>...}};
  return table[fetch][rows - 1];
}
template <int DIGITS>
void code_product(const Codes<DIGITS>& x, long first, int rows, const Panel& panel, float* out, long out_step) {
  const auto heights = std::make_integer_sequence<int, CODE_ROWS / DIGITS>();
  code_tile_of<DIGITS>(rows, panel.fetch, heights)(x, first, panel, out, out_step);
}

}  // namespace turnout

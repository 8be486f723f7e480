// Vectors as wide as the processor's, in the compiler's own vector extension: GCC and Clang, any processor.
#pragma once

#include <cstdint>
#include <cstring>

namespace turnout {

#if defined(__AVX512F__)
constexpr int LANES = 16;
constexpr int TILE_ROWS = 14;  // 28 sums, two loaded columns and one spread value: 31 of 32 registers
#elif defined(__AVX__)
constexpr int LANES = 8;
constexpr int TILE_ROWS = 6;  // 12 + 2 + 1 of 16 registers
#else
constexpr int LANES = 4;
constexpr int TILE_ROWS = 6;
#endif
constexpr int TILE_COLUMNS = 2 * LANES;

typedef float vec __attribute__((vector_size(LANES * 4)));
typedef int32_t ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t words __attribute__((vector_size(LANES * 4)));
typedef float loose __attribute__((vector_size(LANES * 4), aligned(4), may_alias));
typedef uint16_t halves __attribute__((vector_size(LANES * 2), aligned(2), may_alias));

struct bfloat {
  uint16_t bits;  // the upper half of a float
};

inline vec load(const float* p) { return *reinterpret_cast<const loose*>(p); }
inline vec load(const bfloat* p) {
  return (vec)(__builtin_convertvector(*reinterpret_cast<const halves*>(p), words) << 16);
}
inline void store(float* p, vec v) { *reinterpret_cast<loose*>(p) = v; }
inline vec splat(float x) { return x - vec{}; }

inline float value(float x) { return x; }
inline float value(bfloat x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}

// To the nearest, of two as near the even one; NaN stays.
inline bfloat rounded(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return {uint16_t((x != x ? bits | 1 << 22 : bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

// Past the caches, for what is written whole and not read soon; `p` is a multiple of a vector's size.
inline void stream(float* p, vec v) {
#if defined(__AVX512F__)
  asm volatile("vmovntps %1, %0" : "=m"(*reinterpret_cast<loose*>(p)) : "v"(v));
#elif defined(__AVX__)
  asm volatile("vmovntps %1, %0" : "=m"(*reinterpret_cast<loose*>(p)) : "x"(v));
#else
  store(p, v);
#endif
}

// Streamed stores are seen by other threads only after this.
inline void end_streams() {
#if defined(__x86_64__)
  asm volatile("sfence" ::: "memory");
#endif
}

inline vec reciprocal(vec d) {
#if defined(__AVX512F__)
  vec r;
  asm("vrcp14ps %1, %0" : "=v"(r) : "v"(d));
  return r * (2.0f - d * r);  // 14 bits, doubled by a step of Newton's
#else
  return 1.0f / d;
#endif
}

// e^x for x in [-87, 88], which other x are moved to; NaN stays. Polynomial of Cephes' expf.
inline vec exponential(vec x) {
  const vec least = splat(-87.0f), most = splat(88.0f);
  x = x < least ? least : x;
  x = x > most ? most : x;
  const float magic = 12582912.0f;  // adding it rounds to whole numbers, which then stand in the low bits
  const vec shifted = x * 1.44269504f + magic;
  const vec n = shifted - magic;
  const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const ints exponent = ((ints)shifted - 0x4B400000 + 127) << 23;
  return p * (vec)exponent;
}

inline vec sigmoid(vec x) { return reciprocal(exponential(-x) + 1.0f); }

inline float total(vec v) {
  float sum = 0;
  for (int lane = 0; lane < LANES; lane++) sum += v[lane];
  return sum;
}

}  // namespace turnout

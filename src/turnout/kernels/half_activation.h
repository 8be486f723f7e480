// Activations between products of bfloat: no more exact than their rounding needs, in a third of the instructions.
#pragma once

#include "activation.h"
#include "half_tile.h"

namespace turnout {

#if defined(TURNOUT_MATRIX_UNIT)

// 1 / (1 + 2^-x), within 2e-4 of it; of an infinite x NaN. The polynomial is 2^f on [-0.5, 0.5], within 8e-5 of it.
inline vec half_sigmoid2(vec x) {
  const vec n = (vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const vec f = n - x;
  vec p = f * 0.05515807f + 0.24257915f;
  p = p * f + 0.69326048f;
  p = p * f + 0.99993035f;
  return (vec)_mm512_rcp14_ps(_mm512_scalef_ps((__m512)p, (__m512)-n) + 1.0f);
}

template <int KIND>
struct HalfFormula {
  static vec value(vec x, vec second) { return Formula<KIND>::value(x, second); }
};

// The normal distribution as a logistic function of an odd polynomial: x Phi(x) within 3e-5.
template <>
struct HalfFormula<GELU> {
  static vec value(vec x, vec) {
    const float to2 = 1.44269504f;
    vec square = x * x;
    square = square > 20.0f ? splat(20.0f) : square;
    const vec slope = (square * (-0.000704530f * to2) + 0.0740205f * to2) * square + 1.5950056f * to2;
    return x * half_sigmoid2(x * slope);
  }
};

template <>
struct HalfFormula<SWIGLU> {
  static vec value(vec gate, vec up) { return gate * half_sigmoid2(gate * 1.44269504f) * up; }
};

template <>
struct HalfFormula<SWIGLU_CLAMPED> {
  static vec value(vec gate, vec up) {
    typedef Formula<SWIGLU_CLAMPED> exact;
    gate = exact::low(gate);
    return gate * half_sigmoid2(gate * (1.702f * 1.44269504f)) * (exact::within(up) + 1.0f);
  }
};

// A tile of columns of h, or two where there is no gate, from what the first product gave; rows lie HALF_GROUP apart.
typedef void (*HalfActivation)(const HalfSums& before, int rows, bfloat* h);

template <int KIND>
void half_activation(const HalfSums& before, int rows, bfloat* h) {
  typedef HalfFormula<KIND> formula;
  for (int i = 0; i < rows; i++, h += HALF_GROUP) {
    const vec first = load(before.sum[0][i]), second = load(before.sum[1][i]);
    if (Formula<KIND>::parts == 2)
      store_half(h, formula::value(first, second));
    else
      store_halves(h, formula::value(first, first), formula::value(second, second));
  }
}

inline HalfActivation half_activation(int kind) {
  static const HalfActivation table[] = {half_activation<RELU>, half_activation<GELU>, half_activation<SWIGLU>,
                                         half_activation<SWIGLU_CLAMPED>};
  return table[kind];
}

#endif

}  // namespace turnout

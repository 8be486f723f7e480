// Activations between products on the matrix unit. Of bfloat they are no more exact than their rounding needs, in a third
// of the instructions.
#pragma once

#include <type_traits>

#include "activation.h"
#include "half_tile.h"
#include "routes.h"

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
  static vec slopes(vec x, vec second, vec dh, vec& d_x, vec& d_second) {
    return Formula<KIND>::slopes(x, second, dh, d_x, d_second);
  }
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
  static vec slopes(vec x, vec second, vec dh, vec& d_x, vec& d_second) {
    return Formula<GELU>::slopes(x, second, dh, d_x, d_second);
  }
};

template <>
struct HalfFormula<SWIGLU> {
  static vec value(vec gate, vec up) { return gate * half_sigmoid2(gate * 1.44269504f) * up; }
  static vec slopes(vec gate, vec up, vec dh, vec& d_gate, vec& d_up) {
    const vec s = half_sigmoid2(gate * 1.44269504f), silu = gate * s;
    d_up = dh * silu;
    d_gate = dh * up * (s + silu * (1.0f - s));
    return silu * up;
  }
};

template <>
struct HalfFormula<SWIGLU_CLAMPED> {
  static vec value(vec gate, vec up) {
    typedef Formula<SWIGLU_CLAMPED> exact;
    gate = exact::low(gate);
    return gate * half_sigmoid2(gate * (1.702f * 1.44269504f)) * (exact::within(up) + 1.0f);
  }
  static vec slopes(vec gate, vec up, vec dh, vec& d_gate, vec& d_up) {
    return Formula<SWIGLU_CLAMPED>::slopes(gate, up, dh, d_gate, d_up);
  }
};

// What a plane, or all of them, hold.
template <int P>
using Held = std::conditional_t<P == 1, bfloat, float>;
template <int P, int KIND>
using PlaneFormula = std::conditional_t<P == 1, HalfFormula<KIND>, Formula<KIND>>;

// A tile of columns of h, or two where there is no gate, from what the first product gave; rows lie HALF_GROUP apart.
typedef void (*HalfActivation)(const HalfSums& before, int rows, bfloat* h);

template <int P, int KIND>
void half_activation(const HalfSums& before, int rows, bfloat* h) {
  typedef PlaneFormula<P, KIND> formula;
  for (int i = 0; i < rows; i++, h += HALF_GROUP) {
    const vec first = load(before.sum[0][i]), second = load(before.sum[1][i]);
    if (Formula<KIND>::parts == 2)
      put_half<P>(h, formula::value(first, second));
    else
      put_halves<P>(h, formula::value(first, first), formula::value(second, second));
  }
}

// Values before the activation that a row of a saved panel has two tiles of: gates and what they gate, or HALF_PANEL.
constexpr long half_saved_width(bool gated) { return gated ? UNIT_ROWS : HALF_PANEL; }

// What is beyond a clamp, where slopes are zero, stays there when it is rounded.
inline void stay_clamped(vec& gate, vec& up) {
  const vec above = splat(7.03125f);  // the next bfloat after 7
  gate = (gate > 7.0f) & (gate < above) ? above : gate;
  up = (up > 7.0f) & (up < above) ? above : up;
  up = (up < -7.0f) & (up > -above) ? -above : up;
}

// What kernel.py makes room for by vectors' panels holds these, too.
static_assert(TILE_COLUMNS == HALF_PANEL, "a panel of either has as many columns");

// Saved by expert, [panel][row][tile][UNIT_ROWS], whatever blocks its rows are computed in. Row `row` of all rows.
template <class T>
T* half_saved(T* saved, const Routes& routes, int expert, long panels, long panel, int row) {
  const long first = routes.start[expert], rows = routes.start[expert + 1] - first;
  return saved + (first * panels + panel * rows + (row - first)) * HALF_PANEL;
}

// Two tiles of columns of dh, of which the second may have nothing saved: then it is past the last column. Writes
// weight * h and the gradients before the activation; dot += dh * h. Rows of h and of gradients lie HALF_GROUP apart.
template <int P>
using HalfSlopes = void (*)(const HalfSums& dh, const Held<P>* saved, const Held<P>* second_saved, const float* weight,
                            int rows, bfloat* h, bfloat* d_before, bfloat* d_second, float* dot);

template <int P, int KIND>
void half_slopes(const HalfSums& dh, const Held<P>* saved, const Held<P>* second_saved, const float* weight, int rows,
                 bfloat* h, bfloat* d_before, bfloat* d_second, float* dot) {
  constexpr bool gated = Formula<KIND>::parts == 2;
  for (int i = 0; i < rows; i++) {
    vec product = load(dot + i * LANES), value[2] = {}, d_x[2] = {}, d_up[2] = {};
    for (int tile = 0; tile < 2; tile++) {
      const Held<P>* const from = tile ? second_saved : saved;
      if (!from) continue;
      const vec x = load(from + i * HALF_PANEL), up = gated ? load(from + i * HALF_PANEL + UNIT_ROWS) : x;
      const vec own = load(dh.sum[tile][i]);
      value[tile] = PlaneFormula<P, KIND>::slopes(x, up, own * weight[i], d_x[tile], d_up[tile]);
      product += own * value[tile];
    }
    store(dot + i * LANES, product);
    put_halves<P>(h + i * HALF_GROUP, value[0] * weight[i], value[1] * weight[i]);
    put_halves<P>(d_before + i * HALF_GROUP, d_x[0], d_x[1]);
    if (gated) put_halves<P>(d_second + i * HALF_GROUP, d_up[0], d_up[1]);
  }
}

template <int P>
HalfSlopes<P> half_slopes(int kind) {
  static const HalfSlopes<P> table[] = {half_slopes<P, RELU>, half_slopes<P, GELU>, half_slopes<P, SWIGLU>,
                                        half_slopes<P, SWIGLU_CLAMPED>};
  return table[kind];
}

template <int P>
HalfActivation half_activation(int kind) {
  static const HalfActivation table[] = {half_activation<P, RELU>, half_activation<P, GELU>, half_activation<P, SWIGLU>,
                                         half_activation<P, SWIGLU_CLAMPED>};
  return table[kind];
}

#endif

}  // namespace turnout

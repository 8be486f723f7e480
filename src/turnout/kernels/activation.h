// Activations on tiles: forward, and backward from the saved values before them.
#pragma once

#include "block.h"
#include "lanes.h"

namespace turnout {

enum Kind { RELU, GELU, SWIGLU, SWIGLU_CLAMPED };

// Phi(x), the normal distribution, and its density without 1 / sqrt(2 pi). Abramowitz & Stegun 1964, 7.1.26.
// Nothing beyond 12.65: subnormal numbers, with which products take ten times as long, would come of it.
inline vec normal(vec x, vec& density) {
  const vec exponent = x * x * -0.5f;
  density = exponent < -80.0f ? vec{} : exponential(exponent);
  const vec size = x < 0.0f ? -x : x;
  const vec t = reciprocal(size * (0.3275911f * 0.70710678f) + 1.0f);
  vec p = t * 1.061405429f - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const vec tail = p * t * density * 0.5f;
  return x < 0.0f ? tail : 1.0f - tail;
}

template <int KIND>
struct Formula;

template <>
struct Formula<RELU> {
  static constexpr int parts = 1;
  static vec value(vec x, vec) { return x < 0.0f ? vec{} : x; }
  static vec slopes(vec x, vec, vec dh, vec& dx, vec&) {
    dx = x <= 0.0f ? vec{} : dh;
    return value(x, x);
  }
};

template <>
struct Formula<GELU> {
  static constexpr int parts = 1;
  static vec value(vec x, vec) {
    vec density;
    return x * normal(x, density);
  }
  static vec slopes(vec x, vec, vec dh, vec& dx, vec&) {
    vec density;
    const vec below = normal(x, density);
    dx = dh * (below + x * density * 0.39894228f);
    return x * below;
  }
};

template <>
struct Formula<SWIGLU> {
  static constexpr int parts = 2;
  static vec value(vec gate, vec up) { return gate * sigmoid(gate) * up; }
  static vec slopes(vec gate, vec up, vec dh, vec& d_gate, vec& d_up) {
    const vec s = sigmoid(gate), silu = gate * s;
    d_up = dh * silu;
    d_gate = dh * up * (s + silu * (1.0f - s));
    return silu * up;
  }
};

template <>
struct Formula<SWIGLU_CLAMPED> {
  static constexpr int parts = 2;
  static vec low(vec gate) { return gate > 7.0f ? splat(7.0f) : gate; }
  static vec within(vec up) {
    const vec most = splat(7.0f), least = splat(-7.0f);
    up = up > most ? most : up;
    return up < least ? least : up;
  }
  static vec value(vec gate, vec up) {
    gate = low(gate);
    return gate * sigmoid(gate * 1.702f) * (within(up) + 1.0f);
  }
  static vec slopes(vec gate, vec up, vec dh, vec& d_gate, vec& d_up) {
    const vec g = low(gate), u = within(up) + 1.0f, s = sigmoid(g * 1.702f), swish = g * s;
    d_up = (up > 7.0f) | (up < -7.0f) ? vec{} : dh * swish;
    d_gate = gate > 7.0f ? vec{} : dh * u * (s + swish * (1.0f - s) * 1.702f);
    return swish * u;
  }
};

struct Activation {
  int parts;  // 2 when gated
  // before: [parts][TILE_ROWS][TILE_COLUMNS]; bias: [parts][TILE_COLUMNS] or null; saved: [rows][parts][TILE_COLUMNS]
  void (*forward)(const float* before, int rows, const float* bias, float* saved, float* h);
  // dh: [rows][TILE_COLUMNS]; writes weight * h and the gradients before the activation; dot += dh * h
  void (*backward)(const float* dh, const float* saved, const float* weight, int rows, float* h, float* d_before,
                   long part_step, float* dot);
  void (*line)(const float* gate, const float* up, float* h, int n);  // n: a multiple of LANES
};

template <int KIND>
struct OnTiles {
  typedef Formula<KIND> formula;
  static constexpr int parts = formula::parts, second = formula::parts - 1;

  static void forward(const float* before, int rows, const float* bias, float* saved, float* h) {
    for (int r = 0; r < rows; r++)
      for (int j = 0; j < TILE_COLUMNS; j += LANES) {
        vec x = load(before + r * TILE_COLUMNS + j);
        vec up = load(before + (second * TILE_ROWS + r) * TILE_COLUMNS + j);
        if (bias) {
          x += load(bias + j);
          up += load(bias + second * TILE_COLUMNS + j);
        }
        if (saved) {
          store(saved + r * parts * TILE_COLUMNS + j, x);
          if (second) store(saved + (r * parts + 1) * TILE_COLUMNS + j, up);
        }
        store(h + r * STEP + j, formula::value(x, up));
      }
  }

  static void backward(const float* dh, const float* saved, const float* weight, int rows, float* h, float* d_before,
                       long part_step, float* dot) {
    for (int r = 0; r < rows; r++) {
      vec product = load(dot + r * LANES);
      for (int j = 0; j < TILE_COLUMNS; j += LANES) {
        const vec from = load(dh + r * TILE_COLUMNS + j);
        const vec x = load(saved + r * parts * TILE_COLUMNS + j);
        const vec up = load(saved + (r * parts + second) * TILE_COLUMNS + j);
        vec d_x, d_up;
        const vec value = formula::slopes(x, up, from * weight[r], d_x, d_up);
        product += from * value;
        store(h + r * STEP + j, value * weight[r]);
        store(d_before + r * STEP + j, d_x);
        if (second) store(d_before + part_step + r * STEP + j, d_up);
      }
      store(dot + r * LANES, product);
    }
  }

  static void line(const float* gate, const float* up, float* h, int n) {
    for (int j = 0; j < n; j += LANES) store(h + j, formula::value(load(gate + j), load(up + j)));
  }
};

inline const Activation& activation(int kind) {
  static const Activation table[] = {
      {OnTiles<RELU>::parts, OnTiles<RELU>::forward, OnTiles<RELU>::backward, OnTiles<RELU>::line},
      {OnTiles<GELU>::parts, OnTiles<GELU>::forward, OnTiles<GELU>::backward, OnTiles<GELU>::line},
      {OnTiles<SWIGLU>::parts, OnTiles<SWIGLU>::forward, OnTiles<SWIGLU>::backward, OnTiles<SWIGLU>::line},
      {OnTiles<SWIGLU_CLAMPED>::parts, OnTiles<SWIGLU_CLAMPED>::forward, OnTiles<SWIGLU_CLAMPED>::backward,
       OnTiles<SWIGLU_CLAMPED>::line},
  };
  return table[kind];
}

}  // namespace turnout

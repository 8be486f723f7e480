// What Python asks for. The order of the fields is that of `_job` in kernel.py.
#pragma once

#include <cstdint>

namespace turnout {

typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel

struct Job {
  int64_t tokens, dim, hidden, experts, assignments, kind, half_weights, half_rows, threads, matrix_unit;
  Parallel parallel;      // of the thread pool torch uses, or null
  const int32_t* routes;  // from turnout_sort
  const float* x;         // (T, D), as y of bfloat where half_rows
  const float* weight;    // (N)
  const void* up;         // (E, D, G), of float or bfloat
  const void* down;       // (E, F, D), likewise
  const float* up_bias;   // (E, G) or null
  const float* down_bias; // (E, D) or null
  float* saved;           // of bfloat where half_rows: values before the activation: written forward, read backward; null in inference
  float* y;               // (T, D), of the forward pass
  // from here on of the backward pass, null for what is not wanted; where half_rows d_y, d_x, d_up, d_down of bfloat
  const float* d_y;       // (T, D)
  float* d_x;
  float* d_weight;  // (N), zero where nothing was sent
  float* d_up;
  float* d_down;
  float* d_up_bias;
  float* d_down_bias;
  int64_t give_back;  // whether memory of `saved` that is read goes back to the system; nobody reads it again then
};
static_assert(sizeof(Job) == 28 * sizeof(int64_t), "kernel.py fills NUM_FIELDS fields, of eight bytes each");

// Up to so many rows of every expert, reading its weights takes longer than the products with them.
constexpr int FEW_ROWS = 16;

}  // namespace turnout

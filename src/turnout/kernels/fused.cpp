// The experts of a Mixture-of-Experts layer on a CPU: what Python calls. Compiled by build.py on first use.
#include <exception>

#include "backward.h"
#include "code_panels.h"
#include "decode.h"
#include "few.h"
#include "forward.h"
#include "gates.h"
#include "half_backward.h"
#include "half_forward.h"
#include "int8_forward.h"
#include "routes.h"

using turnout::Job;
using turnout::bfloat;

namespace {

#if defined(TURNOUT_MATRIX_UNIT)
template <class Weights>
void half_pass(const Weights& weights) {
  turnout::HalfForward<Weights>(weights).run();
}
#endif

// Floats by the matrix unit, in planes.
template <class W>
bool in_planes(const Job& job) {
#if defined(TURNOUT_MATRIX_UNIT)
  return job.matrix_unit && sizeof(W) == sizeof(float);
#endif
  return false;
}

template <class W>
void forward(const Job& job) {
  turnout::Decode<W> decode(job);
  if (decode.fits()) return decode.run();
#if defined(TURNOUT_MATRIX_UNIT)
  if (in_planes<W>(job)) return half_pass(turnout::HalfWeights<float>(job));
#endif
  turnout::Forward<W>(job).run();
}

template <class W>
void backward(const Job& job) {
#if defined(TURNOUT_MATRIX_UNIT)
  if (in_planes<W>(job)) return turnout::HalfBackward<float>(job).run();
#endif
  turnout::Backward<W>(job).run();
}

// Tokens in bfloat, by the matrix unit; a few of them widened, whose time is that of reading weights.
void half_forward(const Job& job) {
#if defined(TURNOUT_MATRIX_UNIT)
  if (!turnout::Decode<bfloat>(job).fits()) return half_pass(turnout::HalfWeights<bfloat>(job));
  const long size = job.tokens * job.dim;
  std::vector<float> x(size), y(size);
  for (long i = 0; i < size; i++) x[i] = turnout::value(reinterpret_cast<const bfloat*>(job.x)[i]);
  Job wide = job;
  wide.x = x.data();
  wide.y = y.data();
  turnout::Decode<bfloat>(wide).run();
  turnout::to_half(reinterpret_cast<bfloat*>(job.y), y.data(), size);
#endif
}

void half_backward(const Job& job) {
#if defined(TURNOUT_MATRIX_UNIT)
  turnout::HalfBackward<bfloat>(job).run();
#endif
}

// Weights of 8 bits: widened for the matrix unit, as whole numbers where there is none or where the rows are few.
void int8_forward(const turnout::Int8Job& own, int64_t digits) {
#if defined(TURNOUT_MATRIX_UNIT)
  const Job& job = own.job;
  if (job.matrix_unit && !are_few(turnout::Routes(job.routes, job.tokens, job.experts, job.assignments), job))
    return half_pass(turnout::CodeWeights(own));
#endif
  digits == 1 ? turnout::Int8Forward<1>(own).run() : turnout::Int8Forward<2>(own).run();
}

void experts_of(const turnout::Int8Job& own, int64_t digits) {
  if (digits)
    int8_forward(own, digits);
  else
    own.job.half_weights ? forward<bfloat>(own.job) : forward<float>(own.job);
}

// 0, or 1 when there is no memory: exceptions must not reach the caller
template <class Pass>
int guarded(Pass pass) {
  try {
    pass();
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

int64_t turnout_sort(const int64_t* expert, const int64_t* token, const uint8_t* keep, int64_t assignments,
                     int64_t tokens, int64_t experts, int32_t* routes) {
  return turnout::sort_routes(expert, token, keep, assignments, tokens, experts, routes);
}

int turnout_forward(const Job* job) {
  return guarded([&] {
    if (job->half_rows)
      half_forward(*job);
    else
      job->half_weights ? forward<bfloat>(*job) : forward<float>(*job);
  });
}

int turnout_backward(const Job* job) {
  return guarded([&] {
    if (job->half_rows)
      half_backward(*job);
    else
      job->half_weights ? backward<bfloat>(*job) : backward<float>(*job);
  });
}

int turnout_int8(const turnout::Int8Job* job, int64_t digits) {
  return guarded([&] { int8_forward(*job, digits); });
}

int turnout_best(const float* scores, int64_t rows, int64_t experts, int64_t k, int64_t* picks, int64_t threads,
                 turnout::Parallel parallel) {
  return guarded([&] { turnout::best_of_rows(scores, rows, experts, int(k), picks, threads, parallel); });
}

int turnout_choose(const turnout::Gates* gates) {
  return guarded([&] { turnout::choose_rows(*gates); });
}

int turnout_choose_backward(const turnout::Gates* gates) {
  return guarded([&] { turnout::logits_gradient(*gates); });
}

int turnout_few(const turnout::Few* few, const void* x, void* y, int64_t* found, int64_t count, int64_t threads) {
  return guarded([&] {
    const auto experts = [few](const turnout::Int8Job& own) { experts_of(own, few->digits); };
    turnout::few_tokens(*few, {x, y, found, count, threads}, experts);
  });
}

int turnout_ask_matrix_unit() { return turnout::ask_matrix_unit(); }

int turnout_few_rows() { return turnout::FEW_ROWS; }

int turnout_tile_columns() { return turnout::TILE_COLUMNS; }

void turnout_poison() { turnout::Workspace::poison(); }
}
#pragma GCC visibility pop

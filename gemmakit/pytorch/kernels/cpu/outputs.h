// Sums of weight rows against tokens, to their places in y.

#pragma once

#include "functions.h"
#include "turn.h"

namespace {

// The sums of L outputs of a token, from `from` on and before `end`.
template <int F, int FORMAT>
void finish(const Matrix& w, int64_t from, int64_t end, int64_t token, V v, void* y, const void* residual) {
  int64_t row = token * w.out;
  if (FORMAT == INT8_ROWS) v = mul(v, take<F32>(w.scale, from, end));
  v = add(v, w.bias ? take<F>(w.bias, from, end) : zero());
  if (residual) v = add(rounded<F>(v), take<F>(residual, row + from, row + end));
  give<F>(y, row + from, row + end, v);
}

// Those of outputs from..end and tokens first..last: sums (outputs, tokens), next apart, with room up to a whole number
// of L of both.
template <int F, int FORMAT>
void finish_all(const Matrix& w, int64_t from, int64_t end, int64_t first, int64_t last, const float* sums,
                int64_t next, void* y, const void* residual) {
  for (int64_t m = first; m < last; m += L)
    for (int64_t o = from; o < end; o += L) {
      I square[L];
      UNROLL for (int r = 0; r < L; r++) square[r] = bits_of(load(sums + (o - from + r) * next + m - first));
      turn(square);
      for (int t = 0; t < L && m + t < last; t++)
        finish<F, FORMAT>(w, o, end, m + t, number_of(square[t]), y, residual);
    }
}

}  // namespace

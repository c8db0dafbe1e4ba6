// RMSNorm of one row.

#pragma once

#include <math.h>

#include "functions.h"

namespace {

// (residual +) the norm of x, in float32, rounded as the module does: once after the norm, once after the sum.
template <int F, int W>
void norm_row(const void* x, int64_t width, const Norm& norm, const void* residual, void* y) {
  V squares[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 * L <= width; i += 4 * L)
    for (int j = 0; j < 4; j++) {
      V v = widen<F>(at<F>(x, i + j * L));
      squares[j] = fma(v, v, squares[j]);
    }
  for (; i < width; i += L) {
    V v = take<F>(x, i, width);
    squares[0] = fma(v, v, squares[0]);
  }
  float total = sum(add(add(squares[0], squares[1]), add(squares[2], squares[3])));
  V factor = splat(1.0f / sqrtf(total / (float)width + norm.eps)), gain = splat(norm.gain);
  for (i = 0; i < width; i += L) {
    V scale = add(splat(norm.offset), take<W>(norm.weight, i, width));
    V normed = mul(mul(mul(take<F>(x, i, width), factor), scale), gain);
    if (residual) normed = add(rounded<F>(normed), take<F>(residual, i, width));
    give<F>(y, i, width, normed);
  }
}

using NormRow = void (*)(const void* x, int64_t width, const Norm& norm, const void* residual, void* y);

// The function for the format of the norm's weight; null where there is none.
template <int F>
NormRow norm_row_of(const Norm& norm) {
  switch (norm.format) {
    case BF16: return norm_row<F, BF16>;
    case F16: return norm_row<F, F16>;
    case F32: return norm_row<F, F32>;
  }
  return nullptr;
}

}  // namespace

// A decoder layer's norms and activations for a few rows, with the projections that follow or precede them.

#include <math.h>

#include "functions.h"
#include "inputs.h"

namespace {

// y = x / sqrt(mean(x^2) + eps) * (1 + w), in float32, rounded once, as the module does.
template <int F, int W>
void norm_row(const void* x, int64_t width, const void* w, float eps, void* y) {
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
  V factor = splat(1.0f / sqrtf(total / (float)width + eps));
  for (i = 0; i < width; i += L) {
    V scale = add(splat(1.0f), take<W>(w, i, width));
    give<F>(y, i, width, mul(mul(take<F>(x, i, width), factor), scale));
  }
}

template <int F>
int norm_rows(const void* x, int64_t rows, int64_t width, int w_format, const void* w, float eps, void* y,
              int threads) {
  auto one = w_format == BF16 ? norm_row<F, BF16> : w_format == F16 ? norm_row<F, F16> : norm_row<F, F32>;
#pragma omp parallel for num_threads(threads) if (rows * width > 1 << 16 && threads > 1)
  for (int64_t r = 0; r < rows; r++) one(at<F>(x, r * width), width, w, eps, (char*)y + r * width * size_of<F>);
  return 0;
}

// y = f(gate) * up, each rounded to the format, as two modules do.
template <int F, class Function>
void gated(Function f, const void* gate, const void* up, void* y, int64_t from, int64_t to) {
  for (int64_t i = from; i < to; i += L) {
    V g = rounded<F>(f(take<F>(gate, i, to)));
    give<F>(y, i, to, mul(g, take<F>(up, i, to)));
  }
}

template <int F>
int gated_all(int act, const void* gate, const void* up, void* y, int64_t n, int threads) {
  if (act != GELU_TANH && act != RELU && act != SILU) return 1;
  constexpr int64_t piece = 1 << 14;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (n > 2 * piece && threads > 1)
  for (int64_t from = 0; from < n; from += piece) {
    int64_t to = from + piece < n ? from + piece : n;
    if (act == GELU_TANH)
      gated<F>(gelu_tanh, gate, up, y, from, to);
    else if (act == SILU)
      gated<F>(silu, gate, up, y, from, to);
    else
      gated<F>(relu, gate, up, y, from, to);
  }
  return 0;
}

}  // namespace

extern "C" int NATIVE(gemmakit_rms_norm)(int format, const void* x, int64_t rows, int64_t width, int w_format,
                                         const void* w, float eps, void* y, int threads) {
  if (w_format < BF16 || w_format > F32) return 1;
  switch (format) {
    case BF16: return norm_rows<BF16>(x, rows, width, w_format, w, eps, y, threads);
    case F16: return norm_rows<F16>(x, rows, width, w_format, w, eps, y, threads);
    case F32: return norm_rows<F32>(x, rows, width, w_format, w, eps, y, threads);
  }
  return 1;
}

extern "C" int NATIVE(gemmakit_gated)(int format, int act, const void* gate, const void* up, void* y, int64_t n,
                                      int threads) {
  switch (format) {
    case BF16: return gated_all<BF16>(act, gate, up, y, n, threads);
    case F16: return gated_all<F16>(act, gate, up, y, n, threads);
    case F32: return gated_all<F32>(act, gate, up, y, n, threads);
  }
  return 1;
}

extern "C" int NATIVE(gemmakit_norm_project)(const Matrix* m, int count, int format, const void* x, int rows,
                                             int w_format, const void* w, float eps, void* const* y, int threads) {
  if (rows < 1 || rows > MAX_ROWS) return 1;
  void* normed = scratch<float, 0>(rows * m->in);
  return NATIVE(gemmakit_rms_norm)(format, x, rows, m->in, w_format, w, eps, normed, 1) ||
         NATIVE(gemmakit_project)(m, count, format, normed, rows, y, nullptr, threads);
}

extern "C" int NATIVE(gemmakit_norm_gate_up)(const Matrix* m, int format, const void* x, int rows, int w_format,
                                             const void* w, float eps, int act, void* y, int threads) {
  if (rows < 1 || rows > MAX_ROWS) return 1;
  int64_t n = rows * m->out;
  char* both = (char*)scratch<float, 1>(2 * n);
  void* halves[2] = {both, both + n * 4};
  return NATIVE(gemmakit_norm_project)(m, 2, format, x, rows, w_format, w, eps, halves, threads) ||
         NATIVE(gemmakit_gated)(format, act, halves[0], halves[1], y, n, threads);
}

// A decoder layer's norms and activations for a few rows, with the projections that follow or precede them.

#include "inputs.h"
#include "norm.h"

namespace {

template <int F>
int norm_rows(const void* x, int64_t rows, int64_t width, const Norm& norm, const void* residual, void* y,
              int threads) {
  NormRow one = norm_row_of<F>(norm);
  if (!one) return 1;
#pragma omp parallel for num_threads(threads) if (rows * width > 1 << 16 && threads > 1)
  for (int64_t r = 0; r < rows; r++)
    one(at<F>(x, r * width), width, norm, residual ? at<F>(residual, r * width) : nullptr, (void*)at<F>(y, r * width));
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

extern "C" int NATIVE(gemmakit_rms_norm)(int format, const void* x, int64_t rows, int64_t width, const Norm* norm,
                                         const void* residual, void* y, int threads) {
  switch (format) {
    case BF16: return norm_rows<BF16>(x, rows, width, *norm, residual, y, threads);
    case F16: return norm_rows<F16>(x, rows, width, *norm, residual, y, threads);
    case F32: return norm_rows<F32>(x, rows, width, *norm, residual, y, threads);
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
                                             const Norm* norm, void* const* y, int threads) {
  if (rows < 1 || rows > MAX_ROWS) return 1;
  void* normed = scratch<float, 0>(rows * m->in);
  return NATIVE(gemmakit_rms_norm)(format, x, rows, m->in, norm, nullptr, normed, 1) ||
         NATIVE(gemmakit_project)(m, count, format, normed, rows, y, nullptr, threads);
}

extern "C" int NATIVE(gemmakit_norm_gate_up)(const Matrix* m, int format, const void* x, int rows, const Norm* norm,
                                             int act, void* y, int threads) {
  if (rows < 1 || rows > MAX_ROWS) return 1;
  int64_t n = rows * m->out;
  char* both = (char*)scratch<float, 1>(2 * n);
  void* halves[2] = {both, both + n * 4};
  return NATIVE(gemmakit_norm_project)(m, 2, format, x, rows, norm, halves, threads) ||
         NATIVE(gemmakit_gated)(format, act, halves[0], halves[1], y, n, threads);
}

extern "C" int NATIVE(gemmakit_project_norm_add)(const Matrix* m, int format, const void* x, int rows,
                                                 const Norm* norm, const void* residual, void* y, int threads) {
  return NATIVE(gemmakit_project)(m, 1, format, x, rows, &y, nullptr, threads) ||
         NATIVE(gemmakit_rms_norm)(format, y, rows, m->out, norm, residual, y, threads);
}

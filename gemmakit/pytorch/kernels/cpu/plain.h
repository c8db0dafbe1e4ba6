// Sums of a few rows of x against rows of a weight in a float format: what decoding does with every such weight.
// One token reads every weight, so the work is done when the memory is.

#pragma once

#include "inputs.h"
#include "vectors.h"

namespace {

// R weight rows against M rows of x as float32, converted once by the caller, next apart. out: (R, M).
template <int F, int M, int R>
inline void block(const void* w, const float* x, int64_t in, float* out, int64_t next) {
  V acc[R][M];
  UNROLL_NEON for (int r = 0; r < R; r++)
    UNROLL_NEON for (int m = 0; m < M; m++) acc[r][m] = zero();
  int64_t i = 0;
#if defined(__ARM_NEON)
  // A vector of 16-bit numbers fills two of float32.
  for (; F != F32 && i + 2 * L <= in; i += 2 * L)
    UNROLL_NEON for (int r = 0; r < R; r++) {
      if ((M > 1 || F == F16) && i % 32 == 0) prefetch<64>(at<F>(w, r * in), i * 2, in * 2, R);
      Two wide = widen_two<F>((const uint16_t*)at<F>(w, r * in + i));
      UNROLL_NEON for (int m = 0; m < M; m++) {
        acc[r][m] = fma(wide.first, load(x + m * next + i), acc[r][m]);
        acc[r][m] = fma(wide.second, load(x + m * next + i + L), acc[r][m]);
      }
    }
#endif
  for (; i + L <= in; i += L)
    UNROLL_NEON for (int r = 0; r < R; r++) {
      if ((M > 1 || F == F16) && i % (64 / size_of<F>) == 0)
        prefetch<64>(at<F>(w, r * in), i * size_of<F>, in * size_of<F>, R);
      V wide = widen<F>(at<F>(w, r * in + i));
      UNROLL_NEON for (int m = 0; m < M; m++) acc[r][m] = fma(wide, load(x + m * next + i), acc[r][m]);
    }
  UNROLL_NEON for (int r = 0; r < R; r++)
    UNROLL_NEON for (int m = 0; m < M; m++) {
      float s = sum(acc[r][m]);
      for (int64_t j = i; j < in; j++) s += number<F>(w, r * in + j) * x[m * next + j];
      out[r * M + m] = s;
    }
}

template <int F, int M, int R>
inline void block(const void* w, const float* x, int64_t in, float* out) {
  block<F, M, R>(w, x, in, out, in);
}

#if defined(__AVX512BF16__)
// Two products a lane: half the instructions of the float32 form, the same float32 sums. x is bfloat16 as it came.
template <int M, int R>
inline void block_pairs(const uint16_t* w, const uint16_t* x, int64_t in, float* out, int64_t next) {
  V acc[R][M];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) acc[r][m] = zero();
  int64_t i = 0;
  for (; i + 32 <= in; i += 32)
    for (int r = 0; r < R; r++) {
      if (M > 1) prefetch<64>(w + r * in, 2 * i, 2 * in, R);
      __m512bh pairs = (__m512bh)_mm512_loadu_si512(w + r * in + i);
      for (int m = 0; m < M; m++)
        acc[r][m] = _mm512_dpbf16_ps(acc[r][m], pairs, (__m512bh)_mm512_loadu_si512(x + m * next + i));
    }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) {
      float s = sum(acc[r][m]);
      for (int64_t j = i; j < in; j++) s += number<BF16>(w, r * in + j) * number<BF16>(x, m * next + j);
      out[r * M + m] = s;
    }
}

template <int M, int R>
inline void block_pairs(const uint16_t* w, const uint16_t* x, int64_t in, float* out) {
  block_pairs<M, R>(w, x, in, out, in);
}
#endif

template <int F, int M, int R>
inline int64_t plain_rows(const Matrix& w, const Inputs& x, int64_t from, int64_t to, float* sums) {
  int64_t o = from;
  for (; o + R <= to; o += R, sums += R * M) {
#if defined(__AVX512BF16__)
    if (F == BF16 && x.pairs) {
      block_pairs<M, R>((const uint16_t*)w.codes + o * w.in, x.pairs, w.in, sums, x.pairs_next);
      continue;
    }
#endif
    block<F, M, R>(at<F>(w.codes, o * w.in), x.wide, w.in, sums, x.next);
  }
  return o;
}

// sums (to - from, M) of weight rows from..to.
template <int F, int M>
void plain(const Matrix& w, const Inputs& x, int64_t from, int64_t to, float* sums) {
  // Four weight streams keep the memory busy while M is small; more accumulators than registers would spill.
  constexpr int R = M <= 4 ? 4 : L == 16 ? 3 : 2;
  int64_t done = plain_rows<F, M, R>(w, x, from, to, sums);
  plain_rows<F, M, 1>(w, x, done, to, sums + (done - from) * M);
}

}  // namespace

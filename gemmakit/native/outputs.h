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

// Those of outputs from..to: sums (count, to - from), next apart, of the rows of y from `first` on.
template <int F>
void finish_rows(const Matrix& w, int64_t from, int64_t to, const float* sums, int64_t next, int64_t first, int64_t count,
                 void* y, const void* residual) {
  for (int64_t m = 0; m < count; m++, sums += next)
    for (int64_t o = from; o < to; o += L) finish<F, F32>(w, o, to, first + m, take<F32>(sums, o - from, to - from), y, residual);
}

// L outputs from `from` on, of L tokens.
template <int F, int FORMAT>
void finish_square(const Matrix& w, int64_t from, int64_t end, int64_t first, int64_t last, const float* sums, int64_t next,
                   void* y, const void* residual) {
  I square[L];
  UNROLL for (int r = 0; r < L; r++) square[r] = bits_of(load(sums + r * next));
  turn(square);
  for (int t = 0; t < L && first + t < last; t++)
    finish<F, FORMAT>(w, from, end, first + t, number_of(square[t]), y, residual);
}

// Outputs that are finished together: sums have room up to a whole number of them.
constexpr int64_t BESIDE = 2 * L;

#if defined(__AVX512BF16__)
// BESIDE outputs in bfloat16, of which pairs are turned as numbers of 32 bits.
template <int FORMAT>
void finish_pairs(const Matrix& w, int64_t from, int64_t end, int64_t first, int64_t last, const float* sums, int64_t next,
                  void* y, const void* residual) {
  constexpr uint16_t in_pairs[BESIDE] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  int64_t count = end - from < BESIDE ? end - from : BESIDE, bytes = count * 2;
  float scale[BESIDE] = {}, bias[BESIDE] = {};
  if (FORMAT == INT8_ROWS) widen_all<F32>(at<F32>(w.scale, from), scale, count);
  if (w.bias) widen_all<BF16>(at<BF16>(w.bias, from), bias, count);
  I square[L];
  UNROLL for (int i = 0; i < L; i++) {
    V v[2];
    UNROLL for (int j = 0; j < 2; j++) {
      v[j] = load(sums + (2 * i + j) * next);
      if (FORMAT == INT8_ROWS) v[j] = mul(v[j], splat(scale[2 * i + j]));
      v[j] = add(v[j], splat(bias[2 * i + j]));
    }
    square[i] = _mm512_permutexvar_epi16(load_bytes(in_pairs), narrow_two(v[0], v[1]));
  }
  turn(square);
  for (int t = 0; t < L && first + t < last; t++) {
    int64_t to = (first + t) * w.out + from;
    if (residual) {
      uint16_t own[BESIDE], more[BESIDE] = {};
      std::memcpy(own, square + t, sizeof own);
      std::memcpy(more, at<BF16>(residual, to), bytes);
      V low = add(widen_bf16(own), widen_bf16(more)), high = add(widen_bf16(own + L), widen_bf16(more + L));
      square[t] = narrow_two(low, high);
    }
    // The usual length as a constant, which is one instruction.
    std::memcpy((uint16_t*)y + to, square + t, count == BESIDE ? sizeof *square : bytes);
  }
}
#endif

// Those of outputs from..end and tokens first..last: sums (outputs, tokens), next apart, with room up to a whole number
// of L tokens and BESIDE outputs.
template <int F, int FORMAT>
void finish_all(const Matrix& w, int64_t from, int64_t end, int64_t first, int64_t last, const float* sums,
                int64_t next, void* y, const void* residual) {
  for (int64_t m = first; m < last; m += L)
    for (int64_t o = from; o < end; o += BESIDE) {
      const float* own = sums + (o - from) * next + m - first;
#if defined(__AVX512BF16__)
      if constexpr (F == BF16) {
        finish_pairs<FORMAT>(w, o, end, m, last, own, next, y, residual);
        continue;
      }
#endif
      finish_square<F, FORMAT>(w, o, end, m, last, own, next, y, residual);
      if (o + L < end) finish_square<F, FORMAT>(w, o + L, end, m, last, own + L * next, next, y, residual);
    }
}

}  // namespace

// y[m][o] = sum_i x[m][i] * w[o][i] for a few rows of x: what decoding does with every weight.
//
// This file is compiled once for each instruction set, with ISA naming it. Weights stay in their 16-bit format and
// are read once; sums are float32. One token reads every weight, so the work is done when the memory is.

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)

namespace {

enum Format { BF16 = 0, F16 = 1 };

// ---- one vector of float32, and how each format becomes one ----------------------------------------------------

#if defined(__AVX512F__)
using V = __m512;
constexpr int L = 16;
inline V zero() { return _mm512_setzero_ps(); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline float sum(V v) { return _mm512_reduce_add_ps(v); }
inline V widen_bf16(const uint16_t* p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline V widen_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
#elif defined(__AVX2__)
using V = __m256;
constexpr int L = 8;
inline V zero() { return _mm256_setzero_ps(); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline float sum(V v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline V widen_bf16(const uint16_t* p) {
  __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
}
inline V widen_f16(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
#elif defined(__ARM_NEON)
using V = float32x4_t;
constexpr int L = 4;
inline V zero() { return vdupq_n_f32(0); }
inline V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
inline V load(const float* p) { return vld1q_f32(p); }
inline float sum(V v) { return vaddvq_f32(v); }
inline V widen_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
inline V widen_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
#else
#error "compile this file for AVX2, AVX-512 or NEON"
#endif

template <Format F>
inline V widen(const uint16_t* p) {
  return F == BF16 ? widen_bf16(p) : widen_f16(p);
}

template <Format F>
inline float widen_one(uint16_t h) {
  uint16_t padded[L] = {h};
  float out[L];
  V v = widen<F>(padded);
  std::memcpy(out, &v, sizeof v);
  return out[0];
}

// Round to nearest, ties to even, as torch does; NaN stays NaN.
inline uint16_t narrow_bf16(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  if ((u & 0x7fffffff) > 0x7f800000) return 0x7fc0;
  return (uint16_t)((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

inline uint16_t narrow_f16(float f) {
#if defined(__AVX2__)
  return (uint16_t)_cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  __fp16 h = (__fp16)f;
  uint16_t u;
  std::memcpy(&u, &h, 2);
  return u;
#endif
}

template <Format F>
inline uint16_t narrow(float f) {
  return F == BF16 ? narrow_bf16(f) : narrow_f16(f);
}

// ---- R weight rows against M activation rows -------------------------------------------------------------------

// x is float32 (M, in): converted once by the caller, used by every weight row.
template <Format F, int M, int R>
inline void block(const uint16_t* w, const float* x, int64_t in, float out[R][M]) {
  V acc[R][M];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) acc[r][m] = zero();
  int64_t i = 0;
  for (; i + L <= in; i += L)
    for (int r = 0; r < R; r++) {
      V wide = widen<F>(w + r * in + i);
      for (int m = 0; m < M; m++) acc[r][m] = fma(wide, load(x + m * in + i), acc[r][m]);
    }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) {
      float s = sum(acc[r][m]);
      for (int64_t j = i; j < in; j++) s += widen_one<F>(w[r * in + j]) * x[m * in + j];
      out[r][m] = s;
    }
}

#if defined(__AVX512BF16__)
// Two products a lane: half the instructions of the float32 form, the same float32 sums. x is bfloat16 as it came.
template <int M, int R>
inline void block_pairs(const uint16_t* w, const uint16_t* x, int64_t in, float out[R][M]) {
  V acc[R][M];
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) acc[r][m] = zero();
  int64_t i = 0;
  for (; i + 32 <= in; i += 32)
    for (int r = 0; r < R; r++) {
      __m512bh pairs = (__m512bh)_mm512_loadu_si512(w + r * in + i);
      for (int m = 0; m < M; m++)
        acc[r][m] = _mm512_dpbf16_ps(acc[r][m], pairs, (__m512bh)_mm512_loadu_si512(x + m * in + i));
    }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) {
      float s = sum(acc[r][m]);
      for (int64_t j = i; j < in; j++) s += widen_one<BF16>(w[r * in + j]) * widen_one<BF16>(x[m * in + j]);
      out[r][m] = s;
    }
}
#endif

template <Format F, int M, int R>
inline void rows(const uint16_t* w, const float* x, const uint16_t* narrow_x, const uint16_t* bias, uint16_t* y,
                 int64_t from, int64_t to, int64_t out, int64_t in) {
  for (int64_t o = from; o + R <= to; o += R) {
    float s[R][M];
#if defined(__AVX512BF16__)
    if (F == BF16)
      block_pairs<M, R>(w + o * in, narrow_x, in, s);
    else
#endif
      block<F, M, R>(w + o * in, x, in, s);
    for (int r = 0; r < R; r++)
      for (int m = 0; m < M; m++) {
        float b = bias ? widen_one<F>(bias[o + r]) : 0.0f;
        y[m * out + o + r] = narrow<F>(s[r][m] + b);
      }
  }
}

template <Format F, int M>
void linear(const uint16_t* w, const float* x, const uint16_t* narrow_x, const uint16_t* bias, uint16_t* y,
            int64_t out, int64_t in, int threads) {
  // Four weight streams keep the memory busy while M is small; more accumulators than registers would spill.
  constexpr int R = M <= 4 ? 4 : 2;
  // Small pieces handed out as threads ask: a thread that the system pauses holds up one piece, not half the matrix.
  int64_t piece = (1 << 17) / in;
  piece = piece < R ? R : piece / R * R;
  int64_t pieces = (out + piece - 1) / piece;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t p = 0; p < pieces; p++) {
    int64_t from = p * piece, to = from + piece < out ? from + piece : out;
    int64_t even = from + (to - from) / R * R;
    rows<F, M, R>(w, x, narrow_x, bias, y, from, even, out, in);
    rows<F, M, 1>(w, x, narrow_x, bias, y, even, to, out, in);
  }
}

template <Format F>
int run(const uint16_t* w, const uint16_t* x, float* wide_x, const uint16_t* bias, uint16_t* y, int m, int64_t out,
        int64_t in, int threads) {
#if defined(__AVX512BF16__)
  if (F != BF16)
#endif
  {
    int64_t n = m * in, i = 0;
    for (; i + L <= n; i += L) {
      V v = widen<F>(x + i);
      std::memcpy(wide_x + i, &v, sizeof v);
    }
    for (; i < n; i++) wide_x[i] = widen_one<F>(x[i]);
  }
  switch (m) {
    case 1: linear<F, 1>(w, wide_x, x, bias, y, out, in, threads); return 0;
    case 2: linear<F, 2>(w, wide_x, x, bias, y, out, in, threads); return 0;
    case 3: linear<F, 3>(w, wide_x, x, bias, y, out, in, threads); return 0;
    case 4: linear<F, 4>(w, wide_x, x, bias, y, out, in, threads); return 0;
    case 5: linear<F, 5>(w, wide_x, x, bias, y, out, in, threads); return 0;
    case 6: linear<F, 6>(w, wide_x, x, bias, y, out, in, threads); return 0;
    case 7: linear<F, 7>(w, wide_x, x, bias, y, out, in, threads); return 0;
    case 8: linear<F, 8>(w, wide_x, x, bias, y, out, in, threads); return 0;
  }
  return 1;
}

}  // namespace

extern "C" int JOIN(linear_rows_, ISA)(int format, const uint16_t* w, const uint16_t* x, float* wide_x,
                                       const uint16_t* bias, uint16_t* y, int m, int64_t out, int64_t in,
                                       int threads) {
  return format == BF16 ? run<BF16>(w, x, wide_x, bias, y, m, out, in, threads)
                        : run<F16>(w, x, wide_x, bias, y, m, out, in, threads);
}

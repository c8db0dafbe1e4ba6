// One vector of float32 (V, L lanes), how each 16-bit format becomes one, and rounding back. Included by the files that
// are compiled for each instruction set; everything is local to the file, so that no set's code is used by another.

#pragma once

#include <cstdint>
#include <cstring>

#include "native.h"

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX512F__)
using V = __m512;
constexpr int L = 16;
inline V zero() { return _mm512_setzero_ps(); }
inline V splat(float f) { return _mm512_set1_ps(f); }
inline V add(V a, V b) { return _mm512_add_ps(a, b); }
inline V sub(V a, V b) { return _mm512_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm512_mul_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm512_fmadd_ps(a, b, c); }
inline V larger(V a, V b) { return _mm512_max_ps(a, b); }
inline V magnitude(V a) { return _mm512_abs_ps(a); }
inline V load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, V v) { _mm512_storeu_ps(p, v); }
inline float sum(V v) { return _mm512_reduce_add_ps(v); }
inline float largest(V v) { return _mm512_reduce_max_ps(v); }
inline V widen_bf16(const uint16_t* p) {
  __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline V widen_f16(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
#elif defined(__AVX2__)
using V = __m256;
constexpr int L = 8;
inline V zero() { return _mm256_setzero_ps(); }
inline V splat(float f) { return _mm256_set1_ps(f); }
inline V add(V a, V b) { return _mm256_add_ps(a, b); }
inline V sub(V a, V b) { return _mm256_sub_ps(a, b); }
inline V mul(V a, V b) { return _mm256_mul_ps(a, b); }
inline V fma(V a, V b, V c) { return _mm256_fmadd_ps(a, b, c); }
inline V larger(V a, V b) { return _mm256_max_ps(a, b); }
inline V magnitude(V a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
inline V load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, V v) { _mm256_storeu_ps(p, v); }
inline float sum(V v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
inline float largest(V v) {
  __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_max_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
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
inline V splat(float f) { return vdupq_n_f32(f); }
inline V add(V a, V b) { return vaddq_f32(a, b); }
inline V sub(V a, V b) { return vsubq_f32(a, b); }
inline V mul(V a, V b) { return vmulq_f32(a, b); }
inline V fma(V a, V b, V c) { return vfmaq_f32(c, a, b); }
inline V larger(V a, V b) { return vmaxq_f32(a, b); }
inline V magnitude(V a) { return vabsq_f32(a); }
inline V load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, V v) { vst1q_f32(p, v); }
inline float sum(V v) { return vaddvq_f32(v); }
inline float largest(V v) { return vmaxvq_f32(v); }
inline V widen_bf16(const uint16_t* p) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16)); }
inline V widen_f16(const uint16_t* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p))); }
struct Two {
  V first, second;
};
// 2 * L numbers in one read.
template <int F>
inline Two widen_two(const uint16_t* p) {
  uint16x8_t v = vld1q_u16(p);
  uint32x4_t first = vshll_n_u16(vget_low_u16(v), 16), second = vshll_high_n_u16(v, 16);
  if (F == BF16) return {vreinterpretq_f32_u32(first), vreinterpretq_f32_u32(second)};
  float16x8_t h = vreinterpretq_f16_u16(v);
  return {vcvt_f32_f16(vget_low_f16(h)), vcvt_high_f32_f16(h)};
}
#else
#error "compile this file for AVX2, AVX-512 or NEON"
#endif

// L numbers of a float format as a vector.
template <int F>
inline V widen(const void* p) {
  if (F == F32) return load((const float*)p);
  return F == BF16 ? widen_bf16((const uint16_t*)p) : widen_f16((const uint16_t*)p);
}

template <int F>
constexpr int size_of = F == F32 ? 4 : 2;

// p advanced by i numbers.
template <int F>
inline const void* at(const void* p, int64_t i) {
  return (const char*)p + i * size_of<F>;
}

inline float widen_one_f16(uint16_t h) {
#if defined(__AVX2__)
  return _cvtsh_ss(h);
#else
  __fp16 f;
  std::memcpy(&f, &h, 2);
  return f;
#endif
}

// Number i of p.
template <int F>
inline float number(const void* p, int64_t i) {
  if (F == F32) {
    float f;
    std::memcpy(&f, (const char*)p + 4 * i, 4);
    return f;
  }
  uint16_t h;
  std::memcpy(&h, (const char*)p + 2 * i, 2);
  if (F == F16) return widen_one_f16(h);
  uint32_t u = (uint32_t)h << 16;
  float f;
  std::memcpy(&f, &u, 4);
  return f;
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

// p[i] = f, rounded to the format.
template <int F>
inline void put(void* p, int64_t i, float f) {
  if (F == F32) {
    std::memcpy((char*)p + 4 * i, &f, 4);
    return;
  }
  uint16_t h = F == BF16 ? narrow_bf16(f) : narrow_f16(f);
  std::memcpy((char*)p + 2 * i, &h, 2);
}

// n numbers of a format as float32.
template <int F>
inline void widen_all(const void* from, float* to, int64_t n) {
  int64_t i = 0;
  for (; i + L <= n; i += L) store(to + i, widen<F>(at<F>(from, i)));
  for (; i < n; i++) to[i] = number<F>(from, i);
}

}  // namespace

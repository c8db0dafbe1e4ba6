// What the step needs beyond sums: rounding a vector to a format, exp, the activations.

#pragma once

#include "vectors.h"

namespace {

// ---- the rest of a vector's arithmetic -------------------------------------------------------------------------

#if defined(__AVX512F__)
inline V divide(V a, V b) { return _mm512_div_ps(a, b); }
inline V smaller(V a, V b) { return _mm512_min_ps(a, b); }
inline V whole(V a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// a * 2^n for whole n; denormal results are rounded once.
inline V scaled(V a, V n) { return _mm512_scalef_ps(a, n); }
// The sums of four vectors, next to each other; of each neighbours first, then neighbouring pairs, and so on.
inline void store_sums(float* p, V a, V b, V c, V d) {
  V ab = add(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
  V cd = add(_mm512_shuffle_ps(c, d, 0x88), _mm512_shuffle_ps(c, d, 0xdd));
  V all = add(_mm512_shuffle_ps(ab, cd, 0x88), _mm512_shuffle_ps(ab, cd, 0xdd));
  __m256 low = _mm512_castps512_ps256(all), high = _mm512_extractf32x8_ps(all, 1);
  __m256 half = _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
  _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
inline __m512i bits_bf16(V v) {
  __m512i u = _mm512_castps_si512(v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  u = _mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  return _mm512_mask_mov_epi32(u, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_epi32(0x7fc00000));
}
inline V round_bf16(V v) {
  return _mm512_castsi512_ps(_mm512_and_si512(bits_bf16(v), _mm512_set1_epi32((int)0xffff0000)));
}
inline V round_f16(V v) {
  return _mm512_cvtph_ps(_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store_bf16(void* p, V v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits_bf16(v), 16)));
}
inline void store_f16(void* p, V v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#if defined(__AVX512BF16__)
// Two vectors as bfloat16, rounded as round_bf16 does but for denormal numbers, which become zeros.
inline __m512i narrow_two(V first, V second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }
#endif
#elif defined(__AVX2__)
inline V divide(V a, V b) { return _mm256_div_ps(a, b); }
inline V smaller(V a, V b) { return _mm256_min_ps(a, b); }
inline V whole(V a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline void store_sums(float* p, V a, V b, V c, V d) {
  V all = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  _mm_storeu_ps(p, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
inline V power(__m256i n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
}
inline V scaled(V a, V n) {
  // In two halves, each of which is a normal number: 2^n itself may not be one.
  __m256i all = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(all, 1);
  return mul(mul(a, power(half)), power(_mm256_sub_epi32(all, half)));
}
inline __m256i bits_bf16(V v) {
  __m256i u = _mm256_castps_si256(v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  u = _mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(u, _mm256_set1_epi32(0x7fc00000), nan);
}
inline V round_bf16(V v) {
  return _mm256_castsi256_ps(_mm256_and_si256(bits_bf16(v), _mm256_set1_epi32((int)0xffff0000)));
}
inline V round_f16(V v) {
  return _mm256_cvtph_ps(_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
inline void store_bf16(void* p, V v) {
  __m256i u = _mm256_srli_epi32(bits_bf16(v), 16);
  __m128i packed = _mm_packus_epi32(_mm256_castsi256_si128(u), _mm256_extracti128_si256(u, 1));
  _mm_storeu_si128((__m128i*)p, packed);
}
inline void store_f16(void* p, V v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__ARM_NEON)
inline V divide(V a, V b) { return vdivq_f32(a, b); }
inline V smaller(V a, V b) { return vminq_f32(a, b); }
inline V whole(V a) { return vrndnq_f32(a); }
inline void store_sums(float* p, V a, V b, V c, V d) {
  vst1q_f32(p, vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d)));
}
inline V power(int32x4_t n) { return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23)); }
inline V scaled(V a, V n) {
  int32x4_t all = vcvtq_s32_f32(n), half = vshrq_n_s32(all, 1);
  return mul(mul(a, power(half)), power(vsubq_s32(all, half)));
}
inline uint32x4_t bits_bf16(V v) {
  uint32x4_t u = vreinterpretq_u32_f32(v);
  uint32x4_t odd = vandq_u32(vshrq_n_u32(u, 16), vdupq_n_u32(1));
  u = vaddq_u32(u, vaddq_u32(odd, vdupq_n_u32(0x7fff)));
  return vbslq_u32(vceqq_f32(v, v), u, vdupq_n_u32(0x7fc00000));
}
inline V round_bf16(V v) { return vreinterpretq_f32_u32(vandq_u32(bits_bf16(v), vdupq_n_u32(0xffff0000))); }
inline V round_f16(V v) { return vcvt_f32_f16(vcvt_f16_f32(v)); }
inline void store_bf16(void* p, V v) { vst1_u16((uint16_t*)p, vshrn_n_u32(bits_bf16(v), 16)); }
inline void store_f16(void* p, V v) { vst1_u16((uint16_t*)p, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
#endif

// ---- formats ---------------------------------------------------------------------------------------------------

// v as the format holds it.
template <int F>
inline V rounded(V v) {
  if (F == F32) return v;
  return F == BF16 ? round_bf16(v) : round_f16(v);
}

// L numbers to p, rounded to the format.
template <int F>
inline void put_all(void* p, V v) {
  if (F == F32) return store((float*)p, v);
  return F == BF16 ? store_bf16(p, v) : store_f16(p, v);
}

// The first n < L numbers of p, zeros behind them; nothing beyond them is read.
template <int F>
inline V widen_some(const void* p, int64_t n) {
  char room[L * size_of<F>] = {};
  std::memcpy(room, p, n * size_of<F>);
  return widen<F>(room);
}

template <int F>
inline void put_some(void* p, V v, int64_t n) {
  char room[L * size_of<F>];
  put_all<F>(room, v);
  std::memcpy(p, room, n * size_of<F>);
}

template <int F>
inline V take(const void* p, int64_t i, int64_t n) {
  return n - i >= L ? widen<F>(at<F>(p, i)) : widen_some<F>(at<F>(p, i), n - i);
}

template <int F>
inline void give(void* p, int64_t i, int64_t n, V v) {
  void* to = (char*)p + i * size_of<F>;
  n - i >= L ? put_all<F>(to, v) : put_some<F>(to, v, n - i);
}

// ---- functions -------------------------------------------------------------------------------------------------

// x = n ln 2 + r with |r| < 0.35. NaN stays NaN, which is why the bounds come first in `larger` and `smaller`: the second
// of two numbers is what x86 gives where one of them is NaN.
struct Reduced {
  V n, r;
};
inline Reduced reduced(V x, float least, float most) {
  x = smaller(splat(most), larger(splat(least), x));
  V n = whole(mul(x, splat(1.44269504f)));
  // ln 2 in two parts, so that x - n ln 2 loses nothing.
  V r = fma(n, splat(-0.693359375f), x);
  return {n, fma(n, splat(2.12194440e-4f), r)};
}

// (e^r - 1) / r, the series to r^6 / 7!: what is left is 6e-9.
inline V series(V r) {
  V y = splat(1.0f / 5040);
  y = fma(y, r, splat(1.0f / 720));
  y = fma(y, r, splat(1.0f / 120));
  y = fma(y, r, splat(1.0f / 24));
  y = fma(y, r, splat(1.0f / 6));
  y = fma(y, r, splat(0.5f));
  return fma(y, r, splat(1.0f));
}

// e^x within 2 units of the last place.
inline V exponential(V x) {
  Reduced at = reduced(x, -110.0f, 90.0f);
  return scaled(fma(series(at.r), at.r, splat(1.0f)), at.n);
}

// tanh u = m / (m + 2) with m = e^2u - 1 = 2^n (e^r - 1) + 2^n - 1, in which nothing cancels where u is small.
inline V hyperbolic_tangent(V u) {
  Reduced at = reduced(add(u, u), -20.0f, 20.0f);  // beyond, it is 1 to the last place
  V power = scaled(splat(1.0f), at.n);
  V m = fma(power, mul(series(at.r), at.r), sub(power, splat(1.0f)));
  return divide(m, add(m, splat(2.0f)));
}

inline V silu(V x) { return divide(x, add(splat(1.0f), exponential(sub(zero(), x)))); }

// x (1 + tanh u) / 2 = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3): nothing cancels where tanh is near -1.
inline V gelu_tanh(V x) {
  V u = mul(splat(1.5957691216f), mul(x, fma(mul(x, x), splat(0.044715f), splat(1.0f))));
  return divide(x, add(splat(1.0f), exponential(sub(zero(), u))));
}

inline V relu(V x) { return larger(zero(), x); }

}  // namespace

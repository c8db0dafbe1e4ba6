// Vectors of whole numbers (I, 4 * L bytes): codes of 4 and 8 bits against activations in 16 or 8, summed in int32.

#pragma once

#include "vectors.h"

namespace {

constexpr int BLOCK = 32;         // inputs that share an activation scale; also the block of 4-bit codes
constexpr int WIDTH = 4 * L;      // bytes in a vector
constexpr int CHUNK = WIDTH / 16;  // blocks of 4-bit codes in a vector

#if defined(__AVX512F__)
using I = __m512i;
inline I load_bytes(const void* p) { return _mm512_loadu_si512(p); }
inline I none() { return _mm512_setzero_si512(); }
// Lane t: acc + a[2t] * b[2t] + a[2t + 1] * b[2t + 1] of 16-bit numbers.
inline I madd(I acc, I a, I b) {
#if defined(__AVX512VNNI__)
  return _mm512_dpwssd_epi32(acc, a, b);
#else
  return _mm512_add_epi32(acc, _mm512_madd_epi16(a, b));
#endif
}
inline I splat4(int32_t four) { return _mm512_set1_epi32(four); }
inline V to_float(I a) { return _mm512_cvtepi32_ps(a); }
inline I low_nibbles(I v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
inline I high_nibbles(I v) { return low_nibbles(_mm512_srli_epi16(v, 4)); }
// 4 bits of each 16, as 16-bit numbers.
template <int K>
inline I nibble(I v) {
  if (K == 3) return _mm512_srli_epi16(v, 12);
  return _mm512_and_si512(_mm512_srli_epi16(v, 4 * K), _mm512_set1_epi16(15));
}
// Lane j of spread<K>(parted(s)): number CHUNK * K + j / 4 of s.
inline V parted(V s) { return s; }
template <int K>
inline V spread(V s) {
  const __m512i at = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
  return _mm512_permutexvar_ps(_mm512_add_epi32(at, _mm512_set1_epi32(4 * K)), s);
}
inline I dot_block(const int8_t* w, const int16_t* x) {
  return madd(none(), _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)w)), load_bytes(x));
}
inline V round_to_whole(V v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// L numbers as whole numbers of 16 or 8 bits; what lies outside comes to the nearest end.
inline void store_whole(int16_t* p, V v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(v)));
}
inline void store_whole(int8_t* p, V v) { _mm_storeu_si128((__m128i*)p, _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(v))); }
inline V widen_u8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
inline V widen_s8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
// The first L / 4 lanes only; the others hold anything.
inline V quarter_f16(const uint16_t* p) {
  return _mm512_castps128_ps512(_mm_cvtph_ps(_mm_loadl_epi64((const __m128i*)p)));
}
inline V quarter_u8(const uint8_t* p) {
  int32_t four;
  std::memcpy(&four, p, 4);
  return _mm512_castps128_ps512(_mm_cvtepi32_ps(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(four))));
}
#elif defined(__AVX2__)
using I = __m256i;
inline I load_bytes(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
inline I none() { return _mm256_setzero_si256(); }
inline I madd(I acc, I a, I b) {
#if defined(__AVXVNNI__)
  return _mm256_dpwssd_avx_epi32(acc, a, b);
#else
  return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b));
#endif
}
inline I splat4(int32_t four) { return _mm256_set1_epi32(four); }
inline V to_float(I a) { return _mm256_cvtepi32_ps(a); }
inline I low_nibbles(I v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
inline I high_nibbles(I v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }
template <int K>
inline I nibble(I v) {
  if (K == 3) return _mm256_srli_epi16(v, 12);
  return _mm256_and_si256(_mm256_srli_epi16(v, 4 * K), _mm256_set1_epi16(15));
}
// Numbers for the two halves apart, once, as crossing between them is slow.
inline V parted(V s) { return _mm256_permutevar8x32_ps(s, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7)); }
template <int K>
inline V spread(V s) {
  return _mm256_permute_ps(s, K * 0x55);
}
inline I dot_block(const int8_t* w, const int16_t* x) {
  I first = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)w));
  I second = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)(w + 16)));
  return madd(madd(none(), first, load_bytes(x)), second, load_bytes(x + 16));
}
inline V round_to_whole(V v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline void store_whole(int16_t* p, V v) {
  __m256i whole = _mm256_cvtps_epi32(v);
  __m128i both = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storeu_si128((__m128i*)p, both);
}
inline void store_whole(int8_t* p, V v) {
  int16_t wide[L];
  store_whole(wide, v);
  __m128i narrow = _mm_packs_epi16(_mm_loadu_si128((const __m128i*)wide), _mm_setzero_si128());
  _mm_storel_epi64((__m128i*)p, narrow);
}
inline V widen_u8(const uint8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
inline V widen_s8(const int8_t* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
inline V quarter_f16(const uint16_t* p) {
  int32_t two;
  std::memcpy(&two, p, 4);
  return _mm256_castps128_ps256(_mm_cvtph_ps(_mm_cvtsi32_si128(two)));
}
inline V quarter_u8(const uint8_t* p) {
  uint16_t two;
  std::memcpy(&two, p, 2);
  return _mm256_castps128_ps256(_mm_cvtepi32_ps(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(two))));
}
#elif defined(__ARM_NEON)
using I = int32x4_t;
inline I load_bytes(const void* p) { return vreinterpretq_s32_u8(vld1q_u8((const uint8_t*)p)); }
inline I none() { return vdupq_n_s32(0); }
// The pairs are (t, t + 4) here: only sums over a whole block are used.
inline I madd(I acc, I a, I b) {
  int16x8_t left = vreinterpretq_s16_s32(a), right = vreinterpretq_s16_s32(b);
  acc = vmlal_s16(acc, vget_low_s16(left), vget_low_s16(right));
  return vmlal_high_s16(acc, left, right);
}
inline I splat4(int32_t four) { return vdupq_n_s32(four); }
inline V to_float(I a) { return vcvtq_f32_s32(a); }
inline I low_nibbles(I v) { return vreinterpretq_s32_u8(vandq_u8(vreinterpretq_u8_s32(v), vdupq_n_u8(15))); }
inline I high_nibbles(I v) { return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(v), 4)); }
template <int K>
inline I nibble(I v) {
  uint16x8_t u = vreinterpretq_u16_s32(v);
  if constexpr (K == 0) return vreinterpretq_s32_u16(vandq_u16(u, vdupq_n_u16(15)));
  else if constexpr (K == 3) return vreinterpretq_s32_u16(vshrq_n_u16(u, 12));
  else return vreinterpretq_s32_u16(vandq_u16(vshrq_n_u16(u, 4 * K), vdupq_n_u16(15)));
}
inline V parted(V s) { return s; }
template <int K>
inline V spread(V s) {
  return vdupq_laneq_f32(s, K);
}
inline I dot_block(const int8_t* w, const int16_t* x) {
  I acc = none();
  for (int half = 0; half < 2; half++) {
    int8x16_t bytes = vld1q_s8(w + 16 * half);
    acc = madd(acc, vreinterpretq_s32_s16(vmovl_s8(vget_low_s8(bytes))), load_bytes(x + 16 * half));
    acc = madd(acc, vreinterpretq_s32_s16(vmovl_high_s8(bytes)), load_bytes(x + 16 * half + 8));
  }
  return acc;
}
#if defined(__ARM_FEATURE_DOTPROD)
// A block's 32 codes as the two instructions take them: they multiply either signed bytes or unsigned ones.
struct Codes {
  int8x16_t first, second;
  uint8x16_t first_up, second_up;
};
inline Codes codes4(const uint8_t* p) {
  uint8x16_t v = vld1q_u8(p), first = vandq_u8(v, vdupq_n_u8(15)), second = vshrq_n_u8(v, 4);
  return {vreinterpretq_s8_u8(first), vreinterpretq_s8_u8(second), first, second};
}
// Unsigned, codes of 8 bits are larger by 128, for which the caller makes up.
inline Codes codes8(const uint8_t* p) {
  uint8x16_t first = vld1q_u8(p), second = vld1q_u8(p + 16), up = vdupq_n_u8(128);
  return {vreinterpretq_s8_u8(first), vreinterpretq_s8_u8(second), veorq_u8(first, up), veorq_u8(second, up)};
}
// x: 32 high bytes, signed, and 32 low ones, unsigned: 16-bit products at the price of two of bytes.
inline I dot_block(const Codes& w, const uint8_t* x) {
  int8x16_t first = vreinterpretq_s8_u8(vld1q_u8(x)), second = vreinterpretq_s8_u8(vld1q_u8(x + 16));
  I high = vdotq_s32(vdotq_s32(none(), w.first, first), w.second, second);
  uint32x4_t both = vreinterpretq_u32_s32(vshlq_n_s32(high, 8));
  both = vdotq_u32(vdotq_u32(both, w.first_up, vld1q_u8(x + 32)), w.second_up, vld1q_u8(x + 48));
  return vreinterpretq_s32_u32(both);
}
// x: 32 bytes, signed.
inline I dot_block(const Codes& w, const int8_t* x) {
  return vdotq_s32(vdotq_s32(none(), w.first, vld1q_s8(x)), w.second, vld1q_s8(x + 16));
}
// The sums of two neighbouring lanes of a, then those of b.
inline I sums_of(I a, I b) { return vpaddq_s32(a, b); }
inline I minus(I a, I b) { return vsubq_s32(a, b); }
#endif
inline V round_to_whole(V v) { return vrndnq_f32(v); }
inline void store_whole(int16_t* p, V v) { vst1_s16(p, vqmovn_s32(vcvtnq_s32_f32(v))); }
inline void store_whole(int8_t* p, V v) {
  int16x4_t wide = vqmovn_s32(vcvtnq_s32_f32(v));
  int8x8_t narrow = vqmovn_s16(vcombine_s16(wide, wide));
  std::memcpy(p, &narrow, 4);
}
inline V widen_u8(const uint8_t* p) {
  uint32_t four;
  std::memcpy(&four, p, 4);
  uint16x8_t wide = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(four)));
  return vcvtq_f32_u32(vmovl_u16(vget_low_u16(wide)));
}
inline V widen_s8(const int8_t* p) {
  uint32_t four;
  std::memcpy(&four, p, 4);
  int16x8_t wide = vmovl_s8(vreinterpret_s8_u32(vdup_n_u32(four)));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(wide)));
}
inline V quarter_f16(const uint16_t* p) { return vdupq_n_f32(widen_one_f16(*p)); }
inline V quarter_u8(const uint8_t* p) { return vdupq_n_f32(*p); }
#endif

// dot4: lane j plus four codes times four inputs. FLIP: what codes of 8 bits are moved up by, for the sign that the
// instruction wants. NARROW: without an instruction for all of that, a block is summed in 16 bits, two inputs a lane, and
// codes of 8 bits are two of 4, so that no sum can overflow: 16 products of 15 * 127.
#if defined(__AVX512VNNI__)
constexpr bool DOT4 = true, NARROW = false;
constexpr int FLIP = 128;
inline I dot4(I acc, I codes, I x) { return _mm512_dpbusd_epi32(acc, codes, x); }
#elif defined(__AVX512F__)
constexpr bool DOT4 = false, NARROW = true;
constexpr int FLIP = 128;
inline I dot4(I acc, I codes, I x) { return _mm512_add_epi16(acc, _mm512_maddubs_epi16(codes, x)); }
#elif defined(__AVXVNNI__)
constexpr bool DOT4 = true, NARROW = false;
constexpr int FLIP = 128;
inline I dot4(I acc, I codes, I x) { return _mm256_dpbusd_avx_epi32(acc, codes, x); }
#elif defined(__AVX2__)
constexpr bool DOT4 = false, NARROW = true;
constexpr int FLIP = 128;
inline I dot4(I acc, I codes, I x) { return _mm256_add_epi16(acc, _mm256_maddubs_epi16(codes, x)); }
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr bool DOT4 = true, NARROW = false;
constexpr int FLIP = 0;
inline I dot4(I acc, I codes, I x) { return vdotq_s32(acc, vreinterpretq_s8_s32(codes), vreinterpretq_s8_s32(x)); }
#else
constexpr bool DOT4 = false, NARROW = false;
constexpr int FLIP = 0;
inline I dot4(I acc, I codes, I x) {
  int8x16_t a = vreinterpretq_s8_s32(codes), b = vreinterpretq_s8_s32(x);
  int16x8_t low = vmull_s8(vget_low_s8(a), vget_low_s8(b)), high = vmull_high_s8(a, b);
  return vaddq_s32(acc, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
}
#endif

// Codes of which a weight's are made here.
template <int FORMAT>
constexpr int PARTS = NARROW && FORMAT != INT4 ? 2 : 1;

// The sum of a block, more `first`.
template <int FORMAT>
inline I block_sum(I first, const I* parts) {
  if constexpr (!NARROW) return parts[0];
  if constexpr (PARTS<FORMAT> == 2) first = madd(first, parts[1], splat4(16 << 16 | 16));
  return madd(first, parts[0], splat4(1 << 16 | 1));
}

struct Lanes {
  uint32_t bits[2 * L];
  constexpr Lanes() : bits() {
    for (int i = 0; i < L; i++) bits[i] = ~0u;
  }
};
constexpr Lanes SHOWN;

// The first n lanes; the others are 0.
inline V first_lanes(V v, int64_t n) {
  const uint32_t* shown = SHOWN.bits + L - n;
#if defined(__AVX512F__)
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(v), load_bytes(shown)));
#elif defined(__AVX2__)
  return _mm256_and_ps(v, load((const float*)shown));
#else
  return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(v), vld1q_u32(shown)));
#endif
}

// The 32 codes of a block's 16 bytes, in order.
inline void nibbles_of(const uint8_t* p, uint8_t* codes) {
#if defined(__AVX2__)
  __m128i v = _mm_loadu_si128((const __m128i*)p), low = _mm_set1_epi8(15);
  _mm_storeu_si128((__m128i*)codes, _mm_and_si128(v, low));
  _mm_storeu_si128((__m128i*)(codes + 16), _mm_and_si128(_mm_srli_epi16(v, 4), low));
#else
  uint8x16_t v = vld1q_u8(p);
  vst1q_u8(codes, vandq_u8(v, vdupq_n_u8(15)));
  vst1q_u8(codes + 16, vshrq_n_u8(v, 4));
#endif
}

}  // namespace

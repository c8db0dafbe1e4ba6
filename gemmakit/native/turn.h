// Squares of numbers of 32 bits, rows and columns exchanged.

#pragma once

#include "inputs.h"

namespace {

#if defined(__AVX512F__)
inline I low32(I a, I b) { return _mm512_unpacklo_epi32(a, b); }
inline I high32(I a, I b) { return _mm512_unpackhi_epi32(a, b); }
inline I low64(I a, I b) { return _mm512_unpacklo_epi64(a, b); }
inline I high64(I a, I b) { return _mm512_unpackhi_epi64(a, b); }
inline I bits_of(V v) { return _mm512_castps_si512(v); }
inline V number_of(I v) { return _mm512_castsi512_ps(v); }
// The quarters of four vectors, those of the same place side by side.
INLINE void join(I* v, const I* b, int c) {
  I even01 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x88), odd01 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xdd);
  I even23 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x88), odd23 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xdd);
  v[c] = _mm512_shuffle_i32x4(even01, even23, 0x88), v[8 + c] = _mm512_shuffle_i32x4(even01, even23, 0xdd);
  v[4 + c] = _mm512_shuffle_i32x4(odd01, odd23, 0x88), v[12 + c] = _mm512_shuffle_i32x4(odd01, odd23, 0xdd);
}
#elif defined(__AVX2__)
inline I low32(I a, I b) { return _mm256_unpacklo_epi32(a, b); }
inline I high32(I a, I b) { return _mm256_unpackhi_epi32(a, b); }
inline I low64(I a, I b) { return _mm256_unpacklo_epi64(a, b); }
inline I high64(I a, I b) { return _mm256_unpackhi_epi64(a, b); }
inline I bits_of(V v) { return _mm256_castps_si256(v); }
inline V number_of(I v) { return _mm256_castsi256_ps(v); }
INLINE void join(I* v, const I* b, int c) {
  v[c] = _mm256_permute2x128_si256(b[c], b[4 + c], 0x20), v[4 + c] = _mm256_permute2x128_si256(b[c], b[4 + c], 0x31);
}
#else
inline I low32(I a, I b) { return vzip1q_s32(a, b); }
inline I high32(I a, I b) { return vzip2q_s32(a, b); }
inline I low64(I a, I b) { return vreinterpretq_s32_s64(vzip1q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b))); }
inline I high64(I a, I b) { return vreinterpretq_s32_s64(vzip2q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b))); }
inline I bits_of(V v) { return vreinterpretq_s32_f32(v); }
inline V number_of(I v) { return vreinterpretq_f32_s32(v); }
INLINE void join(I* v, const I* b, int c) { v[c] = b[c]; }
#endif

// Pairs of bfloat16, the first of which is the lower half, as two vectors of float32.
INLINE void widen_pairs(I pairs, I* to) {
#if defined(__AVX512F__)
  to[0] = _mm512_slli_epi32(pairs, 16), to[1] = _mm512_and_si512(pairs, _mm512_set1_epi32((int)0xffff0000));
#elif defined(__AVX2__)
  to[0] = _mm256_slli_epi32(pairs, 16), to[1] = _mm256_and_si256(pairs, _mm256_set1_epi32((int)0xffff0000));
#else
  to[0] = vshlq_n_s32(pairs, 16), to[1] = vandq_s32(pairs, vdupq_n_s32((int)0xffff0000));
#endif
}

// L vectors as a square of 32-bit numbers, rows and columns exchanged.
INLINE void turn(I* v) {
  I a[L], b[L];
  UNROLL for (int i = 0; i < L; i += 2) a[i] = low32(v[i], v[i + 1]), a[i + 1] = high32(v[i], v[i + 1]);
  UNROLL for (int i = 0; i < L; i += 4) {
    b[i] = low64(a[i], a[i + 2]), b[i + 1] = high64(a[i], a[i + 2]);
    b[i + 2] = low64(a[i + 1], a[i + 3]), b[i + 3] = high64(a[i + 1], a[i + 3]);
  }
  UNROLL for (int c = 0; c < 4; c++) join(v, b, c);
}

// Four numbers of L rows, `next` bytes apart, those of the same place together: half the exchanges of a square that is in
// registers.
INLINE void turn_four(const char* rows, int64_t next, I* v) {
  I r[4], a[4];
  UNROLL for (int i = 0; i < 4; i++) {
    const char* own = rows + i * next;
#if defined(__AVX512F__)
    r[i] = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)own));
    r[i] = _mm512_inserti32x4(r[i], _mm_loadu_si128((const __m128i*)(own + 4 * next)), 1);
    r[i] = _mm512_inserti32x4(r[i], _mm_loadu_si128((const __m128i*)(own + 8 * next)), 2);
    r[i] = _mm512_inserti32x4(r[i], _mm_loadu_si128((const __m128i*)(own + 12 * next)), 3);
#elif defined(__AVX2__)
    r[i] = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)own));
    r[i] = _mm256_inserti128_si256(r[i], _mm_loadu_si128((const __m128i*)(own + 4 * next)), 1);
#else
    r[i] = vld1q_s32((const int32_t*)own);
#endif
  }
  UNROLL for (int i = 0; i < 4; i += 2) a[i] = low32(r[i], r[i + 1]), a[i + 1] = high32(r[i], r[i + 1]);
  v[0] = low64(a[0], a[2]), v[1] = high64(a[0], a[2]), v[2] = low64(a[1], a[3]), v[3] = high64(a[1], a[3]);
}

}  // namespace

// A square of numbers of 32 bits, rows and columns exchanged.

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

}  // namespace

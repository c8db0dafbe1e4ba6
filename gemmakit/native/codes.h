// Codes of 5 and 6 bits. No product reads them as they lie: a few rows at a time become bytes in the first cache, a weight
// in INT8_GROUPS like any other.
//
// Four blocks of 32 inputs lie together: the low bits of each as INT4's, 16 bytes a block, then the upper bits, H of a
// code: a byte holds those of inputs j and j + 16 of a block beside each other, of four blocks in 5 bits, of two in 6.
// What is stored is the code moved up by half its range.

#pragma once

#include "packed.h"

namespace {

constexpr int64_t FOUR = 4 * BLOCK;      // inputs that lie together
constexpr int64_t IN_BYTES = 1 << 14;    // of rows as bytes at a time: they stay in the first cache beside x

inline bool is_split(const Matrix& w) { return w.format == INT5 || w.format == INT6; }

// Block K of four: 32 codes.
template <int H, int K>
INLINE void join_block(const uint8_t* four, int8_t* to) {
  constexpr int SHIFT = 2 * H * K % 8, MASK = ((1 << H) - 1) << 4, HALF = 8 << H;
  const uint8_t *at = four + 16 * K, *upper = four + 64 + 2 * H * K / 8 * 16;
#if defined(__AVX2__)
  __m128i low = _mm_loadu_si128((const __m128i*)at), up = _mm_loadu_si128((const __m128i*)upper);
  __m128i nibble = _mm_set1_epi8(15), mask = _mm_set1_epi8(MASK), half = _mm_set1_epi8(HALF);
  up = _mm_srli_epi16(up, SHIFT);
  __m128i first = _mm_or_si128(_mm_and_si128(low, nibble), _mm_and_si128(_mm_slli_epi16(up, 4), mask));
  low = _mm_and_si128(_mm_srli_epi16(low, 4), nibble);
  __m128i second = _mm_or_si128(low, _mm_and_si128(_mm_slli_epi16(up, 4 - H), mask));
  _mm_storeu_si128((__m128i*)to, _mm_sub_epi8(first, half));
  _mm_storeu_si128((__m128i*)(to + 16), _mm_sub_epi8(second, half));
#else
  uint8x16_t low = vld1q_u8(at), up = vshlq_u8(vld1q_u8(upper), vdupq_n_s8(-SHIFT));
  uint8x16_t mask = vdupq_n_u8(MASK), half = vdupq_n_u8(HALF);
  uint8x16_t first = vorrq_u8(vandq_u8(low, vdupq_n_u8(15)), vandq_u8(vshlq_n_u8(up, 4), mask));
  uint8x16_t second = vorrq_u8(vshrq_n_u8(low, 4), vandq_u8(vshlq_n_u8(up, 4 - H), mask));
  vst1q_s8(to, vreinterpretq_s8_u8(vsubq_u8(first, half)));
  vst1q_s8(to + 16, vreinterpretq_s8_u8(vsubq_u8(second, half)));
#endif
}

template <int H>
inline void join_row(const uint8_t* from, int64_t fours, int8_t* to) {
  for (int64_t i = 0; i < fours; i++, from += 64 + 16 * H, to += FOUR) {
    join_block<H, 0>(from, to);
    join_block<H, 1>(from, to + BLOCK);
    join_block<H, 2>(from, to + 2 * BLOCK);
    join_block<H, 3>(from, to + 3 * BLOCK);
  }
}

// Blocks of a row from `block`, a multiple of four, on; `to` has room for the last four whole.
inline void join_codes(const Matrix& w, int64_t row, int64_t block, int64_t count, int8_t* to) {
  int64_t each = w.format == INT5 ? 80 : 96, fours = (w.in + FOUR - 1) / FOUR;
  const uint8_t* from = (const uint8_t*)w.codes + (row * fours + block / 4) * each;
  w.format == INT5 ? join_row<1>(from, (count + 3) / 4, to) : join_row<2>(from, (count + 3) / 4, to);
}

// Rows from..from + count as a weight of their own, without its bias.
inline Matrix joined(const Matrix& w, int64_t from, int64_t count) {
  int8_t* room = scratch<int8_t, 2>(count * w.in + FOUR);
  for (int64_t r = 0; r < count; r++) join_codes(w, from + r, 0, (w.in + BLOCK - 1) / BLOCK, room + r * w.in);
  Matrix part = w;
  part.format = INT8_GROUPS, part.out = count, part.codes = room, part.bias = nullptr;
  part.scale = (const uint16_t*)w.scale + from * groups_of(w);
  return part;
}

}  // namespace

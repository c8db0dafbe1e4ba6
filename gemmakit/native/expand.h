// A row of codes as numbers.

#pragma once

#include "functions.h"
#include "codes.h"
#include "pieces.h"

namespace {

// What the codes of a group stand for. FORMAT is INT4, or INT8_ROWS for any bytes.
template <int F, int FORMAT>
struct Group {
  V scale, offset;

  // 32 weights, L of them beside each other and the next so many `next` numbers on.
  INLINE void expand(const void* codes, void* y, int64_t next) const {
    uint8_t wide[BLOCK];
    if (FORMAT == INT4) nibbles_of((const uint8_t*)codes, wide);
    for (int j = 0; j < BLOCK; j += L) {
      V code = FORMAT == INT4 ? widen_u8(wide + j) : widen_s8((const int8_t*)codes + j);
      put_all<F>((char*)y + j / L * next * size_of<F>, mul(sub(code, offset), scale));
    }
  }
};

#if defined(__AVX512BF16__)
INLINE void put_block(void* y, int64_t next, I block) {
  if (next == L) return (void)std::memcpy(y, &block, sizeof block);
  for (int half = 0; half < 2; half++) std::memcpy((uint16_t*)y + half * next, (uint16_t*)&block + half * L, L * 2);
}

template <>
INLINE void Group<BF16, INT8_ROWS>::expand(const void* codes, void* y, int64_t next) const {
  const int8_t* own = (const int8_t*)codes;
  put_block(y, next, narrow_two(mul(sub(widen_s8(own), offset), scale), mul(sub(widen_s8(own + L), offset), scale)));
}

// Sixteen numbers, twice, of which a code's four bits pick one.
template <>
struct Group<BF16, INT4> {
  I numbers;

  INLINE Group(V scale, V offset) {
    const uint8_t codes[L] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    V all = mul(sub(widen_u8(codes), offset), scale);
    numbers = narrow_two(all, all);
  }
  INLINE void expand(const void* codes, void* y, int64_t next) const {
    constexpr uint16_t shifts[BLOCK] = {0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
                                        4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4};
    __m256i twice = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)codes));
    I picks = _mm512_srlv_epi16(_mm512_cvtepu8_epi16(twice), load_bytes(shifts));
    put_block(y, next, _mm512_permutexvar_epi16(picks, numbers));
  }
};
#endif

// `width` numbers: `count` of a row from `first` on, a multiple of FOUR, and zeros behind them.
template <int F, int FORMAT>
void expand_packed(const Matrix& w, int64_t row, int64_t first, int64_t count, void* y, int64_t next, int64_t width) {
  constexpr int BYTES = FORMAT == INT4 ? 16 : 32;  // of a block
  const char* codes = (const char*)w.codes + row * row_bytes(w) + first / BLOCK * BYTES;
  if (is_split(w)) {
    int8_t* room = scratch<int8_t, 2>(count + FOUR);
    join_codes(w, row, first / BLOCK, (count + BLOCK - 1) / BLOCK, room);
    codes = (const char*)room;
  }
  V scale = zero(), offset = zero();
  Groups g = {nullptr, nullptr, 1, INT64_MAX};
  if (w.format == INT8_ROWS)
    scale = splat(number<F32>(w.scale, row));
  else
    g = groups(w, row);
  Group<F, FORMAT> group{scale, offset};
  int64_t i = 0, k = first / BLOCK / g.blocks_each, left = g.blocks_each - first / BLOCK % g.blocks_each;
  for (bool begins = g.scale; i < count; i += BLOCK, codes += BYTES, left--, begins = false) {
    if (begins || !left) {
      k += !begins, left = begins ? left : g.blocks_each;
      scale = splat(widen_one_f16(g.scale[k]));
      if (g.zero) offset = splat(g.zero[k]);
      group = {scale, offset};
    }
    if (i + BLOCK > count) break;
    group.expand(codes, (char*)y + i / L * next * size_of<F>, next);
  }
  if (i >= width) return;
  char rest[BLOCK] = {};
  float last[BLOCK];
  std::memcpy(rest, codes, i >= count ? 0 : FORMAT == INT4 ? 16 : count - i);
  Group<F32, FORMAT>{scale, offset}.expand(rest, last, L);
  for (; i < width; i++) put<F>(y, i / L * next + i % L, i < count ? last[i % BLOCK] : 0.0f);
}

template <int F>
void expand_row(const Matrix& w, int64_t row, int64_t first, int64_t count, void* y, int64_t next, int64_t width) {
  w.format == INT4 ? expand_packed<F, INT4>(w, row, first, count, y, next, width)
                   : expand_packed<F, INT8_ROWS>(w, row, first, count, y, next, width);
}

}  // namespace

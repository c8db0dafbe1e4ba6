// A row of codes as numbers.

#pragma once

#include "functions.h"
#include "codes.h"

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

// `width` numbers, of which those beyond the row are 0.
template <int F, int FORMAT>
void expand_packed(const Matrix& w, int64_t row, void* y, int64_t next, int64_t width) {
  constexpr int BYTES = FORMAT == INT4 ? 16 : 32;  // of a block
  int64_t row_bytes = FORMAT == INT4 ? (w.in + BLOCK - 1) / BLOCK * 16 : w.in;
  const char* codes = (const char*)w.codes + row * row_bytes;
  if (is_split(w)) codes = (const char*)joined(w, row, 1).codes;
  Groups g = {nullptr, nullptr, 1, INT64_MAX};
  if (w.format != INT8_ROWS) g = groups(w, row);
  V scale = splat(w.format == INT8_ROWS ? number<F32>(w.scale, row) : 0.0f), offset = zero();
  Group<F, FORMAT> group{scale, offset};
  int64_t i = 0, left = 0, k = 0;
  for (; i < w.in; i += BLOCK, codes += BYTES) {
    if (g.scale && left-- == 0) {
      scale = splat(widen_one_f16(g.scale[k]));
      if (g.zero) offset = splat(g.zero[k]);
      group = {scale, offset};
      left = g.blocks_each - 1;
      k++;
    }
    if (i + BLOCK > w.in) break;
    group.expand(codes, (char*)y + i / L * next * size_of<F>, next);
  }
  if (i >= width) return;
  char rest[BLOCK] = {};
  float last[BLOCK];
  std::memcpy(rest, codes, i >= w.in ? 0 : FORMAT == INT4 ? 16 : w.in - i);
  Group<F32, FORMAT>{scale, offset}.expand(rest, last, L);
  for (; i < width; i++) put<F>(y, i / L * next + i % L, i < w.in ? last[i % BLOCK] : 0.0f);
}

template <int F>
void expand_row(const Matrix& w, int64_t row, void* y, int64_t next, int64_t width) {
  w.format == INT4 ? expand_packed<F, INT4>(w, row, y, next, width) : expand_packed<F, INT8_ROWS>(w, row, y, next, width);
}

}  // namespace

// A row of codes as numbers.

#pragma once

#include "functions.h"
#include "codes.h"

namespace {

// 32 weights of one group, L of them beside each other and the next so many `next` numbers on. FORMAT is INT4, or
// INT8_ROWS for any bytes.
template <int F, int FORMAT>
inline void expand_block(const void* from, V scale, V offset, void* y, int64_t next) {
  uint8_t codes[BLOCK];
  if (FORMAT == INT4) nibbles_of((const uint8_t*)from, codes);
  for (int j = 0; j < BLOCK; j += L) {
    V code = FORMAT == INT4 ? widen_u8(codes + j) : widen_s8((const int8_t*)from + j);
    put_all<F>((char*)y + j / L * next * size_of<F>, mul(sub(code, offset), scale));
  }
}

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
  int64_t i = 0, left = 0, k = 0;
  for (; i < w.in; i += BLOCK, codes += BYTES) {
    if (g.scale && left-- == 0) {
      scale = splat(widen_one_f16(g.scale[k]));
      if (g.zero) offset = splat(g.zero[k]);
      left = g.blocks_each - 1;
      k++;
    }
    if (i + BLOCK > w.in) break;
    expand_block<F, FORMAT>(codes, scale, offset, (char*)y + i / L * next * size_of<F>, next);
  }
  if (i >= width) return;
  char rest[BLOCK] = {};
  float last[BLOCK] = {};
  std::memcpy(rest, codes, i >= w.in ? 0 : FORMAT == INT4 ? 16 : w.in - i);
  expand_block<F32, FORMAT>(rest, scale, offset, last, L);
  for (; i < width; i++) put<F>(y, i / L * next + i % L, i < w.in ? last[i % BLOCK] : 0.0f);
}

template <int F>
void expand_row(const Matrix& w, int64_t row, void* y, int64_t next, int64_t width) {
  w.format == INT4 ? expand_packed<F, INT4>(w, row, y, next, width) : expand_packed<F, INT8_ROWS>(w, row, y, next, width);
}

}  // namespace

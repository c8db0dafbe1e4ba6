// A weight's rows as a dense panel for the library's matrix product; and a plain read of memory.

#include "functions.h"
#include "codes.h"

namespace {

// 32 weights of one group: FORMAT is INT4, or INT8_ROWS for any bytes.
template <int F, int FORMAT>
inline void expand_block(const void* from, V scale, V offset, void* y, int64_t i) {
  uint8_t codes[BLOCK];
  if (FORMAT == INT4) nibbles_of((const uint8_t*)from, codes);
  for (int j = 0; j < BLOCK; j += L) {
    V code = FORMAT == INT4 ? widen_u8(codes + j) : widen_s8((const int8_t*)from + j);
    put_all<F>((char*)y + (i + j) * size_of<F>, mul(sub(code, offset), scale));
  }
}

template <int F, int FORMAT>
void expand_packed(const Matrix& w, int64_t row, void* y) {
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
    expand_block<F, FORMAT>(codes, scale, offset, y, i);
  }
  if (i >= w.in) return;
  char rest[BLOCK] = {};
  float last[BLOCK];
  std::memcpy(rest, codes, FORMAT == INT4 ? 16 : w.in - i);
  expand_block<F32, FORMAT>(rest, scale, offset, last, 0);
  for (int64_t j = 0; i + j < w.in; j++) put<F>(y, i + j, last[j]);
}

template <int F, int FROM>
void expand_plain(const Matrix& w, int64_t row, void* y) {
  const void* from = at<FROM>(w.codes, row * w.in);
  if (F == FROM)
    std::memcpy(y, from, w.in * size_of<F>);
  else if (F == F32)
    widen_all<FROM>(from, (float*)y, w.in);
  else
    for (int64_t i = 0; i < w.in; i++) put<F>(y, i, number<FROM>(from, i));
}

template <int F>
int run(const Matrix& w, int64_t from, int64_t to, void* y, int threads) {
  void (*row_of)(const Matrix&, int64_t, void*) = expand_packed<F, INT8_ROWS>;
  if (w.format == INT4) row_of = expand_packed<F, INT4>;
  if (w.format == BF16) row_of = expand_plain<F, BF16>;
  if (w.format == F16) row_of = expand_plain<F, F16>;
  if (w.format == F32) row_of = expand_plain<F, F32>;
#pragma omp parallel for schedule(dynamic, 16) num_threads(threads) if ((to - from) * w.in > 1 << 16)
  for (int64_t row = from; row < to; row++) row_of(w, row, (void*)at<F>(y, (row - from) * w.in));
  return 0;
}

}  // namespace

extern "C" int NATIVE(gemmakit_expand)(const Matrix* m, int64_t from, int64_t to, int y_format, void* y, int threads) {
  if (from < 0 || from > to || to > m->out || m->format < BF16 || m->format > INT6) return 1;
  switch (y_format) {
    case BF16: return run<BF16>(*m, from, to, y, threads);
    case F16: return run<F16>(*m, from, to, y, threads);
    case F32: return run<F32>(*m, from, to, y, threads);
  }
  return 1;
}

extern "C" int NATIVE(gemmakit_read_memory)(const void* bytes, int64_t size, uint64_t* sum, int threads) {
  constexpr int64_t PIECE = 1 << 18;
  int64_t pieces = (size + PIECE - 1) / PIECE;
  uint64_t total = 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) reduction(+ : total)
  for (int64_t p = 0; p < pieces; p++) {
    const char* start = (const char*)bytes + p * PIECE;
    int64_t n = p + 1 < pieces ? PIECE : size - p * PIECE;
    uint64_t part = 0, word;
    for (int64_t i = 0; i + 8 <= n; i += 8) {
      std::memcpy(&word, start + i, 8);
      part += word;
    }
    for (int64_t i = n / 8 * 8; i < n; i++) part += (unsigned char)start[i];
    total += part;
  }
  *sum = total;
  return 0;
}

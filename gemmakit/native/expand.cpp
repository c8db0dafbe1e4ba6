// A weight's rows as a dense panel for the library's matrix product; and a plain read of memory.

#include "expand.h"

namespace {

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
  void (*row_of)(const Matrix&, int64_t, void*) = [](const Matrix& w, int64_t row, void* y) {
    expand_row<F>(w, row, 0, w.in, y, L, w.in);
  };
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

// y = x @ W^T + bias for many rows of x and a weight in 8 or 4 bits, in products of bytes.
//
// x is rounded to 8 bits in blocks of 32 inputs of a token. A piece of the weight's rows, a few blocks of them at a time,
// is laid out as bytes in the first cache, where all tokens meet it; sums of a block are exact, blocks are summed in
// float32 in the order of the inputs, whatever the other tokens are.

#include "bytes.h"

namespace {

constexpr int64_t MOST_TOKENS = 1024;  // whose sums with a piece stay in the second cache

template <int FORMAT>
void fill(const Matrix& w, int64_t from, int64_t rows, int64_t block, int64_t count, Piece& piece) {
  if (w.group == 32) return fill_piece<FORMAT, 32>(w, from, rows, block, count, piece);
  if (w.group == 128) return fill_piece<FORMAT, 128>(w, from, rows, block, count, piece);
  fill_piece<FORMAT, 0>(w, from, rows, block, count, piece);
}

template <int FORMAT>
void sums_of(const Matrix& w, int64_t from, int64_t rows, const Tiles& x, int64_t tile, int64_t tiles, float* sums) {
  static thread_local Piece piece;
  int64_t next = (tiles + 1) * L;  // one more, so that rows do not meet in the same places of a cache
  std::memset(sums, 0, rows * next * sizeof(float));
  for (int64_t block = 0; block < x.blocks; block += DEPTH) {
    int64_t count = x.blocks - block < DEPTH ? x.blocks - block : DEPTH;
    fill<FORMAT>(w, from, rows, block, count, piece);
    for (int64_t t = 0; t < tiles;) {
      int64_t left = tiles - t;
      float* to = sums + t * L;
      if (TOKENS >= 3 && left >= 3 && left != 4)
        multiply_tiles<FORMAT, TOKENS>(piece, rows, x, tile + t, block, count, to, next), t += 3;
      else if (left >= 2)
        multiply_tiles<FORMAT, 2>(piece, rows, x, tile + t, block, count, to, next), t += 2;
      else
        multiply_tiles<FORMAT, 1>(piece, rows, x, tile + t, block, count, to, next), t += 1;
    }
  }
}

template <int F, int FORMAT>
void finish(const Matrix& w, int64_t from, int64_t rows, int64_t token, int64_t tokens, int64_t next,
            const float* sums, void* y) {
  for (int64_t m = 0; m < tokens; m++) {
    for (int64_t r = 0; r < rows; r += L) {  // the room for sums is larger than a piece, so all L can be read
      V v = gather(sums + r * next + m, next);
      if (FORMAT == INT8) v = mul(v, take<F32>(w.scale, from + r, from + rows));
      if (w.bias) v = add(v, take<F>(w.bias, from + r, from + rows));
      give<F>(y, (token + m) * w.out + from + r, (token + m) * w.out + from + rows, v);
    }
  }
}

template <int F, int FORMAT>
void run(const Matrix& w, const void* x, int64_t rows, void* y, int threads) {
  int64_t tiles = (rows + L - 1) / L, blocks = (w.in + BLOCK - 1) / BLOCK;
  Tiles t = {scratch<int8_t, 0>(tiles * blocks * BLOCK * L), scratch<float, 10>(tiles * blocks * L),
             scratch<float, 11>(tiles * blocks * L), scratch<int32_t, 0>(tiles * blocks * L), blocks};
  int64_t pieces = (w.out + OUTS - 1) / OUTS, chunk = MOST_TOKENS / L;
  while (chunk > TOKENS && pieces * ((tiles + chunk - 1) / chunk) < 4 * threads) chunk = (chunk + 1) / 2;
  int64_t chunks = (tiles + chunk - 1) / chunk;
#pragma omp parallel num_threads(threads) if (rows * w.out * w.in > 1 << 20)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tiles; i++)
      fill_tile<F>(at<F>(x, i * L * w.in), w.in, i, rows - i * L < L ? rows - i * L : L, t);
#pragma omp for schedule(dynamic, 1)
    for (int64_t p = 0; p < pieces * chunks; p++) {
      int64_t from = p / chunks * OUTS, outs = w.out - from < OUTS ? w.out - from : OUTS;
      int64_t first = p % chunks * chunk, count = tiles - first < chunk ? tiles - first : chunk;
      float* sums = scratch<float, 13>(OUTS * (count + 1) * L);
      sums_of<FORMAT>(w, from, outs, t, first, count, sums);
      int64_t tokens = rows - first * L < count * L ? rows - first * L : count * L;
      finish<F, FORMAT>(w, from, outs, first * L, tokens, (count + 1) * L, sums, y);
    }
  }
}

template <int F>
int run_format(const Matrix& w, const void* x, int64_t rows, void* y, int threads) {
  switch (w.format) {
    case INT8: return run<F, INT8>(w, x, rows, y, threads), 0;
    case INT8_GROUPS: return run<F, INT8_GROUPS>(w, x, rows, y, threads), 0;
    case INT4: return run<F, INT4>(w, x, rows, y, threads), 0;
  }
  return 1;
}

}  // namespace

extern "C" int NATIVE(multiply)(const Matrix* m, int x_format, const void* x, int64_t rows, void* y, int threads) {
  if (m->in < 1 || rows < 0 || m->format < INT8 || (!DOT4 && m->format != INT4)) return 1;
  if (!x) return 0;
  switch (x_format) {
    case BF16: return run_format<BF16>(*m, x, rows, y, threads);
    case F16: return run_format<F16>(*m, x, rows, y, threads);
    case F32: return run_format<F32>(*m, x, rows, y, threads);
  }
  return 1;
}

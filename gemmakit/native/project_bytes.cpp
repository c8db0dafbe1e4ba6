// y = x @ W^T + bias for rows of x and one or several weights in 8 or 4 bits, in products of bytes.
//
// x is rounded to 8 bits in blocks of 32 inputs of a token. A piece of the weight's rows, a few blocks of them at a
// time, is laid out as bytes in the first cache, where all tokens meet it; sums of a block are exact, blocks are summed in
// float32 in the order of the inputs, whatever the other tokens are. A few tokens meet the weight as it is read
// (bytes_few.h), in the same order.

#include "bytes_few.h"
#include "outputs.h"

namespace {

constexpr int64_t MOST_TOKENS = 1024;  // whose sums with a piece stay in the second cache, and x in the third

template <int FORMAT>
void sums_of(const Matrix& w, int64_t from, int64_t rows, const Tiles& x, int64_t tile, int64_t tiles, float* sums) {
  static thread_local Piece<FORMAT> piece;
  int64_t next = (tiles + 1) * L;  // one more, so that rows do not meet in the same places of a cache
  std::memset(sums, 0, rows * next * sizeof(float));
  for (int64_t block = 0; block < x.blocks; block += DEPTH) {
    int64_t count = x.blocks - block < DEPTH ? x.blocks - block : DEPTH;
    fill_piece(w, from, rows, block, count, piece);
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

// OUTS rows of the weight from `from` on against `count` tiles from `tile` on; x has `tokens` in all.
template <int F, int FORMAT>
void multiply_piece(const Matrix& w, const Tiles& x, int64_t tokens, int64_t from, int64_t tile, int64_t count,
                    void* y, const void* residual) {
  int64_t rows = w.out - from < OUTS ? w.out - from : OUTS, next = (count + 1) * L, first = tile * L;
  float* sums = scratch<float, 13>((OUTS + BESIDE) * next);
  sums_of<FORMAT>(w, from, rows, x, tile, count, sums);
  int64_t last = first + count * L < tokens ? first + count * L : tokens;
  finish_all<F, FORMAT>(w, from, from + rows, first, last, sums, next, y, residual);
}

template <int F>
auto piece_of(const Matrix& w) {
  return w.format == INT4 ? multiply_piece<F, INT4> : w.format == INT8_ROWS ? multiply_piece<F, INT8_ROWS>
                                                                        : multiply_piece<F, INT8_GROUPS>;
}

// Up to MOST_TOKENS rows of x, laid out once for all matrices.
template <int F>
void multiply_some(const Matrix* w, int count, const void* x, int64_t tokens, int64_t done, void* const* y,
                   const void* residual, int threads) {
  int64_t tiles = (tokens + L - 1) / L, blocks = (w->in + BLOCK - 1) / BLOCK;
  Tiles t = {scratch<int8_t, 0>(tiles * blocks * BLOCK * L), scratch<float, 10>(tiles * blocks * L),
             scratch<float, 11>(tiles * blocks * L), scratch<int32_t, 0>(tiles * blocks * L), blocks};
#pragma omp parallel num_threads(threads) if (tokens * w->out * w->in > 1 << 20)
  {
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < tiles; i++)
      fill_tile<F>(at<F>(x, i * L * w->in), w->in, i, tokens - i * L < L ? tokens - i * L : L, t);
    for (int i = 0; i < count; i++) {
      auto piece = piece_of<F>(w[i]);
      int64_t pieces = (w[i].out + OUTS - 1) / OUTS, each = tiles;
      while (each > TOKENS && pieces * ((tiles + each - 1) / each) < 4 * threads) each = (each + 1) / 2;
      int64_t parts = (tiles + each - 1) / each;
      void* to = (char*)y[i] + done * w[i].out * size_of<F>;
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t p = 0; p < pieces * parts; p++) {
        int64_t tile = p % parts * each;
        piece(w[i], t, tokens, p / parts * OUTS, tile, tiles - tile < each ? tiles - tile : each, to, residual);
      }
    }
  }
}

// Rows of x meet a strip FEW at a time, of which the first read it from the memory. Of more, tiles cost less.
constexpr int GROUPS = 3;

struct Few {
  Rows x[GROUPS];
  int count[GROUPS], groups;
};

template <int F, int FORMAT>
void multiply_strip(const Matrix& w, const Few& few, int64_t row, void* y, const void* residual) {
  float sums[FEW * L];
  Matrix own = is_split(w) ? joined(w, row, w.out - row < L ? w.out - row : L) : w;
  Strip strip = strip_of<FORMAT>(own, is_split(w) ? 0 : row);
  for (int g = 0, done = 0; g < few.groups; done += few.count[g++]) {
    strip_sums_of<FORMAT>(few.count[g], std::make_integer_sequence<int, FEW>())(strip, few.x[g], sums);
    for (int m = 0; m < few.count[g]; m++)
      finish<F, FORMAT>(w, row, w.out, done + m, load(sums + m * L), y, residual);
  }
}

// Bytes of a weight that a thread takes at a time, and parts of a row of x that threads round.
constexpr int64_t SHARE = 1 << 18, FILL_PARTS = 4;

// Up to GROUPS * FEW rows of x.
template <int F>
void multiply_few(const Matrix* w, int count, const void* x, int M, void* const* y, const void* residual, int threads) {
  int64_t blocks = (w->in + BLOCK - 1) / BLOCK;
  int8_t* q = scratch<int8_t, 1>(blocks * BLOCK * M);
  float *scale = scratch<float, 14>(blocks * M), *minus = scratch<float, 15>(blocks * M);
  int32_t* back = scratch<int32_t, 1>(blocks * M);
  Few few;
  few.groups = (M + FEW - 1) / FEW;
  for (int g = 0, done = 0; g < few.groups; done += few.count[g++]) {
    int some = few.count[g] = (M - done + few.groups - g - 1) / (few.groups - g);
    int64_t from = done * blocks;
    few.x[g] = {q + from * BLOCK, scale + from, minus + from, back + from, blocks};
  }
#pragma omp parallel num_threads(threads) if (w->out * w->in > 1 << 18)
  {
#pragma omp for schedule(static)
    for (int64_t p = 0; p < M * FILL_PARTS; p++) {
      int g = 0, m = p / FILL_PARTS, first = 0;
      while (m >= first + few.count[g]) first += few.count[g++];
      int64_t part = p % FILL_PARTS;
      fill_rows<F>(at<F>(x, first * w->in), w->in, m - first, few.count[g], blocks * part / FILL_PARTS,
                   blocks * (part + 1) / FILL_PARTS, few.x[g]);
    }
    for (int i = 0; i < count; i++) {
      auto strip = w[i].format == INT4        ? multiply_strip<F, INT4>
                   : w[i].format == INT8_ROWS ? multiply_strip<F, INT8_ROWS>
                                              : multiply_strip<F, INT8_GROUPS>;
      int64_t bytes = w[i].in * L / (w[i].format == INT4 ? 2 : 1), all = (w[i].out + L - 1) / L;
      int64_t each = all / (8 * threads) < SHARE / bytes ? all / (8 * threads) : SHARE / bytes;
      each = each < 1 ? 1 : each;
#pragma omp for schedule(dynamic, 1) nowait
      for (int64_t p = 0; p < all; p += each)
        for (int64_t s = p; s < p + each && s < all; s++) strip(w[i], few, s * L, y[i], residual);
    }
  }
}

template <int F>
int run(const Matrix* w, int count, const void* x, int64_t rows, void* const* y, const void* residual, int threads) {
  if (rows <= GROUPS * FEW) return multiply_few<F>(w, count, x, rows, y, residual, threads), 0;
  for (int64_t done = 0; done < rows; done += MOST_TOKENS) {
    int64_t tokens = rows - done < MOST_TOKENS ? rows - done : MOST_TOKENS;
    multiply_some<F>(w, count, at<F>(x, done * w->in), tokens, done, y,
                     residual ? at<F>(residual, done * w->out) : nullptr, threads);
  }
  return 0;
}

}  // namespace

extern "C" int NATIVE(project_bytes)(const Matrix* m, int count, int x_format, const void* x, int64_t rows,
                                     void* const* y, const void* residual, int threads) {
  switch (x_format) {
    case BF16: return run<BF16>(m, count, x, rows, y, residual, threads);
    case F16: return run<F16>(m, count, x, rows, y, residual, threads);
    case F32: return run<F32>(m, count, x, rows, y, residual, threads);
  }
  return 1;
}

// Products of bytes for many rows of x: in 8 bits against codes of 4 and 8 bits, four to a lane, summed in int32.

#pragma once

#include "functions.h"
#include "codes.h"

namespace {

// OUTPUTS: sums that the registers hold beside the running ones, of TOKENS vectors at most.
#if defined(__AVX512F__)
constexpr int OUTPUTS = 12, TOKENS = 3;
#elif defined(__AVX2__)
constexpr int OUTPUTS = 4, TOKENS = 2;
#else
constexpr int OUTPUTS = 12, TOKENS = 3;
#endif

constexpr int STEPS = BLOCK / 4;  // of four inputs in a block
// A piece of a weight: so many rows and blocks that it stays in the first cache beside the tiles that meet it.
constexpr int64_t DEPTH = L, OUTS = 768 / L;

// x in 8 bits: L tokens a tile, so that a vector of bytes is four inputs of each.
struct Tiles {
  int8_t* q;      // (tiles, blocks, STEPS, L, 4)
  float* scale;   // (tiles, blocks, L)
  float* minus;   // (tiles, blocks, L), minus the block's sum of scale * q
  int32_t* back;  // (tiles, blocks, L), minus the block's sum of FLIP * q
  int64_t blocks;

  const int8_t* inputs(int64_t tile, int64_t block) const { return q + (tile * blocks + block) * BLOCK * L; }
  int64_t scales(int64_t tile, int64_t block) const { return (tile * blocks + block) * L; }
};

template <int F>
void fill_tile(const void* x, int64_t in, int64_t tile, int tokens, const Tiles& t) {
  for (int j = 0; j < L; j++) {
    for (int64_t b = 0; b < t.blocks; b++) {
      int8_t local[BLOCK];
      int64_t at_scale = t.scales(tile, b) + j;
      float total = quantize_block_of<F>(at<F>(x, j * in), j < tokens ? in : 0, b, local, t.scale + at_scale);
      t.minus[at_scale] = -t.scale[at_scale] * total;
      t.back[at_scale] = -FLIP * (int32_t)total;
      int8_t* to = t.q + (tile * t.blocks + b) * BLOCK * L + 4 * j;
      for (int i = 0; i < STEPS; i++) std::memcpy(to + i * 4 * L, local + 4 * i, 4);
    }
  }
}

// Up to DEPTH blocks of up to OUTS weight rows, a byte a code, with each block's scale and scale * zero.
template <int FORMAT>
struct Piece {
  alignas(64) uint8_t codes[OUTS][PARTS<FORMAT>][DEPTH * BLOCK];
  float scale[OUTS][DEPTH], offset[OUTS][DEPTH];
};

// Codes of 8 bits, moved up; in parts of 4 bits, the lower first.
inline void flip(const uint8_t* codes, int64_t n, uint8_t* to) {
  if (!NARROW)
    for (int64_t i = 0; i < n; i++) to[i] = codes[i] ^ FLIP;
  else
    for (int64_t i = 0; i < n; i++) to[i] = codes[i] & 15, to[DEPTH * BLOCK + i] = (codes[i] ^ FLIP) >> 4;
}

// `count` blocks of a weight row as bytes; what is read next in the row is asked for.
template <int FORMAT>
inline void fill_codes(const Matrix& w, int64_t row, int64_t block, int64_t count, uint8_t* to) {
  constexpr int BYTES = FORMAT == INT4 ? 16 : 32;
  int64_t row_bytes = FORMAT == INT4 ? (w.in + BLOCK - 1) / BLOCK * 16 : w.in;
  const uint8_t* codes = (const uint8_t*)w.codes + row * row_bytes + block * BYTES;
  for (int i = 0; !is_split(w) && i < DEPTH * BYTES; i += 64) __builtin_prefetch(codes + DEPTH * BYTES + i, 0, 3);
  if (FORMAT == INT4) {
    for (int64_t b = 0; b < count; b++) nibbles_of(codes + b * BYTES, to + b * BLOCK);
    return;
  }
  int64_t n = count * BLOCK, left = w.in - block * BLOCK;
  int8_t bytes[DEPTH * BLOCK];
  if (is_split(w)) join_codes(w, row, block, count, bytes), codes = (const uint8_t*)bytes;
  flip(codes, n < left ? n : left, to);
  for (int p = 0; p < PARTS<FORMAT> && n > left; p++) std::memset(to + p * DEPTH * BLOCK + left, 0, n - left);
}

template <int FORMAT>
void fill_piece(const Matrix& w, int64_t from, int64_t rows, int64_t block, int64_t count, Piece<FORMAT>& piece) {
  for (int64_t r = 0; r < rows; r++) {
    fill_codes<FORMAT>(w, from + r, block, count, piece.codes[r][0]);
    if (FORMAT == INT8_ROWS) continue;
    Scales s = scales_of(w, groups(w, from + r), block, count);
    store(piece.scale[r], s.scale);
    if (FORMAT == INT4) store(piece.offset[r], mul(s.scale, s.zero));
  }
}

// sums (R, L * T tokens), next apart, += R rows of a piece against T tiles of x, over `count` blocks from `block` on.
template <int FORMAT, int T, int R>
INLINE void multiply_tile(const Piece<FORMAT>& piece, int64_t row, const Tiles& x, int64_t tile, int64_t block,
                          int64_t count, float* sums, int64_t next) {
  V total[R][T];
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int t = 0; t < T; t++) total[r][t] = load(sums + r * next + t * L);
  const int8_t* q[T];
  for (int t = 0; t < T; t++) q[t] = x.inputs(tile + t, block);
  for (int64_t b = 0; b < count; b++) {
    constexpr int P = PARTS<FORMAT>;
    I acc[R][T][P], first[T];
    UNROLL for (int t = 0; t < T; t++) {
      first[t] = FORMAT == INT4 || !FLIP ? none() : load_bytes(x.back + x.scales(tile + t, block + b));
      UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int p = 0; p < P; p++) acc[r][t][p] = NARROW ? none() : first[t];
    }
    UNROLL for (int i = 0; i < STEPS; i++) {
      I inputs[T];
      UNROLL for (int t = 0; t < T; t++) inputs[t] = load_bytes(q[t] + (b * STEPS + i) * 4 * L);
      UNROLL for (int r = 0; r < R; r++)
        UNROLL for (int p = 0; p < P; p++) {
          int32_t four;
          std::memcpy(&four, piece.codes[row + r][p] + b * BLOCK + 4 * i, 4);
          I codes = splat4(four);
          UNROLL for (int t = 0; t < T; t++) acc[r][t][p] = dot4(acc[r][t][p], codes, inputs[t]);
        }
    }
    UNROLL for (int t = 0; t < T; t++) {
      int64_t at_scale = x.scales(tile + t, block + b);
      V scale = load(x.scale + at_scale), minus = load(x.minus + at_scale);
      UNROLL for (int r = 0; r < R; r++) {
        V by = FORMAT == INT8_ROWS ? scale : mul(scale, splat(piece.scale[row + r][b]));
        total[r][t] = fma(to_float(block_sum<FORMAT>(first[t], acc[r][t])), by, total[r][t]);
        if (FORMAT == INT4) total[r][t] = fma(splat(piece.offset[row + r][b]), minus, total[r][t]);
      }
    }
  }
  UNROLL for (int r = 0; r < R; r++)
    UNROLL for (int t = 0; t < T; t++) store(sums + r * next + t * L, total[r][t]);
}

// All rows of a piece against T tiles.
template <int FORMAT, int T>
void multiply_tiles(const Piece<FORMAT>& piece, int64_t rows, const Tiles& x, int64_t tile, int64_t block,
                    int64_t count, float* sums, int64_t next) {
  constexpr int R = OUTPUTS / T;
  int64_t r = 0;
  for (; r + R <= rows; r += R) multiply_tile<FORMAT, T, R>(piece, r, x, tile, block, count, sums + r * next, next);
  for (; r < rows; r++) multiply_tile<FORMAT, T, 1>(piece, r, x, tile, block, count, sums + r * next, next);
}

}  // namespace

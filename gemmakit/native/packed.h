// Sums of a few rows of x, in BITS of 16 or 8, against rows of a weight in 8 or 4 bits. Products and the sums of a block
// of 32 are exact (int32); a block's scale times x's scale multiplies them, and blocks are summed in float32.
//
// L blocks at a time, so that their scales are one vector.

#pragma once

#include "inputs.h"

namespace {

constexpr int64_t SPAN = BLOCK * L;  // inputs in a step

// The scales of a weight row. GROUP: 32, 128, or 0 for any other multiple of 32.
struct Groups {
  const uint16_t* scale;
  const uint8_t* zero;
  int64_t count, blocks_each;
};

inline int64_t groups_of(const Matrix& w) { return (w.in + w.group - 1) / w.group; }

inline Groups groups(const Matrix& w, int64_t row) {
  int64_t count = groups_of(w);
  return {(const uint16_t*)w.scale + row * count, w.zero ? (const uint8_t*)w.zero + row * count : nullptr, count,
          w.group / BLOCK + (w.group % BLOCK != 0)};
}

struct Scales {
  V scale, zero;
};

// Any groups and any end of the row, one by one: kept apart, so that the usual case keeps its registers.
__attribute__((noinline, cold)) void gather(const Groups& g, int64_t b, float* scale, float* zero) {
  for (int j = 0; j < L; j++) {
    int64_t k = (b + j) / g.blocks_each;
    k = k < g.count ? k : g.count - 1;  // past the end x is 0
    scale[j] = widen_one_f16(g.scale[k]);
    zero[j] = g.zero ? g.zero[k] : 0;
  }
}

INLINE Scales gathered(const Groups& g, int64_t b) {
  float scale[L], zero[L];
  gather(g, b, scale, zero);
  return {load(scale), load(zero)};
}

// The scales and zeros of blocks b..b + L, all of which can be read. GROUP < 0: none, the row has one scale.
template <int GROUP>
INLINE Scales scales(const Groups& g, int64_t b) {
  if (GROUP < 0) return {zero(), zero()};
  if (GROUP == 32) return {widen_f16(g.scale + b), g.zero ? widen_u8(g.zero + b) : zero()};
  if (GROUP == 128)
    return {spread<0>(parted(quarter_f16(g.scale + b / 4))),
            g.zero ? spread<0>(parted(quarter_u8(g.zero + b / 4))) : zero()};
  return gathered(g, b);
}

// The same where the groups are not known before.
inline Scales scales_of(const Matrix& w, const Groups& g, int64_t b, int64_t count) {
  if (count == L && w.group == 32) return scales<32>(g, b);
  if (count == L && w.group == 128) return scales<128>(g, b);
  return gathered(g, b);
}

// The last blocks of a row, fewer than L, are read with the first of the next row, where there is one as long: those
// meet activations of zero, and a scale of zero, whatever it was.
template <int GROUP>
INLINE bool reads_on(const Matrix& w, int64_t row) { return GROUP != 0 && w.in >= SPAN && row + 1 < w.out; }

template <int GROUP>
INLINE Scales last_scales(const Groups& g, int64_t b, int64_t left) {
  Scales s = scales<GROUP>(g, b);
  return {first_lanes(s.scale, left), s.zero};
}

#if defined(__ARM_FEATURE_DOTPROD)

template <int FORMAT>
INLINE Codes codes_of(const uint8_t* codes, int block) {
  return FORMAT == INT4 ? codes4(codes + block * 16) : codes8(codes + block * BLOCK);
}

// Where a block's x begins.
INLINE const uint8_t* block_of(const int16_t* x, int block) { return (const uint8_t*)(x + block * BLOCK); }
INLINE const int8_t* block_of(const int8_t* x, int block) { return x + block * BLOCK; }

// L blocks of one weight row against M rows of x. Lane j of sums[m]: the products of block j.
template <int FORMAT, int M, class X>
INLINE void block_sums(const uint8_t* codes, const X* x, int64_t next, I* sums) {
  constexpr int MOST = 4;  // rows of x whose sums, with the codes, the registers hold
  constexpr int NOW = M < MOST ? M : MOST;
  I pair[NOW][L / 2];
  UNROLL for (int j = 0; j < L; j += 2) {
    Codes left = codes_of<FORMAT>(codes, j), right = codes_of<FORMAT>(codes, j + 1);
    UNROLL for (int m = 0; m < NOW; m++) {
      const X* row = x + m * next;
      pair[m][j / 2] = sums_of(dot_block(left, block_of(row, j)), dot_block(right, block_of(row, j + 1)));
    }
  }
  UNROLL for (int m = 0; m < NOW; m++) sums[m] = sums_of(pair[m][0], pair[m][1]);
  if constexpr (M > MOST) block_sums<FORMAT, M - MOST>(codes, x + MOST * next, next, sums + MOST);
}

// Blocks b..b + L of one weight row.
template <int BITS, int M>
INLINE void step4(const uint8_t* codes, Scales s, const Inputs& x, int64_t b, V* acc) {
  V offset = mul(s.scale, s.zero);
  I sums[M];
  if constexpr (BITS == 8)
    block_sums<INT4, M>(codes, x.bytes + b * BLOCK, x.q_next, sums);
  else
    block_sums<INT4, M>(codes, x.q + b * BLOCK, x.q_next, sums);
  UNROLL for (int m = 0; m < M; m++) {
    acc[m] = fma(offset, load(x.minus + m * x.blocks + b), acc[m]);
    acc[m] = fma(to_float(sums[m]), mul(s.scale, load(x.scale + m * x.blocks + b)), acc[m]);
  }
}

// The same of bytes. GROUP < 0: the row has one scale, applied at the end.
template <int GROUP, int M>
INLINE void step8(const int8_t* codes, Scales s, const Inputs& x, int64_t b, V* acc) {
  I sums[M];
  block_sums<INT8_ROWS, M>((const uint8_t*)codes, x.q + b * BLOCK, x.q_next, sums);
  UNROLL for (int m = 0; m < M; m++) {
    V by = load(x.scale + m * x.blocks + b);
    if (GROUP >= 0) by = mul(by, s.scale);
    acc[m] = fma(to_float(minus(sums[m], load_bytes(x.flips + m * x.blocks + b))), by, acc[m]);
  }
}

#else

// Vector K of a step's four: CHUNK blocks of 4-bit codes, against x in 16 bits and in 8.
template <int K, int M>
INLINE void nibbles(const uint8_t* codes, const int16_t* planes, int64_t next, const V* by, V* acc) {
  I v = load_bytes(codes + K * WIDTH);
  I p0 = nibble<0>(v), p1 = nibble<1>(v), p2 = nibble<2>(v), p3 = nibble<3>(v);
  constexpr int PLANE = WIDTH / 2;
  for (int m = 0; m < M; m++) {
    const int16_t* x = planes + m * next + K * CHUNK * BLOCK;
    I dot = madd(none(), p0, load_bytes(x));
    dot = madd(dot, p1, load_bytes(x + PLANE));
    dot = madd(dot, p2, load_bytes(x + 2 * PLANE));
    dot = madd(dot, p3, load_bytes(x + 3 * PLANE));
    acc[m] = fma(to_float(dot), spread<K>(by[m]), acc[m]);
  }
}

template <int K, int M>
INLINE void nibbles(const uint8_t* codes, const int8_t* bytes, int64_t next, const V* by, V* acc) {
  I v = load_bytes(codes + K * WIDTH), low = low_nibbles(v), high = high_nibbles(v);
  for (int m = 0; m < M; m++) {
    const int8_t* x = bytes + m * next + K * CHUNK * BLOCK;
    I dot = dot4(dot4(none(), low, load_bytes(x)), high, load_bytes(x + WIDTH));
    acc[m] = fma(to_float(block_sum<INT4>(none(), &dot)), spread<K>(by[m]), acc[m]);
  }
}

// Blocks b..b + L of one weight row.
template <int BITS, int M>
INLINE void step4(const uint8_t* codes, Scales s, const Inputs& x, int64_t b, V* acc) {
  V offset = mul(s.scale, s.zero), by[M];
  for (int m = 0; m < M; m++) {
    by[m] = parted(mul(s.scale, load(x.scale + m * x.blocks + b)));
    acc[m] = fma(offset, load(x.minus + m * x.blocks + b), acc[m]);
  }
  auto inputs = [&] {
    if constexpr (BITS == 8) return x.bytes + b * BLOCK;
    else return x.planes + b * BLOCK;
  }();
  nibbles<0, M>(codes, inputs, x.q_next, by, acc);
  nibbles<1, M>(codes, inputs, x.q_next, by, acc);
  nibbles<2, M>(codes, inputs, x.q_next, by, acc);
  nibbles<3, M>(codes, inputs, x.q_next, by, acc);
}

// Inputs b * 32 up to L blocks on, of one weight row of bytes. GROUP < 0: the row has one scale, applied at the end.
template <int GROUP, int M>
INLINE void step8(const int8_t* codes, Scales s, const Inputs& x, int64_t b, V* acc) {
  float scaled[M][L];
  const float* by[M];
  for (int m = 0; m < M; m++) {
    by[m] = GROUP < 0 ? x.scale + m * x.blocks + b : scaled[m];
    if (GROUP >= 0) store(scaled[m], mul(load(x.scale + m * x.blocks + b), s.scale));
  }
  for (int j = 0; j < L; j++)
    for (int m = 0; m < M; m++) {
      I dot = dot_block(codes + j * BLOCK, x.q + m * x.q_next + (b + j) * BLOCK);
      acc[m] = fma(to_float(dot), splat(by[m][j]), acc[m]);
    }
}

#endif

template <int BITS, int GROUP, int M, int R>
inline void rows4(const Matrix& w, const Inputs& given, int64_t o, float* out) {
  const Inputs x = given;  // a copy of our own, which no store can change
  V acc[R][M];
  Groups g[R];
  int64_t blocks = (w.in + BLOCK - 1) / BLOCK, b = 0;
  const uint8_t* codes = (const uint8_t*)w.codes + o * blocks * 16;
  for (int r = 0; r < R; r++) {
    g[r] = groups(w, o + r);
    for (int m = 0; m < M; m++) acc[r][m] = zero();
  }
  for (; b + L <= blocks; b += L)
    UNROLL for (int r = 0; r < R; r++) {
      prefetch<L * 16>(codes + r * blocks * 16, b * 16, blocks * 16, R);
      step4<BITS, M>(codes + (r * blocks + b) * 16, scales<GROUP>(g[r], b), x, b, acc[r]);
    }
  for (int r = 0; r < R && b < blocks; r++) {
    const uint8_t* left = codes + (r * blocks + b) * 16;
    if (reads_on<GROUP>(w, o + r)) {
      step4<BITS, M>(left, last_scales<GROUP>(g[r], b, blocks - b), x, b, acc[r]);
      continue;
    }
    uint8_t rest[L * 16] = {};
    std::memcpy(rest, left, (blocks - b) * 16);
    step4<BITS, M>(rest, gathered(g[r], b), x, b, acc[r]);
  }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++) out[r * M + m] = sum(acc[r][m]);
}

template <int GROUP, int M, int R>
inline void rows8(const Matrix& w, const Inputs& given, int64_t o, float* out) {
  const Inputs x = given;
  V acc[R][M];
  Groups g[R] = {};
  int64_t i = 0;
  const int8_t* codes = (const int8_t*)w.codes + o * w.in;
  for (int r = 0; r < R; r++) {
    if (GROUP >= 0) g[r] = groups(w, o + r);
    for (int m = 0; m < M; m++) acc[r][m] = zero();
  }
  for (; i + SPAN <= w.in; i += SPAN)
    UNROLL for (int r = 0; r < R; r++) {
      prefetch<SPAN>(codes + r * w.in, i, w.in, R);
      step8<GROUP, M>(codes + r * w.in + i, scales<GROUP>(g[r], i / BLOCK), x, i / BLOCK, acc[r]);
    }
  for (int r = 0; r < R && i < w.in; r++) {
    const int8_t* left = codes + r * w.in + i;
    int64_t b = i / BLOCK;
    if (reads_on<GROUP>(w, o + r)) {
      step8<GROUP, M>(left, last_scales<GROUP>(g[r], b, (w.in - i + BLOCK - 1) / BLOCK), x, b, acc[r]);
      continue;
    }
    int8_t rest[SPAN] = {};
    std::memcpy(rest, left, w.in - i);
    step8<GROUP, M>(rest, GROUP < 0 ? scales<GROUP>(g[r], b) : gathered(g[r], b), x, b, acc[r]);
  }
  for (int r = 0; r < R; r++)
    for (int m = 0; m < M; m++)
      out[r * M + m] = sum(acc[r][m]) * (GROUP < 0 ? number<F32>(w.scale, o + r) : 1.0f);
}

template <int FORMAT, int BITS, int GROUP, int M, int R>
inline int64_t packed_rows(const Matrix& w, const Inputs& x, int64_t from, int64_t to, float* sums) {
  int64_t o = from;
  for (; o + R <= to; o += R, sums += R * M) {
    if constexpr (FORMAT == INT4)
      rows4<BITS, GROUP, M, R>(w, x, o, sums);
    else
      rows8<GROUP, M, R>(w, x, o, sums);
  }
  return o;
}

// sums (to - from, M) of weight rows from..to.
template <int FORMAT, int BITS, int GROUP, int M>
void packed(const Matrix& w, const Inputs& x, int64_t from, int64_t to, float* sums) {
  // One stream of weights is what the processor's own prefetching follows best. Two rows of x take two weight rows, so
  // that each x is loaded half as often; with more the registers are full.
  constexpr int R = M == 2 ? 2 : 1;
  int64_t done = packed_rows<FORMAT, BITS, GROUP, M, R>(w, x, from, to, sums);
  packed_rows<FORMAT, BITS, GROUP, M, 1>(w, x, done, to, sums + (done - from) * M);
}

}  // namespace

// Products of bytes for a few rows of x: L rows of the weight side by side in a vector, which all rows of x meet while it
// is in the first cache. A weight is read once, in the order in which it lies; sums are to the bit those of bytes.h's tiles.

#pragma once

#include <utility>

#include "bytes.h"

namespace {

// Beyond so many rows of x tiles of L rows waste less than turning the weight costs.
constexpr int FEW = L / 2;

#if defined(__AVX512F__)
inline I low32(I a, I b) { return _mm512_unpacklo_epi32(a, b); }
inline I high32(I a, I b) { return _mm512_unpackhi_epi32(a, b); }
inline I low64(I a, I b) { return _mm512_unpacklo_epi64(a, b); }
inline I high64(I a, I b) { return _mm512_unpackhi_epi64(a, b); }
inline I low_nibbles(I v) { return _mm512_and_si512(v, _mm512_set1_epi8(15)); }
inline I high_nibbles(I v) { return low_nibbles(_mm512_srli_epi16(v, 4)); }
inline I flipped(I v) { return _mm512_xor_si512(v, _mm512_set1_epi8((char)FLIP)); }
inline I bits_of(V v) { return _mm512_castps_si512(v); }
inline V number_of(I v) { return _mm512_castsi512_ps(v); }
// The quarters of four vectors, those of the same place side by side.
INLINE void join(I* v, const I* b, int c) {
  I even01 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x88), odd01 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xdd);
  I even23 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x88), odd23 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xdd);
  v[c] = _mm512_shuffle_i32x4(even01, even23, 0x88), v[8 + c] = _mm512_shuffle_i32x4(even01, even23, 0xdd);
  v[4 + c] = _mm512_shuffle_i32x4(odd01, odd23, 0x88), v[12 + c] = _mm512_shuffle_i32x4(odd01, odd23, 0xdd);
}
#elif defined(__AVX2__)
inline I low32(I a, I b) { return _mm256_unpacklo_epi32(a, b); }
inline I high32(I a, I b) { return _mm256_unpackhi_epi32(a, b); }
inline I low64(I a, I b) { return _mm256_unpacklo_epi64(a, b); }
inline I high64(I a, I b) { return _mm256_unpackhi_epi64(a, b); }
inline I low_nibbles(I v) { return _mm256_and_si256(v, _mm256_set1_epi8(15)); }
inline I high_nibbles(I v) { return low_nibbles(_mm256_srli_epi16(v, 4)); }
inline I flipped(I v) { return _mm256_xor_si256(v, _mm256_set1_epi8((char)FLIP)); }
inline I bits_of(V v) { return _mm256_castps_si256(v); }
inline V number_of(I v) { return _mm256_castsi256_ps(v); }
INLINE void join(I* v, const I* b, int c) {
  v[c] = _mm256_permute2x128_si256(b[c], b[4 + c], 0x20), v[4 + c] = _mm256_permute2x128_si256(b[c], b[4 + c], 0x31);
}
#else
inline I low32(I a, I b) { return vzip1q_s32(a, b); }
inline I high32(I a, I b) { return vzip2q_s32(a, b); }
inline I low64(I a, I b) { return vreinterpretq_s32_s64(vzip1q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b))); }
inline I high64(I a, I b) { return vreinterpretq_s32_s64(vzip2q_s64(vreinterpretq_s64_s32(a), vreinterpretq_s64_s32(b))); }
inline I low_nibbles(I v) { return vreinterpretq_s32_u8(vandq_u8(vreinterpretq_u8_s32(v), vdupq_n_u8(15))); }
inline I high_nibbles(I v) { return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(v), 4)); }
inline I flipped(I v) { return v; }
inline I bits_of(V v) { return vreinterpretq_s32_f32(v); }
inline V number_of(I v) { return vreinterpretq_f32_s32(v); }
INLINE void join(I* v, const I* b, int c) { v[c] = b[c]; }
#endif

// L vectors as a square of 32-bit numbers, rows and columns exchanged.
INLINE void turn(I* v) {
  I a[L], b[L];
  UNROLL for (int i = 0; i < L; i += 2) a[i] = low32(v[i], v[i + 1]), a[i + 1] = high32(v[i], v[i + 1]);
  UNROLL for (int i = 0; i < L; i += 4) {
    b[i] = low64(a[i], a[i + 2]), b[i + 1] = high64(a[i], a[i + 2]);
    b[i + 2] = low64(a[i + 1], a[i + 3]), b[i + 3] = high64(a[i + 1], a[i + 3]);
  }
  UNROLL for (int c = 0; c < 4; c++) join(v, b, c);
}

// M rows of x in 8 bits, those of a step of four inputs beside each other.
struct Rows {
  int8_t* q;       // (blocks, STEPS, M, 4)
  float* scale;    // (blocks, M)
  float* minus;    // (blocks, M), minus the block's sum of scale * q
  int32_t* back;   // (blocks, M), minus the block's sum of FLIP * q
  int64_t blocks;
};

// Blocks of a weight row that are read at a time, a vector or more of it, and the bytes of a block.
template <int FORMAT>
constexpr int BYTES = FORMAT == INT4 ? 16 : 32;
template <int FORMAT>
constexpr int CHUNK_BLOCKS = WIDTH > BYTES<FORMAT> ? WIDTH / BYTES<FORMAT> : 1;

template <int F>
void fill_rows(const void* x, int64_t in, int m, int M, const Rows& to) {
  for (int64_t b = 0; b < to.blocks; b++) {
    float wide[BLOCK] = {};
    int8_t local[BLOCK];
    int64_t left = in - b * BLOCK, at_scale = b * M + m;
    widen_all<F>(at<F>(x, m * in + b * BLOCK), wide, left < BLOCK ? left : BLOCK);
    float total = quantize_block(wide, local, to.scale + at_scale);
    to.minus[at_scale] = -to.scale[at_scale] * total;
    to.back[at_scale] = -FLIP * (int32_t)total;
    for (int i = 0; i < STEPS; i++) std::memcpy(to.q + ((b * STEPS + i) * M + m) * 4, local + 4 * i, 4);
  }
}

// A chunk of L weight rows: by block, part and step the codes of four inputs of each row.
template <int FORMAT>
using Chunk = I[CHUNK_BLOCKS<FORMAT>][PARTS<FORMAT>][STEPS];

template <int FORMAT>
INLINE void turn_codes(const uint8_t* const* rows, int64_t from, Chunk<FORMAT>& codes) {
  constexpr int TURNS = BYTES<FORMAT> > WIDTH ? BYTES<FORMAT> / WIDTH : 1;
  UNROLL for (int t = 0; t < TURNS; t++) {
    I v[L];
    UNROLL for (int r = 0; r < L; r++) v[r] = load_bytes(rows[r] + from + t * WIDTH);
    turn(v);
    UNROLL for (int j = 0; j < L; j++) {
      int word = t * L + j, block = word / (BYTES<FORMAT> / 4), step = word % (BYTES<FORMAT> / 4);
      if (FORMAT == INT4)
        codes[block][0][step] = low_nibbles(v[j]), codes[block][0][step + 4] = high_nibbles(v[j]);
      else if (PARTS<FORMAT> == 2)
        codes[block][0][step] = low_nibbles(v[j]), codes[block][PARTS<FORMAT> - 1][step] = high_nibbles(flipped(v[j]));
      else
        codes[block][0][step] = flipped(v[j]);
    }
  }
}

// L rows of a weight from `row` on, the last for those behind it.
struct Strip {
  const Matrix& w;
  int64_t row;
  const uint8_t *rows[L], *next[L];  // next: of the strip behind it

  template <int FORMAT>
  int64_t row_bytes() const { return FORMAT == INT4 ? (w.in + BLOCK - 1) / BLOCK * 16 : w.in; }

  int64_t at(int64_t r) const { return row + r < w.out ? row + r : w.out - 1; }
};

template <int FORMAT>
Strip strip_of(const Matrix& w, int64_t row) {
  Strip s = {w, row, {}, {}};
  for (int r = 0; r < L; r++) {
    s.rows[r] = (const uint8_t*)w.codes + s.at(r) * s.row_bytes<FORMAT>();
    s.next[r] = (const uint8_t*)w.codes + s.at(L + r) * s.row_bytes<FORMAT>();
  }
  return s;
}

template <int FORMAT, int GROUP>
void scales_of(const Strip& s, int64_t block, int64_t count, V* scale, V* offset) {
  I by[L], zeros[L];
  for (int r = 0; r < L; r++) {
    Groups g = groups(s.w, s.at(r));
    Scales found = count == L ? scales<GROUP>(g, block) : gathered(g, block);
    by[r] = bits_of(found.scale), zeros[r] = bits_of(mul(found.scale, found.zero));
  }
  turn(by);
  if (FORMAT == INT4) turn(zeros);
  for (int b = 0; b < L; b++) scale[b] = number_of(by[b]), offset[b] = number_of(zeros[b]);
}

// The scales of a strip's rows and scale * zero, by block.
template <int FORMAT>
void scales_of(const Strip& s, int64_t block, int64_t count, V* scale, V* offset) {
  if (s.w.group == 32) return scales_of<FORMAT, 32>(s, block, count, scale, offset);
  if (s.w.group == 128) return scales_of<FORMAT, 128>(s, block, count, scale, offset);
  scales_of<FORMAT, 0>(s, block, count, scale, offset);
}

// total[m] += a block of L weight rows against M rows of x.
template <int FORMAT, int M>
INLINE void add_block(const I (&codes)[PARTS<FORMAT>][STEPS], V scale, V offset, const Rows& x, int64_t block,
                      V* total) {
  constexpr int P = PARTS<FORMAT>;
  I acc[M][P], first[M];
  UNROLL for (int m = 0; m < M; m++) {
    first[m] = FORMAT == INT4 || !FLIP ? none() : splat4(x.back[block * M + m]);
    UNROLL for (int p = 0; p < P; p++) acc[m][p] = NARROW ? none() : first[m];
  }
  const int8_t* q = x.q + block * BLOCK * M;
  UNROLL for (int i = 0; i < STEPS; i++)
    UNROLL for (int m = 0; m < M; m++) {
      int32_t four;
      std::memcpy(&four, q + (i * M + m) * 4, 4);
      I inputs = splat4(four);
      UNROLL for (int p = 0; p < P; p++) acc[m][p] = dot4(acc[m][p], codes[p][i], inputs);
    }
  UNROLL for (int m = 0; m < M; m++) {
    V own = splat(x.scale[block * M + m]), by = FORMAT == INT8_ROWS ? own : mul(own, scale);
    total[m] = fma(to_float(block_sum<FORMAT>(first[m], acc[m])), by, total[m]);
    if (FORMAT == INT4) total[m] = fma(offset, splat(x.minus[block * M + m]), total[m]);
  }
}

// Bytes ahead in a row that are asked for, into the second cache: L rows a power of two apart meet in one set of the
// first, which holds fewer.
constexpr int64_t SOON = 24 * WIDTH;

template <int FORMAT, int M>
void strip_sums(const Strip& s, const Rows& x, float* sums) {
  constexpr int64_t each = CHUNK_BLOCKS<FORMAT>, bytes = each * BYTES<FORMAT>;
  int64_t row_bytes = s.row_bytes<FORMAT>(), blocks = (s.w.in + BLOCK - 1) / BLOCK;
  V total[M], scale[L], offset[L];
  UNROLL for (int m = 0; m < M; m++) total[m] = zero();
  for (int64_t block = 0; block < blocks; block += each) {
    if (FORMAT != INT8_ROWS && block % L == 0)
      scales_of<FORMAT>(s, block, blocks - block < L ? blocks - block : L, scale, offset);
    int64_t from = block * BYTES<FORMAT>, soon = from + SOON;
    const uint8_t* const* ahead = soon < row_bytes ? s.rows : s.next;
    for (int r = 0; r < L; r++) __builtin_prefetch(ahead[r] + (soon < row_bytes ? soon : soon - row_bytes), 0, 2);
    Chunk<FORMAT> codes;
    if (from + bytes <= row_bytes) {
      turn_codes<FORMAT>(s.rows, from, codes);
    } else {
      uint8_t rest[L][bytes] = {};
      const uint8_t* rows[L];
      for (int r = 0; r < L; r++) {
        std::memcpy(rest[r], s.rows[r] + from, row_bytes - from);
        rows[r] = rest[r];
      }
      turn_codes<FORMAT>(rows, 0, codes);
    }
    UNROLL for (int b = 0; b < each; b++)
      if (block + b < blocks)
        add_block<FORMAT, M>(codes[b], scale[(block + b) % L], offset[(block + b) % L], x, block + b, total);
  }
  UNROLL for (int m = 0; m < M; m++) store(sums + m * L, total[m]);
}

using StripSums = void (*)(const Strip&, const Rows&, float*);

template <int FORMAT, int... M>
StripSums strip_sums_of(int rows, std::integer_sequence<int, M...>) {
  StripSums found = nullptr;
  ((rows == M + 1 ? (void)(found = strip_sums<FORMAT, M + 1>) : (void)0), ...);
  return found;
}

}  // namespace

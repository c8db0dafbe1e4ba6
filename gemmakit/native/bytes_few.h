// Products of bytes for a few rows of x: L rows of the weight side by side in a vector, which all rows of x meet while it
// is in the first cache. A weight is read once, in the order in which it lies; sums are to the bit those of bytes.h's tiles.

#pragma once

#include <utility>

#include "bytes.h"
#include "turn.h"

namespace {

// Beyond so many rows of x tiles of L rows waste less than turning the weight costs.
constexpr int FEW = L / 2;

#if defined(__AVX512F__)
inline I flipped(I v) { return _mm512_xor_si512(v, _mm512_set1_epi8((char)FLIP)); }
// 16 bytes from each of L / 4 places, `next` apart.
INLINE I quarters(const uint8_t* p, int64_t next) {
  I v = _mm512_castsi128_si512(_mm_loadu_si128((const __m128i*)p));
  v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)(p + next)), 1);
  v = _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)(p + 2 * next)), 2);
  return _mm512_inserti32x4(v, _mm_loadu_si128((const __m128i*)(p + 3 * next)), 3);
}
#elif defined(__AVX2__)
inline I flipped(I v) { return _mm256_xor_si256(v, _mm256_set1_epi8((char)FLIP)); }
INLINE I quarters(const uint8_t* p, int64_t next) {
  I v = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i*)p));
  return _mm256_inserti128_si256(v, _mm_loadu_si128((const __m128i*)(p + next)), 1);
}
#else
inline I flipped(I v) { return v; }
INLINE I quarters(const uint8_t* p, int64_t) { return load_bytes(p); }
#endif

// dot4 with the same four inputs in every lane.
INLINE I dot4_all(I acc, I codes, const void* four) {
#if defined(__AVX512VNNI__) && !defined(EMULATED)
  // As the instruction itself reads them: a register of their own each would leave the processor fewer to look ahead with.
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(acc) : "v"(codes), "m"(*(const int32_t*)four));
  return acc;
#else
  int32_t inputs;
  std::memcpy(&inputs, four, 4);
  return dot4(acc, codes, splat4(inputs));
#endif
}

// M rows of x in 8 bits, those of a step of four inputs beside each other.
struct Rows {
  int8_t* q;       // (blocks, STEPS, M, 4)
  float* scale;    // (blocks, M)
  float* minus;    // (blocks, M), minus the block's sum of scale * q
  int32_t* back;   // (blocks, M), minus the block's sum of FLIP * q
  int64_t blocks;
};

// Bytes of a block of a weight row, and blocks of a chunk, a vector or more of it.
template <int FORMAT>
constexpr int BYTES = FORMAT == INT4 ? 16 : 32;
template <int FORMAT>
constexpr int CHUNK_BLOCKS = WIDTH > BYTES<FORMAT> ? WIDTH / BYTES<FORMAT> : 1;

// Blocks begin..end of row m.
template <int F>
void fill_rows(const void* x, int64_t in, int m, int M, int64_t begin, int64_t end, const Rows& to) {
  for (int64_t b = begin; b < end; b++) {
    int8_t local[BLOCK];
    int64_t at_scale = b * M + m;
    float total = quantize_block_of<F>(at<F>(x, m * in), in, b, local, to.scale + at_scale);
    to.minus[at_scale] = -to.scale[at_scale] * total;
    to.back[at_scale] = -FLIP * (int32_t)total;
    for (int i = 0; i < STEPS; i++) std::memcpy(to.q + ((b * STEPS + i) * M + m) * 4, local + 4 * i, 4);
  }
}

// A run: so many bytes of each of L rows, apart so that rows do not meet in the same few places of the first cache, as
// those do that lie a power of two apart in the weight. Read one row after the other, it comes as fast as the second
// cache gives it.
constexpr int64_t LINE = 64, RUN_LINES = 4, RUN = RUN_LINES * LINE, RUN_NEXT = RUN + LINE;

// 16 bytes of each row of a run: v[i] has bytes 4 * i to 4 * i + 3 of every row.
INLINE void column(const uint8_t* run, I* v) {
  I a[4];
  UNROLL for (int i = 0; i < 4; i++) a[i] = quarters(run + i * RUN_NEXT, 4 * RUN_NEXT);
  I low01 = low32(a[0], a[1]), high01 = high32(a[0], a[1]), low23 = low32(a[2], a[3]), high23 = high32(a[2], a[3]);
  v[0] = low64(low01, low23), v[1] = high64(low01, low23), v[2] = low64(high01, high23), v[3] = high64(high01, high23);
}

// A block of L weight rows: by part and step the codes of four inputs of each row.
template <int FORMAT>
INLINE void codes_of(const uint8_t* run, I (&codes)[PARTS<FORMAT>][STEPS]) {
  UNROLL for (int from = 0; from < BYTES<FORMAT>; from += 16) {
    I v[4];
    column(run + from, v);
    UNROLL for (int j = 0; j < 4; j++) {
      int step = from / 4 + j;
      if (FORMAT == INT4)
        codes[0][j] = low_nibbles(v[j]), codes[0][j + 4] = high_nibbles(v[j]);
      else if (PARTS<FORMAT> == 2)
        codes[0][step] = low_nibbles(v[j]), codes[PARTS<FORMAT> - 1][step] = high_nibbles(flipped(v[j]));
      else
        codes[0][step] = flipped(v[j]);
    }
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

// The scales of a strip's rows and scale * zero, by block.
template <int FORMAT>
void scales_of(const Strip& s, int64_t block, int64_t count, V* scale, V* offset) {
  I by[L], zeros[L];
  for (int r = 0; r < L; r++) {
    Scales found = scales_of(s.w, groups(s.w, s.at(r)), block, count);
    by[r] = bits_of(found.scale), zeros[r] = bits_of(mul(found.scale, found.zero));
  }
  turn(by);
  if (FORMAT == INT4) turn(zeros);
  for (int b = 0; b < L; b++) scale[b] = number_of(by[b]), offset[b] = number_of(zeros[b]);
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
    UNROLL for (int m = 0; m < M; m++)
      UNROLL for (int p = 0; p < P; p++) acc[m][p] = dot4_all(acc[m][p], codes[p][i], q + (i * M + m) * 4);
  UNROLL for (int m = 0; m < M; m++) {
    V own = splat(x.scale[block * M + m]), by = FORMAT == INT8_ROWS ? own : mul(own, scale);
    total[m] = fma(to_float(block_sum<FORMAT>(first[m], acc[m])), by, total[m]);
    if (FORMAT == INT4) total[m] = fma(offset, splat(x.minus[block * M + m]), total[m]);
  }
}

// Bytes ahead in a row that are asked for, into the second cache: L rows a power of two apart meet in one set of the
// first, which holds fewer.
constexpr int64_t SOON = 24 * LINE;

// For very few rows of x, which the weight does not push out of the first cache: chunks of it as they lie.
template <int FORMAT, int M>
void chunk_sums(const Strip& s, const Rows& x, float* sums) {
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

// Rows r to r + 3 of the run that begins `left` bytes before the rows' end; zeros behind it.
INLINE void take_run(const Strip& s, int64_t r, int64_t from, int64_t left, uint8_t* run) {
  uint8_t* to = run + r * RUN_NEXT;
  if (left >= RUN) {
    UNROLL for (int i = 0; i < 4; i++) std::memcpy(to + i * RUN_NEXT, s.rows[r + i] + from, RUN);
    return;
  }
  std::memset(to, 0, 4 * RUN_NEXT);
  for (int i = 0; i < 4; i++) std::memcpy(to + i * RUN_NEXT, s.rows[r + i] + from, left);
}

template <int FORMAT, int M>
void run_sums(const Strip& s, const Rows& x, float* sums) {
  constexpr int64_t each = LINE / BYTES<FORMAT>;
  int64_t row_bytes = s.row_bytes<FORMAT>(), blocks = (s.w.in + BLOCK - 1) / BLOCK, block = 0;
  V total[M], scale[L], offset[L];
  UNROLL for (int m = 0; m < M; m++) total[m] = zero();
  // While one run is multiplied the next is read, some rows a line.
  alignas(64) uint8_t runs[2][L * RUN_NEXT];
  for (int r = 0; r < L; r += 4) take_run(s, r, 0, row_bytes, runs[0]);
  for (int64_t line = 0; block < blocks; line++) {
    int64_t run = line / RUN_LINES, part = line % RUN_LINES, next = (run + 1) * RUN, soon = run * RUN + SOON;
    if (FORMAT != INT8_ROWS && block % L == 0)
      scales_of<FORMAT>(s, block, blocks - block < L ? blocks - block : L, scale, offset);
    const uint8_t* const* ahead = soon < row_bytes ? s.rows : s.next;
    if (soon >= row_bytes) soon -= row_bytes;
    for (int r = 4 * part; r < 4 * part + 4 && r < L; r++)
      for (int i = 0; i < RUN; i += LINE) __builtin_prefetch(ahead[r] + soon + i, 0, 2);
    if (next < row_bytes && 4 * part < L) take_run(s, 4 * part, next, row_bytes - next, runs[(run + 1) % 2]);
    const uint8_t* own = runs[run % 2] + part * LINE;
    UNROLL for (int b = 0; b < each; b++, block++) {
      if (block >= blocks) break;
      I codes[PARTS<FORMAT>][STEPS];
      codes_of<FORMAT>(own + b * BYTES<FORMAT>, codes);
      add_block<FORMAT, M>(codes, scale[block % L], offset[block % L], x, block, total);
    }
  }
  UNROLL for (int m = 0; m < M; m++) store(sums + m * L, total[m]);
}

using StripSums = void (*)(const Strip&, const Rows&, float*);

template <int FORMAT, int... M>
StripSums strip_sums_of(int rows, std::integer_sequence<int, M...>) {
  StripSums found = nullptr;
  ((rows == M + 1 ? (void)(found = M < 2 ? chunk_sums<FORMAT, M + 1> : run_sums<FORMAT, M + 1>) : (void)0), ...);
  return found;
}

}  // namespace

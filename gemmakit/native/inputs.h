// x in the forms in which it meets codes, made once a call and shared by every weight row.
//
// Against whole-number weights x is rounded to 16 bits in blocks of 32 inputs: x ~ scale * q with |q| <= 32767 and
// scale = max|x| / 32767 of the block, so each x is off by max|x| of its block / 65534 at most: less than bfloat16's
// own rounding of any number above 1/256 of the largest. A block that holds NaN or infinity gets scale NaN, which
// makes the whole row of y NaN; one whose largest number is below 1e-30 counts as zeros.

#pragma once

#include <cstdlib>

#include "integers.h"

#define INLINE __attribute__((always_inline)) inline
#define UNROLL _Pragma("GCC unroll 16")
// On aarch64 GCC keeps sums in memory where it meets their array in a loop that it has not unrolled.
#if defined(__ARM_NEON)
#define UNROLL_NEON UNROLL
#else
#define UNROLL_NEON
#endif

namespace {

struct Inputs {
  const int16_t* q = nullptr;       // (M, blocks * 32) in order, for INT8_ROWS; where HALVED as halve() leaves it, for both
  const int16_t* planes = nullptr;  // the same in the order in which nibble<0..3> gives a vector's codes, for INT4
  const int8_t* bytes = nullptr;    // (M, blocks * 32), in 8 bits, as low_nibbles and high_nibbles meet them
  const int32_t* flips = nullptr;   // (M, blocks), where HALVED: 128 times the sum of the block's low bytes
  const float* scale = nullptr;     // (M, blocks)
  const float* minus = nullptr;     // (M, blocks), minus the block's sum of scale * q
  int64_t blocks = 0;               // of x, filled up with zeros to a whole number of L
  int64_t q_next = 0;               // from row to row of q, planes and bytes

  // The rows from m on.
  Inputs from(int64_t m) const {
    Inputs x = *this;
    x.q += q ? m * q_next : 0, x.planes += planes ? m * q_next : 0, x.bytes += bytes ? m * q_next : 0;
    x.flips += flips ? m * blocks : 0;
    x.scale += scale ? m * blocks : 0, x.minus += minus ? m * blocks : 0;
    return x;
  }
};

// Rows a power of two apart would meet in the same few places of a cache.
constexpr int64_t APART = 64;

// Room for n numbers that is kept from call to call, one for each thread, type and Which. No std::vector: its code
// would be shared by the instruction sets.
template <class T, int Which>
inline T* scratch(size_t n) {
  static thread_local T* room = nullptr;
  static thread_local size_t size = 0;
  if (size < n) {
    std::free(room);
    size = (n * sizeof(T) + 4095) / 4096 * 4096 / sizeof(T);
    room = (T*)std::aligned_alloc(64, size * sizeof(T));
    if (!room) std::abort();
  }
  return room;
}

// Q: int16_t or int8_t. Gives the sum of q.
template <class Q>
inline float quantize_block(const float* x, Q* q, float* scale) {
  constexpr float most_q = sizeof(Q) == 2 ? 32767.0f : 127.0f;
  V most = zero(), poison = zero(), total = zero();
  for (int i = 0; i < BLOCK; i += L) {
    most = larger(most, magnitude(load(x + i)));
    poison = fma(load(x + i), zero(), poison);  // not zero where x is NaN or infinite
  }
  float top = largest(most);
  bool finite = sum(poison) == 0.0f;
  V by = splat(finite && top > 1e-30f ? most_q / top : 0.0f);
  for (int i = 0; i < BLOCK; i += L) {
    V whole = round_to_whole(mul(load(x + i), by));
    total = add(total, whole);
    store_whole(q + i, whole);
  }
  *scale = finite ? top / most_q : __builtin_nanf("");
  return sum(total);
}

// Block b of a row of x, `in` long, with zeros behind its end. Gives the sum of q.
template <int F, class Q>
inline float quantize_block_of(const void* x, int64_t in, int64_t b, Q* q, float* scale) {
  float wide[BLOCK] = {};
  int64_t left = in - b * BLOCK;
  if (left > 0) widen_all<F>(at<F>(x, b * BLOCK), wide, left < BLOCK ? left : BLOCK);
  return quantize_block(wide, q, scale);
}

// A block's 32 numbers to where nibble<0..3> of its 16 bytes of codes meets them: byte 2t holds inputs 2t and 2t + 16,
// byte 2t + 1 holds 2t + 1 and 2t + 17.
inline void to_planes(const int16_t* q, int16_t* plane) {
  constexpr int NEXT = 8 * CHUNK;
  for (int t = 0; t < 8; t++) {
    plane[t] = q[2 * t];
    plane[NEXT + t] = q[2 * t + 16];
    plane[2 * NEXT + t] = q[2 * t + 1];
    plane[3 * NEXT + t] = q[2 * t + 17];
  }
}

// The same for low_nibbles and high_nibbles: of a vector's blocks the first halves, then the second ones.
inline void to_halves(const int8_t* q, int8_t* half) {
  std::memcpy(half, q, 16);
  std::memcpy(half + WIDTH, q + 16, 16);
}

// Whether q is kept as bytes, for products of bytes.
#if defined(__ARM_FEATURE_DOTPROD)
constexpr bool HALVED = true;
#else
constexpr bool HALVED = false;
#endif

// A block's 32 numbers as their 32 high bytes and then their 32 low ones. Gives 128 times the sum of these.
inline int32_t halve(const int16_t* q, void* to) {
  uint8_t bytes[2 * BLOCK];
  int32_t low = 0;
  for (int i = 0; i < BLOCK; i++) {
    bytes[i] = (uint8_t)(q[i] >> 8);
    bytes[BLOCK + i] = (uint8_t)q[i];
    low += (uint8_t)q[i];
  }
  std::memcpy(to, bytes, sizeof bytes);
  return 128 * low;
}

template <int F>
void quantize(const void* x, int64_t in, int64_t blocks, int8_t* bytes, float* scale, float* minus) {
  for (int64_t b = 0; b < blocks; b++) {
    int8_t local[BLOCK];
    float total = quantize_block_of<F>(x, in, b, local, scale + b);
    minus[b] = -scale[b] * total;
    to_halves(local, bytes + b / CHUNK * CHUNK * BLOCK + b % CHUNK * 16);
  }
}

template <int F>
void quantize(const void* x, int64_t in, int64_t blocks, int16_t* q, int16_t* planes, int32_t* flips, float* scale,
              float* minus) {
  for (int64_t b = 0; b < blocks; b++) {
    int16_t local[BLOCK];
    float total = quantize_block_of<F>(x, in, b, local, scale + b);
    minus[b] = -scale[b] * total;
    if (flips) flips[b] = halve(local, q + b * BLOCK);
    else if (q) std::memcpy(q + b * BLOCK, local, sizeof local);
    if (planes) to_planes(local, planes + b / CHUNK * CHUNK * BLOCK + b % CHUNK * 8);
  }
}

// Where a stream of weight rows will be read soon: AHEAD bytes on in the same row, or in the row that takes its place.
// Without it a processor that is busy with arithmetic has too few reads under way to use the memory.
constexpr int64_t AHEAD = 2048;

template <int BYTES>
INLINE void prefetch(const void* row, int64_t at, int64_t row_bytes, int rows) {
  int64_t to = at + AHEAD;
  if (to >= row_bytes) to += (rows - 1) * row_bytes;
  for (int i = 0; i < BYTES; i += 64) __builtin_prefetch((const char*)row + to + i, 0, 3);
}

template <int F>
void prepare_packed(const void* x, int64_t in, int rows, bool bytes, bool nibbles, int threads, Inputs& made) {
  int64_t blocks = made.blocks = (in + BLOCK * L - 1) / (BLOCK * L) * L;
  int64_t next = made.q_next = blocks * BLOCK + APART;
  int16_t* q = bytes || HALVED ? scratch<int16_t, 0>(rows * next) : nullptr;
  int16_t* planes = nibbles && !HALVED ? scratch<int16_t, 1>(rows * next) : nullptr;
  int32_t* flips = HALVED ? scratch<int32_t, 0>(rows * blocks) : nullptr;
  float *scale = scratch<float, 1>(rows * blocks), *minus = scratch<float, 2>(rows * blocks);
#pragma omp parallel for num_threads(threads) if (rows > MAX_ROWS)
  for (int m = 0; m < rows; m++)
    quantize<F>(at<F>(x, m * in), in, blocks, q ? q + m * next : q, planes ? planes + m * next : planes,
                flips ? flips + m * blocks : flips, scale + m * blocks, minus + m * blocks);
  made.q = q, made.planes = planes, made.flips = flips, made.scale = scale, made.minus = minus;
}

// x in 8 bits, for INT4 alone.
template <int F>
void prepare_bytes(const void* x, int64_t in, int rows, Inputs& made) {
  int64_t blocks = made.blocks = (in + BLOCK * L - 1) / (BLOCK * L) * L;
  int64_t next = made.q_next = blocks * BLOCK + APART;
  int8_t* bytes = scratch<int8_t, 0>(rows * next);
  float *scale = scratch<float, 1>(rows * blocks), *minus = scratch<float, 2>(rows * blocks);
  for (int m = 0; m < rows; m++)
    quantize<F>(at<F>(x, m * in), in, blocks, bytes + m * next, scale + m * blocks, minus + m * blocks);
  made.bytes = bytes, made.scale = scale, made.minus = minus;
}

template <int F, int BITS>
void prepare(const Matrix* w, int count, const void* x, int rows, int threads, Inputs& made) {
  if (BITS == 8) return prepare_bytes<F>(x, w->in, rows, made);
  bool bytes = false, nibbles = false;
  for (int i = 0; i < count; i++) (w[i].format == INT4 ? nibbles : bytes) = true;
  prepare_packed<F>(x, w->in, rows, bytes, nibbles, threads, made);
}

}  // namespace

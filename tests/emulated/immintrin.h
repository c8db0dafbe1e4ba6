// The vector instructions of processors that are not at hand, by those of AVX2: what the kernels use of AVX-512 (F, BW,
// DQ, VL), its VNNI and BF16, AVX-VNNI and AMX. Found before the compiler's own file of this name, which it includes; each
// set is then announced as the compiler does where it may use it. scripts/every_isa.py compiles the kernels with it.

#pragma once

#include_next <immintrin.h>

// Where a kernel names an instruction to the assembler, there is none to name.
#define EMULATED

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstring>

#pragma GCC diagnostic ignored "-Wpsabi"

namespace emulated {

union Floats {
  __m512 all;
  __m256 half[2];
  float lane[16];
};
union Bits {
  __m512i all;
  __m256i half[2];
  __m128i quarter[4];
  int32_t lane[16];
};

// name(a, b) of two vectors, by an instruction on each half.
#define TWO(U, type, name, half_of)                                                   \
  static inline type name(type a, type b) {                                           \
    U x{a}, y{b}, to;                                                                 \
    for (int h = 0; h < 2; h++) to.half[h] = half_of(x.half[h], y.half[h]);           \
    return to.all;                                                                    \
  }
TWO(Floats, __m512, add_ps, _mm256_add_ps)
TWO(Floats, __m512, sub_ps, _mm256_sub_ps)
TWO(Floats, __m512, mul_ps, _mm256_mul_ps)
TWO(Floats, __m512, div_ps, _mm256_div_ps)
TWO(Floats, __m512, max_ps, _mm256_max_ps)
TWO(Floats, __m512, min_ps, _mm256_min_ps)
TWO(Bits, __m512i, unpacklo_epi32, _mm256_unpacklo_epi32)
TWO(Bits, __m512i, unpackhi_epi32, _mm256_unpackhi_epi32)
TWO(Bits, __m512i, unpacklo_epi64, _mm256_unpacklo_epi64)
TWO(Bits, __m512i, unpackhi_epi64, _mm256_unpackhi_epi64)
TWO(Bits, __m512i, add_epi16, _mm256_add_epi16)
TWO(Bits, __m512i, add_epi32, _mm256_add_epi32)
TWO(Bits, __m512i, madd_epi16, _mm256_madd_epi16)
TWO(Bits, __m512i, maddubs_epi16, _mm256_maddubs_epi16)
TWO(Bits, __m512i, and_si512, _mm256_and_si256)
TWO(Bits, __m512i, xor_si512, _mm256_xor_si256)

// Moving, shifting and rounding, where the number has to be in the instruction.
template <int N>
inline __m512 shuffle_ps(__m512 a, __m512 b) {
  Floats x{a}, y{b}, to;
  for (int h = 0; h < 2; h++) to.half[h] = _mm256_shuffle_ps(x.half[h], y.half[h], N);
  return to.all;
}
// Two quarters of a, then two of b.
template <int N>
inline __m512i shuffle_i32x4(__m512i a, __m512i b) {
  Bits x{a}, y{b};
  Bits to{.quarter = {x.quarter[N & 3], x.quarter[N >> 2 & 3], y.quarter[N >> 4 & 3], y.quarter[N >> 6 & 3]}};
  return to.all;
}
template <int AT>
inline __m512i inserti32x4(__m512i a, __m128i b) {
  Bits x{a};
  x.quarter[AT] = b;
  return x.all;
}
template <int HOW>
inline __m512 roundscale_ps(__m512 a) {
  Floats x{a}, to;
  for (int h = 0; h < 2; h++) to.half[h] = _mm256_round_ps(x.half[h], HOW);
  return to.all;
}
template <int HOW>
inline __m256i cvtps_ph(__m512 a) {
  Floats x{a};
  return _mm256_set_m128i(_mm256_cvtps_ph(x.half[1], HOW), _mm256_cvtps_ph(x.half[0], HOW));
}
inline __m512i slli_epi32(__m512i a, int n) {
  Bits x{a}, to;
  for (int h = 0; h < 2; h++) to.half[h] = _mm256_slli_epi32(x.half[h], n);
  return to.all;
}
inline __m512i srli_epi32(__m512i a, int n) {
  Bits x{a}, to;
  for (int h = 0; h < 2; h++) to.half[h] = _mm256_srli_epi32(x.half[h], n);
  return to.all;
}
inline __m512i srli_epi16(__m512i a, int n) {
  Bits x{a}, to;
  for (int h = 0; h < 2; h++) to.half[h] = _mm256_srli_epi16(x.half[h], n);
  return to.all;
}

// Loading, storing, filling.
inline __m512 loadu_ps(const float* p) {
  Floats to{.half = {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}};
  return to.all;
}
inline __m512i loadu_si512(const void* p) {
  const __m256i* halves = (const __m256i*)p;
  Bits to{.half = {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)}};
  return to.all;
}
inline void storeu_ps(float* p, __m512 a) {
  Floats x{a};
  for (int h = 0; h < 2; h++) _mm256_storeu_ps(p + 8 * h, x.half[h]);
}
inline __m512 set1_ps(float f) {
  Floats to{.half = {_mm256_set1_ps(f), _mm256_set1_ps(f)}};
  return to.all;
}
inline __m512i set1_epi32(int n) {
  Bits to{.half = {_mm256_set1_epi32(n), _mm256_set1_epi32(n)}};
  return to.all;
}
inline __m512i set1_epi8(char n) {
  Bits to{.half = {_mm256_set1_epi8(n), _mm256_set1_epi8(n)}};
  return to.all;
}
inline __m512i set1_epi16(short n) {
  Bits to{.half = {_mm256_set1_epi16(n), _mm256_set1_epi16(n)}};
  return to.all;
}
template <class... N>
inline __m512i setr_epi32(N... n) {
  Bits to{.lane = {n...}};
  return to.all;
}

// Between kinds of numbers.
inline __m512 castsi512_ps(__m512i a) { return (__m512)a; }
inline __m512i castps_si512(__m512 a) { return (__m512i)a; }
inline __m256 half_ps(__m512 a, int h) { return Floats{a}.half[h]; }
inline __m512 castps128_ps512(__m128 a) {
  Floats to{.half = {_mm256_castps128_ps256(a), _mm256_setzero_ps()}};
  return to.all;
}
inline __m512i castsi128_si512(__m128i a) {
  Bits to{.quarter = {a}};
  return to.all;
}
#define WIDER(name, from, half_of)                                                      \
  static inline __m512i name(from a) {                                                  \
    Bits to;                                                                            \
    char bytes[sizeof a];                                                               \
    std::memcpy(bytes, &a, sizeof a);                                                   \
    for (int h = 0; h < 2; h++) {                                                       \
      __m128i part = _mm_setzero_si128();                                               \
      std::memcpy(&part, bytes + h * sizeof a / 2, sizeof a / 2);                       \
      to.half[h] = half_of(part);                                                       \
    }                                                                                   \
    return to.all;                                                                      \
  }
WIDER(cvtepu16_epi32, __m256i, _mm256_cvtepu16_epi32)
WIDER(cvtepi8_epi16, __m256i, _mm256_cvtepi8_epi16)
WIDER(cvtepu8_epi16, __m256i, _mm256_cvtepu8_epi16)
WIDER(cvtepi8_epi32, __m128i, _mm256_cvtepi8_epi32)
WIDER(cvtepu8_epi32, __m128i, _mm256_cvtepu8_epi32)
inline __m512 cvtph_ps(__m256i a) {
  Floats to{.half = {_mm256_cvtph_ps(_mm256_castsi256_si128(a)), _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1))}};
  return to.all;
}
inline __m512 cvtepi32_ps(__m512i a) {
  Bits x{a};
  Floats to{.half = {_mm256_cvtepi32_ps(x.half[0]), _mm256_cvtepi32_ps(x.half[1])}};
  return to.all;
}
inline __m512i cvtps_epi32(__m512 a) {
  Floats x{a};
  Bits to{.half = {_mm256_cvtps_epi32(x.half[0]), _mm256_cvtps_epi32(x.half[1])}};
  return to.all;
}
template <class Narrow, class Result>
inline Result narrowed(__m512i a, int least, int most) {
  Bits x{a};
  Narrow lanes[16];
  for (int i = 0; i < 16; i++) {
    int n = x.lane[i];
    lanes[i] = (Narrow)(n < least ? least : n > most ? most : n);
  }
  Result to;
  std::memcpy(&to, lanes, sizeof to);
  return to;
}
inline __m256i cvtepi32_epi16(__m512i a) { return narrowed<int16_t, __m256i>(a, INT32_MIN, INT32_MAX); }
inline __m256i cvtsepi32_epi16(__m512i a) { return narrowed<int16_t, __m256i>(a, INT16_MIN, INT16_MAX); }
inline __m128i cvtsepi32_epi8(__m512i a) { return narrowed<int8_t, __m128i>(a, INT8_MIN, INT8_MAX); }

// The rest of a vector's arithmetic.
inline __m512 abs_ps(__m512 a) { return (__m512)and_si512((__m512i)a, set1_epi32(0x7fffffff)); }
inline __m512 fmadd_ps(__m512 a, __m512 b, __m512 c) {
  Floats x{a}, y{b}, z{c}, to;
  for (int h = 0; h < 2; h++) to.half[h] = _mm256_fmadd_ps(x.half[h], y.half[h], z.half[h]);
  return to.all;
}
// Rounded once where the result is denormal, as double holds every float times a power of two.
inline __m512 scalef_ps(__m512 a, __m512 n) {
  Floats x{a}, by{n}, to;
  for (int i = 0; i < 16; i++) {
    float whole = std::floor(by.lane[i]);
    to.lane[i] = whole != whole ? whole : (float)std::ldexp((double)x.lane[i], (int)std::fmax(-400, std::fmin(400, whole)));
  }
  return to.all;
}
inline __m512 permutexvar_ps(__m512i at, __m512 a) {
  Bits from{at};
  Floats x{a}, to;
  for (int i = 0; i < 16; i++) to.lane[i] = x.lane[from.lane[i] & 15];
  return to.all;
}
inline __m512i srlv_epi16(__m512i a, __m512i n) {
  uint16_t x[32], by[32];
  std::memcpy(x, &a, sizeof a);
  std::memcpy(by, &n, sizeof n);
  for (int i = 0; i < 32; i++) x[i] = by[i] > 15 ? 0 : x[i] >> by[i];
  return loadu_si512(x);
}
inline __m512i permutexvar_epi16(__m512i at, __m512i a) {
  uint16_t from[32], x[32], to[32];
  std::memcpy(from, &at, sizeof at);
  std::memcpy(x, &a, sizeof a);
  for (int i = 0; i < 32; i++) to[i] = x[from[i] & 31];
  return loadu_si512(to);
}
template <int HOW>
inline unsigned cmp_ps_mask(__m512 a, __m512 b) {
  Floats x{a}, y{b};
  unsigned first = _mm256_movemask_ps(_mm256_cmp_ps(x.half[0], y.half[0], HOW));
  return first | (unsigned)_mm256_movemask_ps(_mm256_cmp_ps(x.half[1], y.half[1], HOW)) << 8;
}
inline __m512i mask_mov_epi32(__m512i a, unsigned mask, __m512i b) {
  Bits x{a}, y{b};
  for (int i = 0; i < 16; i++) x.lane[i] = mask >> i & 1 ? y.lane[i] : x.lane[i];
  return x.all;
}
template <class Of>
inline float reduced(__m512 a, Of of) {
  Floats x{a};
  for (int n = 8; n; n /= 2)
    for (int i = 0; i < n; i++) x.lane[i] = of(x.lane[i], x.lane[i + n]);
  return x.lane[0];
}
inline float reduce_add_ps(__m512 a) { return reduced(a, [](float x, float y) { return x + y; }); }
inline float reduce_max_ps(__m512 a) { return reduced(a, [](float x, float y) { return x > y ? x : y; }); }

// VNNI: nothing saturates before the sum of int32.
inline __m256i dpwssd(__m256i acc, __m256i a, __m256i b) { return _mm256_add_epi32(acc, _mm256_madd_epi16(a, b)); }
// a unsigned bytes, b signed: as 16-bit numbers, those at even places and those at odd ones.
inline __m256i dpbusd(__m256i acc, __m256i a, __m256i b) {
  __m256i even = _mm256_madd_epi16(_mm256_and_si256(a, _mm256_set1_epi16(255)), _mm256_srai_epi16(_mm256_slli_epi16(b, 8), 8));
  __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(a, 8), _mm256_srai_epi16(b, 8));
  return _mm256_add_epi32(acc, _mm256_add_epi32(even, odd));
}
template <__m256i of(__m256i, __m256i, __m256i)>
inline __m512i thrice(__m512i acc, __m512i a, __m512i b) {
  Bits x{acc}, y{a}, z{b};
  for (int h = 0; h < 2; h++) x.half[h] = of(x.half[h], y.half[h], z.half[h]);
  return x.all;
}

// BF16: the product of the odd places first, then that of the even ones; each sum rounded, denormals taken as zeros.
inline float flushed(float f) { return std::fabs(f) < FLT_MIN ? std::copysign(0.0f, f) : f; }
inline float bf16_at(const void* numbers, int i) {
  uint32_t bits = (uint32_t)((const uint16_t*)numbers)[i] << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return flushed(f);
}
inline __m512 dpbf16_ps(__m512 acc, __m512bh a, __m512bh b) {
  Floats to{acc};
  uint16_t x[32], y[32];
  std::memcpy(x, &a, sizeof a);
  std::memcpy(y, &b, sizeof b);
  for (int i = 0; i < 16; i++)
    for (int odd = 1; odd >= 0; odd--)
      to.lane[i] = flushed(std::fma(bf16_at(x, 2 * i + odd), bf16_at(y, 2 * i + odd), flushed(to.lane[i])));
  return to.all;
}

// The numbers of `low`, then those of `high`, rounded to the nearest, denormals taken as zeros.
inline __m512bh cvtne2ps_pbh(__m512 high, __m512 low) {
  Floats x{low}, y{high};
  uint16_t to[32];
  for (int i = 0; i < 32; i++) {
    float f = flushed(i < 16 ? x.lane[i] : y.lane[i - 16]);
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    to[i] = f != f ? bits >> 16 | 64 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
  __m512bh made;
  std::memcpy(&made, to, sizeof made);
  return made;
}

// The tiles of a thread: rows, bytes of a row, and the bytes, rows of 64.
struct TileConfig {
  uint8_t palette, start, none[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};
struct Tiled {
  TileConfig config{};
  uint8_t rows[8][16][64]{};
};
inline Tiled& tiled() {
  static thread_local Tiled own;
  return own;
}
inline void tile_storeconfig(void* to) { std::memcpy(to, &tiled().config, 64); }
inline void tile_loadconfig(const void* from) {
  tiled() = Tiled();
  std::memcpy(&tiled().config, from, 64);
}
inline void tile_zero(int t) { std::memset(tiled().rows[t], 0, sizeof tiled().rows[t]); }
inline void tile_loadd(int t, const void* from, int64_t next) {
  tile_zero(t);
  const TileConfig& is = tiled().config;
  for (int r = 0; r < is.rows[t]; r++) std::memcpy(tiled().rows[t][r], (const char*)from + r * next, is.bytes[t]);
}
inline void tile_stored(int t, void* to, int64_t next) {
  const TileConfig& is = tiled().config;
  for (int r = 0; r < is.rows[t]; r++) std::memcpy((char*)to + r * next, tiled().rows[t][r], is.bytes[t]);
}
// Pairs of bfloat16, each of a place of a's row and of a row of b.
inline void tile_dpbf16ps(int to, int a, int b) {
  Tiled& is = tiled();
  for (int m = 0; m < is.config.rows[to]; m++)
    for (int n = 0; n < is.config.bytes[to] / 4; n++) {
      float sum;
      std::memcpy(&sum, is.rows[to][m] + 4 * n, 4);
      for (int k = 0; k < is.config.bytes[a] / 4; k++)
        for (int half = 0; half < 2; half++)
          sum = flushed(std::fma(bf16_at(is.rows[a][m], 2 * k + half), bf16_at(is.rows[b][k], 2 * n + half), sum));
      std::memcpy(is.rows[to][m] + 4 * n, &sum, 4);
    }
}

}  // namespace emulated

#undef _mm512_setr_epi32
#undef _tile_storeconfig
#undef _tile_loadconfig
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _mm512_setzero_ps() emulated::set1_ps(0)
#define _mm512_setzero_si512() emulated::set1_epi32(0)
#define _mm512_castps512_ps256(a) emulated::half_ps(a, 0)
#define _mm512_extractf32x8_ps(a, h) emulated::half_ps(a, h)
#define _mm512_shuffle_ps(a, b, n) emulated::shuffle_ps<n>(a, b)
#define _mm512_shuffle_i32x4(a, b, n) emulated::shuffle_i32x4<n>(a, b)
#define _mm512_inserti32x4(a, b, at) emulated::inserti32x4<at>(a, b)
#define _mm512_roundscale_ps(a, how) emulated::roundscale_ps<(how)>(a)
#define _mm512_cvtps_ph(a, how) emulated::cvtps_ph<(how)>(a)
#define _mm512_cmp_ps_mask(a, b, how) emulated::cmp_ps_mask<how>(a, b)
#define _mm512_dpwssd_epi32 emulated::thrice<emulated::dpwssd>
#define _mm512_cvtne2ps_pbh emulated::cvtne2ps_pbh
#define _tile_storeconfig emulated::tile_storeconfig
#define _tile_loadconfig emulated::tile_loadconfig
#define _tile_zero emulated::tile_zero
#define _tile_loadd emulated::tile_loadd
#define _tile_stored emulated::tile_stored
#define _tile_dpbf16ps emulated::tile_dpbf16ps
#define _mm512_dpbusd_epi32 emulated::thrice<emulated::dpbusd>
#define _mm256_dpwssd_avx_epi32 emulated::dpwssd
#define _mm256_dpbusd_avx_epi32 emulated::dpbusd
#define _mm512_abs_ps emulated::abs_ps
#define _mm512_add_epi16 emulated::add_epi16
#define _mm512_add_epi32 emulated::add_epi32
#define _mm512_add_ps emulated::add_ps
#define _mm512_and_si512 emulated::and_si512
#define _mm512_castps128_ps512 emulated::castps128_ps512
#define _mm512_castps_si512 emulated::castps_si512
#define _mm512_castsi512_ps emulated::castsi512_ps
#define _mm512_castsi128_si512 emulated::castsi128_si512
#define _mm512_cvtepi32_epi16 emulated::cvtepi32_epi16
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtepi8_epi16 emulated::cvtepi8_epi16
#define _mm512_cvtepi8_epi32 emulated::cvtepi8_epi32
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepu8_epi16 emulated::cvtepu8_epi16
#define _mm512_cvtepu8_epi32 emulated::cvtepu8_epi32
#define _mm512_cvtph_ps emulated::cvtph_ps
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#define _mm512_cvtsepi32_epi16 emulated::cvtsepi32_epi16
#define _mm512_cvtsepi32_epi8 emulated::cvtsepi32_epi8
#define _mm512_div_ps emulated::div_ps
#define _mm512_dpbf16_ps emulated::dpbf16_ps
#define _mm512_fmadd_ps emulated::fmadd_ps
#define _mm512_loadu_ps emulated::loadu_ps
#define _mm512_loadu_si512 emulated::loadu_si512
#define _mm512_madd_epi16 emulated::madd_epi16
#define _mm512_maddubs_epi16 emulated::maddubs_epi16
#define _mm512_mask_mov_epi32 emulated::mask_mov_epi32
#define _mm512_max_ps emulated::max_ps
#define _mm512_min_ps emulated::min_ps
#define _mm512_mul_ps emulated::mul_ps
#define _mm512_permutexvar_epi16 emulated::permutexvar_epi16
#define _mm512_permutexvar_ps emulated::permutexvar_ps
#define _mm512_reduce_add_ps emulated::reduce_add_ps
#define _mm512_reduce_max_ps emulated::reduce_max_ps
#define _mm512_scalef_ps emulated::scalef_ps
#define _mm512_set1_epi16 emulated::set1_epi16
#define _mm512_set1_epi32 emulated::set1_epi32
#define _mm512_set1_epi8 emulated::set1_epi8
#define _mm512_set1_ps emulated::set1_ps
#define _mm512_setr_epi32 emulated::setr_epi32
#define _mm512_slli_epi32 emulated::slli_epi32
#define _mm512_srli_epi16 emulated::srli_epi16
#define _mm512_srli_epi32 emulated::srli_epi32
#define _mm512_srlv_epi16 emulated::srlv_epi16
#define _mm512_storeu_ps emulated::storeu_ps
#define _mm512_sub_ps emulated::sub_ps
#define _mm512_unpackhi_epi32 emulated::unpackhi_epi32
#define _mm512_unpackhi_epi64 emulated::unpackhi_epi64
#define _mm512_unpacklo_epi32 emulated::unpacklo_epi32
#define _mm512_unpacklo_epi64 emulated::unpacklo_epi64
#define _mm512_xor_si512 emulated::xor_si512

#if defined(EMULATED_AVXVNNI)
#define __AVXVNNI__ 1
#else
#define __AVX512F__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#define __AVX512VL__ 1
#endif
#if defined(EMULATED_AVX512VNNI) || defined(EMULATED_AVX512BF16) || defined(EMULATED_AMX)
#define __AVX512VNNI__ 1
#endif
#if defined(EMULATED_AVX512BF16) || defined(EMULATED_AMX)
#define __AVX512BF16__ 1
#endif
#if defined(EMULATED_AMX)
#define __AMX_BF16__ 1
#endif

// What the native kernels take and give: plain C, so that Python reaches them through ctypes.
//
// Every kernel file is compiled once for each instruction set, with ISA naming it, and the table of each set
// (table.cpp) holds its functions. dispatch.cpp picks a table when the library is loaded.

#pragma once

#include <cstddef>
#include <cstdint>

#define JOIN_(a, b) a##b
#define JOIN(a, b) JOIN_(a, b)
#define TEXT_(a) #a
#define TEXT(a) TEXT_(a)
// NATIVE(gemmakit_project) is this instruction set's `gemmakit_project`.
#define NATIVE(name) JOIN(name##_, ISA)

// WeightFormat and Activation, which hatch_build.py writes from ids.py. Plain numbers, of weights and of activations,
// are BF16, F16 or F32. INT8_ROWS: one float32 scale a row. All other codes: float16 scales (out, G), and INT4's
// zeros are uint8 (out, G), where G = ceil(in / group). INT4's codes are (out, 16 * ceil(in / 32)) bytes: byte j of a
// block's 16 holds input j in its low bits and input j + 16 in its high bits. w = scale * (code - zero). INT5 and INT6:
// codes.h.
#include "ids.h"

constexpr int MAX_ROWS = 8;

// A weight (out, in), row after row without gaps, as it lies in a file or tensor. No pointer need be aligned.
struct Matrix {
  int32_t format;
  int32_t group;      // inputs that share a scale: a multiple of 32, or at least `in`; only for groups
  int32_t activation_bits;  // of x against codes, in blocks of 32: 16, 8 or 32, not rounded; 0: see gemmakit_project
  int32_t few_bits;  // instead of 16 where activation_bits are 0: 8 for INT4, up to 8 rows
  int64_t out, in;
  const void* codes;  // the numbers themselves where format is BF16, F16 or F32
  const void* scale;
  const void* zero;
  const void* bias;   // (out) in x's format, or null
  int32_t turned;     // not 0: the numbers lie as (in, out), the way JAX keeps them; for gemmakit_project alone
};

// RMSNorm: x / sqrt(mean(x^2) + eps) * (offset + w) * gain in float32, rounded once to x's format. w (width) is BF16, F16 or
// F32.
struct Norm {
  const void* weight;  // null for no norm
  int32_t format;
  float eps, gain, offset;
};

// Attention of S new positions a row, with what is around it. q and y (B, S, N * H), k and v (B, S, K * H) have one
// format, and so have cos and sin (B or 1, S, H; table_row is S * H or 0) and keys and values (B, K, capacity, H),
// where the new ones go to start..start + S; without k they are there already. Each head of q and k is normed before it
// turns, each of v before it is put there; without cos, q is normed and turned. Keys first..T are seen;
// where `causal`, not those after a query's own place. Where softcap is not 0, scores are capped:
// softcap * tanh(score / softcap). mask, or null: bytes, not 0 where query s of row b may look at key t, at
// b * mask_row + s * mask_query + t - first. blind, or null: bytes, not 0 for queries that give zeros, at
// b * blind_row + s * blind_query. forgotten: so many keys were there before the first and are held no more; sums are
// taken in the order of where keys once stood.
//
// Where pages is not null, rows lie end to end, the new positions of row b at starts[b]..starts[b + 1], so that q, k, v,
// y, cos and sin have starts[B] positions; keys and values are (pages, page_size, K, H). Row b holds lengths[b] tokens
// with its new ones, token t in page pages[b * page_count + t / page_size]. Queries see the tokens up to their own place,
// where window is not 0 the newest so many; there is no mask.
struct Attention {
  int64_t B, S, N, K, H, first, T, start, capacity, table_row, mask_row, mask_query, blind_row, blind_query;
  const void *q, *k, *v, *cos, *sin;
  void *keys, *values, *y;
  const uint8_t *mask, *blind;
  Norm q_norm, k_norm, v_norm;
  int32_t format, causal, threads;
  float scale, softcap;
  const int64_t *pages, *starts, *lengths;
  int64_t page_count, page_size, window, forgotten;
};

// Every kernel, as DO(name, parameters, arguments). All give 0, or 1 where the arguments are outside what they take.
//
// gemmakit_project: y[i] (rows, m[i].out) = x (rows, in) @ m[i]^T + bias, rounded to x_format (BF16, F16 or F32), for
//   `count` matrices that share x. Where residual is not null (count 1, rows * out, in x_format), it is added to the
//   rounded product and the sum is rounded. Sums are float32, and those of a row do not depend on the other rows, how
//   many there are, or the threads; but codes whose activation_bits are 0 are multiplied otherwise beyond 8 rows: by
//   tiles of bfloat16 where the processor has them and x is that; in bytes where it is fast at that, 1 elsewhere when x
//   is null, which asks only that; or beyond 16 as float32. A turned weight's sums have one order up to 16 rows and
//   another beyond.
// gemmakit_expand: rows from..to of m as a dense panel y (to - from, in) of y_format, each number rounded once.
// gemmakit_rms_norm: y (rows, width) = the norm of x; where residual is not null, their sum, rounded once more. y may be
//   x. gemmakit_gated: y = act(gate) * up, n numbers, act rounded before the product; 1 for GELU_ERF.
// gemmakit_norm_project, gemmakit_norm_gate_up: the norm, then the projections, and then act(gate) * up for m[0] and
//   m[1] of one shape; up to 8 rows.
// gemmakit_project_norm_add: the projection, then its norm, then the sum with residual, each rounded; rows as
//   gemmakit_project.
// gemmakit_attend: norms q, k and v, rotates q and k, puts k and v into the cache, and attends: up to 8 positions of rows side by
//   side, or any number in pages. A query's result does not depend on the others, nor on the threads.
// gemmakit_read_memory: reads every byte once and sums it up as 64-bit words into *sum: the memory's speed, and a way
//   to page in a file.
#define GEMMAKIT_FUNCTIONS(DO)                                                                                       \
  DO(gemmakit_project, (const Matrix* m, int count, int x_format, const void* x, int rows, void* const* y,           \
                        const void* residual, int threads),                                                          \
     (m, count, x_format, x, rows, y, residual, threads))                                                            \
  DO(gemmakit_expand, (const Matrix* m, int64_t from, int64_t to, int y_format, void* y, int threads),               \
     (m, from, to, y_format, y, threads))                                                                            \
  DO(gemmakit_rms_norm, (int format, const void* x, int64_t rows, int64_t width, const Norm* norm,                   \
                         const void* residual, void* y, int threads),                                                \
     (format, x, rows, width, norm, residual, y, threads))                                                           \
  DO(gemmakit_gated, (int format, int act, const void* gate, const void* up, void* y, int64_t n, int threads),       \
     (format, act, gate, up, y, n, threads))                                                                         \
  DO(gemmakit_norm_project, (const Matrix* m, int count, int format, const void* x, int rows, const Norm* norm,      \
                             void* const* y, int threads),                                                           \
     (m, count, format, x, rows, norm, y, threads))                                                                  \
  DO(gemmakit_norm_gate_up, (const Matrix* m, int format, const void* x, int rows, const Norm* norm, int act,        \
                             void* y, int threads),                                                                  \
     (m, format, x, rows, norm, act, y, threads))                                                                    \
  DO(gemmakit_project_norm_add, (const Matrix* m, int format, const void* x, int rows, const Norm* norm,             \
                                 const void* residual, void* y, int threads),                                        \
     (m, format, x, rows, norm, residual, y, threads))                                                               \
  DO(gemmakit_attend, (const Attention* a), (a))                                                                     \
  DO(gemmakit_read_memory, (const void* bytes, int64_t size, uint64_t* sum, int threads), (bytes, size, sum, threads))

#define GEMMAKIT_POINTER(name, parameters, arguments) int(*name) parameters;
struct Kernels {
  const char* isa;
  GEMMAKIT_FUNCTIONS(GEMMAKIT_POINTER)
};

#if defined(ISA)
#define GEMMAKIT_DECLARE(name, parameters, arguments) extern "C" int NATIVE(name) parameters;
GEMMAKIT_FUNCTIONS(GEMMAKIT_DECLARE)
// `gemmakit_project` in products of bytes, by tiles of bfloat16, and of weights in plain numbers.
extern "C" int NATIVE(project_bytes)(const Matrix* m, int count, int x_format, const void* x, int64_t rows,
                                     void* const* y, const void* residual, int threads);
extern "C" int NATIVE(project_tiles)(const Matrix* m, int count, int x_format, const void* x, int64_t rows,
                                     void* const* y, const void* residual, int threads);
extern "C" int NATIVE(project_plain)(const Matrix* m, int count, int x_format, const void* x, int64_t rows,
                                     void* const* y, const void* residual, int threads);
#endif

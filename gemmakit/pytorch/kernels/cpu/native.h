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
// NATIVE(project) is this instruction set's `project`.
#define NATIVE(name) JOIN(name##_, ISA)

// How numbers lie in memory. INT8: one float32 scale a row. INT8_GROUPS and INT4: float16 scales (out, G), and INT4's
// zeros are uint8 (out, G), where G = ceil(in / group). INT4's codes are (out, 16 * ceil(in / 32)) bytes: byte j of a
// block's 16 holds input j in its low bits and input j + 16 in its high bits. w = scale * (code - zero).
enum Format : int32_t { BF16 = 0, F16 = 1, F32 = 2, INT8 = 3, INT8_GROUPS = 4, INT4 = 5 };

constexpr int MAX_ROWS = 8;

// A weight (out, in), row after row without gaps, as it lies in a file or tensor. No pointer need be aligned.
struct Matrix {
  int32_t format;
  int32_t group;      // inputs that share a scale: a multiple of 32, or at least `in`; only for groups
  int64_t out, in;
  const void* codes;  // the numbers themselves where format is BF16, F16 or F32
  const void* scale;
  const void* zero;
  const void* bias;   // (out) in x's format, or null
};

enum Activation : int32_t { GELU_TANH = 0, SILU = 1, RELU = 2 };

// Attention of S new positions a row, with what is around it. q and y (B, S, N * H), k and v (B, S, K * H) have one
// format, and so have cos and sin (B or 1, S, H; table_row is S * H or 0) and keys and values (B, K, capacity, H), where
// the new ones go to start..start + S. T of them are seen; where `causal`, not those after a query's own place.
// mask, or null: bytes, not 0 where query s of row b may look at key t, at b * mask_row + s * mask_query + t. blind, or
// null: bytes, not 0 for queries that give zeros, at b * blind_row + s * blind_query.
struct Attention {
  int64_t B, S, N, K, H, T, start, capacity, table_row, mask_row, mask_query, blind_row, blind_query;
  const void *q, *k, *v, *cos, *sin;
  void *keys, *values, *y;
  const uint8_t *mask, *blind;
  int32_t format, causal, threads;
  float scale;
};

// Every kernel, as DO(name, parameters, arguments). All give 0, or 1 where the arguments are outside what they take.
//
// project: y[i] (rows, m[i].out) = x (rows, in) @ m[i]^T + bias, rounded to x_format (BF16, F16 or F32), for `count`
//   matrices that share x, in one parallel region. Where residual is not null (count 1, rows * out, in x_format), it is
//   added to the rounded product and the sum is rounded. Sums are float32. Up to 8 rows; more, in products of bytes with
//   x rounded to 8 bits in blocks of 32, for whole numbers (INT8, INT8_GROUPS, INT4) where the processor is fast at
//   them: 1 elsewhere, also when x is null, which asks only that.
// expand: rows from..to of m as a dense panel y (to - from, in) of y_format (BF16, F16 or F32), each number rounded once.
// norm: y (rows, width) = RMSNorm of x with 1 + w. gate: y = act(gate) * up, n numbers, act rounded before the product.
// norm_project, norm_gate: norm then project, and then gate, for m[0] and m[1] of one shape; up to 8 rows.
// attend: rotates q and k, puts k and v into the cache, and attends.
// read: reads every byte once and sums it up as 64-bit words into *sum: the memory's speed, and a way to page in a file.
#define GEMMAKIT_FUNCTIONS(DO)                                                                                       \
  DO(project, (const Matrix* m, int count, int x_format, const void* x, int rows, void* const* y, const void* residual, \
               int threads),                                                                                         \
     (m, count, x_format, x, rows, y, residual, threads))                                                            \
  DO(expand, (const Matrix* m, int64_t from, int64_t to, int y_format, void* y, int threads),                         \
     (m, from, to, y_format, y, threads))                                                                            \
  DO(norm, (int format, const void* x, int64_t rows, int64_t width, int w_format, const void* w, float eps, void* y, \
            int threads),                                                                                            \
     (format, x, rows, width, w_format, w, eps, y, threads))                                                         \
  DO(gate, (int format, int act, const void* gate, const void* up, void* y, int64_t n, int threads),                 \
     (format, act, gate, up, y, n, threads))                                                                         \
  DO(norm_project, (const Matrix* m, int count, int format, const void* x, int rows, int w_format, const void* w,    \
                    float eps, void* const* y, int threads),                                                         \
     (m, count, format, x, rows, w_format, w, eps, y, threads))                                                      \
  DO(norm_gate, (const Matrix* m, int format, const void* x, int rows, int w_format, const void* w, float eps,       \
                 int act, void* y, int threads),                                                                     \
     (m, format, x, rows, w_format, w, eps, act, y, threads))                                                        \
  DO(attend, (const Attention* a), (a))                                                                              \
  DO(read, (const void* bytes, int64_t size, uint64_t* sum, int threads), (bytes, size, sum, threads))

#define GEMMAKIT_POINTER(name, parameters, arguments) int(*name) parameters;
struct Kernels {
  const char* isa;
  GEMMAKIT_FUNCTIONS(GEMMAKIT_POINTER)
};

#if defined(ISA)
#define GEMMAKIT_DECLARE(name, parameters, arguments) extern "C" int NATIVE(name) parameters;
GEMMAKIT_FUNCTIONS(GEMMAKIT_DECLARE)
// `project` for more than MAX_ROWS rows.
extern "C" int NATIVE(multiply)(const Matrix* m, int count, int x_format, const void* x, int64_t rows, void* const* y,
                                const void* residual, int threads);
#endif

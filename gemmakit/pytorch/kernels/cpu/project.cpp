// y = x @ W^T + bias for any rows of x and one or several weights in any format; products of bytes are project_bytes.cpp's.
//
// A piece of a weight is read once and stays in a cache while all rows of x meet it, a few at a time.

#include <utility>

#include "packed.h"
#include "plain.h"

namespace {

constexpr int64_t PIECE_ROWS = 512;  // at most
constexpr int MOST_ROWS = 256;       // of x that are prepared at a time

using Sums = void (*)(const Matrix&, const Inputs&, int64_t from, int64_t to, float* sums);

template <int FORMAT, int M>
Sums packed_sums(int group) {
  return group == 32 ? packed<FORMAT, 32, M> : group == 128 ? packed<FORMAT, 128, M> : packed<FORMAT, 0, M>;
}

template <int M>
Sums sums_of(const Matrix& w) {
  switch (w.format) {
    case BF16: return plain<BF16, M>;
    case F16: return plain<F16, M>;
    case F32: return plain<F32, M>;
    case INT8_ROWS: return packed<INT8_ROWS, -1, M>;
    case INT8_GROUPS: return packed_sums<INT8_GROUPS, M>(w.group);
    case INT4: return packed_sums<INT4, M>(w.group);
  }
  return nullptr;
}

template <int... M>
Sums sums_of(const Matrix& w, int rows, std::integer_sequence<int, M...>) {
  Sums found = nullptr;
  ((rows == M + 1 ? (void)(found = sums_of<M + 1>(w)) : (void)0), ...);
  return found;
}

int64_t row_bytes(const Matrix& w) {
  switch (w.format) {
    case F32: return w.in * 4;
    case INT8_ROWS: case INT8_GROUPS: return w.in;
    case INT4: return (w.in + 31) / 32 * 16;
  }
  return w.in * 2;
}

struct Piece {
  int matrix;
  int64_t from, to;
};

// Handed out as threads ask: a thread that the system pauses holds up one piece, not its share of the matrix. Large
// enough for the memory to be read in long runs, small enough for every thread to get several.
int64_t piece_bytes(const Matrix* w, int count, int threads) {
  int64_t all = 0, most = 1 << 19, least = 1 << 15;
  for (int i = 0; i < count; i++) all += w[i].out * row_bytes(w[i]);
  int64_t share = all / (8 * threads);
  return share > most ? most : share < least ? least : share;
}

struct Pieces {
  const Matrix* w;
  int count;
  int64_t rows_each[16], ends[16], total = 0;

  Pieces(const Matrix* w, int count, int threads) : w(w), count(count) {
    int64_t bytes = piece_bytes(w, count, threads);
    for (int i = 0; i < count; i++) {
      int64_t each = bytes / row_bytes(w[i]) / 4 * 4;
      each = each < 4 ? 4 : each > PIECE_ROWS ? PIECE_ROWS : each;
      rows_each[i] = each;
      ends[i] = total += (w[i].out + each - 1) / each;
    }
  }

  Piece operator[](int64_t p) const {
    int i = 0;
    while (p >= ends[i]) i++;
    int64_t from = (p - (i ? ends[i - 1] : 0)) * rows_each[i];
    int64_t to = from + rows_each[i];
    return {i, from, to < w[i].out ? to : w[i].out};
  }
};

// Bias, rounding and residual, as the modules do it one after the other.
template <int F>
void finish(const Matrix& w, const Piece& piece, const float* sums, int row, int rows, void* y, const void* residual) {
  for (int64_t o = piece.from; o < piece.to; o++) {
    float b = w.bias ? number<F>(w.bias, o) : 0.0f;
    for (int m = 0; m < rows; m++) {
      int64_t to = (row + m) * w.out + o;
      put<F>(y, to, sums[(o - piece.from) * rows + m] + b);
      if (residual) put<F>(y, to, number<F>(y, to) + number<F>(residual, to));
    }
  }
}

// Up to MOST_ROWS rows of x, from row `done` of y on.
template <int F>
void multiply(const Matrix* w, int count, const void* x, int done, int rows, void* const* y, const void* residual,
              int threads) {
  Inputs inputs;
  prepare<F>(w, count, x, rows, threads, inputs);
  Pieces pieces(w, count, threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (pieces.total > 1)
  for (int64_t p = 0; p < pieces.total; p++) {
    float sums[PIECE_ROWS * MAX_ROWS];
    Piece piece = pieces[p];
    const Matrix& own = w[piece.matrix];
    for (int m = 0; m < rows; m += MAX_ROWS) {
      int some = rows - m < MAX_ROWS ? rows - m : MAX_ROWS;
      sums_of(own, some, std::make_integer_sequence<int, MAX_ROWS>())(own, inputs.from(m), piece.from, piece.to, sums);
      finish<F>(own, piece, sums, done + m, some, y[piece.matrix], residual);
    }
  }
}

template <int F>
int run(const Matrix* w, int count, const void* x, int rows, void* const* y, const void* residual, int threads) {
  for (int done = 0; done < rows; done += MOST_ROWS)
    multiply<F>(w, count, at<F>(x, done * w->in), done, rows - done < MOST_ROWS ? rows - done : MOST_ROWS, y, residual,
                threads);
  return 0;
}

// The matrices that are (not) multiplied in bytes, and their results.
struct Share {
  Matrix w[16];
  void* y[16];
  int count = 0;

  Share(const Matrix* m, int all, void* const* to, int rows, bool bytes) {
    for (int i = 0; i < all; i++) {
      bool own = m[i].format >= INT8_ROWS && (m[i].activation_bits ? m[i].activation_bits == 8 : rows > MAX_ROWS);
      if (own != bytes) continue;
      w[count] = m[i];
      y[count++] = to ? to[i] : nullptr;
    }
  }
};

}  // namespace

extern "C" int NATIVE(gemmakit_project)(const Matrix* m, int count, int x_format, const void* x, int rows,
                                        void* const* y, const void* residual, int threads) {
  if (m->in < 1 || rows < 1 || count < 1 || count > 16 || (residual && count > 1)) return 1;
  for (int i = 1; i < count; i++)
    if (m[i].in != m[0].in) return 1;
  for (int i = 0; i < count; i++)
    if (m[i].format < BF16 || m[i].format > INT4) return 1;
  Share bytes(m, count, y, rows, true), own(m, count, y, rows, false);
  if (bytes.count && NATIVE(project_bytes)(bytes.w, bytes.count, x_format, x, rows, bytes.y, residual, threads)) return 1;
  if (!own.count || !x) return 0;
  switch (x_format) {
    case BF16: return run<BF16>(own.w, own.count, x, rows, own.y, residual, threads);
    case F16: return run<F16>(own.w, own.count, x, rows, own.y, residual, threads);
    case F32: return run<F32>(own.w, own.count, x, rows, own.y, residual, threads);
  }
  return 1;
}

// y = x @ W^T + bias for any rows of x and one or several weights in any format: here for codes against x in 16 bits,
// and up to 8 rows of x in 8; products of bytes for many rows are project_bytes.cpp's, those by tiles project_tiles.cpp's,
// those of plain numbers, and of codes as such, project_plain.cpp's.
//
// A piece of a weight is read once and stays in a cache while all rows of x meet it, a few at a time.

#include <utility>

#include "codes.h"
#include "pieces.h"

namespace {

constexpr int MOST_ROWS = 256;       // of x that are prepared at a time
constexpr int FEW_ROWS = 16;         // of x that meet codes eight at a time sooner than as float32, as linear.FEW_ROWS says

using Sums = void (*)(const Matrix&, const Inputs&, int64_t from, int64_t to, float* sums);

template <int FORMAT, int BITS, int M>
Sums packed_sums(int group) {
  return group == 32    ? packed<FORMAT, BITS, 32, M>
         : group == 128 ? packed<FORMAT, BITS, 128, M>
                        : packed<FORMAT, BITS, 0, M>;
}

template <int BITS, int M>
Sums sums_of(const Matrix& w) {
  if (w.format == INT4) return packed_sums<INT4, BITS, M>(w.group);
  if constexpr (BITS == 16) {
    if (w.format == INT8_ROWS) return packed<INT8_ROWS, BITS, -1, M>;
    return packed_sums<INT8_GROUPS, BITS, M>(w.group);
  }
  return nullptr;
}

template <int BITS, int... M>
Sums sums_of(const Matrix& w, int rows, std::integer_sequence<int, M...>) {
  Sums found = nullptr;
  ((rows == M + 1 ? (void)(found = sums_of<BITS, M + 1>(w)) : (void)0), ...);
  return found;
}

// Those of a piece's rows with `rows` rows of x.
template <int BITS>
void piece_sums(const Matrix& w, const Inputs& x, int rows, int64_t from, int64_t to, float* sums) {
  constexpr auto COUNTS = std::make_integer_sequence<int, MAX_ROWS>();
  if (!is_split(w)) return sums_of<BITS>(w, rows, COUNTS)(w, x, from, to, sums);
  int64_t each = IN_BYTES / w.in < 1 ? 1 : IN_BYTES / w.in;
  for (int64_t o = from; o < to; o += each) {
    Matrix part = joined(w, o, to - o < each ? to - o : each);
    sums_of<BITS>(part, rows, COUNTS)(part, x, 0, part.out, sums + (o - from) * rows);
  }
}

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
template <int F, int BITS>
void multiply(const Matrix* w, int count, const void* x, int done, int rows, void* const* y, const void* residual,
              int threads) {
  Inputs inputs;
  prepare<F, BITS>(w, count, x, rows, threads, inputs);
  Pieces pieces(w, count, threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (pieces.total > 1)
  for (int64_t p = 0; p < pieces.total; p++) {
    float sums[PIECE_ROWS * MAX_ROWS];
    Piece piece = pieces[p];
    const Matrix& own = w[piece.matrix];
    for (int m = 0; m < rows; m += MAX_ROWS) {
      int some = rows - m < MAX_ROWS ? rows - m : MAX_ROWS;
      piece_sums<BITS>(own, inputs.from(m), some, piece.from, piece.to, sums);
      finish<F>(own, piece, sums, done + m, some, y[piece.matrix], residual);
    }
  }
}

template <int F, int BITS>
int run(const Matrix* w, int count, const void* x, int rows, void* const* y, const void* residual, int threads) {
  for (int done = 0; done < rows; done += MOST_ROWS)
    multiply<F, BITS>(w, count, at<F>(x, done * w->in), done, rows - done < MOST_ROWS ? rows - done : MOST_ROWS, y, residual,
                threads);
  return 0;
}

enum Way { PLAIN, PACKED, PACKED_8, BYTES, TILES, WAYS };

#if defined(__AMX_BF16__)
constexpr bool BF16_TILES = true;
#else
constexpr bool BF16_TILES = false;
#endif

Way way_of(const Matrix& m, int rows, int x_format) {
  if (m.turned) return PLAIN;
  bool tiles = BF16_TILES && x_format == BF16;
  if (tiles && (m.format == BF16 || (m.format > F32 && !m.activation_bits && rows > MAX_ROWS))) return TILES;
  if (m.format <= F32 || m.activation_bits == 32) return PLAIN;
  if (m.activation_bits) return m.activation_bits == 8 ? BYTES : PACKED;
  bool bytes = DOT4 || m.format == INT4;
  if (rows > (bytes ? MAX_ROWS : FEW_ROWS)) return bytes ? BYTES : PLAIN;
  return m.few_bits == 8 && m.format == INT4 ? PACKED_8 : PACKED;
}

// The matrices that are multiplied in one way, and their results.
struct Share {
  Matrix w[16];
  void* y[16];
  int count = 0;

  Share(const Matrix* m, int all, void* const* to, int rows, int x_format, Way way) {
    for (int i = 0; i < all; i++) {
      if (way_of(m[i], rows, x_format) != way) continue;
      w[count] = m[i];
      y[count++] = to ? to[i] : nullptr;
    }
  }
};

template <int BITS>
int multiply_packed(const Matrix* w, int count, int x_format, const void* x, int64_t rows, void* const* y,
                const void* residual, int threads) {
  switch (x_format) {
    case BF16: return run<BF16, BITS>(w, count, x, rows, y, residual, threads);
    case F16: return run<F16, BITS>(w, count, x, rows, y, residual, threads);
    case F32: return run<F32, BITS>(w, count, x, rows, y, residual, threads);
  }
  return 1;
}

}  // namespace

extern "C" int NATIVE(gemmakit_project)(const Matrix* m, int count, int x_format, const void* x, int rows,
                                        void* const* y, const void* residual, int threads) {
  if (m->in < 1 || rows < 1 || count < 1 || count > 16 || (residual && count > 1)) return 1;
  for (int i = 1; i < count; i++)
    if (m[i].in != m[0].in) return 1;
  for (int i = 0; i < count; i++)
    if (m[i].format < BF16 || m[i].format > INT6 || (m[i].turned && m[i].format > F32)) return 1;
  for (int i = 0; !x && i < count; i++)
    if (way_of(m[i], rows, x_format) != BYTES) return 1;
  if (!x) return 0;
  constexpr decltype(&multiply_packed<16>) ways[WAYS] = {NATIVE(project_plain), multiply_packed<16>, multiply_packed<8>,
                                                         NATIVE(project_bytes), NATIVE(project_tiles)};
  for (int way = WAYS - 1; way >= 0; way--) {
    Share own(m, count, y, rows, x_format, (Way)way);
    if (own.count && ways[way](own.w, own.count, x_format, x, rows, own.y, residual, threads)) return 1;
  }
  return 0;
}

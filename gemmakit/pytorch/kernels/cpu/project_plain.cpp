// y = x @ W^T + bias for any rows of x and one or several weights in plain numbers, or in codes where x is not rounded.

#include "panel.h"
#include "pieces.h"

namespace {

// Of x that is laid out at a time: every panel of the weight meets it, so it has to stay in the third cache.
constexpr int64_t X_BYTES = L == 16 ? 1 << 24 : 1 << 22, MOST_TOKENS = 1024;

// Rows of x that are laid out at a time: all, or an equal share of them.
template <class E>
int64_t rows_at_a_time(int64_t rows, int64_t inputs) {
  int64_t most = X_BYTES / (steps_of<E>(inputs) * WIDTH) + CHAIN_ROWS;
  int64_t shares = (rows - 1) / (most < MOST_TOKENS ? most : MOST_TOKENS) + 1;
  return (rows + shares - 1) / shares;
}

template <class E, int F>
void multiply_direct(const Matrix* w, int count, const void* x, int64_t rows, void* const* y, const void* residual,
                     int threads) {
  Tiles<E> tiles = tiles_of<E, F>(x, w->in, rows, threads);
  Pieces pieces(w, count, threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (pieces.total > 1)
  for (int64_t p = 0; p < pieces.total; p++) {
    float sums[DIRECT_TOKENS * PIECE_ROWS];
    Piece piece = pieces[p];
    const Matrix& own = w[piece.matrix];
    int64_t next = piece.to - piece.from;
    direct<E>(own, tiles, piece.from, piece.to, sums, next);
    finish_rows<F>(own, piece.from, piece.to, sums, next, 0, rows, y[piece.matrix], residual);
  }
}

template <class E, int FROM, int F>
void multiply_panels(const Matrix* w, int count, const void* x, int64_t rows, void* const* y, const void* residual,
                     int threads) {
  int64_t each = rows_at_a_time<E>(rows, w->in);
  for (int64_t done = 0; done < rows; done += each) {
    auto own_x = turned_rows<E, F>(at<F>(x, done * w->in), w->in, rows - done < each ? rows - done : each, threads);
    Pieces pieces(w, count, threads, PANEL_OUT);
    int64_t parts = w->in > PANEL_INPUTS ? (own_x.tiles + PANEL_TILES - 1) / PANEL_TILES : 1;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (pieces.total > 1)
    for (int64_t p = 0; p < pieces.total * parts; p++) {
      Piece piece = pieces[p / parts];
      int64_t part = p % parts, first = part * own_x.tiles / parts, last = (part + 1) * own_x.tiles / parts;
      by_panel<E, FROM, F>(w[piece.matrix], own_x, piece.from, piece.to, first, last, done, y[piece.matrix], residual);
    }
  }
}

// Matrices of one format.
template <int FROM, int F>
void multiply(const Matrix* w, int count, const void* x, int64_t rows, void* const* y, const void* residual,
              int threads) {
  if constexpr (FROM != CODES)
    if (rows <= DIRECT_TOKENS) return multiply_direct<Element<FROM, F>, F>(w, count, x, rows, y, residual, threads);
  multiply_panels<Words<FROM, F>, FROM, F>(w, count, x, rows, y, residual, threads);
}

template <int F>
int run(const Matrix* w, int count, const void* x, int64_t rows, void* const* y, const void* residual, int threads) {
  for (int i = 0, some; i < count; i += some) {
    for (some = 1; i + some < count && w[i + some].format == w[i].format;) some++;
    auto multiply_own = w[i].format == BF16  ? multiply<BF16, F>
                        : w[i].format == F16 ? multiply<F16, F>
                        : w[i].format == F32 ? multiply<F32, F>
                                             : multiply<CODES, F>;
    multiply_own(w + i, some, x, rows, y + i, residual, threads);
  }
  return 0;
}

}  // namespace

extern "C" int NATIVE(project_plain)(const Matrix* m, int count, int x_format, const void* x, int64_t rows,
                                     void* const* y, const void* residual, int threads) {
  switch (x_format) {
    case BF16: return run<BF16>(m, count, x, rows, y, residual, threads);
    case F16: return run<F16>(m, count, x, rows, y, residual, threads);
    case F32: return run<F32>(m, count, x, rows, y, residual, threads);
  }
  return 1;
}

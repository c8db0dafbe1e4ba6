// y = x @ W^T + bias for any rows of x and one or several weights in plain numbers, or in codes where x is not rounded.

#include "plain.h"

namespace {

// Of x that is laid out at a time: every panel of the weight meets it, so it has to stay in the third cache.
constexpr int64_t X_BYTES = L == 16 ? 1 << 24 : 1 << 22, MOST_TOKENS = 1024;

// Rows of x that are laid out at a time: all, or an equal share of them, in whole tiles.
template <class E>
int64_t rows_at_a_time(int64_t rows, int64_t inputs) {
  int64_t most = X_BYTES / (whole_steps<E>(inputs) * (int64_t)sizeof(typename E::X)) + TILE_TOKENS;
  int64_t shares = (rows - 1) / (most < MOST_TOKENS ? most : MOST_TOKENS) + 1;
  return ((rows + shares - 1) / shares + TILE_TOKENS - 1) / TILE_TOKENS * TILE_TOKENS;
}

// Bias, rounding and residual, as the modules do it one after the other. sums (count, to - from), next apart, of the
// rows of y from `first` on.
template <int F>
void finish(const Matrix& w, int64_t from, int64_t to, const float* sums, int64_t next, int64_t first, int64_t count,
            void* y, const void* residual) {
  for (int64_t m = 0; m < count; m++) {
    int64_t row = (first + m) * w.out, end = row + to;
    for (int64_t o = from; o < to; o += L) {
      V v = take<F32>(sums + m * next, o - from, to - from);
      if (w.bias) v = add(v, take<F>(w.bias, o, to));
      if (residual) v = add(rounded<F>(v), take<F>(residual, row + o, end));
      give<F>(y, row + o, end, v);
    }
  }
}

// The rows of y from `done` on: as many as x has.
template <class E, int F>
void multiply_direct(const Matrix* w, int count, const Tiles<E>& x, int64_t done, void* const* y,
                     const void* residual, int threads) {
  Pieces pieces(w, count, threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (pieces.total > 1)
  for (int64_t p = 0; p < pieces.total; p++) {
    float sums[DIRECT_TOKENS * PIECE_ROWS];
    Piece piece = pieces[p];
    const Matrix& own = w[piece.matrix];
    int64_t next = piece.to - piece.from;
    direct<E>(own, x, piece.from, piece.to, sums, next);
    finish<F>(own, piece.from, piece.to, sums, next, done, x.rows, y[piece.matrix], residual);
  }
}

template <class E, int F>
void multiply_panels(const Matrix* w, int count, const Tiles<typename E::Panel>& x, int64_t done, void* const* y,
                     const void* residual, int threads) {
  Pieces pieces(w, count, threads, panel_rows<typename E::Panel>(*w));
  int64_t parts = (x.rows + PANEL_TOKENS - 1) / PANEL_TOKENS;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (pieces.total > 1)
  for (int64_t p = 0; p < pieces.total * parts; p++) {
    float* sums = scratch<float, 23>(MOST_PANEL_ROWS * PANEL_TOKENS);
    Piece piece = pieces[p / parts];
    const Matrix& own = w[piece.matrix];
    int64_t first = p % parts * PANEL_TOKENS, some = x.rows - first < PANEL_TOKENS ? x.rows - first : PANEL_TOKENS;
    by_panel<E>(own, x, piece.from, piece.to, first, some, sums, MOST_PANEL_ROWS);
    finish<F>(own, piece.from, piece.to, sums, MOST_PANEL_ROWS, done + first, some, y[piece.matrix], residual);
  }
}

// Matrices of one format.
template <class E, int F>
void multiply(const Matrix* w, int count, const void* x, int64_t rows, void* const* y, const void* residual,
              int threads) {
  if constexpr (!std::is_same_v<E, Coded>)
    if (rows <= DIRECT_TOKENS) {
      Tiles<E> tiles = tiles_of<E, F>(x, w->in, rows, threads);
      return multiply_direct<E, F>(w, count, tiles, 0, y, residual, threads);
    }
  int64_t each = rows_at_a_time<typename E::Panel>(rows, w->in);
  for (int64_t done = 0; done < rows; done += each) {
    int64_t some = rows - done < each ? rows - done : each;
    auto tiles = tiles_of<typename E::Panel, F>(at<F>(x, done * w->in), w->in, some, threads);
    multiply_panels<E, F>(w, count, tiles, done, y, residual, threads);
  }
}

template <int F>
int run(const Matrix* w, int count, const void* x, int64_t rows, void* const* y, const void* residual, int threads) {
  for (int i = 0, some; i < count; i += some) {
    for (some = 1; i + some < count && w[i + some].format == w[i].format;) some++;
    auto multiply_own = w[i].format == BF16  ? multiply<Element<BF16, F>, F>
                        : w[i].format == F16 ? multiply<Element<F16, F>, F>
                        : w[i].format == F32 ? multiply<Element<F32, F>, F>
                                             : multiply<Coded, F>;
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

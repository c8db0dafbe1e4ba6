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

// Rows of x that meet a weight (in, out) as it lies, and its inputs that meet sums while these are in registers.
constexpr int64_t TURNED_ROWS = 16, TURNED_INPUTS = 8, TURNED_PART = 256;

// sums (rows, next), next a multiple of L, += those of `count` <= TURNED_INPUTS inputs of x (rows, in) by `outputs` of
// w, of whose inputs each begins `apart` numbers behind the one before.
template <int FROM, bool ONE, bool ALL>
void add_inputs(const void* w, int64_t apart, int64_t count, int64_t outputs, const float* x, int64_t in, int64_t rows,
                float* sums, int64_t next) {
  if (ALL) count = TURNED_INPUTS;
  V numbers[TURNED_INPUTS];
  if (ONE) UNROLL for (int k = 0; k < TURNED_INPUTS; k++) numbers[k] = splat(k < count ? x[k] : 0.0f);
  for (int64_t o = 0; o < outputs; o += L) {
    V v[TURNED_INPUTS];
    UNROLL for (int k = 0; k < TURNED_INPUTS; k++) {
      if (!ALL && k >= count) break;
      const void* own = at<FROM>(w, k * apart);
      __builtin_prefetch(at<FROM>(own, TURNED_INPUTS * apart + o));
      v[k] = take<FROM>(own, o, outputs);
    }
    for (int64_t m = 0; m < (ONE ? 1 : rows); m++) {
      V sum = load(sums + m * next + o);
      UNROLL for (int k = 0; k < TURNED_INPUTS; k++) {
        if (!ALL && k >= count) break;
        sum = fma(v[k], ONE ? numbers[k] : splat(x[m * in + k]), sum);
      }
      store(sums + m * next + o, sum);
    }
  }
}

template <int FROM, bool ONE>
void turned_sums(const Matrix& w, const float* x, int64_t rows, int64_t from, int64_t to, float* sums, int64_t next) {
  float parts[TURNED_ROWS * PIECE_ROWS];
  for (int64_t part = 0; part < w.in; part += TURNED_PART) {
    int64_t end = w.in - part < TURNED_PART ? w.in : part + TURNED_PART;
    float* own = part ? parts : sums;
    std::memset(own, 0, rows * next * sizeof *own);
    for (int64_t i = part; i < end; i += TURNED_INPUTS) {
      int64_t count = end - i;
      auto add_own = count < TURNED_INPUTS ? add_inputs<FROM, ONE, false> : add_inputs<FROM, ONE, true>;
      add_own(at<FROM>(w.codes, i * w.out + from), w.out, count, to - from, x + i, w.in, rows, own, next);
    }
    for (int64_t o = 0; part && o < rows * next; o += L) store(sums + o, add(load(sums + o), load(parts + o)));
  }
}

// Outputs of a piece: few enough for every thread to get two, and of each input a run of memory that pays.
inline int64_t turned_piece(int64_t out, int threads) {
  int64_t share = (out / (2 * threads) + 63) / 64 * 64;
  return share < 64 ? 64 : share > PIECE_ROWS ? PIECE_ROWS : share;
}

template <int FROM, int F>
void multiply_turned(const Matrix* w, int count, const void* x, int64_t rows, void* const* y, const void* residual,
                     int threads) {
  const float* wide = (const float*)x;
  if constexpr (F != F32) {
    float* room = scratch<float, 20>(rows * w->in);
    widen_all<F>(x, room, rows * w->in);
    wide = room;
  }
  Pieces pieces(w, count, threads, turned_piece(w->out, threads));
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (pieces.total > 1)
  for (int64_t p = 0; p < pieces.total; p++) {
    float sums[TURNED_ROWS * PIECE_ROWS];
    Piece piece = pieces[p];
    const Matrix& own = w[piece.matrix];
    auto sums_of = rows == 1 ? turned_sums<FROM, true> : turned_sums<FROM, false>;
    sums_of(own, wide, rows, piece.from, piece.to, sums, PIECE_ROWS);
    finish_rows<F>(own, piece.from, piece.to, sums, PIECE_ROWS, 0, rows, y[piece.matrix], residual);
  }
}

// Matrices of one format, all of them turned or none.
template <int FROM, int F>
void multiply(const Matrix* w, int count, const void* x, int64_t rows, void* const* y, const void* residual,
              int threads) {
  if constexpr (FROM != CODES)
    if (w->turned) {
      if (rows <= TURNED_ROWS) return multiply_turned<FROM, F>(w, count, x, rows, y, residual, threads);
      return multiply_panels<Floats, TURNED + FROM, F>(w, count, x, rows, y, residual, threads);
    }
  if constexpr (FROM != CODES)
    if (rows <= DIRECT_TOKENS) return multiply_direct<Element<FROM, F>, F>(w, count, x, rows, y, residual, threads);
  multiply_panels<Words<FROM, F>, FROM, F>(w, count, x, rows, y, residual, threads);
}

template <int F>
int run(const Matrix* w, int count, const void* x, int64_t rows, void* const* y, const void* residual, int threads) {
  for (int i = 0, some; i < count; i += some) {
    for (some = 1; i + some < count && w[i + some].format == w[i].format && w[i + some].turned == w[i].turned;) some++;
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

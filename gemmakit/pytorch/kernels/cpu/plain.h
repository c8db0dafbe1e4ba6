// Sums of rows of x against rows of a weight in a float format, or of codes as float32.
//
// Each sum has one order, whatever other rows there are: lane by lane along the inputs, then the lanes in one tree. So a
// row of a prompt and one of a decoding step give the same bits. A few rows meet the weight as it lies, which comes from
// the memory once; more meet panels of it. Tiles of x and of panels lie in the order in which they are read, so that the
// second cache feeds the products as fast as the first would.

#pragma once

#include <type_traits>
#include <utility>

#include "expand.h"
#include "inputs.h"
#include "pieces.h"

namespace {

// How the numbers of a weight (W) and of x (X) become sums, STEP inputs at a time.
template <int F>
struct Wide {
  using W = std::conditional_t<F == F32, float, uint16_t>;
  using X = float;
  static constexpr int FORMAT = F, X_FORMAT = F32, PANEL_FORMAT = F32;
  using Panel = Wide<F32>;
#if defined(__ARM_NEON)
  static constexpr int STEP = F == F32 ? L : 2 * L;  // a vector of 16-bit numbers fills two of float32
#else
  static constexpr int STEP = L;
#endif
  struct Weights {
    V v[STEP / L];
  };
  using Inputs = Weights;
  static INLINE Weights weights(const W* p) {
#if defined(__ARM_NEON)
    if constexpr (F != F32) {
      Two two = widen_two<F>(p);
      return {{two.first, two.second}};
    }
#endif
    return {{widen<F>(p)}};
  }
  static INLINE Inputs inputs(const X* p) {
    Inputs x;
    UNROLL for (int i = 0; i < STEP / L; i++) x.v[i] = load(p + i * L);
    return x;
  }
  static INLINE V products(const Weights& w, const Inputs& x, V acc) {
    UNROLL for (int i = 0; i < STEP / L; i++) acc = fma(w.v[i], x.v[i], acc);
    return acc;
  }
};

// Codes meet x as numbers in panels, not as they lie.
struct Coded {
  using W = uint8_t;
  using Panel = Wide<F32>;
};

#if defined(__AVX512BF16__)
// bfloat16 as it came, two products a lane: half the instructions of the float32 form.
struct Pairs {
  using W = uint16_t;
  using X = uint16_t;
  static constexpr int FORMAT = BF16, X_FORMAT = BF16, PANEL_FORMAT = BF16, STEP = 2 * L;
  using Panel = Pairs;
  using Weights = __m512bh;
  using Inputs = __m512bh;
  static INLINE Weights weights(const W* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static INLINE Inputs inputs(const X* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static INLINE V products(Weights w, Inputs x, V acc) { return _mm512_dpbf16_ps(acc, w, x); }
};
template <int F, int X>
using Element = std::conditional_t<F == BF16 && X == BF16, Pairs, Wide<F>>;
#else
template <int F, int X>
using Element = Wide<F>;
#endif

// A tile: so many rows of the weight and at most so many of x, whose sums the registers hold.
constexpr int TILE_ROWS = 4, TILE_TOKENS = L == 8 ? 3 : 6;
template <class E>
constexpr int64_t whole_steps(int64_t inputs) { return (inputs + E::STEP - 1) / E::STEP * E::STEP; }

// n inputs of row t of `rows` that lie step by step beside each other, zeros behind the last up to a whole STEP.
template <class E, int FROM, int TO, class T>
INLINE void lay_out(const void* from, T* to, int64_t n, int64_t rows, int64_t t) {
  to += t * E::STEP;
  for (int64_t i = 0; i < n; i += E::STEP, to += rows * E::STEP) {
    char rest[E::STEP * size_of<FROM>] = {};
    const void* own = at<FROM>(from, i);
    if (n - i < E::STEP) own = std::memcpy(rest, own, (n - i) * size_of<FROM>);
    if constexpr (FROM == TO)
      std::memcpy(to, own, E::STEP * sizeof(T));
    else
      widen_all<FROM>(own, to, E::STEP);
  }
}

// x (tiles, steps, rows of the tile, STEP).
template <class E>
struct Tiles {
  const typename E::X* x;
  int64_t rows, in;

  // The tile that begins with row m, and its rows.
  const typename E::X* at(int64_t m) const { return x + m * whole_steps<E>(in); }
  int64_t rows_at(int64_t m) const { return rows - m < TILE_TOKENS ? rows - m : TILE_TOKENS; }
};

template <class E, int F>
Tiles<E> tiles_of(const void* x, int64_t in, int64_t rows, int threads) {
  auto* room = scratch<typename E::X, 20>(rows * whole_steps<E>(in));
  Tiles<E> made = {room, rows, in};
#pragma omp parallel for num_threads(threads) if (rows * in > 1 << 16)
  for (int64_t m = 0; m < rows; m++) {
    int64_t t = m % TILE_TOKENS, first = m - t;
    lay_out<E, F, E::X_FORMAT>(at<F>(x, m * in), room + first * whole_steps<E>(in), in, made.rows_at(first), t);
  }
  return made;
}

template <class E>
struct TileCall {
  const typename E::W* w;
  int64_t w_row, w_step;      // from row to row, from step to step
  const typename E::W* soon;  // in place of w, what is asked for
  const typename E::X* x;
  int64_t inputs;
  float* sums;  // (tokens, rows), sums_next apart
  int64_t sums_next;
  float* lanes = nullptr;  // (TILE_TOKENS, TILE_ROWS, L), of inputs so far, where these are not the row's only ones
  bool begins = true, ends = true;
};

template <class E, int R, int T>
void tile(const TileCall<E>& given) {
  const TileCall<E> c = given;
  V acc[T][R];
  UNROLL for (int t = 0; t < T; t++)
    UNROLL for (int r = 0; r < R; r++) acc[t][r] = c.begins ? zero() : load(c.lanes + (t * R + r) * L);
  const typename E::W *w = c.w, *soon = c.soon;
  const typename E::X* x = c.x;
  int64_t left = c.inputs;
  for (; left >= E::STEP; left -= E::STEP, w += c.w_step, soon += c.w_step, x += T * E::STEP) {
    UNROLL for (int r = 0; r < R; r++) __builtin_prefetch(soon + r * c.w_row, 0, 3);
    typename E::Inputs inputs[T];
    UNROLL for (int t = 0; t < T; t++) inputs[t] = E::inputs(x + t * E::STEP);
    UNROLL for (int r = 0; r < R; r++) {
      typename E::Weights weights = E::weights(w + r * c.w_row);
      UNROLL for (int t = 0; t < T; t++) acc[t][r] = E::products(weights, inputs[t], acc[t][r]);
    }
  }
  if (left)
    UNROLL for (int r = 0; r < R; r++) {
      typename E::W rest[E::STEP] = {};
      std::memcpy(rest, w + r * c.w_row, left * sizeof(typename E::W));
      typename E::Weights weights = E::weights(rest);
      UNROLL for (int t = 0; t < T; t++) acc[t][r] = E::products(weights, E::inputs(x + t * E::STEP), acc[t][r]);
    }
  if (!c.ends) {
    UNROLL for (int t = 0; t < T; t++)
      UNROLL for (int r = 0; r < R; r++) store(c.lanes + (t * R + r) * L, acc[t][r]);
    return;
  }
  UNROLL for (int t = 0; t < T; t++) {
    float four[4];
    store_sums(R == 4 ? c.sums + t * c.sums_next : four, acc[t][0], acc[t][R > 1], acc[t][R > 2 ? 2 : 0],
               acc[t][R > 3 ? 3 : 0]);
    if (R < 4) c.sums[t * c.sums_next] = four[0];
  }
}

template <class E, int R, int... T>
void any_tile(int tokens, const TileCall<E>& call, std::integer_sequence<int, T...>) {
  static constexpr void (*sizes[])(const TileCall<E>&) = {tile<E, R, T + 1>...};
  sizes[tokens - 1](call);
}

template <class E>
void any_tile(int rows, int tokens, const TileCall<E>& call) {
  constexpr std::make_integer_sequence<int, TILE_TOKENS> sizes;
  rows == TILE_ROWS ? any_tile<E, TILE_ROWS>(tokens, call, sizes) : any_tile<E, 1>(tokens, call, sizes);
}

// Rows of x that meet the weight as it lies.
constexpr int DIRECT_TOKENS = L == 8 ? 8 : 16;

// sums (x.rows, to - from), next apart, of weight rows from..to.
template <class E>
void direct(const Matrix& w, const Tiles<E>& x, int64_t from, int64_t to, float* sums, int64_t next) {
  for (int64_t o = from, rows; o < to; o += rows) {
    rows = o + TILE_ROWS <= to ? TILE_ROWS : 1;
    const auto* own = (const typename E::W*)w.codes + o * w.in;
    for (int64_t m = 0; m < x.rows; m += TILE_TOKENS) {
      TileCall<E> call = {own, w.in, E::STEP, m ? own : own + rows * w.in, x.at(m), w.in, sums + m * next + o - from, next};
      any_tile(rows, x.rows_at(m), call);
    }
  }
}

// Of a panel: it stays in the second cache, and of so many inputs that a tile of x stays in the first. Between parts of a
// row its sums are kept lane by lane, so that their order is the same.
constexpr int64_t PANEL_BYTES = 1 << 18, MOST_PANEL_ROWS = 64, PANEL_INPUTS = L == 16 ? 1024 : INT64_MAX;
// Rows of x that meet a panel before the next is made.
constexpr int64_t PANEL_TOKENS = 32 * TILE_TOKENS;
// How far ahead in a panel numbers come from the second cache to the first.
constexpr int64_t PANEL_SOON = 1024;

inline int64_t panel_inputs(const Matrix& w) { return w.in < PANEL_INPUTS ? w.in : PANEL_INPUTS; }

template <class E>
int64_t panel_rows(const Matrix& w) {
  int64_t bytes = whole_steps<E>(panel_inputs(w)) * sizeof(typename E::W);
  int64_t rows = PANEL_BYTES / bytes / TILE_ROWS * TILE_ROWS;
  return rows < TILE_ROWS ? TILE_ROWS : rows > MOST_PANEL_ROWS ? MOST_PANEL_ROWS : rows;
}

// Inputs first..first + some of weight rows from..from + rows in tiles as x; those behind them are asked for.
template <class E, class Panel>
void fill_panel(const Matrix& w, int64_t from, int64_t rows, int64_t first, int64_t some, typename Panel::W* panel) {
  int64_t whole = whole_steps<Panel>(some), each = row_bytes(w);
  for (int64_t r = 0; r < rows; r++) {
    const char* own = (const char*)w.codes + (from + r) * each;
    bool alone = r >= rows / TILE_ROWS * TILE_ROWS;
    int64_t t = alone ? 0 : r % TILE_ROWS, beside = alone ? 1 : TILE_ROWS;
    auto* to = panel + (r - t) * whole;
    if constexpr (std::is_same_v<E, Coded>)
      expand_row<F32>(w, from + r, first, some, to + t * L, beside * L, whole);
    else
      lay_out<Panel, E::FORMAT, E::PANEL_FORMAT>(at<E::FORMAT>(own, first), to, some, beside, t);
    const char* soon = own + (first + some < w.in ? bytes_before(w, first + some) : rows * each);
    for (int64_t i = 0; i < bytes_before(w, some); i += 64) __builtin_prefetch(soon + i, 0, 2);
  }
}

// sums (count, to - from), next apart, of weight rows from..to and rows first..first + count of x, whole tiles.
template <class E>
void by_panel(const Matrix& w, const Tiles<typename E::Panel>& x, int64_t from, int64_t to, int64_t first,
              int64_t count, float* sums, int64_t next) {
  using Panel = typename E::Panel;
  constexpr int64_t TILE_LANES = TILE_ROWS * TILE_TOKENS * L;
  int64_t rows = to - from, tiles = (rows + TILE_ROWS - 1) / TILE_ROWS + TILE_ROWS;
  int64_t most = panel_inputs(w);
  auto* panel = scratch<typename Panel::W, 22>(rows * whole_steps<Panel>(most) + PANEL_SOON);
  float* lanes = most < w.in ? scratch<float, 24>((count / TILE_TOKENS + 1) * tiles * TILE_LANES) : nullptr;
  for (int64_t done = 0, some; done < w.in; done += some) {
    some = w.in - done < most ? w.in - done : most;
    int64_t whole = whole_steps<Panel>(some);
    fill_panel<E, Panel>(w, from, rows, done, some, panel);
    float* own_lanes = lanes;
    for (int64_t m = 0; m < count; m += TILE_TOKENS)
      for (int64_t r = 0, beside; r < rows; r += beside, own_lanes += lanes ? TILE_LANES : 0) {
        beside = r + TILE_ROWS <= rows ? TILE_ROWS : 1;
        const auto* own = panel + r * whole;
        int64_t tokens = x.rows_at(first + m);
        TileCall<Panel> call = {own, Panel::STEP, beside * Panel::STEP, own + PANEL_SOON / sizeof(*own),
                                x.at(first + m) + done * tokens, whole, sums + m * next + r, next, own_lanes, !done,
                                done + some == w.in};
        any_tile(beside, tokens, call);
      }
  }
}

}  // namespace

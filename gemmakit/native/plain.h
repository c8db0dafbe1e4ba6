// Sums of a few rows of x against rows of a weight in a float format, which meet it as it lies: it comes from the memory
// once.
//
// Each sum has one order, whatever other rows there are: lane by lane along the inputs, then the lanes in one tree. More
// rows have the same from panel.h.

#pragma once

#include <type_traits>
#include <utility>

#include "functions.h"
#include "inputs.h"

namespace {

// How the numbers of a weight (W) and of x (X) become sums, STEP inputs at a time.
template <int F>
struct Wide {
  using W = std::conditional_t<F == F32, float, uint16_t>;
  using X = float;
  static constexpr int FORMAT = F, X_FORMAT = F32;
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

#if defined(__AVX512BF16__)
// bfloat16 as it came, two products a lane: half the instructions of the float32 form.
struct Pairs {
  using W = uint16_t;
  using X = uint16_t;
  static constexpr int FORMAT = BF16, X_FORMAT = BF16, STEP = 2 * L;
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
template <class E, int F>
INLINE void lay_out(const void* x, typename E::X* to, int64_t n, int64_t rows, int64_t t) {
  to += t * E::STEP;
  for (int64_t i = 0; i < n; i += E::STEP, to += rows * E::STEP) {
    char rest[E::STEP * size_of<F>] = {};
    const void* own = at<F>(x, i);
    if (n - i < E::STEP) own = std::memcpy(rest, own, (n - i) * size_of<F>);
    if constexpr (F == E::X_FORMAT)
      std::memcpy(to, own, sizeof rest);
    else
      widen_all<F>(own, to, E::STEP);
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
    lay_out<E, F>(at<F>(x, m * in), room + first * whole_steps<E>(in), in, made.rows_at(first), t);
  }
  return made;
}

template <class E>
struct TileCall {
  const typename E::W* w;
  const typename E::W* soon;  // in place of w, what is asked for
  const typename E::X* x;
  int64_t inputs;
  float* sums;  // (tokens, rows), sums_next apart
  int64_t sums_next;
};

template <class E, int R, int T>
void tile(const TileCall<E>& given) {
  const TileCall<E> c = given;
  V acc[T][R];
  UNROLL for (int t = 0; t < T; t++)
    UNROLL for (int r = 0; r < R; r++) acc[t][r] = zero();
  const typename E::W *w = c.w, *soon = c.soon;
  const typename E::X* x = c.x;
  int64_t left = c.inputs;
  for (; left >= E::STEP; left -= E::STEP, w += E::STEP, soon += E::STEP, x += T * E::STEP) {
    UNROLL for (int r = 0; r < R; r++) __builtin_prefetch(soon + r * c.inputs, 0, 3);
    typename E::Inputs inputs[T];
    UNROLL for (int t = 0; t < T; t++) inputs[t] = E::inputs(x + t * E::STEP);
    UNROLL for (int r = 0; r < R; r++) {
      typename E::Weights weights = E::weights(w + r * c.inputs);
      UNROLL for (int t = 0; t < T; t++) acc[t][r] = E::products(weights, inputs[t], acc[t][r]);
    }
  }
  if (left)
    UNROLL for (int r = 0; r < R; r++) {
      typename E::W rest[E::STEP] = {};
      std::memcpy(rest, w + r * c.inputs, left * sizeof(typename E::W));
      typename E::Weights weights = E::weights(rest);
      UNROLL for (int t = 0; t < T; t++) acc[t][r] = E::products(weights, E::inputs(x + t * E::STEP), acc[t][r]);
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
      TileCall<E> call = {own, m ? own : own + rows * w.in, x.at(m), w.in, sums + m * next + o - from, next};
      any_tile(rows, x.rows_at(m), call);
    }
  }
}

}  // namespace

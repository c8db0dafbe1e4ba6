// Sums of many rows of x against panels of a weight, each in plain.h's order: so a row of a prompt and one of a decoding
// step give the same bits.
//
// What plain.h has in the lanes of a vector, one input of the weight after the other, is here a chain of its own: a
// vector's lanes are outputs, and a lane's inputs, which lie together, meet L of these at a time. So a number of x is
// read once for a whole vector, and no vector is summed up. The chains of a tile come one after the other, and each is
// added to those before it as the tree wants it.

#pragma once

#include <type_traits>
#include <utility>

#include "expand.h"
#include "outputs.h"
#include "plain.h"

namespace {

// How the words of a panel and of x, 32 bits each, become sums. A step is L words of a line.
struct Floats {
  static constexpr int STEP = L;  // inputs
  static INLINE V product(V w, V x, V acc) { return fma(w, x, acc); }
};

#if defined(__AVX512BF16__)
struct PairWords {
  static constexpr int STEP = 2 * L;
  static INLINE V product(V w, V x, V acc) {
    return _mm512_dpbf16_ps(acc, (__m512bh)bits_of(w), (__m512bh)bits_of(x));
  }
};
template <int FROM, int F>
using Words = std::conditional_t<FROM == BF16 && F == BF16, PairWords, Floats>;
#else
template <int FROM, int F>
using Words = Floats;
#endif

// A tile: so many outputs, and at most so many rows of x, whose sums the registers hold.
constexpr int64_t CHAIN_OUT = 2 * L, CHAIN_ROWS = L == 8 ? 6 : 12;
// Of a panel, which stays in the second cache. Between parts of a row its chains are kept as they are.
constexpr int64_t PANEL_OUT = 64, PANEL_INPUTS = L == 8 ? 1024 : 2048;
// Tiles that meet a panel before the next is made, where chains are kept.
constexpr int64_t PANEL_TILES = 24;
// How far ahead in a panel numbers come from the second cache to the first.
constexpr int64_t PANEL_SOON = 256;
// The same in inputs, of a weight that is copied.
constexpr int64_t COPY_SOON = 16;
constexpr int CODES = INT8_ROWS;  // for a weight in any of those formats
constexpr int TURNED = 32;        // added to the format of one that lies as (in, out)
constexpr int LEVELS = L == 16 ? 4 : L == 8 ? 3 : 2;  // of the tree
constexpr int64_t STACK = (LEVELS + 1) * CHAIN_ROWS * CHAIN_OUT;

template <class E>
constexpr int64_t steps_of(int64_t inputs) { return (inputs + E::STEP - 1) / E::STEP; }

// Where the words of up to L lines go: those of a lane lie together, `width` a step, of which these lines are `count`.
struct Place {
  float* to;
  int64_t width, lane, count, steps;  // lane: from lane to lane

  // Word l of step k; ALL: where count is L.
  template <bool ALL>
  INLINE void put(float* own, int64_t k, I word) const {
    // What is too much the next step writes over, but there is none behind the last one.
    if (ALL || (k + 1) * width + L - count <= steps * width) return store(own, number_of(word));
    std::memcpy(own, &word, count * sizeof *own);
  }
};

// `inputs` of `lines` lines in format F, `next` numbers apart, to their place; whatever stands for the missing lines.
template <class E, int F>
void turn_lines(const void* from, int64_t next, int64_t lines, int64_t inputs, const Place& place);

// The same of numbers that `read` gives: n of line r from input i on, as float32.
template <class E, class Read>
void turn_numbers(int64_t lines, int64_t inputs, Place place, Read read) {
  constexpr int64_t SOME = 512, NEXT = SOME + APART;
  auto* numbers = scratch<float, 21>(L * NEXT);
  for (int64_t i = 0, n; i < inputs; i += n) {
    n = inputs - i < SOME ? inputs - i : SOME;
    for (int64_t r = 0; r < lines; r++) read(r, i, n, numbers + r * NEXT);
    turn_lines<E, F32>(numbers, NEXT, lines, n, place);
    place.to += n / L * place.width, place.steps -= n / L;
  }
}

template <class E, int F, bool ALL>
void turn_blocks(const void* from, int64_t next, int64_t lines, int64_t inputs, const Place& given) {
  const Place place = given;
  constexpr int64_t INPUTS = WIDTH / size_of<F>;
  constexpr bool TWO_STEPS = F == BF16 && E::STEP == L;
  char rest[L][WIDTH] = {};
  for (int64_t i = 0, k = 0; i < inputs; i += INPUTS, k += 1 + TWO_STEPS) {
    const char* block = (const char*)at<F>(from, i);
    int64_t apart = next * size_of<F>, left = inputs - i < INPUTS ? inputs - i : INPUTS;
    if (lines < L || left < INPUTS) {
      if (left < INPUTS) std::memset(rest, 0, sizeof rest);
      for (int64_t r = 0; r < lines; r++) std::memcpy(rest[r], block + r * apart, left * size_of<F>);
      block = rest[0], apart = WIDTH;
    }
    float* own = place.to + k * place.width;
    bool second = k + 1 < place.steps;
    UNROLL for (int j = 0; j < L; j += 4) {
      I words[4];
      turn_four(block + 4 * j, apart, words);
      UNROLL for (int c = 0; c < 4; c++) {
        bool next_step = TWO_STEPS && j + c >= L / 2;
        if (TWO_STEPS && j + c == L / 2) own = place.to + (k + 1) * place.width;
        if (!TWO_STEPS) {
          place.put<ALL>(own, k, words[c]), own += place.lane;
        } else if (!next_step || second) {
          I pair[2];
          widen_pairs(words[c], pair);
          UNROLL for (int b = 0; b < 2; b++) place.put<ALL>(own, k + next_step, pair[b]), own += place.lane;
        }
      }
    }
  }
}

template <class E, int F>
void turn_lines(const void* from, int64_t next, int64_t lines, int64_t inputs, const Place& place) {
  if constexpr (F == F16) {
    return turn_numbers<E>(lines, inputs, place, [=](int64_t r, int64_t i, int64_t n, float* to) {
      widen_all<F16>(at<F16>(from, r * next + i), to, n);
    });
  }
  place.count == L ? turn_blocks<E, F, true>(from, next, lines, inputs, place)
                   : turn_blocks<E, F, false>(from, next, lines, inputs, place);
}

// x (parts of PANEL_INPUTS, tiles, lanes, steps, rows of the tile).
template <class E>
struct Turned {
  const float* words;
  int64_t rows, in, tiles;

  int64_t begin(int64_t tile) const { return tile * rows / tiles; }
  const float* at(int64_t tile, int64_t from, int64_t steps) const {
    return words + (from / E::STEP * rows + begin(tile) * steps) * L;
  }
};

template <class E, int F>
Turned<E> turned_rows(const void* x, int64_t in, int64_t rows, int threads) {
  Turned<E> made = {scratch<float, 20>(rows * steps_of<E>(in) * L), rows, in, (rows + CHAIN_ROWS - 1) / CHAIN_ROWS};
  int64_t parts = (in + PANEL_INPUTS - 1) / PANEL_INPUTS;
#pragma omp parallel for collapse(2) num_threads(threads) if (rows * in > 1 << 16)
  for (int64_t tile = 0; tile < made.tiles; tile++)
    for (int64_t part = 0; part < parts; part++) {
      int64_t from = part * PANEL_INPUTS, some = in - from < PANEL_INPUTS ? in - from : PANEL_INPUTS;
      int64_t m = made.begin(tile), own = made.begin(tile + 1) - m;
      int64_t steps = steps_of<E>(some);
      // The last lines first: what they write too much is where the others come.
      for (int64_t t = (own - 1) / L * L; t >= 0; t -= L) {
        int64_t lines = own - t < L ? own - t : L;
        Place place = {(float*)made.at(tile, from, steps) + t, own, steps * own, lines, steps};
        turn_lines<E, F>(at<F>(x, (m + t) * in + from), in, lines, some, place);
      }
    }
  return made;
}

struct Chains {
  const float *w, *x;
  int64_t steps, strips;
  float* kept;  // (lanes, strips, CHAIN_ROWS, CHAIN_OUT)
  float* sums;  // (strips, LEVELS + 1, rows, CHAIN_OUT), of which the last level is the result
  bool begins, ends;
};

template <class E, int T>
void chains(const Chains& given) {
  const Chains c = given;
  constexpr int64_t TILE = T * CHAIN_OUT;
  const float *w = c.w, *x = c.x;
  float* kept = c.kept;
  for (int l = 0; l < L; l++, x += c.steps * T, w += APART)
    for (int64_t s = 0; s < c.strips; s++, kept += TILE) {
      V acc[T][2];
      UNROLL for (int t = 0; t < T; t++)
        UNROLL for (int r = 0; r < 2; r++) acc[t][r] = c.begins ? zero() : load(kept + (2 * t + r) * L);
      const float* own = x;
      for (int64_t k = 0; k < c.steps; k++, own += T, w += CHAIN_OUT) {
        V first = load(w), second = load(w + L);
        UNROLL for (int i = 0; i < CHAIN_OUT; i += 16) __builtin_prefetch(w + PANEL_SOON + i, 0, 3);
        UNROLL for (int t = 0; t < T; t++) {
          V number = splat(own[t]);
          acc[t][0] = E::product(first, number, acc[t][0]), acc[t][1] = E::product(second, number, acc[t][1]);
        }
      }
      float* to = kept;
      if (c.ends) {
        // As many sums wait for this one as the lane's number has ones at its end.
        to = c.sums + s * STACK;
        for (int level = l; level & 1; level >>= 1, to += TILE)
          UNROLL for (int t = 0; t < T; t++)
            UNROLL for (int r = 0; r < 2; r++) acc[t][r] = add(load(to + (2 * t + r) * L), acc[t][r]);
      }
      UNROLL for (int t = 0; t < T; t++)
        UNROLL for (int r = 0; r < 2; r++) store(to + (2 * t + r) * L, acc[t][r]);
    }
}

template <class E, int... T>
void any_chains(int64_t rows, const Chains& c, std::integer_sequence<int, T...>) {
  static constexpr void (*sizes[])(const Chains&) = {chains<E, T + 1>...};
  sizes[rows - 1](c);
}

// What fill_panel does, of a weight that lies as the panel wants it.
template <int F>
void copy_panel(const Matrix& w, int64_t from, int64_t to, int64_t first, int64_t some, int64_t strip, int64_t lane,
                float* panel) {
  int64_t outputs = to - from;
  const void* own = at<F>(w.codes, first * w.out + from);
  for (int64_t k = 0, i = 0; k < strip; k += CHAIN_OUT)
    for (int l = 0; l < L; l++, i++, own = at<F>(own, w.out))
      for (int64_t o = 0; o < outputs; o += L) {
        __builtin_prefetch(at<F>(own, COPY_SOON * w.out + o));
        store(panel + l * lane + o / CHAIN_OUT * strip + k + o % CHAIN_OUT, i < some ? take<F>(own, o, outputs) : zero());
      }
}

// `some` inputs from `first` on of outputs from..to: (lanes, strips, steps, CHAIN_OUT).
template <class E, int F>
void fill_panel(const Matrix& w, int64_t from, int64_t to, int64_t first, int64_t some, float* panel) {
  int64_t strips = (to - from + CHAIN_OUT - 1) / CHAIN_OUT, strip = steps_of<E>(some) * CHAIN_OUT, lane = strips * strip + APART;
  if constexpr (F >= TURNED)
    copy_panel<F - TURNED>(w, from, to, first, some, strip, lane, panel);
  else
    for (int64_t o = 0; o < strips * CHAIN_OUT; o += L) {
      int64_t own = from + o < to ? from + o : to - 1, rows = to - own < L ? to - own : L;
      Place place = {panel + o / CHAIN_OUT * strip + o % CHAIN_OUT, CHAIN_OUT, lane, L, steps_of<E>(some)};
      if constexpr (F == CODES)
        turn_numbers<E>(rows, some, place, [&](int64_t r, int64_t i, int64_t n, float* to) {
          expand_row<F32>(w, own + r, first + i, n, to, L, n);
        });
      else
        turn_lines<E, F>(at<F>(w.codes, own * w.in + first), w.in, rows, some, place);
    }
}

// Outputs from..to of the tiles first..last of x, to their places in y, whose rows these are from `done` on.
template <class E, int FROM, int F>
void by_panel(const Matrix& w, const Turned<E>& x, int64_t from, int64_t to, int64_t first, int64_t last,
              int64_t done, void* y, const void* residual) {
  constexpr std::make_integer_sequence<int, CHAIN_ROWS> sizes;
  int64_t strips = (to - from + CHAIN_OUT - 1) / CHAIN_OUT, tile_kept = L * strips * CHAIN_ROWS * CHAIN_OUT;
  int64_t most = w.in < PANEL_INPUTS ? w.in : PANEL_INPUTS;
  auto* panel = scratch<float, 22>((strips * CHAIN_OUT * steps_of<E>(most) + APART) * L + PANEL_SOON);
  float* kept = most < w.in ? scratch<float, 24>((last - first) * tile_kept) : nullptr;
  float* sums = scratch<float, 23>(strips * STACK);
  for (int64_t part = 0, some; part < w.in; part += some) {
    some = w.in - part < most ? w.in - part : most;
    int64_t steps = steps_of<E>(some);
    fill_panel<E, FROM>(w, from, to, part, some, panel);
    for (int64_t tile = first; tile < last; tile++) {
      int64_t m = x.begin(tile), rows = x.begin(tile + 1) - m;
      Chains c = {panel, x.at(tile, part, steps), steps, strips, kept + (kept ? (tile - first) * tile_kept : 0), sums,
                  !part, part + some == w.in};
      any_chains<E>(rows, c, sizes);
      for (int64_t s = 0, o = from; c.ends && s < strips; s++, o += CHAIN_OUT) {
        const float* own = sums + s * STACK + LEVELS * rows * CHAIN_OUT;
        finish_rows<F>(w, o, to - o < CHAIN_OUT ? to : o + CHAIN_OUT, own, CHAIN_OUT, done + m, rows, y, residual);
      }
    }
  }
}

}  // namespace

// A tile of queries against a block of keys: scores, weights, weighted values. A query's numbers do not depend on the
// others of its tile.

#pragma once

#include <math.h>

#include "functions.h"
#include "inputs.h"

namespace {

constexpr int TILE = 32;        // keys whose scores are at hand together: one bit of a mask word each
constexpr int64_t PIECE = 128;  // keys; threads share those of a query where there are few queries
constexpr int64_t QUERIES = 64;  // that meet the same block of keys, about
constexpr float NONE = -INFINITY;

// Not those of the standard library, whose code would be shared by the instruction sets.
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }
inline float most(float a, float b) { return a < b ? b : a; }
inline void fill(float* p, int64_t n, float f) {
  for (int64_t i = 0; i < n; i++) p[i] = f;
}

// One row: `count` new positions from `start` on, the first of which is `token` among those of all rows; keys from
// `first` to `end` are there to be seen.
struct Row {
  int64_t index, token, count, start, first, end;
};

inline Row row_of(const Attention& a, int64_t b) {
  if (!a.pages) return {b, b * a.S, a.S, a.start, a.first, a.T};
  int64_t token = a.starts[b], count = a.starts[b + 1] - token, end = a.lengths[b];
  return {b, token, count, end - count, 0, end};
}

// Where token t of a row has its key and value, counted in tokens of one kv head.
inline int64_t place_of(const Attention& a, const Row& row, int64_t head, int64_t t) {
  if (!a.pages) return (row.index * a.K + head) * a.capacity + t;
  return (a.pages[row.index * a.page_count + t / a.page_size] * a.page_size + t % a.page_size) * a.K + head;
}

// Positions of a row that meet the keys together.
inline int64_t positions(const Attention& a) { return most((int64_t)1, QUERIES * a.K / a.N); }

// `count` positions of one row from its s-th on, for the query heads of one kv head: in the order group member, position.
struct Tile {
  const Attention& a;
  Row row;
  int64_t head, s, count, group, queries, padded;

  Tile(const Attention& a, const Row& row, int64_t head, int64_t s)
      : a(a),
        row(row),
        head(head),
        s(s),
        count(least(positions(a), row.count - s)),
        group(a.N / a.K),
        queries(group * count),
        padded((a.H + L - 1) / L * L) {}

  // Of its first query among those of all tiles.
  int64_t query() const { return row.token * a.N + (head * row.count + s) * group; }
  // The keys that any of its queries sees.
  int64_t from() const { return a.window ? most(row.first, row.start + s + 1 - a.window) : row.first; }
  int64_t to() const { return a.causal ? row.start + s + count : row.end; }
  // Where the first key of a block or piece stands that holds key t, `forgotten` ones before it counted: below 0 perhaps.
  int64_t aligned(int64_t t, int64_t size) const { return (t + a.forgotten) / size * size - a.forgotten; }
  int64_t pieces() const { return (aligned(to() - 1, PIECE) - aligned(from(), PIECE)) / PIECE + 1; }
};

// The keys and values of a block, each where it lies; the first and the last stand for those that are not there.
struct Block {
  const char *keys[TILE], *values[TILE];

  template <int F>
  void find(const Tile& tile, int64_t t, int64_t count) {
    int64_t bytes = tile.a.H * size_of<F>;
    for (int64_t i = 0; i < TILE; i++) {
      int64_t at = place_of(tile.a, tile.row, tile.head, most((int64_t)0, t + (i < count ? i : count - 1))) * bytes;
      keys[i] = (const char*)tile.a.keys + at, values[i] = (const char*)tile.a.values + at;
    }
  }
};

// Ask for what is needed soon: the processor by itself looks ahead to the end of a page only, which is a few keys.
inline void ask_for(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)p + i);
}

// Which of `count` keys from t on query s of a row may see: a bit each.
uint32_t seen(const Attention& a, const Row& row, int64_t s, int64_t t, int64_t count) {
  int64_t end = row.start + s + 1, from = row.first;
  if (a.causal) count = least(count, end - t);
  if (a.window) from = most(from, end - a.window);
  from = most(from - t, (int64_t)0);
  if (count <= from) return 0;
  uint32_t bits = (count == TILE ? ~0u : (1u << count) - 1) & ~0u << from;
  if (!a.mask) return bits;
  const uint8_t* mask = a.mask + row.index * a.mask_row + s * a.mask_query + t - a.first;
  for (int64_t i = from; i < count; i++) bits &= ~((uint32_t)(mask[i] == 0) << i);
  return bits;
}

// The keys of a block that any of some queries sees, as a range.
struct Range {
  int64_t from = 0, to = 0;

  // bits: of each position of the tile; queries r..r + M.
  Range(const Tile& tile, const uint32_t* bits, int64_t r, int M) {
    uint32_t any = 0;
    for (int m = 0; m < M; m++) any |= bits[(r + m) % tile.count];
    if (any) from = __builtin_ctz(any), to = 32 - __builtin_clz(any);
  }
};

// Whether products are of pairs of bfloat16 numbers, for which the queries need not be widened.
template <int F>
bool in_pairs(int64_t H) {
#if defined(__AVX512BF16__)
  return F == BF16 && H % 32 == 0;
#else
  return false;
#endif
}

// Products of four keys with M queries: scores[m], TILE apart.
template <int F, int M>
inline void dots(const char* const* keys, const void* q, const float* wide_q, int64_t H, float* scores) {
  constexpr int R = 4;
  V acc[M][R];
  UNROLL_NEON for (int m = 0; m < M; m++)
    UNROLL_NEON for (int r = 0; r < R; r++) acc[m][r] = zero();
  int64_t first = 0;  // of the features that are not yet summed
#if defined(__ARM_NEON)
  for (; F != F32 && first + 2 * L <= H; first += 2 * L)
    UNROLL for (int r = 0; r < R; r++) {
      Two key = widen_two<F>((const uint16_t*)at<F>(keys[r], first));
      UNROLL for (int m = 0; m < M; m++) {
        acc[m][r] = fma(key.first, load(wide_q + m * H + first), acc[m][r]);
        acc[m][r] = fma(key.second, load(wide_q + m * H + first + L), acc[m][r]);
      }
    }
#endif
#if defined(__AVX512BF16__)
  if (in_pairs<F>(H)) {
    for (int64_t i = 0; i < H; i += 32) {
      __m512bh x[M];
      for (int m = 0; m < M; m++) x[m] = (__m512bh)_mm512_loadu_si512(at<BF16>(q, m * H + i));
      for (int r = 0; r < R; r++) {
        __m512bh key = (__m512bh)_mm512_loadu_si512(at<BF16>(keys[r], i));
        for (int m = 0; m < M; m++) acc[m][r] = _mm512_dpbf16_ps(acc[m][r], key, x[m]);
      }
    }
  } else
#endif
    for (int64_t i = first; i < H; i += L)
      UNROLL_NEON for (int r = 0; r < R; r++) {
        V key = take<F>(keys[r], i, H);
        UNROLL_NEON for (int m = 0; m < M; m++) acc[m][r] = fma(key, take<F32>(wide_q + m * H, i, H), acc[m][r]);
      }
  UNROLL_NEON for (int m = 0; m < M; m++) store_sums(scores + m * TILE, acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
}

// Products of some keys of a block with M queries: scores[m][i], TILE apart. The first queries fetch the values.
template <int F, int M>
void products(const Block& block, Range some, const void* q, const float* wide_q, int64_t H, bool first,
              float* scores) {
  for (int64_t i = some.from / 4 * 4; i < some.to; i += 4) {
    for (int64_t j = i; first && j < i + 4; j++) ask_for(block.values[j], H * size_of<F>);
    dots<F, M>(block.keys + i, q, wide_q, H, scores + i);
  }
}

// Queries whose products with four keys the registers hold.
constexpr int64_t TOGETHER = L == 8 ? 2 : 4;

template <int F>
void products_of_all(const Tile& tile, const Block& block, const uint32_t* bits, const void* q, const float* wide_q,
                     float* scores) {
  int64_t H = tile.a.H;
  for (int64_t r = 0; r < tile.queries;) {
    int M = (int)least(tile.queries - r, TOGETHER);
    Range some(tile, bits, r, M);
    const void* narrow = at<F>(q, r * H);
    const float* wide = wide_q + r * H;
    float* to = scores + r * TILE;
    switch (M) {
      case 4: products<F, 4>(block, some, narrow, wide, H, r == 0, to); break;
      case 3: products<F, 3>(block, some, narrow, wide, H, r == 0, to); break;
      case 2: products<F, 2>(block, some, narrow, wide, H, r == 0, to); break;
      default: products<F, 1>(block, some, narrow, wide, H, r == 0, to);
    }
    r += M;
  }
}

// Scores of a query, times scale, within -softcap..softcap.
void cap(float* scores, float scale, float softcap) {
  for (int i = 0; i < TILE; i += L) {
    V u = mul(load(scores + i), splat(scale / softcap));
    store(scores + i, mul(hyperbolic_tangent(u), splat(softcap)));
  }
}

// Scores of a query become weights relative to the largest so far; what is hidden weighs nothing. Gives the factor by
// which everything before shrinks. The largest and the sum of a query are best and total.
float weigh(float* scores, uint32_t bits, float scale, float& best, float& total) {
  for (int i = 0; i < TILE; i++)
    if (!(bits >> i & 1)) scores[i] = NONE;
  V top = splat(NONE);
  for (int i = 0; i < TILE; i += L) {
    V s = mul(load(scores + i), splat(scale));
    store(scores + i, s);
    top = larger(top, s);
  }
  float next = most(best, largest(top));
  V sums = zero();
  for (int i = 0; i < TILE; i += L) {
    V p = exponential(sub(load(scores + i), splat(next)));
    store(scores + i, p);
    sums = add(sums, p);
  }
  float shrink = best == NONE ? 0.0f : expf(best - next);
  total = total * shrink + sum(sums);
  best = next;
  return shrink;
}

// sums[m] += weights[m] @ values over some keys of a block, for M queries, W vectors of features from f on. The first of
// all fetches the next block's keys.
template <int F, int M, int W>
void mix_features(const Tile& tile, const Block& block, const Block* next, Range some, const float* weights, int64_t f,
                  float* sums) {
  int64_t H = tile.a.H, padded = tile.padded;
  V acc[M][W];
  UNROLL_NEON for (int m = 0; m < M; m++)
    UNROLL_NEON for (int w = 0; w < W; w++) acc[m][w] = load(sums + m * padded + f + w * L);
  for (int64_t i = some.from; i < some.to; i++) {
    const void* value = block.values[i];
    if (next) ask_for(next->keys[i], H * size_of<F>);
    V wide[W];
#if defined(__ARM_NEON)
    if (f + W * L <= H)
      UNROLL for (int w = 0; w < W; w++) wide[w] = widen<F>(at<F>(value, f + w * L));
    else
#endif
      UNROLL_NEON for (int w = 0; w < W; w++) wide[w] = take<F>(value, f + w * L, H);
    UNROLL_NEON for (int m = 0; m < M; m++) {
      V weight = splat(weights[m * TILE + i]);
      UNROLL_NEON for (int w = 0; w < W; w++) acc[m][w] = fma(weight, wide[w], acc[m][w]);
    }
  }
  UNROLL_NEON for (int m = 0; m < M; m++)
    UNROLL_NEON for (int w = 0; w < W; w++) store(sums + m * padded + f + w * L, acc[m][w]);
}

template <int F, int M>
void mix(const Tile& tile, const Block& block, const Block* next, Range some, const float* weights, float* sums) {
  // Vectors of features whose sums are held in registers for M queries.
  constexpr int WIDE = (M == 8 ? 2 : 4) / (M > 1 && L == 8 ? 2 : 1);
  int64_t f = 0;
  for (; f + WIDE * L <= tile.padded; f += WIDE * L)
    mix_features<F, M, WIDE>(tile, block, f ? nullptr : next, some, weights, f, sums);
  for (; f < tile.padded; f += L) mix_features<F, M, 1>(tile, block, f ? nullptr : next, some, weights, f, sums);
}

template <int F>
void mix_all(const Tile& tile, const Block& block, const Block* next, const uint32_t* bits, const float* weights,
             float* sums) {
  for (int64_t r = 0; r < tile.queries;) {
    int64_t left = tile.queries - r;
    int M = left >= 8 ? 8 : left >= 4 ? 4 : 1;
    Range some(tile, bits, r, M);
    const Block* ahead = r ? nullptr : next;
    const float* from = weights + r * TILE;
    float* to = sums + r * tile.padded;
    if (M == 8)
      mix<F, 8>(tile, block, ahead, some, from, to);
    else if (M == 4)
      mix<F, 4>(tile, block, ahead, some, from, to);
    else
      mix<F, 1>(tile, block, ahead, some, from, to);
    r += M;
  }
}

}  // namespace

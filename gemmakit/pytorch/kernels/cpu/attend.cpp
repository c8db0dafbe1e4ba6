// Norms of heads, rotary positions, the cache's append and attention of a few positions, in one call.
//
// Keys and values are read once for all query heads that share them, in their own format; scores, softmax and sums are
// float32. The keys of one kv head are split over threads, each of which keeps its own largest score, sum of weights
// and weighted values; those are put together at the end (arXiv:1805.02867, arXiv:2205.14135).

#include "inputs.h"
#include "norm.h"

namespace {

constexpr int TILE = 32;        // keys whose scores are at hand together: one bit of a mask word each
constexpr int64_t SPLIT = 128;   // keys that are worth a piece of their own
constexpr int64_t ALONE = 1 << 19;  // products that one thread does sooner than two agree
constexpr float NONE = -INFINITY;

// Not those of the standard library, whose code would be shared by the instruction sets.
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a < b ? b : a; }
inline float most(float a, float b) { return a < b ? b : a; }
inline void fill(float* p, int64_t n, float f) {
  for (int64_t i = 0; i < n; i++) p[i] = f;
}

// One kv head of one row: its R = N / K * S queries, in the order group member, position.
struct Head {
  const Attention& a;
  int64_t row, head, group, queries, padded;

  Head(const Attention& a, int64_t index)
      : a(a),
        row(index / a.K),
        head(index % a.K),
        group(a.N / a.K),
        queries(group * a.S),
        padded((a.H + L - 1) / L * L) {}

  template <int F>
  const void* key(int64_t t) const { return at<F>(a.keys, ((row * a.K + head) * a.capacity + t) * a.H); }
  template <int F>
  const void* value(int64_t t) const { return at<F>(a.values, ((row * a.K + head) * a.capacity + t) * a.H); }
};

// ---- norms and rotary positions --------------------------------------------------------------------------------

// Feature i turns with feature i + H / 2; every product and the sum are rounded, as the module's are.
template <int F>
void rotate(const void* x, const void* cos, const void* sin, int64_t H, void* y) {
  int64_t half = H / 2;
  for (int64_t i = 0; i < half; i += L) {
    V low = take<F>(x, i, half), high = take<F>(at<F>(x, half), i, half);
    V turned_low = mul(sub(zero(), high), take<F>(sin, i, half));
    V turned_high = mul(low, take<F>(at<F>(sin, half), i, half));
    low = mul(low, take<F>(cos, i, half));
    high = mul(high, take<F>(at<F>(cos, half), i, half));
    give<F>(y, i, half, add(rounded<F>(low), rounded<F>(turned_low)));
    give<F>((void*)at<F>(y, half), i, half, add(rounded<F>(high), rounded<F>(turned_high)));
  }
}

// A head's query or key, normed where there is a norm, then turned.
template <int F>
void place(const Attention& a, const Norm& norm, const void* x, const void* cos, const void* sin, void* y) {
  if (norm.weight) {
    void* normed = scratch<float, 3>(a.H);
    norm_row_of<F>(norm)(x, a.H, norm, nullptr, normed);
    x = normed;
  }
  rotate<F>(x, cos, sin, a.H, y);
}

// The new keys and values to their places in the cache; the queries to q (B, K, N / K, S, H).
template <int F>
void append(const Attention& a, void* q) {
  int64_t group = a.N / a.K, bytes = a.H * size_of<F>;
  for (int64_t b = 0; b < a.B; b++)
    for (int64_t s = 0; s < a.S; s++) {
      const void *cos = at<F>(a.cos, b * a.table_row + s * a.H), *sin = at<F>(a.sin, b * a.table_row + s * a.H);
      int64_t token = b * a.S + s, t = a.start + s;
      for (int64_t k = 0; k < a.K; k++) {
        Head h(a, b * a.K + k);
        place<F>(a, a.k_norm, at<F>(a.k, (token * a.K + k) * a.H), cos, sin, (void*)h.key<F>(t));
        std::memcpy((void*)h.value<F>(t), at<F>(a.v, (token * a.K + k) * a.H), bytes);
        for (int64_t g = 0; g < group; g++) {
          int64_t to = ((b * a.K + k) * group + g) * a.S + s;
          const void* query = at<F>(a.q, (token * a.N + k * group + g) * a.H);
          place<F>(a, a.q_norm, query, cos, sin, (void*)at<F>(q, to * a.H));
        }
      }
    }
}

// Ask for what is needed soon: the processor by itself looks ahead to the end of a page only, which is a few keys.
inline void ask_for(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch((const char*)p + i);
}

// ---- one block of keys -----------------------------------------------------------------------------------------

// Which of `count` keys from t on query s of a row may see: a bit each.
uint32_t seen(const Attention& a, int64_t row, int64_t s, int64_t t, int64_t count) {
  if (a.causal) count = least(count, a.start + s + 1 - t);
  if (count <= 0) return 0;
  uint32_t bits = count == TILE ? ~0u : (1u << count) - 1;
  if (!a.mask) return bits;
  const uint8_t* mask = a.mask + row * a.mask_row + s * a.mask_query + t - a.first;
  uint32_t shown = 0;
  for (int64_t i = 0; i < count; i++) shown |= (uint32_t)(mask[i] != 0) << i;
  return bits & shown;
}

// Products of R keys, H apart, with M queries: scores[m][r], TILE apart.
template <int F, int M, int R>
inline void dots(const void* keys, const void* q, const float* wide_q, int64_t H, float* scores) {
  V acc[M][R];
  UNROLL_NEON for (int m = 0; m < M; m++)
    UNROLL_NEON for (int r = 0; r < R; r++) acc[m][r] = zero();
  int64_t first = 0;  // of the features that are not yet summed
#if defined(__ARM_NEON)
  for (; F != F32 && first + 2 * L <= H; first += 2 * L)
    UNROLL for (int r = 0; r < R; r++) {
      Two key = widen_two<F>((const uint16_t*)at<F>(keys, r * H + first));
      UNROLL for (int m = 0; m < M; m++) {
        acc[m][r] = fma(key.first, load(wide_q + m * H + first), acc[m][r]);
        acc[m][r] = fma(key.second, load(wide_q + m * H + first + L), acc[m][r]);
      }
    }
#endif
#if defined(__AVX512BF16__)
  if (F == BF16 && H % 32 == 0) {
    for (int64_t i = 0; i < H; i += 32) {
      __m512bh x[M];
      for (int m = 0; m < M; m++) x[m] = (__m512bh)_mm512_loadu_si512(at<BF16>(q, m * H + i));
      for (int r = 0; r < R; r++) {
        __m512bh key = (__m512bh)_mm512_loadu_si512(at<BF16>(keys, r * H + i));
        for (int m = 0; m < M; m++) acc[m][r] = _mm512_dpbf16_ps(acc[m][r], key, x[m]);
      }
    }
  } else
#endif
    for (int64_t i = first; i < H; i += L)
      UNROLL_NEON for (int r = 0; r < R; r++) {
        V key = take<F>(at<F>(keys, r * H), i, H);
        UNROLL_NEON for (int m = 0; m < M; m++) acc[m][r] = fma(key, take<F32>(wide_q + m * H, i, H), acc[m][r]);
      }
  UNROLL_NEON for (int m = 0; m < M; m++)
    if (R == 4)
      store_sums(scores + m * TILE, acc[m][0], acc[m][R / 4], acc[m][R / 2], acc[m][R - 1]);
    else
      scores[m * TILE] = sum(acc[m][0]);
}

// Products of `count` keys from t on with M queries: scores[m][i], TILE apart. The first queries fetch the values.
template <int F, int M>
void products(const Head& h, const void* q, const float* wide_q, int64_t t, int64_t count, bool first, float* scores) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    if (first) ask_for(h.value<F>(t + i), 4 * h.a.H * size_of<F>);
    dots<F, M, 4>(h.key<F>(t + i), q, wide_q, h.a.H, scores + i);
  }
  for (; i < count; i++) dots<F, M, 1>(h.key<F>(t + i), q, wide_q, h.a.H, scores + i);
}

template <int F>
void products_of_all(const Head& h, const void* q, const float* wide_q, int64_t t, int64_t count, float* scores) {
  int64_t H = h.a.H;
  for (int64_t r = 0; r < h.queries;) {
    const void* narrow = at<F>(q, r * H);
    const float* wide = wide_q + r * H;
    float* to = scores + r * TILE;
    switch (least(h.queries - r, 4)) {
      case 4: products<F, 4>(h, narrow, wide, t, count, r == 0, to); r += 4; break;
      case 3: products<F, 3>(h, narrow, wide, t, count, r == 0, to); r += 3; break;
      case 2: products<F, 2>(h, narrow, wide, t, count, r == 0, to); r += 2; break;
      default: products<F, 1>(h, narrow, wide, t, count, r == 0, to); r += 1; break;
    }
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

// sums[m] += weights[m] @ values over `count` keys from t on, for M queries, W vectors of features from f on. The first
// of all fetches the next block's keys.
template <int F, int M, int W>
void mix_features(const Head& h, const float* weights, int64_t t, int64_t count, int64_t f, bool first, float* sums) {
  V acc[M][W];
  UNROLL_NEON for (int m = 0; m < M; m++)
    UNROLL_NEON for (int w = 0; w < W; w++) acc[m][w] = load(sums + m * h.padded + f + w * L);
  for (int64_t i = 0; i < count; i++) {
    const void* value = h.value<F>(t + i);
    if (first) ask_for(h.key<F>(t + i + TILE), h.a.H * size_of<F>);
    V wide[W];
#if defined(__ARM_NEON)
    if (f + W * L <= h.a.H)
      UNROLL for (int w = 0; w < W; w++) wide[w] = widen<F>(at<F>(value, f + w * L));
    else
#endif
      UNROLL_NEON for (int w = 0; w < W; w++) wide[w] = take<F>(value, f + w * L, h.a.H);
    UNROLL_NEON for (int m = 0; m < M; m++) {
      V weight = splat(weights[m * TILE + i]);
      UNROLL_NEON for (int w = 0; w < W; w++) acc[m][w] = fma(weight, wide[w], acc[m][w]);
    }
  }
  UNROLL_NEON for (int m = 0; m < M; m++)
    UNROLL_NEON for (int w = 0; w < W; w++) store(sums + m * h.padded + f + w * L, acc[m][w]);
}

template <int F, int M>
void mix(const Head& h, const float* weights, int64_t t, int64_t count, bool first, float* sums) {
  // Vectors of features whose sums are held in registers for M queries.
  constexpr int WIDE = (M == 8 ? 2 : 4) / (M > 1 && L == 8 ? 2 : 1);
  int64_t f = 0;
  for (; f + WIDE * L <= h.padded; f += WIDE * L)
    mix_features<F, M, WIDE>(h, weights, t, count, f, first && f == 0, sums);
  for (; f < h.padded; f += L) mix_features<F, M, 1>(h, weights, t, count, f, first && f == 0, sums);
}

template <int F>
void mix_all(const Head& h, const float* weights, int64_t t, int64_t count, float* sums) {
  int64_t r = 0;
  for (; r + 8 <= h.queries; r += 8) mix<F, 8>(h, weights + r * TILE, t, count, r == 0, sums + r * h.padded);
  for (; r + 4 <= h.queries; r += 4) mix<F, 4>(h, weights + r * TILE, t, count, r == 0, sums + r * h.padded);
  for (; r < h.queries; r++) mix<F, 1>(h, weights + r * TILE, t, count, r == 0, sums + r * h.padded);
}

// ---- one piece of the keys, and all pieces together ------------------------------------------------------------

// What a piece found: best and total (R) each, sums (R, padded).
struct Found {
  float *best, *total, *sums;

  Found(float* room, const Head& h, int64_t index) {
    room += index * h.queries * (h.padded + 2);
    best = room, total = room + h.queries, sums = total + h.queries;
  }
};

template <int F>
void look(const Head& h, const void* q, const float* wide_q, int64_t from, int64_t to, const Found& out) {
  fill(out.best, h.queries, NONE);
  fill(out.total, h.queries * (h.padded + 1), 0.0f);
  float* scores = scratch<float, 1>(h.queries * TILE);
  for (int64_t t = from; t < to; t += TILE) {
    int64_t count = least(TILE, to - t);
    uint32_t bits[MAX_ROWS], any = 0;
    for (int64_t s = 0; s < h.a.S; s++) any |= bits[s] = seen(h.a, h.row, s, t, count);
    if (!any) continue;
    products_of_all<F>(h, q, wide_q, t, count, scores);
    for (int64_t r = 0; r < h.queries; r++) {
      float* own = scores + r * TILE;
      uint32_t shown = bits[r % h.a.S];
      if (!shown) {
        fill(own, TILE, 0.0f);
        continue;
      }
      if (h.a.softcap) cap(own, h.a.scale, h.a.softcap);
      float shrink = weigh(own, shown, h.a.softcap ? 1.0f : h.a.scale, out.best[r], out.total[r]);
      if (shrink != 1.0f)
        for (int64_t f = 0; f < h.padded; f += L)
          store(out.sums + r * h.padded + f, mul(load(out.sums + r * h.padded + f), splat(shrink)));
    }
    mix_all<F>(h, scores, t, count, out.sums);
  }
}

// The weighted values of all pieces over the sum of all weights; zeros for a query that saw nothing.
template <int F>
void put_together(const Head& h, float* room, int64_t first, int64_t pieces) {
  Found out(room, h, first);
  for (int64_t r = 0; r < h.queries; r++) {
    int64_t s = r % h.a.S, n = h.head * h.group + r / h.a.S;
    float best = NONE, total = 0.0f;
    for (int64_t p = 0; p < pieces; p++) best = most(best, Found(room, h, first + p).best[r]);
    for (int64_t p = 0; p < pieces; p++) {
      Found one(room, h, first + p);
      if (one.total[r] == 0.0f) continue;  // it saw nothing
      V share = splat(pieces == 1 ? 1.0f : expf(one.best[r] - best));
      total += one.total[r] * (pieces == 1 ? 1.0f : expf(one.best[r] - best));
      float *from = one.sums + r * h.padded, *to = out.sums + r * h.padded;
      for (int64_t f = 0; f < h.padded; f += L) {
        V more = mul(load(from + f), share);
        store(to + f, p ? add(load(to + f), more) : more);
      }
    }
    bool blind = total == 0.0f || (h.a.blind && h.a.blind[h.row * h.a.blind_row + s * h.a.blind_query]);
    V factor = splat(blind ? 0.0f : 1.0f / total);
    void* y = (void*)at<F>(h.a.y, ((h.row * h.a.S + s) * h.a.N + n) * h.a.H);
    for (int64_t f = 0; f < h.a.H; f += L)
      give<F>(y, f, h.a.H, blind ? zero() : mul(load(out.sums + r * h.padded + f), factor));
  }
}

template <int F>
int run(const Attention& a) {
  int64_t features = a.B * a.S * a.N * a.H, heads = a.B * a.K, keys = a.T - a.first;
  void* q = scratch<float, 0>(2 * features);
  float* wide_q = (float*)q + features;
  append<F>(a, q);
  widen_all<F>(q, wide_q, features);
  int threads = features * keys < ALONE ? 1 : a.threads;
  int64_t pieces = threads == 1 ? 1 : most((int64_t)1, least(4 * threads / heads, keys / SPLIT));
  int64_t each = ((keys + pieces - 1) / pieces + TILE - 1) / TILE * TILE;
  Head any(a, 0);
  float* room = scratch<float, 2>(heads * pieces * any.queries * (any.padded + 2));
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < heads * pieces; i++) {
    Head h(a, i / pieces);
    int64_t own = i / pieces * h.queries * a.H, from = a.first + i % pieces * each;
    look<F>(h, at<F>(q, own), wide_q + own, from, least(from + each, a.T), Found(room, h, i));
  }
  for (int64_t i = 0; i < heads; i++) put_together<F>(Head(a, i), room, i * pieces, pieces);
  return 0;
}

bool known(const Norm& norm) { return !norm.weight || norm_row_of<F32>(norm); }

}  // namespace

extern "C" int NATIVE(gemmakit_attend)(const Attention* a) {
  bool sound = a->B >= 1 && a->S >= 1 && a->B * a->S <= MAX_ROWS && a->K >= 1 && a->N % a->K == 0 && a->H % 2 == 0 &&
               a->first >= 0 && a->first <= a->start && a->start + a->S <= a->T && a->T <= a->capacity;
  if (!sound || !known(a->q_norm) || !known(a->k_norm)) return 1;
  switch (a->format) {
    case BF16: return run<BF16>(*a);
    case F16: return run<F16>(*a);
    case F32: return run<F32>(*a);
  }
  return 1;
}

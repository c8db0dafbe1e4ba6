// Norms of heads, rotary positions, the cache's append and attention, in one call: of a few positions of rows that stand
// side by side, or of any number in pages.
//
// Keys and values are read once for all query heads that share them, in their own format; scores, softmax and sums are
// float32. A query's keys are looked at in blocks and pieces that begin at fixed places, each piece with its own largest
// score, sum of weights and weighted values; those are put together in order (arXiv:1805.02867, arXiv:2205.14135). So a
// query's result is the same to the bit whichever others are asked with it, and on any number of threads.

#include "attend_block.h"
#include "norm.h"

namespace {

constexpr int64_t ALONE = 1 << 19;  // products that one thread does sooner than two agree
constexpr int64_t ROOM = 1 << 24;   // numbers that pieces may keep until all of a query's are there

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

// A head's query or key, normed where there is a norm, then turned; a query that is both already comes without cos.
template <int F>
void place(const Attention& a, const Norm& norm, const void* x, const void* cos, const void* sin, void* y) {
  if (!a.cos) {
    std::memcpy(y, x, a.H * size_of<F>);
    return;
  }
  if (norm.weight) {
    void* normed = scratch<float, 3>(a.H);
    norm_row_of<F>(norm)(x, a.H, norm, nullptr, normed);
    x = normed;
  }
  rotate<F>(x, cos, sin, a.H, y);
}

template <int F>
void place_value(const Attention& a, const void* x, void* y) {
  if (a.v_norm.weight)
    norm_row_of<F>(a.v_norm)(x, a.H, a.v_norm, nullptr, y);
  else
    std::memcpy(y, x, a.H * size_of<F>);
}

// The new keys and values of a token, where there are any, to their places in the cache; its queries to q, a tile after
// the other.
template <int F>
void append(const Attention& a, const Row& row, int64_t s, void* q) {
  int64_t group = a.N / a.K, token = row.token + s;
  int64_t turn = a.pages ? token * a.H : row.index * a.table_row + s * a.H;
  const void *cos = at<F>(a.cos, turn), *sin = at<F>(a.sin, turn);
  for (int64_t k = 0; k < a.K; k++) {
    int64_t to = place_of(a, row, k, row.start + s) * a.H;
    if (a.k) {
      place<F>(a, a.k_norm, at<F>(a.k, (token * a.K + k) * a.H), cos, sin, (void*)at<F>(a.keys, to));
      place_value<F>(a, at<F>(a.v, (token * a.K + k) * a.H), (void*)at<F>(a.values, to));
    }
    Tile tile(a, row, k, s / positions(a) * positions(a));
    for (int64_t g = 0; g < group; g++) {
      const void* query = at<F>(a.q, (token * a.N + k * group + g) * a.H);
      place<F>(a, a.q_norm, query, cos, sin, (void*)at<F>(q, (tile.query() + g * tile.count + s - tile.s) * a.H));
    }
  }
}

template <int F>
void append_all(const Attention& a, int64_t tokens, void* q, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t token = 0; token < tokens; token++) {
    int64_t b = a.pages ? 0 : token / a.S;
    while (a.pages && a.starts[b + 1] <= token) b++;
    Row row = row_of(a, b);
    append<F>(a, row, token - row.token, q);
  }
}

// ---- one piece of the keys, and all pieces together ------------------------------------------------------------

// What was found for a tile's queries: best and total (R) each, sums (R, padded).
struct Found {
  float *best, *total, *sums;

  static int64_t size(const Tile& tile) { return tile.queries * (tile.padded + 2); }

  Found(float* room, const Tile& tile)
      : best(room), total(room + tile.queries), sums(room + 2 * tile.queries) {}

  void clear(const Tile& tile) const {
    fill(best, tile.queries, NONE);
    fill(total, tile.queries * (tile.padded + 1), 0.0f);
  }

  // After this the next piece's.
  void add_piece(const Tile& tile, const Found& next) const {
    for (int64_t r = 0; r < tile.queries; r++) {
      if (next.total[r] == 0.0f) continue;  // it saw nothing
      float top = most(best[r], next.best[r]);
      float before = total[r] == 0.0f ? 0.0f : expf(best[r] - top), after = expf(next.best[r] - top);
      best[r] = top;
      total[r] = total[r] * before + next.total[r] * after;
      float *to = sums + r * tile.padded, *from = next.sums + r * tile.padded;
      for (int64_t f = 0; f < tile.padded; f += L)
        store(to + f, add(mul(load(to + f), splat(before)), mul(load(from + f), splat(after))));
    }
  }
};

// The keys of one piece, those of a tile's p-th.
template <int F>
void look(const Tile& tile, int64_t p, const void* q, const float* wide_q, const Found& out) {
  int64_t begin = tile.aligned(tile.from(), PIECE) + p * PIECE, to = least(begin + PIECE, tile.to());
  int64_t from = most(begin, tile.aligned(tile.from(), TILE));
  out.clear(tile);
  float* scores = scratch<float, 1>(tile.queries * TILE);
  Block blocks[2];
  blocks[0].find<F>(tile, from, least(TILE, to - from));
  for (int64_t t = from, i = 0; t < to; t += TILE, i ^= 1) {
    int64_t count = least(TILE, to - t), left = least(TILE, to - t - TILE);
    if (left > 0) blocks[i ^ 1].find<F>(tile, t + TILE, left);
    uint32_t bits[QUERIES], any = 0;
    for (int64_t s = 0; s < tile.count; s++) any |= bits[s] = seen(tile.a, tile.row, tile.s + s, t, count);
    if (!any) continue;
    products_of_all<F>(tile, blocks[i], bits, q, wide_q, scores);
    for (int64_t r = 0; r < tile.queries; r++) {
      float* own = scores + r * TILE;
      uint32_t shown = bits[r % tile.count];
      if (!shown) {
        fill(own, TILE, 0.0f);
        continue;
      }
      if (tile.a.softcap) cap(own, tile.a.scale, tile.a.softcap);
      float shrink = weigh(own, shown, tile.a.softcap ? 1.0f : tile.a.scale, out.best[r], out.total[r]);
      if (shrink != 1.0f)
        for (int64_t f = 0; f < tile.padded; f += L)
          store(out.sums + r * tile.padded + f, mul(load(out.sums + r * tile.padded + f), splat(shrink)));
    }
    mix_all<F>(tile, blocks[i], left > 0 ? &blocks[i ^ 1] : nullptr, bits, scores, out.sums);
  }
}

// The weighted values over the sum of all weights; zeros for a query that saw nothing.
template <int F>
void finish(const Tile& tile, const Found& all) {
  const Attention& a = tile.a;
  for (int64_t r = 0; r < tile.queries; r++) {
    int64_t s = tile.s + r % tile.count, n = tile.head * tile.group + r / tile.count;
    bool blind = all.total[r] == 0.0f || (a.blind && a.blind[tile.row.index * a.blind_row + s * a.blind_query]);
    V factor = splat(blind ? 0.0f : 1.0f / all.total[r]);
    void* y = (void*)at<F>(a.y, ((tile.row.token + s) * a.N + n) * a.H);
    for (int64_t f = 0; f < a.H; f += L)
      give<F>(y, f, a.H, blind ? zero() : mul(load(all.sums + r * tile.padded + f), factor));
  }
}

// All pieces of a tile, one after the other.
template <int F>
void look_at_all(const Tile& tile, const void* q, const float* wide_q) {
  int64_t size = Found::size(tile);
  float* room = scratch<float, 2>(2 * size);
  Found all(room, tile), piece(room + size, tile);
  look<F>(tile, 0, q, wide_q, all);
  for (int64_t p = 1; p < tile.pieces(); p++) {
    look<F>(tile, p, q, wide_q, piece);
    all.add_piece(tile, piece);
  }
  finish<F>(tile, all);
}

struct Job {
  int64_t row, head, s, piece, room;  // room: where among the numbers that pieces keep
};

// A job a tile, or a piece of one.
int64_t list_jobs(const Attention& a, bool split, Job* jobs, int64_t& room) {
  int64_t count = 0;
  room = 0;
  for (int64_t b = 0; b < a.B; b++) {
    Row row = row_of(a, b);
    for (int64_t s = 0; s < row.count; s += positions(a))
      for (int64_t k = 0; k < a.K; k++) {
        Tile tile(a, row, k, s);
        for (int64_t p = 0; p < (split ? tile.pieces() : 1); p++, count++) {
          if (jobs) jobs[count] = {b, k, s, p, room};
          room += Found::size(tile);
        }
      }
  }
  return count;
}

template <int F>
int run(const Attention& a) {
  int64_t tokens = a.pages ? a.starts[a.B] : a.B * a.S, features = tokens * a.N * a.H, keys = 0, room;
  for (int64_t b = 0; b < a.B; b++) keys = most(keys, row_of(a, b).end);
  int threads = features * (a.window ? least(a.window, keys) : keys) < ALONE ? 1 : a.threads;
  void* q = scratch<float, 0>(2 * features);
  float* wide_q = (float*)q + features;
  append_all<F>(a, tokens, q, threads);
  bool split = list_jobs(a, false, nullptr, room) < 4 * threads && threads > 1;
  int64_t count = list_jobs(a, split, nullptr, room);
  if (split && room > ROOM) split = false, count = list_jobs(a, false, nullptr, room);
  Job* jobs = (Job*)scratch<int64_t, 0>(count * sizeof(Job) / sizeof(int64_t));
  list_jobs(a, split, jobs, room);
  float* kept = split ? scratch<float, 4>(room) : nullptr;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t token = 0; token < (in_pairs<F>(a.H) ? 0 : tokens); token++)
      widen_all<F>(at<F>(q, token * a.N * a.H), wide_q + token * a.N * a.H, a.N * a.H);
#pragma omp for schedule(dynamic, 1)
    for (int64_t i = 0; i < count; i++) {
      Job job = jobs[count - 1 - i];  // the last see most
      Tile tile(a, row_of(a, job.row), job.head, job.s);
      const void* own = at<F>(q, tile.query() * a.H);
      const float* wide = wide_q + tile.query() * a.H;
      if (split)
        look<F>(tile, job.piece, own, wide, Found(kept + job.room, tile));
      else
        look_at_all<F>(tile, own, wide);
    }
  }
  for (int64_t i = 0; split && i < count; i++) {
    Tile tile(a, row_of(a, jobs[i].row), jobs[i].head, jobs[i].s);
    Found all(kept + jobs[i].room, tile);
    while (i + 1 < count && jobs[i + 1].piece) all.add_piece(tile, Found(kept + jobs[++i].room, tile));
    finish<F>(tile, all);
  }
  return 0;
}

bool known(const Norm& norm) { return !norm.weight || norm_row_of<F32>(norm); }

// Where the new tokens of rows of one length go, and what they see.
bool in_rows(const Attention& a) {
  return a.S >= 1 && a.B * a.S <= MAX_ROWS && a.first >= 0 && a.first <= a.start && a.start + a.S <= a.T &&
         a.T <= a.capacity && a.cos && !a.window && a.forgotten >= 0;
}

bool in_pages(const Attention& a) {
  bool sound = a.page_size >= 1 && a.causal && !a.mask && !a.blind && a.window >= 0 && !a.forgotten && a.starts[0] == 0;
  for (int64_t b = 0; sound && b < a.B; b++) {
    int64_t count = a.starts[b + 1] - a.starts[b];
    sound = count >= 1 && count <= a.lengths[b] && a.lengths[b] <= a.page_count * a.page_size;
  }
  return sound;
}

}  // namespace

extern "C" int NATIVE(gemmakit_attend)(const Attention* a) {
  bool sound = a->B >= 1 && a->K >= 1 && a->N >= a->K && a->N % a->K == 0 && a->H % 2 == 0 &&
               (!a->k || (a->v && a->cos)) && (a->pages ? in_pages(*a) : in_rows(*a));
  if (!sound || !known(a->q_norm) || !known(a->k_norm) || !known(a->v_norm)) return 1;
  switch (a->format) {
    case BF16: return run<BF16>(*a);
    case F16: return run<F16>(*a);
    case F32: return run<F32>(*a);
  }
  return 1;
}

// y = x @ W^T + bias for any rows of x in bfloat16 by the processor's tiles (AMX): of weights in bfloat16, and of codes,
// which become bfloat16 a panel at a time; x is as it came.
//
// A tile has 16 weight rows or tokens. A sum runs along the inputs in their order, in float32, whatever the other tokens
// are and however many. A few tokens meet plain weights as they lie, as fast as the memory gives them.

#include "expand.h"
#include "outputs.h"
#include "pieces.h"

#if defined(__AMX_BF16__)

namespace {

constexpr int64_t STEP = 32;                  // inputs of a tile
constexpr int64_t SQUARE = STEP * L;          // numbers of it
constexpr int64_t PAIR = 2 * L;               // rows of two
constexpr int64_t DEEP = 1024;                // inputs of a panel
constexpr int64_t PANEL_ROWS = 128;           // and its rows, in the second cache
constexpr int64_t PANEL_NEXT = DEEP + STEP;   // from row to row, which do not meet in the same places of a cache
constexpr int64_t MOST_TOKENS = 512;          // at a time
constexpr int64_t FEW_TOKENS = 64;            // that meet plain weights as they lie
constexpr int64_t SOON = 16;                  // steps before these are read they are asked for
constexpr int64_t SHARE = 1 << 20;            // bytes of a weight that a thread takes at a time

// Whatever a pointer shows is in memory now: a compiler knows of no more than the first bytes that a tile's instruction takes.
inline void seen(const void* p) { asm volatile("" ::"r"(p) : "memory"); }

// The shapes of the thread's tiles, for as long as this is there; whose they were before has them back.
struct TileShapes {
  alignas(64) uint8_t before[64];

  TileShapes() {
    alignas(64) uint8_t own[64] = {1};
    for (int t = 0; t < 8; t++) own[16 + 2 * t] = 64, own[48 + t] = 16;  // bytes of a row, rows
    _tile_storeconfig(before);
    seen(before), seen(own);
    _tile_loadconfig(own);
  }
  ~TileShapes() {
    seen(before);
    _tile_loadconfig(before);
  }
  TileShapes(const TileShapes&) = delete;
};

// x (tiles, steps, STEP / 2, L tokens, 2), zeros behind the last token and the last input.
struct Tokens {
  const uint16_t* x;
  int64_t rows, steps;

  int64_t tiles() const { return (rows + L - 1) / L; }
  const uint16_t* at(int64_t tile, int64_t step) const { return x + (tile * steps + step) * SQUARE; }
};

void fill_tokens(const uint16_t* x, int64_t in, int64_t rows, int64_t steps, uint16_t* to) {
  for (int64_t step = 0; step < steps; step++, to += SQUARE) {
    int64_t left = in - step * STEP, next = in;
    const uint16_t* own = x + step * STEP;
    uint16_t some[L][STEP];
    if (rows < L || left < STEP) {
      std::memset(some, 0, sizeof some);
      for (int t = 0; t < L && t < rows; t++) std::memcpy(some[t], own + t * next, (left < STEP ? left : STEP) * 2);
      own = some[0], next = STEP;
    }
    I v[L];
    UNROLL for (int t = 0; t < L; t++) v[t] = load_bytes(own + t * next);
    turn(v);
    UNROLL for (int t = 0; t < L; t++) std::memcpy(to + t * STEP, v + t, sizeof v[t]);
  }
}

// Of a row in an array of rows, whose part for the next panel is asked for while that for this one is read.
struct Part {
  const uint8_t* at;
  int64_t after;  // from `at` on

  template <int BYTES>
  INLINE void ask(int64_t from) const {
    if (from % 64 < BYTES) __builtin_prefetch(at + after + from, 0, 2);
  }
};

// `count` blocks of a row of codes, from `block` on, as bfloat16; INT8_ROWS without their scale, which their sums get.
template <int FORMAT>
void widen_codes(const Matrix& w, int64_t row, int64_t block, int64_t count, const Part& part, uint16_t* to) {
  constexpr int BYTES = FORMAT == INT4 ? 16 : 32;
  using Own = Group<BF16, FORMAT == INT4 ? INT4 : INT8_ROWS>;
  alignas(64) int8_t bytes[DEEP];
  const uint8_t* codes = part.at;
  int64_t left = w.in - block * BLOCK, same = w.group % FOUR ? 0 : 3;  // of a block's number where a group goes on
  if (is_split(w)) {
    join_codes(w, row, block, count, bytes);
    codes = (const uint8_t*)bytes;
  }
  if (FORMAT != INT4 && left < count * BLOCK) {
    std::memmove(bytes, codes, left);
    std::memset(bytes + left, 0, count * BLOCK - left);
    codes = (const uint8_t*)bytes;
  }
  Groups g = {};
  if (FORMAT != INT8_ROWS) g = groups(w, row);
  for (int64_t first = 0; first < count; first += L) {
    int64_t some = count - first < L ? count - first : L;
    float scale[L], offset[L];
    if (FORMAT != INT8_ROWS) {
      Scales s = scales_of(w, g, block + first, some);
      store(scale, s.scale), store(offset, s.zero);
    }
    Own group{splat(1.0f), zero()};
    for (int64_t b = 0; b < some; b++, codes += BYTES, to += BLOCK) {
      part.ask<BYTES>((first + b) * BYTES);
      if (FORMAT != INT8_ROWS && !(b & same)) group = {splat(scale[b]), splat(offset[b])};
      group.expand(codes, to, L);
    }
  }
}

template <int FORMAT>
void widen_row(const Matrix& w, int64_t row, int64_t step, int64_t steps, const Part& part, uint16_t* to) {
  if constexpr (FORMAT == BF16) {
    int64_t left = w.in - step * STEP, i = 0;
    const uint16_t* own = (const uint16_t*)part.at;
    for (; i < steps && (i + 1) * STEP <= left; i++) {
      part.ask<64>(i * 64);
      std::memcpy(to + i * STEP, own + i * STEP, STEP * 2);
    }
    if (i == steps) return;
    std::memset(to + i * STEP, 0, STEP * 2);
    std::memcpy(to + i * STEP, own + i * STEP, (left - i * STEP) * 2);
  } else {
    widen_codes<FORMAT>(w, row, step, steps, part, to);
  }
}

// Sums (R * L weight rows, T * L tokens), next apart: those of `steps` steps, more what is there where `more` says so.
// ASK: weights are asked for SOON before they are read, at a row's end those of the rows behind.
template <int R, int T, bool ASK>
INLINE void add_tiles(const uint16_t* w, int64_t w_next, const Tokens& x, int64_t tile, int64_t step, int64_t steps,
                      float* sums, int64_t next) {
  const uint16_t *first = x.at(tile, step), *second = x.at(tile + T - 1, step), *below = w + L * w_next;
  float* sums_below = sums + L * next;
  int64_t stride = w_next * 2, sums_stride = next * 4;
  if (step) {
    _tile_loadd(0, sums, sums_stride);
    if (T == 2) _tile_loadd(1, sums + L, sums_stride);
    if (R == 2) _tile_loadd(2, sums_below, sums_stride);
    if (R * T == 4) _tile_loadd(3, sums_below + L, sums_stride);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int64_t i = 0; i < steps; i++) {
    if (ASK) {
      const uint16_t* soon = w + (i + SOON) * STEP + (i + SOON < steps ? 0 : R * L * w_next - steps * STEP);
      UNROLL for (int r = 0; r < R * L; r++) __builtin_prefetch(soon + r * w_next, 0, 2);
    }
    _tile_loadd(4, w + i * STEP, stride);
    _tile_loadd(6, first + i * SQUARE, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (T == 2) {
      _tile_loadd(7, second + i * SQUARE, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (R == 2) {
      _tile_loadd(5, below + i * STEP, stride);
      _tile_dpbf16ps(2, 5, 6);
    }
    if (R * T == 4) _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, sums, sums_stride);
  if (T == 2) _tile_stored(1, sums + L, sums_stride);
  if (R == 2) _tile_stored(2, sums_below, sums_stride);
  if (R * T == 4) _tile_stored(3, sums_below + L, sums_stride);
}

// R * L weight rows against all tokens.
template <int R, bool ASK>
void add_rows(const uint16_t* w, int64_t w_next, const Tokens& given, int64_t step, int64_t steps, float* sums,
              int64_t next) {
  const Tokens x = given;
  int64_t tile = 0, tiles = x.tiles();
  if (tiles >= 2) add_tiles<R, 2, ASK>(w, w_next, x, 0, step, steps, sums, next), tile = 2;
  for (; tile + 2 <= tiles; tile += 2) add_tiles<R, 2, false>(w, w_next, x, tile, step, steps, sums + tile * L, next);
  if (tile < tiles) add_tiles<R, 1, ASK>(w, w_next, x, tile, step, steps, sums + tile * L, next);
}

template <int FORMAT>
void multiply_piece(const Matrix& w, const Tokens& x, int64_t from, int64_t to, void* y, const void* residual) {
  int64_t rows = to - from, row = row_bytes(w), next = x.tiles() * L + L;
  const uint8_t* own = (const uint8_t*)w.codes + from * row;
  float* sums = scratch<float, 30>((rows + PAIR) * next);
  if (FORMAT == BF16 && x.rows <= FEW_TOKENS && rows % L == 0 && w.in % STEP == 0) {
    for (int64_t r = 0; r < rows; r += L)
      add_rows<1, true>((const uint16_t*)(own + r * row), w.in, x, 0, x.steps, sums + r * next, next);
  } else {
    uint16_t* panel = scratch<uint16_t, 30>((PANEL_ROWS + PAIR) * PANEL_NEXT);
    for (int64_t step = 0, some; step < x.steps; step += some) {
      some = x.steps - step < DEEP / STEP ? x.steps - step : DEEP / STEP;
      int64_t here = bytes_before(w, step * STEP);
      int64_t after = step + some < x.steps ? bytes_before(w, (step + some) * STEP) : rows * row;
      for (int64_t r = 0; r < rows; r++) {
        Part part = {own + r * row + here, after - here};
        widen_row<FORMAT>(w, from + r, step, some, part, panel + r * PANEL_NEXT);
      }
      seen(panel);
      for (int64_t r = 0; r < rows; r += PAIR)
        add_rows<2, false>(panel + r * PANEL_NEXT, PANEL_NEXT, x, step, some, sums + r * next, next);
    }
  }
  finish_all<BF16, FORMAT>(w, from, to, 0, x.rows, sums, next, y, residual);
}

auto piece_of(const Matrix& w) {
  switch (w.format) {
    case BF16: return multiply_piece<BF16>;
    case INT4: return multiply_piece<INT4>;
    case INT8_ROWS: return multiply_piece<INT8_ROWS>;
  }
  return multiply_piece<INT8_GROUPS>;
}

// Weight rows of a piece: of a panel, or fewer where a tile of tokens leaves them no second meeting, or where else some
// threads would have none.
int64_t rows_each(const Matrix* w, int count, int64_t tokens, int threads) {
  int64_t all = 0, each = tokens <= L ? PAIR : PANEL_ROWS;
  for (int i = 0; i < count; i++) all += w[i].out;
  while (each > PAIR && all / each < 4 * threads) each /= 2;
  return each;
}

void multiply_some(const Matrix* w, int count, const uint16_t* x, int64_t rows, int64_t done, void* const* y,
                   const void* residual, int threads) {
  Tokens t = {nullptr, rows, (w->in + STEP - 1) / STEP};
  uint16_t* room = scratch<uint16_t, 31>(t.tiles() * t.steps * SQUARE);
  t.x = room;
  Pieces pieces(w, count, threads, rows_each(w, count, rows, threads));
  // What a piece asks for at its end is the beginning of the next: those of a thread are beside each other.
  int64_t bytes = row_bytes(*w) * pieces.rows_each[0], most = pieces.total / (8 * threads), share = SHARE / bytes;
  share = share < most ? share : most;
#pragma omp parallel num_threads(threads) if (rows * w->out * w->in > 1 << 18)
  {
    TileShapes shapes;
#pragma omp for schedule(static)
    for (int64_t i = 0; i < t.tiles(); i++)
      fill_tokens(x + i * L * w->in, w->in, rows - i * L, t.steps, room + i * t.steps * SQUARE);
    seen(room);
#pragma omp for schedule(dynamic, share < 1 ? 1 : share) nowait
    for (int64_t p = 0; p < pieces.total; p++) {
      Piece piece = pieces[p];
      const Matrix& own = w[piece.matrix];
      piece_of(own)(own, t, piece.from, piece.to, (char*)y[piece.matrix] + done * own.out * 2, residual);
    }
  }
}

}  // namespace

extern "C" int NATIVE(project_tiles)(const Matrix* m, int count, int, const void* x, int64_t rows, void* const* y,
                                     const void* residual, int threads) {
  int64_t parts = (rows + MOST_TOKENS - 1) / MOST_TOKENS, each = ((rows + parts - 1) / parts + PAIR - 1) / PAIR * PAIR;
  for (int64_t done = 0; done < rows; done += each)
    multiply_some(m, count, (const uint16_t*)x + done * m->in, rows - done < each ? rows - done : each, done, y,
                  residual ? (const uint16_t*)residual + done * m->out : nullptr, threads);
  return 0;
}

#else

extern "C" int NATIVE(project_tiles)(const Matrix*, int, int, const void*, int64_t, void* const*, const void*, int) {
  return 1;
}

#endif

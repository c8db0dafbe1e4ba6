// How weights that share x are handed out to threads.

#pragma once

#include "native.h"

namespace {

constexpr int64_t PIECE_ROWS = 512;  // at most

inline int64_t row_bytes(const Matrix& w) {
  switch (w.format) {
    case F32: return w.in * 4;
    case INT8_ROWS: case INT8_GROUPS: return w.in;
    case INT4: return (w.in + 31) / 32 * 16;
    case INT5: return (w.in + 127) / 128 * 80;
    case INT6: return (w.in + 127) / 128 * 96;
  }
  return w.in * 2;
}

// Of a row's first inputs, whole groups of those whose codes lie together.
inline int64_t bytes_before(Matrix w, int64_t inputs) {
  w.in = inputs;
  return row_bytes(w);
}

struct Piece {
  int matrix;
  int64_t from, to;
};

// Handed out as threads ask: a thread that the system pauses holds up one piece, not its share of the matrix. Large
// enough for the memory to be read in long runs, small enough for every thread to get several.
inline int64_t piece_bytes(const Matrix* w, int count, int threads) {
  int64_t all = 0, most = 1 << 19, least = 1 << 15;
  for (int i = 0; i < count; i++) all += w[i].out * row_bytes(w[i]);
  int64_t share = all / (8 * threads);
  return share > most ? most : share < least ? least : share;
}

struct Pieces {
  const Matrix* w;
  int count;
  int64_t rows_each[16], ends[16], total = 0;

  // Of so many rows, or where that is 0 as many as `piece_bytes` says.
  Pieces(const Matrix* w, int count, int threads, int64_t rows = 0) : w(w), count(count) {
    int64_t bytes = piece_bytes(w, count, threads);
    for (int i = 0; i < count; i++) {
      int64_t each = rows ? rows : bytes / row_bytes(w[i]) / 4 * 4;
      each = each < 4 ? 4 : each > PIECE_ROWS ? PIECE_ROWS : each;
      rows_each[i] = each;
      ends[i] = total += (w[i].out + each - 1) / each;
    }
  }

  Piece operator[](int64_t p) const {
    int i = 0;
    while (p >= ends[i]) i++;
    int64_t from = (p - (i ? ends[i - 1] : 0)) * rows_each[i];
    int64_t to = from + rows_each[i];
    return {i, from, to < w[i].out ? to : w[i].out};
  }
};

}  // namespace

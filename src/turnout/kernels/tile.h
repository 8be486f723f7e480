// The one loop that multiplies: a tile of at most TILE_ROWS x TILE_COLUMNS sums, kept in registers over the whole depth.
//
// Goto & van de Geijn 2008, "Anatomy of high-performance matrix multiplication", with the rows' side left unpacked:
// blocks (block.h) have a fixed step between rows, so that one register addresses all rows of a tile.
#pragma once

#include <algorithm>
#include <cstddef>
#include <utility>

#include "block.h"
#include "lanes.h"

namespace turnout {

enum Put { SET, ADD, STREAM };

constexpr int PACKED = 16;  // from a row to the next of a tile's columns, packed; no more than the gap after a chunk
static_assert(PACKED >= TILE_ROWS && PACKED <= STEP - CHUNK, "a row of packed columns is copied whole");

struct Product {
  const float* a;           // first value of the tile's rows (or columns) in a block
  long a_chunk;             // from a chunk of the block to the next
  const float* b;           // TILE_COLUMNS values for each step of the depth
  long b_step;
  int chunks, length, last; // the depth: chunks of `length`, the last of `last`
  const char* ahead;        // memory to fetch meanwhile, two lines for eight steps
  long ahead_step;          // in bytes
};

template <int M, int ROW>
inline __attribute__((always_inline)) void add_step(vec (&sum)[M][2], const float* a, const float* b) {
  const vec left = load(b), right = load(b + LANES);
  // from the second cache to the first: packed columns lie together, those of a block a row apart
  __builtin_prefetch(b + (ROW == 1 ? 8 * STEP : 12 * TILE_COLUMNS));
  __builtin_prefetch(b + (ROW == 1 ? 8 * STEP : 12 * TILE_COLUMNS) + LANES);
#pragma GCC unroll 16
  for (int i = 0; i < M; i++) {
    const float x = a[i * ROW];
    sum[i][0] += x * left;
    sum[i][1] += x * right;
  }
}

// ROW: from one value of the tile's M to the next; DEPTH: from a step of the depth to the next.
template <int M, int ROW, int DEPTH>
__attribute__((noinline)) void tile(const Product& product, float* c, long c_step, Put put) {
  vec sum[M][2] = {};
  const float* b = product.b;
  const long b_step = product.b_step, ahead_step = product.ahead_step;
  const char* ahead = product.ahead;
  for (int chunk = 0; chunk < product.chunks; chunk++) {
    const float* a = product.a + chunk * product.a_chunk;
    const int depth = chunk + 1 < product.chunks ? product.length : product.last;
    int k = 0;
    for (; k + 2 <= depth; k += 2) {
      if ((k & 6) == 0) {
        __builtin_prefetch(ahead, 0, 2);
        __builtin_prefetch(ahead + 64, 0, 2);
        ahead += ahead_step;
      }
      add_step<M, ROW>(sum, a, b);
      add_step<M, ROW>(sum, a + DEPTH, b + b_step);
      a += 2 * DEPTH;
      b += 2 * b_step;
    }
    if (k < depth) {
      add_step<M, ROW>(sum, a, b);
      b += b_step;
    }
  }
  if (put == ADD) {
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
      sum[i][0] += load(c + i * c_step);
      sum[i][1] += load(c + i * c_step + LANES);
    }
  }
  if (put == STREAM) {
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
      stream(c + i * c_step, sum[i][0]);
      stream(c + i * c_step + LANES, sum[i][1]);
    }
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
      store(c + i * c_step, sum[i][0]);
      store(c + i * c_step + LANES, sum[i][1]);
    }
  }
}

typedef void (*Tile)(const Product&, float*, long, Put);

template <int ROW, int DEPTH, size_t... I>
inline Tile tile_of(int rows, std::index_sequence<I...>) {
  static const Tile table[] = {tile<int(I) + 1, ROW, DEPTH>...};
  return table[rows - 1];
}

typedef std::make_index_sequence<TILE_ROWS> Heights;

// Rows of a block by packed columns.
inline Tile rows_tile(int rows) { return tile_of<STEP, 1>(rows, Heights()); }
// Columns of a block, packed, by columns of another: the depth is their rows.
inline Tile columns_tile(int columns) { return tile_of<1, PACKED>(columns, Heights()); }

// A tile of which only the first `columns` are wanted.
inline void put_tile(Tile tile, const Product& product, int rows, int columns, float* c, long c_step, Put put) {
  if (columns == TILE_COLUMNS) return tile(product, c, c_step, put);
  alignas(64) float whole[TILE_ROWS * TILE_COLUMNS];
  tile(product, whole, TILE_COLUMNS, SET);
  for (int i = 0; i < rows; i++)
    for (int j = 0; j < columns; j++) {
      float& out = c[i * c_step + j];
      out = whole[i * TILE_COLUMNS + j] + (put == ADD ? out : 0.0f);
    }
}

// out[i][j] = (or +=) sum over rows of a[row][i] * b[row][j], for two blocks of as many rows; `packed`: rows * PACKED.
inline void multiply_columns(const float* a, long a_columns, const float* b, long b_columns, int rows, float* packed,
                             float* out, long step, Put put) {
  const bool fits = reinterpret_cast<uintptr_t>(out) % sizeof(vec) == 0 && step % LANES == 0;
  if (put == STREAM && !fits) put = SET;
  // a chunk of b stays in the second cache while the columns of a pass
  for (long bc = 0; bc < b_columns; bc += CHUNK)
    for (long ac = 0; ac < a_columns; ac += CHUNK) {
      const int width = std::min<long>(CHUNK, b_columns - bc);
      const Split tiles(std::min<long>(CHUNK, a_columns - ac), TILE_ROWS);
      const float* a_chunk = a + ac / CHUNK * rows * STEP;
      const float* b_chunk = b + bc / CHUNK * rows * STEP;
      for (int t = 0; t < tiles.parts; t++) {
        for (int r = 0; r < rows; r++)
          std::memcpy(packed + r * PACKED, a_chunk + tiles.begin(t) + r * STEP, PACKED * sizeof(float));
        for (int j = 0; j < width; j += TILE_COLUMNS) {
          const Product product = {packed, 0, b_chunk + j, STEP, 1, rows, rows,
                                   reinterpret_cast<const char*>(packed), 0};
          put_tile(columns_tile(tiles.size(t)), product, tiles.size(t), std::min(TILE_COLUMNS, width - j),
                   out + (ac + tiles.begin(t)) * step + bc + j, step, put);
        }
      }
    }
}

}  // namespace turnout

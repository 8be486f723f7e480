// Blocks: rows gathered from a matrix, chunk by chunk of columns; and panels: columns of a weight, side by side.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "lanes.h"

namespace turnout {

constexpr int CHUNK = 256;        // columns of a block that lie together
constexpr int STEP = CHUNK + 16;  // from a row to the next: not a power of two, or all rows would share a cache set

// n things in as few parts of at most `most` as there can be, nearly equal.
struct Split {
  int parts, each, longer;
  Split(int n, int most) : parts((n + most - 1) / most), each(parts ? n / parts : 0), longer(parts ? n % parts : 0) {}
  int begin(int part) const { return part * each + std::min(part, longer); }
  int size(int part) const { return each + (part < longer); }
};

inline long chunks_of(long columns) { return (columns + CHUNK - 1) / CHUNK; }
inline int last_chunk(long columns) { return columns - (chunks_of(columns) - 1) * CHUNK; }
inline long block_size(long rows, long columns) { return chunks_of(columns) * rows * STEP; }

// Row r of the block is row token[r] of x.
inline void gather(float* block, const float* x, long columns, const int32_t* token, int rows) {
  for (int r = 0; r < rows; r++) {
    if (r + 4 < rows)
      for (long c = 0; c < columns; c += 16) __builtin_prefetch(x + token[r + 4] * columns + c, 0, 2);
    for (long c = 0; c < columns; c += CHUNK)
      std::memcpy(block + (c / CHUNK * rows + r) * STEP, x + token[r] * columns + c,
                  std::min<long>(CHUNK, columns - c) * sizeof(float));
  }
}

// panel[k][j] = w[k][j] for j < columns, and zero up to TILE_COLUMNS.
template <class W>
void pack_narrow(float* panel, const W* w, long step, int depth, int columns) {
  for (int k = 0; k < depth; k++)
    for (int j = 0; j < TILE_COLUMNS; j++) panel[k * TILE_COLUMNS + j] = j < columns ? value(w[k * step + j]) : 0.0f;
}

#if defined(__AVX512F__)
struct Picks {
  ints low[4], high[4];
  Picks() {
    for (int bit = 0; bit < 4; bit++)
      for (int lane = 0; lane < LANES; lane++) {
        const int s = 1 << bit;
        low[bit][lane] = lane & s ? LANES + lane - s : lane;
        high[bit][lane] = lane & s ? LANES + lane : lane + s;
      }
  }
};
static const Picks PICKS;
#endif

#if defined(__AVX512F__) && !defined(__clang__)
// Columns to rows of 16 x 16 values, by exchanging ever larger squares (Eklundh 1972).
template <class W>
inline void transpose(float* panel, const W* w, long step) {
  vec row[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) row[i] = load(w + i * step);
#pragma GCC unroll 4
  for (int bit = 0; bit < 4; bit++) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++) {
      if (i & (1 << bit)) continue;
      const vec one = row[i], other = row[i + (1 << bit)];
      row[i] = __builtin_shuffle(one, other, PICKS.low[bit]);
      row[i + (1 << bit)] = __builtin_shuffle(one, other, PICKS.high[bit]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < LANES; i++) store(panel + i * TILE_COLUMNS, row[i]);
}
#define TURNOUT_TRANSPOSES 1
#endif

// panel[k][j] = w[j][k] for j < columns, and zero up to TILE_COLUMNS.
template <class W>
void pack_transposed(float* panel, const W* w, long step, int columns, int depth) {
  for (int j = 0; j < TILE_COLUMNS; j += LANES) {
    int k = 0;
#if defined(TURNOUT_TRANSPOSES)
    if (columns - j >= LANES)
      for (; k + LANES <= depth; k += LANES) transpose(panel + k * TILE_COLUMNS + j, w + j * step + k, step);
#endif
    for (; k < depth; k++)
      for (int lane = 0; lane < LANES; lane++)
        panel[k * TILE_COLUMNS + j + lane] = j + lane < columns ? value(w[(j + lane) * step + k]) : 0.0f;
  }
}

// The panels to come, packed some rows at a time while those before them are multiplied: reading weights costs no time
// of its own. Rows lie a power of two apart more often than not, so no cache could hold many that are only fetched.
template <class W>
class Packer {
 public:
  // Columns [0, columns) of `parts` matrices, as panels one after another.
  void begin(const W* w, long part_step, int parts, long row_step, int depth, int columns, float* panel) {
    w_ = w;
    part_step_ = part_step;
    parts_ = parts;
    row_step_ = row_step;
    depth_ = depth;
    columns_ = columns;
    panel_ = panel;
    next_ = 0;
  }
  void idle() { depth_ = next_ = 0; }
  // So many rows more; those after them are what to fetch meanwhile.
  void pack(int rows) {
    const int end = std::min(next_ + rows, depth_);
    for (int part = 0; part < parts_; part++) {
      float* panel = panel_ + long(part) * depth_ * TILE_COLUMNS;
      const W* w = w_ + part * part_step_;
      if (columns_ == TILE_COLUMNS) {
        for (int k = next_; k < end; k++) {
          store(panel + k * TILE_COLUMNS, load(w + k * row_step_));
          store(panel + k * TILE_COLUMNS + LANES, load(w + k * row_step_ + LANES));
        }
      } else if (next_ < end) {
        pack_narrow(panel + next_ * TILE_COLUMNS, w + next_ * row_step_, row_step_, end - next_, columns_);
      }
    }
    next_ = end;
  }
  void finish() { pack(depth_); }
  int share(int times) const { return (depth_ + times - 1) / times; }
  const char* ahead(int part, int rows) const {
    return reinterpret_cast<const char*>(w_ + (part < parts_ ? part : 0) * part_step_ + (next_ + rows) * row_step_);
  }
  long ahead_step() const { return row_step_ * long(sizeof(W)); }

 private:
  const W* w_ = nullptr;
  float* panel_ = nullptr;
  long part_step_ = 0, row_step_ = 0;
  int parts_ = 0, depth_ = 0, columns_ = TILE_COLUMNS, next_ = 0;
};

}  // namespace turnout

// Products on the matrix unit, summed in float over the whole depth: 32 rows by two tiles of columns.
//
// A float is the sum of three bfloats, of its sign and exponent and eight bits of it each. Of the nine products of two such
// sums six are left: what the other three add is no more than rounding a product to a float does (Henry, Tang and
// Heinecke 2019, "Leveraging the bfloat16 artificial intelligence datatype for higher-precision computations",
// arXiv:1904.06376).
#pragma once

#include "half_block.h"

namespace turnout {

// Sums of a product: those of the first tile of columns, then those of the second.
struct HalfSums {
  alignas(64) float sum[2][UNIT_BLOCK_ROWS][UNIT_ROWS];
};

#if defined(TURNOUT_MATRIX_UNIT)

inline void zero_tiles() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// A plane of up to 32 rows where it is TALL, or of up to 16; one of a panel, of 32 columns where it is WIDE; and the product
// of what was loaded last, to the sums.
template <bool TALL>
inline void load_rows(const bfloat* a) {
  _tile_loadd(4, a, UNIT_BYTES);
  if (TALL) _tile_loadd(5, a + HALF_TILE, UNIT_BYTES);
}
template <bool WIDE>
inline void load_panel(const bfloat* b) {
  _tile_loadd(6, b, UNIT_BYTES);
  if (WIDE) _tile_loadd(7, b + HALF_TILE, UNIT_BYTES);
}
template <bool TALL, bool WIDE>
inline void add_product() {
  _tile_dpbf16ps(0, 4, 6);
  if (WIDE) _tile_dpbf16ps(1, 4, 7);
  if (TALL) _tile_dpbf16ps(2, 5, 6);
  if (TALL && WIDE) _tile_dpbf16ps(3, 5, 7);
}

template <int P, bool TALL, bool WIDE, class Between>
inline void add_groups(const bfloat* a, const bfloat* b, long groups, Between& between) {
  static_assert(P == 1 || P == PLANES, "planes are multiplied one by one");
  constexpr long panel = 2 * HALF_TILE;
  for (long g = 0; g < groups; g++, a += P * HALF_PLANE, b += P * panel) {
    if (P > 1) {
      // five that are above a float's last bit, each with a factor of the one before it, then that of the first planes
      load_rows<TALL>(a + 2 * HALF_PLANE);
      load_panel<WIDE>(b);
      add_product<TALL, WIDE>();
      load_rows<TALL>(a + HALF_PLANE);
      add_product<TALL, WIDE>();
      load_panel<WIDE>(b + panel);
      add_product<TALL, WIDE>();
      load_rows<TALL>(a);
      add_product<TALL, WIDE>();
      load_panel<WIDE>(b + 2 * panel);
      add_product<TALL, WIDE>();
    } else {
      load_rows<TALL>(a);
    }
    load_panel<WIDE>(b);
    add_product<TALL, WIDE>();
    between.go_on();
  }
}

template <int P, bool TALL, bool WIDE, class Between>
inline void multiply_tiles(const bfloat* a, const bfloat* b, long groups, bool add, HalfSums& sums, Between& between) {
  // the compiler does not know that tiles are loaded from what was stored
  asm volatile("" ::: "memory");
  if (add) {
    _tile_loadd(0, sums.sum[0][0], UNIT_BYTES);
    _tile_loadd(1, sums.sum[1][0], UNIT_BYTES);
    _tile_loadd(2, sums.sum[0][UNIT_ROWS], UNIT_BYTES);
    _tile_loadd(3, sums.sum[1][UNIT_ROWS], UNIT_BYTES);
  } else {
    zero_tiles();
  }
  add_groups<P, TALL, WIDE>(a, b, groups, between);
  _tile_stored(0, sums.sum[0][0], UNIT_BYTES);
  if (WIDE) _tile_stored(1, sums.sum[1][0], UNIT_BYTES);
  if (TALL) _tile_stored(2, sums.sum[0][UNIT_ROWS], UNIT_BYTES);
  if (TALL && WIDE) _tile_stored(3, sums.sum[1][UNIT_ROWS], UNIT_BYTES);
}

// sums = (or +=) up to 32 rows of a block from `row` on, times a packed panel. After each group `between` goes on with
// something else.
template <int P, class Between>
inline void multiply_half(const HalfBlock<P>& block, long row, const bfloat* panel, bool add, HalfSums& sums,
                          Between& between) {
  if (block.rows - row > UNIT_ROWS)
    multiply_tiles<P, true, true>(block.at(0, row), panel, block.groups, add, sums, between);
  else
    multiply_tiles<P, false, true>(block.at(0, row), panel, block.groups, add, sums, between);
}

// The same of 32 rows, all groups and so many columns of the panel.
template <int P, class Between>
inline void multiply_columns(const HalfBlock<P>& block, long row, const bfloat* panel, long columns, bool add,
                             HalfSums& sums, Between& between) {
  if (columns > UNIT_ROWS)
    multiply_tiles<P, true, true>(block.at(0, row), panel, block.groups, add, sums, between);
  else
    multiply_tiles<P, true, false>(block.at(0, row), panel, block.groups, add, sums, between);
}

#endif

}  // namespace turnout

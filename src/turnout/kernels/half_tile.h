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

// A plane of up to 32 rows, or of up to 16; one of a panel; and the product of what was loaded last, to the sums.
template <bool BOTH>
inline void load_rows(const bfloat* a) {
  _tile_loadd(4, a, UNIT_BYTES);
  if (BOTH) _tile_loadd(5, a + HALF_TILE, UNIT_BYTES);
}
inline void load_panel(const bfloat* b) {
  _tile_loadd(6, b, UNIT_BYTES);
  _tile_loadd(7, b + HALF_TILE, UNIT_BYTES);
}
template <bool BOTH>
inline void add_product() {
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  if (!BOTH) return;
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

template <int P, bool BOTH>
inline void add_groups(const bfloat* a, const bfloat* b, long groups) {
  static_assert(P == 1 || P == PLANES, "planes are multiplied one by one");
  constexpr long panel = 2 * HALF_TILE;
  for (long g = 0; g < groups; g++, a += P * HALF_PLANE, b += P * panel) {
    if (P > 1) {
      // before the product of the first planes the five that are above a float's last bit, the smallest first
      load_rows<BOTH>(a + 2 * HALF_PLANE);
      load_panel(b);
      add_product<BOTH>();
      load_rows<BOTH>(a);
      load_panel(b + 2 * panel);
      add_product<BOTH>();
      load_rows<BOTH>(a + HALF_PLANE);
      load_panel(b + panel);
      add_product<BOTH>();
      load_panel(b);
      add_product<BOTH>();
      load_rows<BOTH>(a);
      load_panel(b + panel);
      add_product<BOTH>();
    } else {
      load_rows<BOTH>(a);
    }
    load_panel(b);
    add_product<BOTH>();
  }
}

// sums = (or +=) `groups` groups of up to 32 rows of a block from `row` on, times a packed panel.
template <int P>
inline void multiply_half(const HalfBlock<P>& block, long row, const bfloat* panel, long groups, bool add,
                          HalfSums& sums) {
  const bfloat* a = block.at(0, row);
  // the compiler does not know that tiles are loaded from what was stored
  asm volatile("" ::: "memory");
  const bool both = block.rows - row > UNIT_ROWS;
  if (add) {
    _tile_loadd(0, sums.sum[0][0], UNIT_BYTES);
    _tile_loadd(1, sums.sum[1][0], UNIT_BYTES);
    _tile_loadd(2, sums.sum[0][UNIT_ROWS], UNIT_BYTES);
    _tile_loadd(3, sums.sum[1][UNIT_ROWS], UNIT_BYTES);
  } else {
    zero_tiles();
  }
  if (both)
    add_groups<P, true>(a, panel, groups);
  else
    add_groups<P, false>(a, panel, groups);
  _tile_stored(0, sums.sum[0][0], UNIT_BYTES);
  _tile_stored(1, sums.sum[1][0], UNIT_BYTES);
  if (both) {
    _tile_stored(2, sums.sum[0][UNIT_ROWS], UNIT_BYTES);
    _tile_stored(3, sums.sum[1][UNIT_ROWS], UNIT_BYTES);
  }
}

#endif

}  // namespace turnout

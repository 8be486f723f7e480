// Products of bfloat on the matrix unit, summed in float over the whole depth: 32 rows by two tiles of columns.
#pragma once

#include "half_block.h"

namespace turnout {

// Sums of a product: those of the first tile of columns, then those of the second.
struct HalfSums {
  alignas(64) float sum[2][UNIT_BLOCK_ROWS][UNIT_ROWS];
};

#if defined(TURNOUT_MATRIX_UNIT)

// sums = (or +=) `groups` groups of up to 32 rows of a block, times a packed panel.
inline void multiply_half(const bfloat* rows, long group_bytes, const bfloat* panel, long groups, bool both, bool add,
                          HalfSums& sums) {
  const char* a = reinterpret_cast<const char*>(rows);
  if (add) {
    _tile_loadd(0, sums.sum[0][0], UNIT_BYTES);
    _tile_loadd(1, sums.sum[1][0], UNIT_BYTES);
    _tile_loadd(2, sums.sum[0][UNIT_ROWS], UNIT_BYTES);
    _tile_loadd(3, sums.sum[1][UNIT_ROWS], UNIT_BYTES);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  if (both) {
    for (long g = 0; g < groups; g++, a += group_bytes, panel += 2 * HALF_TILE) {
      _tile_loadd(6, panel, UNIT_BYTES);
      _tile_loadd(4, a, UNIT_BYTES);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, panel + HALF_TILE, UNIT_BYTES);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a + UNIT_ROWS * UNIT_BYTES, UNIT_BYTES);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(2, sums.sum[0][UNIT_ROWS], UNIT_BYTES);
    _tile_stored(3, sums.sum[1][UNIT_ROWS], UNIT_BYTES);
  } else {
    for (long g = 0; g < groups; g++, a += group_bytes, panel += 2 * HALF_TILE) {
      _tile_loadd(6, panel, UNIT_BYTES);
      _tile_loadd(4, a, UNIT_BYTES);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, panel + HALF_TILE, UNIT_BYTES);
      _tile_dpbf16ps(1, 4, 7);
    }
  }
  _tile_stored(0, sums.sum[0][0], UNIT_BYTES);
  _tile_stored(1, sums.sum[1][0], UNIT_BYTES);
}

#endif

}  // namespace turnout

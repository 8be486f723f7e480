// The products of int8_tile.h on the processor's matrix unit: the same numbers, bit for bit, in a third of the time.
#pragma once

#include "int8_tile.h"
#include "matrix_unit.h"

namespace turnout {

constexpr int UNIT_LINES = 2 * UNIT_ROWS;  // digits of rows that are multiplied at once

#if defined(TURNOUT_MATRIX_UNIT)

static_assert(GROUP == UNIT_BYTES && QUADS == UNIT_ROWS && PANEL == 32, "a group of a panel is two tiles as it lies");
static_assert(LANES == 16, "every processor with a matrix unit has these vectors");

// Whole sums of one group; of one digit [row][PANEL], of two [digit][row][PANEL].
struct GroupSums {
  alignas(64) int32_t sum[UNIT_LINES][PANEL];
};

// Tiles 0 to 3: what 16 or 32 lines of codes give with a group of a panel. Lines past the last row stand for nothing.
template <int DIGITS>
inline void multiply_group(const int8_t* x, const uint8_t* w, bool both) {
  constexpr long SECOND = DIGITS == 1 ? UNIT_ROWS * GROUP : GROUP;  // the next rows, or the lower digit
  _tile_loadd(6, w, PANEL * 4);
  _tile_loadd(7, w + UNIT_BYTES, PANEL * 4);
  _tile_loadd(4, x, DIGITS * GROUP);
  _tile_zero(0);
  _tile_zero(1);
  _tile_dpbsud(0, 4, 6);
  _tile_dpbsud(1, 4, 7);
  if (!both) return;
  _tile_loadd(5, x + SECOND, DIGITS * GROUP);
  _tile_zero(2);
  _tile_zero(3);
  _tile_dpbsud(2, 5, 6);
  _tile_dpbsud(3, 5, 7);
}

inline void put_sums(GroupSums& sums, bool both) {
  _tile_stored(0, sums.sum[0], PANEL * 4);
  _tile_stored(1, sums.sum[0] + UNIT_ROWS, PANEL * 4);
  if (!both) return;
  _tile_stored(2, sums.sum[UNIT_ROWS], PANEL * 4);
  _tile_stored(3, sums.sum[UNIT_ROWS] + UNIT_ROWS, PANEL * 4);
}

// What code_tile does with its sums.
template <int DIGITS>
inline void add_scaled(const GroupSums& sums, const bfloat* scales, const float* own, int rows, bool fresh, float* out,
                       long out_step) {
  const vec scale[] = {load(scales), load(scales + LANES)};
  const vec low[] = {load(scales + PANEL), load(scales + PANEL + LANES)};
  for (int r = 0; r < rows; r++)
    for (int half = 0; half < 2; half++) {
      ints whole = load_ints(&sums.sum[r][half * LANES]);
      if (DIGITS == 2) whole = (whole << 8) + load_ints(&sums.sum[UNIT_ROWS + r][half * LANES]);
      float* const to = out + r * out_step + half * LANES;
      const vec before = fresh ? vec{} : load(to);
      store(to, before + low[half] * own[2 * r + 1] + __builtin_convertvector(whole, vec) * scale[half] * own[2 * r]);
    }
}

// code_product of up to UNIT_LINES / DIGITS rows; the block of x has room for as many after its last.
template <int DIGITS>
void unit_product(const Codes<DIGITS>& x, long first, int rows, const Panel& panel, float* out, long out_step) {
  GroupSums sums[2];
  const bool both = DIGITS == 2 || rows > UNIT_ROWS;
  multiply_group<DIGITS>(x.codes(0, first), panel.code, both);
  for (int g = 0; g < panel.groups; g++) {
    // the products of the next group under way while these are scaled
    put_sums(sums[g % 2], both);
    const uint8_t* const next = panel.code + (g + 1) * PANEL_BYTES;
    if (g + 1 < panel.groups) multiply_group<DIGITS>(x.codes(g + 1, first), next, both);
    for (long line = 0; panel.fetch && line < PANEL_BYTES; line += 64) __builtin_prefetch(next + AHEAD + line, 0, 2);
    add_scaled<DIGITS>(sums[g % 2], panel.scale + g * 2 * PANEL, x.scales(g, first), rows, g == 0, out, out_step);
  }
}

#else

template <int DIGITS>
void unit_product(const Codes<DIGITS>&, long, int, const Panel&, float*, long) {}

#endif

}  // namespace turnout

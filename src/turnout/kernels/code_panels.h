// Panels of weights of 8 bits: widened to bfloat, scales and all, once for every block of rows.
#pragma once

#include "half_panels.h"
#include "int8_products.h"

namespace turnout {

#if defined(TURNOUT_MATRIX_UNIT)

static_assert(GROUP == HALF_GROUP && PANEL == HALF_PANEL && LANES == UNIT_ROWS, "a group of a panel is two tiles");

// Groups of rows of one matrix from some group on; it has `groups` in all.
struct CodeMatrix {
  const uint8_t *code, *scale;
  const bfloat* base;
  long groups;

  CodeMatrix(const void* codes, const uint8_t* scales, const bfloat* bases, long panel, long groups, long group)
      : code(static_cast<const uint8_t*>(codes) + (panel * groups + group) * PANEL_BYTES),
        scale(scales + (panel * groups + group) * 2 * PANEL),
        base(bases + panel * PANEL),
        groups(groups) {}

  // Of a panel, its groups [0, groups): columns in `first` and `second`, tiles of theirs `step` values apart.
  void widen(long panel, long all, bfloat* first, bfloat* second, long step) const {
    const uint8_t* from = code + panel * groups * PANEL_BYTES;
    const uint8_t* own = scale + panel * groups * 2 * PANEL;
    const vec bases[] = {load(base + panel * PANEL), load(base + panel * PANEL + LANES)};
    for (long g = 0; g < all; g++, from += PANEL_BYTES, own += 2 * PANEL, first += step, second += step) {
      for (long line = 0; line < PANEL_BYTES; line += 64) __builtin_prefetch(from + SOON + line, 0, 3);
      __builtin_prefetch(own + SOON / 16, 0, 3);
      widen_tile(from, own, bases[0], first);
      widen_tile(from + UNIT_BYTES, own + LANES, bases[1], second);
    }
  }

 private:
  static constexpr long SOON = 4096;    // bytes from what is read to what is fetched meanwhile
  static constexpr float EXACT = 32768;  // added to a byte by setting bits: whole numbers follow

  // From four inner columns in each word to pairs of them.
  static void widen_tile(const uint8_t* from, const uint8_t* own, vec base, bfloat* tile) {
    const vec step = scale_of(own, base);
    const vec low = -step * (zero_of(own + PANEL) + EXACT);
#pragma GCC unroll 8
    for (int q = 0; q < QUADS; q++, from += PANEL * 4, tile += 2 * HALF_GROUP) {
      const __m512i four = _mm512_loadu_si512(from);
      put_pair(tile, widen_byte<0>(four) * step + low, widen_byte<1>(four) * step + low);
      put_pair(tile + HALF_GROUP, widen_byte<2>(four) * step + low, widen_byte<3>(four) * step + low);
    }
  }

  // EXACT and byte BYTE of each word.
  template <int BYTE>
  static vec widen_byte(__m512i four) {
    const __m512i place = _mm512_broadcast_i32x4(_mm_setr_epi8(0, BYTE, 0, 0, 0, 4 + BYTE, 0, 0, 0, 8 + BYTE, 0, 0, 0,
                                                               12 + BYTE, 0, 0));
    return (vec)_mm512_mask_shuffle_epi8(_mm512_set1_epi32(0x47000000), 0x2222222222222222, four, place);
  }

  static void put_pair(bfloat* to, vec even, vec odd) {
    alignas(64) static const uint16_t order[] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)odd, (__m512)even);
    _mm512_store_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(order), both));
  }
};

class CodePanels : public PanelStrip<1> {
 public:
  // Columns from `column` on, of which there are `left`, of `first` or of it and what it gates.
  CodePanels(const CodeMatrix& first, const CodeMatrix* second, long column, long depth, long left)
      : PanelStrip<1>(depth, left, second), first_(first), second_(second ? *second : first), column_(column) {}

  // Codes are fetched while they are widened.
  void tell(Ahead&) const {}

  void pack(bfloat* room) const {
    const long all = half_groups(depth_), one = size(depth_);
    if (!gated_)
      for (int p = 0; p < number; p++)
        first_.widen(column_ / PANEL + p, all, room + p * one, room + p * one + HALF_TILE, 2 * HALF_TILE);
    else
      for (int p = 0; p < number; p += 2) {
        first_.widen(column_ / PANEL + p / 2, all, room + p * one, room + (p + 1) * one, 2 * HALF_TILE);
        second_.widen(column_ / PANEL + p / 2, all, room + p * one + HALF_TILE, room + (p + 1) * one + HALF_TILE,
                      2 * HALF_TILE);
      }
  }

 private:
  const CodeMatrix first_, second_;
  const long column_;
};

// The experts' weights of 8 bits, as panels.
class CodeWeights {
 public:
  typedef CodePanels Panels;
  explicit CodeWeights(const Int8Job& own) : job(own.job), own_(own), parts_(activation(own.job.kind).parts) {}

  const Job& job;

  // As those of HalfWeights.
  CodePanels up(int expert, long j, long end) const {
    const CodeMatrix gate = up_matrix(expert * parts_), gated = up_matrix(expert * parts_ + parts_ - 1);
    return CodePanels(gate, parts_ == 2 ? &gated : nullptr, j, job.dim, end - j);
  }
  CodePanels down(int expert, long d, long f, long end) const {
    const CodeMatrix matrix(job.down, own_.down_scales, own_.down_bases, expert * groups_of(job.dim),
                            groups_of(job.hidden), f / GROUP);
    return CodePanels(matrix, nullptr, d, end - f, job.dim - d);
  }

 private:
  CodeMatrix up_matrix(long part) const {
    return CodeMatrix(job.up, own_.up_scales, own_.up_bases, part * groups_of(job.hidden), groups_of(job.dim), 0);
  }

  const Int8Job& own_;
  const int parts_;
};

#endif

}  // namespace turnout

// The two products of experts with weights of 8 bits, on rows that are codes already.
#pragma once

#include "activation.h"
#include "int8_codes.h"
#include "row_sums.h"

namespace turnout {

static_assert(GROUP == PANEL, "a panel of h is a group of the second product");

struct Int8Job {
  Job job;                    // its `up` and `down` are the codes: (E, parts, F / PANEL, groups of D, QUADS, PANEL, 4)
                              // and (E, D / PANEL, groups of F, QUADS, PANEL, 4), everything rounded up
  const uint8_t* up_scales;    // (E, parts, F / PANEL, groups of D, 2, PANEL)
  const uint8_t* down_scales;  // (E, D / PANEL, groups of F, 2, PANEL)
  const bfloat* up_bases;      // (E, parts, F / PANEL, PANEL)
  const bfloat* down_bases;    // (E, D / PANEL, PANEL)
};
static_assert(sizeof(Int8Job) == sizeof(Job) + 4 * sizeof(int64_t), "kernel.py adds the four of Int8Weights.scales");

inline long groups_of(long columns) { return (columns + GROUP - 1) / GROUP; }

template <int DIGITS>
class Int8Products {
 public:
  typedef Codes<DIGITS> Block;
  static constexpr int TILE = CODE_ROWS / DIGITS;  // rows that are multiplied at once

  Int8Products(const Int8Job& own, const Routes& routes)
      : x_groups(groups_of(own.job.dim)),
        h_groups(groups_of(own.job.hidden)),
        out_panels((own.job.dim + PANEL - 1) / PANEL),
        own_(own),
        job_(own.job),
        routes_(routes),
        act_(activation(own.job.kind)) {}

  const long x_groups, h_groups, out_panels;

  // Groups [first, end) of h, in rows from `to` on: products, bias, activation, codes.
  void up(const Unit& unit, const Block& x, const Block& h, long to, long first, long end) const {
    alignas(64) float before[2 * TILE * GROUP];
    float* const second = before + (act_.parts - 1) * TILE * GROUP;
    const Split tiles(unit.rows, TILE);
    for (long f = first; f < end; f++)
      for (int t = 0; t < tiles.parts; t++) {
        const int rows = tiles.size(t);
        for (int part = 0; part < act_.parts; part++) {
          float* const out = before + part * TILE * GROUP;
          const Panel panel = panel_of(job_.up, own_.up_scales, own_.up_bases,
                                       (unit.expert * act_.parts + part) * h_groups + f, x_groups, t);
          code_product(x, tiles.begin(t), rows, panel, out, GROUP);
          add_bias(unit.expert, part, f, rows, out);
        }
        act_.line(before, second, before, rows * GROUP);
        for (int r = 0; r < rows; r++) encode(before + r * GROUP, h, f, to + tiles.begin(t) + r);
      }
  }

  // Panels [first, end) of the output of unit `index`, weighted; its rows of h are those from `from` on.
  void down(const Unit& unit, const RowSums& sums, int index, const Block& h, long from, long first, long end) const {
    alignas(64) float sum[TILE * PANEL];
    const Split tiles(unit.rows, TILE);
    for (long d = first; d < end; d++) {
      const long columns = std::min<long>(PANEL, job_.dim - d * PANEL);
      const float* bias = job_.down_bias ? job_.down_bias + unit.expert * job_.dim + d * PANEL : nullptr;
      for (int t = 0; t < tiles.parts; t++) {
        const Panel panel =
            panel_of(job_.down, own_.down_scales, own_.down_bases, unit.expert * out_panels + d, h_groups, t);
        code_product(h, from + tiles.begin(t), tiles.size(t), panel, sum, PANEL);
        for (int r = 0; r < tiles.size(t); r++) {
          const int row = unit.first + tiles.begin(t) + r;
          const float weight = job_.weight[routes_.assignment[row]];
          float* __restrict__ out = sums.place(index, row) + d * PANEL;
          for (long c = 0; c < columns; c++)
            out[c] = weight * (bias ? sum[r * PANEL + c] + bias[c] : sum[r * PANEL + c]);
        }
      }
    }
  }

 private:
  void add_bias(int expert, int part, long f, int rows, float* out) const {
    if (!job_.up_bias) return;
    const float* bias = job_.up_bias + (expert * act_.parts + part) * job_.hidden + f * GROUP;
    const long columns = std::min<long>(GROUP, job_.hidden - f * GROUP);
    for (int r = 0; r < rows; r++)
      for (long c = 0; c < columns; c++) out[r * GROUP + c] += bias[c];
  }

  static Panel panel_of(const void* codes, const uint8_t* scales, const bfloat* bases, long panel, long groups,
                        int tile) {
    return {static_cast<const uint8_t*>(codes) + panel * groups * PANEL_BYTES, scales + panel * groups * 2 * PANEL,
            bases + panel * PANEL, int(groups), tile == 0};
  }

  const Int8Job& own_;
  const Job& job_;
  const Routes& routes_;
  const Activation& act_;
};

}  // namespace turnout

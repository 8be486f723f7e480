// The forward pass with weights of 8 bits. Many rows: block by block, each by one thread. Few: each weight is read
// once, and threads share the columns of an expert.
#pragma once

#include <vector>

#include "int8_products.h"

namespace turnout {

inline bool are_few(const Routes& routes, const Job& job) {
  for (int e = 0; e < job.experts; e++)
    if (routes.start[e + 1] - routes.start[e] > FEW_ROWS) return false;
  return routes.start[job.experts] * job.dim <= 4 << 20;
}

template <int DIGITS>
class Int8Forward {
 public:
  explicit Int8Forward(const Int8Job& own)
      : job_(own.job),
        routes_(job_.routes, job_.tokens, job_.experts, job_.assignments),
        few_(are_few(routes_, job_)),
        products_(own, routes_),
        x_groups_(products_.x_groups),
        h_groups_(products_.h_groups) {}

  void run() {
    plan_units();
    RowSums sums(job_, routes_, job_.y, units_);
    sums_ = &sums;
    Workspace space(floats(job_.tokens, x_groups_) + Workspace::padded(sums.floats()) +
                    (few_ ? floats(routes_.start[job_.experts], h_groups_) : 0) +
                    job_.threads * (floats(most_, x_groups_) + (few_ ? 0 : floats(most_, h_groups_))));
    tokens_ = take(space, job_.tokens, x_groups_);
    sums.use(space.take(sums.floats()));
    if (few_) h_ = take(space, routes_.start[job_.experts], h_groups_);
    for (int i = 0; i < job_.threads; i++)
      scratch_.push_back({take(space, most_, x_groups_), few_ ? Block{} : take(space, most_, h_groups_)});
    encode_tokens();
    Schedule schedule;
    few_ ? plan_few(schedule) : sums.plan(schedule);
    schedule.run(*this, int(job_.threads), job_.parallel);
  }

  void operator()(const Task& task, int worker) {
    switch (task.kind) {
      case FILL: return encode_chunk(task.index);
      case UP: return few_up(pieces_[task.index], scratch_[worker]);
      case DOWN: return few_down(pieces_[task.index]);
      case COMPUTE: return block(task.index, scratch_[worker]);
      case ADD_UP: return sums_->add_up(task.index);
      case CLEAR: return sums_->clear(task.index);
    }
  }

 private:
  typedef typename Int8Products<DIGITS>::Block Block;
  static constexpr int UP = 16, DOWN = 17;  // beside the kinds of row_sums.h
  static constexpr int CHUNK_TOKENS = 64;
  static constexpr long BLOCK_BYTES = 384 << 10;  // about a third of a core's cache

  struct Scratch {
    Block x, h;
  };
  struct Piece {  // of one unit: groups of h from `first` on, or panels of the output
    int unit;
    long first, end;
  };

  static size_t code_floats(long rows, long groups) { return rows * groups * DIGITS * GROUP / 4; }
  static size_t floats(long rows, long groups) {
    return Workspace::padded(code_floats(rows, groups)) + Workspace::padded(rows * groups * 2);
  }
  static Block take(Workspace& space, long rows, long groups) {
    int8_t* code = reinterpret_cast<int8_t*>(space.take(code_floats(rows, groups)));
    return {code, space.take(rows * groups * 2), rows};
  }

  void plan_units() {
    const long row_bytes = (x_groups_ + h_groups_) * DIGITS * GROUP;
    constexpr long tile = Int8Products<DIGITS>::TILE;
    const long most = std::max<long>(4, std::min<long>(512, BLOCK_BYTES / row_bytes) / tile) * tile;
    for (int e = 0; e < job_.experts; e++) {
      const Split split(routes_.start[e + 1] - routes_.start[e], most);
      for (int b = 0; b < split.parts; b++) {
        units_.push_back({e, routes_.start[e] + split.begin(b), split.size(b)});
        most_ = std::max<long>(most_, split.size(b));
      }
    }
  }

  // Once a token, whatever the number of its experts.
  void encode_tokens() {
    const int chunks = int((job_.tokens + CHUNK_TOKENS - 1) / CHUNK_TOKENS);
    if (chunks <= 1) return chunks ? encode_chunk(0) : void();
    Schedule schedule;
    for (int chunk = 0; chunk < chunks; chunk++) schedule.add({FILL, chunk});
    schedule.run(*this, int(job_.threads), job_.parallel);
  }

  void encode_chunk(int chunk) const {
    const long end = std::min<long>(job_.tokens, (chunk + 1L) * CHUNK_TOKENS);
    for (long t = long(chunk) * CHUNK_TOKENS; t < end; t++) encode_row(job_.x + t * job_.dim, job_.dim, tokens_, t);
  }

  // Pieces enough for all threads also where few experts have rows; those of the second product after the first's.
  void plan_few(Schedule& schedule) {
    const long wanted = units_.empty() ? 1 : (8 * job_.threads + units_.size() - 1) / units_.size();
    std::vector<int> before;
    for (int u = 0; u < int(units_.size()); u++) {
      before.push_back(schedule.group());
      cut(schedule, UP, u, h_groups_, wanted, -1, before[u]);
    }
    const int computed = schedule.group();
    for (int u = 0; u < int(units_.size()); u++)
      cut(schedule, DOWN, u, products_.out_panels, wanted, before[u], computed);
    sums_->plan_sums(schedule, computed);
  }

  void cut(Schedule& schedule, int kind, int unit, long all, long wanted, int wait, int signal) {
    const long parts = std::min(all, wanted);
    for (long part = 0; part < parts; part++) {
      pieces_.push_back({unit, all * part / parts, all * (part + 1) / parts});
      schedule.add({kind, int(pieces_.size()) - 1, wait, signal});
    }
  }

  void few_up(const Piece& piece, const Scratch& s) const {
    const Unit& unit = units_[piece.unit];
    const Block x = gathered(unit, s.x);
    products_.up(unit, x, h_, unit.first, piece.first, piece.end);
  }
  void few_down(const Piece& piece) const {
    const Unit& unit = units_[piece.unit];
    products_.down(unit, *sums_, piece.unit, h_, unit.first, piece.first, piece.end);
  }

  void block(int index, const Scratch& s) const {
    const Unit& unit = units_[index];
    const Block x = gathered(unit, s.x), h = {s.h.code, s.h.scale, unit.rows};
    products_.up(unit, x, h, 0, 0, h_groups_);
    products_.down(unit, *sums_, index, h, 0, 0, products_.out_panels);
  }

  Block gathered(const Unit& unit, const Block& room) const {
    const Block x = {room.code, room.scale, unit.rows};
    for (long g = 0; g < x_groups_; g++)
      for (int r = 0; r < unit.rows; r++) {
        const int32_t token = routes_.token[unit.first + r];
        std::memcpy(x.codes(g, r), tokens_.codes(g, token), DIGITS * GROUP);
        std::memcpy(x.scales(g, r), tokens_.scales(g, token), 2 * sizeof(float));
      }
    return x;
  }

  const Job& job_;
  const Routes routes_;
  const bool few_;
  const Int8Products<DIGITS> products_;
  const long x_groups_, h_groups_;
  long most_ = 0;  // rows of a unit
  std::vector<Unit> units_;
  std::vector<Piece> pieces_;
  std::vector<Scratch> scratch_;
  RowSums* sums_ = nullptr;
  Block tokens_ = {}, h_ = {};  // of all tokens; of all rows, where they are few
};

}  // namespace turnout

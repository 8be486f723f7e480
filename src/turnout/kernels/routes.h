// Assignments ordered by expert, by counting; and each token's rows in that order.
#pragma once

#include <cstdint>
#include <vector>

namespace turnout {

// A view of one array of 3 + E + T + 3 N numbers.
struct Routes {
  const int32_t* single;        // [1] whether no token has more than one row
  const int32_t* start;         // [E + 1] first row of each expert
  const int32_t* token_start;   // [T + 1] first place of each token in `row`
  const int32_t* assignment;    // [N] of each row
  const int32_t* token;         // [N] of each row
  const int32_t* row;           // [N] rows by token, in the order of the experts

  Routes(const int32_t* all, int64_t tokens, int64_t experts, int64_t assignments)
      : single(all),
        start(single + 1),
        token_start(start + experts + 1),
        assignment(token_start + tokens + 1),
        token(assignment + assignments),
        row(token + assignments) {}
};

// Returns the number of rows, or -1 if an expert or a token does not exist.
inline int64_t sort_routes(const int64_t* expert, const int64_t* token, const uint8_t* keep, int64_t assignments,
                           int64_t tokens, int64_t experts, int32_t* all) {
  const Routes view(all, tokens, experts, assignments);
  int32_t* start = const_cast<int32_t*>(view.start);
  int32_t* token_start = const_cast<int32_t*>(view.token_start);
  for (int64_t e = 0; e <= experts; e++) start[e] = 0;
  for (int64_t t = 0; t <= tokens; t++) token_start[t] = 0;
  for (int64_t n = 0; n < assignments; n++) {
    if (keep && !keep[n]) continue;
    if (uint64_t(expert[n]) >= uint64_t(experts) || uint64_t(token[n]) >= uint64_t(tokens)) return -1;
    start[expert[n] + 1]++;
    token_start[token[n] + 1]++;
  }
  int32_t most = 0;
  for (int64_t t = 0; t < tokens; t++) {
    if (token_start[t + 1] > most) most = token_start[t + 1];
    token_start[t + 1] += token_start[t];
  }
  for (int64_t e = 0; e < experts; e++) start[e + 1] += start[e];
  all[0] = most <= 1;
  std::vector<int32_t> next(start, start + experts);
  int32_t* assignment_of = const_cast<int32_t*>(view.assignment);
  int32_t* token_of = const_cast<int32_t*>(view.token);
  for (int64_t n = 0; n < assignments; n++) {
    if (keep && !keep[n]) continue;
    const int32_t row = next[expert[n]]++;
    assignment_of[row] = n;
    token_of[row] = token[n];
  }
  next.assign(token_start, token_start + tokens);
  int32_t* rows = const_cast<int32_t*>(view.row);
  for (int32_t row = 0; row < start[experts]; row++) rows[next[token_of[row]]++] = row;
  return start[experts];
}

}  // namespace turnout

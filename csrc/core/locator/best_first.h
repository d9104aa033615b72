// Best-first search over exchanges of one member.
#pragma once

#include "core/locator/analysis.h"

namespace draco {
namespace {

constexpr int kBeam = 32;      // sets that the search keeps
constexpr int kChildren = 12;  // exchanges of one member that it considers

struct BeamArrays {
  int *sets, *others, *candidate;
  double *left, *after;
  uint8_t* tried;

  DRACO_MEMBER BeamArrays(Arena& arena, int64_t n, int64_t s) {
    sets = arena.take<int>(kBeam * s + 1);
    others = arena.take<int>(n);
    candidate = arena.take<int>(n);
    left = arena.take<double>(kBeam);
    after = arena.take<double>(n);
    tried = arena.take<uint8_t>(kBeam);
  }
};

// Puts the set of these others and the worker that joins them into the sorted list of the best, unless it is there;
// returns how many are there then. Collective.
template <typename Team>
DRACO_TEAM int insert(const Team& team, const BeamArrays& beam, int count, Set others, int joins, double energy) {
  const int size = others.size + 1;
  for (int i = team.thread; i < others.size; i += team.threads) beam.candidate[i] = others.member[i];
  put(team, beam.candidate + others.size, joins);
  const int64_t same = team.argmin(count, [&](int64_t b) {
    int shared = 0;
    for (int i = 0; i < size; ++i)
      for (int l = 0; l < size; ++l) shared += beam.sets[b * size + i] == beam.candidate[l];
    return shared == size ? 0.0 : kNever;
  });
  if (same >= 0) return count;
  const int last = count < kBeam ? count : kBeam - 1;
  if (team.thread == 0) {
    int at = last;
    for (; at > 0 && energy < beam.left[at - 1]; --at) {
      beam.left[at] = beam.left[at - 1];
      beam.tried[at] = beam.tried[at - 1];
      for (int i = 0; i < size; ++i) beam.sets[at * size + i] = beam.sets[(at - 1) * size + i];
    }
    beam.left[at] = energy;
    beam.tried[at] = 0;
    for (int i = 0; i < size; ++i) beam.sets[at * size + i] = beam.candidate[i];
  }
  team.sync();
  return last + 1;
}

// Keeps the kBeam sets that leave least unexplained, starting with `set`. In the best that was not tried yet, each
// member is exchanged for the kChildren best others. Leaves the best in `set`; returns whether that
// explains the active projections. Collective.
template <typename Team>
DRACO_TEAM_CALL bool best_first(SearchState<Team>& search, Analysis<Team>& analysis, const BeamArrays& beam, Set set) {
  const Team& team = search.team;
  const int n = search.in.workers;
  copy(team, beam.sets, set.member, set.size);
  put(team, beam.left, HUGE_VAL);
  put(team, beam.tried, uint8_t{0});
  int count = 1;
  const auto excess = [&](const Residuals& left) {
    const double worst = left.excess(search.active_count);
    team.sync();
    return worst;
  };
  while (!search.work.exhausted()) {
    const int64_t b = team.argmin(count, [&](int64_t i) { return beam.tried[i] ? kNever : beam.left[i]; });
    if (b < 0) break;
    copy(team, set.member, beam.sets + b * set.size, set.size);
    put(team, beam.tried + b, uint8_t{1});
    const Residuals left = analysis.residuals(set);
    if (excess(left) <= kQuiet) return true;
    const Exchanges<Team> exchanges = analysis.exchanges(set, left);
    for (int i = 0; i < set.size; ++i) {
      copy_without(team, beam.others, set.member, set.size, i);
      for (int j = team.thread; j < n; j += team.threads) beam.after[j] = exchanges.left_after(i, j);
      team.sync();
      search.work.add(static_cast<double>(n) * search.active_count);
      for (int c = 0; c < kChildren; ++c) {
        const int64_t joins = team.argmin(n, [&](int64_t j) { return beam.after[j]; });
        if (joins < 0) break;
        const double energy = beam.after[joins];
        if (count == kBeam && !(energy < beam.left[kBeam - 1])) break;
        count = insert(team, beam, count, {beam.others, set.size - 1}, static_cast<int>(joins), energy);
        put(team, beam.after + joins, kNever);
      }
    }
  }
  copy(team, set.member, beam.sets, set.size);
  return excess(analysis.residuals(set)) <= kExplained;
}

}  // namespace
}  // namespace draco

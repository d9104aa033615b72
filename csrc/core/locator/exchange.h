// Improves a set one worker at a time: the search's local steps.
#pragma once

#include "core/locator/analysis.h"

namespace draco {
namespace {

constexpr int kMoreMembers = 3;  // that a set which explained others before may lack

// Its methods are collectives. Sets are changed in place; where a set is returned, an empty one stands for none found.
template <typename Team>
class Improver {
 public:
  struct Settled {
    double excess;  // of the set in the end
    double total;   // energy that it leaves

    DRACO_MEMBER bool explained() const { return excess <= kExplained; }
  };

  DRACO_TEAM Improver(SearchState<Team>& search, Analysis<Team>& analysis) : search_(search), analysis_(analysis) {}

  // Puts the worker that explains most of what the messages without the set leave, however large they are, behind its
  // members; returns the set with it.
  DRACO_TEAM_CALL Set add_best(Set set) {
    const double* gain = analysis_.gains(set);
    const int64_t best = search_.team.argmin(search_.in.workers, [&](int64_t j) { return -gain[j]; });
    put(search_.team, set.member + set.size, best < 0 ? 0 : static_cast<int>(best));
    return {set.member, set.size + 1};
  }

  // Exchanges one member at a time for the worker that lowers the unexplained energy most, until the excess is no more
  // than `enough`, or nothing is left to gain.
  DRACO_TEAM_CALL Settled settle(Set set, double enough) {
    const Team& team = search_.team;
    const int n = search_.in.workers;
    double reached = HUGE_VAL;
    for (;;) {
      const Residuals left = analysis_.residuals(set);
      const double now = left.excess(search_.active_count);
      const Settled settled{now, left.total};
      team.sync();
      if (now <= enough || search_.work.exhausted()) return settled;
      const Exchanges<Team> exchanges = analysis_.exchanges(set, left);
      const auto left_after = [&](int64_t i) { return exchanges.left_after(static_cast<int>(i / n), i % n); };
      const int64_t best = team.argmin(int64_t{set.size} * n, left_after);
      search_.work.add(static_cast<double>(set.size) * n * search_.active_count);
      if (best < 0) return settled;
      const double least = left_after(best);
      team.sync();
      if (!(least < reached * (1 - 1e-9))) return settled;
      reached = least;
      put(team, set.member + best / n, static_cast<int>(best % n));
    }
  }

  // The same, until the set explains the active projections as well as honest noise would: one that only just explains
  // them is exchanged further, as of several that do the true one leaves the least.
  DRACO_TEAM Settled settle(Set set) { return settle(set, kQuiet); }

  // Adds the worker that explains most, and exchanges, until the set explains the active projections, at most `more`
  // times.
  DRACO_TEAM_CALL Set grow(Set set, int more) {
    for (const int limit = set.size + more; set.size < search_.most && set.size < limit && !search_.work.exhausted();) {
      set = add_best(set);
      if (settle(set).explained()) return set;
    }
    return {set.member, 0};
  }

  // Tries the workers that are said to be wrong, and exchanges from there. Writes to `member`.
  template <typename Wrong>
  DRACO_TEAM Set try_without(int* member, Wrong&& wrong) {
    int size = 0;
    for (int j = 0; j < search_.in.workers && size <= search_.most; ++j) {
      if (!wrong(j)) continue;
      if (search_.team.thread == 0 && size < search_.most) member[size] = j;
      ++size;
    }
    search_.team.sync();
    search_.work.spent = 0;
    const bool found = size > 0 && size <= search_.most && settle({member, size}).explained();
    return {member, found ? size : 0};
  }

  // The set without the members that explain no more than noise; empty where more are left than may be bad.
  DRACO_TEAM_CALL Set drop_innocent(Set set) {
    const Exchanges<Team> exchanges = analysis_.exchanges(set);
    int kept = 0;
    for (int i = 0; i < set.size; ++i) {
      if (exchanges.reach_size[i] <= kTolerance * kTolerance * search_.active_count) continue;
      if (search_.team.thread == 0) search_.list[kept] = set.member[i];
      ++kept;
    }
    search_.team.sync();
    copy(search_.team, set.member, search_.list, kept);
    return {set.member, kept <= search_.most ? kept : 0};
  }

 private:
  SearchState<Team>& search_;
  Analysis<Team>& analysis_;
};

}  // namespace
}  // namespace draco

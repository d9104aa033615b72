// Who of a set that explains the projections is in it for a reason, and who is certainly bad.
#pragma once

#include "core/locator/exchange.h"

namespace draco {
namespace {

constexpr double kFar = 1024;   // times the tolerated amplitude, within which nobody is named: see name()
constexpr int kMoreRivals = 1;  // than members in a set that speaks against naming one
constexpr double kMostNamingWork = 1.5e7;

struct NamingArrays {
  int *member, *other;
  double* excess;

  DRACO_MEMBER NamingArrays(Arena& arena, int64_t n, int64_t) {
    member = arena.take<int>(n);
    other = arena.take<int>(n);
    excess = arena.take<double>(n);
  }
};

// Its methods are collectives.
template <typename Team>
class Naming {
 public:
  DRACO_TEAM Naming(SearchState<Team>& search, Analysis<Team>& analysis, Improver<Team>& improver,
                    const NamingArrays& arrays)
      : search_(search), analysis_(analysis), improver_(improver), at_(arrays) {}

  // Drops members that nothing speaks against, as the polynomial of a set that is too large has roots of no meaning;
  // returns the others. Columns that speak for a member join the active ones. energy, per_column: Locator::locate().
  template <typename Energy>
  DRACO_TEAM_CALL Set prune(Set set, Energy&& energy, double* per_column) {
    const Team& team = search_.team;
    for (int i = 0; set.size > 1 && i < set.size;) {
      const Exchanges<Team> exchanges = analysis_.exchanges(set);
      const int checks = search_.parity.rows - search_.parity.erased() - (set.size - 1);
      const auto explained = [&](int member) {
        bool all = true;
        for (int a = 0; a < search_.active_count; ++a)
          all &= exchanges.energy[a] + norm2(exchanges.reach[int64_t{member} * search_.stride + a]) <=
                 checks * kTolerance * kTolerance;
        return all;
      };
      while (i < set.size && !explained(i)) ++i;
      team.sync();
      if (i == set.size) break;
      const Set others{search_.list, set.size - 1};
      copy_without(team, others.member, set.member, set.size, i);
      energy(search_.parity.checks_without(others, search_.work).rows, checks, per_column);
      if (search_.activate(per_column, checks) == 0) {
        copy(team, set.member, others.member, others.size);
        --set.size;
      } else {
        ++i;
      }
    }
    return set;
  }

  // Marks the suspects. A member is named where no other set without it comes near to explaining the projections, as
  // far as a search can tell that starts from the set with the member exchanged for the best other. It may be larger by
  // kMoreRivals members, not more: s that collude and surround an honest worker can imitate any error of it, and taking
  // that for what happened, not the one worker, would leave a single fault unnamed in large codes. Near is within
  // near() times the tolerated amplitude, as the search is not exhaustive. Where sets are so large that it takes too
  // long only the exchange is made, and near is within kFar. How often that misleads: docs/guarantee.md.
  DRACO_TEAM_CALL void name(Set set, uint8_t* suspects) {
    const Team& team = search_.team;
    if (set.size == 0) return;
    const Exchanges<Team> exchanges = analysis_.exchanges(set);
    copy(team, at_.member, set.member, set.size);
    for (int i = 0; i < set.size; ++i) exchange_best(exchanges, i);
    search_.work = {0, kMostNamingWork};
    for (int i = 0; i < set.size; ++i) {
      const double square = near(0) * near(0);
      bool named = at_.excess[i] > square;
      if (search_.most > 1 && named && !search_.work.exhausted()) {
        copy_without(team, set.member, at_.member, set.size, i);
        put(team, set.member + set.size - 1, at_.other[i]);
        search_.barred = at_.member[i];
        named = !comes_near(set);
        search_.barred = -1;
      }
      if (search_.most > 1 && search_.work.exhausted()) named &= at_.excess[i] > kFar * kFar;
      if (team.thread == 0 && named) suspects[at_.member[i]] = 1;
    }
    team.sync();
  }

 private:
  // Times the tolerated amplitude: within that a set of so many more members than another comes near to explaining.
  DRACO_TEAM double near(int more) const { return search_.most == 1 ? 1 : more > 0 ? 2 : search_.most == 2 ? 4 : 8; }

  // Writes who joins in the best exchange of member i to `other`, and the excess that it leaves to `excess`.
  DRACO_TEAM_CALL void exchange_best(const Exchanges<Team>& exchanges, int i) {
    const Team& team = search_.team;
    const int64_t other = team.argmin(search_.in.workers, [&](int64_t j) { return exchanges.left_after(i, j); });
    double worst = other < 0 ? HUGE_VAL : 0;
    const double squared = other < 0 ? 0 : exchanges.place(i, other);
    for (int a = 0; a < search_.active_count && other >= 0; ++a) {
      const double energy = exchanges.energy[a] + exchanges.change(i, other, squared, a);
      if (!(energy <= worst)) worst = energy;
    }
    team.sync();
    const int checks = search_.parity.rows - search_.parity.erased() - exchanges.set.size;
    put(team, at_.other + i, static_cast<int>(other));
    put(team, at_.excess + i, worst / (checks * kTolerance * kTolerance));
  }

  // Whether exchanges from the set on, or with up to kMoreRivals more, lead to one that comes near.
  DRACO_TEAM_CALL bool comes_near(Set set) {
    for (int more = 0;; ++more) {
      const double square = near(more) * near(more);
      if (improver_.settle(set, square).excess <= square) return true;
      if (set.size == search_.most || more == kMoreRivals || search_.work.exhausted()) return false;
      set = improver_.add_best(set);
    }
  }

  SearchState<Team>& search_;
  Analysis<Team>& analysis_;
  Improver<Team>& improver_;
  const NamingArrays at_;
};

}  // namespace
}  // namespace draco

// Finds the bad workers of the cyclic code from random projections of their messages.
//
// A set of workers explains the messages when all checks that vanish on it (locator/parity.h) are at the noise level;
// the locator returns the smallest such set that it finds:
//
//   1. A set that explained other projections already, with up to three workers more       (locator/exchange.h)
//   2. Prony's method, for errors well above the noise, also of colluders                  (locator/prony.h)
//   3. Greedy pursuit, for errors of very different size: the largest is erased before the next is looked for
//                                                                                          (locator/exchange.h)
//   4. The signal subspace, for many bad workers that do not collude                       (locator/subspace.h)
//   5. Consensus of workers taken at random, where the code has few dimensions             (locator/consensus.h)
//   6. A second codeword or multiples of the first, sent by half of the workers, where the code has some dimensions
//      more                                                                                (locator/consensus.h)
//   7. All subsets of neighbours on the circle                                             (locator/subsets.h)
//   8. Best-first search over exchanges, and all subsets of a pool of likely workers       (locator/best_first.h)
//
// What 2. to 6. give is improved by exchanging one member at a time while the unexplained energy falls. Whatever the
// search does, a set is only accepted when it explains every projection; otherwise decoding has failed. A member of the
// set is named only if no set without it explains them as well (locator/naming.h): errors little above the noise may be
// explained by several sets, which all give the same gradient up to noise, and the honest must not be accused. All
// arithmetic is double. Scratch comes from the caller: nothing is allocated here. Methods are collectives of their team
// (core/team.h): all threads make the same decisions from the same values.
#pragma once

#include "core/locator/best_first.h"
#include "core/locator/consensus.h"
#include "core/locator/exchange.h"
#include "core/locator/naming.h"
#include "core/locator/prony.h"
#include "core/locator/subsets.h"
#include "core/locator/subspace.h"

namespace draco {
namespace {

// The arrays of a search, and those of its steps, which lie over each other in what is left of the scratch.
struct LocatorArrays {
  ParityArrays parity;
  SearchArrays search;
  AnalysisArrays analysis;
  int64_t shared;  // bytes of those above
  PronyArrays prony;
  SubspaceArrays subspace;
  RivalArrays rival;
  SubsetArrays subsets;
  BeamArrays beam;
  NamingArrays naming;

  DRACO_MEMBER LocatorArrays(Arena& arena, int64_t n, int64_t s)
      : parity(arena, n, s),
        search(arena, n, s),
        analysis(arena, n, s),
        shared(arena.used()),
        prony(step<PronyArrays>(arena, n, s)),
        subspace(step<SubspaceArrays>(arena, n, s)),
        rival(step<RivalArrays>(arena, n, s)),
        subsets(step<SubsetArrays>(arena, n, s)),
        beam(step<BeamArrays>(arena, n, s)),
        naming(step<NamingArrays>(arena, n, s)) {}

 private:
  template <typename Arrays>
  DRACO_MEMBER Arrays step(Arena& arena, int64_t n, int64_t s) const {
    arena.rewind(shared);
    return Arrays(arena, n, s);
  }
};

template <typename Team>
class Locator {
 public:
  static DRACO_MEMBER int64_t scratch_bytes(int workers, int adversaries) {
    Arena arena;
    LocatorArrays(arena, workers, adversaries);
    return arena.needed();
  }

  DRACO_TEAM Locator(const Team& team, const LocatorInput& input, Arena arena)
      : team_(team),
        in_(input),
        at_(arena, input.workers, input.adversaries),
        search_(team, input, at_.parity, at_.search),
        analysis_(search_, at_.analysis),
        improver_(search_, analysis_) {}

  // Looks for bad workers. energy(check, checks, out), a collective, must give the energy of every column under the
  // checks; `per_column` is its scratch of `columns` doubles. Writes who is to be left out, and the suspects among
  // them, (workers,) both and non-finite senders included. False: failed.
  template <typename Energy>
  DRACO_TEAM bool locate(Energy&& energy, double* per_column, uint8_t* left_out, uint8_t* suspects) {
    int nonfinite = 0;
    for (int j = 0; j < in_.workers; ++j) nonfinite += in_.nonfinite[j];
    for (int j = team_.thread; j < in_.workers; j += team_.threads) left_out[j] = suspects[j] = in_.nonfinite[j];
    search_.parity.erase(in_.missing, in_.nonfinite);
    const int left = search_.parity.rows - search_.parity.erased();
    if (left < 0) return false;
    const int by_code = left / 2, by_bound = in_.adversaries - nonfinite;
    search_.most = by_code < by_bound ? by_code : by_bound;

    Set found{search_.set, 0};
    bool hinted = in_.hint == nullptr;
    for (;;) {
      const Checks checks = search_.parity.checks_without(found, search_.work);
      if (checks.count == 0) break;  // 2s erasures: nothing is left to check with
      energy(checks.rows, checks.count, per_column);
      const int joined = search_.activate(per_column, checks.count);
      if (joined == 0) break;
      if (joined < 0 || search_.most == 0) return false;
      if (!hinted) {  // no fewer can explain all columns, and as a rule they do
        hinted = true;
        found.size = list(team_, in_.hint, in_.workers, found.member);
        continue;
      }
      found = find(found);
      if (found.size == 0) return false;
    }
    Naming<Team> naming(search_, analysis_, improver_, at_.naming);
    found = naming.prune(found, energy, per_column);
    for (int i = team_.thread; i < found.size; i += team_.threads) left_out[found.member[i]] = 1;
    team_.sync();
    naming.name(found, suspects);
    return true;
  }

 private:
  // Replaces `found`, which explains some projections, by a set of at least as many workers that explains all active
  // ones; an empty one where there is none.
  DRACO_TEAM_CALL Set find(Set found) {
    int* const member = found.member;
    const Set none{member, 0};
    Work& work = search_.work;
    const int most = search_.most;
    // With many workers one analysis of a set is so much work itself.
    const double analysis = static_cast<double>(in_.workers) * search_.parity.rows * (2 * most + search_.active_count);
    work = {0, kMostWork > 12 * analysis ? kMostWork : 12 * analysis};
    const Set larger = found.size > 0 ? improver_.grow(found, kMoreMembers) : none;
    if (larger.size > 0) return larger;
    const int few = most < kFewMembers ? most : kFewMembers;
    for (int size = found.size > 1 ? found.size : 1; size <= few; ++size) {
      const Set set{member, size};
      if (!prony(search_, at_.prony, set, search_.rank)) {
        if (size == most) return none;
        continue;
      }
      if (improver_.settle(set).explained()) return set;
      if (work.exhausted()) continue;
      if (pursue(set)) return set;
    }
    Set set = Subspace<Team>(search_, at_.subspace).find(analysis_, improver_, at_.beam, member);
    if (set.size == 0) set = consensus(search_, improver_, member);
    if (set.size == 0) set = rival_codeword(search_, improver_, at_.rival, member);
    if (set.size > 0) return set;
    work.spent = 0;
    for (int twice = 2 * kFewMembers; twice < 2 * most && most > kFewMembers; twice *= 2) {
      set = {member, twice < most ? twice : most};
      if (set.size >= found.size && prony(search_, at_.prony, set, search_.rank) && improver_.settle(set).explained())
        return set;
    }
    Subsets<Team> subsets(search_, analysis_, improver_, at_.subsets);
    set = {member, most};
    if (most <= kMostSubsetSize) {
      work.spent = 0;
      if (subsets.neighbours(set)) return set;
    }
    work.spent = 0;
    if (!prony(search_, at_.prony, set, search_.rank)) return none;
    if (best_first(search_, analysis_, at_.beam, set)) return set;
    if (most > kMostSubsetSize) return none;
    work.spent = 0;
    const double* const rank = search_.rank;
    if (subsets.likeliest(set, [&](int64_t j) { return -rank[j]; })) return set;
    const double* const gain = analysis_.gains(none);
    if (subsets.likeliest(set, [&](int64_t j) { return gain[j]; })) return set;
    return none;
  }

  // Greedy pursuit: a set of the worker that explains most, the one that explains most of the rest, and so on.
  DRACO_TEAM bool pursue(Set set) {
    for (int size = 0; size < set.size; ++size) improver_.add_best({set.member, size});
    return improver_.settle(set).explained();
  }

  const Team team_;
  const LocatorInput in_;
  const LocatorArrays at_;
  SearchState<Team> search_;
  Analysis<Team> analysis_;
  Improver<Team> improver_;
};

}  // namespace
}  // namespace draco

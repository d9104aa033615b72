// Enumeration: all subsets of a pool of workers.
#pragma once

#include "core/locator/exchange.h"

namespace draco {
namespace {

constexpr int kMostSubsets = 20000;  // of a pool of likely workers
constexpr int kWindow = 5;           // so many more workers than sought are in a window of neighbours

struct SubsetArrays {
  Complex* level;
  int *pool, *chosen, *best;

  DRACO_MEMBER SubsetArrays(Arena& arena, int64_t n, int64_t s) {
    const int64_t levels = (s < kMostSubsetSize ? s : kMostSubsetSize) + 1;
    level = arena.take<Complex>(levels * 2 * s * (n + most_active(static_cast<int>(s))) + 1);
    pool = arena.take<int>(n);
    chosen = arena.take<int>(n);
    best = arena.take<int>(n);
  }
};

// Its methods are collectives, write to `set`, whose size is that of the subsets, and return whether it explains the
// active projections.
template <typename Team>
class Subsets {
 public:
  DRACO_TEAM Subsets(SearchState<Team>& search, Analysis<Team>& analysis, Improver<Team>& improver,
                     const SubsetArrays& arrays)
      : search_(search), analysis_(analysis), improver_(improver), at_(arrays) {}

  // Among the likeliest workers, those with the largest numbers, as many as kMostSubsets allows.
  template <typename Likelihood>
  DRACO_TEAM bool likeliest(Set set, Likelihood&& likelihood) {
    int pool = set.size;
    double count = 1;
    while (pool < search_.present() && count * (pool + 1) / (pool + 1 - set.size) <= kMostSubsets) {
      count = count * (pool + 1) / (pool + 1 - set.size);
      ++pool;
    }
    for (int i = 0; i < pool; ++i) {
      const int64_t best = search_.team.argmin(search_.in.workers, [&](int64_t j) {
        bool taken = search_.is_erased(j);
        for (int l = 0; l < i; ++l) taken |= at_.pool[l] == j;
        const double likely = likelihood(j);
        return taken ? kNever : likely == likely ? -likely : HUGE_VAL;
      });
      put(search_.team, at_.pool + i, static_cast<int>(best));
    }
    return all_of(set, pool);
  }

  // Among neighbours on the circle, whose errors can nearly cancel in the syndromes: windows that overlap so that as
  // many workers as are sought, out of two more in a row, are in one.
  DRACO_TEAM_CALL bool neighbours(Set set) {
    const int present = search_.present();
    const int pool = set.size + kWindow < present ? set.size + kWindow : present;
    for (int first = 0; first < present && !search_.work.exhausted(); first += kWindow - 1) {
      int seen = 0;
      for (int j = 0; j < search_.in.workers; ++j) {
        if (search_.is_erased(j)) continue;
        const int place = (seen++ - first + present) % present;
        if (place < pool && search_.team.thread == 0) at_.pool[place] = j;
      }
      search_.team.sync();
      if (all_of(set, pool)) return true;
    }
    return false;
  }

 private:
  // Tries all subsets of the first of `pool`: a depth-first walk that keeps, per level, the checks orthogonal to what
  // is chosen and the residuals under them.
  DRACO_TEAM_CALL bool all_of(Set set, int pool) {
    const Team& team = search_.team;
    const Residuals left = analysis_.residuals({nullptr, 0});
    const int checks = left.checks.count, active = search_.active_count, width = pool + active;
    // Level l: columns of the pool's workers and of the residuals, with the l chosen directions taken out.
    Complex* const level = at_.level;
    for (int i = team.thread; i < checks * width; i += team.threads) {
      const int m = i / width, column = i % width;
      level[i] = column < pool ? left.checks.rows[int64_t{m} * search_.in.workers + at_.pool[column]]
                               : left.value[int64_t{m} * search_.stride + column - pool];
    }
    team.sync();
    double least = -1;
    int depth = 0;
    put(team, at_.chosen, -1);  // at each level, an index into the pool
    while (depth >= 0 && !search_.work.exhausted()) {
      const Complex* here = level + int64_t{depth} * checks * width;
      if (depth == set.size - 1) {  // the last member: only its gain is needed
        double total = 0;
        for (int m = 0; m < checks; ++m)
          for (int a = 0; a < active; ++a) total += norm2(here[m * width + pool + a]);
        const int first = depth ? at_.chosen[depth - 1] + 1 : 0;
        const auto left_by = [&](int64_t i) {
          double size = 0, sum = 0;
          for (int m = 0; m < checks; ++m) size += norm2(here[m * width + i]);
          for (int a = 0; a < active; ++a) {
            Complex dot{0, 0};
            for (int m = 0; m < checks; ++m) dot = dot + conj(here[m * width + i]) * here[m * width + pool + a];
            sum += norm2(dot);
          }
          const double gain = size > 1e-24 ? sum / size : 0;
          return total > gain ? total - gain : 0;
        };
        const int64_t last = first + team.argmin(pool - first, [&](int64_t i) { return left_by(first + i); });
        const double energy = last < first ? least : left_by(last);
        if (last >= first && (least < 0 || energy < least)) {
          least = energy;
          for (int l = team.thread; l < depth; l += team.threads) at_.best[l] = at_.pool[at_.chosen[l]];
          put(team, at_.best + depth, at_.pool[last]);
        }
        search_.work.add(static_cast<double>(pool) * checks * active);
        --depth;
        continue;
      }
      const int chosen = at_.chosen[depth] + 1;
      team.sync();
      put(team, at_.chosen + depth, chosen);
      if (chosen > pool - (set.size - depth)) {
        --depth;
        continue;
      }
      Complex* below = level + int64_t{depth + 1} * checks * width;
      for (int i = chosen + team.thread; i < width; i += team.threads) {
        double size = 0;
        Complex dot{0, 0};
        for (int m = 0; m < checks; ++m) {
          size += norm2(here[m * width + chosen]);
          dot = dot + conj(here[m * width + chosen]) * here[m * width + i];
        }
        if (size > 0) dot = (1 / size) * dot;
        for (int m = 0; m < checks; ++m) below[m * width + i] = here[m * width + i] - dot * here[m * width + chosen];
      }
      search_.work.add(2.0 * (width - chosen) * checks);
      put(team, at_.chosen + ++depth, chosen);
    }
    const double tolerated = kTolerance * kTolerance * (checks - set.size) * active;
    if (least < 0 || least > tolerated) return false;
    copy(team, set.member, at_.best, set.size);
    return improver_.settle(set).explained();
  }

  SearchState<Team>& search_;
  Analysis<Team>& analysis_;
  Improver<Team>& improver_;
  const SubsetArrays at_;
};

}  // namespace
}  // namespace draco

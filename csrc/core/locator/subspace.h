// The signal subspace (MUSIC with smoothing: Schmidt 1986; Shan, Wax and Kailath 1985): windows of consecutive
// syndromes, of every active projection, are combinations of the bad nodes' windows. Far better conditioned than
// Prony's method, the more the errors differ from column to column: it finds hundreds of bad workers that do not
// collude.
#pragma once

#include "core/locator/best_first.h"
#include "core/locator/exchange.h"
#include "core/locator/prony.h"

namespace draco {
namespace {

constexpr int kSnapshots = 3;  // windows of the syndromes per member that the subspace is taken from

struct SubspaceArrays {
  Complex *filter, *syndrome, *windows, *basis, *rows;
  double *left, *whole;
  int *column, *chosen, *picked, *nearest;

  static DRACO_MEMBER int64_t most_windows(int64_t s) {
    return 2 * (kSnapshots * s + most_active(static_cast<int>(s)));
  }
  DRACO_MEMBER SubspaceArrays(Arena& arena, int64_t n, int64_t s) {
    const int64_t k = 2 * s, a = active_stride(static_cast<int>(s)), most = most_windows(s);
    filter = arena.take<Complex>(n);
    syndrome = arena.take<Complex>(k * a + 1);
    windows = arena.take<Complex>(k * most + 1);
    basis = arena.take<Complex>(k * k + 1);
    rows = arena.take<Complex>(most * s + 1);
    left = arena.take<double>(most);
    whole = arena.take<double>(most);
    column = arena.take<int>(a);
    chosen = arena.take<int>(a);
    picked = arena.take<int>(s + 1);
    nearest = arena.take<int>(n);
  }
};

// Its methods are collectives.
template <typename Team>
class Subspace {
 public:
  DRACO_TEAM Subspace(SearchState<Team>& search, const SubspaceArrays& arrays) : search_(search), at_(arrays) {}

  // Writes a set to `member` that explains the active projections; returns it, or an empty one. Longer windows tell
  // nodes better apart, but there are fewer of them, and together they must span as many dimensions as there are bad
  // workers: so several widths are tried.
  DRACO_TEAM_CALL Set find(Analysis<Team>& analysis, Improver<Team>& improver, const BeamArrays& beam, int* member) {
    const Team& team = search_.team;
    const int most = search_.most, n = search_.in.workers, active = search_.active_count;
    search_.work.spent = 0;
    const Syndromes syndromes = filter_syndromes(search_, at_.filter, at_.syndrome);
    for (int a = team.thread; a < active; a += team.threads) at_.column[a] = a;
    team.sync();
    // Errors that are alike in all workers make columns that depend on each other: those then say nothing more.
    const int rank = extend_basis({syndromes.count, active, active, syndromes.largest}, 0, most);
    if (rank == 0) return {member, 0};
    int columns = active;
    if (2 * rank < active) {
      columns = rank;
      for (int a = team.thread; a < rank; a += team.threads) at_.column[a] = at_.chosen[a];
      team.sync();
    }
    double least = HUGE_VAL;
    int size = 0;
    const int needed = (most + rank - 1) / rank, enough = (kSnapshots * most + rank - 1) / rank;
    // Wrong by a multiple of what is right, as with a flipped sign, all windows together have n - 2s - 1 dimensions
    // more than there are of each column: the second width is for those.
    const int between = most + (n - search_.parity.rows + 1) / 2;
    const int widths[] = {12 * most / 8, between, 10 * most / 8, 14 * most / 8, 9 * most / 8, 11 * most / 8};
    for (int trial = 0; trial < 6 && !search_.work.exhausted(); ++trial) {
      const int longest = syndromes.count + 1 - needed, shortest = syndromes.count + 1 - enough;
      int width = widths[trial];
      if (trial != 1 && width < shortest) width = shortest;  // more windows add work, but nothing to the space
      if (width > longest) width = longest - trial * (longest - most) / 8;
      if (width <= most) width = most + 1;
      if (width > syndromes.count) width = syndromes.count;
      const int each = syndromes.count - width + 1;  // windows of a column
      const int limit = static_cast<int>(SubspaceArrays::most_windows(search_.in.adversaries)) / each;
      const int used = columns < limit ? columns : limit;
      const Windows windows{width, each * used, used, syndromes.largest};
      const Set set = nearest_workers(windows, syndromes.count, {member, 0});
      for (int i = team.thread; i < set.size; i += team.threads) at_.picked[i] = member[i];
      team.sync();
      if (set.size > 0) {
        const auto settled = improver.settle(set);
        if (settled.explained()) return set;
        if (settled.total < least) {
          least = settled.total;
          size = set.size;
          copy(team, at_.nearest, member, size);
          const Set larger = improver.grow(set, kMoreMembers);  // the smallest errors may be below the noise in windows
          if (larger.size > 0) return larger;
        }
      }
      // The nearest are right, as a rule, and one that is not costs a check only. So the nearest half, and three
      // quarters, are taken for bad, and the others looked for in what is left: a problem of half the size.
      for (int half = 2; half <= 3 && set.size > kFewMembers && !search_.work.exhausted(); ++half) {
        const int given = set.size * half / 4;
        for (int i = team.thread; i < given; i += team.threads) member[i] = at_.picked[i];
        team.sync();
        const Set all = improver.drop_innocent(nearest_workers(windows, syndromes.count, {member, given}));
        if (all.size > 0 && improver.settle(all).explained()) return all;
      }
    }
    if (size == 0 || most <= kMostSubsetSize) return {member, 0};
    search_.work.spent = 0;
    copy(team, member, at_.nearest, size);
    const Set larger = improver.grow({member, size}, most);
    if (larger.size > 0) return larger;
    search_.work.spent = 0;
    copy(team, member, at_.nearest, size);
    // The beam lies over this step's arrays, which are no longer needed.
    return {member, best_first(search_, analysis, beam, {member, size}) ? size : 0};
  }

 private:
  // `count` windows of `width` syndromes, which go through `columns` columns first.
  struct Windows {
    int width, count, columns;
    double largest;  // of the syndromes' filter
  };

  // Entry m of a window.
  DRACO_TEAM Complex entry(const Windows& windows, int64_t index, int64_t m) const {
    return at_.syndrome[(index / windows.columns + m) * search_.stride + at_.column[index % windows.columns]];
  }

  // Adds to the first `given` columns of `basis`, which are orthonormal, those of the windows that stand above the
  // noise: the largest that is left joins it, and is taken out of the others. Writes, of each that joins, which window
  // it was to `chosen`; returns how many, at most `most`.
  DRACO_TEAM_CALL int extend_basis(const Windows& windows, int given, int most) {
    const Team& team = search_.team;
    const int width = windows.width, count = windows.count;
    for (int64_t i = team.thread; i < int64_t{count} * width; i += team.threads)
      at_.windows[i] = entry(windows, i / width, i % width);
    team.sync();
    // What a window has left is below its rounding where it is 1e-13 of what it was.
    const double noise = kTolerance * kTolerance * kQuiet * width * windows.largest;
    int added = 0;
    for (; added < most && given + added < width; ++added) {
      for (int w = team.warp; w < count; w += team.warps) {
        Complex* own = at_.windows + int64_t{w} * width;
        if (added == 0) {
          const double whole = squared_norm(team, own, width);
          if (team.lane == 0) at_.whole[w] = whole;
        }
        for (int l = added == 0 ? 0 : given + added - 1; l < given + added; ++l) {
          const Complex* q = at_.basis + int64_t{l} * width;
          subtract(team, inner(team, q, own, width), q, own, width);
        }
        const double left = squared_norm(team, own, width);
        if (team.lane == 0) at_.left[w] = left;
      }
      team.sync();
      const int64_t next = team.argmin(count, [&](int64_t w) {
        const double left = at_.left[w];
        return left > noise && left > 1e-26 * at_.whole[w] ? -left : kNever;
      });
      if (next < 0) break;
      const double scale = 1 / sqrt(at_.left[next]);
      for (int m = team.thread; m < width; m += team.threads)
        at_.basis[int64_t{given + added} * width + m] = scale * at_.windows[next * width + m];
      put(team, at_.chosen + added, static_cast<int>(next));
    }
    search_.work.add(static_cast<double>(count) * width * (added + given) * 2);
    return added;
  }

  // Writes, behind the members of `given`, which are taken for bad, the workers whose windows lie nearest to the space
  // of the syndromes' windows without theirs, as many as that has dimensions above the noise, but no more than can be
  // looked at. Returns all together, or an empty set where there was nothing given and nothing found.
  DRACO_TEAM_CALL Set nearest_workers(const Windows& windows, int syndromes, Set given_set) {
    const Team& team = search_.team;
    const int n = search_.in.workers, width = windows.width, count = windows.count, given = given_set.size;
    const Complex* power = search_.parity.power;
    int* const member = given_set.member;
    double* const rank = search_.rank;
    for (int64_t i = team.thread; i < int64_t{given} * width; i += team.threads)
      at_.basis[i] = power[i % width * n + member[i / width]];
    team.sync();
    orthonormalise(team, at_.basis, width, given);
    int most = static_cast<int>(most_members(search_.most)) - given;
    if (most > search_.most) most = search_.most;
    if (most > syndromes - 1 - given) most = syndromes - 1 - given;
    const int found = extend_basis(windows, given, most);
    if (found == 0) return given_set;
    // The basis is of single windows, noise and all. One step of subspace iteration averages over all of them.
    Complex* const own = at_.basis + int64_t{given} * width;
    for (int64_t i = team.thread; i < int64_t{found} * count; i += team.threads) {
      const Complex* q = own + i / count * width;
      Complex dot{0, 0};
      for (int m = 0; m < width; ++m) dot = dot + conj(entry(windows, i % count, m)) * q[m];
      at_.rows[i] = dot;
    }
    team.sync();
    orthonormalise(team, at_.rows, count, found);
    for (int64_t i = team.thread; i < int64_t{found} * width; i += team.threads) {
      const Complex* v = at_.rows + i / width * count;
      Complex sum{0, 0};
      for (int w = 0; w < count; ++w) sum = sum + entry(windows, w, i % width) * v[w];
      own[i] = sum;
    }
    team.sync();
    orthonormalise(team, at_.basis, width, given + found);
    const double whole = static_cast<double>(width) / n;  // of a worker's window, squared
    for (int j = team.warp; j < n; j += team.warps) {
      double known = 0, inside = 0;
      for (int l = 0; l < given + found; ++l) {
        const Complex* q = at_.basis + int64_t{l} * width;
        Complex dot{0, 0};
        for (int m = team.lane; m < width; m += team.lanes) dot = dot + conj(q[m]) * power[int64_t{m} * n + j];
        (l < given ? known : inside) += norm2(team.sum(dot));
      }
      if (team.lane == 0)
        rank[j] = search_.is_erased(j) || whole - known < 1e-9 * whole ? kNever : inside / (known - whole);
    }
    team.sync();
    search_.work.add(static_cast<double>(given + found) * width * (2.0 * count + n) +
                     2.0 * found * found * (count + width));
    for (int i = 0; i < given; ++i) put(team, rank + member[i], kNever);
    for (int i = given; i < given + found; ++i) {
      const int64_t best = team.argmin(n, [&](int64_t j) { return rank[j]; });
      if (best < 0) return {member, i};
      put(team, member + i, static_cast<int>(best));
      put(team, rank + best, kNever);
    }
    return {member, given + found};
  }

  SearchState<Team>& search_;
  const SubspaceArrays at_;
};

}  // namespace
}  // namespace draco

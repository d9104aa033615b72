// Shared by the steps of a search: its input, the code's checks, and the projections that are not explained yet.
#pragma once

#include <cmath>

#include "core/locator/parity.h"

namespace draco {
namespace {

constexpr double kTolerance = 6.0;  // a check may be this many times the noise (root mean square over the checks)
constexpr double kQuiet = 0.1;      // of the tolerated energy: what honest noise really leaves
// The search takes a set for explained up to this part of the tolerated energy: less than 1, as all columns are looked
// at again by other code, rounded otherwise.
constexpr double kExplained = 0.9;
constexpr int kActivated = 8;        // projections that join the search at a time, the least explained first
constexpr int kTogether = 4;         // active projections that one thread multiplies at a time
constexpr int kFewMembers = 8;       // up to which every number of bad workers is tried
constexpr int kMostSubsetSize = 12;  // of sets that are enumerated
constexpr double kNever = NAN;       // what argmin passes over

struct LocatorInput {
  int workers, adversaries;
  const double *re, *im;  // projection c of worker j: re[j * stride + c * step]; rows of erased workers are 0
  int64_t stride, step, columns;
  const double* noise;       // (columns,): standard deviation of an honest projection's rounding
  const uint8_t* missing;    // (workers,): known to be absent
  const uint8_t* nonfinite;  // (workers,): sent inf or NaN, therefore bad
  const uint8_t* hint;       // (workers,) or nullptr: those, finite, that some of the columns say are bad
};

// A projection is unexplained when its energy under this many checks is above what noise may leave.
DRACO_HD double unexplained(double energy, double noise, int checks) {
  const double ratio = sqrt(energy) / noise;  // energy / noise^2 could overflow
  return ratio * ratio / (kTolerance * kTolerance * checks);
}

// The most projections that can take part in a search: as many as bad workers could be wrong in alone, with some room.
DRACO_HD int most_active(int adversaries) { return 2 * adversaries + 32; }

// Columns of the arrays that have one for each of them: they are worked on kTogether at a time.
DRACO_HD int active_stride(int adversaries) {
  return (most_active(adversaries) + kTogether - 1) / kTogether * kTogether;
}

// The most members of a set that is looked at: half as many again as may be bad.
DRACO_HD int64_t most_members(int64_t adversaries) { return adversaries + adversaries / 2; }

struct SearchArrays {
  Complex* active_p;
  int64_t* active;
  int *set, *list;
  double *rank, *gain;

  DRACO_MEMBER SearchArrays(Arena& arena, int64_t n, int64_t s) {
    active_p = arena.take<Complex>(n * active_stride(static_cast<int>(s)));
    active = arena.take<int64_t>(most_active(static_cast<int>(s)));
    set = arena.take<int>(n);
    list = arena.take<int>(n);
    rank = arena.take<double>(n);
    gain = arena.take<double>(n);
  }
};

template <typename Team>
struct SearchState {
  const Team team;
  const LocatorInput in;
  Parity<Team> parity;
  Work work;
  int most = 0;     // workers that may be bad, besides those that are not finite
  int barred = -1;  // a worker that no set may take in

  // Projections that take part, in units of their noise: column a of (workers, stride), 0 from active_count up to a
  // multiple of kTogether.
  Complex* const active_p;
  int64_t* const active;  // which those are
  const int stride;
  int active_count = 0;

  // Scratch for any step: a set, a list of workers, and two numbers for each worker.
  int *const set, *const list;
  double *const rank, *const gain;

  DRACO_TEAM SearchState(const Team& team_, const LocatorInput& input, const ParityArrays& parity_arrays,
                         const SearchArrays& arrays)
      : team(team_),
        in(input),
        parity(team_, input.workers, input.adversaries, parity_arrays),
        active_p(arrays.active_p),
        active(arrays.active),
        stride(active_stride(input.adversaries)),
        set(arrays.set),
        list(arrays.list),
        rank(arrays.rank),
        gain(arrays.gain) {}
  SearchState(const SearchState&) = delete;

  DRACO_TEAM bool is_erased(int64_t j) const { return in.missing[j] || in.nonfinite[j]; }
  DRACO_TEAM int present() const { return in.workers - parity.erased(); }
  DRACO_TEAM Complex projection(int64_t j, int a) const { return active_p[j * stride + a]; }

  // Adds the least explained columns to the search, at most kActivated or half of the bad workers that there may be;
  // returns how many, or -1 where there is no room left. Collective.
  DRACO_TEAM_CALL int activate(const double* energy, int checks) {
    const int before = active_count, limit = most / 2 > kActivated ? most / 2 : kActivated;
    for (int i = 0; i < limit; ++i) {
      const int64_t worst = team.argmin(in.columns, [&](int64_t c) {
        const double size = unexplained(energy[c], in.noise[c], checks);
        bool out = size <= 1;
        for (int a = before; a < active_count; ++a) out |= active[a] == c;
        return out ? kNever : size == size ? -size : -HUGE_VAL;
      });
      if (worst < 0) break;
      if (active_count == most_active(in.adversaries)) return active_count > before ? active_count - before : -1;
      const double noise = in.noise[worst];
      for (int j = team.thread; j < in.workers; j += team.threads) {
        const int64_t at = j * in.stride + worst * in.step;
        Complex* p = active_p + int64_t{j} * stride + active_count;
        p[0] = {in.re[at] / noise, in.im[at] / noise};
        for (int t = 1; active_count % kTogether == 0 && t < kTogether; ++t) p[t] = {0, 0};
      }
      if (team.thread == 0) active[active_count] = worst;
      team.sync();
      ++active_count;
    }
    return active_count - before;
  }

  // to[m * stride + a] = sum over workers of row(m, j) * P_ja, for all active a. Collective.
  template <typename Row>
  DRACO_TEAM void multiply_active(int rows, Row&& row, Complex* to) {
    const int batches = (active_count + kTogether - 1) / kTogether;
    for (int i = team.thread; i < rows * batches; i += team.threads) {
      const int m = i / batches, a = i % batches * kTogether;  // columns beyond active_count are 0
      Complex sum[kTogether] = {};
      for (int j = 0; j < in.workers; ++j) {
        const Complex factor = row(m, j);
        for (int t = 0; t < kTogether; ++t) sum[t] = sum[t] + factor * active_p[int64_t{j} * stride + a + t];
      }
      for (int t = 0; t < kTogether; ++t) to[int64_t{m} * stride + a + t] = sum[t];
    }
    team.sync();
    work.add(static_cast<double>(rows) * in.workers * active_count);
  }
};

}  // namespace
}  // namespace draco

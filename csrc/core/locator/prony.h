// Prony's method: the null vector of the stacked Hankel systems of all active projections is the polynomial whose roots
// are the bad nodes. Exact when the errors stand well above the noise, also for colluders.
#pragma once

#include "core/locator/search.h"

namespace draco {
namespace {

constexpr int kPronyColumns = 32;    // of the active projections, the last, are in Prony's system
constexpr double kRounding = 1e-12;  // of singular values, relative to the largest, with room

// The syndromes that the erased workers do not enter.
struct Syndromes {
  const Complex* value;  // (count, active)
  int count;
  double largest;  // of the squared values of the polynomial that they were filtered with
};

// Multiplies every worker's projection by a polynomial whose roots are the erased workers' nodes. Collective.
template <typename Team>
DRACO_TEAM_CALL Syndromes filter_syndromes(SearchState<Team>& search, Complex* filter, Complex* syndrome) {
  const Team& team = search.team;
  const Parity<Team>& parity = search.parity;
  const int n = search.in.workers, count = parity.rows - parity.erased();
  for (int j = team.thread; j < n; j += team.threads) {
    Complex product{1, 0};
    for (int i = 0; i < parity.erased(); ++i)
      product = j == parity.erased(i) ? Complex{0, 0} : product * (parity.node[j] - parity.node[parity.erased(i)]);
    filter[j] = product;
  }
  team.sync();
  double largest = 0;
  for (int j = 0; j < n; ++j) largest = fmax(largest, norm2(filter[j]));
  search.multiply_active(count, [&](int m, int j) { return filter[j] * parity.power[int64_t{m} * n + j]; }, syndrome);
  return {syndrome, count, largest};
}

struct PronyArrays {
  Complex *filter, *syndrome, *system, *diagonal, *triangle, *vectors;

  DRACO_MEMBER PronyArrays(Arena& arena, int64_t n, int64_t s) {
    const int64_t k = 2 * s, unknowns = s + 1;
    filter = arena.take<Complex>(n);
    syndrome = arena.take<Complex>(k * active_stride(static_cast<int>(s)) + 1);
    system = arena.take<Complex>((k * kPronyColumns + unknowns) * unknowns);
    diagonal = arena.take<Complex>(unknowns);
    triangle = arena.take<Complex>(unknowns * unknowns);
    vectors = arena.take<Complex>(unknowns * unknowns);
  }
};

// Writes `size` workers to `set`, and how small the polynomial is at each worker's node to `rank`. False, and nothing
// written, where no set of that size can explain the last active projections: the polynomial with its roots there would
// be a nearly null vector, as a row of the Hankel system times its coefficients, of norm 1, is what a check of norm 1
// that vanishes on the set makes of the workers' messages, times the filter. Collective.
template <typename Team>
DRACO_TEAM_CALL bool prony(SearchState<Team>& search, const PronyArrays& at, Set set, double* rank) {
  const Team& team = search.team;
  const Parity<Team>& parity = search.parity;
  const int n = search.in.workers, stride = search.stride, active = search.active_count;
  const Syndromes syndromes = filter_syndromes(search, at.filter, at.syndrome);
  const int unknowns = set.size + 1, hankel = syndromes.count - set.size;
  const int columns = active < kPronyColumns ? active : kPronyColumns, first = active - columns;
  const int64_t equations = int64_t{hankel} * columns;
  // Columns of the stacked Hankel system, one after the other.
  for (int64_t i = team.thread; i < equations * unknowns; i += team.threads) {
    const int64_t l = i / equations, row = i % equations;
    at.system[i] = at.syndrome[(row / columns + l) * stride + first + row % columns];
  }
  team.sync();
  search.work.add(static_cast<double>(equations) * unknowns * unknowns);
  const NullVector found = null_vector(team, at.system, equations, unknowns, at.triangle, at.diagonal, at.vectors);
  const double tolerated = kTolerance * kTolerance * hankel * static_cast<double>(equations) * syndromes.largest;
  if (found.least > tolerated + kRounding * kRounding * found.total) return false;
  Complex* polynomial = at.vectors + found.column * unknowns;

  for (int j = team.thread; j < n; j += team.threads)
    rank[j] = sqrt(norm2(evaluate(polynomial, set.size, parity.node[j])));
  team.sync();
  for (int i = team.thread; i < parity.erased(); i += team.threads) rank[parity.erased(i)] = HUGE_VAL;
  team.sync();
  // The node with the smallest value is a root; dividing it out keeps its neighbours from looking like roots as well.
  for (int i = 0; i < set.size; ++i) {
    const int degree = set.size - i;
    const int root = static_cast<int>(team.argmin(n, [&](int64_t j) {
      const double value = norm2(evaluate(polynomial, degree, parity.node[j]));
      bool taken = rank[j] == HUGE_VAL;
      for (int l = 0; l < i; ++l) taken |= set.member[l] == j;
      return taken ? kNever : value == value ? value : HUGE_VAL;
    }));
    put(team, set.member + i, root < 0 ? 0 : root);
    if (team.thread == 0 && root >= 0) {
      for (int m = degree - 1; m >= 0; --m) polynomial[m] = polynomial[m] + parity.node[root] * polynomial[m + 1];
      for (int m = 0; m < degree; ++m) polynomial[m] = polynomial[m + 1];
    }
    team.sync();
  }
  return true;
}

}  // namespace
}  // namespace draco

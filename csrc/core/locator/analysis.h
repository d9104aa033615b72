// Analyses a set of workers: the energy that it leaves unexplained, and how one more member, or another, changes that.
#pragma once

#include "core/locator/search.h"

namespace draco {
namespace {

struct AnalysisArrays {
  Complex *residual, *product, *dual, *along, *reach;
  double *energy, *size, *reach_size;

  DRACO_MEMBER AnalysisArrays(Arena& arena, int64_t n, int64_t s) {
    const int64_t k = 2 * s, a = active_stride(static_cast<int>(s)), most = most_members(s);
    residual = arena.take<Complex>(k * a + 1);
    product = arena.take<Complex>(n * a);
    dual = arena.take<Complex>(most * k + 1);
    along = arena.take<Complex>(most * n + 1);
    reach = arena.take<Complex>(most * a + 1);
    energy = arena.take<double>(a);
    size = arena.take<double>(n);
    reach_size = arena.take<double>(most + 1);
  }
};

// The part of the active projections that the checks without a set see: good until the next set is looked at.
struct Residuals {
  Checks checks;
  const Complex* value;  // (checks, active)
  const double* energy;  // (active,)
  double total;          // of all energies

  // The largest energy per check, in units of what is tolerated: at most 1 means explained.
  DRACO_MEMBER double excess(int active_count) const {
    double worst = 0;
    for (int a = 0; a < active_count; ++a)
      if (!(energy[a] <= worst)) worst = energy[a];
    return checks.count == 0 ? 0 : worst / (checks.count * kTolerance * kTolerance);
  }
};

// All exchanges of one member of a set. For member i let u_i be the unit vector that the checks without it have
// more than those of the whole set: a combination of the members' columns, orthogonal to all but its own. So one
// factorisation serves for all exchanges.
template <typename Team>
struct Exchanges {
  const SearchState<Team>& search;
  Set set;
  double total;              // energy that the whole set leaves
  const double* energy;      // (active,)
  const Complex* product;    // (workers, active): inner products of each worker's checks with the residuals
  const double* size;        // (workers,): squared norms of those checks
  const Complex* along;      // (members, workers): u_i^H h_j
  const Complex* reach;      // (members, active): what u_i sees of the projections
  const double* reach_size;  // (members,): its squared norm

  // The squared norm of what h_j adds to the other members' columns, or 0 where worker j cannot take the place of
  // member i.
  DRACO_TEAM double place(int i, int64_t j) const {
    bool out = search.is_erased(j) || j == search.barred;
    for (int l = 0; l < set.size; ++l) out |= set.member[l] == j;
    const double squared = size[j] + norm2(along[int64_t{i} * search.in.workers + j]);
    return out || !(squared > 1e-24) ? 0 : squared;
  }
  // The change that an exchange makes to the energy of an active projection; squared: place().
  DRACO_TEAM double change(int i, int64_t j, double squared, int a) const {
    const Complex seen = reach[int64_t{i} * search.stride + a];
    const Complex dot = product[j * search.stride + a] + conj(along[int64_t{i} * search.in.workers + j]) * seen;
    return norm2(seen) - norm2(dot) / squared;
  }
  // The energy that all active projections have left after member i is exchanged for worker j.
  DRACO_TEAM double left_after(int i, int64_t j) const {
    const double squared = place(i, j);
    if (squared == 0) return kNever;
    double gain = 0;
    for (int a = 0; a < search.active_count; ++a)
      gain += norm2(product[j * search.stride + a] +
                    conj(along[int64_t{i} * search.in.workers + j]) * reach[int64_t{i} * search.stride + a]);
    const double left = total + reach_size[i] - gain / squared;
    return left > 0 ? left : 0;  // rounding may cross 0
  }
};

// Its methods are collectives.
template <typename Team>
class Analysis {
 public:
  DRACO_TEAM Analysis(SearchState<Team>& search, const AnalysisArrays& arrays) : search_(search), at_(arrays) {}

  DRACO_TEAM_CALL Residuals residuals(Set set) {
    const Team& team = search_.team;
    const Checks checks = search_.parity.checks_without(set, search_.work);
    const int n = search_.in.workers, stride = search_.stride;
    search_.multiply_active(checks.count, [&](int m, int j) { return checks.rows[int64_t{m} * n + j]; }, at_.residual);
    for (int a = team.thread; a < search_.active_count; a += team.threads) {
      double total = 0;
      for (int m = 0; m < checks.count; ++m) total += norm2(at_.residual[int64_t{m} * stride + a]);
      at_.energy[a] = total;
    }
    team.sync();
    double total = 0;
    for (int a = 0; a < search_.active_count; ++a) total += at_.energy[a];
    return {checks, at_.residual, at_.energy, total};
  }

  // For every worker, the energy that erasing it too would take away; -1 for those who cannot join the set.
  DRACO_TEAM_CALL const double* gains(Set set) {
    const Team& team = search_.team;
    const Residuals left = residuals(set);
    products(left);
    for (int j = team.thread; j < search_.in.workers; j += team.threads) {
      double sum = 0;
      for (int a = 0; a < search_.active_count; ++a) sum += norm2(at_.product[int64_t{j} * search_.stride + a]);
      search_.gain[j] = at_.size[j] > 1e-24 ? sum / at_.size[j] : -1;
    }
    team.sync();
    for (int i = team.thread; i < left.checks.vanishing; i += team.threads)
      search_.gain[search_.parity.vanishing(set, i)] = -1;
    if (search_.barred >= 0 && team.thread == 0) search_.gain[search_.barred] = -1;
    team.sync();
    return search_.gain;
  }

  // `left`: the residuals of this set.
  DRACO_TEAM_CALL Exchanges<Team> exchanges(Set set, const Residuals& left) {
    const Team& team = search_.team;
    const Checks& checks = left.checks;
    const int n = search_.in.workers, rows = search_.parity.rows, stride = search_.stride;
    const int all = checks.vanishing, erased = all - set.size;
    products(left);
    for (int i = team.thread; i < set.size; i += team.threads) {  // R^H y = e_i, u_i = Q y / |y|
      Complex* y = at_.dual + int64_t{i} * rows;
      const int own = erased + i;
      double total = 0;
      for (int l = 0; l < all; ++l) {
        Complex sum = l == own ? Complex{1, 0} : Complex{0, 0};
        for (int m = own; m < l; ++m) sum = sum - conj(checks.factor[int64_t{l} * rows + m]) * y[m];
        y[l] = l < own ? Complex{0, 0} : quotient(sum, conj(checks.diagonal[l]));
        total += norm2(y[l]);
      }
      const double scale = total > 0 ? 1 / sqrt(total) : 0;
      for (int l = own; l < all; ++l) y[l] = scale * y[l];
      at_.reach_size[i] = scale;  // u_i^H h of the member itself
    }
    team.sync();
    for (int64_t i = team.thread; i < int64_t{set.size} * n; i += team.threads) {
      const int64_t member = i / n, j = i % n;
      const Complex *y = at_.dual + member * rows, *image = checks.image + j * rows;
      Complex dot{0, 0};
      for (int l = erased + static_cast<int>(member); l < all; ++l) dot = dot + conj(y[l]) * image[l];
      at_.along[i] = dot;
    }
    team.sync();
    for (int i = team.thread; i < set.size * all; i += team.threads) {
      const int member = i / all, other = search_.parity.vanishing(set, i % all);
      const double own = i % all == erased + member ? at_.reach_size[member] : 0;
      at_.along[int64_t{member} * n + other] = {own, 0};
    }
    team.sync();
    search_.multiply_active(set.size, [&](int i, int j) { return at_.along[int64_t{i} * n + j]; }, at_.reach);
    for (int i = team.thread; i < set.size; i += team.threads) {
      double total = 0;
      for (int a = 0; a < search_.active_count; ++a) total += norm2(at_.reach[int64_t{i} * stride + a]);
      at_.reach_size[i] = total;
    }
    team.sync();
    search_.work.add(static_cast<double>(set.size) * all * (all + n));
    return {search_, set, left.total, left.energy, at_.product, at_.size, at_.along, at_.reach, at_.reach_size};
  }
  DRACO_TEAM Exchanges<Team> exchanges(Set set) { return exchanges(set, residuals(set)); }

 private:
  // `product`, the inner products of every worker's checks with the residuals, and `size`, their squared norms.
  DRACO_TEAM_CALL void products(const Residuals& left) {
    const Team& team = search_.team;
    const int n = search_.in.workers, rows = search_.parity.rows, stride = search_.stride;
    const int all = left.checks.vanishing, checks = left.checks.count;
    for (int64_t i = team.thread; i < int64_t{n} * search_.active_count; i += team.threads) {
      const int64_t j = i / search_.active_count, a = i % search_.active_count;
      const Complex* own = left.checks.image + j * rows + all;
      Complex dot{0, 0};
      for (int m = 0; m < checks; ++m) dot = dot + conj(own[m]) * left.value[int64_t{m} * stride + a];
      at_.product[j * stride + a] = dot;
    }
    for (int j = team.warp; j < n; j += team.warps) {
      const double size = squared_norm(team, left.checks.image + int64_t{j} * rows + all, checks);
      if (team.lane == 0) at_.size[j] = size;
    }
    team.sync();
    search_.work.add(static_cast<double>(checks) * n * search_.active_count);
  }

  SearchState<Team>& search_;
  const AnalysisArrays at_;
};

}  // namespace
}  // namespace draco

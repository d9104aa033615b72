// Errors that are alike in many workers, in codes of few dimensions (n - 2s), where the subspace sees too little.
#pragma once

#include "core/locator/exchange.h"
#include "core/random.h"

namespace draco {
namespace {

constexpr int kMostDimension = 8;        // of a code whose workers are asked for a consensus
constexpr int kMostRivalDimension = 56;  // of a code where a second codeword is looked for
constexpr double kAlike = 1e-3;          // relative
constexpr int kConsensusTrials = 1024, kConsensusColumns = 8;
constexpr int kConsensusDomain = 6;  // of Philox, beside those of core/random.h

// So many workers that are honest as the code has dimensions determine what all honest ones sent, and are often met by
// chance: takes them at random, one from each part of the circle, until few enough workers contradict them (information
// set decoding, Prange 1962). Finds what the subspace cannot: half of the workers wrong in the same way, in a code that
// hardly differs from repetition. Writes to `member`; returns a set that explains the active projections, or an empty
// one. Collective.
template <typename Team>
DRACO_TEAM_CALL Set consensus(SearchState<Team>& search, Improver<Team>& improver, int* member) {
  const Team& team = search.team;
  const Complex* node = search.parity.node;
  const int n = search.in.workers, dimension = n - search.parity.rows, present = search.present();
  if (dimension > kMostDimension || present < dimension || search.most <= kFewMembers) return {member, 0};
  const int columns = search.active_count < kConsensusColumns ? search.active_count : kConsensusColumns;
  double* const is_wrong = search.rank;
  for (uint64_t trial = 0; trial < kConsensusTrials; ++trial) {
    int seen = 0, next = 0, own[kMostDimension];
    const auto pick = [&](int part) {
      const int first = part * present / dimension, last = (part + 1) * present / dimension;
      return first +
             static_cast<int>(philox(trial, part, kConsensusDomain).word[0] % static_cast<uint32_t>(last - first));
    };
    for (int j = 0, wanted = pick(0); j < n && next < dimension; ++j) {
      if (search.is_erased(j) || seen++ != wanted) continue;
      own[next++] = j;
      if (next < dimension) wanted = pick(next);
    }
    for (int j = team.thread; j < n; j += team.threads) {
      // Honest projections are polynomials of degree n - 2s - 1 in the node.
      Complex weight[kMostDimension];
      double noise = 1;
      bool taken = search.is_erased(j);
      for (int i = 0; i < dimension; ++i) {
        taken |= own[i] == j;
        weight[i] = {1, 0};
        for (int l = 0; l < dimension; ++l)
          if (l != i) weight[i] = weight[i] * quotient(node[j] - node[own[l]], node[own[i]] - node[own[l]]);
        noise += norm2(weight[i]);
      }
      bool wrong = false;
      for (int a = 0; a < columns && !taken; ++a) {
        Complex apart = search.projection(j, a);
        for (int i = 0; i < dimension; ++i) apart = apart - weight[i] * search.projection(own[i], a);
        wrong |= !(norm2(apart) <= kTolerance * kTolerance * noise);
      }
      is_wrong[j] = wrong;
    }
    team.sync();
    const Set set = improver.try_without(member, [&](int j) { return is_wrong[j] != 0; });
    if (set.size > 0) return set;
  }
  return {member, 0};
}

struct RivalArrays {
  Complex *value, *system, *diagonal, *triangle, *vectors, *ratio;

  DRACO_MEMBER RivalArrays(Arena& arena, int64_t n, int64_t s) {
    const int64_t dimension = n - 2 * s, unknowns = dimension <= kMostRivalDimension ? 3 * dimension : 0;
    value = arena.take<Complex>(2 * n);
    system = arena.take<Complex>(n * unknowns + 1);
    diagonal = arena.take<Complex>(unknowns + 1);
    triangle = arena.take<Complex>(unknowns * unknowns + 1);
    vectors = arena.take<Complex>(unknowns * unknowns + 1);
    ratio = arena.take<Complex>(n);
  }
};

// The coefficients that come nearest to solving the equations sum over l of entry(j, l) c_l = 0, one of each worker
// that is not erased. Collective.
template <typename Team, typename Entry>
DRACO_TEAM const Complex* null_of(SearchState<Team>& search, const RivalArrays& at, int unknowns, Entry&& entry) {
  const Team& team = search.team;
  const int n = search.in.workers;
  for (int64_t i = team.thread; i < int64_t{n} * unknowns; i += team.threads) {
    const int j = static_cast<int>(i % n);
    at.system[i] = search.is_erased(j) ? Complex{0, 0} : entry(j, static_cast<int>(i / n));
  }
  team.sync();
  const NullVector found = null_vector(team, at.system, n, unknowns, at.triangle, at.diagonal, at.vectors);
  return at.vectors + found.column * unknowns;
}

// The bad send multiples of what is right, or all a word of the code that is right elsewhere (of the step before, or
// 0). Two projections of worker j are then w_j D_0(x_j) and w_j D_1(x_j) with polynomials D of degree n - 2s - 1, so
// that the first times D_1(x_j) is the second times D_0(x_j): linear equations for D, which give w_j, and most of these
// are those of the honest. In the second case y_j is p(x_j) or q(x_j), a root of y^2 - S(x_j) y + P(x_j) with S = p + q
// and P = p q, of twice the degree: linear equations as well (Sudan 1997), and 2 y_j - S(x_j) is D = p - q with a sign
// as w_j. Returns as consensus() does. Collective.
template <typename Team>
DRACO_TEAM_CALL Set rival_codeword(SearchState<Team>& search, Improver<Team>& improver, const RivalArrays& at,
                                   int* member) {
  const Team& team = search.team;
  const Complex* node = search.parity.node;
  const int n = search.in.workers, dimension = n - search.parity.rows;
  if (dimension > kMostRivalDimension || 3 * dimension > search.present() || search.most <= kFewMembers ||
      search.active_count < 2)
    return {member, 0};
  Complex* const value = at.value;
  for (int elsewhere = 0; elsewhere <= 1; ++elsewhere) {
    for (int a = 0; a < 2; ++a) {
      Complex* own = value + int64_t{a} * n;
      double size = 0;
      for (int j = 0; j < n; ++j) size += norm2(search.projection(j, a)) / n;
      const double scale = size > 0 ? 1 / sqrt(size) : 0;
      for (int j = team.thread; j < n; j += team.threads) own[j] = scale * search.projection(j, a);
      team.sync();
      if (!elsewhere) continue;
      const Complex* quadratic = null_of(search, at, 3 * dimension, [&](int j, int l) {
        if (l == 3 * dimension - 1) return own[j] * own[j];
        return l < dimension ? own[j] * node[int64_t{l} * j % n] : node[int64_t{l - dimension} * j % n];
      });
      for (int j = team.thread; j < n; j += team.threads)
        own[j] = 2.0 * own[j] * quadratic[3 * dimension - 1] + evaluate(quadratic, dimension - 1, node[j]);
      team.sync();
    }
    const Complex* common = null_of(search, at, 2 * dimension, [&](int j, int l) {
      return l < dimension ? value[j] * node[int64_t{l} * j % n]
                           : -1.0 * value[n + j] * node[int64_t{l - dimension} * j % n];
    });
    for (int j = team.thread; j < n; j += team.threads)
      at.ratio[j] = quotient(value[j], evaluate(common + dimension, dimension - 1, node[j]));
    team.sync();
    const auto alike = [&](int64_t i, int64_t j) {
      return norm2(at.ratio[i] - at.ratio[j]) <= kAlike * kAlike * norm2(at.ratio[j]);
    };
    const int64_t honest = team.argmin(n, [&](int64_t j) {
      if (search.is_erased(j)) return kNever;
      double count = 0;
      for (int i = 0; i < n; ++i) count -= !search.is_erased(i) && alike(i, j);
      return count;
    });
    if (honest < 0) continue;
    const Set set = improver.try_without(member, [&](int j) { return !search.is_erased(j) && !alike(j, honest); });
    if (set.size > 0) return set;
  }
  return {member, 0};
}

}  // namespace
}  // namespace draco

// Finds the bad workers of the cyclic code from random projections of their messages, and the weights that decode
// without them.
//
// Honest messages satisfy H P = 0 up to rounding, with H_mj = x_j^m / sqrt(n), m = 1 .. 2s (orthonormal rows). Given a
// set A of erased workers, the checks that vanish on A are the orthogonal complement of the columns h_a, a in A, and
// are evaluated on the other workers alone: a message that is 1e30 times too large leaves no rounding behind. A set A
// explains the messages when all of its checks are at the noise level; the locator returns the smallest such set that
// it finds:
//
//   1. A set that explained other projections already, with up to three workers more.
//   2. Prony's method: the null vector of the stacked Hankel systems of all active projections is the polynomial whose
//      roots are the bad nodes. Exact when the errors stand well above the noise, also for colluders.
//   3. Greedy pursuit, for errors of very different size: the largest is erased before the next is looked for.
//   4. The signal subspace (MUSIC with smoothing: Schmidt 1986; Shan, Wax and Kailath 1985): windows of the syndromes
//      span what the bad nodes' windows span. Far better conditioned than 2., the more the errors differ from column
//      to column: it finds hundreds of bad workers that do not collude.
//   5. Consensus of workers taken at random, where the code has few dimensions.
//   6. A second codeword or multiples of the first, sent by half of the workers, where the code has some dimensions
//   more.
//   7. All subsets of neighbours on the circle, whose errors can nearly cancel in the syndromes.
//   8. Best-first search over exchanges, and all subsets of a pool of likely workers.
//
// What 2. to 6. give is improved by exchanging one member at a time while the unexplained energy falls. Whatever the
// search does, a set is only accepted when it explains every projection; otherwise decoding has failed. A member of the
// set is named only if no set without it explains them as well: errors little above the noise may be explained by
// several sets, all of which give the same gradient up to noise, and the honest must not be accused. All arithmetic is
// double. Scratch comes from the caller: nothing is allocated here. Every method is a collective of its team
// (core/team.h): all threads make the same decisions from the same values.
#pragma once

#include <cmath>

#include "core/algebra.h"
#include "core/common.h"
#include "core/cyclic.h"
#include "core/random.h"
#include "core/team.h"

namespace draco {
namespace {

constexpr double kTolerance = 6.0;  // a check may be this many times the noise (root mean square over the checks)
constexpr double kQuiet = 0.1;      // of the tolerated energy: what honest noise really leaves
// What the search takes for explained: less than 1, as all columns are looked at again by other code, rounded
// otherwise.
constexpr double kExplained = 0.9;
constexpr int kActiveStep = 8;           // projections that join the search at a time, the least explained first
constexpr int kPronyColumns = 32;        // of them, the last, are in Prony's system
constexpr int kMoreMembers = 3;          // that a set which explained others before may lack
constexpr int kFewMembers = 8;           // up to which every number of bad workers is tried
constexpr int kSnapshots = 3;            // windows of the syndromes per member that the subspace is taken from
constexpr int kMostDimension = 8;        // of a code whose workers are asked for a consensus
constexpr double kAlike = 1e-3;          // relative
constexpr int kMostRivalDimension = 56;  // of a code where a second codeword is looked for
constexpr int kConsensusTrials = 1024, kConsensusColumns = 8;
constexpr int kConsensusDomain = 6;  // of Philox, beside those of core/random.h
constexpr int kMostSubsets = 20000;  // size of step 7
constexpr int kMostSubsetSize = 12;  // and step 7 is left out for larger sets
constexpr int kWindow = 5;           // so many more workers than sought are in a window of neighbours
constexpr int kBeam = 32;            // sets that the best-first search keeps
constexpr int kChildren = 12;        // exchanges of one member that it considers
constexpr int kTogether = 4;         // active projections that one thread multiplies at a time
constexpr double kFar = 1024;        // times the tolerated amplitude, within which nobody is named: see name()
constexpr int kMoreRivals = 1;       // than members in a set that speaks against naming one
constexpr double kMostNamingWork = 1.5e7;
constexpr double kRounding = 1e-12;  // of singular values, relative to the largest, with room
constexpr double kNever = NAN;       // what argmin passes over
constexpr double kMostWork = 6e7;    // complex multiplications of one search: bounds what an attacker can make it cost

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

// How many projections can take part in a search: as many as bad workers could be wrong in alone, with some room.
DRACO_HD int most_active(int adversaries) { return 2 * adversaries + 32; }

// Of a set that is looked at: half as many again as may be bad.
DRACO_HD int64_t most_members(int64_t adversaries) { return adversaries + adversaries / 2; }

// The arrays of a search, and of its steps, which take theirs from what is left of the scratch.
struct LocatorScratch {
  Complex *factor, *diagonal, *power, *image, *check, *active_p, *residual, *node, *dual, *along, *reach, *product;
  double *size, *reach_size, *gain, *rank, *energy;
  int *erased, *set, *trial, *best, *pool;
  int64_t* active;

  DRACO_MEMBER LocatorScratch(Arena& arena, int64_t n, int64_t s) {
    const int64_t k = 2 * s, a = most_active(static_cast<int>(s));
    factor = arena.take<Complex>(k * k + 1);
    diagonal = arena.take<Complex>(k + 1);
    power = arena.take<Complex>(k * n + 1);
    image = arena.take<Complex>(k * n + 1);
    check = arena.take<Complex>(k * n + 1);
    active_p = arena.take<Complex>(n * a);
    residual = arena.take<Complex>(k * a + 1);
    node = arena.take<Complex>(n);
    const int64_t most = most_members(s);
    dual = arena.take<Complex>(most * k + 1);
    along = arena.take<Complex>(most * n + 1);
    reach = arena.take<Complex>(most * a + 1);
    product = arena.take<Complex>(n * a);
    size = arena.take<double>(n);
    reach_size = arena.take<double>(most + 1);
    gain = arena.take<double>(n);
    rank = arena.take<double>(n);
    energy = arena.take<double>(a);
    erased = arena.take<int>(n);
    set = arena.take<int>(n);
    trial = arena.take<int>(n);
    best = arena.take<int>(n);
    pool = arena.take<int>(n);
    active = arena.take<int64_t>(a);
  }
};

struct PronyScratch {
  Complex *filter, *syndrome, *system, *triangle, *vectors;

  DRACO_MEMBER PronyScratch(Arena arena, int64_t n, int64_t s, int64_t* used) {
    const int64_t k = 2 * s, a = most_active(static_cast<int>(s)), unknowns = s + 1;
    filter = arena.take<Complex>(n);
    syndrome = arena.take<Complex>(k * a + 1);
    system = arena.take<Complex>((k * kPronyColumns + unknowns) * unknowns);
    triangle = arena.take<Complex>(unknowns * unknowns);
    vectors = arena.take<Complex>(unknowns * unknowns);
    if (used != nullptr && arena.used > *used) *used = arena.used;
  }
};

struct SubspaceScratch {
  Complex *filter, *syndrome, *windows, *basis, *rows;
  double *left, *whole;
  int *column, *chosen, *picked;

  static DRACO_MEMBER int64_t most_windows(int64_t s) {
    return 2 * (kSnapshots * s + most_active(static_cast<int>(s)));
  }
  DRACO_MEMBER SubspaceScratch(Arena arena, int64_t n, int64_t s, int64_t* used) {
    const int64_t k = 2 * s, a = most_active(static_cast<int>(s)), most = most_windows(s);
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
    if (used != nullptr && arena.used > *used) *used = arena.used;
  }
};

struct RivalScratch {
  Complex *value, *system, *diagonal, *triangle, *vectors, *ratio;

  DRACO_MEMBER RivalScratch(Arena arena, int64_t n, int64_t s, int64_t* used) {
    const int64_t dimension = n - 2 * s, unknowns = dimension <= kMostRivalDimension ? 3 * dimension : 0;
    value = arena.take<Complex>(2 * n);
    system = arena.take<Complex>(n * unknowns + 1);
    diagonal = arena.take<Complex>(unknowns + 1);
    triangle = arena.take<Complex>(unknowns * unknowns + 1);
    vectors = arena.take<Complex>(unknowns * unknowns + 1);
    ratio = arena.take<Complex>(n);
    if (used != nullptr && arena.used > *used) *used = arena.used;
  }
};

struct SubsetScratch {
  Complex* level;

  DRACO_MEMBER SubsetScratch(Arena arena, int64_t n, int64_t s, int64_t* used) {
    const int64_t levels = (s < kMostSubsetSize ? s : kMostSubsetSize) + 1;
    level = arena.take<Complex>(levels * 2 * s * (n + most_active(static_cast<int>(s))) + 1);
    if (used != nullptr && arena.used > *used) *used = arena.used;
  }
};

struct BeamScratch {
  int* sets;
  double* left;
  uint8_t* tried;

  DRACO_MEMBER BeamScratch(Arena arena, int64_t s, int64_t* used) {
    sets = arena.take<int>(kBeam * s + 1);
    left = arena.take<double>(kBeam);
    tried = arena.take<uint8_t>(kBeam);
    if (used != nullptr && arena.used > *used) *used = arena.used;
  }
};

template <typename Team>
class Locator {
 public:
  static DRACO_MEMBER int64_t scratch_bytes(int workers, int adversaries) {
    Arena arena(nullptr);
    LocatorScratch(arena, workers, adversaries);
    int64_t most = arena.used;
    PronyScratch(arena, workers, adversaries, &most);
    SubspaceScratch(arena, workers, adversaries, &most);
    RivalScratch(arena, workers, adversaries, &most);
    if (adversaries > 0) SubsetScratch(arena, workers, adversaries, &most);
    BeamScratch(arena, adversaries, &most);
    return most;
  }

  DRACO_TEAM Locator(const Team& team, const LocatorInput& input, unsigned char* scratch)
      : team_(team), in_(input), arena_(scratch), at_(arena_, input.workers, input.adversaries) {
    n_ = in_.workers;
    k2_ = 2 * in_.adversaries;
    stride_ = most_active(in_.adversaries);
    const double scale = 1.0 / sqrt(static_cast<double>(n_));
    for (int j = team_.thread; j < n_; j += team_.threads) at_.node[j] = cyclic_node(n_, j);
    team_.sync();
    for (int64_t i = team_.thread; i < int64_t{k2_} * n_; i += team_.threads)
      at_.power[i] = scale * at_.node[(i / n_ + 1) * (i % n_) % n_];
    team_.sync();
  }

  // Looks for bad workers. energy(check, checks, out), a collective, must give the energy of every column under the
  // checks; `per_column` is its scratch of `columns` doubles. Writes who is to be left out, and the suspects among
  // them, (workers,) both and non-finite senders included. False: failed.
  template <typename Energy>
  DRACO_TEAM bool locate(Energy&& energy, double* per_column, uint8_t* left_out, uint8_t* suspects) {
    int nonfinite = 0, erased = 0;
    for (int j = 0; j < n_; ++j) {
      nonfinite += in_.nonfinite[j];
      if (!in_.missing[j] && !in_.nonfinite[j]) continue;
      if (team_.thread == 0) at_.erased[erased] = j;
      ++erased;
    }
    for (int j = team_.thread; j < n_; j += team_.threads) left_out[j] = suspects[j] = in_.nonfinite[j];
    team_.sync();
    erased_count_ = erased;
    if (erased_count_ > k2_) return false;
    const int by_code = (k2_ - erased_count_) / 2, by_bound = in_.adversaries - nonfinite;
    most_ = by_code < by_bound ? by_code : by_bound;

    int found = 0;
    bool hinted = in_.hint == nullptr;
    active_count_ = 0;
    for (;;) {
      const int checks = make_checks(at_.set, found);
      if (checks == 0) break;  // 2s erasures: nothing is left to check with
      energy(at_.check, checks, per_column);
      const int joined = activate(per_column, checks);
      if (joined == 0) break;
      if (joined < 0 || most_ == 0) return false;
      if (!hinted) {  // no fewer can explain all columns, and as a rule they do
        hinted = true;
        found = list(in_.hint, at_.set);
        continue;
      }
      found = search(found);
      if (found < 0) return false;
    }
    found = prune(found, energy, per_column);
    for (int i = team_.thread; i < found; i += team_.threads) left_out[at_.set[i]] = 1;
    team_.sync();
    name(found, suspects);
    return true;
  }

  // The checks, (2s - count, workers), that vanish on the workers in the mask; how many there are.
  DRACO_TEAM_CALL int checks_without(const uint8_t* erased, Complex* check) {
    erased_count_ = 0;
    const int count = list(erased, at_.trial);
    const int checks = count > k2_ ? 0 : make_checks(at_.trial, count);
    for (int64_t i = team_.thread; i < int64_t{checks} * n_; i += team_.threads) check[i] = at_.check[i];
    team_.sync();
    return checks;
  }

  // The weights b_j that give the sum of the gradients from the workers not erased: b = 1 + X q, b = 0 on the erased,
  // of minimal norm. Times `factor`. At most 2s workers may be erased.
  DRACO_TEAM_CALL void weights(const uint8_t* erased, double factor, Complex* b) {
    erased_count_ = 0;
    const int count = list(erased, at_.trial);
    factorise(at_.trial, count);
    Complex* q = at_.image;
    if (team_.warp == 0) {
      for (int m = team_.lane; m < k2_; m += team_.lanes) q[m] = {0, 0};
      team_.sync_warp();
      for (int i = 0; i < count; ++i) {  // R^T y = 1, and Q applied to conj(y), then conjugated
        Complex y{0, 0};
        for (int l = team_.lane; l < i; l += team_.lanes) y = y + at_.factor[int64_t{i} * k2_ + l] * conj(q[l]);
        y = Complex{1, 0} - team_.sum(y);
        if (team_.lane == 0) q[i] = conj(quotient(y, at_.diagonal[i]));
        team_.sync_warp();
      }
      for (int l = count - 1; l >= 0; --l) reflect(team_, at_.factor + int64_t{l} * k2_ + l, q + l, k2_ - l);
    }
    team_.sync();
    for (int j = team_.thread; j < n_; j += team_.threads) {
      Complex sum{1, 0};
      for (int m = 0; m < k2_; ++m) sum = sum - at_.power[int64_t{m} * n_ + j] * conj(q[m]);
      b[j] = erased[j] ? Complex{0, 0} : factor * sum;
    }
    team_.sync();
  }

 private:
  DRACO_TEAM int list(const uint8_t* mask, int* members) {
    int count = 0;
    for (int j = 0; j < n_; ++j) {
      if (!mask[j]) continue;
      if (team_.thread == 0) members[count] = j;
      ++count;
    }
    team_.sync();
    return count;
  }
  template <typename T>
  DRACO_TEAM void put(T* to, T value) {
    if (team_.thread == 0) *to = value;
    team_.sync();
  }
  DRACO_TEAM void copy(int* to, const int* from, int count) {
    for (int l = team_.thread; l < count; l += team_.threads) to[l] = from[l];
    team_.sync();
  }
  // `to` becomes the count - 1 entries of `from` other than the one at `left_out`.
  DRACO_TEAM void copy_without(int* to, const int* from, int count, int left_out) {
    for (int l = team_.thread; l < count; l += team_.threads)
      if (l != left_out) to[l - (l > left_out)] = from[l];
    team_.sync();
  }
  DRACO_TEAM bool is_erased(int64_t j) const { return in_.missing[j] || in_.nonfinite[j]; }

  // ---- the checks that vanish on a set

  // Factors the columns h_a of the erased workers and of `members`; how many there are.
  DRACO_TEAM int factorise(const int* members, int count) {
    const int all = erased_count_ + count;
    for (int64_t i = team_.thread; i < int64_t{all} * k2_; i += team_.threads)
      at_.factor[i] = at_.power[i % k2_ * n_ + worker(members, static_cast<int>(i / k2_))];
    team_.sync();
    factor(team_, at_.factor, k2_, all, at_.diagonal);
    work_ += static_cast<double>(all) * all * k2_;
    return all;
  }
  DRACO_TEAM int worker(const int* members, int i) const {
    return i < erased_count_ ? at_.erased[i] : members[i - erased_count_];
  }

  // The checks that vanish on the erased workers and on `members`; returns how many there are. Leaves the columns of
  // Q^H H in `image`: R's rows first, then the checks.
  DRACO_TEAM_CALL int make_checks(const int* members, int count) {
    const int all = erased_count_ + count, checks = k2_ - all;
    if (all > 0) factorise(members, count);
    for (int j = team_.warp; j < n_; j += team_.warps) {
      Complex* column = at_.image + int64_t{j} * k2_;
      for (int m = team_.lane; m < k2_; m += team_.lanes) column[m] = at_.power[int64_t{m} * n_ + j];
      team_.sync_warp();
      for (int l = 0; l < all; ++l) reflect(team_, at_.factor + int64_t{l} * k2_ + l, column + l, k2_ - l);
    }
    team_.sync();
    for (int64_t i = team_.thread; i < int64_t{checks} * all; i += team_.threads)
      at_.image[int64_t{worker(members, static_cast<int>(i % all))} * k2_ + all + i / all] = {0, 0};
    team_.sync();
    for (int64_t i = team_.thread; i < int64_t{checks} * n_; i += team_.threads)
      at_.check[i] = at_.image[i % n_ * k2_ + all + i / n_];
    team_.sync();
    work_ += static_cast<double>(n_) * all * (k2_ + checks);
    return checks;
  }

  // ---- the active projections

  // Adds the least explained columns to the search, at most kActiveStep or half of the bad workers that there may be;
  // how many, or -1 when there is no room left.
  DRACO_TEAM_CALL int activate(const double* energy, int checks) {
    const int before = active_count_, most = most_ / 2 > kActiveStep ? most_ / 2 : kActiveStep;
    for (int step = 0; step < most; ++step) {
      const int64_t worst = team_.argmin(in_.columns, [&](int64_t c) {
        const double size = unexplained(energy[c], in_.noise[c], checks);
        bool out = size <= 1;
        for (int a = before; a < active_count_; ++a) out |= at_.active[a] == c;
        return out ? kNever : size == size ? -size : -HUGE_VAL;
      });
      if (worst < 0) break;
      if (active_count_ == stride_) return active_count_ > before ? active_count_ - before : -1;
      const double noise = in_.noise[worst];
      for (int j = team_.thread; j < n_; j += team_.threads) {
        const int64_t at = j * in_.stride + worst * in_.step;
        Complex* p = at_.active_p + int64_t{j} * stride_ + active_count_;
        p[0] = {in_.re[at] / noise, in_.im[at] / noise};
        for (int t = 1; active_count_ % kTogether == 0 && t < kTogether && active_count_ + t < stride_; ++t)
          p[t] = {0, 0};
      }
      if (team_.thread == 0) at_.active[active_count_] = worst;
      team_.sync();
      ++active_count_;
    }
    return active_count_ - before;
  }

  // to[m * stride_ + a] = sum over workers of row(m, j) * P_ja, for all active a.
  template <typename Row>
  DRACO_TEAM void multiply_active(int rows, Row&& row, Complex* to) {
    const int blocks = (active_count_ + kTogether - 1) / kTogether;
    for (int i = team_.thread; i < rows * blocks; i += team_.threads) {
      const int m = i / blocks, a = i % blocks * kTogether;  // columns beyond active_count_ are 0
      Complex sum[kTogether] = {};
      for (int j = 0; j < n_; ++j) {
        const Complex factor = row(m, j);
        for (int t = 0; t < kTogether; ++t) sum[t] = sum[t] + factor * at_.active_p[int64_t{j} * stride_ + a + t];
      }
      for (int t = 0; t < kTogether; ++t) to[int64_t{m} * stride_ + a + t] = sum[t];
    }
    team_.sync();
    work_ += static_cast<double>(rows) * n_ * active_count_;
  }

  // What the checks leave of the active projections: `residual`, and `energy` for each projection.
  DRACO_TEAM_CALL void residuals(int checks) {
    multiply_active(checks, [&](int m, int j) { return at_.check[int64_t{m} * n_ + j]; }, at_.residual);
    for (int a = team_.thread; a < active_count_; a += team_.threads) {
      double total = 0;
      for (int m = 0; m < checks; ++m) total += norm2(at_.residual[int64_t{m} * stride_ + a]);
      at_.energy[a] = total;
    }
    team_.sync();
    total_ = 0;
    for (int a = 0; a < active_count_; ++a) total_ += at_.energy[a];
  }

  // Largest energy of an active projection per check, in units of what is tolerated: at most 1 means explained.
  DRACO_TEAM_CALL double excess(const int* members, int count) {
    const int checks = make_checks(members, count);
    residuals(checks);
    double worst = 0;
    for (int a = 0; a < active_count_; ++a)
      if (!(at_.energy[a] <= worst)) worst = at_.energy[a];
    team_.sync();
    return checks == 0 ? 0 : worst / (checks * kTolerance * kTolerance);
  }

  // `product`, the inner products of every worker's checks with the residuals, and `size`, their squared norms.
  DRACO_TEAM_CALL void products(int all) {
    const int checks = k2_ - all;
    for (int64_t i = team_.thread; i < int64_t{n_} * active_count_; i += team_.threads) {
      const int64_t j = i / active_count_, a = i % active_count_;
      const Complex* own = at_.image + j * k2_ + all;
      Complex dot{0, 0};
      for (int m = 0; m < checks; ++m) dot = dot + conj(own[m]) * at_.residual[int64_t{m} * stride_ + a];
      at_.product[j * stride_ + a] = dot;
    }
    for (int j = team_.warp; j < n_; j += team_.warps) {
      const double size = squared_norm(team_, at_.image + int64_t{j} * k2_ + all, checks);
      if (team_.lane == 0) at_.size[j] = size;
    }
    team_.sync();
    work_ += static_cast<double>(checks) * n_ * active_count_;
  }

  // For every worker, by how much erasing it too would lower the unexplained energy: `gain`.
  DRACO_TEAM_CALL void gains(const int* members, int count) {
    const int checks = make_checks(members, count);
    residuals(checks);
    products(k2_ - checks);
    for (int j = team_.thread; j < n_; j += team_.threads) {
      double sum = 0;
      for (int a = 0; a < active_count_; ++a) sum += norm2(at_.product[int64_t{j} * stride_ + a]);
      at_.gain[j] = at_.size[j] > 1e-24 ? sum / at_.size[j] : -1;
    }
    team_.sync();
    for (int i = team_.thread; i < erased_count_ + count; i += team_.threads) at_.gain[worker(members, i)] = -1;
    if (barred_ >= 0 && team_.thread == 0) at_.gain[barred_] = -1;
    team_.sync();
  }

  // Adds to the first `count` of `set` the worker that explains most of what the messages without those leave, however
  // large they are.
  DRACO_TEAM_CALL void add_best(int count) {
    gains(at_.set, count);
    const int64_t best = team_.argmin(n_, [&](int64_t j) { return -at_.gain[j]; });
    put(at_.set + count, best < 0 ? 0 : static_cast<int>(best));
  }

  // What exchanges of one member need, after residuals(). For member i let u_i be the unit vector that the checks
  // without it have more than those of the whole set: a combination of the members' columns, orthogonal to all but its
  // own. `along` (count, workers) = u_i^H h_j, and `reach` (count, active) what u_i sees of the projections. So one
  // factorisation serves for all exchanges.
  DRACO_TEAM_CALL void reach_out(const int* members, int count) {
    const int all = erased_count_ + count;
    products(all);
    for (int i = team_.thread; i < count; i += team_.threads) {  // R^H y = e_i, u_i = Q y / |y|
      Complex* y = at_.dual + int64_t{i} * k2_;
      const int own = erased_count_ + i;
      double total = 0;
      for (int l = 0; l < all; ++l) {
        Complex sum = l == own ? Complex{1, 0} : Complex{0, 0};
        for (int m = own; m < l; ++m) sum = sum - conj(at_.factor[int64_t{l} * k2_ + m]) * y[m];
        y[l] = l < own ? Complex{0, 0} : quotient(sum, conj(at_.diagonal[l]));
        total += norm2(y[l]);
      }
      const double scale = total > 0 ? 1 / sqrt(total) : 0;
      for (int l = own; l < all; ++l) y[l] = scale * y[l];
      at_.reach_size[i] = scale;  // u_i^H h of the member itself
    }
    team_.sync();
    for (int64_t i = team_.thread; i < int64_t{count} * n_; i += team_.threads) {
      const int64_t member = i / n_, j = i % n_;
      const Complex *y = at_.dual + member * k2_, *image = at_.image + j * k2_;
      Complex dot{0, 0};
      for (int l = erased_count_ + static_cast<int>(member); l < all; ++l) dot = dot + conj(y[l]) * image[l];
      at_.along[i] = dot;
    }
    team_.sync();
    for (int i = team_.thread; i < count * all; i += team_.threads) {
      const int member = i / all, other = worker(members, i % all);
      const double own = i % all == erased_count_ + member ? at_.reach_size[member] : 0;
      at_.along[int64_t{member} * n_ + other] = {own, 0};
    }
    team_.sync();
    multiply_active(count, [&](int i, int j) { return at_.along[int64_t{i} * n_ + j]; }, at_.reach);
    for (int i = team_.thread; i < count; i += team_.threads) {
      double total = 0;
      for (int a = 0; a < active_count_; ++a) total += norm2(at_.reach[int64_t{i} * stride_ + a]);
      at_.reach_size[i] = total;
    }
    team_.sync();
    work_ += static_cast<double>(count) * all * (all + n_);
  }

  // All that is asked of the first `count` of `set`.
  DRACO_TEAM void look_at(int count) {
    residuals(make_checks(at_.set, count));
    reach_out(at_.set, count);
  }

  // Whether worker j can take a member's place, and the squared norm of what h_j adds to the others' columns then.
  DRACO_TEAM double place(const int* members, int count, int i, int64_t j) const {
    bool out = is_erased(j) || j == barred_;
    for (int l = 0; l < count; ++l) out |= members[l] == j;
    const double size = at_.size[j] + norm2(at_.along[int64_t{i} * n_ + j]);
    return out || !(size > 1e-24) ? 0 : size;
  }
  // What the exchange changes in the energy of an active projection; size: of place().
  DRACO_TEAM double change(int i, int64_t j, double size, int a) const {
    const Complex reach = at_.reach[int64_t{i} * stride_ + a];
    const Complex dot = at_.product[j * stride_ + a] + conj(at_.along[int64_t{i} * n_ + j]) * reach;
    return norm2(reach) - norm2(dot) / size;
  }
  // The unexplained energy of all active projections after member i is exchanged for worker j.
  DRACO_TEAM double left_after(const int* members, int count, int i, int64_t j) const {
    const double size = place(members, count, i, j);
    if (size == 0) return kNever;
    double gain = 0;
    for (int a = 0; a < active_count_; ++a)
      gain += norm2(at_.product[j * stride_ + a] +
                    conj(at_.along[int64_t{i} * n_ + j]) * at_.reach[int64_t{i} * stride_ + a]);
    const double left = total_ + at_.reach_size[i] - gain / size;
    return left > 0 ? left : 0;  // rounding may cross 0
  }

  // ---- the search

  // Replaces the first `found` of `set`, which explain some projections, by a set of at least as many workers that
  // explains all active ones; its size, or -1.
  DRACO_TEAM_CALL int search(int found) {
    work_ = 0;
    // With many workers one analysis of a set is so much work itself.
    const double analysis = static_cast<double>(n_) * k2_ * (2 * most_ + active_count_);
    budget_ = kMostWork > 12 * analysis ? kMostWork : 12 * analysis;
    const int larger = found > 0 ? grow(found, kMoreMembers) : 0;
    if (larger > 0) return larger;
    const int few = most_ < kFewMembers ? most_ : kFewMembers;
    for (int nu = found > 1 ? found : 1; nu <= few; ++nu) {
      if (!prony(nu)) {
        if (nu == most_) return -1;
        continue;
      }
      if (exchange(nu)) return nu;
      if (work_ > budget_) continue;
      pursue(nu);
      if (exchange(nu)) return nu;
    }
    const int size = subspace();
    if (size > 0) return size;
    const int others = consensus();
    if (others > 0) return others;
    const int rivals = rival_codeword();
    if (rivals > 0) return rivals;
    work_ = 0;
    for (int nu = 2 * kFewMembers; nu < 2 * most_ && most_ > kFewMembers; nu *= 2) {
      const int tried = nu < most_ ? nu : most_;
      if (tried >= found && prony(tried) && exchange(tried)) return tried;
    }
    if (most_ <= kMostSubsetSize) {
      work_ = 0;
      if (neighbours()) return most_;
    }
    work_ = 0;
    if (!prony(most_)) return -1;  // also leaves rank: how small the polynomial is at each worker's node
    for (int j = team_.thread; j < n_; j += team_.threads) at_.rank[j] = -at_.rank[j];
    team_.sync();
    if (best_first(most_)) return most_;
    if (most_ > kMostSubsetSize) return -1;
    work_ = 0;
    if (likeliest()) return most_;
    gains(at_.set, 0);
    for (int j = team_.thread; j < n_; j += team_.threads) at_.rank[j] = at_.gain[j];
    team_.sync();
    if (likeliest()) return most_;
    return -1;
  }

  // Adds the worker that explains most to the first `count` of `set`, and exchanges, until they explain the active
  // projections, at most `more` times. How many they are then, or 0.
  DRACO_TEAM_CALL int grow(int count, int more) {
    for (int nu = count; nu < most_ && nu < count + more && work_ < budget_; ++nu) {
      add_best(nu);
      if (exchange(nu + 1)) return nu + 1;
    }
    return 0;
  }

  // Best-first search: of the kBeam sets that leave least unexplained, starting with `set`, one member at a time is
  // exchanged for the kChildren best others, in the best set first of which that was not tried yet.
  DRACO_TEAM_CALL bool best_first(int nu) {
    const BeamScratch beam(arena_, in_.adversaries, nullptr);
    copy(beam.sets, at_.set, nu);
    put(beam.left, HUGE_VAL);
    put(beam.tried, uint8_t{0});
    int count = 1;
    while (work_ < budget_) {
      const int64_t b = team_.argmin(count, [&](int64_t i) { return beam.tried[i] ? kNever : beam.left[i]; });
      if (b < 0) break;
      copy(at_.set, beam.sets + b * nu, nu);
      put(beam.tried + b, uint8_t{1});
      if (excess(at_.set, nu) <= kQuiet) return true;
      reach_out(at_.set, nu);
      for (int i = 0; i < nu; ++i) {
        copy_without(at_.best, at_.set, nu, i);
        for (int j = team_.thread; j < n_; j += team_.threads) at_.gain[j] = left_after(at_.set, nu, i, j);
        team_.sync();
        work_ += static_cast<double>(n_) * active_count_;
        for (int c = 0; c < kChildren; ++c) {
          const int64_t joins = team_.argmin(n_, [&](int64_t j) { return at_.gain[j]; });
          if (joins < 0) break;
          const double energy = at_.gain[joins];
          if (count == kBeam && !(energy < beam.left[kBeam - 1])) break;
          count = insert(at_.best, nu - 1, static_cast<int>(joins), energy, beam, count);
          put(at_.gain + joins, kNever);
        }
      }
    }
    copy(at_.set, beam.sets, nu);
    return excess(at_.set, nu) <= kExplained;
  }

  // Puts a set into the sorted list of the best, unless it is there; how many are there then.
  DRACO_TEAM int insert(const int* others, int size, int joins, double energy, const BeamScratch& beam, int count) {
    const int stride = size + 1;
    for (int i = team_.thread; i < size; i += team_.threads) at_.trial[i] = others[i];
    put(at_.trial + size, joins);
    const int64_t same = team_.argmin(count, [&](int64_t b) {
      int shared = 0;
      for (int i = 0; i <= size; ++i)
        for (int l = 0; l <= size; ++l) shared += beam.sets[b * stride + i] == at_.trial[l];
      return shared == size + 1 ? 0.0 : kNever;
    });
    if (same >= 0) return count;
    const int last = count < kBeam ? count : kBeam - 1;
    if (team_.thread == 0) {
      int at = last;
      for (; at > 0 && energy < beam.left[at - 1]; --at) {
        beam.left[at] = beam.left[at - 1];
        beam.tried[at] = beam.tried[at - 1];
        for (int i = 0; i <= size; ++i) beam.sets[at * stride + i] = beam.sets[(at - 1) * stride + i];
      }
      beam.left[at] = energy;
      beam.tried[at] = 0;
      for (int i = 0; i <= size; ++i) beam.sets[at * stride + i] = at_.trial[i];
    }
    team_.sync();
    return last + 1;
  }

  DRACO_TEAM void pursue(int nu) {
    for (int i = 0; i < nu; ++i) add_best(i);
  }

  // Exchanges one member at a time for the worker that lowers the unexplained energy most, until the set explains the
  // active projections as well as honest noise would. A set that only just explains them is exchanged further: of
  // several that do, the true one leaves the least.
  DRACO_TEAM_CALL bool exchange(int nu) { return settle(nu, kQuiet) <= kExplained; }

  // The same, or until excess() is no more than `enough`; what that is in the end.
  DRACO_TEAM_CALL double settle(int nu, double enough) {
    double reached = HUGE_VAL;
    for (;;) {
      const double now = excess(at_.set, nu);
      if (now <= enough || work_ > budget_) return now;
      reach_out(at_.set, nu);
      const auto left = [&](int64_t i) { return left_after(at_.set, nu, static_cast<int>(i / n_), i % n_); };
      const int64_t best = team_.argmin(int64_t{nu} * n_, left);
      work_ += static_cast<double>(nu) * n_ * active_count_;
      if (best < 0) return now;
      const double least = left(best);
      team_.sync();
      if (!(least < reached * (1 - 1e-9))) return now;
      reached = least;
      put(at_.set + best / n_, static_cast<int>(best % n_));
    }
  }

  // Drops members that nothing speaks against: the polynomial of a too large nu has roots of no meaning. Columns that
  // speak for the others join the active ones.
  template <typename Energy>
  DRACO_TEAM_CALL int prune(int found, Energy&& energy, double* per_column) {
    for (int i = 0; found > 1 && i < found;) {
      look_at(found);
      const int checks = k2_ - erased_count_ - (found - 1);
      const auto explained = [&](int member) {
        bool all = true;
        for (int a = 0; a < active_count_; ++a)
          all &= at_.energy[a] + norm2(at_.reach[int64_t{member} * stride_ + a]) <= checks * kTolerance * kTolerance;
        return all;
      };
      while (i < found && !explained(i)) ++i;
      team_.sync();
      if (i == found) break;
      copy_without(at_.trial, at_.set, found, i);
      make_checks(at_.trial, found - 1);
      energy(at_.check, checks, per_column);
      if (activate(per_column, checks) == 0) {
        copy(at_.set, at_.trial, --found);
      } else {
        ++i;
      }
    }
    return found;
  }

  // Times the tolerated amplitude: within that a set of so many more members than another comes near to explaining.
  DRACO_TEAM double near(int more) const { return most_ == 1 ? 1 : more > 0 ? 2 : most_ == 2 ? 4 : 8; }

  // A member is named where no other set without it comes near to explaining the projections, as far as a search can
  // tell that starts from the set with the member exchanged for the best other. It may be larger by kMoreRivals
  // members, not more: s that collude and surround an honest worker can imitate any error of it, and taking that for
  // what happened, not the one worker, would leave a single fault unnamed in large codes. Near is within near() times
  // the tolerated amplitude, as the search is not exhaustive. Where sets are so large that it takes too long only the
  // exchange is made, and near is within kFar. How often that misleads: docs/guarantee.md.
  DRACO_TEAM_CALL void name(int found, uint8_t* suspects) {
    if (found == 0) return;
    look_at(found);
    copy(at_.pool, at_.set, found);
    for (int i = 0; i < found; ++i) exchanged(found, i);
    work_ = 0;
    budget_ = kMostNamingWork;
    for (int i = 0; i < found; ++i) {
      const double square = near(0) * near(0);
      bool named = at_.rank[i] > square;
      if (most_ > 1 && named && work_ < budget_) {
        copy_without(at_.set, at_.pool, found, i);
        put(at_.set + found - 1, at_.best[i]);
        barred_ = at_.pool[i];
        named = !comes_near(found);
        barred_ = -1;
      }
      if (most_ > 1 && work_ >= budget_) named &= at_.rank[i] > kFar * kFar;
      if (team_.thread == 0 && named) suspects[at_.pool[i]] = 1;
    }
    team_.sync();
  }

  // Member i's best exchange: who joins, to `best`, and the excess() of what it leaves, to `rank`. After reach_out().
  DRACO_TEAM_CALL void exchanged(int found, int i) {
    const int64_t other = team_.argmin(n_, [&](int64_t j) { return left_after(at_.set, found, i, j); });
    double worst = other < 0 ? HUGE_VAL : 0;
    const double size = other < 0 ? 0 : place(at_.set, found, i, other);
    for (int a = 0; a < active_count_ && other >= 0; ++a) {
      const double energy = at_.energy[a] + change(i, other, size, a);
      if (!(energy <= worst)) worst = energy;
    }
    team_.sync();
    put(at_.best + i, static_cast<int>(other));
    put(at_.rank + i, worst / ((k2_ - erased_count_ - found) * kTolerance * kTolerance));
  }

  // Whether exchanges from the first `count` of `set` on, or with up to kMoreRivals more, lead to a set that comes
  // near.
  DRACO_TEAM_CALL bool comes_near(int count) {
    for (int more = 0;; ++more) {
      const double square = near(more) * near(more);
      if (settle(count + more, square) <= square) return true;
      if (count + more == most_ || more == kMoreRivals || work_ > budget_) return false;
      add_best(count + more);
    }
  }

  // The syndromes (syndromes, active) that the erased workers do not enter: their nodes are roots of the polynomial
  // with which every worker's projection is multiplied. Returns the largest of its squared values.
  DRACO_TEAM_CALL double filter_syndromes(int syndromes, Complex* filter, Complex* syndrome) {
    for (int j = team_.thread; j < n_; j += team_.threads) {
      Complex product{1, 0};
      for (int i = 0; i < erased_count_; ++i)
        product = j == at_.erased[i] ? Complex{0, 0} : product * (at_.node[j] - at_.node[at_.erased[i]]);
      filter[j] = product;
    }
    team_.sync();
    double largest = 0;
    for (int j = 0; j < n_; ++j) largest = fmax(largest, norm2(filter[j]));
    multiply_active(syndromes, [&](int m, int j) { return filter[j] * at_.power[int64_t{m} * n_ + j]; }, syndrome);
    return largest;
  }

  // Prony's method on the last active projections. Writes `set` (nu workers) and `rank`. False, and nothing written,
  // where no set of nu workers can explain them: the polynomial with its roots there would be a nearly null vector, as
  // a row of the Hankel system times its coefficients, of norm 1, is what a check of norm 1 that vanishes on the set
  // makes of the workers' messages, times the filter.
  DRACO_TEAM_CALL bool prony(int nu) {
    const PronyScratch scratch(arena_, n_, in_.adversaries, nullptr);
    const int unknowns = nu + 1, syndromes = k2_ - erased_count_, hankel = syndromes - nu;
    const int columns = active_count_ < kPronyColumns ? active_count_ : kPronyColumns, first = active_count_ - columns;
    const int64_t equations = int64_t{hankel} * columns;
    const double largest = filter_syndromes(syndromes, scratch.filter, scratch.syndrome);
    // Columns of the stacked Hankel system, one after the other.
    for (int64_t i = team_.thread; i < equations * unknowns; i += team_.threads) {
      const int64_t l = i / equations, row = i % equations;
      scratch.system[i] = scratch.syndrome[(row / columns + l) * stride_ + first + row % columns];
    }
    team_.sync();
    work_ += static_cast<double>(equations) * unknowns * unknowns;
    const NullVector found =
        null_vector(team_, scratch.system, equations, unknowns, scratch.triangle, at_.diagonal, scratch.vectors);
    const double tolerated = kTolerance * kTolerance * hankel * static_cast<double>(equations) * largest;
    if (found.least > tolerated + kRounding * kRounding * found.total) return false;
    Complex* polynomial = scratch.vectors + found.column * unknowns;

    for (int j = team_.thread; j < n_; j += team_.threads)
      at_.rank[j] = sqrt(norm2(evaluate(polynomial, nu, at_.node[j])));
    team_.sync();
    for (int i = team_.thread; i < erased_count_; i += team_.threads) at_.rank[at_.erased[i]] = HUGE_VAL;
    team_.sync();
    // The node with the smallest value is a root; dividing it out keeps its neighbours from looking like roots as well.
    for (int i = 0; i < nu; ++i) {
      const int root = static_cast<int>(team_.argmin(n_, [&](int64_t j) {
        const double value = norm2(evaluate(polynomial, nu - i, at_.node[j]));
        bool taken = at_.rank[j] == HUGE_VAL;
        for (int l = 0; l < i; ++l) taken |= at_.set[l] == j;
        return taken ? kNever : value == value ? value : HUGE_VAL;
      }));
      put(at_.set + i, root < 0 ? 0 : root);
      if (team_.thread == 0 && root >= 0) {
        for (int m = nu - i - 1; m >= 0; --m) polynomial[m] = polynomial[m] + at_.node[root] * polynomial[m + 1];
        for (int m = 0; m < nu - i; ++m) polynomial[m] = polynomial[m + 1];
      }
      team_.sync();
    }
    return true;
  }

  static DRACO_TEAM Complex evaluate(const Complex* polynomial, int degree, Complex x) {
    Complex value = polynomial[degree];
    for (int m = degree - 1; m >= 0; --m) value = value * x + polynomial[m];
    return value;
  }

  // MUSIC: windows of `width` consecutive syndromes, of every active projection, are combinations of the bad nodes'
  // windows. Longer windows tell nodes better apart, but there are fewer of them, and together they must span as many
  // dimensions as there are bad workers: so several widths are tried. Returns the number of workers in `set`, which
  // explains the active projections, or 0.
  DRACO_TEAM_CALL int subspace() {
    const SubspaceScratch scratch(arena_, n_, in_.adversaries, nullptr);
    const int syndromes = k2_ - erased_count_;
    work_ = 0;
    const double largest = filter_syndromes(syndromes, scratch.filter, scratch.syndrome);
    for (int a = team_.thread; a < active_count_; a += team_.threads) scratch.column[a] = a;
    team_.sync();
    // Errors that are alike in all workers make columns that depend on each other: those then say nothing more.
    const int rank = basis_of(scratch, 0, syndromes, active_count_, active_count_, most_, largest);
    if (rank == 0) return 0;
    int columns = active_count_;
    if (2 * rank < active_count_) {
      columns = rank;
      for (int a = team_.thread; a < rank; a += team_.threads) scratch.column[a] = scratch.chosen[a];
      team_.sync();
    }
    double least = HUGE_VAL;
    int size = 0;
    const int needed = (most_ + rank - 1) / rank, enough = (kSnapshots * most_ + rank - 1) / rank;
    // Wrong by a multiple of what is right, as with a flipped sign, all windows together have n - 2s - 1 dimensions
    // more than there are of each column: the second width is for those.
    const int between = most_ + (n_ - k2_ + 1) / 2;
    const int widths[] = {12 * most_ / 8, between, 10 * most_ / 8, 14 * most_ / 8, 9 * most_ / 8, 11 * most_ / 8};
    for (int trial = 0; trial < 6 && work_ < budget_; ++trial) {
      const int longest = syndromes + 1 - needed, shortest = syndromes + 1 - enough;
      int width = widths[trial];
      if (trial != 1 && width < shortest) width = shortest;  // more windows add work, but nothing to the space
      if (width > longest) width = longest - trial * (longest - most_) / 8;
      if (width <= most_) width = most_ + 1;
      if (width > syndromes) width = syndromes;
      const int most = static_cast<int>(SubspaceScratch::most_windows(in_.adversaries)) / (syndromes - width + 1);
      const int used = columns < most ? columns : most;
      int nu = signal_nodes(scratch, 0, syndromes, width, used, largest);
      for (int i = team_.thread; i < nu; i += team_.threads) scratch.picked[i] = at_.set[i];
      team_.sync();
      if (nu > 0 && exchange(nu)) return nu;
      if (nu > 0 && total_ < least) {
        least = total_;
        size = nu;
        copy(at_.pool, at_.set, nu);
        const int larger = grow(nu, kMoreMembers);  // of the smallest errors some are below the noise in windows
        if (larger > 0) return larger;
      }
      // The nearest are right, as a rule, and one that is not costs a check only. So the nearest half, and three
      // quarters, are taken for bad, and the others looked for in what is left: a problem of half the size.
      for (int half = 2; half <= 3 && nu > kFewMembers && work_ < budget_; ++half) {
        const int given = nu * half / 4;
        for (int i = team_.thread; i < given; i += team_.threads) at_.set[i] = scratch.picked[i];
        team_.sync();
        const int all = drop_innocent(given + signal_nodes(scratch, given, syndromes, width, used, largest));
        if (all > 0 && exchange(all)) return all;
      }
    }
    if (size == 0 || most_ <= kMostSubsetSize) return 0;
    work_ = 0;
    copy(at_.set, at_.pool, size);
    const int larger = grow(size, most_);
    if (larger > 0) return larger;
    work_ = 0;
    copy(at_.set, at_.pool, size);
    return best_first(size) ? size : 0;
  }

  // Tries the workers that are said to be wrong, and exchanges from there. Returns as subspace() does.
  template <typename Wrong>
  DRACO_TEAM int without(Wrong&& wrong) {
    int nu = 0;
    for (int j = 0; j < n_ && nu <= most_; ++j) {
      if (!wrong(j)) continue;
      if (team_.thread == 0 && nu < most_) at_.set[nu] = j;
      ++nu;
    }
    team_.sync();
    work_ = 0;
    return nu > 0 && nu <= most_ && exchange(nu) ? nu : 0;
  }

  // Where the code has few dimensions (n - 2s), so many workers that are honest determine what all honest ones sent,
  // and are often met by chance: takes them at random, one from each part of the circle, until at most most_ workers
  // contradict them (information set decoding, Prange 1962). Finds what 4. cannot: half of the workers wrong in the
  // same way, in a code that hardly differs from repetition. Returns as subspace() does.
  DRACO_TEAM_CALL int consensus() {
    const int dimension = n_ - k2_, present = n_ - erased_count_;
    if (dimension > kMostDimension || present < dimension || most_ <= kFewMembers) return 0;
    const int columns = active_count_ < kConsensusColumns ? active_count_ : kConsensusColumns;
    for (uint64_t trial = 0; trial < kConsensusTrials; ++trial) {
      int seen = 0, next = 0, own[kMostDimension];
      const auto pick = [&](int part) {
        const int first = part * present / dimension, last = (part + 1) * present / dimension;
        return first +
               static_cast<int>(philox(trial, part, kConsensusDomain).word[0] % static_cast<uint32_t>(last - first));
      };
      for (int j = 0, wanted = pick(0); j < n_ && next < dimension; ++j) {
        if (is_erased(j) || seen++ != wanted) continue;
        own[next++] = j;
        if (next < dimension) wanted = pick(next);
      }
      for (int j = team_.thread; j < n_; j += team_.threads) {
        // Honest projections are polynomials of degree n - 2s - 1 in the node.
        Complex weight[kMostDimension];
        double noise = 1;
        bool taken = is_erased(j);
        for (int i = 0; i < dimension; ++i) {
          taken |= own[i] == j;
          weight[i] = {1, 0};
          for (int l = 0; l < dimension; ++l)
            if (l != i)
              weight[i] = weight[i] * quotient(at_.node[j] - at_.node[own[l]], at_.node[own[i]] - at_.node[own[l]]);
          noise += norm2(weight[i]);
        }
        bool wrong = false;
        for (int a = 0; a < columns && !taken; ++a) {
          Complex apart = at_.active_p[int64_t{j} * stride_ + a];
          for (int i = 0; i < dimension; ++i) apart = apart - weight[i] * at_.active_p[int64_t{own[i]} * stride_ + a];
          wrong |= !(norm2(apart) <= kTolerance * kTolerance * noise);
        }
        at_.gain[j] = wrong;
      }
      team_.sync();
      if (const int nu = without([&](int j) { return at_.gain[j] != 0; })) return nu;
    }
    return 0;
  }

  // Errors that are alike in half of the workers, in a code of few dimensions, where 4. sees too little: the bad send
  // multiples of what is right, or all a word of the code that is right elsewhere (of the step before, or 0). Two
  // projections of worker j are then w_j D_0(x_j) and w_j D_1(x_j) with polynomials D of degree n - 2s - 1, so that the
  // first times D_1(x_j) is the second times D_0(x_j): linear equations for D, which give w_j, and most of these are
  // those of the honest. In the second case y_j is p(x_j) or q(x_j), a root of y^2 - S(x_j) y + P(x_j) with S = p + q
  // and P = p q, of twice the degree: linear equations as well (Sudan 1997), and 2 y_j - S(x_j) is D = p - q with a
  // sign as w_j. Returns as subspace() does.
  DRACO_TEAM_CALL int rival_codeword() {
    const int dimension = n_ - k2_, present = n_ - erased_count_;
    if (dimension > kMostRivalDimension || 3 * dimension > present || most_ <= kFewMembers || active_count_ < 2)
      return 0;
    const RivalScratch scratch(arena_, n_, in_.adversaries, nullptr);
    Complex* const value = scratch.value;
    for (int elsewhere = 0; elsewhere <= 1; ++elsewhere) {
      for (int a = 0; a < 2; ++a) {
        Complex* own = value + int64_t{a} * n_;
        double size = 0;
        for (int j = 0; j < n_; ++j) size += norm2(at_.active_p[int64_t{j} * stride_ + a]) / n_;
        const double scale = size > 0 ? 1 / sqrt(size) : 0;
        for (int j = team_.thread; j < n_; j += team_.threads) own[j] = scale * at_.active_p[int64_t{j} * stride_ + a];
        team_.sync();
        if (!elsewhere) continue;
        const Complex* quadratic = null_of(scratch, 3 * dimension, [&](int j, int l) {
          if (l == 3 * dimension - 1) return own[j] * own[j];
          return l < dimension ? own[j] * at_.node[int64_t{l} * j % n_] : at_.node[int64_t{l - dimension} * j % n_];
        });
        for (int j = team_.thread; j < n_; j += team_.threads)
          own[j] = 2.0 * own[j] * quadratic[3 * dimension - 1] + evaluate(quadratic, dimension - 1, at_.node[j]);
        team_.sync();
      }
      const Complex* common = null_of(scratch, 2 * dimension, [&](int j, int l) {
        return l < dimension ? value[j] * at_.node[int64_t{l} * j % n_]
                             : -1.0 * value[n_ + j] * at_.node[int64_t{l - dimension} * j % n_];
      });
      for (int j = team_.thread; j < n_; j += team_.threads)
        scratch.ratio[j] = quotient(value[j], evaluate(common + dimension, dimension - 1, at_.node[j]));
      team_.sync();
      const auto alike = [&](int64_t i, int64_t j) {
        return norm2(scratch.ratio[i] - scratch.ratio[j]) <= kAlike * kAlike * norm2(scratch.ratio[j]);
      };
      const int64_t honest = team_.argmin(n_, [&](int64_t j) {
        if (is_erased(j)) return kNever;
        double count = 0;
        for (int i = 0; i < n_; ++i) count -= !is_erased(i) && alike(i, j);
        return count;
      });
      if (honest < 0) continue;
      if (const int nu = without([&](int j) { return !is_erased(j) && !alike(j, honest); })) return nu;
    }
    return 0;
  }

  // The coefficients that come nearest to solving the equations sum over l of entry(j, l) c_l = 0, one of each worker
  // that is not erased.
  template <typename Entry>
  DRACO_TEAM const Complex* null_of(const RivalScratch& scratch, int unknowns, Entry&& entry) {
    for (int64_t i = team_.thread; i < int64_t{n_} * unknowns; i += team_.threads) {
      const int j = static_cast<int>(i % n_);
      scratch.system[i] = is_erased(j) ? Complex{0, 0} : entry(j, static_cast<int>(i / n_));
    }
    team_.sync();
    const NullVector found =
        null_vector(team_, scratch.system, n_, unknowns, scratch.triangle, scratch.diagonal, scratch.vectors);
    return scratch.vectors + found.column * unknowns;
  }

  // Takes the members of `set` that explain no more than noise out of it, and returns how many are left, or 0 where
  // those are more than may be bad.
  DRACO_TEAM_CALL int drop_innocent(int count) {
    look_at(count);
    int kept = 0;
    for (int i = 0; i < count; ++i) {
      if (at_.reach_size[i] <= kTolerance * kTolerance * active_count_) continue;
      if (team_.thread == 0) at_.trial[kept] = at_.set[i];
      ++kept;
    }
    team_.sync();
    copy(at_.set, at_.trial, kept);
    return kept <= most_ ? kept : 0;
  }

  // Entry m of a window of the syndromes; windows go through the columns first.
  DRACO_TEAM Complex window(const SubspaceScratch& scratch, int64_t index, int64_t m, int columns) const {
    return scratch.syndrome[(index / columns + m) * stride_ + scratch.column[index % columns]];
  }

  // Adds to the first `given` columns of `basis`, which are orthonormal, those of the windows that stand above the
  // noise: the largest that is left joins it, and is taken out of the others. Writes, of each that joins, which window
  // it was to `chosen`; returns how many, at most `most`.
  DRACO_TEAM_CALL int basis_of(const SubspaceScratch& scratch, int given, int width, int count, int columns, int most,
                               double largest) {
    for (int64_t i = team_.thread; i < int64_t{count} * width; i += team_.threads)
      scratch.windows[i] = window(scratch, i / width, i % width, columns);
    team_.sync();
    // What a window has left is below its rounding where it is 1e-13 of what it was.
    const double noise = kTolerance * kTolerance * kQuiet * width * largest;
    int nu = 0;
    for (; nu < most && given + nu < width; ++nu) {
      for (int w = team_.warp; w < count; w += team_.warps) {
        Complex* own = scratch.windows + int64_t{w} * width;
        if (nu == 0) {
          const double whole = squared_norm(team_, own, width);
          if (team_.lane == 0) scratch.whole[w] = whole;
        }
        for (int l = nu == 0 ? 0 : given + nu - 1; l < given + nu; ++l) {
          const Complex* q = scratch.basis + int64_t{l} * width;
          subtract(team_, inner(team_, q, own, width), q, own, width);
        }
        const double left = squared_norm(team_, own, width);
        if (team_.lane == 0) scratch.left[w] = left;
      }
      team_.sync();
      const int64_t next = team_.argmin(count, [&](int64_t w) {
        const double left = scratch.left[w];
        return left > noise && left > 1e-26 * scratch.whole[w] ? -left : kNever;
      });
      if (next < 0) break;
      const double scale = 1 / sqrt(scratch.left[next]);
      for (int m = team_.thread; m < width; m += team_.threads)
        scratch.basis[int64_t{given + nu} * width + m] = scale * scratch.windows[next * width + m];
      put(scratch.chosen + nu, static_cast<int>(next));
    }
    work_ += static_cast<double>(count) * width * (nu + given) * 2;
    return nu;
  }

  // Behind the first `given` of `set`, which are taken for bad, writes the workers whose windows lie nearest to the
  // space of the syndromes' windows without theirs; how many dimensions that has above the noise, at most as many as
  // can be looked at.
  DRACO_TEAM_CALL int signal_nodes(const SubspaceScratch& scratch, int given, int syndromes, int width, int columns,
                                   double largest) {
    const int count = (syndromes - width + 1) * columns;
    for (int64_t i = team_.thread; i < int64_t{given} * width; i += team_.threads)
      scratch.basis[i] = at_.power[i % width * n_ + at_.set[i / width]];
    team_.sync();
    orthonormalise(team_, scratch.basis, width, given);
    int most = static_cast<int>(most_members(most_)) - given;
    if (most > most_) most = most_;
    if (most > syndromes - 1 - given) most = syndromes - 1 - given;
    const int nu = basis_of(scratch, given, width, count, columns, most, largest);
    if (nu == 0) return 0;
    // The basis is of single windows, noise and all. One step of subspace iteration averages over all of them.
    Complex* const own = scratch.basis + int64_t{given} * width;
    for (int64_t i = team_.thread; i < int64_t{nu} * count; i += team_.threads) {
      const Complex* q = own + i / count * width;
      Complex dot{0, 0};
      for (int m = 0; m < width; ++m) dot = dot + conj(window(scratch, i % count, m, columns)) * q[m];
      scratch.rows[i] = dot;
    }
    team_.sync();
    orthonormalise(team_, scratch.rows, count, nu);
    for (int64_t i = team_.thread; i < int64_t{nu} * width; i += team_.threads) {
      const Complex* v = scratch.rows + i / width * count;
      Complex sum{0, 0};
      for (int w = 0; w < count; ++w) sum = sum + window(scratch, w, i % width, columns) * v[w];
      own[i] = sum;
    }
    team_.sync();
    orthonormalise(team_, scratch.basis, width, given + nu);
    const double whole = static_cast<double>(width) / n_;  // of a worker's window, squared
    for (int j = team_.warp; j < n_; j += team_.warps) {
      double known = 0, inside = 0;
      for (int l = 0; l < given + nu; ++l) {
        const Complex* q = scratch.basis + int64_t{l} * width;
        Complex dot{0, 0};
        for (int m = team_.lane; m < width; m += team_.lanes) dot = dot + conj(q[m]) * at_.power[int64_t{m} * n_ + j];
        (l < given ? known : inside) += norm2(team_.sum(dot));
      }
      if (team_.lane == 0)
        at_.rank[j] = is_erased(j) || whole - known < 1e-9 * whole ? kNever : inside / (known - whole);
    }
    team_.sync();
    work_ += static_cast<double>(given + nu) * width * (2.0 * count + n_) + 2.0 * nu * nu * (count + width);
    for (int i = 0; i < given; ++i) put(at_.rank + at_.set[i], kNever);
    for (int i = given; i < given + nu; ++i) {
      const int64_t best = team_.argmin(n_, [&](int64_t j) { return at_.rank[j]; });
      if (best < 0) return i - given;
      put(at_.set + i, static_cast<int>(best));
      put(at_.rank + best, kNever);
    }
    return nu;
  }

  // The likeliest workers by rank, as many as kMostSubsets allows subsets of most_ of them.
  DRACO_TEAM_CALL bool likeliest() {
    int pool = most_;
    double count = 1;
    while (pool < n_ - erased_count_ && count * (pool + 1) / (pool + 1 - most_) <= kMostSubsets) {
      count = count * (pool + 1) / (pool + 1 - most_);
      ++pool;
    }
    for (int i = 0; i < pool; ++i) {
      const int64_t best = team_.argmin(n_, [&](int64_t j) {
        bool taken = is_erased(j);
        for (int l = 0; l < i; ++l) taken |= at_.pool[l] == j;
        return taken ? kNever : at_.rank[j] == at_.rank[j] ? -at_.rank[j] : HUGE_VAL;
      });
      put(at_.pool + i, static_cast<int>(best));
    }
    return subsets(pool);
  }

  // Neighbours on the circle: windows that overlap so that any most_ of most_ + 2 in a row are in one.
  DRACO_TEAM_CALL bool neighbours() {
    const int present = n_ - erased_count_, step = kWindow - 1;
    const int pool = most_ + kWindow < present ? most_ + kWindow : present;
    for (int first = 0; first < present && work_ < budget_; first += step) {
      int seen = 0;
      for (int j = 0; j < n_; ++j) {
        if (is_erased(j)) continue;
        const int place = (seen++ - first + present) % present;
        if (place < pool && team_.thread == 0) at_.pool[place] = j;
      }
      team_.sync();
      if (subsets(pool)) return true;
    }
    return false;
  }

  // Tries all subsets of most_ workers out of the first of `pool`: a depth-first walk that keeps, per level, the checks
  // orthogonal to what is chosen and the residuals under them.
  DRACO_TEAM_CALL bool subsets(int pool) {
    const int nu = most_;
    const SubsetScratch scratch(arena_, n_, in_.adversaries, nullptr);
    const int checks = make_checks(at_.set, 0), width = pool + active_count_;
    residuals(checks);
    // Level l: columns of the pool's workers and of the residuals, with the l chosen directions taken out.
    Complex* level = scratch.level;
    for (int i = team_.thread; i < checks * width; i += team_.threads) {
      const int m = i / width, column = i % width;
      level[i] = column < pool ? at_.check[int64_t{m} * n_ + at_.pool[column]]
                               : at_.residual[int64_t{m} * stride_ + column - pool];
    }
    team_.sync();
    double least = -1;
    int depth = 0;
    put(at_.trial, -1);  // at_.trial[l]: index into the pool chosen at level l
    while (depth >= 0 && work_ < budget_) {
      const Complex* here = level + int64_t{depth} * checks * width;
      if (depth == nu - 1) {  // the last member: only its gain is needed
        double total = 0;
        for (int m = 0; m < checks; ++m)
          for (int a = 0; a < active_count_; ++a) total += norm2(here[m * width + pool + a]);
        const int first = depth ? at_.trial[depth - 1] + 1 : 0;
        const auto left_by = [&](int64_t i) {
          double size = 0, sum = 0;
          for (int m = 0; m < checks; ++m) size += norm2(here[m * width + i]);
          for (int a = 0; a < active_count_; ++a) {
            Complex dot{0, 0};
            for (int m = 0; m < checks; ++m) dot = dot + conj(here[m * width + i]) * here[m * width + pool + a];
            sum += norm2(dot);
          }
          const double gain = size > 1e-24 ? sum / size : 0;
          return total > gain ? total - gain : 0;
        };
        const int64_t last = first + team_.argmin(pool - first, [&](int64_t i) { return left_by(first + i); });
        const double left = last < first ? least : left_by(last);
        if (last >= first && (least < 0 || left < least)) {
          least = left;
          for (int l = team_.thread; l < depth; l += team_.threads) at_.best[l] = at_.pool[at_.trial[l]];
          put(at_.best + depth, at_.pool[last]);
        }
        work_ += static_cast<double>(pool) * checks * active_count_;
        --depth;
        continue;
      }
      const int chosen = at_.trial[depth] + 1;
      team_.sync();
      put(at_.trial + depth, chosen);
      if (chosen > pool - (nu - depth)) {
        --depth;
        continue;
      }
      Complex* below = level + int64_t{depth + 1} * checks * width;
      for (int i = chosen + team_.thread; i < width; i += team_.threads) {
        double size = 0;
        Complex dot{0, 0};
        for (int m = 0; m < checks; ++m) {
          size += norm2(here[m * width + chosen]);
          dot = dot + conj(here[m * width + chosen]) * here[m * width + i];
        }
        if (size > 0) dot = (1 / size) * dot;
        for (int m = 0; m < checks; ++m) below[m * width + i] = here[m * width + i] - dot * here[m * width + chosen];
      }
      work_ += 2.0 * (width - chosen) * checks;
      put(at_.trial + ++depth, chosen);
    }
    const double tolerated = kTolerance * kTolerance * (checks - nu) * active_count_;
    if (least < 0 || least > tolerated) return false;
    copy(at_.set, at_.best, nu);
    return exchange(nu);
  }

  Team team_;
  LocatorInput in_;
  Arena arena_;
  LocatorScratch at_;
  int n_ = 0, k2_ = 0, most_ = 0, erased_count_ = 0, active_count_ = 0, stride_ = 0;
  int barred_ = -1;                                   // a worker that no set may take in
  double work_ = 0, budget_ = kMostWork, total_ = 0;  // total_: what residuals() found unexplained in all
};

}  // namespace
}  // namespace draco

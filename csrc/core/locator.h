// Finds the bad workers of the cyclic code from random projections of their messages, and the weights that decode
// without them.
//
// Honest messages satisfy H P = 0 up to rounding, with H_mj = x_j^m / sqrt(n), m = 1 .. 2s (orthonormal rows). Given a
// set A of erased workers, the checks that vanish on A are the orthogonal complement of the columns h_a, a in A, and
// are evaluated on the other workers alone: a message that is 1e30 times too large leaves no rounding behind. A set A
// explains the messages when all of its checks are at the noise level; the locator returns the smallest such set that
// it finds:
//
//   1. Prony's method: the null vector of the stacked Hankel systems of all active projections is the polynomial whose
//      roots are the bad nodes. Exact when the errors stand well above the noise, also for colluders.
//   2. Greedy pursuit, for errors of very different size: the largest is erased before the next is looked for.
//   3. Exchange of one member at a time while the unexplained energy falls.
//   4. All subsets of neighbours on the circle, whose errors can nearly cancel in the syndromes.
//   5. Best-first search over exchanges, and all subsets of a pool of likely workers.
//
// Whatever the search does, a set is only accepted when it explains every projection; otherwise decoding has failed. A
// member of the set is named only if no other worker could be it: errors little above the noise may be explained by
// several sets, all of which give the same gradient up to noise, and the honest must not be accused.
// All arithmetic is double. Scratch comes from the caller: nothing is allocated here. Every method is a collective of
// its team (core/team.h): all threads make the same decisions from the same values.
#pragma once

#include <cmath>

#include "core/common.h"
#include "core/cyclic.h"
#include "core/team.h"

namespace draco {
namespace {

constexpr double kTolerance = 6.0;  // a check may be this many times the noise (root mean square over the checks)
constexpr double kQuiet = 0.1;      // of the tolerated energy: what honest noise really leaves
// What the search takes for explained: less than 1, as all columns are looked at again by other code, rounded
// otherwise.
constexpr double kExplained = 0.9;
constexpr int kActiveStep = 8;       // projections that join the search at a time, the least explained first
constexpr int kMostActive = 32;      // and in all
constexpr int kMostSubsets = 20000;  // size of step 4
constexpr int kMostSubsetSize = 12;  // and step 4 is left out for larger sets
constexpr int kWindow = 5;           // so many more workers than sought are in a window of neighbours
constexpr int kBeam = 32;            // sets that the best-first search keeps
constexpr int kChildren = 12;        // exchanges of one member that it considers
constexpr int kTogether = 4;         // active projections that one thread multiplies at a time
constexpr int kMostDoublings = 10;   // of the tolerated amplitude, below which nobody is named
constexpr double kRounding = 1e-12;  // of singular values, relative to the largest, with room
constexpr double kNever = NAN;       // what argmin passes over
constexpr double kMostWork = 6e7;    // complex multiplications of one search: bounds what an attacker can make it cost

// Cuts scratch into arrays; without scratch it only counts the bytes.
struct Arena {
  unsigned char* scratch;
  int64_t used;

  DRACO_MEMBER explicit Arena(unsigned char* scratch_) : scratch(scratch_), used(0) {}
  template <typename T>
  DRACO_MEMBER T* take(int64_t count) {
    T* taken = scratch == nullptr ? nullptr : reinterpret_cast<T*>(scratch + used);
    used += (count * sizeof(T) + 15) / 16 * 16;
    return taken;
  }
};

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

template <typename Team>
class Locator {
 public:
  static DRACO_MEMBER int64_t scratch_bytes(int workers, int adversaries) {
    const int64_t n = workers, k = 2 * adversaries, a = kMostActive;
    const int64_t levels = (adversaries < kMostSubsetSize ? adversaries : kMostSubsetSize) + 1;
    const int64_t complexes = 2 * k * k + 2 * k + 2 * k * n                          // factors, basis, powers, checks
                              + n * a + k * a + n                                    // active projections, residuals
                              + k * a * (k + 1) + 3 * (k + 1) * (k + 1) + k * a + n  // Prony
                              + levels * k * (n + a);                                // subsets
    return complexes * sizeof(Complex) + (2 * n + 3 * a) * sizeof(double) + 5 * n * sizeof(int) + 64 * 64;
  }

  DRACO_TEAM Locator(const Team& team, const LocatorInput& input, unsigned char* scratch)
      : team_(team), in_(input), arena_(scratch) {
    n_ = in_.workers;
    k2_ = 2 * in_.adversaries;
    factor_ = arena_.take<Complex>(int64_t{k2_} * k2_ + 1);
    diagonal_ = arena_.take<Complex>(k2_ + 1);
    basis_ = arena_.take<Complex>(int64_t{k2_} * k2_ + 1);
    power_ = arena_.take<Complex>(int64_t{k2_} * n_ + 1);
    check_ = arena_.take<Complex>(int64_t{k2_} * n_ + 1);
    active_p_ = arena_.take<Complex>(int64_t{n_} * kMostActive);
    residual_ = arena_.take<Complex>(int64_t{k2_} * kMostActive + 1);
    node_ = arena_.take<Complex>(n_);
    gain_ = arena_.take<double>(n_);
    rank_ = arena_.take<double>(n_);
    energy_ = arena_.take<double>(kMostActive);
    erased_ = arena_.take<int>(n_);
    set_ = arena_.take<int>(n_);
    trial_ = arena_.take<int>(n_);
    best_ = arena_.take<int>(n_);
    pool_ = arena_.take<int>(n_);
    active_ = arena_.take<int64_t>(kMostActive);
    const double scale = 1.0 / sqrt(static_cast<double>(n_));
    for (int j = team_.thread; j < n_; j += team_.threads) node_[j] = cyclic_node(n_, j);
    team_.sync();
    for (int64_t i = team_.thread; i < int64_t{k2_} * n_; i += team_.threads)
      power_[i] = scale * node_[(i / n_ + 1) * (i % n_) % n_];
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
      if (team_.thread == 0) erased_[erased] = j;
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
      const int checks = make_checks(set_, found);
      if (checks == 0) break;  // 2s erasures: nothing is left to check with
      energy(check_, checks, per_column);
      const int joined = activate(per_column, checks);
      if (joined == 0) break;
      if (joined < 0 || most_ == 0) return false;
      if (!hinted) {  // no fewer can explain all columns, and as a rule they do
        hinted = true;
        found = list(in_.hint, set_);
        continue;
      }
      found = search(found);
      if (found < 0) return false;
    }
    found = prune(found, energy, per_column);
    for (int i = 0; i < found; ++i) {
      const bool named = certain(found, i);
      if (team_.thread == 0) left_out[set_[i]] = 1;
      if (team_.thread == 0 && named) suspects[set_[i]] = 1;
    }
    team_.sync();
    return true;
  }

  // The checks, (2s - count, workers), that vanish on the workers in the mask; how many there are.
  DRACO_TEAM_CALL int checks_without(const uint8_t* erased, Complex* check) {
    erased_count_ = 0;
    const int count = list(erased, trial_);
    const int checks = count > k2_ ? 0 : make_checks(trial_, count);
    for (int64_t i = team_.thread; i < int64_t{checks} * n_; i += team_.threads) check[i] = check_[i];
    team_.sync();
    return checks;
  }

  // The weights b_j that give the sum of the gradients from the workers not erased: b = 1 + X q, b = 0 on the erased,
  // of minimal norm. Times `factor`. At most 2s workers may be erased.
  DRACO_TEAM_CALL void weights(const uint8_t* erased, double factor, Complex* b) {
    erased_count_ = 0;
    const int count = list(erased, trial_);
    factorise(trial_, count);
    Complex* q = basis_;
    if (team_.warp == 0) {
      for (int m = team_.lane; m < k2_; m += team_.lanes) q[m] = {0, 0};
      team_.sync_warp();
      for (int i = 0; i < count; ++i) {  // R^T y = 1, and Q applied to conj(y), then conjugated
        Complex y{0, 0};
        for (int l = team_.lane; l < i; l += team_.lanes) y = y + factor_[int64_t{i} * k2_ + l] * conj(q[l]);
        y = Complex{1, 0} - team_.sum(y);
        if (team_.lane == 0) q[i] = conj(divide(y, diagonal_[i]));
        team_.sync_warp();
      }
      for (int l = count - 1; l >= 0; --l) reflect(factor_ + int64_t{l} * k2_ + l, q + l, k2_ - l);
    }
    team_.sync();
    for (int j = team_.thread; j < n_; j += team_.threads) {
      Complex sum{1, 0};
      for (int m = 0; m < k2_; ++m) sum = sum - power_[int64_t{m} * n_ + j] * conj(q[m]);
      b[j] = erased[j] ? Complex{0, 0} : factor * sum;
    }
    team_.sync();
  }

 private:
  static DRACO_TEAM Complex divide(Complex a, Complex b) {
    const double size = norm2(b);
    return size > 0 ? (1 / size) * (a * conj(b)) : Complex{0, 0};
  }

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

  // ---- linear algebra: Householder reflections

  // For one warp. v becomes the unit vector u of I - 2 u u^H, which maps the given v to the returned multiple of e_0.
  DRACO_TEAM Complex make_reflector(Complex* v, int64_t size) const {
    double total = 0;
    for (int64_t m = team_.lane; m < size; m += team_.lanes) total += norm2(v[m]);
    const double length = sqrt(team_.sum(total));
    const Complex head = v[0];
    team_.sync_warp();
    const double first = sqrt(norm2(head));
    if (length == 0) return {0, 0};
    const Complex phase = first > 0 ? (1 / first) * head : Complex{1, 0};
    const Complex diagonal = -length * phase;
    const double scale = 1 / sqrt(2 * length * (length + first));
    for (int64_t m = team_.lane; m < size; m += team_.lanes) v[m] = scale * (m == 0 ? head - diagonal : v[m]);
    return diagonal;
  }

  // For one warp. x = (I - 2 u u^H) x.
  DRACO_TEAM void reflect(const Complex* u, Complex* x, int64_t size) const {
    Complex dot{0, 0};
    for (int64_t m = team_.lane; m < size; m += team_.lanes) dot = dot + conj(u[m]) * x[m];
    dot = 2.0 * team_.sum(dot);
    for (int64_t m = team_.lane; m < size; m += team_.lanes) x[m] = x[m] - dot * u[m];
    team_.sync_warp();
  }

  // QR of a matrix stored by columns. Column l keeps R above its diagonal and the reflector from there down; R's
  // diagonal goes to `diagonal`.
  DRACO_TEAM_CALL void factor(Complex* matrix, int64_t rows, int columns, Complex* diagonal) {
    for (int l = 0; l < columns; ++l) {
      Complex* u = matrix + l * rows + l;
      if (team_.warp == 0) {
        const Complex entry = make_reflector(u, rows - l);
        if (team_.lane == 0) diagonal[l] = entry;
      }
      team_.sync();
      for (int r = l + 1 + team_.warp; r < columns; r += team_.warps) reflect(u, matrix + r * rows + l, rows - l);
      team_.sync();
    }
  }

  // Factors the columns h_a of the erased workers and of `members`; how many there are.
  DRACO_TEAM int factorise(const int* members, int count) {
    const int all = erased_count_ + count;
    for (int64_t i = team_.thread; i < int64_t{all} * k2_; i += team_.threads)
      factor_[i] = power_[i % k2_ * n_ + worker(members, static_cast<int>(i / k2_))];
    team_.sync();
    factor(factor_, k2_, all, diagonal_);
    return all;
  }
  DRACO_TEAM int worker(const int* members, int i) const {
    return i < erased_count_ ? erased_[i] : members[i - erased_count_];
  }

  // The checks that vanish on the erased workers and on `members`; returns how many there are.
  DRACO_TEAM_CALL int make_checks(const int* members, int count) {
    const int all = erased_count_ + count, checks = k2_ - all;
    if (all == 0) {
      for (int64_t i = team_.thread; i < int64_t{k2_} * n_; i += team_.threads) check_[i] = power_[i];
      team_.sync();
      return checks;
    }
    factorise(members, count);
    for (int c = team_.warp; c < checks; c += team_.warps) {  // what the reflections leave orthogonal to all h_a
      Complex* q = basis_ + int64_t{c} * k2_;
      for (int m = team_.lane; m < k2_; m += team_.lanes) q[m] = {m == all + c ? 1.0 : 0.0, 0};
      team_.sync_warp();
      for (int l = all - 1; l >= 0; --l) reflect(factor_ + int64_t{l} * k2_ + l, q + l, k2_ - l);
    }
    team_.sync();
    for (int64_t i = team_.thread; i < int64_t{checks} * n_; i += team_.threads) {
      const Complex* q = basis_ + i / n_ * k2_;
      Complex sum{0, 0};
      for (int m = 0; m < k2_; ++m) sum = sum + conj(q[m]) * power_[int64_t{m} * n_ + i % n_];
      check_[i] = sum;
    }
    team_.sync();
    for (int64_t i = team_.thread; i < int64_t{checks} * all; i += team_.threads)
      check_[i / all * n_ + worker(members, static_cast<int>(i % all))] = {0, 0};
    team_.sync();
    work_ += static_cast<double>(k2_) * (static_cast<double>(all) * (all + checks) + static_cast<double>(checks) * n_);
    return checks;
  }

  // ---- the active projections

  // Adds the least explained columns to the search, at most kActiveStep; how many, or -1 when there is no room left.
  DRACO_TEAM_CALL int activate(const double* energy, int checks) {
    const int before = active_count_;
    for (int step = 0; step < kActiveStep; ++step) {
      const int64_t worst = team_.argmin(in_.columns, [&](int64_t c) {
        const double size = unexplained(energy[c], in_.noise[c], checks);
        bool out = size <= 1;
        for (int a = before; a < active_count_; ++a) out |= active_[a] == c;
        return out ? kNever : size == size ? -size : -HUGE_VAL;
      });
      if (worst < 0) break;
      if (active_count_ == kMostActive) return active_count_ > before ? active_count_ - before : -1;
      const double noise = in_.noise[worst];
      for (int j = team_.thread; j < n_; j += team_.threads) {
        const int64_t at = j * in_.stride + worst * in_.step;
        Complex* p = active_p_ + j * kMostActive + active_count_;
        p[0] = {in_.re[at] / noise, in_.im[at] / noise};
        for (int t = 1; active_count_ % kTogether == 0 && t < kTogether; ++t) p[t] = {0, 0};
      }
      if (team_.thread == 0) active_[active_count_] = worst;
      team_.sync();
      ++active_count_;
    }
    return active_count_ - before;
  }

  // to[m * kMostActive + a] = sum over workers of row(m, j) * P_ja, for all active a.
  template <typename Row>
  DRACO_TEAM void multiply_active(int rows, Row&& row, Complex* to) {
    const int blocks = (active_count_ + kTogether - 1) / kTogether;
    for (int i = team_.thread; i < rows * blocks; i += team_.threads) {
      const int m = i / blocks, a = i % blocks * kTogether;  // columns beyond active_count_ are 0
      Complex sum[kTogether] = {};
      for (int j = 0; j < n_; ++j) {
        const Complex factor = row(m, j);
        for (int t = 0; t < kTogether; ++t) sum[t] = sum[t] + factor * active_p_[j * kMostActive + a + t];
      }
      for (int t = 0; t < kTogether; ++t) to[m * kMostActive + a + t] = sum[t];
    }
    team_.sync();
    work_ += static_cast<double>(rows) * n_ * active_count_;
  }

  // What the checks leave of the active projections: residual_, and energy_ for each projection.
  DRACO_TEAM_CALL void residuals(int checks) {
    multiply_active(checks, [&](int m, int j) { return check_[int64_t{m} * n_ + j]; }, residual_);
    for (int a = team_.thread; a < active_count_; a += team_.threads) {
      double total = 0;
      for (int m = 0; m < checks; ++m) total += norm2(residual_[m * kMostActive + a]);
      energy_[a] = total;
    }
    team_.sync();
  }

  // Largest energy of an active projection per check, in units of what is tolerated: at most 1 means explained.
  DRACO_TEAM_CALL double excess(const int* members, int count) {
    const int checks = make_checks(members, count);
    residuals(checks);
    double worst = 0;
    for (int a = 0; a < active_count_; ++a)
      if (!(energy_[a] <= worst)) worst = energy_[a];
    team_.sync();
    return checks == 0 ? 0 : worst / (checks * kTolerance * kTolerance);
  }

  // For every worker, by how much erasing it too would lower the unexplained energy, which is returned.
  DRACO_TEAM_CALL double gains(const int* members, int count) {
    const int checks = make_checks(members, count);
    residuals(checks);
    double total = 0;
    for (int a = 0; a < active_count_; ++a) total += energy_[a];
    for (int j = team_.warp; j < n_; j += team_.warps) {
      double size = 0, sum = 0;
      for (int m = team_.lane; m < checks; m += team_.lanes) size += norm2(check_[int64_t{m} * n_ + j]);
      for (int a = team_.lane; a < active_count_; a += team_.lanes) {
        Complex dot{0, 0};
        for (int m = 0; m < checks; ++m) dot = dot + conj(check_[int64_t{m} * n_ + j]) * residual_[m * kMostActive + a];
        sum += norm2(dot);
      }
      size = team_.sum(size);
      sum = team_.sum(sum);
      if (team_.lane == 0) gain_[j] = size > 1e-24 ? sum / size : -1;
    }
    team_.sync();
    for (int i = team_.thread; i < erased_count_ + count; i += team_.threads) gain_[worker(members, i)] = -1;
    team_.sync();
    work_ += static_cast<double>(checks) * n_ * active_count_;
    return total;
  }

  DRACO_TEAM int best_gain() {
    const int64_t best = team_.argmin(n_, [&](int64_t j) { return -gain_[j]; });
    return best < 0 ? 0 : static_cast<int>(best);
  }

  // ---- the search

  // Replaces set_ by a set of at least `at_least` workers that explains the active projections; its size, or -1.
  DRACO_TEAM_CALL int search(int at_least) {
    work_ = 0;
    for (int nu = at_least > 1 ? at_least : 1;; nu = nu < 8 || nu == most_ ? nu + 1 : nu * 2 < most_ ? nu * 2 : most_) {
      if (nu > most_) break;
      if (!prony(nu)) {
        if (nu == most_) return -1;
        continue;
      }
      if (exchange(nu)) return nu;
      if (work_ > kMostWork) continue;
      pursue(nu);
      if (exchange(nu)) return nu;
    }
    if (most_ <= kMostSubsetSize) {
      work_ = 0;
      if (neighbours()) return most_;
    }
    work_ = 0;
    prony(most_);  // also leaves rank_: how small the polynomial is at each worker's node
    for (int j = team_.thread; j < n_; j += team_.threads) rank_[j] = -rank_[j];
    team_.sync();
    if (best_first(most_)) return most_;
    if (most_ > kMostSubsetSize) return -1;
    work_ = 0;
    if (likeliest()) return most_;
    gains(set_, 0);
    for (int j = team_.thread; j < n_; j += team_.threads) rank_[j] = gain_[j];
    team_.sync();
    if (likeliest()) return most_;
    return -1;
  }

  // Best-first search: of the kBeam sets that leave least unexplained, starting with set_, one member at a time is
  // exchanged for the kChildren best others, in the best set first of which that was not tried yet.
  DRACO_TEAM_CALL bool best_first(int nu) {
    Arena arena = arena_;
    int* sets = arena.take<int>(int64_t{kBeam} * nu);
    double* left = arena.take<double>(kBeam);
    uint8_t* tried = arena.take<uint8_t>(kBeam);
    copy(sets, set_, nu);
    put(left, HUGE_VAL);
    put(tried, uint8_t{0});
    int count = 1;
    while (work_ < kMostWork) {
      const int64_t b = team_.argmin(count, [&](int64_t i) { return tried[i] ? kNever : left[i]; });
      if (b < 0) break;
      copy(set_, sets + b * nu, nu);
      put(tried + b, uint8_t{1});
      if (excess(set_, nu) <= kQuiet) return true;
      for (int i = 0; i < nu && work_ < kMostWork; ++i) {
        copy_without(best_, set_, nu, i);
        const double total = gains(best_, nu - 1);
        for (int c = 0; c < kChildren; ++c) {
          const int joins = best_gain();
          if (gain_[joins] < 0) break;
          const double energy = total > gain_[joins] ? total - gain_[joins] : 0;
          if (count == kBeam && !(energy < left[kBeam - 1])) break;
          count = insert(best_, nu - 1, joins, energy, sets, left, tried, count);
          put(gain_ + joins, -1.0);
        }
      }
    }
    copy(set_, sets, nu);
    return excess(set_, nu) <= kExplained;
  }

  // Puts a set into the sorted list of the best, unless it is there; how many are there then.
  DRACO_TEAM int insert(const int* others, int size, int joins, double energy, int* sets, double* left, uint8_t* tried,
                        int count) {
    const int stride = size + 1;
    for (int i = team_.thread; i < size; i += team_.threads) trial_[i] = others[i];
    put(trial_ + size, joins);
    const int64_t same = team_.argmin(count, [&](int64_t b) {
      int shared = 0;
      for (int i = 0; i <= size; ++i)
        for (int l = 0; l <= size; ++l) shared += sets[b * stride + i] == trial_[l];
      return shared == size + 1 ? 0.0 : kNever;
    });
    if (same >= 0) return count;
    const int last = count < kBeam ? count : kBeam - 1;
    if (team_.thread == 0) {
      int at = last;
      for (; at > 0 && energy < left[at - 1]; --at) {
        left[at] = left[at - 1];
        tried[at] = tried[at - 1];
        for (int i = 0; i <= size; ++i) sets[at * stride + i] = sets[(at - 1) * stride + i];
      }
      left[at] = energy;
      tried[at] = 0;
      for (int i = 0; i <= size; ++i) sets[at * stride + i] = trial_[i];
    }
    team_.sync();
    return last + 1;
  }

  DRACO_TEAM_CALL void pursue(int nu) {
    for (int i = 0; i < nu; ++i) {
      gains(set_, i);  // of the messages without those chosen already, however large they are
      put(set_ + i, best_gain());
    }
  }

  // Exchanges one member at a time for the worker that lowers the unexplained energy most, until the set explains the
  // active projections as well as honest noise would. A set that only just explains them is exchanged further: of
  // several that do, the true one leaves the least.
  DRACO_TEAM_CALL bool exchange(int nu) {
    double reached = HUGE_VAL;
    for (;;) {
      const double now = excess(set_, nu);
      if (now <= kQuiet) return true;
      if (work_ > kMostWork) return now <= kExplained;
      double least = -1;
      for (int i = 0; i < nu; ++i) {
        if (work_ > kMostWork) return now <= kExplained;
        copy_without(trial_, set_, nu, i);
        const double total = gains(trial_, nu - 1);
        const int joins = best_gain();
        const double left = total > gain_[joins] ? total - gain_[joins] : 0;  // rounding may cross 0
        if (least < 0 || left < least) {
          least = left;
          copy(best_, trial_, nu - 1);
          put(best_ + nu - 1, joins);
        }
      }
      if (!(least < reached * (1 - 1e-9))) return now <= kExplained;
      reached = least;
      copy(set_, best_, nu);
    }
  }

  // Drops members that nothing speaks against: the polynomial of a too large nu has roots of no meaning. Columns that
  // speak for the others join the active ones.
  template <typename Energy>
  DRACO_TEAM_CALL int prune(int found, Energy&& energy, double* per_column) {
    for (int i = 0; found > 1 && i < found;) {
      copy_without(trial_, set_, found, i);
      bool explained = excess(trial_, found - 1) <= 1;
      if (explained) {
        const int checks = k2_ - erased_count_ - (found - 1);  // check_ holds them already
        energy(check_, checks, per_column);
        explained = activate(per_column, checks) == 0;
      }
      if (explained) {
        copy(set_, trial_, --found);
      } else {
        ++i;
      }
    }
    return found;
  }

  // Whether member i is taken for certainly bad: no other worker in its place comes near to explaining the projections.
  // Near is within 2 to the power of most_ times the tolerated amplitude, 1000 at most: the bad may differ from the set
  // in other members as well, and so nearly explain them without i. How often that misleads: docs/guarantee.md.
  DRACO_TEAM_CALL bool certain(int found, int i) {
    copy_without(best_, set_, found, i);
    gains(best_, found - 1);
    put(gain_ + set_[i], -1.0);
    const int other = best_gain();
    if (gain_[other] < 0) return true;
    put(best_ + found - 1, other);
    return excess(best_, found) > ldexp(1.0, 2 * (most_ < kMostDoublings ? most_ : kMostDoublings));
  }

  // Prony's method on the syndromes that the erased workers do not enter (their nodes are roots of what they are
  // multiplied with). Writes set_ (nu workers) and rank_. False, and nothing written, where no set of nu workers can
  // explain the active projections: the polynomial with its roots there would be a nearly null vector, as a row of the
  // Hankel system times its coefficients, of norm 1, is what a check of norm 1 that vanishes on the set makes of the
  // workers' messages, times the filter.
  DRACO_TEAM_CALL bool prony(int nu) {
    Arena arena = arena_;
    const int unknowns = nu + 1, syndromes = k2_ - erased_count_, hankel = syndromes - nu;
    const int64_t equations = int64_t{hankel} * active_count_;
    Complex* filter = arena.take<Complex>(n_);
    Complex* syndrome = arena.take<Complex>(int64_t{syndromes} * kMostActive);
    // Columns of the stacked Hankel system, one after the other.
    Complex* system = arena.take<Complex>((equations > unknowns ? equations : unknowns) * unknowns);
    Complex* triangle = arena.take<Complex>(int64_t{unknowns} * unknowns);
    Complex* vectors = arena.take<Complex>(int64_t{unknowns} * unknowns);
    for (int j = team_.thread; j < n_; j += team_.threads) {
      Complex product{1, 0};
      for (int i = 0; i < erased_count_; ++i)
        product = j == erased_[i] ? Complex{0, 0} : product * (node_[j] - node_[erased_[i]]);
      filter[j] = product;
    }
    team_.sync();
    double largest_filter = 0;
    for (int j = 0; j < n_; ++j) largest_filter = fmax(largest_filter, norm2(filter[j]));
    multiply_active(syndromes, [&](int m, int j) { return filter[j] * power_[int64_t{m} * n_ + j]; }, syndrome);
    int64_t rows = equations;
    for (int64_t i = team_.thread; i < equations * unknowns; i += team_.threads) {
      const int64_t l = i / equations, row = i % equations;
      system[i] = syndrome[(row / active_count_ + l) * kMostActive + row % active_count_];
    }
    team_.sync();
    if (equations > unknowns) {  // the triangle of its QR factorisation has the same null vector
      factor(system, equations, unknowns, diagonal_);
      for (int i = team_.thread; i < unknowns * unknowns; i += team_.threads) {
        const int l = i / unknowns, m = i % unknowns;
        triangle[i] = m < l ? system[l * equations + m] : m == l ? diagonal_[l] : Complex{0, 0};
      }
      team_.sync();
      system = triangle;
      rows = unknowns;
    }
    work_ += static_cast<double>(equations) * unknowns * unknowns;
    double least = 0, total = 0;
    const int64_t smallest = null_vector(system, rows, unknowns, vectors, &least, &total);
    const double tolerated = kTolerance * kTolerance * hankel * static_cast<double>(equations) * largest_filter;
    if (least > tolerated + kRounding * kRounding * total) return false;
    Complex* polynomial = vectors + smallest * unknowns;

    for (int j = team_.thread; j < n_; j += team_.threads) rank_[j] = sqrt(norm2(evaluate(polynomial, nu, node_[j])));
    team_.sync();
    for (int i = team_.thread; i < erased_count_; i += team_.threads) rank_[erased_[i]] = HUGE_VAL;
    team_.sync();
    // The node with the smallest value is a root; dividing it out keeps its neighbours from looking like roots as well.
    for (int i = 0; i < nu; ++i) {
      const int root = static_cast<int>(team_.argmin(n_, [&](int64_t j) {
        const double value = norm2(evaluate(polynomial, nu - i, node_[j]));
        bool taken = rank_[j] == HUGE_VAL;
        for (int l = 0; l < i; ++l) taken |= set_[l] == j;
        return taken ? kNever : value == value ? value : HUGE_VAL;
      }));
      put(set_ + i, root < 0 ? 0 : root);
      if (team_.thread == 0 && root >= 0) {
        for (int m = nu - i - 1; m >= 0; --m) polynomial[m] = polynomial[m] + node_[root] * polynomial[m + 1];
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

  // One-sided Jacobi: rotates the columns until they are orthogonal. Unlike methods on the Gram matrix it keeps small
  // singular values exact. A sweep goes through all pairs as a round-robin tournament, whose rounds are disjoint pairs,
  // one for each warp. Returns which column of `vectors` belongs to the smallest singular value; the squares of that
  // and of all together go to `least` and `total`.
  DRACO_TEAM_CALL int64_t null_vector(Complex* system, int64_t rows, int columns, Complex* vectors, double* least,
                                      double* total) {
    for (int64_t i = team_.thread; i < int64_t{columns} * columns; i += team_.threads)
      vectors[i] = {i / columns == i % columns ? 1.0 : 0.0, 0};
    team_.sync();
    const int players = columns + columns % 2, rounds = players - 1;
    for (int sweep = 0; sweep < 30; ++sweep) {
      bool rotated = false;
      for (int round = 0; round < rounds; ++round) {
        for (int pair = team_.warp; pair < players / 2; pair += team_.warps) {
          const int a = pair == 0 ? rounds : (round + pair) % rounds, b = (round + rounds - pair) % rounds;
          const int p = a < b ? a : b, q = a < b ? b : a;
          if (q < columns)
            rotated |= orthogonalise(system + p * rows, system + q * rows, rows, vectors + int64_t{p} * columns,
                                     vectors + int64_t{q} * columns, columns);
        }
        team_.sync();
      }
      if (!team_.any(rotated)) break;
    }
    const auto size_of = [&](int64_t p) {
      double size = 0;
      for (int64_t m = 0; m < rows; ++m) size += norm2(system[p * rows + m]);
      return size;
    };
    const int64_t smallest = team_.argmin(columns, size_of);
    if (smallest < 0) return 0;
    *least = size_of(smallest);
    for (int p = 0; p < columns; ++p) *total += size_of(p);
    return smallest;
  }

  // For one warp. Whether x and y had to be rotated.
  DRACO_TEAM bool orthogonalise(Complex* x, Complex* y, int64_t rows, Complex* u, Complex* v, int columns) const {
    Complex dot{0, 0};
    double xx = 0, yy = 0;
    for (int64_t m = team_.lane; m < rows; m += team_.lanes) {
      xx += norm2(x[m]);
      yy += norm2(y[m]);
      dot = dot + conj(x[m]) * y[m];
    }
    xx = team_.sum(xx);
    yy = team_.sum(yy);
    dot = team_.sum(dot);
    const double size = sqrt(norm2(dot));
    if (!(size > 1e-15 * sqrt(xx) * sqrt(yy)) || size == 0) return false;
    const Complex phase = (1 / size) * dot;
    const double zeta = (yy - xx) / (2 * size);
    const double t = (zeta >= 0 ? 1 : -1) / (fabs(zeta) + sqrt(1 + zeta * zeta));
    const double c = 1 / sqrt(1 + t * t), s = c * t;
    rotate(x, y, rows, c, s, phase);
    rotate(u, v, columns, c, s, phase);
    return true;
  }
  DRACO_TEAM void rotate(Complex* x, Complex* y, int64_t rows, double c, double s, Complex phase) const {
    for (int64_t m = team_.lane; m < rows; m += team_.lanes) {
      const Complex a = x[m], b = conj(phase) * y[m];
      x[m] = c * a - s * b;
      y[m] = s * a + c * b;
    }
  }

  // The likeliest workers by rank_, as many as kMostSubsets allows subsets of most_ of them.
  DRACO_TEAM_CALL bool likeliest() {
    int pool = most_;
    double count = 1;
    while (pool < n_ - erased_count_ && count * (pool + 1) / (pool + 1 - most_) <= kMostSubsets) {
      count = count * (pool + 1) / (pool + 1 - most_);
      ++pool;
    }
    for (int i = 0; i < pool; ++i) {
      const int64_t best = team_.argmin(n_, [&](int64_t j) {
        bool taken = in_.missing[j] || in_.nonfinite[j];
        for (int l = 0; l < i; ++l) taken |= pool_[l] == j;
        return taken ? kNever : rank_[j] == rank_[j] ? -rank_[j] : HUGE_VAL;
      });
      put(pool_ + i, static_cast<int>(best));
    }
    return subsets(pool);
  }

  // Neighbours on the circle: windows that overlap so that any most_ of most_ + 2 in a row are in one.
  DRACO_TEAM_CALL bool neighbours() {
    const int present = n_ - erased_count_, step = kWindow - 1;
    const int pool = most_ + kWindow < present ? most_ + kWindow : present;
    for (int first = 0; first < present && work_ < kMostWork; first += step) {
      int seen = 0;
      for (int j = 0; j < n_; ++j) {
        if (in_.missing[j] || in_.nonfinite[j]) continue;
        const int place = (seen++ - first + present) % present;
        if (place < pool && team_.thread == 0) pool_[place] = j;
      }
      team_.sync();
      if (subsets(pool)) return true;
    }
    return false;
  }

  // Tries all subsets of most_ workers out of the first of pool_: a depth-first walk that keeps, per level, the checks
  // orthogonal to what is chosen and the residuals under them.
  DRACO_TEAM_CALL bool subsets(int pool) {
    const int nu = most_;
    Arena arena = arena_;
    const int checks = make_checks(set_, 0), width = pool + active_count_;
    residuals(checks);
    // Level l: columns of the pool's workers and of the residuals, with the l chosen directions taken out.
    Complex* level = arena.take<Complex>(int64_t{nu + 1} * checks * width);
    for (int i = team_.thread; i < checks * width; i += team_.threads) {
      const int m = i / width, column = i % width;
      level[i] = column < pool ? check_[int64_t{m} * n_ + pool_[column]] : residual_[m * kMostActive + column - pool];
    }
    team_.sync();
    double least = -1;
    int depth = 0;
    put(trial_, -1);  // trial_[l]: index into the pool chosen at level l
    while (depth >= 0 && work_ < kMostWork) {
      const Complex* here = level + int64_t{depth} * checks * width;
      if (depth == nu - 1) {  // the last member: only its gain is needed
        double total = 0;
        for (int m = 0; m < checks; ++m)
          for (int a = 0; a < active_count_; ++a) total += norm2(here[m * width + pool + a]);
        const int first = depth ? trial_[depth - 1] + 1 : 0;
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
          for (int l = team_.thread; l < depth; l += team_.threads) best_[l] = pool_[trial_[l]];
          put(best_ + depth, pool_[last]);
        }
        work_ += static_cast<double>(pool) * checks * active_count_;
        --depth;
        continue;
      }
      const int chosen = trial_[depth] + 1;
      team_.sync();
      put(trial_ + depth, chosen);
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
      put(trial_ + ++depth, chosen);
    }
    const double tolerated = kTolerance * kTolerance * (checks - nu) * active_count_;
    if (least < 0 || least > tolerated) return false;
    copy(set_, best_, nu);
    return exchange(nu);
  }

  Team team_;
  LocatorInput in_;
  Arena arena_;
  int n_ = 0, k2_ = 0, most_ = 0, erased_count_ = 0, active_count_ = 0;
  double work_ = 0;
  Complex *factor_, *diagonal_, *basis_, *power_, *check_, *active_p_, *residual_, *node_;
  double *gain_, *rank_, *energy_;
  int *erased_, *set_, *trial_, *best_, *pool_;
  int64_t* active_;
};

}  // namespace
}  // namespace draco

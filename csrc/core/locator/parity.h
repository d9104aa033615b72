// The cyclic code's checks that vanish on a set of workers, and the decoding weights that do without one.
//
// Honest messages satisfy H P = 0 up to rounding, with H_mj = x_j^m / sqrt(n), m = 1 .. 2s (orthonormal rows). Given a
// set A of workers, the checks that vanish on A are the orthogonal complement of the columns h_a, a in A, and are
// evaluated on the other workers alone: a message that is 1e30 times too large leaves no rounding behind.
#pragma once

#include <cmath>

#include "core/algebra.h"
#include "core/arena.h"
#include "core/cyclic.h"
#include "core/team.h"

namespace draco {
namespace {

constexpr double kMostWork = 6e7;

// Complex multiplications that a search has spent, and its budget: this bounds what an attacker can make it cost.
struct Work {
  double spent = 0, budget = kMostWork;

  DRACO_MEMBER void add(double multiplications) { spent += multiplications; }
  DRACO_MEMBER bool exhausted() const { return spent >= budget; }
};

// Some workers, or a list of workers.
struct Set {
  int* member;
  int size;
};

// The checks that vanish on the erased workers and on the members of a set: good until the next ones are made.
struct Checks {
  int count, vanishing;     // checks, and workers on which they vanish: 2s together
  const Complex* rows;      // (count, workers)
  const Complex* image;     // (workers, 2s): of H Q^H, the rows of R first, then the checks
  const Complex* factor;    // (vanishing, 2s): the factorisation of those workers' columns (core/algebra.h)
  const Complex* diagonal;  // (vanishing,)
};

struct ParityArrays {
  Complex *node, *power, *factor, *diagonal, *image, *check;
  int* erased;

  DRACO_MEMBER ParityArrays(Arena& arena, int64_t n, int64_t s) {
    const int64_t k = 2 * s;
    node = arena.take<Complex>(n);
    power = arena.take<Complex>(k * n + 1);
    factor = arena.take<Complex>(k * k + 1);
    diagonal = arena.take<Complex>(k + 1);
    image = arena.take<Complex>(k * n + 1);
    check = arena.take<Complex>(k * n + 1);
    erased = arena.take<int>(n);
  }
};

// Its methods are collectives.
template <typename Team>
class Parity {
 public:
  const int workers, rows;      // n, and 2s
  const Complex *node, *power;  // (workers,): x_j; (2s, workers): H

  static DRACO_MEMBER int64_t scratch_bytes(int workers, int adversaries) {
    Arena arena;
    ParityArrays(arena, workers, adversaries);
    return arena.needed();
  }

  DRACO_TEAM Parity(const Team& team, int workers_, int adversaries, const ParityArrays& arrays)
      : workers(workers_), rows(2 * adversaries), node(arrays.node), power(arrays.power), team_(team), at_(arrays) {
    const double scale = 1.0 / sqrt(static_cast<double>(workers));
    for (int j = team_.thread; j < workers; j += team_.threads) at_.node[j] = cyclic_node(workers, j);
    team_.sync();
    for (int64_t i = team_.thread; i < int64_t{rows} * workers; i += team_.threads)
      at_.power[i] = scale * node[(i / workers + 1) * (i % workers) % workers];
    team_.sync();
  }

  // From here on all checks vanish on the workers in either mask.
  DRACO_TEAM void erase(const uint8_t* mask, const uint8_t* other) {
    int count = 0;
    for (int j = 0; j < workers; ++j) {
      if (!mask[j] && !other[j]) continue;
      if (team_.thread == 0) at_.erased[count] = j;
      ++count;
    }
    team_.sync();
    erased_ = count;
  }
  DRACO_TEAM int erased() const { return erased_; }
  DRACO_TEAM int erased(int i) const { return at_.erased[i]; }

  // Worker number i of those on which the checks vanish with this set: the erased come first.
  DRACO_TEAM int vanishing(Set set, int i) const { return i < erased_ ? at_.erased[i] : set.member[i - erased_]; }

  DRACO_TEAM_CALL Checks checks_without(Set set, Work& work) {
    const int all = erased_ + set.size, count = rows - all;
    if (all > 0) factorise(set, work);
    for (int j = team_.warp; j < workers; j += team_.warps) {
      Complex* column = at_.image + int64_t{j} * rows;
      for (int m = team_.lane; m < rows; m += team_.lanes) column[m] = power[int64_t{m} * workers + j];
      team_.sync_warp();
      for (int l = 0; l < all; ++l) reflect(team_, at_.factor + int64_t{l} * rows + l, column + l, rows - l);
    }
    team_.sync();
    for (int64_t i = team_.thread; i < int64_t{count} * all; i += team_.threads)
      at_.image[int64_t{vanishing(set, static_cast<int>(i % all))} * rows + all + i / all] = {0, 0};
    team_.sync();
    for (int64_t i = team_.thread; i < int64_t{count} * workers; i += team_.threads)
      at_.check[i] = at_.image[i % workers * rows + all + i / workers];
    team_.sync();
    work.add(static_cast<double>(workers) * all * (rows + count));
    return {count, all, at_.check, at_.image, at_.factor, at_.diagonal};
  }

  // The weights b_j that give the sum of the gradients from the workers not in the mask: b = 1 + X q, b = 0 on those in
  // it, of minimal norm. Times `by`. At most 2s workers may be in the mask, and none are erased. Of shorter messages
  // the weights of every block (core/answers.h), (compression, workers): b = x^(m_b) + X q.
  DRACO_TEAM_CALL void weights(const uint8_t* mask, double by, Complex* b, int compression = 1) {
    const Set set{at_.erased, list(team_, mask, workers, at_.erased)};
    Work unlimited;
    factorise(set, unlimited);
    for (int answer = 0; answer < compression; ++answer, b += workers) {
      int moment = answer_moment(rows / 2, compression, answer) % workers;
      if (moment < 0) moment += workers;
      weights_of_moment(set, mask, moment, by, b);
    }
  }

  // The checks, (2s - those in the mask, workers), that vanish on the workers in a mask.
  DRACO_TEAM_CALL void write_checks(const uint8_t* mask, Complex* to) {
    Work unlimited;
    erase(mask, mask);
    if (erased_ > rows) return;
    const Checks checks = checks_without({nullptr, 0}, unlimited);
    for (int64_t i = team_.thread; i < int64_t{checks.count} * workers; i += team_.threads) to[i] = checks.rows[i];
    team_.sync();
  }

 private:
  // The weights that give one moment without the workers of a set, whose columns are factored.
  DRACO_TEAM void weights_of_moment(Set set, const uint8_t* mask, int64_t moment, double by, Complex* b) {
    Complex* q = at_.image;
    if (team_.warp == 0) {
      for (int m = team_.lane; m < rows; m += team_.lanes) q[m] = {0, 0};
      team_.sync_warp();
      for (int i = 0; i < set.size; ++i) {  // R^T y = x^moment, and Q applied to conj(y), then conjugated
        Complex y{0, 0};
        for (int l = team_.lane; l < i; l += team_.lanes) y = y + at_.factor[int64_t{i} * rows + l] * conj(q[l]);
        y = node[moment * set.member[i] % workers] - team_.sum(y);
        if (team_.lane == 0) q[i] = conj(quotient(y, at_.diagonal[i]));
        team_.sync_warp();
      }
      for (int l = set.size - 1; l >= 0; --l) reflect(team_, at_.factor + int64_t{l} * rows + l, q + l, rows - l);
    }
    team_.sync();
    for (int j = team_.thread; j < workers; j += team_.threads) {
      Complex sum = node[moment * j % workers];
      for (int m = 0; m < rows; ++m) sum = sum - power[int64_t{m} * workers + j] * conj(q[m]);
      b[j] = mask[j] ? Complex{0, 0} : by * sum;
    }
    team_.sync();
  }

  // Factors the columns h_a of the erased workers and of the set.
  DRACO_TEAM void factorise(Set set, Work& work) {
    const int all = erased_ + set.size;
    for (int64_t i = team_.thread; i < int64_t{all} * rows; i += team_.threads)
      at_.factor[i] = power[i % rows * workers + vanishing(set, static_cast<int>(i / rows))];
    team_.sync();
    factor(team_, at_.factor, rows, all, at_.diagonal);
    work.add(static_cast<double>(all) * all * rows);
  }

  const Team team_;
  const ParityArrays at_;
  int erased_ = 0;  // workers in at_.erased
};

}  // namespace
}  // namespace draco

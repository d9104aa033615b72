// Small dense linear algebra over complex numbers for a team of threads (core/team.h).
// Matrices are stored by columns. All of it is double; nothing is allocated.
#pragma once

#include <cmath>

#include "core/common.h"
#include "core/team.h"

namespace draco {
namespace {

DRACO_HD Complex quotient(Complex a, Complex b) {
  const double size = norm2(b);
  return size > 0 ? (1 / size) * (a * conj(b)) : Complex{0, 0};
}

// polynomial[0] + polynomial[1] x + ... + polynomial[degree] x^degree.
DRACO_HD Complex evaluate(const Complex* polynomial, int degree, Complex x) {
  Complex value = polynomial[degree];
  for (int m = degree - 1; m >= 0; --m) value = value * x + polynomial[m];
  return value;
}

// sum of conj(x_m) y_m. For one warp.
template <typename Team>
DRACO_TEAM Complex inner(const Team& team, const Complex* x, const Complex* y, int64_t size) {
  // Independent sums: one alone would wait for every addition.
  Complex sum[4] = {};
  int64_t m = team.lane;
  for (; m + 3 * team.lanes < size; m += 4 * team.lanes)
    for (int t = 0; t < 4; ++t) sum[t] = sum[t] + conj(x[m + t * team.lanes]) * y[m + t * team.lanes];
  for (; m < size; m += team.lanes) sum[0] = sum[0] + conj(x[m]) * y[m];
  return team.sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// For one warp.
template <typename Team>
DRACO_TEAM double squared_norm(const Team& team, const Complex* x, int64_t size) {
  double total = 0;
  for (int64_t m = team.lane; m < size; m += team.lanes) total += norm2(x[m]);
  return team.sum(total);
}

// y = y - factor x. For one warp.
template <typename Team>
DRACO_TEAM void subtract(const Team& team, Complex factor, const Complex* x, Complex* y, int64_t size) {
  for (int64_t m = team.lane; m < size; m += team.lanes) y[m] = y[m] - factor * x[m];
  team.sync_warp();
}

// ---- Householder reflections

// v becomes the unit vector u of I - 2 u u^H, which maps the given v to the returned multiple of e_0. For one warp.
template <typename Team>
DRACO_TEAM Complex make_reflector(const Team& team, Complex* v, int64_t size) {
  const double length = sqrt(squared_norm(team, v, size));
  const Complex head = v[0];
  team.sync_warp();
  const double first = sqrt(norm2(head));
  if (length == 0) return {0, 0};
  const Complex phase = first > 0 ? (1 / first) * head : Complex{1, 0};
  const Complex diagonal = -length * phase;
  const double scale = 1 / sqrt(2 * length * (length + first));
  for (int64_t m = team.lane; m < size; m += team.lanes) v[m] = scale * (m == 0 ? head - diagonal : v[m]);
  return diagonal;
}

// x = (I - 2 u u^H) x. For one warp.
template <typename Team>
DRACO_TEAM void reflect(const Team& team, const Complex* u, Complex* x, int64_t size) {
  subtract(team, 2.0 * inner(team, u, x, size), u, x, size);
}

// QR factorisation. Column l keeps R above its diagonal and the reflector from there down; R's diagonal goes to
// `diagonal`. Collective.
template <typename Team>
DRACO_TEAM_CALL void factor(const Team& team, Complex* matrix, int64_t rows, int columns, Complex* diagonal) {
  for (int l = 0; l < columns; ++l) {
    Complex* u = matrix + l * rows + l;
    if (team.warp == 0) {
      const Complex entry = make_reflector(team, u, rows - l);
      if (team.lane == 0) diagonal[l] = entry;
    }
    team.sync();
    for (int r = l + 1 + team.warp; r < columns; r += team.warps) reflect(team, u, matrix + r * rows + l, rows - l);
    team.sync();
  }
}

// Makes the columns orthonormal, the first first; a column that depends on those before it becomes 0. Collective.
template <typename Team>
DRACO_TEAM_CALL void orthonormalise(const Team& team, Complex* matrix, int64_t rows, int columns) {
  for (int l = 0; l < columns; ++l) {
    Complex* q = matrix + l * rows;
    if (team.warp == 0) {
      const double before = squared_norm(team, q, rows);
      for (int twice = 0; twice < 2 && l > 0; ++twice)  // what rounding leaves after the first time goes the second
        for (int r = 0; r < l; ++r) {
          const Complex* p = matrix + r * rows;
          subtract(team, inner(team, p, q, rows), p, q, rows);
        }
      const double size = squared_norm(team, q, rows);
      const double scale = size > 1e-28 * before ? 1 / sqrt(size) : 0;
      for (int64_t m = team.lane; m < rows; m += team.lanes) q[m] = scale * q[m];
    }
    team.sync();
  }
}

// ---- the smallest singular vector

// For one warp.
template <typename Team>
DRACO_TEAM void rotate(const Team& team, Complex* x, Complex* y, int64_t rows, double c, double s, Complex phase) {
  for (int64_t m = team.lane; m < rows; m += team.lanes) {
    const Complex a = x[m], b = conj(phase) * y[m];
    x[m] = c * a - s * b;
    y[m] = s * a + c * b;
  }
}

// Rotates x and y until they are orthogonal; false where they were already. For one warp.
template <typename Team>
DRACO_TEAM bool make_orthogonal(const Team& team, Complex* x, Complex* y, int64_t rows, Complex* u, Complex* v,
                                int columns) {
  const double xx = squared_norm(team, x, rows), yy = squared_norm(team, y, rows);
  const Complex dot = inner(team, x, y, rows);
  const double size = sqrt(norm2(dot));
  if (!(size > 1e-15 * sqrt(xx) * sqrt(yy)) || size == 0) return false;
  const Complex phase = (1 / size) * dot;
  const double zeta = (yy - xx) / (2 * size);
  const double t = (zeta >= 0 ? 1 : -1) / (fabs(zeta) + sqrt(1 + zeta * zeta));
  const double c = 1 / sqrt(1 + t * t), s = c * t;
  rotate(team, x, y, rows, c, s, phase);
  rotate(team, u, v, columns, c, s, phase);
  return true;
}

struct NullVector {
  int64_t column;       // of `vectors`
  double least, total;  // squares of the smallest singular value, and of all together
};

// One-sided Jacobi: rotates the columns until they are orthogonal. Unlike methods on the Gram matrix it keeps small
// singular values exact. A sweep goes through all pairs as a round-robin tournament, whose rounds are disjoint pairs,
// one for each warp. Collective.
template <typename Team>
DRACO_TEAM_CALL NullVector null_vector(const Team& team, Complex* system, int64_t rows, int columns, Complex* vectors) {
  for (int64_t i = team.thread; i < int64_t{columns} * columns; i += team.threads)
    vectors[i] = {i / columns == i % columns ? 1.0 : 0.0, 0};
  team.sync();
  const int players = columns + columns % 2, rounds = players - 1;
  for (int sweep = 0; sweep < 30; ++sweep) {
    bool rotated = false;
    for (int round = 0; round < rounds; ++round) {
      for (int pair = team.warp; pair < players / 2; pair += team.warps) {
        const int a = pair == 0 ? rounds : (round + pair) % rounds, b = (round + rounds - pair) % rounds;
        const int p = a < b ? a : b, q = a < b ? b : a;
        if (q < columns)
          rotated |= make_orthogonal(team, system + p * rows, system + q * rows, rows, vectors + int64_t{p} * columns,
                                     vectors + int64_t{q} * columns, columns);
      }
      team.sync();
    }
    if (!team.any(rotated)) break;
  }
  const auto size_of = [&](int64_t p) {
    double size = 0;
    for (int64_t m = 0; m < rows; ++m) size += norm2(system[p * rows + m]);
    return size;
  };
  NullVector found{team.argmin(columns, size_of), 0, 0};
  if (found.column < 0) found.column = 0;
  found.least = size_of(found.column);
  for (int p = 0; p < columns; ++p) found.total += size_of(p);
  return found;
}

// The null vector of a matrix that may have many more rows than columns: the triangle of its QR factorisation has the
// same null vector. Uses the matrix up; `triangle` and `diagonal` are scratch. Collective.
template <typename Team>
DRACO_TEAM_CALL NullVector null_vector(const Team& team, Complex* matrix, int64_t rows, int columns, Complex* triangle,
                                       Complex* diagonal, Complex* vectors) {
  if (rows <= columns) return null_vector(team, matrix, rows, columns, vectors);
  factor(team, matrix, rows, columns, diagonal);
  for (int i = team.thread; i < columns * columns; i += team.threads) {
    const int l = i / columns, m = i % columns;
    triangle[i] = m < l ? matrix[l * rows + m] : m == l ? diagonal[l] : Complex{0, 0};
  }
  team.sync();
  return null_vector(team, triangle, columns, columns, vectors);
}

}  // namespace
}  // namespace draco

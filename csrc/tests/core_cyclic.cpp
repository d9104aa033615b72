#include <algorithm>
#include <cmath>
#include <complex>
#include <limits>
#include <vector>

#include "core/answers.h"
#include "core/cyclic.h"
#include "tests/check.h"

using namespace draco;

using Exact = std::complex<long double>;

static Exact exact_node(int workers, long long power) {
  return std::polar(1.0L, 2 * std::acos(-1.0L) * (power % workers) / workers);
}
// Of a node: angles below 2 pi are rounded twice, by half of 2^-50 each time.
constexpr double kNodeError = 2e-15;

static double distance(Complex a, Exact b) { return static_cast<double>(std::abs(Exact(a.re, a.im) - b)); }

// ---------------------------------------------------------------------------------------------- offsets

TEST(offsets_are_evenly_spread) {
  for (int n = 1; n <= 200; ++n) {
    for (int s = 0; 2 * s + 1 <= n; ++s) {
      const int r = 2 * s + 1;
      CHECK_EQ(cyclic_offset(n, r, 0), 0, "n = ", n, ", s = ", s);
      for (int t = 0; t < r; ++t) {
        const int own = cyclic_offset(n, r, t), next = t + 1 < r ? cyclic_offset(n, r, t + 1) : n;
        CHECK_EQ(own, static_cast<int>(std::llround(static_cast<long double>(t) * n / r)), "n = ", n, ", s = ", s,
                 ", t = ", t);
        // Strictly increasing, and no gap, that around the end included, differs from another by more than one.
        CHECK_EQ(next - own >= n / r && next - own <= (n + r - 1) / r, true, "n = ", n, ", s = ", s, ", t = ", t);
      }
    }
  }
}

TEST(offsets_of_many_workers) {  // whose products need 64 bits
  const int n = 2000000011, r = 2000000001;
  for (int t : {0, 1, 999999999, 1000000000, 1999999999, 2000000000})
    CHECK_EQ(cyclic_offset(n, r, t), static_cast<int>(std::llround(static_cast<long double>(t) * n / r)), "t = ", t);
}

// ---------------------------------------------------------------------------------------------- nodes

TEST(nodes_are_roots_of_unity) {
  for (int n : {1, 2, 3, 4, 5, 6, 7, 8, 12, 15, 16, 60, 97, 255, 256, 601, 1024}) {
    for (int m = 0; m < n; ++m) {
      const Complex x = cyclic_node(n, m);
      CHECK_LE(distance(x, exact_node(n, m)), kNodeError, "n = ", n, ", power ", m);
      CHECK_LE(std::abs(norm2(x) - 1), 1e-15, "n = ", n, ", power ", m);
      if (4 * m % n == 0) {  // on the axes nothing is rounded
        const int quarter = 4 * m / n;
        CHECK_EQ(x.re, quarter % 2 ? 0.0 : 1.0 - quarter, "n = ", n, ", power ", m);
        CHECK_EQ(x.im, quarter % 2 ? 2.0 - quarter : 0.0, "n = ", n, ", power ", m);
      }
    }
  }
}

// Powers that differ by a multiple of n are the same number to the last bit, below zero and far above n too.
TEST(powers_are_reduced_exactly) {
  for (int n : {1, 2, 3, 4, 7, 8, 60, 601}) {
    for (int m = 0; m < n; ++m) {
      const Complex x = cyclic_node(n, m);
      for (long long turns : {-1000000000000000ll, -7ll, -1ll, 1ll, 2ll, 1000003ll, 1000000000000000ll}) {
        const Complex again = cyclic_node(n, m + turns * n);
        CHECK_EQ(again.re == x.re && again.im == x.im, true, "n = ", n, ", power ", m, " + ", turns, " n");
      }
      CHECK_LE(distance(cyclic_node(n, -m), std::conj(exact_node(n, m))), kNodeError, "n = ", n, ", power ", -m);
    }
    for (long long power : {std::numeric_limits<long long>::min(), std::numeric_limits<long long>::max()})
      CHECK_LE(distance(cyclic_node(n, power), exact_node(n, power)), kNodeError, "n = ", n, ", power ", power);
  }
}

// ---------------------------------------------------------------------------------------------- weights

// What decoding rests on: sum_t w_t = 1 and sum_t w_t x_{o_t}^m = 0 for m = 1 .. 2s.
static void check_conditions(int n, int s) {
  const int r = 2 * s + 1;
  std::vector<Complex> weight(r), node(n);
  for (int j = 0; j < n; ++j) node[j] = cyclic_node(n, j);
  for (int t = 0; t < r; ++t) {
    weight[t] = cyclic_weight(n, s, t);
    if (s > 0) CHECK_LE(norm2(weight[t]), 0.25 * (1 + 1e-14), "n = ", n, ", s = ", s, ", t = ", t);
    if (n % r == 0) CHECK_EQ(weight[t].re == 1.0 / r && weight[t].im == 0, true, "n = ", n, ", s = ", s, ", t = ", t);
  }
  for (int m = 0; m < r; ++m) {
    Complex sum{m == 0 ? -1.0 : 0.0, 0};
    for (int t = 0; t < r; ++t) sum = sum + weight[t] * node[static_cast<long long>(m) * cyclic_offset(n, r, t) % n];
    CHECK_LE(std::sqrt(norm2(sum)), 1e-12, "n = ", n, ", s = ", s, ", m = ", m);
  }
}

TEST(weights_meet_their_conditions) {
  for (int n = 1; n < 40; ++n)
    for (int s = 0; 2 * s + 1 <= n; ++s) check_conditions(n, s);
  const int larger[][2] = {{255, 8}, {255, 126}, {255, 127}, {256, 100}, {601, 2}, {601, 200}, {601, 299}, {601, 300}};
  for (const auto& [n, s] : larger) check_conditions(n, s);
}

// The same conditions far below double's rounding, which weights that gradients of float64 are encoded with have to
// meet.
TEST(encoding_weights_meet_them_to_30_digits) {
  const int codes[][2] = {{3, 1}, {4, 1}, {7, 2}, {12, 3}, {15, 2}, {39, 16}, {64, 31}, {255, 8}, {256, 127}};
  for (const auto& [n, s] : codes) {
    const auto sine = [workers = n](int step) { return sine_of_pi(step, workers); };
    DoubleDouble re{-1, 0}, im{0, 0}, first_re{0, 0}, first_im{0, 0};
    for (int t = 0; t <= 2 * s; ++t) {
      const EncodingWeight w = cyclic_weight(n, s, t, sine);
      const int offset = cyclic_offset(n, 2 * s + 1, t);
      const DoubleDouble x = sine_of_pi(4LL * offset + n, 2LL * n), y = sine_of_pi(2LL * offset, n);
      re = re + w.re;
      im = im + w.im;
      first_re = first_re + w.re * x + -(w.im * y);
      first_im = first_im + w.re * y + w.im * x;
    }
    CHECK_LE(std::abs(re.hi) + std::abs(im.hi), 1e-29, "n = ", n, ", s = ", s);
    CHECK_LE(std::abs(first_re.hi) + std::abs(first_im.hi), 1e-29, "n = ", n, ", s = ", s);
  }
}

// prod_{i != t} x_i / (x_i - x_t), multiplied out.
TEST(weights_are_lagranges) {
  for (int n = 1; n < 40; ++n) {
    for (int s = 0; 2 * s + 1 <= n; ++s) {
      for (int t = 0; t <= 2 * s; ++t) {
        const Exact own = exact_node(n, cyclic_offset(n, 2 * s + 1, t));
        Exact want = 1;
        for (int i = 0; i <= 2 * s; ++i) {
          const Exact other = exact_node(n, cyclic_offset(n, 2 * s + 1, i));
          if (i != t) want *= other / (other - own);
        }
        CHECK_LE(distance(cyclic_weight(n, s, t), want), 1e-15, "n = ", n, ", s = ", s, ", t = ", t);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------- shorter messages

TEST(moments_of_blocks_stand_beside_the_checks) {
  for (int s = 0; s < 5; ++s) {
    for (int k = 1; k < 12; ++k) {
      std::vector<int> moments;
      for (int m = 1; m <= 2 * s; ++m) moments.push_back(m);
      for (int b = 0; b < k; ++b) moments.push_back(answer_moment(s, k, b));
      std::sort(moments.begin(), moments.end());
      for (int i = 0; i < 2 * s + k; ++i)
        CHECK_EQ(moments[i], moments[0] + i, "s = ", s, ", k = ", k);  // r consecutive ones
      CHECK_EQ(answer_moment(s, k, 0), 0, "s = ", s, ", k = ", k);
      CHECK_EQ(-moments[0], (k - 1) / 2, "s = ", s, ", k = ", k);
    }
  }
}

TEST(lengths_of_messages) {
  CHECK_EQ(message_length(0, 4), int64_t{0});
  for (int k = 1; k < 9; ++k) {
    for (int64_t d = 1; d < 60; ++d) {
      const int64_t length = message_length(d, k);
      CHECK_EQ(length % 2 == 0 && length * k >= d && (length - 2) * k < d, true, "d = ", d, ", k = ", k);
    }
  }
}

// sum_t w_tb x_{o_t}^m is 1 for block b's moment and 0 for all others, far below double's rounding.
TEST(weights_of_blocks_meet_their_conditions_to_30_digits) {
  const int codes[][3] = {{3, 1, 1}, {7, 1, 3}, {9, 2, 4}, {15, 3, 4}, {45, 5, 4}, {64, 5, 8}, {24, 0, 24}};
  for (const auto& [n, s, k] : codes) {
    const int r = 2 * s + k, lowest = 1 - (k + 1) / 2;
    const std::vector<EncodingWeight> weights = answer_weights(n, s, k);
    for (int b = 0; b < k; ++b) {
      for (int m = lowest; m < lowest + r; ++m) {
        EncodingWeight sum{{m == answer_moment(s, k, b) ? -1.0 : 0.0, 0}, {0, 0}};
        for (int t = 0; t < r; ++t)
          sum = sum + weights[t * k + b] * encoding_node(n, ((m * cyclic_offset(n, r, t)) % n + n) % n);
        CHECK_LE(std::abs(sum.re.hi) + std::abs(sum.im.hi), 1e-29, "n = ", n, ", s = ", s, ", k = ", k, ", m = ", m);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------- positions

TEST(positions_invert_the_assignment) {
  for (int n = 1; n <= 30; ++n) {
    for (int s = 0; 2 * s + 1 <= n; ++s) {
      for (int part = 0; part < n; ++part) {
        std::vector<int> position(n, -1);
        for (int t = 0; t <= 2 * s; ++t) position[(part + cyclic_offset(n, 2 * s + 1, t)) % n] = t;
        for (int worker = 0; worker < n; ++worker)
          CHECK_EQ(cyclic_position(n, 2 * s + 1, worker, part), position[worker], "n = ", n, ", s = ", s, ", worker ",
                   worker, ", part ", part);
      }
    }
  }
}

int main() { return check::run(); }

#include <cstring>
#include <memory>
#include <random>
#include <vector>

#include "core/locator.h"
#include "tests/check.h"

using namespace draco;

// ---------------------------------------------------------------------------------------------- scratch

TEST(an_arena_counts_what_it_hands_out) {
  const auto take = [](Arena& arena) {
    arena.take<uint8_t>(3);
    const int64_t mark = arena.used();
    arena.take<Complex>(5);
    arena.rewind(mark);
    return arena.take<double>(2);
  };
  Arena count;
  CHECK_EQ(take(count) == nullptr, true);
  CHECK_EQ(count.needed(), int64_t{16 + 5 * 16});
  CHECK_EQ(count.used(), int64_t{16 + 16});
  std::vector<unsigned char> memory(count.needed());
  Arena arena(memory.data(), memory.size());
  CHECK_EQ(reinterpret_cast<unsigned char*>(take(arena)) - memory.data(), 16);
  CHECK_EQ(arena.needed(), count.needed());
}

// Assertions compare every array with the end of the memory; the last of each step, with the sanitizer, by touching it.
TEST(arrays_of_a_search_fit_what_was_counted) {
  for (int n = 1; n <= 80; ++n) {
    for (int s = 0; 2 * s + 1 <= n; ++s) {
      const int64_t bytes = Locator<Alone>::scratch_bytes(n, s);
      const std::unique_ptr<unsigned char[]> memory(new unsigned char[bytes]);
      Arena arena(memory.get(), bytes);
      const LocatorArrays arrays(arena, n, s);
      CHECK_EQ(arena.needed(), bytes, "n = ", n, ", s = ", s);
      memset(arrays.naming.excess, 0, n * sizeof(double));
      memset(arrays.rival.ratio, 0, n * sizeof(Complex));
      memset(arrays.subsets.best, 0, n * sizeof(int));
      memset(arrays.subspace.nearest, 0, n * sizeof(int));
      CHECK_LE(Parity<Alone>::scratch_bytes(n, s), bytes, "n = ", n, ", s = ", s);
    }
  }
}

// ---------------------------------------------------------------------------------------------- projections

// Arrays of their own allocations, so that the sanitizer sees what is read or written beyond one of them.
TEST(products_with_all_projections_stay_within_their_arrays) {
  std::mt19937_64 random(1);
  std::uniform_int_distribution<int> integer(-1000, 1000);  // sums of whose products do not round
  for (const int s : {1, 2, 3, 5}) {
    const int n = 2 * s + 3, active = most_active(s), stride = active_stride(s), rows = 2 * s;
    CHECK_EQ(stride % kTogether, 0, "s = ", s);
    std::vector<unsigned char> memory(Locator<Alone>::scratch_bytes(n, s));
    Arena arena(memory.data(), memory.size());
    LocatorArrays arrays(arena, n, s);
    std::vector<Complex> projections(n * stride, Complex{0, 0}), product(rows * stride), weight(rows * n);
    arrays.search.active_p = projections.data();
    LocatorInput input{};
    input.workers = n;
    input.adversaries = s;
    SearchState<Alone> search(Alone(), input, arrays.parity, arrays.search);
    search.active_count = active;
    for (int j = 0; j < n; ++j)
      for (int a = 0; a < active; ++a) projections[j * stride + a] = {double(integer(random)), double(integer(random))};
    for (Complex& w : weight) w = {double(integer(random)), double(integer(random))};
    search.multiply_active(rows, [&](int m, int j) { return weight[m * n + j]; }, product.data());
    for (int m = 0; m < rows; ++m) {
      for (int a = 0; a < active; ++a) {
        Complex want{0, 0};
        for (int j = 0; j < n; ++j) want = want + weight[m * n + j] * search.projection(j, a);
        CHECK_EQ(product[m * stride + a].re, want.re, "s = ", s, ", row ", m, ", column ", a);
        CHECK_EQ(product[m * stride + a].im, want.im, "s = ", s, ", row ", m, ", column ", a);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------- checks

TEST(checks_vanish_on_their_set_and_on_honest_messages) {
  for (const auto& [n, s] : {std::pair{7, 2}, std::pair{12, 3}, std::pair{31, 7}}) {
    std::vector<unsigned char> memory(Parity<Alone>::scratch_bytes(n, s));
    Arena arena(memory.data(), memory.size());
    Parity<Alone> parity(Alone(), n, s, ParityArrays(arena, n, s));
    std::vector<int> members{0, 1, n - 1};
    Work work;
    const Checks checks = parity.checks_without({members.data(), 3}, work);
    CHECK_EQ(checks.count, 2 * s - 3, "n = ", n);
    CHECK_EQ(checks.vanishing, 3, "n = ", n);
    CHECK_EQ(work.spent > 0, true, "n = ", n);
    for (int m = 0; m < checks.count; ++m) {
      const Complex* row = checks.rows + m * n;
      double size = 0;
      for (int j = 0; j < n; ++j) size += norm2(row[j]);
      CHECK_LE(std::abs(size - 1), 1e-13, "n = ", n, ", check ", m);
      for (const int j : members) CHECK_EQ(norm2(row[j]), 0.0, "n = ", n, ", check ", m, ", worker ", j);
      for (int power = 0; power < n - 2 * s; ++power) {  // what honest workers send: polynomials in their nodes
        Complex sum{0, 0};
        for (int j = 0; j < n; ++j) sum = sum + row[j] * parity.node[power * j % n];
        CHECK_LE(std::sqrt(norm2(sum)), 1e-12, "n = ", n, ", check ", m, ", power ", power);
      }
    }
  }
}

int main() { return check::run(); }

#include <cmath>
#include <limits>

#include "core/stats.h"
#include "tests/check.h"

using namespace draco;

template <typename T>
static Stats of(typename Element<T>::Bits bits) {
  Tally<T> tally;
  tally.take(bits);
  return tally.stats();
}

static void check_stats(const Stats& got, double squares, double largest, double nonfinite, double zeros,
                        const char* what, uint64_t bits) {
  CHECK_EQ(got.squares, squares, "squares, ", what, " ", bits);
  CHECK_EQ(got.largest, largest, "largest, ", what, " ", bits);
  CHECK_EQ(got.nonfinite, nonfinite, "nonfinite, ", what, " ", bits);
  CHECK_EQ(got.zeros, zeros, "zeros, ", what, " ", bits);
}

template <typename T>
static void check_value(typename Element<T>::Bits bits, const char* what) {
  const double value = value_of<T>(bits);
  if (std::isfinite(value)) {
    check_stats(of<T>(bits), value * value, std::abs(value), 0, value == 0, what, bits);
  } else {
    check_stats(of<T>(bits), 0, 0, 1, 0, what, bits);
  }
}

TEST(every_16_bit_value) {
  for (int i = 0; i < 1 << 16; ++i) {
    check_value<Half>(static_cast<uint16_t>(i), "float16");
    check_value<BFloat16>(static_cast<uint16_t>(i), "bfloat16");
  }
}

TEST(special_values) {
  for (const uint32_t bits : {0u, 1u, 0x007fffffu, 0x00800000u, 0x3f800000u, 0x7f7fffffu, 0x7f800000u, 0x7f800001u,
                              0x7fc00000u, 0x7fffffffu}) {
    check_value<float>(bits, "float32");
    check_value<float>(bits | 0x80000000u, "float32");
  }
  for (const uint64_t bits : {uint64_t{0}, uint64_t{1}, uint64_t{0x000fffffffffffff}, uint64_t{0x3ff0000000000000},
                              uint64_t{0x7fefffffffffffff}, uint64_t{0x7ff0000000000000}, uint64_t{0x7ff0000000000001},
                              uint64_t{0x7ff8000000000000}, uint64_t{0x7fffffffffffffff}}) {
    check_value<double>(bits, "float64");
    check_value<double>(bits | uint64_t{1} << 63, "float64");
  }
}

TEST(parts_are_merged) {
  Tally<float> first, second;
  for (const float x : {3.0f, -0.0f, -4.0f}) first.take(bit_cast<uint32_t>(x));
  for (const float x : {0.0f, 2.0f, HUGE_VALF, -std::numeric_limits<float>::quiet_NaN()})
    second.take(bit_cast<uint32_t>(x));
  Stats all = {};
  merge(all, first.stats());
  check_stats(all, 25, 4, 0, 1, "first", 0);
  merge(all, second.stats());
  check_stats(all, 29, 4, 2, 2, "both", 0);
}

int main() { return check::run(); }

#include <cmath>
#include <limits>
#include <random>

#include "core/half.h"
#include "tests/check.h"

using namespace draco;

// What the conversions are compared with: the formats as IEEE 754 defines them, in double, which holds all their values
// and midpoints exactly.
template <typename T>
struct Format;
template <>
struct Format<Half> {
  static constexpr const char* kName = "float16";
  static constexpr int kMantissa = 10, kBias = 15;
  static Half from(float x) { return to_half(x); }
};
template <>
struct Format<BFloat16> {
  static constexpr const char* kName = "bfloat16";
  static constexpr int kMantissa = 7, kBias = 127;
  static BFloat16 from(float x) { return to_bfloat16(x); }
};

template <typename T>
constexpr uint16_t kInf = 0x7fff & ~((1 << Format<T>::kMantissa) - 1);

// Of finite patterns; that of inf gives the power of two beyond the largest number, to which rounding up leads.
template <typename T>
static double decode(uint16_t bits) {
  using F = Format<T>;
  const int mantissa = bits & ((1 << F::kMantissa) - 1), exponent = (bits & 0x7fff) >> F::kMantissa;
  const int whole = exponent == 0 ? mantissa : mantissa | 1 << F::kMantissa;
  return std::ldexp(bits & 0x8000 ? -whole : whole, (exponent == 0 ? 1 : exponent) - F::kBias - F::kMantissa);
}

template <typename T>
static bool is_nan(uint16_t bits) {
  return (bits & 0x7fff) > kInf<T>;
}

template <typename T>
static void check_to_float() {
  for (int i = 0; i < 1 << 16; ++i) {
    const uint16_t bits = static_cast<uint16_t>(i);
    const float got = to_float(T{bits});
    CHECK_EQ(std::signbit(got), (bits & 0x8000) != 0, Format<T>::kName, " ", bits);
    CHECK_EQ(std::isnan(got), is_nan<T>(bits), Format<T>::kName, " ", bits);
    if (is_nan<T>(bits)) continue;
    const bool infinite = (bits & 0x7fff) == kInf<T>;
    const double want = infinite ? HUGE_VAL : std::abs(decode<T>(bits));
    CHECK_EQ(double(std::abs(got)), want, Format<T>::kName, " ", bits);
  }
}
TEST(every_pattern_to_float) {
  check_to_float<Half>();
  check_to_float<BFloat16>();
}

template <typename T>
static void check_round_trip() {
  for (int i = 0; i < 1 << 16; ++i) {
    const uint16_t bits = static_cast<uint16_t>(i), back = Format<T>::from(to_float(T{bits})).bits;
    if (is_nan<T>(bits)) {
      CHECK_EQ(is_nan<T>(back) && (back & 0x8000) == (bits & 0x8000), true, Format<T>::kName, " ", bits, " to ", back);
    } else {
      CHECK_EQ(back, bits, Format<T>::kName);
    }
  }
}
TEST(every_pattern_survives_the_round_trip) {
  check_round_trip<Half>();
  check_round_trip<BFloat16>();
}

// Of every two neighbours, the largest number and the overflow among them: what lies between goes to the nearer, and
// the middle to the one whose last bit is 0. Subnormals and underflow to 0 are the low end of the same loop.
template <typename T>
static void check_rounding() {
  for (int i = 0; i < kInf<T>; ++i) {
    const uint16_t low = static_cast<uint16_t>(i), high = static_cast<uint16_t>(i + 1);
    const double exact_middle = (decode<T>(low) + decode<T>(high)) / 2;
    const float middle = static_cast<float>(exact_middle);
    CHECK_EQ(double(middle), exact_middle, "the test's own arithmetic");
    const struct {
      float x;
      uint16_t want;
    } cases[] = {
        {std::nextafter(to_float(T{low}), HUGE_VALF), low},
        {std::nextafter(middle, 0.0f), low},
        {middle, low % 2 ? high : low},
        {std::nextafter(middle, HUGE_VALF), high},
        {std::nextafter(static_cast<float>(decode<T>(high)), 0.0f), high},
    };
    for (const auto& c : cases) {
      CHECK_EQ(Format<T>::from(c.x).bits, c.want, Format<T>::kName, " of ", c.x);
      CHECK_EQ(Format<T>::from(-c.x).bits, static_cast<uint16_t>(c.want | 0x8000), Format<T>::kName, " of ", -c.x);
    }
  }
}
TEST(to_nearest_ties_to_even) {
  check_rounding<Half>();
  check_rounding<BFloat16>();
}

TEST(special_floats) {
  const float largest = std::numeric_limits<float>::max(), least = std::numeric_limits<float>::denorm_min();
  const struct {
    float x;
    uint16_t half, bfloat16;
  } cases[] = {
      {0.0f, 0x0000, 0x0000},
      {1.0f, 0x3c00, 0x3f80},
      {65504.0f, 0x7bff, 0x4780},
      {65519.996f, 0x7bff, 0x4780},
      {65520.0f, 0x7c00, 0x4780},
      {1e30f, 0x7c00, 0x714a},
      {largest, 0x7c00, 0x7f80},
      {HUGE_VALF, 0x7c00, 0x7f80},
      {0x1p-14f, 0x0400, 0x3880},
      {0x1.ff8p-15f, 0x03ff, 0x3880},
      {0x1p-24f, 0x0001, 0x3380},
      {0x1p-25f, 0x0000, 0x3300},
      {0x1.000002p-25f, 0x0001, 0x3300},
      {0x1p-133f, 0x0000, 0x0001},
      {0x1p-134f, 0x0000, 0x0000},
      {least, 0x0000, 0x0000},
  };
  for (const auto& c : cases) {
    CHECK_EQ(to_half(c.x).bits, c.half, "float16 of ", c.x);
    CHECK_EQ(to_bfloat16(c.x).bits, c.bfloat16, "bfloat16 of ", c.x);
    CHECK_EQ(to_half(-c.x).bits, static_cast<uint16_t>(c.half | 0x8000), "float16 of ", -c.x);
    CHECK_EQ(to_bfloat16(-c.x).bits, static_cast<uint16_t>(c.bfloat16 | 0x8000), "bfloat16 of ", -c.x);
  }
  // A NaN with its payload where the shorter mantissa cuts it off must not become inf, nor one of all ones wrap to -0.
  for (uint32_t bits : {0x7f800001u, 0x7f801fffu, 0x7f80ffffu, 0x7fa00000u, 0x7fc00000u, 0x7fffffffu, 0x7fff8000u}) {
    for (uint32_t sign : {0u, 0x80000000u}) {
      const uint16_t half = to_half(bit_cast<float>(sign | bits)).bits;
      const uint16_t bfloat16 = to_bfloat16(bit_cast<float>(sign | bits)).bits;
      CHECK_EQ(is_nan<Half>(half) && uint32_t(half & 0x8000) << 16 == sign, true, sign | bits, " to ", half);
      CHECK_EQ(is_nan<BFloat16>(bfloat16) && uint32_t(bfloat16 & 0x8000) << 16 == sign, true, sign | bits, " to ",
               bfloat16);
    }
  }
}

#if defined(__FLT16_MAX__)
TEST(half_is_the_compilers_own) {
  std::mt19937 random(6);
  for (int trial = 0; trial < 1000000; ++trial) {
    // Every second with an exponent that float16 has.
    uint32_t bits = static_cast<uint32_t>(random());
    if (trial % 2) bits = (bits & 0x807fffffu) | (100 + (bits >> 23 & 0xff) % 46) << 23;
    const float x = bit_cast<float>(bits);
    if (std::isnan(x)) continue;
    CHECK_EQ(to_half(x).bits, bit_cast<uint16_t>(static_cast<_Float16>(x)), "float ", bits);
  }
  for (int i = 0; i < 1 << 16; ++i) {
    const uint16_t bits = static_cast<uint16_t>(i);
    if (is_nan<Half>(bits)) continue;
    const float want = static_cast<float>(bit_cast<_Float16>(bits));
    CHECK_EQ(bit_cast<uint32_t>(to_float(Half{bits})), bit_cast<uint32_t>(want), "float16 ", bits);
  }
}
#endif

TEST(elements_are_their_bits) {
  for (int i = 0; i < 1 << 16; ++i) {
    const uint16_t bits = static_cast<uint16_t>(i);
    if (!is_nan<Half>(bits)) CHECK_EQ(value_of<Half>(bits), to_float(Half{bits}), "float16 ", bits);
    if (!is_nan<BFloat16>(bits)) CHECK_EQ(value_of<BFloat16>(bits), to_float(BFloat16{bits}), "bfloat16 ", bits);
    CHECK_EQ(bits_of<Half>(value_of<Half>(bits)), to_half(to_float(Half{bits})).bits);
    CHECK_EQ(bits_of<BFloat16>(value_of<BFloat16>(bits)), to_bfloat16(to_float(BFloat16{bits})).bits);
  }
  CHECK_EQ(bits_of<Half>(1.0f), uint16_t{0x3c00});
  CHECK_EQ(bits_of<BFloat16>(1.0f), uint16_t{0x3f80});
  CHECK_EQ(bits_of<float>(-2.5f), 0xc0200000u);
  CHECK_EQ(bits_of<double>(-2.5), uint64_t{0xc004000000000000});
  // NaNs keep their payload in the types that are not converted.
  for (uint32_t bits : {0u, 0x80000000u, 1u, 0x7f800000u, 0x7f800001u, 0xffc12345u}) {
    CHECK_EQ(bits_of<float>(value_of<float>(bits)), bits);
    const uint64_t wide = uint64_t{bits} << 32 | (bits & 1);
    CHECK_EQ(bits_of<double>(value_of<double>(wide)), wide);
  }
}

int main() { return check::run(); }

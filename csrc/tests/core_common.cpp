#include <complex>
#include <random>

#include "core/common.h"
#include "tests/check.h"

using namespace draco;

static void check_same(Complex got, std::complex<double> want, const char* what, Complex a, Complex b) {
  CHECK_EQ(got.re, want.real(), what, " of ", a.re, "+", a.im, "i and ", b.re, "+", b.im, "i: real part");
  CHECK_EQ(got.im, want.imag(), what, " of ", a.re, "+", a.im, "i and ", b.re, "+", b.im, "i: imaginary part");
}

// On integers below 2^20 nothing rounds, so that the order of operations and FMA make no difference.
TEST(complex_arithmetic_is_that_of_std_complex) {
  std::mt19937_64 random(1);
  std::uniform_int_distribution<int> integer(-(1 << 20), 1 << 20);
  for (int trial = 0; trial < 1000; ++trial) {
    const Complex a{double(integer(random)), double(integer(random))};
    const Complex b{double(integer(random)), double(integer(random))};
    const std::complex<double> p(a.re, a.im), q(b.re, b.im);
    check_same(a + b, p + q, "sum", a, b);
    check_same(a - b, p - q, "difference", a, b);
    check_same(a * b, p * q, "product", a, b);
    check_same(a.re * b, a.re * q, "multiple", a, b);
    check_same(conj(a), std::conj(p), "conjugate", a, b);
    CHECK_EQ(norm2(a), std::norm(p), "a = ", a.re, "+", a.im, "i");
  }
}

TEST(bit_cast_keeps_bits) {
  CHECK_EQ(bit_cast<uint32_t>(1.0f), 0x3f800000u);
  CHECK_EQ(bit_cast<uint64_t>(-2.0), uint64_t{0xc000000000000000});
  CHECK_EQ(bit_cast<float>(0x40490fdbu), 3.14159274f);
  CHECK_EQ(bit_cast<int32_t>(0xffffffffu), -1);
  CHECK_EQ(bit_cast<int64_t>(bit_cast<double>(int64_t{-1})), int64_t{-1});
  // -0, the smallest subnormal, infinity and NaNs: quiet, signalling, negative, with a payload.
  for (uint32_t bits : {0x80000000u, 1u, 0x7f800000u, 0x7fc00000u, 0x7f800001u, 0xffc12345u})
    CHECK_EQ(bit_cast<uint32_t>(bit_cast<float>(bits)), bits);
  std::mt19937_64 random(2);
  for (int trial = 0; trial < 1000; ++trial) {
    const uint64_t bits = random();
    CHECK_EQ(bit_cast<uint64_t>(bit_cast<double>(bits)), bits);
  }
}

int main() { return check::run(); }

// Numbers as unevaluated sums of two doubles, hi + lo with |lo| <= ulp(hi) / 2: about 106 bits (Dekker, 1971; Shewchuk,
// 1997). Encoding adds float64 gradients up with them.
//
// Compilers fuse a * b + c into one operation where a processor has it, also where b's product must be rounded by
// itself: every product here goes through product(), which they cannot look into.
#pragma once

#include <cmath>

#include "core/common.h"

namespace draco {

struct DoubleDouble {
  double hi, lo;
};

// A weight of the encoding, a complex number. Rounded to double, it would be wrong by as much as what cancelling terms
// leave.
struct EncodingWeight {
  DoubleDouble re, im;
};

namespace {

DRACO_HD double product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  double rounded = a * b;
#if defined(__SSE2__)
  asm("" : "+x"(rounded));
#elif defined(__aarch64__)
  asm("" : "+w"(rounded));
#else
  asm("" : "+m"(rounded));
#endif
  return rounded;
#endif
}

// a + b and a * b without rounding.
DRACO_HD DoubleDouble two_sum(double a, double b) {
  const double sum = a + b, other = sum - a;
  return {sum, (a - (sum - other)) + (b - other)};
}
DRACO_HD DoubleDouble two_product(double a, double b) {
  const double rounded = product(a, b);
  return {rounded, fma(a, b, -rounded)};
}

// The sum of hi and a lo that has grown, or hi where lo is of no meaning as something has overflowed.
DRACO_HD DoubleDouble normalised(double hi, double lo) {
  const DoubleDouble sum = two_sum(hi, lo);
  return sum.lo - sum.lo == 0 && sum.hi - sum.hi == 0 ? sum : DoubleDouble{hi, 0};
}

DRACO_HD DoubleDouble operator+(DoubleDouble a, DoubleDouble b) {
  const DoubleDouble high = two_sum(a.hi, b.hi), low = two_sum(a.lo, b.lo);
  const DoubleDouble sum = two_sum(high.hi, high.lo + low.hi);
  return two_sum(sum.hi, sum.lo + low.lo);
}
DRACO_HD DoubleDouble operator-(DoubleDouble a) { return {-a.hi, -a.lo}; }
DRACO_HD DoubleDouble operator*(DoubleDouble a, DoubleDouble b) {
  const DoubleDouble high = two_product(a.hi, b.hi);
  return two_sum(high.hi, high.lo + (product(a.hi, b.lo) + product(a.lo, b.hi)));
}
DRACO_HD DoubleDouble operator/(DoubleDouble a, DoubleDouble b) {
  const double first = a.hi / b.hi;
  const DoubleDouble rest = a + -(b * DoubleDouble{first, 0});
  const double second = rest.hi / b.hi;
  const DoubleDouble last = rest + -(b * DoubleDouble{second, 0});
  return two_sum(first, second) + DoubleDouble{last.hi / b.hi, 0};
}

DRACO_HD EncodingWeight operator+(const EncodingWeight& a, const EncodingWeight& b) {
  return {a.re + b.re, a.im + b.im};
}
DRACO_HD EncodingWeight operator-(const EncodingWeight& a) { return {-a.re, -a.im}; }
DRACO_HD EncodingWeight operator-(const EncodingWeight& a, const EncodingWeight& b) { return a + -b; }
DRACO_HD EncodingWeight operator*(const EncodingWeight& a, const EncodingWeight& b) {
  return {a.re * b.re + -(a.im * b.im), a.re * b.im + a.im * b.re};
}
DRACO_HD EncodingWeight operator/(const EncodingWeight& a, const EncodingWeight& b) {
  const DoubleDouble square = b.re * b.re + b.im * b.im;
  const EncodingWeight product = a * EncodingWeight{b.re, -b.im};
  return {product.re / square, product.im / square};
}

// sin(pi p / q), by its Taylor series in the first eighth of a turn. Exact on the axes.
[[maybe_unused]] static inline DoubleDouble sine_of_pi(long long p, long long q) {
  p %= 2 * q;
  if (p < 0) p += 2 * q;
  const bool negative = p > q;
  if (negative) p -= q;
  if (2 * p > q) p = q - p;
  const bool cosine = 4 * p > q;
  if (cosine) {  // of what is left to a quarter of a turn
    p = q - 2 * p;
    q *= 2;
  }
  const DoubleDouble pi{3.141592653589793, 1.2246467991473532e-16};
  const DoubleDouble x = pi * DoubleDouble{static_cast<double>(p), 0} / DoubleDouble{static_cast<double>(q), 0};
  const DoubleDouble square = x * x, one{1, 0};
  DoubleDouble sum = one;
  for (int k = cosine ? 28 : 29; k > 1; k -= 2)
    sum = one + -(square / DoubleDouble{static_cast<double>(k) * (k - 1), 0} * sum);
  if (!cosine) sum = x * sum;
  return negative ? -sum : sum;
}

}  // namespace
}  // namespace draco

// The cyclic code's tables (design: evenly spread supports; DRACO, arXiv 1803.09877, section 4, with better weights).
//
// Nodes x_j = exp(2 pi i j / n). Part k is computed by the workers (k + offset(t)) mod n, t = 0 .. 2s, and enters
// worker (k + offset(t))'s message with the Lagrange weight weight(t), which depends on t alone: the code is circulant.
#pragma once

#include <cmath>

#include "core/double_double.h"

namespace draco {
namespace {

constexpr double kPi = 3.14159265358979323846;

// round(t n / r), where r workers compute each part: 2s+1 of them, or more (core/answers.h).
DRACO_HD int cyclic_offset(int workers, int redundancy, int t) {
  const long long r = redundancy;
  return static_cast<int>((2LL * t * workers + r) / (2 * r));
}

// Length of the messages for a gradient of `length` elements, which may be cut into k blocks (core/answers.h).
DRACO_HD int64_t message_length(int64_t length, int compression) {
  return (length + 2 * compression - 1) / (2 * compression) * 2;
}

// The moment of the messages that is a block of the sum of the gradients: 0, -1, -2, ... below the checks, then 2s+1,
// 2s+2,
// ... above them.
DRACO_HD int answer_moment(int adversaries, int compression, int answer) {
  const int below = (compression + 1) / 2;
  return answer < below ? -answer : 2 * adversaries + 1 + answer - below;
}

// exp(2 pi i power / n), reduced in integers first so that large powers lose nothing.
DRACO_HD Complex cyclic_node(int workers, long long power) {
  long long m = power % workers;
  if (m < 0) m += workers;
  if (4 * m % workers == 0) {  // exact on the axes
    const int quarter = static_cast<int>(4 * m / workers);
    return {quarter == 0 ? 1.0 : quarter == 2 ? -1.0 : 0.0, quarter == 1 ? 1.0 : quarter == 3 ? -1.0 : 0.0};
  }
  const double angle = 2.0 * kPi * static_cast<double>(m) / workers;
  return {cos(angle), sin(angle)};
}

// True where all weights are 1 / (2s+1).
DRACO_HD bool has_real_weights(int64_t workers, int64_t adversaries) { return workers % (2 * adversaries + 1) == 0; }

// prod_{i != t} x_i / (x_i - x_t) over the support. With half the angle from t to i, a_i = pi (o_i - o_t) / n, each
// factor is -i exp(i a_i) / (2 sin a_i): the phases add up in integers, and only the sines are rounded, which
// sine(steps) gives for steps of pi / n. On the host alone.
template <typename Sine>
static inline EncodingWeight cyclic_weight(int workers, int adversaries, int t, Sine&& sine) {
  const int r = 2 * adversaries + 1;
  const DoubleDouble one{1, 0}, none{0, 0};
  if (has_real_weights(workers, adversaries)) return {one / DoubleDouble{static_cast<double>(r), 0}, none};
  const int own = cyclic_offset(workers, r, t);
  DoubleDouble size{adversaries % 2 ? -1.0 : 1.0, 0};  // (-i)^(2s)
  int exponent = 0;                                    // of size, which hundreds of factors could take out of range
  long long steps = 0;
  for (int i = 0; i < r; ++i) {
    if (i == t) continue;
    const int step = cyclic_offset(workers, r, i) - own;
    const DoubleDouble factor = sine(step < 0 ? -step : step);
    size = size * DoubleDouble{step < 0 ? -2 * factor.hi : 2 * factor.hi, step < 0 ? -2 * factor.lo : 2 * factor.lo};
    int power = 0;
    frexp(size.hi, &power);
    size = {ldexp(size.hi, -power), ldexp(size.lo, -power)};
    exponent += power;
    steps += step;
  }
  size = one / size;
  size = {ldexp(size.hi, -exponent), ldexp(size.lo, -exponent)};
  return {size * sine_of_pi(2 * steps + workers, 2LL * workers), size * sine_of_pi(steps, workers)};
}

// As doubles.
[[maybe_unused]] static inline Complex cyclic_weight(int workers, int adversaries, int t) {
  const auto sine = [&](int step) { return sine_of_pi(step, workers); };
  const EncodingWeight weight = cyclic_weight(workers, adversaries, t, sine);
  return {weight.re.hi, weight.im.hi};
}

// Below this part of the largest of the terms it was made of, a sum is what rounding left of terms that cancel: 0. Sums
// are made in twice T's precision; there is room for a few dozen parts. So are all sums of kCancelBlock columns which
// are below this part of the largest term of any: one element's last term may be much smaller than those that
// cancelled.
constexpr int kCancelBlock = 16;
template <typename T>
DRACO_HD double cancelling(const EncodingWeight* weights, int count) {
  double size = 0;
  for (int j = 0; j < count; ++j) size += fabs(weights[j].re.hi) + fabs(weights[j].im.hi);
  return (sizeof(T) == 4 ? 0x1p-44 : 0x1p-95) * (size > 1 ? size : 1);
}

// The t with (part + offset(t)) mod n == worker, or -1 where the worker does not compute the part.
DRACO_HD int cyclic_position(int workers, int redundancy, int worker, int part) {
  const int distance = ((worker - part) % workers + workers) % workers;
  for (int t = 0; t < redundancy; ++t) {
    if (cyclic_offset(workers, redundancy, t) == distance) return t;
  }
  return -1;
}

}  // namespace
}  // namespace draco

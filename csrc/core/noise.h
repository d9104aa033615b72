// The noise model: how far honest projections may miss the checks by rounding alone.
#pragma once

#include <cmath>

#include "core/random.h"
#include "core/team.h"

namespace draco {

struct NoiseModel {
  double relative;  // standard deviation of a message's rounding, relative to its norm
  double floor;     // and at least this per element, in the scale of the projections
};

namespace {

// Below these an element counts as zero: the products of denormal numbers with the projections' weights round by as
// much.
constexpr double kLeastNoise64 = 1e-60, kLeastNoise32 = 2e-43;
// A finite message so many times as large as the noise is erased like one that is not finite: squares of what the
// locator computes with must be finite, too. Honest messages are far from it, as each part is in 2s+1 of them.
constexpr double kBeyondDoubt = 0x1p200;
constexpr double kMostNoise = 0x1p1000;  // of a tolerance without bounds

// Root mean square of an honest check in units of rounding; python_tests/kernels/test_cyclic.py::test_noise_model
// measures it. float32: a message is rounded once, and a projection sums up to 16 terms before going to double:
// about 1.2. float64: dominated by the checks' own n terms: 1 to 8 for n = 3 .. 255. The model stays above both.
DRACO_HD NoiseModel noise_model(bool is_double, int workers, double atol, double rtol) {
  const double rounding = is_double ? 1.1102230246251565e-16 * sqrt(36.0 + workers) : 5.9604644775390625e-8 * 2;
  const double least = is_double ? kLeastNoise64 : kLeastNoise32;
  const double scale = kWeightPower * (is_double ? kPhiScale<double> : static_cast<double>(kPhiScale<float>));
  return {hypotenuse(rounding, rtol), scale * hypotenuse(least, atol)};
}

// The power of two that makes this noise about 1.
DRACO_HD double noise_scale(double noise) {
  int power = 0;
  frexp(noise, &power);
  return ldexp(1.0, -power);
}

// The noise of one tile. The reference norm is the (most + 1)-th largest of the present workers', where `most` is how
// many of them may be bad: they can neither raise the floor with huge messages nor lower it with small ones, since
// every part is in 2s+1 messages. Lanes of a warp share the workers; all get the result.
template <typename Team>
DRACO_TEAM_CALL double tile_noise(const Team& team, const NoiseModel& model, const double* norm, int64_t stride,
                                  int workers, int most, const uint8_t* erased, int64_t elements) {
  double reference = HUGE_VAL;
  double seen = 0;  // values at least as large as the reference
  while (seen <= most) {
    double next = -1;
    for (int j = team.lane; j < workers; j += team.lanes) {
      const double value = norm[j * stride];
      if (!erased[j] && value < reference && value > next) next = value;
    }
    next = team.largest(next);
    if (next < 0) {
      reference = 0;
      break;
    }
    int equal = 0;
    for (int j = team.lane; j < workers; j += team.lanes) equal += !erased[j] && norm[j * stride] == next;
    reference = next;
    seen += team.sum(static_cast<double>(equal));
  }
  const double noise = hypotenuse(model.relative * reference, model.floor * sqrt(static_cast<double>(elements)));
  return noise < kMostNoise ? noise : kMostNoise;
}

}  // namespace
}  // namespace draco

// How far honest projections may miss the checks by rounding alone.
#pragma once

#include <cmath>

#include "core/locator.h"
#include "core/random.h"

namespace draco {

struct NoiseModel {
  double relative;  // standard deviation of a message's rounding, relative to its norm
  double least;     // and at least this per element
  double absolute;  // tolerance per element, from the caller
};

namespace {

// Beyond these a float64 message counts as overflowed, and below it as zero: squares of ratios must stay finite.
constexpr double kLargestEnergy = 1e160, kLeastNoise64 = 1e-60, kLeastNoise32 = 1e-45;

// Root mean square of an honest check in units of rounding; python_tests/test_cyclic.py::test_noise_model measures it.
// float32: a message is a sum of r rounded terms, and a projection sums up to 16 terms before going to double: 1.0
// to 1.8 for r = 1 .. 21. float64: dominated by the checks' own n terms: 1 to 8 for n = 3 .. 255. The model stays above
// both.
DRACO_HD NoiseModel noise_model(bool is_double, int workers, int adversaries, double atol, double rtol) {
  const double rounding = is_double ? 1.1102230246251565e-16 * sqrt(36.0 + workers)
                                    : 5.9604644775390625e-8 * sqrt(4.0 + 0.25 * (2 * adversaries + 1));
  return {sqrt(rounding * rounding + rtol * rtol), is_double ? kLeastNoise64 : kLeastNoise32, atol};
}

// The noise of one tile. The reference norm is the (most + 1)-th largest of the present workers', where `most` is how
// many of them may be bad: they can neither raise the floor with huge messages nor lower it with small ones, since
// every part is in 2s+1 messages. Lanes of a warp share the workers; all get the result.
template <typename Team>
DRACO_TEAM_CALL double tile_noise(const Team& team, const NoiseModel& model, const double* energy, int64_t stride,
                                  int workers, int most, const uint8_t* erased, int64_t elements) {
  double reference = HUGE_VAL;
  double seen = 0;  // values at least as large as the reference
  while (seen <= most) {
    double next = -1;
    for (int j = team.lane; j < workers; j += team.lanes) {
      const double value = energy[j * stride];
      if (!erased[j] && value < reference && value > next) next = value;
    }
    next = team.largest(next);
    if (next < 0) {
      reference = 0;
      break;
    }
    int equal = 0;
    for (int j = team.lane; j < workers; j += team.lanes) equal += !erased[j] && energy[j * stride] == next;
    reference = next;
    seen += team.sum(static_cast<double>(equal));
  }
  const double count = static_cast<double>(elements) * kWeightPower * kWeightPower;
  return sqrt(model.relative * model.relative * reference + model.absolute * model.absolute * count +
              model.least * model.least * count);
}

}  // namespace
}  // namespace draco

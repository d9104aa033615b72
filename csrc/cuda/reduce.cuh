// Reductions over the lanes of a warp. All lanes must take part.
#pragma once

#include "cuda/common.cuh"

namespace draco {
namespace {

// A number and where it was found.
struct Indexed {
  double value;
  int64_t index;
};

template <typename T>
DRACO_DEVICE T from_other_lane(T value, int distance) {
  return __shfl_xor_sync(kAllLanes, value, distance);
}
DRACO_DEVICE Complex from_other_lane(Complex value, int distance) {
  return {from_other_lane(value.re, distance), from_other_lane(value.im, distance)};
}
DRACO_DEVICE Indexed from_other_lane(Indexed value, int distance) {
  return {from_other_lane(value.value, distance), from_other_lane(value.index, distance)};
}

// Combines the values of a group of neighbouring lanes, a power of two of them; all of these get the result. A
// butterfly: both lanes of a pair combine the same two values, so that they end with the same bits where it makes no
// difference which of two values comes first.
template <typename T, typename Combine>
DRACO_DEVICE T reduce_lanes(T value, Combine&& combine, int lanes = kWarp) {
#pragma unroll
  for (int distance = lanes / 2; distance > 0; distance /= 2) value = combine(value, from_other_lane(value, distance));
  return value;
}

template <typename T>
DRACO_DEVICE T sum_of_lanes(T value, int lanes = kWarp) {
  return reduce_lanes(value, [](T own, T other) { return own + other; }, lanes);
}

template <typename T>
DRACO_DEVICE T largest_of_lanes(T value, int lanes = kWarp) {
  return reduce_lanes(value, [](T own, T other) { return other > own ? other : own; }, lanes);
}

}  // namespace
}  // namespace draco

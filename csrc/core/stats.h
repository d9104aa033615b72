// Statistics of a vector's values, tile by tile: what tells an unusual gradient from its neighbours.
#pragma once

#include "core/half.h"

namespace draco {

// Of the values of a tile, or of a part of it. A row of the result of digest_and_stats.
struct Stats {
  double squares;    // sum of the squares of the finite values
  double largest;    // absolute, of the finite values
  double nonfinite;  // how many values are infinite or NaN
  double zeros;      // how many are +0 or -0
};
static_assert(sizeof(Stats) == 4 * sizeof(double), "four columns of float64");

namespace {

// Adds those of the next part of a tile.
DRACO_HD void merge(Stats& all, const Stats& part) {
  all.squares += part.squares;
  all.largest = part.largest > all.largest ? part.largest : all.largest;
  all.nonfinite += part.nonfinite;
  all.zeros += part.zeros;
}

// The bits of a value without its sign, and those of infinity: numbers are below, NaN above.
template <typename T>
constexpr typename Element<T>::Bits kMagnitudeBits =
    static_cast<typename Element<T>::Bits>(static_cast<typename Element<T>::Bits>(~typename Element<T>::Bits{}) >> 1);
template <typename T>
constexpr int kMantissaBits = std::is_same_v<T, double>  ? 52
                              : std::is_same_v<T, float> ? 23
                              : std::is_same_v<T, Half>  ? 10
                                                         : 7;
template <typename T>
constexpr typename Element<T>::Bits kInfinityBits =
    static_cast<typename Element<T>::Bits>(kMagnitudeBits<T> >> kMantissaBits<T> << kMantissaBits<T>);

// Statistics of values that are taken one by one.
template <typename T>
struct Tally {
  using Bits = typename Element<T>::Bits;
  double squares = 0;
  Bits largest = 0;  // by bits, which are in the order of the values
  uint32_t nonfinite = 0, zeros = 0;

  DRACO_MEMBER void take(Bits bits) {
    const Bits magnitude = bits & kMagnitudeBits<T>;
    const bool finite = magnitude < kInfinityBits<T>;
    const Bits counted = finite ? magnitude : Bits{0};
    const double value = value_of<T>(counted);
    squares += value * value;
    largest = counted > largest ? counted : largest;
    nonfinite += !finite;
    zeros += magnitude == 0;
  }
  DRACO_MEMBER Stats stats() const {
    return {squares, static_cast<double>(value_of<T>(largest)), static_cast<double>(nonfinite),
            static_cast<double>(zeros)};
  }
};

}  // namespace
}  // namespace draco

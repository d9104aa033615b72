// The threads that run the locator together: one on the CPU, a block on a CUDA device (cuda/block.cuh).
//
// Code for a team is called by all of its threads. A collective reads what was written before the last sync() and ends
// with one, so that its results are visible to all. Threads come in warps; lanes of a warp add up without a barrier.
#pragma once

#include "core/common.h"

namespace draco {
namespace {

struct Alone {
  static constexpr int thread = 0, threads = 1, warp = 0, warps = 1, lane = 0, lanes = 1;

  DRACO_MEMBER void sync() const {}
  DRACO_MEMBER void sync_warp() const {}
  // Over the lanes of a warp; the result is the same in all of them.
  DRACO_MEMBER double sum(double x) const { return x; }
  DRACO_MEMBER Complex sum(Complex x) const { return x; }
  DRACO_MEMBER double largest(double x) const { return x; }
  // Whether it holds in any thread of the team. Collective.
  DRACO_MEMBER bool any(bool x) const { return x; }
  // The index below count with the smallest value(index), the lowest of several; NaN never counts; -1 if there is none.
  // Collective.
  template <typename Value>
  DRACO_MEMBER int64_t argmin(int64_t count, Value&& value) const {
    int64_t best = -1;
    double least = 0;
    for (int64_t i = 0; i < count; ++i) {
      const double x = value(i);
      if (x == x && (best < 0 || x < least)) {
        best = i;
        least = x;
      }
    }
    return best;
  }
};

}  // namespace
}  // namespace draco

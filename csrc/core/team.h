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

// Write one value, a list, or a list without the entry at `left_out`. Collective.
template <typename Team, typename T>
DRACO_TEAM void put(const Team& team, T* to, T value) {
  if (team.thread == 0) *to = value;
  team.sync();
}
template <typename Team>
DRACO_TEAM void copy(const Team& team, int* to, const int* from, int count) {
  for (int l = team.thread; l < count; l += team.threads) to[l] = from[l];
  team.sync();
}
template <typename Team>
DRACO_TEAM void copy_without(const Team& team, int* to, const int* from, int count, int left_out) {
  for (int l = team.thread; l < count; l += team.threads)
    if (l != left_out) to[l - (l > left_out)] = from[l];
  team.sync();
}

// Writes the workers in a mask to `members`; returns how many there are. Collective.
template <typename Team>
DRACO_TEAM int list(const Team& team, const uint8_t* mask, int workers, int* members) {
  int count = 0;
  for (int j = 0; j < workers; ++j) {
    if (!mask[j]) continue;
    if (team.thread == 0) members[count] = j;
    ++count;
  }
  team.sync();
  return count;
}

}  // namespace
}  // namespace draco

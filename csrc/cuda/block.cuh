// A block of threads as a team (core/team.h).
#pragma once

#include "cuda/reduce.cuh"

namespace draco {
namespace {

constexpr int kTeamThreads = 256, kTeamWarps = kTeamThreads / kWarp;

struct Block {
  static constexpr int threads = kTeamThreads, warps = kTeamWarps, lanes = kWarp;
  int thread, warp, lane;
  double* least;   // (warps,), shared memory
  int64_t* index;  // (warps,)

  __device__ __forceinline__ Block(double* least_, int64_t* index_)
      : thread(threadIdx.x), warp(threadIdx.x / kWarp), lane(threadIdx.x % kWarp), least(least_), index(index_) {}

  __device__ __forceinline__ void sync() const { __syncthreads(); }
  __device__ __forceinline__ void sync_warp() const { __syncwarp(); }
  __device__ __forceinline__ bool any(bool x) const { return __syncthreads_or(x); }

  __device__ __forceinline__ double sum(double x) const { return sum_of_lanes(x); }
  __device__ __forceinline__ Complex sum(Complex x) const { return sum_of_lanes(x); }
  __device__ __forceinline__ double largest(double x) const { return largest_of_lanes(x); }

  template <typename Value>
  __device__ __forceinline__ int64_t argmin(int64_t count, Value&& value) const {
    const auto smaller = [](Indexed own, Indexed other) {
      if (other.index < 0 || other.value != other.value) return own;
      if (own.index < 0 || other.value < own.value) return other;
      return other.value == own.value && other.index < own.index ? other : own;
    };
    Indexed best{0, -1};
    for (int64_t i = thread; i < count; i += threads) best = smaller(best, {value(i), i});
    best = reduce_lanes(best, smaller);
    if (lane == 0) {
      least[warp] = best.value;
      index[warp] = best.index;
    }
    __syncthreads();
    for (int w = 0; w < warps; ++w) best = smaller(best, {least[w], index[w]});
    __syncthreads();
    return best.index;
  }
};

}  // namespace
}  // namespace draco

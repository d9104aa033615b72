// A block of threads as a team (core/team.h).
#pragma once

#include "cuda/common.cuh"

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

  // In a butterfly both lanes of a pair add the same two numbers: all lanes end with the same bits.
  __device__ __forceinline__ double sum(double x) const {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
    return x;
  }
  __device__ __forceinline__ Complex sum(Complex x) const { return {sum(x.re), sum(x.im)}; }
  __device__ __forceinline__ double largest(double x) const {
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      const double other = __shfl_xor_sync(kAllLanes, x, distance);
      x = other > x ? other : x;
    }
    return x;
  }

  template <typename Value>
  __device__ __forceinline__ int64_t argmin(int64_t count, Value&& value) const {
    int64_t best = -1;
    double smallest = 0;
    const auto consider = [&](int64_t i, double x) {
      if (i < 0 || x != x) return;
      if (best >= 0 && (x > smallest || (x == smallest && i > best))) return;
      best = i;
      smallest = x;
    };
    for (int64_t i = thread; i < count; i += threads) consider(i, value(i));
    for (int distance = kWarp / 2; distance > 0; distance /= 2) {
      const int64_t other = __shfl_xor_sync(kAllLanes, best, distance);
      consider(other, __shfl_xor_sync(kAllLanes, smallest, distance));
    }
    if (lane == 0) {
      least[warp] = smallest;
      index[warp] = best;
    }
    __syncthreads();
    for (int w = 0; w < warps; ++w) consider(index[w], least[w]);
    __syncthreads();
    return best;
  }
};

}  // namespace
}  // namespace draco

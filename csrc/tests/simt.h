// Runs CUDA kernels on the host, for tests: enough of CUDA's language for this project's kernels.
//
// The threads of a block are fibers on one OS thread. A fiber runs until it reaches a barrier or a warp collective and
// waits there for the others; collectives see what the lanes brought, as on the device. Wrong code shows as follows:
//   - out of bounds: every buffer, shared memory included, is an allocation of its own, and the sanitizers see it;
//   - a missing barrier: fibers, and blocks, run in the order that DRACO_SIMT_ORDER names (forward, reverse or the seed
//     of random orders), and no result may depend on it; shared memory starts as NaN;
//   - divergence: a barrier or collective that not all threads reach, or at different places, aborts with both places.
// Not seen: missing fences between blocks, and races that no order of whole stretches between barriers brings out.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#define __global__ [[maybe_unused]] static
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

namespace simt {

// Of the running fiber and its launch.
extern dim3 thread, block, block_size, grid_size;

// Runs the kernel's body for every thread of every block; returns when all are done.
void launch(int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& body);

// The block's shared memory, poisoned; every thread asks in the same order.
void* allocate_shared(int64_t bytes);
template <typename T>
T* shared(int64_t count) {
  return static_cast<T*>(allocate_shared(count * sizeof(T)));
}
unsigned char* dynamic_shared();

// Wait for the whole block, or for the warp, at this line; the result is the or, or the 32 lanes' values.
bool block_barrier(int line, bool value = false);
const uint64_t* warp_barrier(int line, uint64_t value = 0);

template <typename T>
uint64_t pack(T value) {
  static_assert(sizeof(T) <= 8, "a lane exchanges at most 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(value));
  return bits;
}
template <typename T>
T shuffle(int line, T value, int from) {
  const uint64_t bits = warp_barrier(line, pack(value))[from & 31];
  memcpy(&value, &bits, sizeof(value));
  return value;
}
inline unsigned ballot(int line, bool value) {
  const uint64_t* lanes = warp_barrier(line, value);
  unsigned bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(lanes[lane] & 1) << lane;
  return bits;
}

}  // namespace simt

#define threadIdx simt::thread
#define blockIdx simt::block
#define blockDim simt::block_size
#define gridDim simt::grid_size
#define __syncthreads() simt::block_barrier(__LINE__)
#define __syncthreads_or(value) simt::block_barrier(__LINE__, value)
#define __syncwarp() simt::warp_barrier(__LINE__)
#define __shfl_sync(mask, value, from) simt::shuffle(__LINE__, value, from)
#define __shfl_xor_sync(mask, value, distance) simt::shuffle(__LINE__, value, (threadIdx.x & 31) ^ (distance))
#define __ballot_sync(mask, value) simt::ballot(__LINE__, value)

// One OS thread runs everything: plain operations are atomic.
template <typename T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at = static_cast<T>(before + value);
  return before;
}
inline void __threadfence() {}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
template <typename T>
T __ldg(const T* from) {
  return *from;
}
template <typename T>
T __ldcs(const T* from) {
  return *from;
}

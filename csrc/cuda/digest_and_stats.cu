// Keyed digest of a vector's bits and statistics of its tiles, in one sweep, in which the values may also be scaled.
// Three launches; the host waits for none:
//   digest_begin          clears 516 bytes.
//   digest_stats_kernel   reads d elements once (cuda/digest.cuh); takes the statistics of what the digest has in
//                         registers, and writes 32 bytes for each 64 KiB, and the scaled elements in their place.
//   tile_stats            a thread for each tile merges those of its 1 to 4 blocks, in their order.
// The order of summation is that of the threads' numbers, and the same in every call.
#include "core/stats.h"
#include "cuda/digest.cuh"

namespace draco {
namespace {

// Per multiprocessor, at least: where the compiler chooses, it spills registers for a few more.
constexpr int kStatsBlocks = 4;
constexpr int kTileStatsThreads = 128;

// As scale (core/half.h). float16 by the device's instructions: written out, it takes more registers than there are.
template <typename T>
DRACO_DEVICE typename Element<T>::Bits scale_on_device(typename Element<T>::Bits bits,
                                                       typename Element<T>::Sum factor) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, Half>) {
    float value;
    uint16_t scaled;
    asm volatile("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
    value *= factor;
    asm volatile("cvt.rn.f16.f32 %0, %1;" : "=h"(scaled) : "f"(value));
    return scaled;
  }
#endif
  return scale<T>(bits, factor);
}

// Takes the statistics of each block of the digest; kScale: and then writes the values times a factor.
template <typename T, bool kScale>
struct StatsObserver {
  using Bits = typename Element<T>::Bits;
  Stats* of_warp;   // (warps,), shared memory
  Stats* of_block;  // (blocks of the digest,)
  unsigned char* to;
  typename Element<T>::Sum factor;
  Tally<T> tally = {};

  template <bool kWhole>
  __device__ __forceinline__ void take(const Vector<uint32_t>& words, int64_t begin, int64_t left) {
    const auto values = bit_cast<Vector<Bits>>(words);
#pragma unroll
    for (int i = 0; i < Vector<Bits>::kCount; ++i)
      if (kWhole || i * static_cast<int64_t>(sizeof(T)) < left) tally.take(values.at[i]);
    if constexpr (kScale) {
      Vector<Bits> scaled;
#pragma unroll
      for (int i = 0; i < Vector<Bits>::kCount; ++i) scaled.at[i] = scale_on_device<T>(values.at[i], factor);
      store<kWhole>(to + begin, left, bit_cast<Vector<unsigned char>>(scaled));
    }
  }
  __device__ __forceinline__ void reduce(int lane, int warp) {
    Stats stats = tally.stats();
    stats.squares = sum_of_lanes(stats.squares);
    stats.largest = largest_of_lanes(stats.largest);
    stats.nonfinite = sum_of_lanes(tally.nonfinite);
    stats.zeros = sum_of_lanes(tally.zeros);
    if (lane == 0) of_warp[warp] = stats;
    tally = {};
  }
  __device__ __forceinline__ void write(int thread, int64_t block) {
    if (thread != kDigestThreads - 1) return;  // the first ones have the digest's sums to write
    Stats stats = of_warp[0];
#pragma unroll
    for (int w = 1; w < kDigestWarps; ++w) merge(stats, of_warp[w]);
    of_block[block] = stats;
  }
};

template <typename T, bool kScale>
__global__ void __launch_bounds__(kDigestThreads, kStatsBlocks)
    digest_stats_kernel(unsigned char* values, int64_t bytes, const __grid_constant__ DigestSeeds seeds, bool aligned,
                        typename Element<T>::Sum factor, DigestState* state, int64_t* out, Stats* of_block) {
  DRACO_SHARED(Stats, of_warp, kDigestWarps);
  StatsObserver<T, kScale> observer{of_warp, of_block, values, factor};
  digest_blocks(values, bytes, seeds, aligned, state, out, observer);
}

__global__ void tile_stats(const Stats* of_block, int64_t blocks, int per_tile, int64_t tiles, Stats* of_tile) {
  const int64_t tile = int64_t{blockIdx.x} * kTileStatsThreads + threadIdx.x;
  if (tile >= tiles) return;
  Stats stats = {};
  for (int64_t i = tile * per_tile; i < blocks && i < (tile + 1) * per_tile; ++i) merge(stats, of_block[i]);
  of_tile[tile] = stats;
}

template <bool kScale>
std::tuple<Tensor, Tensor> digest_stats(const char* op, const Tensor& values, int64_t seed, double factor) {
  const int64_t bytes = check_digest(op, values), tiles = tile_count(values.size(0));
  const int64_t blocks = ceil_div(bytes, kDigestBlock);
  const Device device(values);
  Tensor digest = torch::stable::new_empty(values, {2}, ScalarType::Long);
  Tensor stats = torch::stable::new_empty(values, {tiles, 4}, ScalarType::Double);
  DigestState* state = nullptr;
  Stats* of_block = nullptr;
  Tensor scratch = new_arena(values, [&](Arena& arena) {
    state = arena.take<DigestState>(1);
    of_block = arena.take<Stats>(blocks);
  });
  DigestSeeds seeds = {};
  seeds.count = 1;
  seeds.at[0] = static_cast<uint64_t>(seed);
  dispatch_floating(op, "values", values.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    DRACO_LAUNCH(device, digest_begin, 1, 1, 0, state);
    DRACO_LAUNCH(device, (digest_stats_kernel<T, kScale>), digest_grid(device, bytes, 1), kDigestThreads, 0,
                 static_cast<unsigned char*>(values.data_ptr()), bytes, seeds,
                 rows_aligned<unsigned char>(values.data_ptr(), 0, 1), static_cast<typename Element<T>::Sum>(factor),
                 state, static_cast<int64_t*>(digest.data_ptr()), of_block);
  });
  if (tiles > 0)
    DRACO_LAUNCH(device, tile_stats, ceil_div(tiles, kTileStatsThreads), kTileStatsThreads, 0, of_block, blocks,
                 static_cast<int>(kTile * values.element_size() / kDigestBlock), tiles,
                 static_cast<Stats*>(stats.data_ptr()));
  return {digest, stats};
}

std::tuple<Tensor, Tensor> digest_and_stats(const Tensor& values, int64_t seed) {
  return digest_stats<false>("digest_and_stats", values, seed, 1);
}

std::tuple<Tensor, Tensor> digest_stats_and_scale_(Tensor values, int64_t seed, double factor) {
  return digest_stats<true>("digest_stats_and_scale_", values, seed, factor);
}

}  // namespace
}  // namespace draco

DRACO_CUDA_OPS(m) {
  m.impl("digest_and_stats", TORCH_BOX(&draco::digest_and_stats));
  m.impl("digest_stats_and_scale_", TORCH_BOX(&draco::digest_stats_and_scale_));
}

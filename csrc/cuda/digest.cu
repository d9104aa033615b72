// Keyed digest of a vector's bits. Two launches, none of which the host waits for:
//   digest_begin   clears 36 bytes.
//   digest         256 threads a block of the grid, which takes 16 KiB of the vector at a time, 16 bytes a thread and
//                  step; at most 8 blocks per multiprocessor, each with a key of 16 KiB in shared memory.
//                  Reads d elements once; the last block writes 16 bytes.
// Sums are of integers: the same whatever their order.
#include "core/digest.h"
#include "cuda/common.cuh"

namespace draco {
namespace {

constexpr int kDigestThreads = 256, kDigestWarps = kDigestThreads / kWarp, kDigestBlocks = 8;

struct DigestState {
  unsigned long long lane[kDigestLanes];
  unsigned arrived;
};

__global__ void digest_begin(DigestState* state) { *state = {}; }

template <bool kWhole>
DRACO_DEVICE void add_words(const unsigned char* from, int64_t left, const uint32_t* key, uint64_t* sums) {
  const Vector<uint32_t> words = bit_cast<Vector<uint32_t>>(load<kWhole>(from, left));
#pragma unroll
  for (int t = 0; t < kDigestLanes; ++t) {
    const auto k = *reinterpret_cast<const Vector<uint32_t>*>(key + kDigestShift * t);
    sums[t] += digest_pair(words.at[0], words.at[1], k.at[0], k.at[1]);
    // A pair beyond the end is none, rather than one of zeros.
    if (kWhole || left > 8) sums[t] += digest_pair(words.at[2], words.at[3], k.at[2], k.at[3]);
  }
}

__global__ void __launch_bounds__(kDigestThreads) digest_kernel(const unsigned char* from, int64_t bytes, uint64_t seed,
                                                                bool aligned, DigestState* state, int64_t* out) {
  DRACO_SHARED(Vector<uint32_t>, key_vectors, kDigestKey / 4);
  DRACO_SHARED(uint64_t, warp_sums, kDigestWarps* kDigestLanes);
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  for (int i = thread; i < kDigestKey / 4; i += kDigestThreads)
    key_vectors[i] = bit_cast<Vector<uint32_t>>(digest_key(seed, i));
  const auto* key = reinterpret_cast<const uint32_t*>(key_vectors);
  uint64_t total = 0;  // of lane t of the digest, in thread t
  __syncthreads();
  for (int64_t begin = int64_t{blockIdx.x} * kDigestBlock; begin < bytes; begin += int64_t{gridDim.x} * kDigestBlock) {
    uint64_t sums[kDigestLanes] = {};
#pragma unroll
    for (int at = 16 * thread; at < kDigestBlock; at += 16 * kDigestThreads) {
      const int64_t left = bytes - begin - at;
      if (aligned && left >= 16) {
        add_words<true>(from + begin + at, left, key + at / 4, sums);
      } else if (left > 0) {
        add_words<false>(from + begin + at, left, key + at / 4, sums);
      }
    }
#pragma unroll
    for (int t = 0; t < kDigestLanes; ++t) {
#pragma unroll
      for (int distance = kWarp / 2; distance > 0; distance /= 2)
        sums[t] += __shfl_xor_sync(kAllLanes, sums[t], distance);
      if (lane == 0) warp_sums[warp * kDigestLanes + t] = sums[t];
    }
    __syncthreads();
    if (thread < kDigestLanes) {
      uint64_t sum = 0;
#pragma unroll
      for (int w = 0; w < kDigestWarps; ++w) sum += warp_sums[w * kDigestLanes + thread];
      total += digest_weigh(seed, begin / kDigestBlock, thread, sum);
    }
    __syncthreads();
  }
  if (thread < kDigestLanes) atomicAdd(&state->lane[thread], static_cast<unsigned long long>(total));
  __threadfence();
  if (!is_last_block(&state->arrived) || thread != 0) return;
  uint64_t lanes[kDigestLanes];
#pragma unroll
  for (int t = 0; t < kDigestLanes; ++t) lanes[t] = atomicAdd(&state->lane[t], 0ull);
  digest_finish(seed, bytes, lanes, out);
}

Tensor digest(const Tensor& values, int64_t seed) {
  const int64_t bytes = check_digest("digest", values);
  const Device device(values);
  Tensor out = torch::stable::new_empty(values, {2}, ScalarType::Long);
  Tensor scratch = new_scratch(values, sizeof(DigestState));
  auto* state = static_cast<DigestState*>(scratch.data_ptr());
  const int64_t most = int64_t{kDigestBlocks} * device.multiprocessors;
  const int64_t blocks = std::max<int64_t>(1, std::min(ceil_div(bytes, kDigestBlock), most));
  DRACO_LAUNCH(device, digest_begin, 1, 1, 0, state);
  DRACO_LAUNCH(device, digest_kernel, blocks, kDigestThreads, 0, static_cast<const unsigned char*>(values.data_ptr()),
               bytes, static_cast<uint64_t>(seed), rows_aligned<unsigned char>(values.data_ptr(), 0, 1), state,
               static_cast<int64_t*>(out.data_ptr()));
  return out;
}

}  // namespace
}  // namespace draco

DRACO_CUDA_OPS(m) { m.impl("digest", TORCH_BOX(&draco::digest)); }

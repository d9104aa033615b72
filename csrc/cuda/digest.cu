// Keyed digest of a vector's bits. Two launches; the host waits for neither:
//   digest_begin   clears 36 bytes.
//   digest         128 threads a block of the grid, which takes 16 KiB of the vector at a time; a thread takes the same
//                  16 bytes of all 8 chunks and of the one of their sums. At most 8 blocks per multiprocessor, each
//                  with a key of 19 KiB in shared memory. Reads d elements once; the last block writes 16 bytes.
// Sums are of integers: the same whatever their order.
#include "core/digest.h"
#include "cuda/reduce.cuh"

namespace draco {
namespace {

constexpr int kDigestThreads = kDigestChunk / 16, kDigestWarps = kDigestThreads / kWarp, kDigestBlocks = 8;

struct DigestState {
  unsigned long long sum[kDigestSums];
  unsigned arrived;
};

__global__ void digest_begin(DigestState* state) { *state = {}; }

// Adds NH of a thread's words of a chunk, whose end is `left` bytes away, to both lanes' plain sums, and
// those to the weighted ones. A pair beyond the end is none, rather than one of zeros.
DRACO_DEVICE void add_words(const Vector<uint32_t>& words, int64_t left, const uint32_t* key, uint64_t* sums) {
#pragma unroll
  for (int t = 0; t < kDigestLanes; ++t) {
    const auto k = *reinterpret_cast<const Vector<uint32_t>*>(key + kDigestShift * t);
    if (left > 0) sums[2 * t] += digest_pair(words.at[0], words.at[1], k.at[0], k.at[1]);
    if (left > 8) sums[2 * t] += digest_pair(words.at[2], words.at[3], k.at[2], k.at[3]);
    sums[2 * t + 1] += sums[2 * t];
  }
}

// Adds one thread's part of a block of the digest; `left`: bytes from its first word to the vector's end. kWhole: all
// of the block is there, and aligned.
template <bool kWhole>
DRACO_DEVICE void add_block(const unsigned char* from, int64_t left, int chunks, const uint32_t* key, uint64_t* sums) {
  Vector<uint32_t> words[kDigestChunks], extra = {};
#pragma unroll
  for (int c = 0; c < kDigestChunks; ++c)
    words[c] = bit_cast<Vector<uint32_t>>(load<kWhole>(from + c * kDigestChunk, left - c * kDigestChunk));
#pragma unroll
  for (int c = 0; c < kDigestChunks; ++c) {
    if (!kWhole && c >= chunks) break;
#pragma unroll
    for (int i = 0; i < Vector<uint32_t>::kCount; ++i) extra.at[i] += words[c].at[i];
    add_words(words[c], kWhole ? 16 : left - c * kDigestChunk, key + c * kDigestChunkKey, sums);
  }
  add_words(extra, kWhole ? 16 : left, key + chunks * kDigestChunkKey, sums);
}

__global__ void __launch_bounds__(kDigestThreads) digest_kernel(const unsigned char* from, int64_t bytes, uint64_t seed,
                                                                bool aligned, DigestState* state, int64_t* out) {
  DRACO_SHARED(Vector<uint32_t>, key_vectors, kDigestKey / 4);
  DRACO_SHARED(uint64_t, warp_sums, kDigestWarps* kDigestSums);
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  for (int i = thread; i < kDigestKey / 4; i += kDigestThreads)
    key_vectors[i] = bit_cast<Vector<uint32_t>>(digest_key(seed, i));
  const uint32_t* key = reinterpret_cast<const uint32_t*>(key_vectors) + 4 * thread;
  uint64_t total = 0;  // of sum number t, in thread t
  __syncthreads();
  for (int64_t begin = int64_t{blockIdx.x} * kDigestBlock; begin < bytes; begin += int64_t{gridDim.x} * kDigestBlock) {
    uint64_t sums[kDigestSums] = {};
    const int64_t size = bytes - begin;
    const unsigned char* own = from + begin + 16 * thread;
    if (aligned && size >= kDigestBlock) {
      add_block<true>(own, size, kDigestChunks, key, sums);
    } else {
      const int64_t chunks = size < kDigestBlock ? (size + kDigestChunk - 1) / kDigestChunk : kDigestChunks;
      add_block<false>(own, size - 16 * thread, static_cast<int>(chunks), key, sums);
    }
#pragma unroll
    for (int i = 0; i < kDigestSums; ++i) {
      const uint64_t sum = sum_of_lanes(sums[i]);
      if (lane == 0) warp_sums[warp * kDigestSums + i] = sum;
    }
    __syncthreads();
    if (thread < kDigestSums) {
      uint64_t sum = 0;
#pragma unroll
      for (int w = 0; w < kDigestWarps; ++w) sum += warp_sums[w * kDigestSums + thread];
      total += digest_weigh(seed, begin / kDigestBlock, thread, sum);
    }
    __syncthreads();
  }
  if (thread < kDigestSums) atomicAdd(&state->sum[thread], static_cast<unsigned long long>(total));
  __threadfence();
  if (!is_last_block(&state->arrived) || thread != 0) return;
  uint64_t sums[kDigestSums];
#pragma unroll
  for (int i = 0; i < kDigestSums; ++i) sums[i] = atomicAdd(&state->sum[i], 0ull);
  digest_finish(seed, bytes, sums, out);
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

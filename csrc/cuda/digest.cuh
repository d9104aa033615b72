// Shared by the kernels that digest: a thread's part of a block of 16 KiB (core/digest.h), and what joins the blocks.
// A block of the grid, 128 threads, takes 16 KiB at a time: a thread takes the same 16 bytes of all 8 chunks and of the
// one of their sums. The key of 19 KiB lies in shared memory.
#pragma once

#include "core/digest.h"
#include "cuda/reduce.cuh"

namespace draco {
namespace {

constexpr int kDigestThreads = kDigestChunk / 16, kDigestWarps = kDigestThreads / kWarp;
constexpr int kDigestBlocks = 8;  // of the grid, per multiprocessor, at most

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

// Sees nothing of what is digested. Others take the words of each chunk, in `reduce` put together what the lanes of a
// warp have, and in `write`, after a barrier, what the warps have.
struct NoObserver {
  template <bool kWhole>
  __device__ __forceinline__ void take(const Vector<uint32_t>&, int64_t) {}
  __device__ __forceinline__ void reduce(int, int) {}
  __device__ __forceinline__ void write(int, int64_t) {}
};

// Adds one thread's part of a block of the digest; `left`: bytes from its first word to the vector's end. kWhole: all
// of the block is there, and aligned.
template <bool kWhole, typename Observer>
DRACO_DEVICE void add_block(const unsigned char* from, int64_t left, int chunks, const uint32_t* key, uint64_t* sums,
                            Observer& observer) {
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
    observer.template take<kWhole>(words[c], left - c * kDigestChunk);
  }
  add_words(extra, kWhole ? 16 : left, key + chunks * kDigestChunkKey, sums);
}

// The kernels' body.
template <typename Observer>
DRACO_DEVICE void digest_blocks(const unsigned char* from, int64_t bytes, uint64_t seed, bool aligned,
                                DigestState* state, int64_t* out, Observer& observer) {
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
      add_block<true>(own, size, kDigestChunks, key, sums, observer);
    } else {
      const int64_t chunks = size < kDigestBlock ? (size + kDigestChunk - 1) / kDigestChunk : kDigestChunks;
      add_block<false>(own, size - 16 * thread, static_cast<int>(chunks), key, sums, observer);
    }
#pragma unroll
    for (int i = 0; i < kDigestSums; ++i) {
      const uint64_t sum = sum_of_lanes(sums[i]);
      if (lane == 0) warp_sums[warp * kDigestSums + i] = sum;
    }
    observer.reduce(lane, warp);
    __syncthreads();
    observer.write(thread, begin / kDigestBlock);
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

// Blocks of the grid for a vector of this many bytes.
inline int64_t digest_grid(const Device& device, int64_t bytes) {
  const int64_t most = int64_t{kDigestBlocks} * device.multiprocessors;
  return std::max<int64_t>(1, std::min(ceil_div(bytes, kDigestBlock), most));
}

}  // namespace
}  // namespace draco

// Shared by the kernels that digest: a thread's part of a block of 64 KiB (core/digest.h), and what joins the blocks.
// A block of the grid, 64 threads, takes 64 KiB at a time under one key: a thread takes the same 16 bytes of all cells.
// The key of 7 KiB lies in shared memory. With several keys, neighbours in the grid take the same 64 KiB under one key
// each, at about the same time, so that it comes from memory once.
#pragma once

#include "core/digest.h"
#include "cuda/reduce.cuh"

namespace draco {
namespace {

constexpr int kDigestLineThreads = kDigestLine / 16;
constexpr int kDigestThreads = kDigestGroups * kDigestLineThreads, kDigestWarps = kDigestThreads / kWarp;
constexpr int kDigestBlocks = 16;  // of the grid, per multiprocessor, at most
constexpr int kDigestSeeds = 16;   // of a launch, at most

struct DigestSeeds {
  uint64_t at[kDigestSeeds];
  int count;
  const int64_t* there;  // where they are on the device, if the host does not know them
};

DRACO_DEVICE uint64_t seed_at(const DigestSeeds& seeds, int i) {
  return static_cast<uint64_t>(seeds.there == nullptr ? seeds.at[i] : seeds.there[i]);
}

struct DigestState {
  unsigned long long sum[kDigestSeeds][kDigestSums];
  unsigned arrived;
};

__global__ void digest_begin(DigestState* state) { *state = {}; }

// Writes the hashes that the lanes of a warp have together of a row's cells. `key` is that of the thread's words of the
// row's first cell; those of a group that is not there count nothing.
DRACO_DEVICE void hash_row(const Vector<uint32_t>* columns, const Vector<uint32_t>& ninth, bool is_there,
                           const uint32_t* key, int lane, uint64_t* hashes) {
#pragma unroll
  for (int j = 0; j < kDigestRowCells; ++j) {
    const Vector<uint32_t>& words = j < kDigestColumns ? columns[j] : ninth;
    const auto k = *reinterpret_cast<const Vector<uint32_t>*>(key + j * kDigestLineWords);
    const uint64_t own = digest_pair(words.at[0], words.at[1], k.at[0], k.at[1]) +
                         digest_pair(words.at[2], words.at[3], k.at[2], k.at[3]);
    const uint64_t hash = sum_of_lanes(is_there ? own : 0);
    if (lane == 0) hashes[j] = hash;
  }
}

DRACO_DEVICE void xor_into(Vector<uint32_t>& to, const Vector<uint32_t>& words) {
#pragma unroll
  for (int i = 0; i < Vector<uint32_t>::kCount; ++i) to.at[i] ^= words.at[i];
}

// Sees nothing of what is digested. Others take 16 bytes at a time, in `reduce` put together what the lanes of a warp
// have, and in `write`, after a barrier, what the warps have.
struct NoObserver {
  template <bool kWhole>
  __device__ __forceinline__ void take(const Vector<uint32_t>&, int64_t, int64_t) {}
  __device__ __forceinline__ void reduce(int, int) {}
  __device__ __forceinline__ void write(int, int64_t) {}
};

// Writes the hashes that a warp has of a block's cells. `first`: where the block's first thread-part of 16 bytes of
// this thread begins in the vector; `size`: bytes from the block's begin to the vector's end. kWhole: all of the block
// is there, and aligned.
template <bool kWhole, typename Observer>
DRACO_DEVICE void hash_block(const unsigned char* from, int64_t first, int64_t size, int group, int offset,
                             const uint32_t* key, int lane, uint64_t* hashes, Observer& observer) {
  const int rows = kWhole ? kDigestRows : digest_rows(size);
  Vector<uint32_t> xors[kDigestColumns] = {}, ninth_of_xors = {};
#pragma unroll 1
  for (int i = 0; i < rows; ++i) {
    const int64_t begin = first + i * kDigestRow, left = size - offset - i * kDigestRow;
    Vector<uint32_t> words[kDigestColumns], ninth = {};
#pragma unroll
    for (int j = 0; j < kDigestColumns; ++j)
      words[j] = bit_cast<Vector<uint32_t>>(load<kWhole>(from + begin + j * kDigestLine, left - j * kDigestLine));
#pragma unroll
    for (int j = 0; j < kDigestColumns; ++j) {
      xor_into(ninth, words[j]);
      xor_into(xors[j], words[j]);
      observer.template take<kWhole>(words[j], begin + j * kDigestLine, left - j * kDigestLine);
    }
    xor_into(ninth_of_xors, ninth);
    hash_row(words, ninth, kWhole || group < digest_groups(size, i), key + i * kDigestRowCells * kDigestLineWords, lane,
             hashes + i * kDigestRowCells);
  }
  hash_row(xors, ninth_of_xors, kWhole || group < digest_groups(size, 0),
           key + rows * kDigestRowCells * kDigestLineWords, lane, hashes + rows * kDigestRowCells);
}

// The kernels' body. The digest under seed number i is written to out + 2 i.
template <typename Observer>
DRACO_DEVICE void digest_blocks(const unsigned char* from, int64_t bytes, const DigestSeeds& seeds, bool aligned,
                                DigestState* state, int64_t* out, Observer& observer) {
  DRACO_SHARED(Vector<uint32_t>, key_vectors, kDigestKey / 4);
  DRACO_SHARED(uint64_t, hashes, kDigestWarps* kDigestCells);
  DRACO_SHARED(uint64_t, warp_sums, kDigestWarps* kDigestSums);
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  const int group = thread / kDigestLineThreads, part = thread % kDigestLineThreads;
  const int own = static_cast<int>(blockIdx.x) % seeds.count;
  const uint64_t seed = seed_at(seeds, own);
  for (int i = thread; i < kDigestKey / 4; i += kDigestThreads)
    key_vectors[i] = bit_cast<Vector<uint32_t>>(digest_key(seed, i));
  const auto* const key = reinterpret_cast<const uint32_t*>(key_vectors);
  const int offset = group * kDigestGroup + 16 * part;
  uint64_t total = 0;  // of sum number t, in thread t
  __syncthreads();
  for (int64_t block = blockIdx.x / seeds.count; block * kDigestBlock < bytes; block += gridDim.x / seeds.count) {
    const int64_t begin = block * kDigestBlock, size = bytes - begin;
    const uint32_t* const own_key = key + group * kDigestLineWords + 4 * part;
    uint64_t* const own_hashes = hashes + warp * kDigestCells;
    if (aligned && size >= kDigestBlock) {
      hash_block<true>(from, begin + offset, size, group, offset, own_key, lane, own_hashes, observer);
    } else {
      hash_block<false>(from, begin + offset, size, group, offset, own_key, lane, own_hashes, observer);
    }
    observer.reduce(lane, warp);
    __syncthreads();
    observer.write(thread, block);
    uint64_t sums[kDigestSums] = {};
    for (int c = thread; c < (digest_rows(size) + 1) * kDigestRowCells; c += kDigestThreads) {
      uint64_t hash = 0;
#pragma unroll
      for (int w = 0; w < kDigestWarps; ++w) hash += hashes[w * kDigestCells + c];
#pragma unroll
      for (int i = 0; i < kDigestSums; ++i) sums[i] += digest_cell(key, c, i, hash);
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
      total += digest_weigh(seed, block, thread, sum);
    }
  }
  if (thread < kDigestSums) atomicAdd(&state->sum[own][thread], static_cast<unsigned long long>(total));
  __threadfence();
  if (!is_last_block(&state->arrived) || thread >= seeds.count) return;
  uint64_t sums[kDigestSums];
#pragma unroll
  for (int i = 0; i < kDigestSums; ++i) sums[i] = atomicAdd(&state->sum[thread][i], 0ull);
  digest_finish(seed_at(seeds, thread), bytes, sums, out + 2 * thread);
}

// Blocks of the grid for a vector of this many bytes and so many keys: as many for each key.
inline int64_t digest_grid(const Device& device, int64_t bytes, int keys) {
  const int64_t most = int64_t{kDigestBlocks} * device.multiprocessors / keys;
  return keys * std::max<int64_t>(1, std::min(ceil_div(bytes, kDigestBlock), most));
}

}  // namespace
}  // namespace draco

// Shared by the CPU ops that digest: the key, the blocks on all threads, and what joins them.
#pragma once

#include <atomic>

#include "core/digest.h"
#include "cpu/common.h"

namespace draco {

struct alignas(64) DigestKey {
  uint32_t word[kDigestKey];
};

// The digest of a vector of this many bytes. hash(key, begin, size, sums) adds the four sums of one block to `sums`;
// the blocks of `alignment` bytes, a multiple of the block's, are hashed by one thread, in their order.
template <typename F>
Tensor digest_blocks(int64_t bytes, uint64_t seed, int64_t alignment, const F& hash) {
  constexpr int64_t kTaken = 16 * kDigestBlock;  // bytes that a thread takes at once
  static_assert(kDigestChunkKey % 4 == 0, "the key is drawn four words at a time");
  const std::unique_ptr<DigestKey> key(new DigestKey);
  // Of a short vector's, no more than it needs.
  const int64_t chunks = std::min<int64_t>(kDigestChunks, (bytes + kDigestChunk - 1) / kDigestChunk) + 1;
  const int64_t words = std::min<int64_t>(kDigestChunkKey, bytes / 4 + 2 + kDigestShift * (kDigestLanes - 1));
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = chunk * kDigestChunkKey;
    for (int64_t i = first; i < first + words; i += 4)
      std::copy_n(digest_key(seed, static_cast<int>(i / 4)).word, 4, key->word + i);
  }

  std::atomic<uint64_t> total[kDigestSums] = {};
  for_each_chunk(bytes, kTaken, alignment, 0, 0, [&](int64_t begin, int64_t count, void*) {
    uint64_t own[kDigestSums] = {};
    for (int64_t at = begin; at < begin + count; at += kDigestBlock) {
      uint64_t sums[kDigestSums] = {};
      hash(key->word, at, std::min<int64_t>(kDigestBlock, begin + count - at), sums);
      for (int t = 0; t < kDigestSums; ++t) own[t] += digest_weigh(seed, at / kDigestBlock, t, sums[t]);
    }
    for (int t = 0; t < kDigestSums; ++t) total[t].fetch_add(own[t], std::memory_order_relaxed);
  });
  Tensor out = new_vector(1, 2, aoti_torch_dtype_int64());
  const uint64_t sums[kDigestSums] = {total[0], total[1], total[2], total[3]};
  digest_finish(seed, bytes, sums, static_cast<int64_t*>(out.data_ptr()));
  return out;
}

}  // namespace draco

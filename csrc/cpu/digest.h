// Shared by the CPU ops that digest: the keys, the blocks on all threads, and what joins them.
#pragma once

#include <atomic>

#include "core/digest.h"
#include "cpu/common.h"

namespace draco {

struct alignas(64) DigestKey {
  static constexpr int kSize = (kDigestKey + 4 * kPhiloxStep - 1) / (4 * kPhiloxStep) * 4 * kPhiloxStep;
  uint32_t word[kSize];

  // Draws what digesting so many bytes needs.
  void draw(const Kernels& kernel, uint64_t seed, int64_t bytes) {
    constexpr int kStep = kPhiloxStep, kOfHashes = kDigestCellKey / 4;
    static_assert(kOfHashes % kStep == 0, "the two parts of the key are drawn one by one");
    const int lines = (digest_rows(bytes) + 1) * kDigestRowCells - 1 + digest_groups(bytes, 0);
    kernel.random_words(seed, kDigestKeyDomain, 0, (lines * kDigestLineWords / 4 + kStep - 1) / kStep * kStep, word);
    kernel.random_words(seed, kDigestKeyDomain, kOfHashes, kSize / 4 - kOfHashes, word + kDigestCellKey);
  }
};

// Writes the digests of a vector of this many bytes under `count` seeds. hash(key, begin, size, sums) adds the four
// sums of one block under one key to `sums`; the blocks of `alignment` bytes, a multiple of the block's, are hashed by
// one thread, in their order, each under all keys while it is in the caches.
template <typename F>
void digest_blocks(int64_t bytes, const int64_t* seeds, int count, int64_t alignment, const F& hash, int64_t* out) {
  constexpr int64_t kLeast = 4 * kDigestBlock;  // bytes that are worth a thread
  const std::unique_ptr<DigestKey[]> keys(new DigestKey[count]);
  const auto seed = [&](int i) { return static_cast<uint64_t>(seeds[i]); };
  for (int i = 0; i < count; ++i) keys[i].draw(kernels(), seed(i), bytes);
  const std::unique_ptr<std::atomic<uint64_t>[]> totals(new std::atomic<uint64_t>[kDigestSums * count]());
  parallel((bytes + alignment - 1) / alignment, kLeast / alignment, [&](int64_t first, int64_t last) {
    std::vector<uint64_t> own(kDigestSums * count);
    const int64_t end = std::min(last * alignment, bytes);
    for (int64_t at = first * alignment; at < end; at += kDigestBlock) {
      for (int i = 0; i < count; ++i) {
        uint64_t sums[kDigestSums] = {};
        hash(keys[i].word, at, std::min<int64_t>(kDigestBlock, end - at), sums);
        for (int t = 0; t < kDigestSums; ++t)
          own[kDigestSums * i + t] += digest_weigh(seed(i), at / kDigestBlock, t, sums[t]);
      }
    }
    for (int t = 0; t < kDigestSums * count; ++t) totals[t].fetch_add(own[t], std::memory_order_relaxed);
  });
  for (int i = 0; i < count; ++i) {
    uint64_t sums[kDigestSums];
    std::copy_n(totals.get() + kDigestSums * i, kDigestSums, sums);
    digest_finish(seed(i), bytes, sums, out + 2 * i);
  }
}

}  // namespace draco

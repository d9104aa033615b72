// Keyed digest of a vector's bits. Moves d elements in; the key of 19 KiB stays in the first-level cache.
#include "core/digest.h"

#include <atomic>

#include "cpu/common.h"

namespace draco {
namespace {

constexpr int64_t kDigestTaken = 16 * kDigestBlock;  // bytes that a thread takes at once

struct alignas(64) Key {
  uint32_t word[kDigestKey];
};
static_assert(kDigestChunkKey % 4 == 0, "the key is drawn four words at a time");

Tensor digest(const Tensor& values, int64_t seed_bits) {
  const int64_t bytes = check_digest("digest", values);
  const auto seed = static_cast<uint64_t>(seed_bits);
  const auto* from = static_cast<const unsigned char*>(values.data_ptr());
  const std::unique_ptr<Key> key(new Key);
  // Of a short vector's, no more than it needs.
  const int64_t chunks = std::min<int64_t>(kDigestChunks, (bytes + kDigestChunk - 1) / kDigestChunk) + 1;
  const int64_t words = std::min<int64_t>(kDigestChunkKey, bytes / 4 + 2 + kDigestShift * (kDigestLanes - 1));
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const int64_t first = chunk * kDigestChunkKey;
    for (int64_t i = first; i < first + words; i += 4)
      std::copy_n(digest_key(seed, static_cast<int>(i / 4)).word, 4, key->word + i);
  }

  const Kernels& kernel = kernels();
  std::atomic<uint64_t> total[kDigestSums] = {};
  for_each_chunk(bytes, kDigestTaken, kDigestBlock, 0, 0, [&](int64_t begin, int64_t count, void*) {
    uint64_t own[kDigestSums] = {};
    for (int64_t at = begin; at < begin + count; at += kDigestBlock) {
      uint64_t sums[kDigestSums] = {};
      kernel.digest(key->word, from + at, std::min<int64_t>(kDigestBlock, begin + count - at), sums);
      for (int t = 0; t < kDigestSums; ++t) own[t] += digest_weigh(seed, at / kDigestBlock, t, sums[t]);
    }
    for (int t = 0; t < kDigestSums; ++t) total[t].fetch_add(own[t], std::memory_order_relaxed);
  });
  Tensor out = new_vector(1, 2, aoti_torch_dtype_int64());
  const uint64_t sums[kDigestSums] = {total[0], total[1], total[2], total[3]};
  digest_finish(seed, bytes, sums, static_cast<int64_t*>(out.data_ptr()));
  return out;
}

}  // namespace
}  // namespace draco

STABLE_TORCH_LIBRARY_IMPL(draco_ext, CPU, m) { m.impl("digest", TORCH_BOX(&draco::digest)); }

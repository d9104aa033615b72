// A keyed digest of a vector's bits, 128 of them: what ranks compare instead of whole gradients.
//
// Blocks of 16 KiB are hashed by NH with a Toeplitz key (Black et al., UMAC, CRYPTO 1999): lane t of 4 sums the
// products of neighbouring 32-bit words, each added to its word of the key, which is shifted by 16 t words. Multilinear
// hashing (Carter and Wegman) with a fresh 64-bit weight for each half of every lane's sum joins the blocks, and the
// length. Whatever two different vectors are, over the random seed their digests agree with a probability of about
// 2^-124.
#pragma once

#include "core/random.h"

namespace draco {
namespace {

constexpr int kDigestLanes = 4;
constexpr int kDigestBlock = 16384;  // bytes: the key, little longer, stays in the first-level cache
constexpr int kDigestWords = kDigestBlock / 4;
constexpr int kDigestShift = 16;  // words: a line of the cache
constexpr int kDigestKey = kDigestWords + kDigestShift * (kDigestLanes - 1);
constexpr uint32_t kDigestKeyDomain = 4, kDigestWeightDomain = 5;
constexpr int64_t kDigestLength = int64_t{1} << 60;  // the block number under which the length goes in

struct Digest {
  uint64_t lane[kDigestLanes];
};

// Four words of the key, from 4 i on.
DRACO_HD Philox digest_key(uint64_t seed, int i) { return philox(seed, static_cast<uint64_t>(i), kDigestKeyDomain); }

DRACO_HD uint64_t digest_pair(uint32_t a, uint32_t b, uint32_t key_a, uint32_t key_b) {
  return uint64_t{a + key_a} * uint64_t{b + key_b};
}

// Takes what lane t made of a block into the digest's lane t; the order of blocks does not matter.
DRACO_HD uint64_t digest_weigh(uint64_t seed, int64_t block, int lane, uint64_t sum) {
  const Philox w = philox(seed, static_cast<uint64_t>(block) * kDigestLanes + lane, kDigestWeightDomain);
  return (sum & 0xffffffffu) * (uint64_t{w.word[1]} << 32 | w.word[0]) +
         (sum >> 32) * (uint64_t{w.word[3]} << 32 | w.word[2]);
}

// The digest's two numbers: the upper halves of the lanes, the lower are not uniform.
DRACO_HD void digest_finish(uint64_t seed, int64_t bytes, const uint64_t* lanes, int64_t* out) {
  for (int half = 0; half < 2; ++half) {
    uint64_t word[2];
    for (int i = 0; i < 2; ++i) {
      const int lane = 2 * half + i;
      word[i] = (lanes[lane] + digest_weigh(seed, kDigestLength, lane, static_cast<uint64_t>(bytes))) >> 32;
    }
    out[half] = static_cast<int64_t>(word[1] << 32 | word[0]);
  }
}

}  // namespace
}  // namespace draco

// A keyed digest of a vector's bits, 128 of them: what ranks compare instead of whole gradients.
//
// Four independent hashes of every word would cost four multiplications. An erasure code saves nearly half of them (the
// encode, hash, combine of Nandi, FSE 2014): blocks of 16 KiB are cut into 8 chunks, and the words of a ninth are the
// sums of theirs, so that blocks that differ do so in at least two of nine. Each chunk is hashed twice by NH with a
// Toeplitz key of its own (Black et al., UMAC, CRYPTO 1999): lane t of 2 sums the products of neighbouring 32-bit
// words, each added to its word of the key, which is shifted by 16 t words. Of each lane's nine hashes, h_9 of the
// first chunk to h_1 of the ninth, the block keeps sum h_c and sum c h_c. Multilinear hashing (Carter and Wegman) with
// a fresh 64-bit weight for each half of these four sums joins the blocks, and the length. Of the last block there are
// chunks, and of its last chunk words, as far as the vector goes; the one of sums is as long as the first, and follows
// the last.
//
// Whatever two different vectors are, over the random seed their digests agree with a probability of at most 2^-121: if
// chunks a and b differ, the differences of one lane's two sums both vanish with at most 2^v 2^-64, where 2^v divides
// a - b; one of them alone with 2^-32 or, the second, 2^u 2^-32, where 2^u divides a and b. What does not vanish is
// lost when blocks are joined with 2^-32. So a lane's two words agree with at most (1 + 1 + 2^u + 2^v) 2^-64, 11 2^-64
// at worst, for 1 and 9; and the lanes' probabilities multiply.
#pragma once

#include "core/random.h"

namespace draco {
namespace {

constexpr int kDigestLanes = 2, kDigestSums = 2 * kDigestLanes;
constexpr int kDigestChunks = 8;    // of the vector in a block; one more is made of them
constexpr int kDigestChunk = 2048;  // bytes
constexpr int kDigestBlock = kDigestChunks * kDigestChunk;
// In words; shifted by a line of the cache.
constexpr int kDigestShift = 16, kDigestChunkKey = kDigestChunk / 4 + kDigestShift * (kDigestLanes - 1);
constexpr int kDigestKey = (kDigestChunks + 1) * kDigestChunkKey;
constexpr uint32_t kDigestKeyDomain = 4, kDigestWeightDomain = 5;
constexpr int64_t kDigestLength = int64_t{1} << 60;  // the block number under which the length goes in

// Four words of the key, from 4 i on.
DRACO_HD Philox digest_key(uint64_t seed, int i) { return philox(seed, static_cast<uint64_t>(i), kDigestKeyDomain); }

DRACO_HD uint64_t digest_pair(uint32_t a, uint32_t b, uint32_t key_a, uint32_t key_b) {
  return uint64_t{a + key_a} * uint64_t{b + key_b};
}

// The amount that a block's sum number i adds to the digest's; the order of blocks does not matter.
DRACO_HD uint64_t digest_weigh(uint64_t seed, int64_t block, int i, uint64_t sum) {
  const Philox w = philox(seed, static_cast<uint64_t>(block) * kDigestSums + i, kDigestWeightDomain);
  return (sum & 0xffffffffu) * (uint64_t{w.word[1]} << 32 | w.word[0]) +
         (sum >> 32) * (uint64_t{w.word[3]} << 32 | w.word[2]);
}

// The digest's two numbers: the upper halves of the sums, the lower are not uniform.
DRACO_HD void digest_finish(uint64_t seed, int64_t bytes, const uint64_t* sums, int64_t* out) {
  for (int half = 0; half < 2; ++half) {
    uint64_t word[2];
    for (int i = 0; i < 2; ++i) {
      const int number = 2 * half + i;
      word[i] = (sums[number] + digest_weigh(seed, kDigestLength, number, static_cast<uint64_t>(bytes))) >> 32;
    }
    out[half] = static_cast<int64_t>(word[1] << 32 | word[0]);
  }
}

}  // namespace
}  // namespace draco

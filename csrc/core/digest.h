// A keyed digest of a vector's bits, 128 of them: what ranks compare instead of whole gradients. Three levels.
//
// 1. Cells. Hashing every word independently four times would cost four multiplications. An erasure code saves most of
//    them (encode, hash: Nandi, FSE 2014): a block of 64 KiB is divided into 8 rows of 16 groups of 8 lines of 64
//    bytes. Cell (i, j) has the lines number j of all groups of row i. A ninth column of cells is the XOR of the eight,
//    and a last row is the XOR of the rows, so blocks that differ do so in at least four cells, in lines of the same
//    number. Each cell is hashed once by NH (Black et al., UMAC, CRYPTO 1999): the sum of the products of neighbouring
//    32-bit words, each added to its word of the key, which is shifted by c lines for cell number c (a Toeplitz key).
// 2. Blocks. The hashes of a block's cells are hashed four times by NH, again with a Toeplitz key.
// 3. Multilinear hashing (Carter and Wegman) with a fresh 64-bit weight for each half of these four sums joins the
//    blocks, and the length.
// A vector is padded with zeros to whole groups. The last block has the rows, and its last row the groups, that this
// takes; its row of XORs has the groups of its first row and follows its last one.
//
// Whatever two different vectors are, over the random seed their digests agree with a probability of at most
// 17 2^-128, less than 2^-123. If their lengths differ, each of the digest's four words agrees with 2^-32, by the
// weights of the length. Otherwise take a block in which they differ.
// 1. Consider the last pair of words in which any of its cells differ. At least four cells do so there, and each
//    multiplies it with another pair of the key, which is no part of the equations of those with lower numbers. So
//    their hashes are pairwise equal with at most 2^-32 each, and all are with at most 2^-128.
// 2. If the hashes differ, so does a given set of k of the four sums vanish in the difference with at most 2^-32k.
// 3. If a sum differs, its word of the digest agrees with 2^-32. So together all four words agree with at most
//    2^-128 + (2^-32 + 2^-32)^4.
#pragma once

#include "core/random.h"

namespace draco {
namespace {

constexpr int kDigestLine = 64, kDigestColumns = 8, kDigestGroup = kDigestColumns * kDigestLine;  // bytes
constexpr int kDigestGroups = 16, kDigestRow = kDigestGroups * kDigestGroup;
constexpr int kDigestRows = 8, kDigestBlock = kDigestRows * kDigestRow;
constexpr int kDigestRowCells = kDigestColumns + 1, kDigestCells = (kDigestRows + 1) * kDigestRowCells;
constexpr int kDigestSums = 4, kDigestShift = 4;  // of a block; words by which the key for the next one is shifted
// Words of the key: for the cells, and after them for their hashes.
constexpr int kDigestLineWords = kDigestLine / 4;
constexpr int kDigestCellKey = (kDigestCells - 1 + kDigestGroups) * kDigestLineWords;
constexpr int kDigestKey = kDigestCellKey + (2 * kDigestCells + 3) / 4 * 4 + kDigestShift * (kDigestSums - 1);
constexpr uint32_t kDigestKeyDomain = 4, kDigestWeightDomain = 5;
constexpr int64_t kDigestLength = int64_t{1} << 60;  // the block number under which the length goes in

// Four words of the key, from 4 i on.
DRACO_HD Philox digest_key(uint64_t seed, int i) { return philox(seed, static_cast<uint64_t>(i), kDigestKeyDomain); }

DRACO_HD uint64_t digest_pair(uint32_t a, uint32_t b, uint32_t key_a, uint32_t key_b) {
  return uint64_t{a + key_a} * uint64_t{b + key_b};
}

// What the hash of cell number `cell` adds to the block's sum number i.
DRACO_HD uint64_t digest_cell(const uint32_t* key, int cell, int i, uint64_t hash) {
  const uint32_t* const at = key + kDigestCellKey + kDigestShift * i + 2 * cell;
  return digest_pair(static_cast<uint32_t>(hash), static_cast<uint32_t>(hash >> 32), at[0], at[1]);
}

// How many rows of a block of this many bytes are there, and how many groups of row i; i = 0 also for the row of XORs.
DRACO_HD int digest_rows(int64_t bytes) {
  return bytes < kDigestBlock ? static_cast<int>((bytes + kDigestRow - 1) / kDigestRow) : kDigestRows;
}
DRACO_HD int digest_groups(int64_t bytes, int i) {
  const int64_t groups = (bytes - i * int64_t{kDigestRow} + kDigestGroup - 1) / kDigestGroup;
  return groups < kDigestGroups ? static_cast<int>(groups) : kDigestGroups;
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

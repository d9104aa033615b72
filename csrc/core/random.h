// The random weights of a projection: Philox4x32-10 (Salmon et al., SC 2011), keyed freshly for every decode.
//
// An element in column c of a row gets the weight phi[k][pair within chunk] * psi[k][chunk], so that the table phi
// stays in the first-level cache while no two columns share a weight. Both factors are +-[1, 2): never small, so that a
// single wrong element cannot hide, and continuous, so that several cannot cancel each other except by chance.
#pragma once

#include <cmath>

#include "core/common.h"

namespace draco {
namespace {

constexpr int kMostProjections = 4, kFewestProjections = 2;  // of a tile; at most the words of one Philox block
constexpr int kLanes = 16;    // partial sums per projection, in which real columns of a chunk take turns
constexpr int kBlock = 256;   // columns that are summed in the messages' own precision before going to double
constexpr int kChunk = 1024;  // columns of the smallest chunk: they share the table phi
constexpr int kChunkPairs = kChunk / 2;
constexpr int64_t kTile = 32768;            // columns of one tile: one noise floor, projections_per_tile() projections
constexpr double kWeightPower = 7.0 / 3.0;  // mean square of a number in +-[1, 2)
// phi is made so much smaller that the projections of no finite message overflow: up to 64 terms are summed in the
// messages' own precision.
template <typename T>
constexpr T kPhiScale = static_cast<T>(sizeof(T) == 4 ? 0x1p-8 : 0x1p-64);

DRACO_HD int64_t tile_count(int64_t length) { return (length + kTile - 1) / kTile; }

// Independent projections of each tile. An error is overlooked when all of its tile's happen to fall below the noise:
// that matters more where a tile is a large part of the message.
constexpr int64_t kFewTiles = 4;
DRACO_HD int projections_per_tile(int64_t length) {
  return length <= kFewTiles * kTile ? kMostProjections : kFewestProjections;
}

struct Philox {
  uint32_t word[4];
};

DRACO_HD Philox philox(uint64_t key, uint64_t counter, uint32_t domain) {
  uint32_t k0 = static_cast<uint32_t>(key), k1 = static_cast<uint32_t>(key >> 32);
  uint32_t c0 = static_cast<uint32_t>(counter), c1 = static_cast<uint32_t>(counter >> 32), c2 = domain, c3 = 0;
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c0, p1 = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

DRACO_HD float signed_weight(uint32_t word) {  // sign and mantissa are random, the exponent is that of [1, 2)
  return bit_cast<float>((word & 0x807fffffu) | 0x3f800000u);
}

// The norm from the mean square, and from that of numbers kSmaller times as large, for squares that overflow.
constexpr double kSmaller = 0x1p-500;
template <typename T>
DRACO_HD double norm_of_squares(double square, double small_square) {
  if (sizeof(T) == 4 || square < 0x1p1000) return sqrt(square);
  return sqrt(small_square) / kSmaller;
}

// sqrt(a^2 + b^2) of numbers whose squares may overflow; NaN where one is NaN or both are infinite.
DRACO_HD double hypotenuse(double a, double b) {
  const double large = a > b ? a : b, small = a > b ? b : a, ratio = small / large;
  return large == 0 ? 0 : large * sqrt(1 + ratio * ratio);
}

// phi for all projections of one pair of columns; psi for all projections of one chunk of a message.
constexpr uint32_t kPhiDomain = 1, kPsiDomain = 2;
DRACO_HD Philox projection_phi(uint64_t seed, int pair) {
  return philox(seed, static_cast<uint64_t>(pair), kPhiDomain);
}
DRACO_HD Philox projection_psi(uint64_t seed, int64_t chunk) {
  return philox(seed, static_cast<uint64_t>(chunk), kPsiDomain);
}

}  // namespace
}  // namespace draco

#include <array>
#include <cmath>
#include <random>
#include <set>

#include "core/random.h"
#include "tests/check.h"

using namespace draco;

using Words = std::array<uint32_t, 4>;

static Words words(Philox block) { return {block.word[0], block.word[1], block.word[2], block.word[3]}; }

// Philox4x32-10 as section 4.3 of the paper draws it: rounds as in Random123's philox.h, all 128 bits of the counter.
static Words reference(Words counter, std::array<uint32_t, 2> key) {
  for (int round = 0; round < 10; ++round) {
    if (round > 0) {  // Weyl sequence: the golden ratio and sqrt(3) - 1
      key[0] += 0x9E3779B9;
      key[1] += 0xBB67AE85;
    }
    const uint64_t left = 0xD2511F53ull * counter[0], right = 0xCD9E8D57ull * counter[2];
    const auto high = [](uint64_t product) { return static_cast<uint32_t>(product >> 32); };
    const auto low = [](uint64_t product) { return static_cast<uint32_t>(product); };
    counter = {high(right) ^ counter[1] ^ key[0], low(right), high(left) ^ counter[3] ^ key[1], low(left)};
  }
  return counter;
}

// Random123's kat_vectors. draco::philox keeps the counter's last word at zero, which only the first vector does: the
// others vouch for the reference, and the reference for draco::philox.
TEST(known_answers) {
  const struct {
    Words counter;
    std::array<uint32_t, 2> key;
    Words answer;
  } vectors[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
      {{0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff},
       {0xffffffff, 0xffffffff},
       {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
      {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
       {0xa4093822, 0x299f31d0},
       {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
  };
  for (const auto& vector : vectors) {
    const Words got = reference(vector.counter, vector.key);
    for (int i = 0; i < 4; ++i) CHECK_EQ(got[i], vector.answer[i], "word ", i, ", key ", vector.key[0]);
  }
  for (int i = 0; i < 4; ++i) CHECK_EQ(philox(0, 0, 0).word[i], vectors[0].answer[i], "word ", i);
}

TEST(philox_is_the_reference) {
  std::mt19937_64 random(3);
  for (int trial = 0; trial < 100000; ++trial) {
    // Also keys and counters of few bits, as seeds and pairs are.
    const uint64_t key = random() >> random() % 64, counter = random() >> random() % 64;
    const uint32_t domain = static_cast<uint32_t>(random() >> (32 + random() % 32));
    const Words want =
        reference({uint32_t(counter), uint32_t(counter >> 32), domain, 0}, {uint32_t(key), uint32_t(key >> 32)});
    const Words got = words(philox(key, counter, domain));
    for (int i = 0; i < 4; ++i)
      CHECK_EQ(got[i], want[i], "word ", i, ", key ", key, ", counter ", counter, ", domain ", domain);
  }
}

// All signs and mantissas, against 1 + mantissa / 2^23; whatever the word's exponent bits are.
TEST(signed_weight_is_in_one_to_two) {
  double power = 0;
  for (uint32_t mantissa = 0; mantissa < 1u << 23; ++mantissa) {
    const uint32_t exponent = (mantissa * 0x9E3779B9u >> 24) << 23;
    const float want = 1 + std::ldexp(static_cast<float>(mantissa), -23);
    CHECK_EQ(signed_weight(exponent | mantissa), want, "mantissa ", mantissa);
    CHECK_EQ(signed_weight(0x80000000u | exponent | mantissa), -want, "mantissa ", mantissa);
    power += double(want) * want;
  }
  CHECK_LE(std::abs(power / (1 << 23) - kWeightPower), 1e-6);
  CHECK_LE(std::abs(kWeightPower - 7.0 / 3.0), 0.0);
}

// Of the weights as they are drawn: the mean and the mean square within five standard errors, word by word.
TEST(weights_have_mean_zero_and_their_power) {
  constexpr int kDrawn = 1 << 18;
  for (int i = 0; i < 4; ++i) {
    double sum = 0, power = 0;
    for (int pair = 0; pair < kDrawn; ++pair) {
      const double weight = signed_weight(projection_phi(4, pair).word[i]);
      sum += weight;
      power += weight * weight;
    }
    // Var w^2 = E w^4 - (7/3)^2 = 31/5 - 49/9 = 34/45.
    CHECK_LE(std::abs(sum / kDrawn), 5 * std::sqrt(kWeightPower / kDrawn), "word ", i);
    CHECK_LE(std::abs(power / kDrawn - kWeightPower), 5 * std::sqrt(34.0 / 45 / kDrawn), "word ", i);
  }
}

// No block of random words serves twice: not for two pairs or chunks, not in phi and in psi, not for two seeds.
TEST(phi_and_psi_differ) {
  std::set<Words> blocks;
  size_t drawn = 0;
  for (uint64_t seed : {uint64_t{0}, uint64_t{1}, uint64_t{1} << 32, ~uint64_t{0}}) {
    for (int pair = 0; pair < kChunkPairs; ++pair, ++drawn) blocks.insert(words(projection_phi(seed, pair)));
    for (int64_t chunk = 0; chunk < kChunkPairs; ++chunk, ++drawn) blocks.insert(words(projection_psi(seed, chunk)));
    for (int bit = 10; bit < 40; ++bit, ++drawn)  // chunks of messages of up to 2^50 columns
      blocks.insert(words(projection_psi(seed, int64_t{1} << bit)));
  }
  CHECK_EQ(blocks.size(), drawn);
}

TEST(domains_of_phi_and_psi) {
  for (uint64_t seed : {uint64_t{0}, uint64_t{0x123456789abcdef0}}) {
    for (int i : {0, 1, 511}) {
      CHECK_EQ(words(projection_phi(seed, i)) == words(philox(seed, i, 1)), true, "seed ", seed, ", pair ", i);
      CHECK_EQ(words(projection_psi(seed, i)) == words(philox(seed, i, 2)), true, "seed ", seed, ", chunk ", i);
    }
  }
}

// What the factors are for: within a tile, every pair of columns has a weight of its own in every projection.
TEST(columns_of_a_tile_share_no_weight) {
  for (int i = 0; i < kMostProjections; ++i) {
    std::set<double> weights;
    for (int64_t pair = 0; pair < kTile / 2; ++pair) {
      const double phi = signed_weight(projection_phi(5, static_cast<int>(pair % kChunkPairs)).word[i]);
      const double psi = signed_weight(projection_psi(5, pair / kChunkPairs).word[i]);
      weights.insert(phi * psi);  // exact
    }
    CHECK_EQ(weights.size(), static_cast<size_t>(kTile / 2), "projection ", i);
  }
}

TEST(tiles_and_their_projections) {
  const struct {
    int64_t length, tiles;
    int projections;
  } cases[] = {
      {0, 0, 4},     {1, 1, 4},      {32767, 1, 4},  {32768, 1, 4},
      {32769, 2, 4}, {131072, 4, 4}, {131073, 5, 2}, {int64_t{1} << 40, int64_t{1} << 25, 2},
  };
  for (const auto& c : cases) {
    CHECK_EQ(tile_count(c.length), c.tiles, "length ", c.length);
    CHECK_EQ(projections_per_tile(c.length), c.projections, "length ", c.length);
  }
}

int main() { return check::run(); }

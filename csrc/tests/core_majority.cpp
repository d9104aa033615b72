#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <vector>

#include "core/majority.h"
#include "tests/check.h"

using namespace draco;

// ---------------------------------------------------------------------------------------------- agreement_needed

// In a group of 2s+1 of which f are missing, e bad members are outvoted while 2e + f <= 2s.
TEST(agreement_of_a_smallest_group) {
  for (int s = 0; s <= 40; ++s) {
    for (int f = 0; f <= 2 * s; ++f) {
      int outvoted = 0;
      while (2 * (outvoted + 1) + f <= 2 * s) ++outvoted;
      const int present = 2 * s + 1 - f;
      CHECK_EQ(agreement_needed(present, s), present - outvoted, "s = ", s, ", ", f, " missing");
    }
  }
}

// In larger ones: at most s are bad, and those who agree must be more than half.
TEST(agreement_of_larger_groups) {
  for (int s = 0; s <= 20; ++s) {
    for (int members = 2 * s + 1; members <= 2 * s + 20; ++members) {
      for (int present = 1; present <= members; ++present) {
        int most = 0;
        for (int bad = 0; bad <= s; ++bad)
          if (2 * (present - bad) > present) most = bad;
        const int needed = agreement_needed(present, s);
        CHECK_EQ(needed, present - most, "s = ", s, ", ", present, " of ", members);
        CHECK_EQ(agreement_needed(present, s + 1) <= needed, true, "more adversaries, more agreement: s = ", s);
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------- majorities

// The words of all members, each lane a vote of its own, and for each lane whether more than half are set.
struct Votes {
  std::vector<uint64_t> word;
  uint64_t majority = 0;

  void set_lane(int lane, const std::vector<bool>& votes) {
    for (size_t j = 0; j < votes.size(); ++j) word[j] |= uint64_t{votes[j]} << lane;
    const auto set = std::count(votes.begin(), votes.end(), true);
    majority |= uint64_t{2 * static_cast<size_t>(set) > votes.size()} << lane;
  }
};

template <typename Word, int kPlanes>
static void check_counter(const Votes& votes) {
  const int members = static_cast<int>(votes.word.size());
  MajorityCounter<Word, kPlanes> counter;
  counter.start(members);
  for (uint64_t word : votes.word) counter.add(static_cast<Word>(word));
  CHECK_EQ(counter.verdict, static_cast<Word>(votes.majority), members, " members, ", kPlanes, " planes of ",
           sizeof(Word), " bytes");
}

// With every number of planes that can count the members: the counter starts at 2^planes - (m/2 + 1) >= 0.
template <typename Word, int kPlanes = 8>
static void check_counters(const Votes& votes) {
  if constexpr (kPlanes > 0) {
    if (votes.word.size() / 2 + 1 > 1u << kPlanes) return;
    check_counter<Word, kPlanes>(votes);
    check_counters<Word, kPlanes - 1>(votes);
  }
}

TEST(counter_on_every_pattern_of_few_members) {
  for (int members = 1; members <= 12; ++members) {
    for (int first = 0; first < 1 << members; first += 64) {
      Votes votes{std::vector<uint64_t>(members)};
      for (int lane = 0; lane < 64; ++lane) {
        std::vector<bool> lane_votes(members);
        for (int j = 0; j < members; ++j) lane_votes[j] = (first + lane) >> j & 1;
        votes.set_lane(lane, lane_votes);
      }
      check_counters<uint64_t>(votes);
    }
  }
}

// Up to what 8 planes can count, with totals around one half, none, all, and anything between.
TEST(counter_on_many_members) {
  std::mt19937_64 random(7);
  for (int members = 1; members <= 511; ++members) {
    Votes votes{std::vector<uint64_t>(members)};
    for (int lane = 0; lane < 64; ++lane) {
      const int near_half = members / 2 - 1 + lane % 4, any = static_cast<int>(random() % (members + 1));
      const int set = lane < 4 ? 0 : lane < 8 ? members : lane < 56 ? std::clamp(near_half, 0, members) : any;
      std::vector<bool> lane_votes(members);
      std::fill_n(lane_votes.begin(), set, true);
      if (lane % 8 < 6) std::shuffle(lane_votes.begin(), lane_votes.end(), random);  // else the set ones come first
      if (lane % 8 == 7) std::reverse(lane_votes.begin(), lane_votes.end());
      votes.set_lane(lane, lane_votes);
    }
    check_counters<uint64_t>(votes);
    check_counters<uint32_t>(votes);
    check_counters<uint16_t>(votes);  // promoted to int in every operation
  }
}

typedef uint16_t Vector __attribute__((vector_size(16)));

TEST(vectors_vote_as_their_elements) {
  std::mt19937_64 random(8);
  for (int members : {3, 4, 7, 20}) {
    MajorityCounter<Vector, 4> counter;
    MajorityCounter<uint16_t, 4> each[8];
    counter.start(members);
    for (auto& element : each) element.start(members);
    for (int j = 0; j < members; ++j) {
      Vector word;
      for (int i = 0; i < 8; ++i) each[i].add(word[i] = static_cast<uint16_t>(random()));
      counter.add(word);
    }
    for (int i = 0; i < 8; ++i) CHECK_EQ(uint16_t{counter.verdict[i]}, each[i].verdict, members, " members");
  }
}

TEST(counter_starts_afresh) {
  MajorityCounter<uint32_t, 2> counter;
  for (int round = 0; round < 2; ++round) {
    counter.start(5);
    for (int j = 0; j < 5; ++j) counter.add(round == 0 ? ~0u : 0u);
    CHECK_EQ(counter.verdict, round == 0 ? ~0u : 0u);
  }
}

TEST(majority_of_three) {
  // Bit i of each word is its vote in row i of the truth table.
  CHECK_EQ(majority3<uint32_t>(0b11110000, 0b11001100, 0b10101010), 0b11101000u);
  CHECK_EQ(majority3<uint64_t>(uint64_t{0xf0} << 56, uint64_t{0xcc} << 56, uint64_t{0xaa} << 56), uint64_t{0xe8} << 56);
  std::mt19937_64 random(9);
  for (int trial = 0; trial < 1000; ++trial) {
    Vector word[3], got;
    for (int i = 0; i < 24; ++i) word[i / 8][i % 8] = static_cast<uint16_t>(random());
    got = majority3(word[0], word[1], word[2]);
    for (int i = 0; i < 8; ++i) {
      MajorityCounter<uint16_t, 1> counter;
      counter.start(3);
      for (const Vector& w : word) counter.add(w[i]);
      CHECK_EQ(uint16_t{got[i]}, counter.verdict);
    }
  }
}

// ---------------------------------------------------------------------------------------------- within

template <typename T>
struct Type;
template <>
struct Type<float> {
  static constexpr const char* kName = "float";
  static constexpr int kMantissa = 23;
};
template <>
struct Type<double> {
  static constexpr const char* kName = "double";
  static constexpr int kMantissa = 52;
};
template <>
struct Type<Half> {
  static constexpr const char* kName = "float16";
  static constexpr int kMantissa = 10;
};
template <>
struct Type<BFloat16> {
  static constexpr const char* kName = "bfloat16";
  static constexpr int kMantissa = 7;
};

constexpr double kHuge = HUGE_VAL;

template <typename T>
static void check_values() {
  using Bits = typename Element<T>::Bits;
  using Sum = typename Element<T>::Sum;
  const double below_one = std::nextafter(Sum{1}, Sum{0}), below_quarter = std::nextafter(Sum{0.25}, Sum{0});
  const struct {
    double x, winner, atol, rtol;
    bool within;
  } cases[] = {
      {1, 1, 0, 0, true},
      {1, -1, 0, 0, false},
      {0.0, -0.0, 0, 0, true},  // other bits, but no gap
      {-0.0, 0.0, 0, 0, true},
      // atol alone, on the boundary and a last bit inside it
      {3, 2, 1, 0, true},
      {3, 2, below_one, 0, false},
      {2, 3, 1, 0, true},
      {2, 3, below_one, 0, false},
      {-3, -2, 1, 0, true},
      {-3, -2, below_one, 0, false},
      {-0.5, 0.5, 1, 0, true},
      {-0.5, 0.5, below_one, 0, false},
      {0, 1, 1, 0, true},
      // rtol alone, likewise
      {10, 8, 0, 0.25, true},
      {10, 8, 0, below_quarter, false},
      {6, 8, 0, 0.25, true},
      {6, 8, 0, below_quarter, false},
      {-10, -8, 0, 0.25, true},
      {-10, -8, 0, below_quarter, false},
      {10, -8, 0, 2, false},
      {10, -8, 0, 2.25, true},
      {1, 0, 0, 1000, false},
      // relative to the winner, not to x
      {5, 8, 0, 0.5, true},
      {8, 5, 0, 0.5, false},
      {-5, -8, 0, 0.5, true},
      {-8, -5, 0, 0.5, false},
      // both: 1 + 0.5 * 8 = 5
      {12, 8, 1, 0.5, true},
      {13.125, 8, 1, 0.5, false},
      {4, 8, 1, 0.5, true},
      {2.875, 8, 1, 0.5, false},
      {-12, -8, 1, 0.5, true},
      {-13.125, -8, 1, 0.5, false},
      // an infinity is good only where the winner is the same one, whatever is tolerated
      {kHuge, kHuge, 0, 0, true},
      {-kHuge, -kHuge, 0, 0, true},
      {kHuge, -kHuge, 0, 1, false},
      {-kHuge, kHuge, 0, 1, false},
      {kHuge, 1, 1e30, 1, false},
      {-kHuge, 1, 1e30, 1, false},
      {1, kHuge, 0, 1, false},
      {1, -kHuge, 1e30, 1, false},
      {kHuge, kHuge, 1e30, 1, true},
      {kHuge, -kHuge, kHuge, kHuge, false},
      {1, kHuge, kHuge, kHuge, false},
      {1, 100, kHuge, 0, true},
  };
  for (const auto& c : cases) {
    const Bits x = bits_of<T>(static_cast<Sum>(c.x)), winner = bits_of<T>(static_cast<Sum>(c.winner));
    CHECK_EQ(within<T>(x, winner, c.atol, c.rtol), c.within, Type<T>::kName, " ", c.x, " and ", c.winner, ", atol ",
             c.atol, ", rtol ", c.rtol);
  }
}
TEST(within_on_values) {
  check_values<float>();
  check_values<double>();
  check_values<Half>();
  check_values<BFloat16>();
}

template <typename T>
static void check_nans() {
  using Bits = typename Element<T>::Bits;
  constexpr Bits sign = Bits{1} << (8 * sizeof(Bits) - 1), last = 1;
  constexpr Bits inf = static_cast<Bits>((sign - 1) & ~((Bits{1} << Type<T>::kMantissa) - 1));
  constexpr Bits quiet = inf | Bits{1} << (Type<T>::kMantissa - 1);
  const Bits nans[] = {quiet, Bits(quiet | last), Bits(inf | last), Bits(sign | quiet), Bits(sign - 1)};
  const Bits numbers[] = {0, sign, 1, inf, Bits(sign | inf), Bits(inf - 1)};
  for (double tolerance : {0.0, 1.0, 1e30, kHuge}) {
    for (Bits nan : nans) {
      for (Bits other : nans) {
        CHECK_EQ(within<T>(nan, other, tolerance, tolerance), true, Type<T>::kName, " ", nan, " and ", other,
                 ", tolerance ", tolerance);
      }
      for (Bits number : numbers) {
        CHECK_EQ(within<T>(nan, number, tolerance, tolerance), false, Type<T>::kName, " ", nan, " and ", number);
        CHECK_EQ(within<T>(number, nan, tolerance, tolerance), false, Type<T>::kName, " ", number, " and ", nan);
      }
    }
  }
  // Subnormals are not flushed: the least one is no further from zero than itself, but further than nothing.
  const double least = value_of<T>(1);
  CHECK_EQ(within<T>(1, 0, least, 0), true, Type<T>::kName);
  CHECK_EQ(within<T>(1, 0, 0, 0), false, Type<T>::kName);
  CHECK_EQ(within<T>(1, Bits(sign | 1), 2 * least, 0), true, Type<T>::kName);
  CHECK_EQ(within<T>(1, Bits(sign | 1), least, 0), false, Type<T>::kName);
}
TEST(within_takes_all_nans_for_the_same) {
  check_nans<float>();
  check_nans<double>();
  check_nans<Half>();
  check_nans<BFloat16>();
}

// The gap of two large numbers may be infinite in the type that it is computed in.
TEST(within_where_the_gap_overflows) {
  const float large = std::numeric_limits<float>::max();
  const double largest = std::numeric_limits<double>::max();
  CHECK_EQ(within<float>(bits_of<float>(large), bits_of<float>(-large), large, 1), false);
  CHECK_EQ(within<float>(bits_of<float>(large), bits_of<float>(0), large, 0), true);
  CHECK_EQ(within<double>(bits_of<double>(largest), bits_of<double>(-largest), largest, 1), false);
  CHECK_EQ(within<double>(bits_of<double>(largest), bits_of<double>(0), largest, 0), true);
  CHECK_EQ(within<Half>(0x7bff, 0xfbff, 131008, 0), true);  // 65504 and -65504, in float
  CHECK_EQ(within<Half>(0x7bff, 0xfbff, 131007, 0), false);
  // rtol times the winner may be infinite as well; the gap is not.
  CHECK_EQ(within<float>(bits_of<float>(0), bits_of<float>(large), 0, 2), true);
}

// Random numbers of like size against the definition in long double, but where rounding may decide.
template <typename T>
static void check_random() {
  using Sum = typename Element<T>::Sum;
  const double unit = sizeof(Sum) == 4 ? 0x1p-20 : 0x1p-49;
  std::mt19937_64 random(10);
  std::uniform_real_distribution<double> uniform(-1, 1);
  int decided[2] = {};
  for (int trial = 0; trial < 50000; ++trial) {
    const double size = std::ldexp(1.0, static_cast<int>(random() % 21) - 10);
    const auto w = bits_of<T>(static_cast<Sum>(size * uniform(random)));
    const auto x = bits_of<T>(static_cast<Sum>(value_of<T>(w) + size * uniform(random) / 4));
    const double atol = trial % 3 == 0 ? 0 : size * std::abs(uniform(random)) / 4;
    const double rtol = trial % 3 == 1 ? 0 : std::abs(uniform(random)) / 4;
    const long double winner = value_of<T>(w), gap = std::abs(value_of<T>(x) - winner);
    const long double bound = atol + rtol * std::abs(winner);
    if (std::abs(gap - bound) <= unit * size) continue;
    CHECK_EQ(within<T>(x, w, atol, rtol), gap <= bound, Type<T>::kName, " ", value_of<T>(x), " and ", value_of<T>(w),
             ", atol ", atol, ", rtol ", rtol);
    ++decided[gap <= bound];
  }
  CHECK_LE(10000, std::min(decided[0], decided[1]), "the test itself: both verdicts are common");
}
TEST(within_on_random_numbers) {
  check_random<float>();
  check_random<double>();
  check_random<Half>();
  check_random<BFloat16>();
}

int main() { return check::run(); }

// Votes over the members of a group, one element (one word) at a time.
#pragma once

#include "core/half.h"

namespace draco {
namespace {

// How many of `present` members must agree for the guarantee to hold: all but those that may be bad. With f of a group
// of 2s+1 missing, e bad ones are outvoted while 2e + f <= 2s.
DRACO_HD int agreement_needed(int present, int adversaries) {
  const int outvoted = (present - 1) / 2;
  return present - (adversaries < outvoted ? adversaries : outvoted);
}

// Bitwise majority of an odd or even number of words: a bit is set where more than half of the words set it. Counts on
// bit planes with a ripple-carry adder that starts at 2^planes - (m/2 + 1), so that the carry out of the top plane is
// the verdict. Word is an unsigned integer or a vector of them.
template <typename Word, int kPlanes>
struct MajorityCounter {
  Word plane[kPlanes];
  Word verdict;

  DRACO_MEMBER void start(int members) {
    const unsigned first = (1u << kPlanes) - static_cast<unsigned>(members / 2 + 1);
    for (int p = 0; p < kPlanes; ++p) plane[p] = (first >> p & 1u) ? ~Word{} : Word{};
    verdict = Word{};
  }
  DRACO_MEMBER void add(Word word) {
    for (int p = 0; p < kPlanes; ++p) {
      const Word carry = plane[p] & word;
      plane[p] ^= word;
      word = carry;
    }
    verdict |= word;
  }
};

template <typename Word>
DRACO_HD Word majority3(Word a, Word b, Word c) {
  return (a & b) | ((a | b) & c);
}

template <typename Sum>
constexpr Sum kLargest =
    sizeof(Sum) == 4 ? static_cast<Sum>(3.40282346638528859812e38) : static_cast<Sum>(1.7976931348623157e308);

// Whether x is as good as the winner: the same bits, both NaN, or both numbers and no further apart than the tolerance.
template <typename T>
DRACO_HD bool within(typename Element<T>::Bits x, typename Element<T>::Bits winner, double atol, double rtol) {
  using Sum = typename Element<T>::Sum;
  const Sum a = value_of<T>(x), w = value_of<T>(winner);
  const Sum gap = a > w ? a - w : w - a, size = w < 0 ? -w : w;
  // An infinite gap is never tolerated, though rtol times an infinite winner would be infinite too. No sum of a product
  // here: a compiler may round it once or twice, and every device must say the same.
  return (x == winner) | ((a != a) & (w != w)) |
         ((gap - static_cast<Sum>(atol) <= static_cast<Sum>(rtol) * size) & (gap <= kLargest<Sum>));
}

}  // namespace
}  // namespace draco

// Votes among the members of one group.
#include "core/half.h"
#include "core/limits.h"
#include "core/majority.h"
#include "cpu/kernels/set.h"
#include "cpu/kernels/vectors.h"

namespace draco {
namespace {

constexpr int kVoteBlock = 1024;  // medians wait here before they are compared and summed

// The winner of one vector of columns; kMembers = 0 takes the number at run time, up to what kPlanes can count.
template <typename T, int kMembers, int kPlanes, typename Load>
DRACO_HD Vector<T> majority(int members, Load&& row) {
  if constexpr (kMembers == 1) {
    return row(0);
  } else if constexpr (kMembers == 3) {
    return majority3(row(0), row(1), row(2));
  } else {
    static_assert(kMembers / 2 + 1 <= 1 << kPlanes, "the counter must be able to start below zero");
    MajorityCounter<Vector<T>, kPlanes> counter;
    counter.start(members);
    for (int j = 0; j < members; ++j) counter.add(row(j));
    return counter.verdict;
  }
}

// Coordinate-wise lower median in the total order of floats (-NaN < -inf < ... < -0 < +0 < ... < NaN), by an odd-even
// transposition sort of whole vectors.
template <typename T, int kMembers, typename Load>
DRACO_HD Vector<T> median(int members, Load&& row, [[maybe_unused]] Vector<T>* scratch) {
  constexpr int kTop = 8 * sizeof(T) - 1;
  if (members < 1) __builtin_unreachable();  // else GCC takes `key` for uninitialised
  [[maybe_unused]] Vector<T> own[kMembers ? kMembers : 1];
  Vector<T>* key = kMembers ? own : scratch;
  for (int j = 0; j < members; ++j) {
    const Vector<T> bits = row(j);
    const Vector<T> negative = -(bits >> kTop);  // all ones where the sign bit is set
    key[j] = bits ^ (negative | (Vector<T>{} + static_cast<T>(T{1} << kTop)));
  }
  for (int round = 0; round < members; ++round) {
    for (int j = round & 1; j + 1 < members; j += 2) {
      const Vector<T> a = key[j], b = key[j + 1];
      key[j] = a < b ? a : b;
      key[j + 1] = a < b ? b : a;
    }
  }
  const Vector<T> middle = key[(members - 1) / 2];
  const Vector<T> positive = -(middle >> kTop);
  return middle ^ (~positive | (Vector<T>{} + static_cast<T>(T{1} << kTop)));
}

// Half a vector of 16-bit numbers as floats.
template <typename T>
DRACO_HD Vector<float> widen(const uint16_t* from) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, Half>) {
    __m256i half;
    memcpy(&half, from, sizeof(half));
    return (Vector<float>)_mm512_maskz_cvtph_ps(0xffff, half);
  }
#elif defined(__F16C__)
  if constexpr (std::is_same_v<T, Half>) {
    __m128i half;
    memcpy(&half, from, sizeof(half));
    return (Vector<float>)_mm256_cvtph_ps(half);
  }
#endif
  typedef uint16_t Narrow __attribute__((vector_size(kBytes / 2)));
  Narrow half;
  memcpy(&half, from, sizeof(half));
  const auto bits = __builtin_convertvector(half, Vector<uint32_t>);
  if constexpr (std::is_same_v<T, BFloat16>) {
    return (Vector<float>)(bits << 16);
  } else {  // to_float (core/half.h), on vectors
    const Vector<uint32_t> rest = (bits & 0x7fffu) << 13;
    const auto scaled = (Vector<uint32_t>)((Vector<float>)rest * 0x1p112f);
    return (Vector<float>)((bits & 0x8000u) << 16 | (rest >= 0x7c00u << 13 ? rest | 0x7f800000u : scaled));
  }
}

// sum (+)= the values of a vector of winners.
template <typename T>
DRACO_HD void add_values(Vector<typename Element<T>::Bits> winner, typename Element<T>::Sum* sum, bool first) {
  if constexpr (sizeof(T) == 2) {
    constexpr int kHalf = VectorOf<float>::kSize;
    uint16_t bits[2 * kHalf];
    store(bits, winner);
    DRACO_UNROLL for (int h = 0; h < 2; ++h) {
      const Vector<float> value = widen<T>(bits + h * kHalf);
      store(sum + h * kHalf, first ? value : load(sum + h * kHalf) + value);
    }
  } else {
    const auto value = (Vector<T>)winner;
    store(sum, first ? value : load(sum) + value);
  }
}

// Arrays for a vote among many members, which may be too large for a thread's stack.
template <typename T>
struct VoteScratch {
  using Bits = typename Element<T>::Bits;
  Vector<Bits>*key, *differ, *padded;
  const Bits** rows;

  VoteScratch(void* bytes, int members)
      : key(static_cast<Vector<Bits>*>(bytes)),
        differ(key + members),
        padded(differ + members),
        rows(reinterpret_cast<const Bits**>(padded + members)) {
    static_assert(3 * sizeof(Vector<Bits>) + sizeof(Bits*) <= kVoteScratch, "a vote finds its scratch too small");
  }
};

// `columns` is a multiple of the vector. out: where winners go as bits, or nullptr where they are summed at once.
template <typename T, int kMembers, int kPlanes, bool kTolerant, bool kSum>
void vote_loop(const typename Element<T>::Bits* const* rows, int count, int64_t columns, typename Element<T>::Bits* out,
               typename Element<T>::Sum* sum, bool first, uint8_t* differs, const VoteScratch<T>& scratch) {
  using Bits = typename Element<T>::Bits;
  constexpr int kStep = VectorOf<Bits>::kSize, kVectors = kLine / kBytes;
  const int members = kMembers ? kMembers : count;
  // Few members' in registers; copies of the pointers, which stores cannot be thought to change.
  [[maybe_unused]] Vector<Bits> own_differ[kMembers ? kMembers : 1];
  [[maybe_unused]] const Bits* own_from[kMembers ? kMembers : 1];
  Vector<Bits>* differ = own_differ;
  const Bits* const* from = own_from;
  if constexpr (kMembers == 0) {
    differ = scratch.differ;
    from = rows;
  }
  for (int j = 0; j < members; ++j) {
    differ[j] = Vector<Bits>{};
    if constexpr (kMembers > 0) own_from[j] = rows[j];
  }
  const auto vote_at = [&](int64_t c) __attribute__((always_inline)) {
    const auto row = [&](int j) __attribute__((always_inline)) { return load(from[j] + c); };
    Vector<Bits> winner;
    if constexpr (kTolerant) {
      winner = median<Bits, kMembers>(members, row, scratch.key);
    } else {
      winner = majority<Bits, kMembers, kPlanes>(members, row);
      for (int j = 0; j < members; ++j) differ[j] |= row(j) ^ winner;
    }
    if constexpr (kSum) {
      add_values<T>(winner, sum + c, first);
    } else {
      store(out + c, winner);
    }
  };
  int64_t c = 0;
  for (; c + kVectors * kStep <= columns; c += kVectors * kStep) {
    for (int j = 0; j < members; ++j) fetch_ahead(from[j] + c);
    DRACO_UNROLL for (int v = 0; v < kVectors; ++v) vote_at(c + v * kStep);
  }
  for (; c < columns; c += kStep) vote_at(c);
  if constexpr (!kTolerant) {
    for (int j = 0; j < members; ++j) differs[j] |= any<Bits>(differ[j]);
  }
}

template <typename T, bool kTolerant, bool kSum, typename... Args>
DRACO_HD void vote_members(const typename Element<T>::Bits* const* rows, int members, Args... args) {
  switch (members) {
    case 1:
      return vote_loop<T, 1, 1, kTolerant, kSum>(rows, members, args...);
    case 3:
      return vote_loop<T, 3, 1, kTolerant, kSum>(rows, members, args...);
    case 4:
      return vote_loop<T, 4, 2, kTolerant, kSum>(rows, members, args...);
    case 5:
      return vote_loop<T, 5, 2, kTolerant, kSum>(rows, members, args...);
    case 7:
      return vote_loop<T, 7, 2, kTolerant, kSum>(rows, members, args...);
    case 11:
      return vote_loop<T, 11, 3, kTolerant, kSum>(rows, members, args...);
    default:
      if (members < 16) return vote_loop<T, 0, 3, kTolerant, kSum>(rows, members, args...);
      return vote_loop<T, 0, kVotePlanes, kTolerant, kSum>(rows, members, args...);
  }
}

}  // namespace

namespace DRACO_ISA {

template <typename T>
void vote(const VoteChunk& chunk) {
  using Bits = typename Element<T>::Bits;
  using Sum = typename Element<T>::Sum;
  constexpr int kStep = VectorOf<Bits>::kSize;
  const int members = chunk.members;
  auto* sum = static_cast<Sum*>(chunk.sum);
  const VoteScratch<T> scratch(chunk.scratch, members);
  const Bits** rows = scratch.rows;
  Bits winners[kVoteBlock];

  for (int64_t begin = 0; begin < chunk.columns;) {
    const int64_t left = chunk.columns - begin;
    // Exact: one run over all whole vectors. Otherwise block by block through `winners`.
    const bool direct = !chunk.tolerant && left >= kStep;
    int64_t width = direct ? left / kStep * kStep : left < kVoteBlock ? left : kVoteBlock;
    for (int j = 0; j < members; ++j) rows[j] = static_cast<const Bits*>(chunk.rows[j]) + begin;
    if (direct) {
      if (sum != nullptr) {
        vote_members<T, false, true>(rows, members, width, static_cast<Bits*>(nullptr), sum + begin, chunk.first,
                                     chunk.differs, scratch);
      } else {
        vote_members<T, false, false>(rows, members, width, static_cast<Bits*>(chunk.winner) + begin, sum, true,
                                      chunk.differs, scratch);
      }
    } else {
      if (width >= kStep) {
        width = width / kStep * kStep;
      } else {  // the last columns of the chunk, copied to where whole vectors may be read
        for (int j = 0; j < members; ++j) {
          auto* padded = reinterpret_cast<Bits*>(scratch.padded + j);
          memset(padded, 0, kBytes);
          memcpy(padded, rows[j], width * sizeof(Bits));
          rows[j] = padded;
        }
      }
      const int64_t whole = (width + kStep - 1) / kStep * kStep;
      if (chunk.tolerant) {
        vote_members<T, true, false>(rows, members, whole, winners, sum, true, chunk.differs, scratch);
        for (int j = 0; j < members; ++j) {
          uint8_t bad = 0;
          for (int64_t c = 0; c < width; ++c) bad |= !within<T>(rows[j][c], winners[c], chunk.atol, chunk.rtol);
          chunk.differs[j] |= bad;
        }
      } else {
        vote_members<T, false, false>(rows, members, whole, winners, sum, true, chunk.differs, scratch);
      }
      if (sum == nullptr) {
        memcpy(static_cast<Bits*>(chunk.winner) + begin, winners, width * sizeof(Bits));
      } else if (chunk.first) {
        for (int64_t c = 0; c < width; ++c) sum[begin + c] = value_of<T>(winners[c]);
      } else {
        for (int64_t c = 0; c < width; ++c) sum[begin + c] += value_of<T>(winners[c]);
      }
    }
    begin += width;
  }
}

template void vote<float>(const VoteChunk&);
template void vote<double>(const VoteChunk&);
template void vote<Half>(const VoteChunk&);
template void vote<BFloat16>(const VoteChunk&);

}  // namespace DRACO_ISA
}  // namespace draco

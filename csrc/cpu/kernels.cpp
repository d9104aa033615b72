// Compiled once per instruction set (CMakeLists.txt) with DRACO_ISA naming it. Everything but the table at the end has
// internal linkage, and no torch header is included: see core/common.h.
#include "cpu/kernels.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "core/cyclic.h"
#include "core/digest.h"
#include "core/half.h"
#include "core/majority.h"

namespace draco {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;  // also NEON
#endif

// Streams are fetched this far ahead, line by line: the hardware's prefetchers stop at every page, and on several
// streams at once reach about three quarters of what they reach with this help (docs/performance.md).
constexpr int kLine = 64, kAhead = 512;  // bytes
DRACO_HD void fetch_ahead(const void* at) { __builtin_prefetch(static_cast<const char*>(at) + kAhead); }

// Loops over registers: must be unrolled for their arrays to become registers.
#define DRACO_UNROLL _Pragma("GCC unroll 16")

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kBytes)));
  static constexpr int kSize = kBytes / sizeof(T);
};
template <typename T>
using Vector = typename VectorOf<T>::type;

template <typename T>
DRACO_HD Vector<T> load(const T* from) {
  Vector<T> vector;
  memcpy(&vector, from, sizeof(vector));
  return vector;
}
template <typename T>
DRACO_HD void store(T* to, Vector<T> vector) {
  memcpy(to, &vector, sizeof(vector));
}
// Where a value is used several times, it shall not be loaded as often.
template <typename T>
DRACO_HD void in_register([[maybe_unused]] Vector<T>& vector) {
#if defined(__AVX512F__)
  asm("" : "+v"(vector));
#elif defined(__SSE2__)
  asm("" : "+x"(vector));
#elif defined(__aarch64__)
  asm("" : "+w"(vector));
#endif
}
// a * b + c, rounded once where the processor can. Not left to the compiler, which fuses as it finds best: the same sum
// must have the same bits wherever it is made.
template <typename T>
DRACO_HD Vector<T> multiply_add(Vector<T> a, Vector<T> b, Vector<T> c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (Vector<T>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  } else {
    return (Vector<T>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    return (Vector<T>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  } else {
    return (Vector<T>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
  }
#elif defined(__aarch64__)
  if constexpr (sizeof(T) == 4) {
    return (Vector<T>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
  } else {
    return (Vector<T>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
  }
#else
  return a * b + c;
#endif
}
template <typename T>
DRACO_HD bool any(Vector<T> vector) {
  T all = 0;
  for (int i = 0; i < VectorOf<T>::kSize; ++i) all |= vector[i];
  return all != 0;
}

// ---------------------------------------------------------------------------------------------------------- vote

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

// What a vote among many members needs: threads may have small stacks.
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
      return vote_loop<T, 0, 8, kTolerant, kSum>(rows, members, args...);
  }
}

template <typename T>
void vote(const VoteTile& tile) {
  using Bits = typename Element<T>::Bits;
  using Sum = typename Element<T>::Sum;
  constexpr int kStep = VectorOf<Bits>::kSize;
  const int members = tile.members;
  auto* sum = static_cast<Sum*>(tile.sum);
  const VoteScratch<T> scratch(tile.scratch, members);
  const Bits** rows = scratch.rows;
  Bits winners[kVoteBlock];

  for (int64_t begin = 0; begin < tile.columns;) {
    const int64_t left = tile.columns - begin;
    // Exact: one run over all whole vectors. Otherwise block by block through `winners`.
    const bool direct = !tile.tolerant && left >= kStep;
    int64_t width = direct ? left / kStep * kStep : left < kVoteBlock ? left : kVoteBlock;
    for (int j = 0; j < members; ++j) rows[j] = static_cast<const Bits*>(tile.rows[j]) + begin;
    if (direct) {
      if (sum != nullptr) {
        vote_members<T, false, true>(rows, members, width, static_cast<Bits*>(nullptr), sum + begin, tile.first,
                                     tile.differs, scratch);
      } else {
        vote_members<T, false, false>(rows, members, width, static_cast<Bits*>(tile.winner) + begin, sum, true,
                                      tile.differs, scratch);
      }
    } else {
      if (width >= kStep) {
        width = width / kStep * kStep;
      } else {  // the last columns of the tile, copied to where whole vectors may be read
        for (int j = 0; j < members; ++j) {
          auto* padded = reinterpret_cast<Bits*>(scratch.padded + j);
          memset(padded, 0, kBytes);
          memcpy(padded, rows[j], width * sizeof(Bits));
          rows[j] = padded;
        }
      }
      const int64_t whole = (width + kStep - 1) / kStep * kStep;
      if (tile.tolerant) {
        vote_members<T, true, false>(rows, members, whole, winners, sum, true, tile.differs, scratch);
        for (int j = 0; j < members; ++j) {
          uint8_t bad = 0;
          for (int64_t c = 0; c < width; ++c) bad |= !within<T>(rows[j][c], winners[c], tile.atol, tile.rtol);
          tile.differs[j] |= bad;
        }
      } else {
        vote_members<T, false, false>(rows, members, whole, winners, sum, true, tile.differs, scratch);
      }
      if (sum == nullptr) {
        memcpy(static_cast<Bits*>(tile.winner) + begin, winners, width * sizeof(Bits));
      } else if (tile.first) {
        for (int64_t c = 0; c < width; ++c) sum[begin + c] = value_of<T>(winners[c]);
      } else {
        for (int64_t c = 0; c < width; ++c) sum[begin + c] += value_of<T>(winners[c]);
      }
    }
    begin += width;
  }
}

// Past the caches, which a large result would only fill: a store there first reads what it overwrites. `to` is aligned.
template <typename T>
DRACO_HD void store_past_caches(T* to, Vector<T> vector) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)vector);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)vector);
#elif defined(__SSE2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)vector);
#else
  store(to, vector);
#endif
}

// Every NaN with the same bits (core/half.h).
template <typename T>
DRACO_HD Vector<T> canonical(Vector<T> value) {
  const auto nan = (Vector<T>)(Vector<typename Element<T>::Bits>{} + kNaNBits<T>);
  return value == value ? value : nan;
}

// A vector of sum / by as it is stored.
template <typename T>
DRACO_HD Vector<typename Element<T>::Bits> quotient(const typename Element<T>::Sum* sum, typename Element<T>::Sum by) {
  using Bits = typename Element<T>::Bits;
  constexpr int kStep = VectorOf<Bits>::kSize;
  Bits bits[kStep];
#if defined(__F16C__)
  if constexpr (std::is_same_v<T, Half>) {
    constexpr int kHalf = VectorOf<float>::kSize;
    DRACO_UNROLL for (int h = 0; h < 2; ++h) {
      const Vector<float> value = load(sum + h * kHalf) / by;
      const Vector<float> plain = canonical<float>(value);
#if defined(__AVX512F__)
      const __m256i half = _mm512_maskz_cvtps_ph(0xffff, (__m512)plain, _MM_FROUND_TO_NEAREST_INT);
#else
      const __m128i half = _mm256_cvtps_ph((__m256)plain, _MM_FROUND_TO_NEAREST_INT);
#endif
      memcpy(bits + h * kHalf, &half, sizeof(half));
    }
    return load(bits);
  }
#endif
  if constexpr (std::is_same_v<T, BFloat16>) {  // to_bfloat16 (core/half.h), on vectors
    typedef uint16_t Narrow __attribute__((vector_size(kBytes / 2)));
    constexpr int kHalf = VectorOf<float>::kSize;
    DRACO_UNROLL for (int h = 0; h < 2; ++h) {
      const Vector<float> value = load(sum + h * kHalf) / by;
      const auto word = (Vector<uint32_t>)value;
      const Vector<uint32_t> rounded = (word + 0x7fffu + (word >> 16 & 1u)) >> 16;
      const Vector<uint32_t> nan = Vector<uint32_t>{} + (kNaNBits<float> >> 16);
      const Narrow half = __builtin_convertvector(value == value ? rounded : nan, Narrow);
      memcpy(bits + h * kHalf, &half, sizeof(half));
    }
    return load(bits);
  }
  if constexpr (sizeof(T) > 2) return (Vector<Bits>)canonical<T>(load(sum) / by);
  for (int i = 0; i < kStep; ++i) bits[i] = mean_bits<T>(sum[i] / by);
  return load(bits);
}

template <typename T>
void finish(const void* from, int64_t columns, double divisor, bool large, void* to) {
  using Sum = typename Element<T>::Sum;
  using Bits = typename Element<T>::Bits;
  constexpr int kStep = VectorOf<Bits>::kSize;
  const auto* sum = static_cast<const Sum*>(from);
  auto* out = static_cast<Bits*>(to);
  const Sum by = static_cast<Sum>(divisor);
  int64_t c = 0;
  if (large && reinterpret_cast<uintptr_t>(to) % kBytes == 0) {
    for (; c + kStep <= columns; c += kStep) store_past_caches(out + c, quotient<T>(sum + c, by));
#if defined(__SSE2__)
    _mm_sfence();
#endif
  }
  for (; c + kStep <= columns; c += kStep) store(out + c, quotient<T>(sum + c, by));
  for (; c < columns; ++c) out[c] = mean_bits<T>(sum[c] / by);
}

// -------------------------------------------------------------------------------------------------- cyclic code

// Real and imaginary parts of every pair exchanged.
template <typename T>
DRACO_HD Vector<T> swap_pairs(Vector<T> v) {
#if defined(__clang__)
  Vector<T> swapped;
  for (int i = 0; i < VectorOf<T>::kSize; ++i) swapped[i] = v[i ^ 1];
  return swapped;
#else
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  Vector<Index> index;
  for (int i = 0; i < VectorOf<T>::kSize; ++i) index[i] = i ^ 1;
  return __builtin_shuffle(v, index);
#endif
}

// A complex number that vectors of pairs are multiplied with.
template <typename T>
struct PairWeight {
  Vector<T> re, im;  // the imaginary part's sign alternates
  DRACO_MEMBER PairWeight(double real, double imaginary) {
    for (int i = 0; i < VectorOf<T>::kSize; ++i) {
      re[i] = static_cast<T>(real);
      im[i] = static_cast<T>(i % 2 ? imaginary : -imaginary);
    }
  }
};

// sum + weight * v: the one way in which messages are added up, so that a sum has the same bits whoever makes it.
template <typename T>
DRACO_HD Vector<T> add_weighted(Vector<T> re, Vector<T> im, Vector<T> v, Vector<T> sum) {
  return multiply_add<T>(re, v, multiply_add<T>(im, swap_pairs<T>(v), sum));
}

template <typename T, int kCount, bool kPlain>
void weighted_sum_rows(const T* const* rows, const double* weights, int64_t columns, T* sum, bool add) {
  constexpr int kStep = VectorOf<T>::kSize, kVectors = kLine / kBytes;
  Vector<T> re[kCount], im[kCount];
  for (int j = 0; j < kCount && !kPlain; ++j) {
    const PairWeight<T> weight(weights[2 * j], weights[2 * j + 1]);
    re[j] = weight.re;
    im[j] = weight.im;
  }
  const T* from[kCount];
  for (int j = 0; j < kCount; ++j) from[j] = rows[j];
  const auto one = [&](int j, Vector<T> v, Vector<T> total) __attribute__((always_inline)) {
    if constexpr (kPlain) {
      return total + v;
    } else {
      return add_weighted<T>(re[j], im[j], v, total);
    }
  };
  int64_t c = 0;
  for (; c + kVectors * kStep <= columns; c += kVectors * kStep) {
    DRACO_UNROLL for (int j = 0; j < kCount; ++j) fetch_ahead(from[j] + c);
    DRACO_UNROLL for (int64_t at = c; at < c + kVectors * kStep; at += kStep) {
      Vector<T> total = add ? load(sum + at) : Vector<T>{};
      DRACO_UNROLL for (int j = 0; j < kCount; ++j) total = one(j, load(from[j] + at), total);
      store(sum + at, total);
    }
  }
  for (; c < columns; c += kStep) {  // the last columns, copied to where whole vectors may be read
    const size_t bytes = (columns - c < kStep ? columns - c : kStep) * sizeof(T);
    Vector<T> total = {};
    if (add) memcpy(&total, sum + c, bytes);
    for (int j = 0; j < kCount; ++j) {
      Vector<T> v = {};
      memcpy(&v, from[j] + c, bytes);
      total = one(j, v, total);
    }
    memcpy(sum + c, &total, bytes);
  }
}

template <typename T, bool kPlain>
void weighted_sum_list(const WeightedSumTile<T>& tile) {
  bool add = false;
  for (int j = 0; j < tile.count; j += 4, add = true) {
    const T* const* rows = tile.rows + j;
    const double* weights = kPlain ? nullptr : tile.weights + 2 * j;
    switch (tile.count - j) {
      case 1:
        weighted_sum_rows<T, 1, kPlain>(rows, weights, tile.columns, tile.sum, add);
        break;
      case 2:
        weighted_sum_rows<T, 2, kPlain>(rows, weights, tile.columns, tile.sum, add);
        break;
      case 3:
        weighted_sum_rows<T, 3, kPlain>(rows, weights, tile.columns, tile.sum, add);
        break;
      default:
        weighted_sum_rows<T, 4, kPlain>(rows, weights, tile.columns, tile.sum, add);
        break;
    }
  }
  if (tile.count == 0) memset(tile.sum, 0, tile.columns * sizeof(T));
}

template <typename T>
void weighted_sum(const WeightedSumTile<T>& tile) {
  if (tile.weights == nullptr) {
    weighted_sum_list<T, true>(tile);
  } else {
    weighted_sum_list<T, false>(tile);
  }
}

// ---- encoding: parts are added up in twice the precision of the message, which so is rounded once

template <typename T>
DRACO_HD Vector<T> absolute(Vector<T> v) {
  using Bits = typename Element<T>::Bits;
  return (Vector<T>)((Vector<Bits>)v & (static_cast<Bits>(~Bits{0}) >> 1));
}
// a > b ? a : b, which compilers make more of than there is.
template <typename T>
DRACO_HD Vector<T> larger(Vector<T> a, Vector<T> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    return (Vector<T>)_mm512_maskz_max_ps(0xffff, (__m512)a, (__m512)b);
  } else {
    return (Vector<T>)_mm512_maskz_max_pd(0xff, (__m512d)a, (__m512d)b);
  }
#elif defined(__AVX2__)
  if constexpr (sizeof(T) == 4) {
    return (Vector<T>)_mm256_max_ps((__m256)a, (__m256)b);
  } else {
    return (Vector<T>)_mm256_max_pd((__m256d)a, (__m256d)b);
  }
#else
  return a > b ? a : b;
#endif
}
// Whether any number of a mask is set.
DRACO_HD bool any_set(Vector<int64_t> mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return _mm256_testz_si256((__m256i)mask, (__m256i)mask) == 0;
#elif defined(__SSE2__)
  return _mm_movemask_epi8((__m128i)mask) != 0;
#else
  return any<int64_t>(mask);
#endif
}
DRACO_HD Vector<double> finite_or(Vector<double> v, Vector<double> otherwise) { return v - v == 0 ? v : otherwise; }

// a * b - rounded, where rounded is what a * b was rounded to.
DRACO_HD Vector<double> product_rest(Vector<double> a, Vector<double> b, Vector<double> rounded) {
#if defined(__AVX2__) || defined(__aarch64__)
  return multiply_add<double>(a, b, -rounded);
#else  // in halves of 26 and 27 bits
  const auto upper = [](Vector<double> v) {
    return (Vector<double>)((Vector<uint64_t>)v & ~((uint64_t{1} << 27) - 1));
  };
  const Vector<double> a1 = upper(a), a2 = a - a1, b1 = upper(b), b2 = b - b1;
  return ((a1 * b1 - rounded) + a1 * b2 + a2 * b1) + a2 * b2;
#endif
}

// Sums of weighted pairs of columns, before they are rounded.
template <typename T>
struct Encoded;

// In double: exact products of a weight, less its own rounding, and exact sums of numbers of similar size.
template <>
struct Encoded<float> {
  Vector<double> re = {}, im = {};

  DRACO_MEMBER void start(Vector<double> message, Vector<double> carry) { re = message + carry; }
  template <bool kReal>
  DRACO_MEMBER void add(const EncodingWeight& weight, Vector<double> v) {
    re = multiply_add<double>(Vector<double>{} + weight.re.hi, v, re);
    if constexpr (!kReal) im = multiply_add<double>(Vector<double>{} + weight.im.hi, v, im);
  }
  // What rounds to the message, and what is left of it.
  template <bool kReal>
  DRACO_MEMBER Vector<double> total(Vector<double>& rest) const {
    rest = Vector<double>{};
    if constexpr (kReal) return re;
    const Vector<double> swapped = swap_pairs<double>(im);
    Vector<double> sign;
    for (int i = 0; i < VectorOf<double>::kSize; ++i) sign[i] = i % 2 ? 1 : -1;
    return multiply_add<double>(sign, swapped, re);
  }
};

template <>
struct Encoded<double> {
  Vector<double> hi = {}, lo = {};

  DRACO_MEMBER void start(Vector<double> message, Vector<double> carry) {
    hi = message;
    lo = carry;
  }
  DRACO_MEMBER void add_product(Vector<double> weight, Vector<double> weight_rest, Vector<double> v) {
    Vector<double> product = weight * v;
    in_register<double>(product);  // rounded by itself
    const Vector<double> rest = multiply_add<double>(weight_rest, v, product_rest(weight, v, product));
    const Vector<double> sum = hi + product, other = sum - hi;
    lo += ((hi - (sum - other)) + (product - other)) + rest;
    hi = sum;
  }
  template <bool kReal>
  DRACO_MEMBER void add(const EncodingWeight& weight, Vector<double> v) {
    add_product(Vector<double>{} + weight.re.hi, Vector<double>{} + weight.re.lo, v);
    if constexpr (!kReal) {
      const PairWeight<double> high(0, weight.im.hi), low(0, weight.im.lo);
      add_product(high.im, low.im, swap_pairs<double>(v));
    }
  }
  template <bool kReal>
  DRACO_MEMBER Vector<double> total(Vector<double>& rest) const {
    const Vector<double> sum = hi + lo, other = sum - hi;
    const Vector<double> left = (hi - (sum - other)) + (lo - other);
    const Vector<double> whole = finite_or(sum, hi);  // something has overflowed: lo may mean nothing
    rest = whole == sum ? finite_or(left, Vector<double>{}) : Vector<double>{};
    return whole;
  }
};

// Some of a vector of T as doubles, and back, rounded.
DRACO_HD Vector<double> widen_real(const float* from) {
#if defined(__AVX512F__)
  return (Vector<double>)_mm512_maskz_cvtps_pd(0xff, _mm256_loadu_ps(from));
#elif defined(__AVX2__)
  return (Vector<double>)_mm256_cvtps_pd(_mm_loadu_ps(from));
#else
  typedef float Narrow __attribute__((vector_size(kBytes / 2)));
  Narrow narrow;
  memcpy(&narrow, from, sizeof(narrow));
  return __builtin_convertvector(narrow, Vector<double>);
#endif
}
DRACO_HD Vector<double> widen_real(const double* from) { return load(from); }
DRACO_HD void store_rounded(float* to, Vector<double> value) {
  typedef float Narrow __attribute__((vector_size(kBytes / 2)));
  const Narrow narrow = __builtin_convertvector(value, Narrow);
  memcpy(to, &narrow, sizeof(narrow));
}
DRACO_HD void store_rounded(double* to, Vector<double> value) { store(to, value); }

// The vectors of doubles that a vector of T becomes.
template <typename T>
constexpr int kWider = sizeof(double) / sizeof(T);

// Sums that are all below this part of their own terms are looked at together.
template <typename T>
constexpr double kSuspicious = sizeof(T) == 4 ? 0x1p-24 : 0x1p-53;

template <typename T, int kVectors>
__attribute__((noinline)) void cancel_block(Vector<double>* total, const T* terms, double least) {
  double largest = 0, term = 0;
  for (int i = 0; i < kCancelBlock; ++i) {
    const double value = total[i / VectorOf<double>::kSize][i % VectorOf<double>::kSize];
    const double size = value < 0 ? -value : value;
    largest = size > largest ? size : largest;
    term = terms[i] > term ? static_cast<double>(terms[i]) : term;
  }
  if (!(largest < least * term)) return;
  for (int v = 0; v < kVectors; ++v) total[v] = Vector<double>{};
}

// One step of the columns from c on. kWhole: all of them exist.
template <typename T, bool kReal, bool kWhole>
DRACO_HD void encode_step(const EncodeTile<T>& tile, double least, int64_t c) {
  constexpr int kSize = VectorOf<double>::kSize, kStep = kCancelBlock;
  constexpr int kVectors = kStep / kSize, kNarrow = kVectors / kWider<T>;
  const int64_t left = tile.columns - c, even = left + left % 2;
  alignas(64) T padded[2][kStep];
  // Where whole vectors may be read: what is not there is 0.
  const auto whole = [&](const T* from, int64_t count, int which) __attribute__((always_inline)) {
    if constexpr (kWhole) return from + c;
    memset(padded[which], 0, sizeof(padded[which]));
    memcpy(padded[which], from + c, count * sizeof(T));
    return static_cast<const T*>(padded[which]);
  };
  Encoded<T> encoded[kVectors];
  Vector<T> before[kNarrow] = {}, largest[kNarrow] = {};
  if (tile.add) {
    const T *message = whole(tile.message, even, 0), *carry = whole(tile.carry, even, 1);
    DRACO_UNROLL for (int v = 0; v < kVectors; ++v) encoded[v].start(widen_real(message + v * kSize),
                                                                     widen_real(carry + v * kSize));
    DRACO_UNROLL for (int v = 0; v < kNarrow; ++v) before[v] = absolute<T>(load(message + v * VectorOf<T>::kSize));
  }
  for (int j = 0; j < tile.count; ++j) {
    const EncodingWeight weight = tile.weights[j];
    if constexpr (kWhole)
      DRACO_UNROLL for (int i = 0; i < kStep; i += kLine / static_cast<int>(sizeof(T)))
          fetch_ahead(tile.rows[j] + c + i);
    const T* from = whole(tile.rows[j], left, 0);
    DRACO_UNROLL for (int v = 0; v < kVectors; ++v) encoded[v].template add<kReal>(weight,
                                                                                   widen_real(from + v * kSize));
    DRACO_UNROLL for (int v = 0; v < kNarrow; ++v) largest[v] =
        larger<T>(largest[v], absolute<T>(load(from + v * VectorOf<T>::kSize)));
  }
  T* message = kWhole ? tile.message + c : padded[0];
  T* carry = kWhole ? tile.carry + c : padded[1];
  alignas(64) T terms[kStep];
  DRACO_UNROLL for (int v = 0; v < kNarrow; ++v) {
    Vector<T> term = larger<T>(before[v], largest[v]);
    // Both of a pair enter both of a sum, if not of this part then of one before it.
    if constexpr (!kReal) term = larger<T>(term, swap_pairs<T>(term));
    store(terms + v * VectorOf<T>::kSize, term);
  }
  Vector<double> total[kVectors], rest[kVectors];
  Vector<int64_t> zero{}, large{};
  zero = ~zero;
  DRACO_UNROLL for (int v = 0; v < kVectors; ++v) {
    const Vector<double> term = widen_real(terms + v * kSize);
    total[v] = encoded[v].template total<kReal>(rest[v]);
    total[v] = absolute<double>(total[v]) < least * term ? Vector<double>{} : total[v];
    zero &= total[v] == 0;
    large |= absolute<double>(total[v]) > kSuspicious<T> * term;
  }
  if (!any_set(large) && any_set(~zero)) cancel_block<T, kVectors>(total, terms, least);
  DRACO_UNROLL for (int v = 0; v < kVectors; ++v) {
    store_rounded(message + v * kSize, total[v]);
    if (tile.carry == nullptr) continue;
    if constexpr (sizeof(T) == 4) rest[v] = finite_or(total[v] - widen_real(message + v * kSize), Vector<double>{});
    store_rounded(carry + v * kSize, total[v] == 0 ? Vector<double>{} : rest[v]);
  }
  if constexpr (kWhole) return;
  memcpy(tile.message + c, message, even * sizeof(T));
  if (tile.carry != nullptr) memcpy(tile.carry + c, carry, even * sizeof(T));
}

template <typename T, bool kReal>
void encode_columns(const EncodeTile<T>& tile, double least) {
  constexpr int kStep = kCancelBlock;
  int64_t c = 0;
  for (; c + kStep <= tile.columns; c += kStep) encode_step<T, kReal, true>(tile, least, c);
  for (; c < tile.columns; c += kStep) encode_step<T, kReal, false>(tile, least, c);
}

template <typename T>
void encode(const EncodeTile<T>& tile) {
  if (tile.real) {
    encode_columns<T, true>(tile, cancelling<T>(tile.weights, tile.count));
  } else {
    encode_columns<T, false>(tile, cancelling<T>(tile.weights, tile.count));
  }
}

enum class Adding { kNo, kPlain, kWeighted };

template <typename T, int kProjections, int kCount, Adding kAdding>
void project_rows(const ProjectTile<T>& tile, const int* which, bool first) {
  constexpr int kStep = VectorOf<T>::kSize, kVectors = kLanes / kStep;
  static_assert(kLanes % kStep == 0, "a step takes whole vectors");
  // Copies, which stores to the sum cannot be thought to change.
  const T* rows[kCount];
  for (int r = 0; r < kCount; ++r) rows[r] = tile.rows[which[r]];
  const T* const phi_table = tile.phi;
  T* const out = tile.sum;
  const int64_t columns = tile.columns;
  Vector<T> re[kCount], im[kCount];
  if constexpr (kAdding == Adding::kWeighted) {
    for (int r = 0; r < kCount; ++r) {
      const PairWeight<T> weight(tile.weights[2 * which[r]], tile.weights[2 * which[r] + 1]);
      re[r] = weight.re;
      im[r] = weight.im;
    }
  }

  alignas(64) double total[kCount][kProjections][kLanes] = {};
  alignas(64) double squares[kCount][kLanes] = {}, small_squares[kCount][kLanes] = {};
  alignas(64) double lane[kCount][kProjections][kLanes];
  alignas(64) T padded[kCount][kLanes];
  for (int64_t chunk = 0; chunk < columns; chunk += kChunk) {
    const int64_t chunk_end = chunk + kChunk < columns ? chunk + kChunk : columns;
    for (int64_t block = chunk; block < chunk_end; block += kBlock) {
      const int64_t block_end = block + kBlock < chunk_end ? block + kBlock : chunk_end;
      const int64_t whole = block + (block_end - block) / kLanes * kLanes;
      const size_t rest = (block_end - whole) * sizeof(T);
      alignas(64) T rest_sum[kLanes] = {};
      if (rest > 0) {  // the last columns of the message, where whole vectors may not be read
        for (int r = 0; r < kCount; ++r) {
          memset(padded[r], 0, sizeof(padded[r]));
          memcpy(padded[r], rows[r] + whole, rest);
        }
        if (kAdding != Adding::kNo && !first) memcpy(rest_sum, out + whole, rest);
      }
      // kLanes columns of every row at a step, each lane into its own partial sum; vector by vector, so that the
      // partial sums of all rows stay in registers.
      DRACO_UNROLL for (int v = 0; v < kVectors; ++v) {
        Vector<T> partial[kCount][kProjections];
        DRACO_UNROLL for (int r = 0; r < kCount; ++r) DRACO_UNROLL for (int k = 0; k < kProjections; ++k)
            partial[r][k] = Vector<T>{};
        const auto step = [&](const T* const* from, int64_t at, const T* phi, T* sum) __attribute__((always_inline)) {
          Vector<T> p[kProjections], added = {};
          DRACO_UNROLL for (int k = 0; k < kProjections; ++k) p[k] = load(phi + k * kChunk + v * kStep);
          if (kAdding != Adding::kNo && !first) added = load(sum + v * kStep);
          DRACO_UNROLL for (int r = 0; r < kCount; ++r) {
            Vector<T> z = load(from[r] + at + v * kStep);
            in_register<T>(z);
            if constexpr (kAdding == Adding::kPlain) added += z;
            if constexpr (kAdding == Adding::kWeighted) added = add_weighted<T>(re[r], im[r], z, added);
            DRACO_UNROLL for (int k = 0; k < kProjections; ++k) partial[r][k] = multiply_add<T>(p[k], z, partial[r][k]);
          }
          if (kAdding != Adding::kNo) store(sum + v * kStep, added);
        };
        for (int64_t c = block; c < whole; c += kLanes) {
          DRACO_UNROLL for (int r = 0; r < kCount; ++r) {
            if (v != r % kVectors) continue;  // each row in one of the passes
            DRACO_UNROLL for (int i = 0; i < kLanes; i += kLine / static_cast<int>(sizeof(T)))
                fetch_ahead(rows[r] + c + i);
          }
          step(rows, c, phi_table + (c - chunk), out + c);
        }
        if (rest > 0) {
          const T* from[kCount];
          DRACO_UNROLL for (int r = 0; r < kCount; ++r) from[r] = padded[r];
          step(from, 0, phi_table + (whole - chunk), rest_sum);
        }
        for (int r = 0; r < kCount; ++r) {
          DRACO_UNROLL for (int k = 0; k < kProjections; ++k) {
            alignas(64) T sums[kStep];
            store(sums, partial[r][k]);
            double* to = lane[r][k] + v * kStep;
            if (block == chunk) {
              for (int i = 0; i < kStep; ++i) to[i] = static_cast<double>(sums[i]);
            } else {
              for (int i = 0; i < kStep; ++i) to[i] += static_cast<double>(sums[i]);
            }
          }
        }
      }
      if (kAdding != Adding::kNo && rest > 0) memcpy(out + whole, rest_sum, rest);
    }
    const float* psi = tile.psi + chunk / kChunk * kMostProjections;
    for (int r = 0; r < kCount; ++r) {
      for (int k = 0; k < kProjections; ++k) {
        const double scale = psi[k];
        for (int i = 0; i < kLanes; ++i) {
          const double weighted = scale * lane[r][k][i];
          total[r][k][i] += weighted;
          squares[r][i] += weighted * weighted;
          if constexpr (sizeof(T) == 8) {
            const double small = kSmaller * weighted;
            small_squares[r][i] += small * small;
          }
        }
      }
    }
  }
  for (int r = 0; r < kCount; ++r) {
    for (int k = 0; k < kProjections; ++k) {
      double even = 0, odd = 0;
      for (int i = 0; i < kLanes; i += 2) {
        even += total[r][k][i];
        odd += total[r][k][i + 1];
      }
      tile.re[which[r] * tile.stride + k] = even;
      tile.im[which[r] * tile.stride + k] = odd;
    }
    double square = 0, small_square = 0;
    for (int i = 0; i < kLanes; ++i) {
      square += squares[r][i];
      small_square += small_squares[r][i];
    }
    tile.norm[which[r] * tile.norm_stride] = norm_of_squares<T>(square / kProjections, small_square / kProjections);
  }
}

// Rows in `which`, as many together as their partial sums leave registers for.
template <typename T, int kProjections, Adding kAdding>
void project_list(const ProjectTile<T>& tile, const int* which, int count) {
  constexpr int kTogether = 8 / kProjections;
  int done = 0;
  for (; done + kTogether <= count; done += kTogether)
    project_rows<T, kProjections, kTogether, kAdding>(tile, which + done, done == 0);
  for (; done < count; ++done) project_rows<T, kProjections, 1, kAdding>(tile, which + done, done == 0);
  if (count == 0 && kAdding != Adding::kNo) memset(tile.sum, 0, tile.columns * sizeof(T));
}

template <typename T, int kProjections>
void project_all(const ProjectTile<T>& tile) {
  if (tile.sum == nullptr) {
    project_list<T, kProjections, Adding::kNo>(tile, tile.added, tile.added_count);
  } else if (tile.weights == nullptr) {
    project_list<T, kProjections, Adding::kPlain>(tile, tile.added, tile.added_count);
  } else {
    project_list<T, kProjections, Adding::kWeighted>(tile, tile.added, tile.added_count);
  }
  project_list<T, kProjections, Adding::kNo>(tile, tile.others, tile.others_count);
}

template <typename T>
void project(const ProjectTile<T>& tile) {
  if (tile.projections == 2) {
    project_all<T, 2>(tile);
  } else {
    project_all<T, kMostProjections>(tile);
  }
}

void check_energy(const Complex* check, int checks, int workers, const double* re, const double* im, int64_t stride,
                  int64_t columns, double* energy) {
  constexpr int kWidth = 16;
  for (int64_t c = 0; c < columns; c += kWidth) {
    const int width = static_cast<int>(columns - c < kWidth ? columns - c : kWidth);
    double total[kWidth] = {};
    for (int m = 0; m < checks; ++m) {
      double sum_re[kWidth] = {}, sum_im[kWidth] = {};
      for (int j = 0; j < workers; ++j) {
        const Complex h = check[m * workers + j];
        const double *a = re + j * stride + c, *b = im + j * stride + c;
        if (width == kWidth) {
          for (int i = 0; i < kWidth; ++i) {
            sum_re[i] += h.re * a[i] - h.im * b[i];
            sum_im[i] += h.re * b[i] + h.im * a[i];
          }
        } else {
          for (int i = 0; i < width; ++i) {
            sum_re[i] += h.re * a[i] - h.im * b[i];
            sum_im[i] += h.re * b[i] + h.im * a[i];
          }
        }
      }
      for (int i = 0; i < kWidth; ++i) total[i] += sum_re[i] * sum_re[i] + sum_im[i] * sum_im[i];
    }
    for (int i = 0; i < width; ++i) energy[c + i] = total[i];
  }
}

// -------------------------------------------------------------------------------------------------------- digest

// The products of the lower and upper halves of every 64 bits.
DRACO_HD Vector<uint64_t> multiply_halves(Vector<uint64_t> x) {
#if defined(__AVX512F__)
  return (Vector<uint64_t>)_mm512_maskz_mul_epu32(0xff, (__m512i)x, (__m512i)(x >> 32));
#elif defined(__AVX2__)
  return (Vector<uint64_t>)_mm256_mul_epu32((__m256i)x, (__m256i)(x >> 32));
#elif defined(__SSE2__)
  return (Vector<uint64_t>)_mm_mul_epu32((__m128i)x, (__m128i)(x >> 32));
#elif defined(__aarch64__)
  return (Vector<uint64_t>)vmull_u32(vmovn_u64((uint64x2_t)x), vshrn_n_u64((uint64x2_t)x, 32));
#else
  return (x & 0xffffffffu) * (x >> 32);
#endif
}

constexpr int kDigestAhead = 8192;  // bytes: further than kAhead, as there is one stream alone

// Adds NH of the words of a chunk, of which there are `bytes`, to both lanes' sums. The words are added to `extra` or,
// of the first chunk, written there; kExtra: they are those themselves.
enum class Chunk { kFirst, kOther, kExtra };
template <Chunk kChunk>
DRACO_HD void digest_chunk(const uint32_t* key, const unsigned char* from, int64_t bytes, uint32_t* extra,
                           Vector<uint64_t>* sums) {
  const unsigned char* const end = from + bytes;
  const auto take = [&](int word) __attribute__((always_inline)) {
    Vector<uint32_t> words;
    memcpy(&words, from + 4 * word, sizeof(words));
    in_register<uint32_t>(words);
    if (kChunk == Chunk::kFirst) store(extra + word, words);
    if (kChunk == Chunk::kOther) store(extra + word, load(extra + word) + words);
    DRACO_UNROLL
    for (int t = 0; t < kDigestLanes; ++t)
      sums[t] += multiply_halves((Vector<uint64_t>)(words + load(key + word + kDigestShift * t)));
  };
  const auto advance = [&](int by) __attribute__((always_inline)) {
    from += by;
    key += by / 4;
    extra += by / 4;
  };
  for (; from + kLine <= end; advance(kLine)) {
    if (kChunk != Chunk::kExtra) __builtin_prefetch(from + kDigestAhead);
    DRACO_UNROLL for (int v = 0; v < kLine; v += kBytes) take(v / 4);
  }
  for (; from + kBytes <= end; advance(kBytes)) take(0);
  for (; from < end; advance(8)) {
    uint32_t pair[2] = {0, 0};
    memcpy(pair, from, end - from < 8 ? end - from : 8);
    for (int i = 0; i < 2; ++i) {
      if (kChunk == Chunk::kFirst) extra[i] = pair[i];
      if (kChunk == Chunk::kOther) extra[i] += pair[i];
    }
    for (int t = 0; t < kDigestLanes; ++t)
      sums[t][0] += digest_pair(pair[0], pair[1], key[kDigestShift * t], key[kDigestShift * t + 1]);
  }
}

void digest(const uint32_t* key, const unsigned char* from, int64_t bytes, uint64_t* sums) {
  alignas(64) uint32_t extra[kDigestChunk / 4];
  Vector<uint64_t> plain[kDigestLanes] = {}, weighted[kDigestLanes] = {};
  const auto join = [&]() __attribute__((always_inline)) {  // so the last chunk counts once, the one before it twice
    DRACO_UNROLL for (int t = 0; t < kDigestLanes; ++t) weighted[t] += plain[t];
  };
  const auto size = [&](int64_t at) { return bytes - at < kDigestChunk ? bytes - at : kDigestChunk; };
  digest_chunk<Chunk::kFirst>(key, from, size(0), extra, plain);
  join();
  for (int64_t at = kDigestChunk; at < bytes; at += kDigestChunk) {
    key += kDigestChunkKey;
    digest_chunk<Chunk::kOther>(key, from + at, size(at), extra, plain);
    join();
  }
  digest_chunk<Chunk::kExtra>(key + kDigestChunkKey, reinterpret_cast<const unsigned char*>(extra),
                              (size(0) + 7) / 8 * 8, extra, plain);
  join();
  for (int t = 0; t < kDigestLanes; ++t) {
    for (int i = 0; i < VectorOf<uint64_t>::kSize; ++i) {
      sums[2 * t] += plain[t][i];
      sums[2 * t + 1] += weighted[t][i];
    }
  }
}

}  // namespace

#define DRACO_JOIN2(a, b) a##b
#define DRACO_JOIN(a, b) DRACO_JOIN2(a, b)
#define DRACO_TEXT2(a) #a
#define DRACO_TEXT(a) DRACO_TEXT2(a)

extern const Kernels DRACO_JOIN(kKernels_, DRACO_ISA);
const Kernels DRACO_JOIN(kKernels_, DRACO_ISA) = {
    DRACO_TEXT(DRACO_ISA),
    {vote<float>, vote<double>, vote<Half>, vote<BFloat16>},
    {finish<float>, finish<double>, finish<Half>, finish<BFloat16>},
    weighted_sum<float>,
    weighted_sum<double>,
    encode<float>,
    encode<double>,
    project<float>,
    project<double>,
    check_energy,
    digest,
};

}  // namespace draco

// Compiled once per instruction set (CMakeLists.txt) with DRACO_ISA naming it. Everything but the table at the end has
// internal linkage, and no torch header is included: see core/common.h.
#include "cpu/kernels.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

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
#endif
}
template <typename T>
DRACO_HD bool any(Vector<T> vector) {
  T all = 0;
  for (int i = 0; i < VectorOf<T>::kSize; ++i) all |= vector[i];
  return all != 0;
}

// ---------------------------------------------------------------------------------------------------------- vote

constexpr int kVoteBlock = 1024;   // medians wait here before they are compared and summed
constexpr int kMostMembers = 511;  // what MajorityCounter<., 8> can count

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
DRACO_HD Vector<T> median(int members, Load&& row) {
  constexpr int kTop = 8 * sizeof(T) - 1;
  if (members < 1) __builtin_unreachable();  // else GCC takes `key` for uninitialised
  Vector<T> key[kMembers ? kMembers : kMostMembers];
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

// `columns` is a multiple of the vector. out: where winners go as bits, or nullptr where they are summed at once.
template <typename T, int kMembers, int kPlanes, bool kTolerant, bool kSum>
void vote_loop(const typename Element<T>::Bits* const* rows, int count, int64_t columns, typename Element<T>::Bits* out,
               typename Element<T>::Sum* sum, bool first, uint8_t* differs) {
  using Bits = typename Element<T>::Bits;
  constexpr int kStep = VectorOf<Bits>::kSize, kVectors = kLine / kBytes;
  const int members = kMembers ? kMembers : count;
  Vector<Bits> differ[kMembers ? kMembers : kMostMembers];
  const Bits* from[kMembers ? kMembers : kMostMembers];  // copies, which stores cannot be thought to change
  for (int j = 0; j < members; ++j) {
    differ[j] = Vector<Bits>{};
    from[j] = rows[j];
  }
  const auto vote_at = [&](int64_t c) __attribute__((always_inline)) {
    const auto row = [&](int j) __attribute__((always_inline)) { return load(from[j] + c); };
    Vector<Bits> winner;
    if constexpr (kTolerant) {
      winner = median<Bits, kMembers>(members, row);
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
  const Bits* rows[kMostMembers];
  Bits winners[kVoteBlock];
  alignas(64) Bits padded[kMostMembers][kStep];

  for (int64_t begin = 0; begin < tile.columns;) {
    const int64_t left = tile.columns - begin;
    // Exact: one run over all whole vectors. Otherwise block by block through `winners`.
    const bool direct = !tile.tolerant && left >= kStep;
    int64_t width = direct ? left / kStep * kStep : left < kVoteBlock ? left : kVoteBlock;
    for (int j = 0; j < members; ++j) rows[j] = static_cast<const Bits*>(tile.rows[j]) + begin;
    if (direct) {
      if (sum != nullptr) {
        vote_members<T, false, true>(rows, members, width, static_cast<Bits*>(nullptr), sum + begin, tile.first,
                                     tile.differs);
      } else {
        vote_members<T, false, false>(rows, members, width, static_cast<Bits*>(tile.winner) + begin, sum, true,
                                      tile.differs);
      }
    } else {
      if (width >= kStep) {
        width = width / kStep * kStep;
      } else {  // the last columns of the tile, copied to where whole vectors may be read
        for (int j = 0; j < members; ++j) {
          memset(padded[j], 0, sizeof(padded[j]));
          memcpy(padded[j], rows[j], width * sizeof(Bits));
          rows[j] = padded[j];
        }
      }
      const int64_t whole = (width + kStep - 1) / kStep * kStep;
      if (tile.tolerant) {
        vote_members<T, true, false>(rows, members, whole, winners, sum, true, tile.differs);
        for (int j = 0; j < members; ++j) {
          uint8_t bad = 0;
          for (int64_t c = 0; c < width; ++c) bad |= !within<T>(rows[j][c], winners[c], tile.atol, tile.rtol);
          tile.differs[j] |= bad;
        }
      } else {
        vote_members<T, false, false>(rows, members, whole, winners, sum, true, tile.differs);
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
      const auto nan = (Vector<float>)(((Vector<uint32_t>)value & 0x80000000u) | 0x7fc00000u);  // as to_half has it
      const Vector<float> plain = value == value ? value : nan;
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
      const Vector<uint32_t> rounded = (word + 0x7fffu + (word >> 16 & 1u)) >> 16, nan = word >> 16 | 0x40u;
      const Narrow half = __builtin_convertvector(value == value ? rounded : nan, Narrow);
      memcpy(bits + h * kHalf, &half, sizeof(half));
    }
    return load(bits);
  }
  for (int i = 0; i < kStep; ++i) bits[i] = bits_of<T>(sum[i] / by);
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
  for (; c < columns; ++c) out[c] = bits_of<T>(sum[c] / by);
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

// weight * v for vectors of pairs: real * v + imaginary * swap(v), the imaginary part's sign alternating.
template <typename T>
struct PairWeight {
  Vector<T> re, im;
  DRACO_MEMBER PairWeight(double real, double imaginary) {
    for (int i = 0; i < VectorOf<T>::kSize; ++i) {
      re[i] = static_cast<T>(real);
      im[i] = static_cast<T>(i % 2 ? imaginary : -imaginary);
    }
  }
  DRACO_MEMBER Vector<T> times(Vector<T> v) const { return re * v + im * swap_pairs<T>(v); }
};

template <typename T, int kCount>
void weighted_sum_rows(const T* const* rows, const double* weights, int64_t columns, T* sum, bool add) {
  constexpr int kStep = VectorOf<T>::kSize;
  const PairWeight<T> none(0, 0);
  PairWeight<T> weight[4] = {none, none, none, none};
  bool real = true;
  for (int j = 0; j < kCount; ++j) {
    weight[j] = PairWeight<T>(weights[2 * j], weights[2 * j + 1]);
    real &= weights[2 * j + 1] == 0;
  }
  const T* from[kCount];
  for (int j = 0; j < kCount; ++j) from[j] = rows[j];
  int64_t c = 0;
  const auto whole_lines = [&](const auto& times) __attribute__((always_inline)) {
    constexpr int kVectors = kLine / kBytes;
    for (; c + kVectors * kStep <= columns; c += kVectors * kStep) {
      DRACO_UNROLL for (int j = 0; j < kCount; ++j) fetch_ahead(from[j] + c);
      DRACO_UNROLL for (int64_t at = c; at < c + kVectors * kStep; at += kStep) {
        Vector<T> total = add ? load(sum + at) : Vector<T>{};
        DRACO_UNROLL for (int j = 0; j < kCount; ++j) total += times(weight[j], load(from[j] + at));
        store(sum + at, total);
      }
    }
  };
  if (real) {
    whole_lines([](const PairWeight<T>& w, Vector<T> v) __attribute__((always_inline)) { return w.re * v; });
  } else {
    whole_lines([](const PairWeight<T>& w, Vector<T> v) __attribute__((always_inline)) { return w.times(v); });
  }
  for (; c < columns; c += 2) {
    T re = add ? sum[c] : T{0}, im = add ? sum[c + 1] : T{0};
    for (int j = 0; j < kCount; ++j) {
      const T wr = static_cast<T>(weights[2 * j]), wi = static_cast<T>(weights[2 * j + 1]);
      re += wr * rows[j][c] - wi * rows[j][c + 1];
      im += wr * rows[j][c + 1] + wi * rows[j][c];
    }
    sum[c] = re;
    sum[c + 1] = im;
  }
}

template <typename T>
void weighted_sum(const WeightedSumTile<T>& tile) {
  bool add = tile.add;
  for (int j = 0; j < tile.count; j += 4, add = true) {
    const T* const* rows = tile.rows + j;
    const double* weights = tile.weights + 2 * j;
    switch (tile.count - j) {
      case 1:
        weighted_sum_rows<T, 1>(rows, weights, tile.columns, tile.sum, add);
        break;
      case 2:
        weighted_sum_rows<T, 2>(rows, weights, tile.columns, tile.sum, add);
        break;
      case 3:
        weighted_sum_rows<T, 3>(rows, weights, tile.columns, tile.sum, add);
        break;
      default:
        weighted_sum_rows<T, 4>(rows, weights, tile.columns, tile.sum, add);
        break;
    }
  }
  if (tile.count == 0 && !add) memset(tile.sum, 0, tile.columns * sizeof(T));
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

  alignas(64) double total[kCount][kProjections][kLanes] = {}, squares[kCount][kLanes] = {};
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
            if constexpr (kAdding == Adding::kWeighted) added += re[r] * z + im[r] * swap_pairs<T>(z);
            DRACO_UNROLL for (int k = 0; k < kProjections; ++k) partial[r][k] += p[k] * z;
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
    double energy = 0;
    for (int i = 0; i < kLanes; ++i) energy += squares[r][i];
    tile.energy[which[r] * tile.energy_stride] = energy / kProjections;
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
    project<float>,
    project<double>,
    check_energy,
    digest,
};

}  // namespace draco

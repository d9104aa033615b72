// Statistics of the values of one block of a digest, a line of the cache at a time (core/stats.h).
#pragma once

#include "core/stats.h"
#include "cpu/kernels/vectors.h"

namespace draco {
namespace {

// The values of a line as floats or doubles: in place, or of 16 bits what they are widened to.
template <typename T>
struct Line {
  const T* at;

  DRACO_MEMBER explicit Line(const unsigned char* from) : at(reinterpret_cast<const T*>(from)) {}
};

// Numbers of 16 bits without their signs; those that are not finite become anything.
template <typename T>
struct WidenedLine {
  static constexpr int kValues = kLine / sizeof(T);
  alignas(kLine) float at[kValues];

  DRACO_MEMBER explicit WidenedLine(const unsigned char* from) {
#if defined(__F16C__)
    if constexpr (std::is_same_v<T, Half>) {
      constexpr int kFloats = VectorOf<float>::kSize;
      DRACO_UNROLL for (int i = 0; i < kValues; i += kFloats) {
#if defined(__AVX512F__)
        store(at + i, (Vector<float>)_mm512_maskz_cvtph_ps(
                          0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + 2 * i))));
#else
        store(at + i, (Vector<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 2 * i))));
#endif
      }
      return;
    }
#endif
    uint16_t bits[kValues];
    memcpy(bits, from, sizeof(bits));
    for (int i = 0; i < kValues; ++i) {
      const uint32_t magnitude = bits[i] & 0x7fffu;
      if constexpr (std::is_same_v<T, Half>) {  // to_float (core/half.h) of what is finite and positive
        at[i] = bit_cast<float>(magnitude << 13) * 0x1p112f;
      } else {
        at[i] = bit_cast<float>(magnitude << 16);
      }
    }
  }
};
template <>
struct Line<Half> : WidenedLine<Half> {
  using WidenedLine::WidenedLine;
};
template <>
struct Line<BFloat16> : WidenedLine<BFloat16> {
  using WidenedLine::WidenedLine;
};

// Counts the zeros among vectors of T, which are unsigned integers.
template <typename T>
class ZeroCount {
 public:
#if defined(__AVX512F__)
  DRACO_MEMBER void take(Vector<T> values) {
    const auto v = (__m512i)values;
    if constexpr (sizeof(T) == 8) {
      total_ += __builtin_popcount(_mm512_testn_epi64_mask(v, v));
    } else if constexpr (sizeof(T) == 4) {
      total_ += __builtin_popcount(_mm512_testn_epi32_mask(v, v));
    } else {
      total_ += __builtin_popcount(_mm512_testn_epi16_mask(v, v));
    }
  }
  DRACO_MEMBER int64_t total() const { return total_; }

 private:
  int64_t total_ = 0;
#else
  DRACO_MEMBER void take(Vector<T> values) { count_ -= (Vector<T>)(values == 0); }
  DRACO_MEMBER int64_t total() const {
    int64_t total = 0;
    for (int i = 0; i < VectorOf<T>::kSize; ++i) total += count_[i];
    return total;
  }

 private:
  Vector<T> count_ = {};
#endif
};

// A vector of sums of squares in float64, and how values of T are added to it.
template <typename T>
struct Squares {
  using Sum = Vector<double>;
  static constexpr int kSize = VectorOf<double>::kSize;

  template <typename Real>
  static DRACO_MEMBER Sum add(Sum sum, const Real* from) {
    const Sum value = widen_real(from);
    return multiply_add<double>(value, value, sum);
  }
};
#if defined(__AVX512F__)
// Half a register: Zen 4 converts floats that it loads into two of these sooner than into a whole one.
template <>
struct Squares<float> {
  typedef double Sum __attribute__((vector_size(32)));
  static constexpr int kSize = 4;

  static DRACO_MEMBER Sum add(Sum sum, const float* from) {
    const __m256d value = _mm256_cvtps_pd(_mm_loadu_ps(from));
    return (Sum)_mm256_fmadd_pd(value, value, (__m256d)sum);
  }
};
#endif

struct NoStatistics {
  DRACO_MEMBER void take_line(const unsigned char*) {}
  DRACO_MEMBER void take(const unsigned char*, int64_t) {}
};

// Of values that are all finite; of others it finds out that they are not. Partial sums, in which the values take
// turns, and their order are the same for every instruction set.
template <typename T>
class FiniteStatistics {
 public:
  DRACO_MEMBER void take_line(const unsigned char* from) {
    DRACO_UNROLL for (int v = 0; v < kLine; v += kBytes) {
      Vector<Bits> words;
      memcpy(&words, from + v, sizeof(words));
      const auto magnitude = (Vector<Signed>)(words & kMagnitudeBits<T>);
      largest_ = magnitude > largest_ ? magnitude : largest_;
      zeros_.take((Vector<Bits>)magnitude);
    }
    const Line<T> line(from);
    DRACO_UNROLL for (int i = 0; i < kValues; i += kWide) {
      auto& sum = squares_[i / kWide % kSums];
      sum = Squares<T>::add(sum, line.at + i);
    }
  }
  // Less than a line.
  DRACO_MEMBER void take_rest(const unsigned char* from, int64_t bytes) {
    if (bytes == 0) return;
    alignas(kLine) unsigned char line[kLine] = {};
    memcpy(line, from, bytes);
    take_line(line);
    none_ += kValues - bytes / sizeof(T);
  }

  DRACO_MEMBER void take(const unsigned char* from, int64_t bytes) {
    const unsigned char* const end = from + bytes;
    for (; from + kLine <= end; from += kLine) take_line(from);
    take_rest(from, end - from);
  }

  DRACO_MEMBER bool all_finite() const { return largest() < kInfinityBits<T>; }
  DRACO_MEMBER Stats stats() const {
    double sum[kPartial];
    memcpy(sum, squares_, sizeof(sum));
    for (int count = kPartial / 2; count > 0; count /= 2)
      for (int i = 0; i < count; ++i) sum[i] += sum[i + count];
    const int64_t zeros = zeros_.total() - none_;
    return {sum[0], static_cast<double>(value_of<T>(largest())), 0, static_cast<double>(zeros)};
  }

 private:
  using Bits = typename Element<T>::Bits;
  using Signed = std::make_signed_t<Bits>;
  static constexpr int kValues = kLine / sizeof(T), kPartial = kValues < 16 ? kValues : 16;
  static constexpr int kWide = Squares<T>::kSize, kSums = kPartial / kWide;

  typename Squares<T>::Sum squares_[kSums] = {};
  Vector<Signed> largest_ = {};
  ZeroCount<Bits> zeros_;
  int64_t none_ = 0;  // zeros that stand for what the last line does not have

  DRACO_MEMBER Bits largest() const {
    Bits most = 0;
    for (int i = 0; i < VectorOf<Bits>::kSize; ++i) {
      const auto own = static_cast<Bits>(largest_[i]);
      most = own > most ? own : most;
    }
    return most;
  }
};

// Of a block with values that are not finite: 0 stands for them.
template <typename T>
__attribute__((noinline)) Stats stats_of_finite(const unsigned char* from, int64_t bytes) {
  using Bits = typename Element<T>::Bits;
  FiniteStatistics<T> statistics;
  int64_t nonfinite = 0;
  for (int64_t at = 0; at < bytes; at += kLine) {
    const int64_t size = bytes - at < kLine ? bytes - at : kLine;
    Bits line[kLine / sizeof(T)];
    memcpy(line, from + at, size);
    for (size_t i = 0; i < size / sizeof(T); ++i) {
      if ((line[i] & kMagnitudeBits<T>) < kInfinityBits<T>) continue;
      line[i] = 0;
      ++nonfinite;
    }
    const auto* cleaned = reinterpret_cast<const unsigned char*>(line);
    if (size == kLine) {
      statistics.take_line(cleaned);
    } else {
      statistics.take_rest(cleaned, size);
    }
  }
  Stats stats = statistics.stats();
  stats.nonfinite = static_cast<double>(nonfinite);
  stats.zeros -= static_cast<double>(nonfinite);
  return stats;
}

}  // namespace
}  // namespace draco

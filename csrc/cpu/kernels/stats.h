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
      zeros_ -= (Vector<Bits>)(magnitude == 0);
    }
    const Line<T> line(from);
    DRACO_UNROLL for (int i = 0; i < kValues; i += kWide) {
      const Vector<double> value = widen_real(line.at + i);
      Vector<double>& sum = squares_[i / kWide % kSums];
      sum = multiply_add<double>(value, value, sum);
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
    int64_t zeros = -none_;
    for (int i = 0; i < VectorOf<Bits>::kSize; ++i) zeros += zeros_[i];
    return {sum[0], static_cast<double>(value_of<T>(largest())), 0, static_cast<double>(zeros)};
  }

 private:
  using Bits = typename Element<T>::Bits;
  using Signed = std::make_signed_t<Bits>;
  static constexpr int kValues = kLine / sizeof(T), kPartial = kValues < 16 ? kValues : 16;
  static constexpr int kWide = VectorOf<double>::kSize, kSums = kPartial / kWide;

  Vector<double> squares_[kSums] = {};
  Vector<Signed> largest_ = {};
  Vector<Bits> zeros_ = {};
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

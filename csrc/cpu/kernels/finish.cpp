// Rounds a sum, divided by a number, to a result.
#include "core/half.h"
#include "cpu/kernels/set.h"
#include "cpu/kernels/vectors.h"

namespace draco {
namespace {

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

}  // namespace

namespace DRACO_ISA {

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

template void finish<float>(const void*, int64_t, double, bool, void*);
template void finish<double>(const void*, int64_t, double, bool, void*);
template void finish<Half>(const void*, int64_t, double, bool, void*);
template void finish<BFloat16>(const void*, int64_t, double, bool, void*);

}  // namespace DRACO_ISA
}  // namespace draco

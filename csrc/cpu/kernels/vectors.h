// Vectors of the instruction set that a file is compiled for. See kernels/set.h.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "core/common.h"

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

// A stream that is alone is fetched further ahead, into the second-level cache: from there the hardware's prefetchers
// fill the first-level cache just in time.
constexpr int kFarAhead = 12288;  // bytes
DRACO_HD void fetch_far_ahead(const void* at) { __builtin_prefetch(static_cast<const char*>(at) + kFarAhead, 0, 2); }

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
// And what is computed in front of it shall not be computed later, nor what follows sooner.
template <typename T>
DRACO_HD void in_order([[maybe_unused]] Vector<T>& vector) {
#if defined(__AVX512F__)
  asm volatile("" : "+v"(vector));
#elif defined(__SSE2__)
  asm volatile("" : "+x"(vector));
#elif defined(__aarch64__)
  asm volatile("" : "+w"(vector));
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
// Some numbers as a vector of doubles.
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
template <typename T>
DRACO_HD bool any(Vector<T> vector) {
  T all = 0;
  for (int i = 0; i < VectorOf<T>::kSize; ++i) all |= vector[i];
  return all != 0;
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

}  // namespace
}  // namespace draco

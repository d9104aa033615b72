// Host and device alike; no torch, no allocation. Everything in core/ has internal linkage on purpose:
// cpu/kernels/*.cpp are compiled once per instruction set, and the linker must never merge an AVX-512 copy of a
// function into the baseline.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DRACO_HD static __host__ __device__ __forceinline__
#define DRACO_MEMBER __host__ __device__ __forceinline__
// For code that a team of threads runs (core/team.h): on the device alone, where its barriers are.
#define DRACO_TEAM __device__ __forceinline__
#define DRACO_TEAM_CALL __device__ __noinline__
#else
#define DRACO_HD static inline __attribute__((always_inline))
#define DRACO_MEMBER inline __attribute__((always_inline))
#define DRACO_TEAM inline
#define DRACO_TEAM_CALL inline
#endif

namespace draco {

// std::complex multiplies with a NaN check and is not available on the device.
struct Complex {
  double re, im;
};

namespace {

DRACO_HD Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
DRACO_HD Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
DRACO_HD Complex operator*(Complex a, Complex b) { return {a.re * b.re - a.im * b.im, a.re * b.im + a.im * b.re}; }
DRACO_HD Complex operator*(double a, Complex b) { return {a * b.re, a * b.im}; }
DRACO_HD Complex conj(Complex a) { return {a.re, -a.im}; }
DRACO_HD double norm2(Complex a) { return a.re * a.re + a.im * a.im; }

template <typename To, typename From>
DRACO_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace
}  // namespace draco

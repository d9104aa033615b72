// float16 and bfloat16 as bits, converted as torch does: to nearest, ties to even. Written on integers so that
// compilers vectorise it on every instruction set.
#pragma once

#include <type_traits>

#include "core/common.h"

namespace draco {

// Types have no code that the linker could merge; files of a set of kernels share them (cpu/kernels/set.h).
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

namespace {

DRACO_HD float to_float(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

DRACO_HD float to_float(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t rest = x.bits & 0x7fffu;
  // Multiplying by 2^112 rebiases the exponent and normalises subnormals in one step; inf and NaN need the top
  // exponent.
  const uint32_t scaled = bit_cast<uint32_t>(bit_cast<float>(rest << 13) * 0x1p112f);
  const uint32_t special = (rest << 13) | 0x7f800000u;
  return bit_cast<float>(sign | (rest >= 0x7c00u ? special : scaled));
}

DRACO_HD BFloat16 to_bfloat16(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(nan ? (bits >> 16) | 0x40u : rounded)};
}

DRACO_HD Half to_half(float x) {
  const uint32_t bits = bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
  // Subnormal halves: adding 0.5 puts the half's last bit at the float's last bit and lets the hardware round.
  const uint32_t small = bit_cast<uint32_t>(bit_cast<float>(rest) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (rest - (112u << 23) + 0xfffu + ((rest >> 13) & 1u)) >> 13;
  const uint32_t large = rest > 0x7f800000u ? 0x7e00u : 0x7c00u;  // NaN, or overflow to inf
  const uint32_t magnitude = rest >= 0x477ff000u ? large : rest < 0x38800000u ? small : normal;
  return {static_cast<uint16_t>(sign | magnitude)};
}

// The types in which a dtype is stored, voted on (an integer) and averaged.
template <typename T>
struct Element;
template <>
struct Element<float> {
  using Bits = uint32_t;
  using Sum = float;
};
template <>
struct Element<double> {
  using Bits = uint64_t;
  using Sum = double;
};
template <>
struct Element<Half> {
  using Bits = uint16_t;
  using Sum = float;
};
template <>
struct Element<BFloat16> {
  using Bits = uint16_t;
  using Sum = float;
};

template <typename T>
DRACO_HD typename Element<T>::Sum value_of(typename Element<T>::Bits bits) {
  if constexpr (sizeof(T) == 2) {
    return to_float(T{bits});
  } else {
    return bit_cast<T>(bits);
  }
}

template <typename T>
DRACO_HD typename Element<T>::Bits bits_of(typename Element<T>::Sum value) {
  if constexpr (sizeof(T) > 2) {
    return bit_cast<typename Element<T>::Bits>(value);
  } else {
    T stored;
    if constexpr (std::is_same_v<T, Half>) {
      stored = to_half(value);
    } else {
      stored = to_bfloat16(value);
    }
    return stored.bits;
  }
}

// A value times a factor, rounded as torch.mul rounds it; a NaN of 16 bits is another one.
template <typename T>
DRACO_HD typename Element<T>::Bits scale(typename Element<T>::Bits bits, typename Element<T>::Sum factor) {
  return bits_of<T>(value_of<T>(bits) * factor);
}

// The bits that computed results have for every NaN, on every device: processors and GPUs differ in the bits that they
// give it.
template <typename Sum>
constexpr typename Element<Sum>::Bits kNaNBits =
    static_cast<typename Element<Sum>::Bits>(sizeof(Sum) == 4 ? 0x7fc00000u : 0x7ff8000000000000u);

template <typename T>
DRACO_HD typename Element<T>::Bits mean_bits(typename Element<T>::Sum mean) {
  using Sum = typename Element<T>::Sum;
  return bits_of<T>(mean == mean ? mean : bit_cast<Sum>(kNaNBits<Sum>));
}

}  // namespace
}  // namespace draco

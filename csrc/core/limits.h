// The largest inputs that the kernels take. Python reads the same numbers from the module (csrc/module.cpp).
#pragma once

#include <cstdint>

namespace draco {

constexpr int64_t kMostWorkers = 32767;     // kernels count them in 16 bits, with a byte of shared memory for each
constexpr int kVotePlanes = 8;              // bit planes that the votes of many members are counted on
constexpr int64_t kMostGroupMembers = 511;  // 2^(kVotePlanes + 1) - 1, as the counter starts below zero
constexpr int64_t kMostLength = int64_t{1} << 60;  // more than any memory holds; arithmetic on it cannot overflow
static_assert(kMostGroupMembers / 2 + 1 <= 1 << kVotePlanes, "the counter must be able to start below zero");

}  // namespace draco

// One set of CPU loops. Every .cpp file in this folder is compiled once per instruction set (CMakeLists.txt) with
// DRACO_ISA naming it. What such a file shows is in a namespace of that name, and everything else has internal linkage;
// no torch header is included, and of the standard library nothing that is more than a type: the linker must never
// merge an AVX-512 copy of a function into the baseline (core/common.h).
#pragma once

#include "cpu/kernels.h"

namespace draco {
namespace DRACO_ISA {

template <typename T>
void vote(const VoteChunk& chunk);
template <typename T>
void finish(const void* from, int64_t columns, double divisor, bool large, void* to);
template <typename T>
void weighted_sum(const WeightedSumChunk<T>& chunk);
template <typename T>
void encode(const EncodeChunk<T>& chunk);
template <typename T>
void project(const ProjectChunk<T>& chunk);
void check_energy(const Complex* check, int checks, int workers, const double* re, const double* im, int64_t stride,
                  int64_t columns, double* energy);
void random_words(uint64_t seed, uint32_t domain, uint64_t first, int count, uint32_t* words);
void digest(const uint32_t* key, const unsigned char* from, int64_t bytes, uint64_t* sums);
template <typename T>
void digest_and_stats(const uint32_t* key, const unsigned char* from, int64_t bytes, uint64_t* sums, Stats* stats);
template <typename T>
void scale(unsigned char* values, int64_t bytes, double factor);

}  // namespace DRACO_ISA
}  // namespace draco

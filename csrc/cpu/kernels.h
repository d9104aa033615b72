// The CPU loops, one set per instruction set. kernels/*.cpp are compiled once for each with its own flags;
// dispatch.cpp chooses. Loops work on one chunk of the columns, on one thread; chunks, threads and checks are
// the ops' business.
#pragma once

#include <cstdint>

#include "core/double_double.h"
#include "core/random.h"
#include "core/stats.h"

namespace draco {

enum class Dtype : int { kFloat32, kFloat64, kFloat16, kBFloat16 };

// Votes among the present members of one group over `columns` columns.
// Moves: members x columns elements read; the sum, which stays in cache, read and written.
struct VoteChunk {
  const void* const* rows;  // one pointer per present member, at the chunk's first column
  int members;
  int64_t columns;
  bool tolerant;
  double atol, rtol;
  void* sum;  // float or double; nullptr: there is one group, write the winners themselves to `winner`
  void* winner;
  bool first;        // the sum holds nothing yet
  uint8_t* differs;  // per member: set to 1 where it differs from the winner
  void* scratch;     // kVoteScratch bytes per member, on a multiple of 64
};
constexpr int64_t kVoteScratch = 200;
constexpr int kPhiloxStep = 8;

// sum[c] = sum over rows of weight[row] * rows[row][c], on pairs of columns as complex numbers; `columns` is even.
// Several sums of the same rows, each with its own weights, are made together, four rows at a time.
// Moves: rows x columns elements read; each sum written once per four rows, in cache, which the four rows stay in.
template <typename T>
struct WeightedSumChunk {
  const T* const* rows;
  const double* weights;  // (sums, rows, 2): real and imaginary parts; or nullptr: all are 1
  int count;
  int64_t columns;
  T* sum;  // (sums, stride)
  int sums;
  int64_t stride;
};

// message[c] = the sum over rows of weight[row] * rows[row][c], as above, in about twice T's precision, rounded once.
// Moves: rows x columns elements read, the message written; with a carry that as well.
template <typename T>
struct EncodeChunk {
  const T* const* rows;
  const EncodingWeight* weights;
  int count;
  int64_t columns;  // of the rows; an odd last one is the real part of a pair, and message and carry have one more
  T* message;
  T* carry;   // nullptr, or what rounding the message leaves
  bool add;   // start from message + carry
  bool real;  // the weights of all parts of the code are real
};

// Projects rows on random weights and, in the same sweep, adds them up. `columns` is even; they begin with kChunk
// columns that share the table phi.
// Moves: rows x columns elements read; the table phi and the sum stay in cache.
template <typename T>
struct ProjectChunk {
  const T* const* rows;
  const double* weights;  // (rows, 2) as above, or nullptr: all are 1
  const int* added;       // rows that are projected and, where there is a sum, added to it
  int added_count;
  const int* others;  // rows that are only projected
  int others_count;
  int64_t columns;
  int projections;   // kFewestProjections or kMostProjections
  const T* phi;      // (kMostProjections, kChunk), every pair's weight stored twice
  const float* psi;  // (columns / kChunk, kMostProjections)
  T* sum;            // nullptr: only project
  double* re;        // (rows, stride): projection k goes to column k
  double* im;
  int64_t stride;
  double* norm;  // (rows, norm_stride): the rows' norms as the projections see them
  int64_t norm_stride;
};

struct Kernels {
  const char* name;
  void (*vote[4])(const VoteChunk&);  // by Dtype
  // out = sum / divisor, past the caches where the result is a large one.
  void (*finish[4])(const void* sum, int64_t columns, double divisor, bool large, void* out);
  void (*weighted_sum_f32)(const WeightedSumChunk<float>&);
  void (*weighted_sum_f64)(const WeightedSumChunk<double>&);
  void (*encode_f32)(const EncodeChunk<float>&);
  void (*encode_f64)(const EncodeChunk<double>&);
  void (*project_f32)(const ProjectChunk<float>&);
  void (*project_f64)(const ProjectChunk<double>&);
  // energy[c] = sum over the `checks` rows of |check * P|^2 in column c; P is (workers, stride), real and imaginary
  // parts apart, check is (checks, workers).
  void (*check_energy)(const Complex* check, int checks, int workers, const double* re, const double* im,
                       int64_t stride, int64_t columns, double* energy);
  // Writes the words of `count` Philox blocks (core/random.h), a multiple of kPhiloxStep, from counter `first` on.
  void (*random_words)(uint64_t seed, uint32_t domain, uint64_t first, int count, uint32_t* words);
  // Adds the four sums of the bytes of one block of a digest (core/digest.h) to `sums`; bytes > 0.
  void (*digest)(const uint32_t* key, const unsigned char* from, int64_t bytes, uint64_t* sums);
  // The same of a block of values, and in the same sweep their statistics, which are written to `stats`.
  void (*digest_and_stats[4])(const uint32_t* key, const unsigned char* from, int64_t bytes, uint64_t* sums,
                              Stats* stats);
  // Multiplies values in place; of 16 bits in float32.
  void (*scale[4])(unsigned char* values, int64_t bytes, double factor);

  void weighted_sum(const WeightedSumChunk<float>& chunk) const { weighted_sum_f32(chunk); }
  void weighted_sum(const WeightedSumChunk<double>& chunk) const { weighted_sum_f64(chunk); }
  void encode(const EncodeChunk<float>& chunk) const { encode_f32(chunk); }
  void encode(const EncodeChunk<double>& chunk) const { encode_f64(chunk); }
  void project(const ProjectChunk<float>& chunk) const { project_f32(chunk); }
  void project(const ProjectChunk<double>& chunk) const { project_f64(chunk); }
};

// The set for this machine, or the one that DRACO_ISA names; chosen once.
const Kernels& kernels();

}  // namespace draco

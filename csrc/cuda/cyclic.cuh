// Launches that the cyclic code's CUDA ops share.
#pragma once

#include "core/arena.h"
#include "core/half.h"
#include "core/noise.h"
#include "core/random.h"
#include "cuda/common.cuh"

namespace draco {

// Values that one kernel of the fused decode leaves for the next.
struct DecodeState {
  uint64_t seed;
  double divisor;    // of the sum that the weights make
  unsigned arrived;  // blocks of the locator that are done with their columns
  int unexplained;   // some projection is not explained by honest messages, or not finite
  int hopeless;      // more than 2s workers are missing
  int action;        // what remains to be done to the gradient
};
enum Action : int { kKeep, kCombine, kFillNan };

// One pair of a sum of weighted rows: in the same operations wherever it is made, so that it has the same bits.
template <typename T>
DRACO_DEVICE void add_weighted(T re, T im, T z_re, T z_im, T& sum_re, T& sum_im) {
  sum_re = fma(re, z_re, fma(-im, z_im, sum_re));
  sum_im = fma(re, z_im, fma(im, z_re, sum_im));
}

template <typename T>
DRACO_DEVICE T canonical(T value) {
  return value == value ? value : bit_cast<T>(kNaNBits<T>);
}
template <typename T>
DRACO_DEVICE void divide(Vector<T>& sum, T divisor) {
#pragma unroll
  for (int i = 0; i < Vector<T>::kCount; ++i) sum.at[i] = canonical(divisor == T{1} ? sum.at[i] : sum.at[i] / divisor);
}

// Slots of a partial projection: real and imaginary part of each projection, and the norm.
DRACO_HD int slots(int per_tile) { return 2 * per_tile + 1; }

// Projections of messages on their way: sums over groups of consecutive chunks, (groups, workers, slots).
struct Partials {
  double* sums;
  int64_t groups;
  int chunks;  // of one group; divides the chunks of a tile

  DRACO_MEMBER int64_t groups_per_tile() const { return kTile / kChunk / chunks; }
};
// As many chunks for each group as leave every multiprocessor several blocks.
Partials partials_of(const Device& device, int64_t length);

// csrc/cuda/cyclic_project.cu. Projects messages (n, length) and, where `sum` is given, adds them up: each times its
// weight, or all alike where there are no weights, divided by *divisor.
struct Sweep {
  Mask missing{std::nullopt};
  const uint64_t* seed;    // on the device
  const Complex* weights;  // (n,), or nullptr
  const double* divisor;   // on the device, or nullptr: 1
  void* sum;               // (sum_length,), or nullptr
  int64_t sum_length;      // at most the messages' length
};
void sweep(const Device& device, const Tensor& messages, const Sweep& sweep, const Partials& partials);

// csrc/cuda/cyclic_combine.cu. Writes `blocks` sums, one after the other, weights: (blocks, n). Each is
// sum_j weights_j rows_j over the rows whose weight is not 0 in some block, divided by *divisor, to the last bit as a
// sweep makes it; or what *action says. out: (length,), at most the messages' length for each block.
void combine(const Device& device, const Tensor& messages, const Complex* weights, int blocks, const double* divisor,
             const int* action, void* out, int64_t length);

// csrc/cuda/cyclic_locate.cu. The tables that the search starts with, and the scratch that it works on.
struct Search {
  int workers, adversaries, per_tile;
  int compression = 1;  // blocks of the gradient
  int64_t length, tiles;
  NoiseModel model;
  bool mean;
  Partials partials;                 // without sums: projections and norms are given
  Complex* projections;              // (n, tiles, per_tile)
  double* norms;                     // (n, tiles)
  Complex* weights;                  // (compression, n): of the first sweep, then of the decoded gradient
  bool always_weigh;                 // even where the first sweep's weights are right; and weights that need no divisor
  uint8_t* suspects;                 // (n,)
  uint8_t* failed;                   // ()
  uint8_t* not_in_result = nullptr;  // (n,), or nullptr: left out of the gradient, suspects included, missing not
  DecodeState* state;
  // From place_search().
  double *noise, *per_column;                                 // (columns,)
  double* scale;                                              // (tiles,): what the projections were multiplied with
  Complex* checks;                                            // (2s, n)
  uint8_t *missing, *left_out, *nonfinite, *erased, *beyond;  // (n,)
  unsigned char* arena;                                       // the locator's scratch
  int64_t arena_bytes;
};
// Bytes of the locator's scratch.
int64_t locator_bytes(int workers, int adversaries);

namespace {

inline void place_search(Search& search, Arena& arena) {
  const int64_t n = search.workers, columns = search.tiles * search.per_tile;
  search.state = arena.take<DecodeState>(1);
  search.noise = arena.take<double>(columns);
  search.per_column = arena.take<double>(columns);
  search.scale = arena.take<double>(search.tiles);
  search.checks = arena.take<Complex>(2 * search.adversaries * n);
  search.missing = arena.take<uint8_t>(n);
  search.left_out = arena.take<uint8_t>(n);
  search.nonfinite = arena.take<uint8_t>(n);
  search.erased = arena.take<uint8_t>(n);
  search.beyond = arena.take<uint8_t>(n);
  search.arena_bytes = locator_bytes(search.workers, search.adversaries);
  search.arena = arena.take<unsigned char>(search.arena_bytes);
}

}  // namespace

// Seed, masks, the first sweep's weights (where asked for) and the checks without the missing. One block.
void begin_search(const Device& device, const Search& search, Mask missing, Mask expected, bool weigh,
                  std::optional<int64_t> seed);
// Suspects, weights and what remains to be done. One small launch.
void locate(const Device& device, const Search& search);

}  // namespace draco

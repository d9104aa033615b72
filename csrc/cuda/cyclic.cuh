// What the cyclic code's CUDA ops launch of each other.
#pragma once

#include "core/noise.h"
#include "core/random.h"
#include "cuda/common.cuh"

namespace draco {

// What the fused decode's kernels tell each other.
struct DecodeState {
  uint64_t seed;
  unsigned arrived;  // blocks of the locator that are done with their columns
  int unexplained;   // some projection is not explained by honest messages, or not finite
  int hopeless;      // more than 2s workers are missing
  int action;        // what remains to be done to the gradient
};
enum Action : int { kKeep, kCombine, kFillNan };

// Slots of a partial projection: real and imaginary part of each projection, and the energy.
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
// weight, or all alike where there are no weights, divided by `divisor`.
struct Sweep {
  Mask missing{std::nullopt};
  const uint64_t* seed;    // on the device
  const Complex* weights;  // (n,), or nullptr
  void* sum;               // (length,), or nullptr
  double divisor;
};
void sweep(const Device& device, const Tensor& messages, const Sweep& sweep, const Partials& partials);

// csrc/cuda/cyclic_combine.cu. out = sum_j weights_j rows_j over the rows whose weight is not 0, or what *action says.
void combine(const Device& device, const Tensor& messages, const Complex* weights, const int* action, void* out);

// csrc/cuda/cyclic_locate.cu. The tables that the search starts with, and the scratch that it works on.
struct Search {
  int workers, adversaries, per_tile;
  int64_t length, tiles;
  NoiseModel model;
  double factor;                     // of the decoding weights
  Partials partials;                 // without sums: projections and energy are given
  Complex* projections;              // (n, tiles, per_tile)
  double* energy;                    // (n, tiles)
  Complex* weights;                  // (n,): of the first sweep, then of the decoded gradient
  bool always_weigh;                 // even where the first sweep's weights are right
  uint8_t* suspects;                 // (n,)
  uint8_t* failed;                   // ()
  uint8_t* not_in_result = nullptr;  // (n,), or nullptr: left out of the gradient, suspects included, missing not
  DecodeState* state;
  // Carved out of scratch by place_search().
  double *noise, *per_column;                        // (columns,)
  Complex* checks;                                   // (2s, n)
  uint8_t *missing, *left_out, *nonfinite, *erased;  // (n,)
  unsigned char* arena;
};
int64_t place_search(Search& search, unsigned char* scratch);
// Seed, masks, the first sweep's weights (where asked for) and the checks without the missing. One block.
void begin_search(const Device& device, const Search& search, Mask missing, Mask expected, bool weigh,
                  std::optional<int64_t> seed);
// Suspects, weights and what remains to be done. One small launch.
void locate(const Device& device, const Search& search);

}  // namespace draco

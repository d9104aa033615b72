// Projections from the sweep's partial sums.
#pragma once

#include "cuda/cyclic.cuh"

namespace draco {
namespace {

struct Gather {
  Partials partials;
  int64_t workers, tiles;
  int per_tile;
  Complex* projections;  // (workers, tiles, per_tile)
  double* norms;         // (workers, tiles)
};

// Some of the threads' share of the tiles from `first` to `last`; neighbours read neighbours.
DRACO_DEVICE void gather_tiles(const Gather& gather, int64_t thread, int64_t threads, int64_t first, int64_t last) {
  const int64_t row = gather.workers * slots(gather.per_tile), per_tile = gather.partials.groups_per_tile();
  for (int64_t i = thread; i < (last - first) * row; i += threads) {
    const int64_t tile = first + i / row, j = i % row / slots(gather.per_tile);
    const int slot = static_cast<int>(i % slots(gather.per_tile));
    const int64_t begin = tile * per_tile;
    const int64_t end = begin + per_tile < gather.partials.groups ? begin + per_tile : gather.partials.groups;
    const bool is_norm = slot == 2 * gather.per_tile;
    double total = 0;
    for (int64_t group = begin; group < end; ++group) {
      const double part = gather.partials.sums[group * row + i % row];
      total = is_norm ? hypotenuse(total, part) : total + part;
    }
    const int64_t at = j * gather.tiles + tile;
    if (is_norm) {
      gather.norms[at] = total;
    } else {
      Complex& projection = gather.projections[at * gather.per_tile + slot / 2];
      (slot % 2 == 0 ? projection.re : projection.im) = total;
    }
  }
}

}  // namespace
}  // namespace draco

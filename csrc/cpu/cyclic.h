// What the cyclic code's CPU ops share: the projecting sweep, the search for suspects, the weighted sum.
#pragma once

#include <cmath>

#include "core/locator.h"
#include "core/noise.h"
#include "core/random.h"
#include "cpu/common.h"

namespace draco {

// Random projections of all messages, projections_per_tile of each tile. Real and imaginary parts are kept apart so
// that loops over projections vectorise.
struct Projections {
  int per_tile;
  int64_t workers, tiles, columns;
  std::vector<double> re, im, energy;  // (workers, columns), (workers, columns), (workers, tiles)

  Projections(int64_t workers_, int64_t length)
      : per_tile(projections_per_tile(length)),
        workers(workers_),
        tiles(tile_count(length)),
        columns(tiles * per_tile),
        re(workers * columns),
        im(workers * columns),
        energy(workers * tiles) {}
};

// One sweep over the messages: projects them and, where `sum` is given, writes sum_j weights_j z_j, divided by
// `divisor`. weights: (workers, 2) or nullptr for all ones. Rows that are nullptr are absent.
template <typename T>
Projections sweep(const std::vector<const T*>& rows, int64_t length, uint64_t seed, const double* weights, T* sum,
                  double divisor) {
  const int64_t n = rows.size();
  Projections result(n, length);
  const Kernels& kernel = kernels();
  std::vector<T> phi(kMostProjections * kChunk);
  const int pairs = static_cast<int>(std::min<int64_t>(kChunkPairs, length / 2));
  for (int pair = 0; pair < pairs; ++pair) {
    const Philox random = projection_phi(seed, pair);
    for (int k = 0; k < kMostProjections; ++k)
      phi[k * kChunk + 2 * pair] = phi[k * kChunk + 2 * pair + 1] = signed_weight(random.word[k]);
  }
  for_each_tile(length, kTile, [&](int64_t begin, int64_t columns) {
    const int64_t t = begin / kTile, chunk = begin / kChunk;
    float psi[kTile / kChunk * kMostProjections];
    for (int64_t c = 0; c * kChunk < columns; ++c) {
      const Philox random = projection_psi(seed, chunk + c);
      for (int k = 0; k < kMostProjections; ++k) psi[c * kMostProjections + k] = signed_weight(random.word[k]);
    }
    std::vector<const T*> at(n);
    for (int64_t j = 0; j < n; ++j) at[j] = rows[j] == nullptr ? nullptr : rows[j] + begin;
    T* sum_at = sum == nullptr ? nullptr : sum + begin;
    kernel.project(ProjectTile<T>{at.data(), weights, static_cast<int>(n), columns, result.per_tile, phi.data(), psi,
                                  sum_at, result.re.data() + t * result.per_tile,
                                  result.im.data() + t * result.per_tile, result.columns, result.energy.data() + t,
                                  result.tiles});
    if (sum != nullptr && divisor != 1)
      kernel.finish[static_cast<int>(sizeof(T) == 4 ? Dtype::kFloat32 : Dtype::kFloat64)](sum_at, columns, divisor,
                                                                                          sum_at);
  });
  return result;
}

// out = sum_j weights_j rows_j over the rows whose weight is not 0.
template <typename T>
void combine(const std::vector<const T*>& rows, const Complex* weights, int64_t length, T* out, bool add = false) {
  std::vector<const T*> used;
  std::vector<double> factor;
  for (size_t j = 0; j < rows.size(); ++j) {
    if (weights[j].re == 0 && weights[j].im == 0) continue;
    used.push_back(rows[j]);
    factor.push_back(weights[j].re);
    factor.push_back(weights[j].im);
  }
  const Kernels& kernel = kernels();
  for_each_tile(length, kTile / 2, [&](int64_t begin, int64_t columns) {
    std::vector<const T*> at(used.size());
    for (size_t j = 0; j < used.size(); ++j) at[j] = used[j] + begin;
    kernel.weighted_sum(
        WeightedSumTile<T>{at.data(), factor.data(), static_cast<int>(used.size()), columns, out + begin, add});
  });
}

struct Verdict {
  std::vector<uint8_t> suspects, erased;  // erased: suspects and missing
  bool failed = false;
  bool overflow = false;  // more messages are not finite than workers can be bad: the gradient itself is not
};

// Clears the projections of non-finite rows, as a side effect.
Verdict find_suspects(Projections& projections, const std::vector<uint8_t>& missing, int adversaries, int64_t length,
                      const NoiseModel& model);

// The decoding weights without the erased workers, times `factor`.
std::vector<Complex> decoding_weights(int workers, int adversaries, const std::vector<uint8_t>& erased, double factor);

}  // namespace draco

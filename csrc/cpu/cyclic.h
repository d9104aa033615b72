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

  Projections(int64_t workers_, int64_t tiles_, int per_tile_)
      : per_tile(per_tile_),
        workers(workers_),
        tiles(tiles_),
        columns(tiles * per_tile),
        re(workers * columns),
        im(workers * columns),
        energy(workers * tiles) {}

  // Those of the first tiles alone.
  Projections head(int64_t count) const {
    Projections part(workers, count, per_tile);
    for (int64_t j = 0; j < workers; ++j) {
      std::copy_n(re.begin() + j * columns, part.columns, part.re.begin() + j * part.columns);
      std::copy_n(im.begin() + j * columns, part.columns, part.im.begin() + j * part.columns);
      std::copy_n(energy.begin() + j * tiles, count, part.energy.begin() + j * count);
    }
    return part;
  }
};

// The sweep over the messages that projects them and adds them up. Rows that are nullptr are absent.
template <typename T>
class Sweep {
 public:
  Projections projections;

  Sweep(const std::vector<const T*>& rows, int64_t length, uint64_t seed)
      : projections(rows.size(), tile_count(length), projections_per_tile(length)),
        rows_(rows),
        length_(length),
        seed_(seed),
        phi_(kMostProjections * kChunk) {
    const int pairs = static_cast<int>(std::min<int64_t>(kChunkPairs, length / 2));
    for (int pair = 0; pair < pairs; ++pair) {
      const Philox random = projection_phi(seed, pair);
      for (int k = 0; k < kMostProjections; ++k)
        phi_[k * kChunk + 2 * pair] = phi_[k * kChunk + 2 * pair + 1] = signed_weight(random.word[k]);
    }
  }

  // Projects the tiles from `first` to before `last` and, where `sum` is given, writes their sum_j weights_j z_j,
  // divided by `divisor`. weights: (workers, 2) or nullptr for all ones.
  void run(int64_t first, int64_t last, const double* weights, double divisor, T* sum) {
    const int64_t n = rows_.size(), begin = first * kTile, end = std::min(last * kTile, length_);
    if (begin >= end) return;
    const Kernels& kernel = kernels();
    const Dtype dtype = sizeof(T) == 4 ? Dtype::kFloat32 : Dtype::kFloat64;
    std::vector<int> added, others;
    for (int j = 0; j < n; ++j) {
      if (rows_[j] == nullptr) continue;
      const bool left_out = weights != nullptr && weights[2 * j] == 0 && weights[2 * j + 1] == 0;
      (left_out ? others : added).push_back(j);
    }
    // Pieces, which threads take, are smaller than tiles, which have projections: those of a piece are added up after.
    const int per_tile = projections.per_tile;
    const int64_t pieces = (end - begin + kPiece - 1) / kPiece, stride = pieces * per_tile;
    std::vector<double> re(n * stride), im(n * stride), energy(n * pieces);
    const auto piece = [&](int64_t p) {
      const int64_t at = begin + p * kPiece, columns = std::min(kPiece, end - at);
      float psi[kPiece / kChunk * kMostProjections];
      for (int64_t c = 0; c * kChunk < columns; ++c) {
        const Philox random = projection_psi(seed_, at / kChunk + c);
        for (int k = 0; k < kMostProjections; ++k) psi[c * kMostProjections + k] = signed_weight(random.word[k]);
      }
      std::vector<const T*> from(n);
      for (int64_t j = 0; j < n; ++j) from[j] = rows_[j] == nullptr ? nullptr : rows_[j] + at;
      alignas(64) T total[kPiece];
      kernel.project(ProjectTile<T>{from.data(), weights, added.data(), static_cast<int>(added.size()), others.data(),
                                    static_cast<int>(others.size()), columns, per_tile, phi_.data(), psi,
                                    sum == nullptr ? nullptr : total, re.data() + p * per_tile,
                                    im.data() + p * per_tile, stride, energy.data() + p, pieces});
      if (sum != nullptr)
        kernel.finish[static_cast<int>(dtype)](total, columns, divisor, is_large(length_ * sizeof(T)), sum + at);
    };
    parallel(pieces, 1, [&](int64_t from, int64_t to) {
      for (int64_t p = from; p < to; ++p) piece(p);
    });
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t p = 0; p < pieces; ++p) {
        const int64_t tile = first + p / (kTile / kPiece);
        for (int k = 0; k < per_tile; ++k) {
          projections.re[j * projections.columns + tile * per_tile + k] += re[j * stride + p * per_tile + k];
          projections.im[j * projections.columns + tile * per_tile + k] += im[j * stride + p * per_tile + k];
        }
        projections.energy[j * projections.tiles + tile] += energy[j * pieces + p];
      }
    }
  }

 private:
  static constexpr int64_t kPiece = 8192;  // columns; their sum stays in the second-level cache
  static_assert(kTile % kPiece == 0 && kPiece % kChunk == 0, "tiles are whole pieces, pieces whole chunks");

  const std::vector<const T*>& rows_;
  int64_t length_;
  uint64_t seed_;
  std::vector<T> phi_;
};

constexpr int64_t kCombineTile = 8192;  // columns

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
  for_each_tile(length, kCombineTile, kUnit, [&](int64_t begin, int64_t columns) {
    std::vector<const T*> at(used.size());
    for (size_t j = 0; j < used.size(); ++j) at[j] = used[j] + begin;
    kernel.weighted_sum(
        WeightedSumTile<T>{at.data(), factor.data(), static_cast<int>(used.size()), columns, out + begin, add});
  });
}

struct Verdict {
  std::vector<uint8_t> suspects;  // who is certainly bad
  std::vector<uint8_t> erased;    // who is left out: bad or perhaps bad, or missing
  bool failed = false;
  bool overflow = false;  // more messages are not finite than workers can be bad: the gradient itself is not
};

// `early`: what was found from the first tiles alone, or nullptr. Clears the projections of non-finite rows, as a side
// effect.
Verdict find_suspects(Projections& projections, const std::vector<uint8_t>& missing, int adversaries, int64_t length,
                      const NoiseModel& model, const Verdict* early = nullptr);

// The decoding weights without the erased workers, times `factor`.
std::vector<Complex> decoding_weights(int workers, int adversaries, const std::vector<uint8_t>& erased, double factor);

}  // namespace draco

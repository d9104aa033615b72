// Shared by the cyclic code's CPU ops: the projecting sweep, the search for suspects, the weighted sum.
#pragma once

#include <cmath>

#include "core/locator.h"
#include "core/noise.h"
#include "core/random.h"
#include "cpu/common.h"

namespace draco {

// Random projections of all messages, projections_per_tile of each tile, and the messages' norms as these see them.
// Real and imaginary parts are kept apart so that loops over projections vectorise.
struct Projections {
  int per_tile;
  int64_t workers, tiles, columns;
  std::vector<double> re, im, norm;  // (workers, columns), (workers, columns), (workers, tiles)

  Projections(int64_t workers_, int64_t tiles_, int per_tile_)
      : per_tile(per_tile_),
        workers(workers_),
        tiles(tiles_),
        columns(tiles * per_tile),
        re(workers * columns),
        im(workers * columns),
        norm(workers * tiles) {}

  // Those of the first tiles alone.
  Projections head(int64_t count) const {
    Projections part(workers, count, per_tile);
    for (int64_t j = 0; j < workers; ++j) {
      std::copy_n(re.begin() + j * columns, part.columns, part.re.begin() + j * part.columns);
      std::copy_n(im.begin() + j * columns, part.columns, part.im.begin() + j * part.columns);
      std::copy_n(norm.begin() + j * tiles, count, part.norm.begin() + j * count);
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
        phi_(kMostProjections * kChunk * sizeof(T)) {
    T* phi = static_cast<T*>(phi_.get());
    std::fill_n(phi, kMostProjections * kChunk, T{0});  // what a short message does not have is 0, too
    const int pairs = static_cast<int>(std::min<int64_t>(kChunkPairs, length / 2));
    for (int pair = 0; pair < pairs; ++pair) {
      const Philox random = projection_phi(seed, pair);
      for (int k = 0; k < kMostProjections; ++k)
        phi[k * kChunk + 2 * pair] = phi[k * kChunk + 2 * pair + 1] = kPhiScale<T> * signed_weight(random.word[k]);
    }
  }

  // Projects the tiles from `first` to before `last` and, where `sum` is given, writes their sum_j weights_j z_j,
  // divided by `divisor`, of the first `sum_length` columns alone. weights: (workers, 2) or nullptr for all ones.
  void run(int64_t first, int64_t last, const double* weights, double divisor, T* sum, int64_t sum_length) {
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
    // The chunks that threads take are smaller than tiles, which have projections: those of a chunk are added up after.
    const int per_tile = projections.per_tile;
    const int64_t chunks = (end - begin + kSweepChunk - 1) / kSweepChunk, stride = chunks * per_tile;
    std::vector<double> re(n * stride), im(n * stride), norm(n * chunks);
    const auto sweep_chunk = [&](int64_t p, T* total) {
      const int64_t at = begin + p * kSweepChunk, columns = std::min(kSweepChunk, end - at);
      float psi[kSweepChunk / kChunk * kMostProjections];
      for (int64_t c = 0; c * kChunk < columns; ++c) {
        const Philox random = projection_psi(seed_, at / kChunk + c);
        for (int k = 0; k < kMostProjections; ++k) psi[c * kMostProjections + k] = signed_weight(random.word[k]);
      }
      std::vector<const T*> from(n);
      for (int64_t j = 0; j < n; ++j) from[j] = rows_[j] == nullptr ? nullptr : rows_[j] + at;
      kernel.project(ProjectChunk<T>{from.data(), weights, added.data(), static_cast<int>(added.size()), others.data(),
                                     static_cast<int>(others.size()), columns, per_tile,
                                     static_cast<const T*>(phi_.get()), psi, sum == nullptr ? nullptr : total,
                                     re.data() + p * per_tile, im.data() + p * per_tile, stride, norm.data() + p,
                                     chunks});
      if (sum != nullptr)
        kernel.finish[static_cast<int>(dtype)](total, std::min(columns, sum_length - at), divisor,
                                               is_large(length_ * sizeof(T)), sum + at);
    };
    parallel(chunks, 1, [&](int64_t from, int64_t to) {
      const Scratch total(sum == nullptr ? 0 : std::min(kSweepChunk, end - begin) * sizeof(T));
      for (int64_t p = from; p < to; ++p) sweep_chunk(p, static_cast<T*>(total.get()));
    });
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t p = 0; p < chunks; ++p) {
        const int64_t tile = first + p / (kTile / kSweepChunk);
        for (int k = 0; k < per_tile; ++k) {
          projections.re[j * projections.columns + tile * per_tile + k] += re[j * stride + p * per_tile + k];
          projections.im[j * projections.columns + tile * per_tile + k] += im[j * stride + p * per_tile + k];
        }
        double& all = projections.norm[j * projections.tiles + tile];
        all = hypotenuse(all, norm[j * chunks + p]);
      }
    }
  }

 private:
  static constexpr int64_t kSweepChunk = 8192;  // columns; their sum stays in the second-level cache
  static_assert(kTile % kSweepChunk == 0 && kSweepChunk % kChunk == 0, "the weights of a chunk and a tile begin anew");

  const std::vector<const T*>& rows_;
  int64_t length_;
  uint64_t seed_;
  Scratch phi_;  // on whole lines of the cache: every vector of it is loaded for every two rows
};

constexpr int64_t kCombineChunk = 8192;  // columns

// out = sum_j weights_j rows_j, divided by `divisor`, over the rows whose weight is not 0, or of all present rows where
// there are no weights; of these, `length` columns, the first `out_length` are written. To the last bit what Sweep::run
// makes of the same weights and divisor.
template <typename T>
void combine(const std::vector<const T*>& rows, const double* weights, double divisor, int64_t length, T* out,
             int64_t out_length) {
  std::vector<const T*> used;
  std::vector<double> factor;
  for (size_t j = 0; j < rows.size(); ++j) {
    if (rows[j] == nullptr || (weights != nullptr && weights[2 * j] == 0 && weights[2 * j + 1] == 0)) continue;
    used.push_back(rows[j]);
    if (weights != nullptr) factor.insert(factor.end(), weights + 2 * j, weights + 2 * j + 2);
  }
  const Kernels& kernel = kernels();
  const Dtype dtype = sizeof(T) == 4 ? Dtype::kFloat32 : Dtype::kFloat64;
  for_each_chunk(length, kCombineChunk, kAlignment, 0, sizeof(T), [&](int64_t begin, int64_t columns, void* lent) {
    std::vector<const T*> at(used.size());
    for (size_t j = 0; j < used.size(); ++j) at[j] = used[j] + begin;
    auto* sum = static_cast<T*>(lent);
    kernel.weighted_sum(WeightedSumChunk<T>{at.data(), weights == nullptr ? nullptr : factor.data(),
                                            static_cast<int>(used.size()), columns, sum});
    kernel.finish[static_cast<int>(dtype)](sum, std::min(columns, out_length - begin), divisor,
                                           is_large(length * sizeof(T)), out + begin);
  });
}

struct Verdict {
  std::vector<uint8_t> suspects;  // who is certainly bad
  std::vector<uint8_t> erased;    // who is left out: bad or perhaps bad, or missing
  bool failed = false;
  bool overflow = false;  // more messages are not finite than could be put right: the gradient itself is not
};

// `early`: what was found from the first tiles alone, or nullptr. Clears the projections of non-finite rows and scales
// the others, as a side effect.
Verdict find_suspects(Projections& projections, const std::vector<uint8_t>& missing, int adversaries, int64_t length,
                      const NoiseModel& model, const Verdict* early = nullptr);

// The decoding weights without the erased workers, times `factor`: (workers, 2).
std::vector<double> decoding_weights(int workers, int adversaries, const std::vector<uint8_t>& erased, double factor);

}  // namespace draco

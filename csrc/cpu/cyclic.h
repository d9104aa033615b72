// Shared by the cyclic code's CPU ops: the projecting sweep, the search for suspects, the weighted sum.
#pragma once

#include <cmath>
#include <optional>

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

// Where a weighted sum of messages goes: one block of the gradient, or several, each with its own weights.
template <typename T>
struct Blocks {
  T* out;
  int64_t length;   // of the gradient: behind it the last blocks are padding
  int64_t columns;  // of a block: the messages' length
  int count = 1;

  // Writes the sums of some columns, divided by `divisor`: (count, stride).
  void finish(const T* sums, int64_t stride, int64_t begin, int64_t width, double divisor) const {
    const Dtype dtype = sizeof(T) == 4 ? Dtype::kFloat32 : Dtype::kFloat64;
    for (int b = 0; b < count; ++b) {
      const int64_t at = b * columns + begin, left = std::min(width, length - at);
      if (left > 0)
        kernels().finish[static_cast<int>(dtype)](sums + b * stride, left, divisor,
                                                  is_large(count * columns * sizeof(T)), out + at);
    }
  }
};

// The rows that have a weight in some block, and these weights, (blocks, rows, 2).
template <typename T>
struct WeightedRows {
  std::vector<const T*> rows;
  std::vector<double> weights;

  // weights: (blocks, rows, 2) or nullptr, with which all rows that are not nullptr count.
  WeightedRows(const std::vector<const T*>& all, const double* given, int blocks) {
    const size_t n = all.size();
    std::vector<size_t> used;
    for (size_t j = 0; j < n; ++j) {
      bool counts = given == nullptr;
      for (size_t i = j; given != nullptr && i < blocks * n; i += n)
        counts |= given[2 * i] != 0 || given[2 * i + 1] != 0;
      if (all[j] != nullptr && counts) used.push_back(j);
    }
    for (const size_t j : used) rows.push_back(all[j]);
    for (int b = 0; b < blocks && given != nullptr; ++b)
      for (const size_t j : used) weights.insert(weights.end(), given + 2 * (b * n + j), given + 2 * (b * n + j) + 2);
  }

  // sums: (blocks, columns).
  void add_up(int64_t begin, int64_t columns, int blocks, T* sums) const {
    std::vector<const T*> at(rows.size());
    for (size_t j = 0; j < rows.size(); ++j) at[j] = rows[j] + begin;
    kernels().weighted_sum(WeightedSumChunk<T>{at.data(), weights.empty() ? nullptr : weights.data(),
                                               static_cast<int>(at.size()), columns, sums, blocks, columns});
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
    const int drawn = (pairs + kPhiloxStep - 1) / kPhiloxStep * kPhiloxStep;
    std::vector<uint32_t> random(4 * drawn);
    kernels().random_words(seed, kPhiDomain, 0, drawn, random.data());
    for (int pair = 0; pair < pairs; ++pair)
      for (int k = 0; k < kMostProjections; ++k)
        phi[k * kChunk + 2 * pair] = phi[k * kChunk + 2 * pair + 1] =
            kPhiScale<T> * signed_weight(random[4 * pair + k]);
  }

  // Projects the tiles from `first` to before `last` and, where there are `blocks` to write, writes their
  // sum_j weights_j z_j, divided by `divisor`. weights: (blocks, workers, 2) or nullptr for all ones.
  void run(int64_t first, int64_t last, const double* weights, double divisor, const Blocks<T>* blocks) {
    const int64_t n = rows_.size(), begin = first * kTile, end = std::min(last * kTile, length_);
    if (begin >= end) return;
    const Kernels& kernel = kernels();
    // One sum is made while the rows are projected, and several right after that, of chunks that are still in the
    // second-level cache.
    const bool several = blocks != nullptr && blocks->count > 1, together = blocks != nullptr && !several;
    const int64_t sweep_chunk_columns = several ? kSweepChunk / 4 : kSweepChunk;
    std::optional<WeightedRows<T>> weighted;
    if (several) weighted.emplace(rows_, weights, blocks->count);
    std::vector<int> added, others;
    for (int j = 0; j < n; ++j) {
      if (rows_[j] == nullptr) continue;
      const bool left_out = together && weights != nullptr && weights[2 * j] == 0 && weights[2 * j + 1] == 0;
      (left_out ? others : added).push_back(j);
    }
    // The chunks that threads take are smaller than tiles, which have projections: those of a chunk are added up after.
    const int per_tile = projections.per_tile;
    const int64_t chunks = (end - begin + sweep_chunk_columns - 1) / sweep_chunk_columns, stride = chunks * per_tile;
    std::vector<double> re(n * stride), im(n * stride), norm(n * chunks);
    const auto sweep_chunk = [&](int64_t p, T* total) {
      const int64_t at = begin + p * sweep_chunk_columns, columns = std::min(sweep_chunk_columns, end - at);
      uint32_t random[4 * kPhiloxStep];
      kernel.random_words(seed_, kPsiDomain, at / kChunk, kPhiloxStep, random);
      float psi[4 * kPhiloxStep];
      for (int i = 0; i < 4 * kPhiloxStep; ++i) psi[i] = signed_weight(random[i]);
      std::vector<const T*> from(n);
      for (int64_t j = 0; j < n; ++j) from[j] = rows_[j] == nullptr ? nullptr : rows_[j] + at;
      kernel.project(ProjectChunk<T>{from.data(), together ? weights : nullptr, added.data(),
                                     static_cast<int>(added.size()), others.data(), static_cast<int>(others.size()),
                                     columns, per_tile, static_cast<const T*>(phi_.get()), psi,
                                     together ? total : nullptr, re.data() + p * per_tile, im.data() + p * per_tile,
                                     stride, norm.data() + p, chunks});
      if (several) weighted->add_up(at, columns, blocks->count, total);
      if (blocks != nullptr) blocks->finish(total, columns, at, columns, divisor);
    };
    parallel(chunks, 1, [&](int64_t from, int64_t to) {
      const int64_t sums = blocks == nullptr ? 0 : blocks->count;
      const Scratch total(sums * std::min(sweep_chunk_columns, end - begin) * sizeof(T));
      for (int64_t p = from; p < to; ++p) sweep_chunk(p, static_cast<T*>(total.get()));
    });
    for (int64_t j = 0; j < n; ++j) {
      for (int64_t p = 0; p < chunks; ++p) {
        const int64_t tile = first + p / (kTile / sweep_chunk_columns);
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
  static_assert(kMostProjections == 4 && kSweepChunk <= kPhiloxStep * kChunk, "a chunk's weights are drawn at once");
  static_assert(kTile % kSweepChunk == 0 && kSweepChunk / 4 % kChunk == 0, "weights of a chunk and a tile begin anew");

  const std::vector<const T*>& rows_;
  int64_t length_;
  uint64_t seed_;
  Scratch phi_;  // on whole lines of the cache: every vector of it is loaded for every two rows
};

// Writes the first `width` columns of the blocks: sum_j weights_j rows_j, divided by `divisor`, over the rows whose
// weight is not 0 in some block, or of all present rows where there are no weights. To the last bit what Sweep::run
// makes of the same weights and divisor.
template <typename T>
void combine(const std::vector<const T*>& rows, const double* weights, double divisor, int64_t width,
             const Blocks<T>& blocks) {
  const WeightedRows<T> weighted(rows, weights, blocks.count);
  const int64_t chunk = blocks.count == 1 ? 8192 : 1024;  // columns; of several sums four rows stay in the first cache
  for_each_chunk(width, chunk, kAlignment, 0, blocks.count * sizeof(T),
                 [&](int64_t begin, int64_t columns, void* lent) {
                   auto* sums = static_cast<T*>(lent);
                   weighted.add_up(begin, columns, blocks.count, sums);
                   blocks.finish(sums, columns, begin, columns, divisor);
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

// The decoding weights without the erased workers, times `factor`: (compression, workers, 2).
std::vector<double> decoding_weights(int workers, int adversaries, int compression, const std::vector<uint8_t>& erased,
                                     double factor);

}  // namespace draco

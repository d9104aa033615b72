// The locator on the device: suspects and decoding weights, in double precision.
//   begin_search   one block of 256 threads: the seed, the masks, the tables that depend on them. Writes 2s x n complex
//                  numbers; with workers to leave out, a Householder factorisation of their columns.
//   locate         256 threads a block, at most one block per multiprocessor. Reads n x 40 bytes per group of chunks
//                  (or n x 40 per tile, where projections are given) and writes the projections; every block checks its
//                  own tiles against the table of checks. Where some projection is not explained, the last block to
//                  finish searches (core/locator.h), on scratch in global memory that its first-level cache holds.

#include "core/locator.h"
#include "cuda/block.cuh"
#include "cuda/gather.cuh"

namespace draco {
namespace {

constexpr int kSeedDomain = 3;  // of Philox, beside those of core/random.h

// Counts the decodes that this process has begun on the device: it makes the projection new in every replay of a CUDA
// graph, into which the host's random key is baked.
static __device__ unsigned long long decodes;

struct Begin {
  Search search;
  Mask missing, expected;
  bool weigh, has_seed;
  uint64_t seed;  // or the key that a seed is made with
};

DRACO_DEVICE LocatorInput locator_input(const Search& search) {
  const auto* numbers = reinterpret_cast<const double*>(search.projections);
  const int64_t columns = search.tiles * search.per_tile;
  return {search.workers, search.adversaries, numbers,        numbers + 1,      2 * columns, 2,
          columns,        search.noise,       search.missing, search.nonfinite, nullptr};
}

DRACO_DEVICE Parity<Block> parity_of(const Block& team, const Search& search) {
  Arena arena(search.arena, search.arena_bytes);
  return {team, search.workers, search.adversaries, ParityArrays(arena, search.workers, search.adversaries)};
}

// The number that decoding weights are multiplied with. Who is left out decides the bits of a result: with nobody left
// out the plain sum is divided (`divided`), otherwise the weights are.
DRACO_DEVICE double factor(const Search& search, const uint8_t* erased, bool divided) {
  bool nobody = divided;
  for (int j = 0; j < search.workers; ++j) nobody &= !erased[j];
  return search.mean && !nobody ? 1.0 / search.workers : 1.0;
}

__global__ void __launch_bounds__(kTeamThreads) begin_kernel(const __grid_constant__ Begin begin) {
  DRACO_SHARED(double, least, kTeamWarps);
  DRACO_SHARED(int64_t, index, kTeamWarps);
  const Block team(least, index);
  const Search& search = begin.search;
  const int n = search.workers, most = 2 * search.adversaries;
  int absent = 0, out = 0;
  for (int j = 0; j < n; ++j) {
    absent += begin.missing[j];
    out += begin.missing[j] || begin.expected[j];
  }
  const bool all_out = out <= most;  // otherwise too many are expected to be bad to do without them
  for (int j = team.thread; j < n; j += team.threads) {
    search.missing[j] = begin.missing[j];
    search.left_out[j] = begin.missing[j] || (all_out && begin.expected[j]);
    search.nonfinite[j] = 0;
  }
  if (team.thread == 0) {
    uint64_t seed = begin.seed;
    if (!begin.has_seed) {
      const Philox random = philox(begin.seed, atomicAdd(&decodes, 1ull), kSeedDomain);
      seed = static_cast<uint64_t>(random.word[1]) << 32 | random.word[0];
    }
    const bool nobody = search.mean && (all_out ? out : absent) == 0;
    *search.state = {seed, nobody ? static_cast<double>(n) : 1.0, 0, 0, absent > most, kKeep};
  }
  team.sync();
  if (absent > most) {
    for (int j = team.thread; begin.weigh && j < n; j += team.threads) search.weights[j] = {0, 0};
    return;
  }
  Parity<Block> parity = parity_of(team, search);
  if (begin.weigh) parity.weights(search.left_out, factor(search, search.left_out, true), search.weights);
  parity.write_checks(search.missing, search.checks);
}

// Energies of some columns under the checks. Few columns: some lanes share one. Collective.
DRACO_TEAM_CALL void energies(const Block& team, const Search& search, const Complex* check, int checks, int64_t first,
                              int64_t count, double* out) {
  constexpr int kTogether = 4;  // checks for which one thread reads a projection once
  const int n = search.workers;
  const int64_t columns = search.tiles * search.per_tile;
  int share = 1;
  while (share < kWarp && count * share * 2 <= team.threads) share *= 2;
  const int apart = team.threads / share;
  for (int64_t begin = 0; begin < count; begin += apart) {
    const int64_t i = begin + team.thread / share, c = first + (i < count ? i : 0);
    double total = 0;
    for (int m = team.thread % share * kTogether; m < checks; m += share * kTogether) {
      const Complex* row[kTogether];
      Complex sum[kTogether] = {};
#pragma unroll
      for (int t = 0; t < kTogether; ++t) row[t] = check + int64_t{m + t < checks ? m + t : m} * n;
      for (int j = 0; j < n; ++j) {
        const Complex projection = search.projections[j * columns + c];
#pragma unroll
        for (int t = 0; t < kTogether; ++t) sum[t] = sum[t] + row[t][j] * projection;
      }
#pragma unroll
      for (int t = 0; t < kTogether; ++t) total += m + t < checks ? norm2(sum[t]) : 0;
    }
    total = sum_of_lanes(total, share);
    if (i < count && team.thread % share == 0) out[c] = total;
  }
  team.sync();
}

DRACO_DEVICE bool is_finite(double x) { return x - x == 0; }

// Noise of the tiles from first to last, for all their columns, which are scaled so that it is about 1: no square
// overflows then. Collective.
DRACO_TEAM_CALL void set_noise(const Block& team, const Search& search, int most, const uint8_t* erased, int64_t first,
                               int64_t last) {
  const int k = search.per_tile;
  const int64_t columns = search.tiles * k;
  for (int64_t t = first + team.warp; t < last; t += team.warps) {
    const int64_t left = search.length - t * kTile;
    const double noise = tile_noise(team, search.model, search.norms + t, search.tiles, search.workers, most, erased,
                                    left < kTile ? left : kTile);
    const double scale = noise_scale(noise), change = scale / search.scale[t];
    team.sync_warp();
    for (int i = team.lane; i < search.workers * k; i += team.lanes) {
      Complex& projection = search.projections[i / k * columns + t * k + i % k];
      projection = change * projection;
    }
    if (team.lane < k) search.noise[t * k + team.lane] = noise * scale;
    if (team.lane == 0) search.scale[t] = scale;
  }
  team.sync();
}

// Marks the workers among the others whose messages are so much larger than the noise that they are bad beyond doubt;
// returns how many there are. Collective.
DRACO_TEAM_CALL int find_beyond_doubt(const Block& team, const Search& search) {
  for (int j = team.warp; j < search.workers; j += team.warps) {
    double beyond = 0;
    for (int64_t t = team.lane; t < search.tiles && !search.erased[j]; t += kWarp) {
      const double noise = search.noise[t * search.per_tile] / search.scale[t];
      if (search.norms[j * search.tiles + t] * (1 / kBeyondDoubt) > noise) beyond = 1;
    }
    beyond = team.largest(beyond);
    if (team.lane == 0) search.beyond[j] = beyond != 0;
  }
  team.sync();
  int count = 0;
  for (int j = 0; j < search.workers; ++j) count += search.beyond[j];
  return count;
}

// Returns whether the messages of the tiles from first to last are finite and pass the checks without the missing.
// Collective.
DRACO_TEAM_CALL bool passes(const Block& team, const Search& search, int absent, int64_t first, int64_t last) {
  const int n = search.workers, k = search.per_tile;
  const int64_t columns = search.tiles * k;
  for (int64_t t = first + team.thread; t < last; t += team.threads) search.scale[t] = 1;
  bool wrong = false;
  for (int64_t i = team.thread; i < (last - first) * n; i += team.threads) {
    const int64_t j = i / (last - first), t = first + i % (last - first);
    if (search.missing[j]) continue;
    wrong |= !is_finite(search.norms[j * search.tiles + t]);
    for (int64_t c = j * columns + t * k; c < j * columns + (t + 1) * k; ++c)
      wrong |= !is_finite(search.projections[c].re) || !is_finite(search.projections[c].im);
  }
  const int left = (2 * search.adversaries - absent) / 2;
  team.sync();
  set_noise(team, search, left < search.adversaries ? left : search.adversaries, search.missing, first, last);
  const int checks = 2 * search.adversaries - absent;
  if (checks > 0) {
    energies(team, search, search.checks, checks, first * k, (last - first) * k, search.per_column);
    for (int64_t c = first * k + team.thread; c < last * k; c += team.threads)
      wrong |= !(unexplained(search.per_column[c], search.noise[c], checks) <= 1);
  }
  return !team.any(wrong);
}

// Finds the senders of what is not finite; how many there are. Collective.
DRACO_TEAM_CALL int find_nonfinite(const Block& team, const Search& search) {
  const int64_t columns = search.tiles * search.per_tile;
  for (int j = team.warp; j < search.workers; j += team.warps) {
    if (search.missing[j]) continue;
    double wrong = 0;
    for (int64_t c = team.lane; c < columns; c += kWarp) {
      const Complex projection = search.projections[j * columns + c];
      if (!is_finite(projection.re) || !is_finite(projection.im)) wrong = 1;
    }
    for (int64_t t = team.lane; t < search.tiles; t += kWarp)
      if (!is_finite(search.norms[j * search.tiles + t])) wrong = 1;
    wrong = team.largest(wrong);
    if (team.lane == 0 && wrong != 0) search.nonfinite[j] = 1;
  }
  team.sync();
  int bad = 0;
  for (int j = 0; j < search.workers; ++j) bad += search.nonfinite[j];
  return bad;
}

// Erases those who are not finite, and everybody who is bad beyond doubt without them, and sets the noise that then
// remains; how many could be bad besides, or -1: more are than could be. Collective.
DRACO_TEAM_CALL int erase_nonfinite(const Block& team, const Search& search, int absent, int bad) {
  const int n = search.workers, s = search.adversaries;
  const int64_t columns = search.tiles * search.per_tile;
  for (;;) {
    for (int j = team.thread; j < n; j += team.threads) search.erased[j] = search.missing[j] | search.nonfinite[j];
    for (int64_t i = team.thread; i < n * columns; i += team.threads)
      if (search.nonfinite[i / columns]) search.projections[i] = {0, 0};
    team.sync();
    const int by_code = (2 * s - absent - bad) / 2, by_bound = by_code < s - bad ? by_code : s - bad;
    const int most = by_bound > 0 ? by_bound : 0;
    set_noise(team, search, most, search.erased, 0, search.tiles);
    const int more = find_beyond_doubt(team, search);
    if (more == 0) return most;
    if (more > most) return -1;
    for (int j = team.thread; j < n; j += team.threads) search.nonfinite[j] |= search.beyond[j];
    team.sync();
    bad += more;
  }
}

__global__ void __launch_bounds__(kTeamThreads) locate_kernel(const __grid_constant__ Search search) {
  DRACO_SHARED(double, least, kTeamWarps);
  DRACO_SHARED(int64_t, index, kTeamWarps);
  const Block team(least, index);
  const int n = search.workers, s = search.adversaries;
  int absent = 0;
  for (int j = 0; j < n; ++j) absent += search.missing[j];
  bool failed = search.state->hopeless;
  if (!failed) {
    const int64_t each = (search.tiles + gridDim.x - 1) / gridDim.x, first = blockIdx.x * each;
    const int64_t last = first + each < search.tiles ? first + each : search.tiles;
    if (first < last) {
      if (search.partials.sums != nullptr) {
        gather_tiles({search.partials, n, search.tiles, search.per_tile, search.projections, search.norms}, team.thread,
                     team.threads, first, last);
        team.sync();
      }
      if (!passes(team, search, absent, first, last) && team.thread == 0) search.state->unexplained = 1;
    }
  }
  if (!is_last_block(&search.state->arrived)) return;

  bool overflow = false;
  for (int j = team.thread; j < n; j += team.threads) search.erased[j] = search.suspects[j] = 0;
  team.sync();
  if (search.state->unexplained) {
    const int bad = find_nonfinite(team, search);
    overflow = 2 * bad + absent > 2 * s;
    if (!overflow && erase_nonfinite(team, search, absent, bad) < 0) {
      failed = true;
    } else if (!overflow) {
      Locator<Block> locator(team, locator_input(search), Arena(search.arena, search.arena_bytes));
      const auto energy = [&](const Complex* check, int checks, double* out) {
        energies(team, search, check, checks, 0, search.tiles * search.per_tile, out);
      };
      failed = !locator.locate(energy, search.per_column, search.erased, search.suspects);
    }
    if (failed || overflow) {
      for (int j = team.thread; j < n; j += team.threads) search.erased[j] = search.suspects[j] = 0;
      team.sync();
    }
  }
  bool changed = search.always_weigh;
  for (int j = team.thread; j < n; j += team.threads) {
    if (search.not_in_result != nullptr) search.not_in_result[j] = search.erased[j] && !search.missing[j];
    search.erased[j] |= search.missing[j];
    changed |= search.erased[j] != search.left_out[j];
  }
  changed = team.any(changed);
  const bool nothing = failed || overflow;
  if (nothing) {
    for (int64_t j = team.thread; j < int64_t{search.compression} * n; j += team.threads)
      search.weights[j] = {NAN, NAN};
  } else if (changed) {
    const double by = factor(search, search.erased, !search.always_weigh);
    parity_of(team, search).weights(search.erased, by, search.weights, search.compression);
    if (team.thread == 0) search.state->divisor = search.mean && by == 1 ? n : 1;
  }
  if (team.thread == 0) {
    search.state->action = nothing ? kFillNan : changed ? kCombine : kKeep;
    *search.failed = failed;
  }
}

std::tuple<Tensor, Tensor, Tensor> cyclic_locate(const Tensor& projections, const Tensor& norms,
                                                 const OptionalTensor& missing, int64_t adversaries, int64_t length,
                                                 bool float64, double atol, double rtol, bool mean,
                                                 int64_t compression) {
  const char* op = "cyclic_locate";
  check_projections(op, projections, norms, adversaries, length);
  check_workers(op, projections.size(0), adversaries, compression);
  check_mask(op, "missing", missing, projections);
  const Device device(projections);
  const int64_t n = projections.size(0);
  Tensor weights = compression == 1 ? torch::stable::new_empty(projections, {n})
                                    : torch::stable::new_empty(projections, {compression, n});
  Tensor suspects = torch::stable::new_empty(projections, {n}, ScalarType::Bool);
  Tensor failed = torch::stable::new_empty(projections, {}, ScalarType::Bool);
  Search search{};
  search.workers = static_cast<int>(n);
  search.adversaries = static_cast<int>(adversaries);
  search.compression = static_cast<int>(compression);
  search.per_tile = projections_per_tile(length);
  search.length = length;
  search.tiles = tile_count(length);
  search.model = noise_model(float64, search.workers, atol, rtol);
  search.mean = mean;
  search.weights = static_cast<Complex*>(weights.data_ptr());
  search.always_weigh = true;
  search.suspects = static_cast<uint8_t*>(suspects.data_ptr());
  search.failed = static_cast<uint8_t*>(failed.data_ptr());
  // Non-finite rows are cleared and the others scaled in place, so on copies.
  const int64_t columns = n * search.tiles * search.per_tile, tiles = n * search.tiles;
  const auto place = [&](Arena& arena) {
    place_search(search, arena);
    search.projections = arena.take<Complex>(columns);
    search.norms = arena.take<double>(tiles);
  };
  const Tensor scratch = new_arena(projections, place);
  copy_on_device(device, projections.data_ptr(), search.projections, columns * sizeof(Complex));
  copy_on_device(device, norms.data_ptr(), search.norms, tiles * sizeof(double));
  begin_search(device, search, Mask(missing), Mask(std::nullopt), false, 0);
  locate(device, search);
  return {weights, suspects, failed};
}

}  // namespace

int64_t locator_bytes(int workers, int adversaries) { return Locator<Block>::scratch_bytes(workers, adversaries); }

void begin_search(const Device& device, const Search& search, Mask missing, Mask expected, bool weigh,
                  std::optional<int64_t> seed) {
  const uint64_t key = seed.has_value() ? static_cast<uint64_t>(*seed) : fresh_seed("cyclic_decode");
  DRACO_LAUNCH(device, begin_kernel, 1, kTeamThreads, 0,
               Begin{search, missing, expected, weigh, seed.has_value(), key});
}

void locate(const Device& device, const Search& search) {
  const int64_t blocks = std::max<int64_t>(1, std::min<int64_t>(search.tiles, device.multiprocessors));
  DRACO_LAUNCH(device, locate_kernel, blocks, kTeamThreads, 0, search);
}

}  // namespace draco

DRACO_CUDA_OPS(m) { m.impl("cyclic_locate", TORCH_BOX(&draco::cyclic_locate)); }

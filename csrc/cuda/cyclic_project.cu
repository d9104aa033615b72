// Random projections of the messages and, in the same sweep, their sum.
//   sweep    128 threads a block; a warp takes some consecutive chunks of 1024 columns, all rows of one chunk after the
//            other, 16 bytes of a row a lane and access. Reads n x d elements once, writes d (the sum) and, per row and
//            group of 1 to 8 chunks, 5 doubles (9 where there are few tiles): at most 1% of what it reads.
//   gather   256 threads a block: adds up the groups of each tile. Reads what sweep wrote; in the fused decode the
//            locator does this itself.
//
// Within a chunk a projection keeps 16 partial sums, of the columns c = i mod 16, in the messages' own precision (up to
// 8 terms one after the other, then a tree over the lanes); from there on all is double.
#include "cuda/gather.cuh"
#include "cuda/reduce.cuh"

namespace draco {
namespace {

constexpr int kSweepThreads = 128, kWarps = kSweepThreads / kWarp;

template <typename T>
struct SweepArgs {
  const T* messages;
  int64_t stride, length;
  int workers;
  Mask missing;
  const uint64_t* seed;
  const Complex* weights;
  const double* divisor;
  T* sum;
  int64_t sum_length;
  int64_t whole;  // columns that exist in the messages and, where there is one, in the sum
  Partials partials;
  bool aligned;
};

// Adds up an array over the lanes that differ in `distance`: each lane of a pair keeps one half of it.
template <int kValues, typename T>
DRACO_DEVICE void halve(T* value, int distance) {
  const bool upper = threadIdx.x & distance;
#pragma unroll
  for (int i = 0; i < kValues / 2; ++i) {
    const T kept = upper ? value[i + kValues / 2] : value[i], sent = upper ? value[i] : value[i + kValues / 2];
    value[i] = kept + __shfl_xor_sync(kAllLanes, sent, distance);
  }
}

template <int kFloats>
struct alignas(kFloats >= 4 ? 16 : 8) Floats {
  float at[kFloats];
};

// One row of one chunk: adds it to the sum and writes its slots. kWhole: all columns exist, in the sum too, and are
// aligned.
template <typename T, int kProjections, bool kWeighted, bool kWhole>
DRACO_DEVICE void project_row(const T* row, int64_t left, const float* phi, const float (&psi)[kProjections],
                              T weight_re, T weight_im, Vector<T> (&sum)[kChunk / kWarp / Vector<T>::kCount],
                              double* slot, bool first) {
  constexpr int kCount = Vector<T>::kCount, kPairs = kCount / 2, kSteps = kChunk / kWarp / kCount;
  const int lane = threadIdx.x % kWarp;
  T value[kProjections * kCount] = {};  // (projection, real or imaginary, pair of the access)
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int column = (step * kWarp + lane) * kCount;
    const Vector<T> z = load<kWhole>(row + column, left - column);
    const auto p = *reinterpret_cast<const Floats<kPairs * kProjections>*>(phi + column / 2 * kProjections);
#pragma unroll
    for (int pair = 0; pair < kPairs; ++pair) {
      const T re = z.at[2 * pair], im = z.at[2 * pair + 1];
      if constexpr (kWeighted) {
        add_weighted(weight_re, weight_im, re, im, sum[step].at[2 * pair], sum[step].at[2 * pair + 1]);
      } else {
        sum[step].at[2 * pair] += re;
        sum[step].at[2 * pair + 1] += im;
      }
#pragma unroll
      for (int k = 0; k < kProjections; ++k) {
        const T weight = static_cast<T>(p.at[pair * kProjections + k]);
        value[(2 * k) * kPairs + pair] += weight * re;
        value[(2 * k + 1) * kPairs + pair] += weight * im;
      }
    }
  }
  // Lanes 16, 8 (and 4, of float) apart hold the same columns modulo 16. Halving over them leaves one or two sums a
  // lane: the upper bits of the lane are those of the sum's place in `value`.
  constexpr int kValues = kProjections * kCount;
  halve<kValues>(value, 16);
  halve<kValues / 2>(value, 8);
  if constexpr (sizeof(T) == 4) halve<kValues / 4>(value, 4);
  constexpr bool kPartByLane = kProjections == 2 || sizeof(T) == 4;  // real and imaginary parts lie in different lanes
  constexpr int kLanesEach = kProjections == 2 || !kPartByLane ? 8 : 4;
  constexpr int kLeft = kProjections == 2 ? 1 : 2;
  const int own = lane / kLanesEach / (kPartByLane ? 2 : 1);
  double scale = psi[0];
#pragma unroll
  for (int k = 1; k < kProjections; ++k) scale = own == k ? static_cast<double>(psi[k]) : scale;
  double part[2] = {0, 0}, square = 0, small_square = 0;
#pragma unroll
  for (int i = 0; i < kLeft; ++i) {
    const double weighted = scale * static_cast<double>(value[i]);
    part[kPartByLane ? 0 : i] += weighted;
    square += weighted * weighted;
    const double small = kSmaller * weighted;
    if constexpr (sizeof(T) == 8) small_square += small * small;
  }
  square = sum_of_lanes(square) / kProjections;
  if constexpr (sizeof(T) == 8) small_square = sum_of_lanes(small_square) / kProjections;
  part[0] = sum_of_lanes(part[0], kLanesEach);
  if (!kPartByLane) part[1] = sum_of_lanes(part[1], kLanesEach);
  if (lane % kLanesEach == 0) {
    double* to = slot + lane / kLanesEach * (kPartByLane ? 1 : 2);
#pragma unroll
    for (int i = 0; i < (kPartByLane ? 1 : 2); ++i) to[i] = first ? part[i] : to[i] + part[i];
  }
  if (lane == 0) {
    const double norm = norm_of_squares<T>(square, small_square);
    slot[2 * kProjections] = first ? norm : hypotenuse(slot[2 * kProjections], norm);
  }
}

template <typename T, int kProjections, bool kWeighted, bool kWhole>
DRACO_DEVICE void project_chunk(const SweepArgs<T>& args, int64_t chunk, uint64_t seed, const float* phi, double* slot,
                                bool first) {
  constexpr int kCount = Vector<T>::kCount, kSteps = kChunk / kWarp / kCount;
  const int lane = threadIdx.x % kWarp;
  const int64_t begin = chunk * kChunk, left = args.length - begin;
  const Philox random = projection_psi(seed, chunk);
  float psi[kProjections];
#pragma unroll
  for (int k = 0; k < kProjections; ++k) psi[k] = signed_weight(random.word[k]);
  Vector<T> sum[kSteps] = {};
  for (int j = 0; j < args.workers; ++j, slot += slots(kProjections)) {
    if (args.missing[j]) {
      if (lane < slots(kProjections)) slot[lane] = 0;
      continue;
    }
    T re = 1, im = 0;
    if constexpr (kWeighted) {
      re = static_cast<T>(args.weights[j].re);
      im = static_cast<T>(args.weights[j].im);
    }
    const T* row = args.messages + j * args.stride + begin;
    if (kWeighted && re == 0 && im == 0) {  // a suspect, perhaps not finite: 0 times it must not be added
      Vector<T> unused[kSteps] = {};
      project_row<T, kProjections, false, kWhole>(row, left, phi, psi, re, im, unused, slot, first);
    } else {
      project_row<T, kProjections, kWeighted, kWhole>(row, left, phi, psi, re, im, sum, slot, first);
    }
  }
  if (args.sum == nullptr) return;
  const T divisor = args.divisor == nullptr ? T{1} : static_cast<T>(*args.divisor);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int column = (step * kWarp + lane) * kCount;
    divide(sum[step], divisor);
    store<kWhole>(args.sum + begin + column, args.sum_length - begin - column, sum[step]);
  }
}

template <typename T, int kProjections, bool kWeighted>
__global__ void __launch_bounds__(kSweepThreads, sizeof(T) == 4 && kProjections == 2 ? 4 : 2)
    sweep_kernel(const __grid_constant__ SweepArgs<T> args) {
  // Weights of the pairs of columns of any chunk, all projections of a pair side by side.
  DRACO_SHARED(Floats<4>, table, kChunkPairs * kProjections / 4);
  float* phi = reinterpret_cast<float*>(table);
  const uint64_t seed = *args.seed;
  for (int pair = threadIdx.x; pair < kChunkPairs; pair += kSweepThreads) {
    const Philox random = projection_phi(seed, pair);
#pragma unroll
    for (int k = 0; k < kProjections; ++k)
      phi[pair * kProjections + k] = static_cast<float>(kPhiScale<T>) * signed_weight(random.word[k]);
  }
  __syncthreads();
  const int64_t group = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp;
  if (group >= args.partials.groups) return;
  double* slot = args.partials.sums + group * args.workers * slots(kProjections);
  const int64_t first = group * args.partials.chunks, chunks = (args.length + kChunk - 1) / kChunk;
  const int64_t last = first + args.partials.chunks < chunks ? first + args.partials.chunks : chunks;
  for (int64_t chunk = first; chunk < last; ++chunk) {
    if (args.aligned && (chunk + 1) * kChunk <= args.whole) {
      project_chunk<T, kProjections, kWeighted, true>(args, chunk, seed, phi, slot, chunk == first);
    } else {
      project_chunk<T, kProjections, kWeighted, false>(args, chunk, seed, phi, slot, chunk == first);
    }
  }
}

__global__ void gather_kernel(Gather gather) {
  gather_tiles(gather, int64_t{blockIdx.x} * blockDim.x + threadIdx.x, int64_t{gridDim.x} * blockDim.x, 0,
               gather.tiles);
}

__global__ void set_seed(uint64_t* to, uint64_t seed) { *to = seed; }

// `there`: the seed on the device, or null if it is `seed`.
std::tuple<Tensor, Tensor> project(const char* op, const Tensor& messages, const OptionalTensor& missing, int64_t seed,
                                   const int64_t* there) {
  const int64_t n = messages.size(0), length = messages.size(1);
  check_pairs(op, messages, length);
  check_mask(op, "missing", missing, messages);
  const Device device(messages);
  const int64_t tiles = tile_count(length);
  const int per_tile = projections_per_tile(length);
  Tensor projections = torch::stable::new_empty(messages, {n, tiles, per_tile}, ScalarType::ComplexDouble);
  Tensor norms = torch::stable::new_empty(messages, {n, tiles}, ScalarType::Double);
  if (n == 0 || tiles == 0) return {projections, norms};
  Partials partials = partials_of(device, length);
  Tensor scratch = new_scratch(messages, sizeof(uint64_t) + partials.groups * n * slots(per_tile) * sizeof(double));
  auto* seed_at = static_cast<uint64_t*>(scratch.data_ptr());
  partials.sums = reinterpret_cast<double*>(seed_at + 1);
  if (there == nullptr) DRACO_LAUNCH(device, set_seed, 1, 1, 0, seed_at, static_cast<uint64_t>(seed));
  const auto* used = there == nullptr ? seed_at : reinterpret_cast<const uint64_t*>(there);
  sweep(device, messages, Sweep{Mask(missing), used, nullptr, nullptr, nullptr, 0}, partials);
  const Gather gather{partials,
                      n,
                      tiles,
                      per_tile,
                      static_cast<Complex*>(projections.data_ptr()),
                      static_cast<double*>(norms.data_ptr())};
  constexpr int kThreads = 256;
  const int64_t blocks =
      std::min(ceil_div(n * tiles * slots(per_tile), kThreads), int64_t{16} * device.multiprocessors);
  DRACO_LAUNCH(device, gather_kernel, blocks, kThreads, 0, gather);
  return {projections, norms};
}

std::tuple<Tensor, Tensor> cyclic_project(const Tensor& messages, const OptionalTensor& missing, int64_t seed) {
  return project("cyclic_project", messages, missing, seed, nullptr);
}

std::tuple<Tensor, Tensor> cyclic_project_by_key(const Tensor& messages, const OptionalTensor& missing,
                                                 const Tensor& seed) {
  const char* op = "cyclic_project_by_key";
  return project(op, messages, missing, 0, check_seeds(op, seed, messages, 1));
}

}  // namespace

Partials partials_of(const Device& device, int64_t length) {
  const int64_t chunks = ceil_div(length, kChunk);
  Partials partials{nullptr, chunks, 1};
  while (partials.chunks < 8 && partials.groups >= int64_t{2} * 16 * kWarps * device.multiprocessors) {
    partials.chunks *= 2;
    partials.groups = ceil_div(chunks, partials.chunks);
  }
  return partials;
}

void sweep(const Device& device, const Tensor& messages, const Sweep& sweep, const Partials& partials) {
  const int64_t length = messages.size(1), blocks = ceil_div(partials.groups, kWarps);
  dispatch_real("cyclic_project", messages.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const SweepArgs<T> args{
        static_cast<const T*>(messages.data_ptr()),
        messages.stride(0),
        length,
        static_cast<int>(messages.size(0)),
        sweep.missing,
        sweep.seed,
        sweep.weights,
        sweep.divisor,
        static_cast<T*>(sweep.sum),
        sweep.sum_length,
        sweep.sum == nullptr ? length : sweep.sum_length,
        partials,
        rows_aligned<T>(messages.data_ptr(), messages.stride(0), messages.size(0)) && rows_aligned<T>(sweep.sum, 0, 1)};
    const bool most = projections_per_tile(length) == kMostProjections;
    const auto kernel =
        sweep.weights == nullptr
            ? (most ? sweep_kernel<T, kMostProjections, false> : sweep_kernel<T, kFewestProjections, false>)
            : (most ? sweep_kernel<T, kMostProjections, true> : sweep_kernel<T, kFewestProjections, true>);
    DRACO_LAUNCH(device, kernel, blocks, kSweepThreads, 0, args);
  });
}

}  // namespace draco

DRACO_CUDA_OPS(m) {
  m.impl("cyclic_project", TORCH_BOX(&draco::cyclic_project));
  m.impl("cyclic_project_by_key", TORCH_BOX(&draco::cyclic_project_by_key));
}

// Weighted sums of rows as complex numbers on pairs of columns: the decoded gradient, or the blocks of it.
//   weighted_sum   256 threads a block, 16 bytes of each row a thread and step, at most 32 blocks per multiprocessor.
//                  Makes up to 8 sums. Reads every row whose weight is not 0 in all of them once (count x columns
//                  elements), writes the sums; the sums of a thread's columns stay in its registers.
// In the fused decode it is launched always and returns at once where nothing is left to be done.
#include "cuda/cyclic.cuh"

namespace draco {
namespace {

constexpr int kSumThreads = 256, kBlocksPerMultiprocessor = 32;
constexpr int kMostSums = 8;
// Rows whose weights wait in shared memory.
template <int kSums>
constexpr int kBatchRows = kSums < kMostSums ? 256 : 64;

template <typename T>
struct WeightedSum {
  const T* rows;
  int64_t stride;
  int count, sums;
  const Complex* weights;  // (sums, count)
  const double* divisor;   // or nullptr: 1
  T* out;                  // (sums, columns), of which `length` elements exist
  int64_t columns, length;
  const int* action;  // or nullptr: combine
};

template <typename T, int kSums, bool kWhole>
DRACO_DEVICE void add_row(const WeightedSum<T>& sum, int j, const T* re, const T* im, int64_t column,
                          Vector<T> (&total)[kSums]) {
  constexpr int kBatch = kBatchRows<kSums>;
  const Vector<T> z = load<kWhole>(sum.rows + j * sum.stride + column, sum.columns - column);
#pragma unroll
  for (int b = 0; b < kSums; ++b) {
#pragma unroll
    for (int i = 0; i < Vector<T>::kCount; i += 2) {
      add_weighted(re[b * kBatch], im[b * kBatch], z.at[i], z.at[i + 1], total[b].at[i], total[b].at[i + 1]);
    }
  }
}

template <typename T, int kSums, bool kWhole>
DRACO_DEVICE void add_rows(const WeightedSum<T>& sum, const int* row, const T* re, const T* im, int used,
                           int64_t column, Vector<T> (&total)[kSums]) {
#pragma unroll 4
  for (int i = 0; i < used; ++i) add_row<T, kSums, kWhole>(sum, row[i], re + i, im + i, column, total);
}

template <typename T, int kSums>
__global__ void __launch_bounds__(kSumThreads, kSums == 1          ? 4
                                               : kSums < kMostSums ? 2
                                                                   : 1)
    weighted_sum(const __grid_constant__ WeightedSum<T> sum, bool aligned) {
  constexpr int kCount = Vector<T>::kCount, kBatch = kBatchRows<kSums>;
  DRACO_SHARED(int, row, kBatch);
  DRACO_SHARED(T, re, kBatch * kSums);
  DRACO_SHARED(T, im, kBatch * kSums);
  DRACO_SHARED(int, rows_used, 1);
  const int action = sum.action == nullptr ? kCombine : *sum.action;
  if (action == kKeep) return;
  const T divisor = sum.divisor == nullptr ? T{1} : static_cast<T>(*sum.divisor);
  const int64_t step = int64_t{kSumThreads} * kCount;
  // Columns that exist in every sum: only the last ones can be shorter.
  const int64_t common = sum.length - (sum.sums - 1) * sum.columns;
  for (int64_t begin = blockIdx.x * step; begin < sum.columns; begin += gridDim.x * step) {
    const int64_t column = begin + threadIdx.x * kCount, left = sum.columns - column;
    const bool whole = aligned && column + kCount <= common;
    Vector<T> total[kSums];
#pragma unroll
    for (int b = 0; b < kSums; ++b) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) total[b].at[i] = action == kFillNan ? canonical(static_cast<T>(NAN)) : T{0};
    }
    for (int first = 0; first < sum.count && action == kCombine; first += kBatch) {
      if (first > 0 || sum.count > kBatch || begin == blockIdx.x * step) {  // otherwise they are there already
        __syncthreads();
        if (threadIdx.x < kWarp) {  // the rows that count, in order
          int used = 0;
          for (int batch = first; batch < first + kBatch; batch += kWarp) {
            const int j = batch + threadIdx.x;
            Complex weight[kSums];
            bool counts = false;
#pragma unroll
            for (int b = 0; b < kSums; ++b) {
              weight[b] = j < sum.count && b < sum.sums ? sum.weights[b * sum.count + j] : Complex{0, 0};
              counts |= weight[b].re != 0 || weight[b].im != 0;
            }
            const unsigned lanes = __ballot_sync(kAllLanes, counts);
            const int at = used + __popc(lanes & ((1u << threadIdx.x) - 1));
            if (counts) {
              row[at] = j;
#pragma unroll
              for (int b = 0; b < kSums; ++b) {
                re[b * kBatch + at] = static_cast<T>(weight[b].re);
                im[b * kBatch + at] = static_cast<T>(weight[b].im);
              }
            }
            used += __popc(lanes);
          }
          if (threadIdx.x == 0) rows_used[0] = used;
        }
        __syncthreads();
      }
      if (whole) {
        add_rows<T, kSums, true>(sum, row, re, im, rows_used[0], column, total);
      } else if (left > 0) {
        add_rows<T, kSums, false>(sum, row, re, im, rows_used[0], column, total);
      }
    }
#pragma unroll
    for (int b = 0; b < kSums; ++b) {
      if (b >= sum.sums) break;
      if (action == kCombine) divide(total[b], divisor);
      const int64_t at = b * sum.columns + column;
      if (whole) {
        store<true>(sum.out + at, left, total[b]);
      } else if (left > 0) {
        const int64_t exist = sum.length - at;
        store<false>(sum.out + at, exist < left ? exist : left, total[b]);
      }
    }
  }
}

void cyclic_combine_out(const Tensor& messages, const Tensor& weights, Tensor out) {
  const char* op = "cyclic_combine";
  const int64_t length = out.dim() == 1 ? out.size(0) : 0;
  const int blocks = check_weights(op, weights, messages);
  check_pairs(op, messages, length, blocks);
  check_out(op, out, length, messages);
  const Device device(messages);
  combine(device, messages, static_cast<const Complex*>(weights.data_ptr()), blocks, nullptr, nullptr, out.data_ptr(),
          length);
}

Tensor cyclic_combine(const Tensor& messages, const Tensor& weights, int64_t length) {
  check_pairs("cyclic_combine", messages, length, check_weights("cyclic_combine", weights, messages));
  Tensor out = torch::stable::new_empty(messages, {length});
  cyclic_combine_out(messages, weights, out);
  return out;
}

}  // namespace

void combine(const Device& device, const Tensor& messages, const Complex* weights, int blocks, const double* divisor,
             const int* action, void* out, int64_t length) {
  const int64_t columns = messages.size(1);
  if (columns == 0) return;
  dispatch_real("cyclic_combine", messages.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const int count = static_cast<int>(messages.size(0));
    const int64_t steps = ceil_div(columns, kSumThreads * Vector<T>::kCount);
    const int64_t grid = std::min(steps, int64_t{kBlocksPerMultiprocessor} * device.multiprocessors);
    for (int first = 0; first < blocks; first += kMostSums) {
      auto* to = static_cast<T*>(out) + first * columns;
      const int sums = std::min(kMostSums, blocks - first);
      const WeightedSum<T> sum{static_cast<const T*>(messages.data_ptr()),
                               messages.stride(0),
                               count,
                               sums,
                               weights + int64_t{first} * count,
                               divisor,
                               to,
                               columns,
                               std::clamp<int64_t>(length - first * columns, 0, sums * columns),
                               action};
      const bool aligned = rows_aligned<T>(sum.rows, sum.stride, sum.count) && rows_aligned<T>(to, columns, sums);
      const auto kernel = sums == 1   ? weighted_sum<T, 1>
                          : sums == 2 ? weighted_sum<T, 2>
                          : sums <= 4 ? weighted_sum<T, 4>
                                      : weighted_sum<T, kMostSums>;
      DRACO_LAUNCH(device, kernel, grid, kSumThreads, 0, sum, aligned);
    }
  });
}

}  // namespace draco

DRACO_CUDA_OPS(m) {
  m.impl("cyclic_combine", TORCH_BOX(&draco::cyclic_combine));
  m.impl("cyclic_combine_out", TORCH_BOX(&draco::cyclic_combine_out));
}

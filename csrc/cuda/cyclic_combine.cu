// Weighted sums of rows as complex numbers on pairs of columns: the decoded gradient.
//   weighted_sum   256 threads a block, 16 bytes of each row a thread and step, at most 32 blocks per multiprocessor.
//                  Reads every row whose weight is not 0 once, (count x d elements), writes d.
// In the fused decode it is launched always and returns at once where nothing is left to be done.
#include "cuda/cyclic.cuh"

namespace draco {
namespace {

constexpr int kSumThreads = 256, kBlocksPerMultiprocessor = 32;
constexpr int kBatch = 256;  // rows whose weights wait in shared memory

template <typename T>
struct WeightedSum {
  const T* rows;
  int64_t stride;
  int count;
  const Complex* weights;
  const double* divisor;  // or nullptr: 1
  T* out;
  int64_t columns, length;  // of the rows; and of these the columns that are written
  const int* action;        // or nullptr: combine
};

template <typename T, bool kWhole>
DRACO_DEVICE void add_row(const WeightedSum<T>& sum, int j, T re, T im, int64_t column, Vector<T>& total) {
  const Vector<T> z = load<kWhole>(sum.rows + j * sum.stride + column, sum.columns - column);
#pragma unroll
  for (int i = 0; i < Vector<T>::kCount; i += 2) {
    add_weighted(re, im, z.at[i], z.at[i + 1], total.at[i], total.at[i + 1]);
  }
}

template <typename T, bool kWhole>
DRACO_DEVICE void add_rows(const WeightedSum<T>& sum, const int* row, const T* re, const T* im, int used,
                           int64_t column, Vector<T>& total) {
#pragma unroll 4
  for (int i = 0; i < used; ++i) add_row<T, kWhole>(sum, row[i], re[i], im[i], column, total);
}

template <typename T>
__global__ void __launch_bounds__(kSumThreads, 4)
    weighted_sum(const __grid_constant__ WeightedSum<T> sum, bool aligned) {
  constexpr int kCount = Vector<T>::kCount;
  DRACO_SHARED(int, row, kBatch);
  DRACO_SHARED(T, re, kBatch);
  DRACO_SHARED(T, im, kBatch);
  DRACO_SHARED(int, rows_used, 1);
  const int action = sum.action == nullptr ? kCombine : *sum.action;
  if (action == kKeep) return;
  const T divisor = sum.divisor == nullptr ? T{1} : static_cast<T>(*sum.divisor);
  const int64_t step = int64_t{kSumThreads} * kCount;
  for (int64_t begin = blockIdx.x * step; begin < sum.columns; begin += gridDim.x * step) {
    const int64_t column = begin + threadIdx.x * kCount, left = sum.columns - column;
    const bool whole = aligned && column + kCount <= sum.length;
    Vector<T> total;
#pragma unroll
    for (int i = 0; i < kCount; ++i) total.at[i] = action == kFillNan ? canonical(static_cast<T>(NAN)) : T{0};
    for (int first = 0; first < sum.count && action == kCombine; first += kBatch) {
      if (first > 0 || sum.count > kBatch || begin == blockIdx.x * step) {  // otherwise they are there already
        __syncthreads();
        if (threadIdx.x < kWarp) {  // the rows that count, in order
          int used = 0;
          for (int batch = first; batch < first + kBatch; batch += kWarp) {
            const int j = batch + threadIdx.x;
            const Complex weight = j < sum.count ? sum.weights[j] : Complex{0, 0};
            const bool counts = weight.re != 0 || weight.im != 0;
            const unsigned lanes = __ballot_sync(kAllLanes, counts);
            const int at = used + __popc(lanes & ((1u << threadIdx.x) - 1));
            if (counts) {
              row[at] = j;
              re[at] = static_cast<T>(weight.re);
              im[at] = static_cast<T>(weight.im);
            }
            used += __popc(lanes);
          }
          if (threadIdx.x == 0) rows_used[0] = used;
        }
        __syncthreads();
      }
      if (whole) {
        add_rows<T, true>(sum, row, re, im, rows_used[0], column, total);
      } else if (left > 0) {
        add_rows<T, false>(sum, row, re, im, rows_used[0], column, total);
      }
    }
    if (action == kCombine) divide(total, divisor);
    if (whole) {
      store<true>(sum.out + column, left, total);
    } else {
      store<false>(sum.out + column, sum.length - column, total);
    }
  }
}

void cyclic_combine_out(const Tensor& messages, const Tensor& weights, Tensor out) {
  const char* op = "cyclic_combine";
  const int64_t length = out.dim() == 1 ? out.size(0) : 0;
  check_pairs(op, messages, length);
  check_out(op, out, length, messages);
  check_weights(op, weights, messages);
  const Device device(messages);
  combine(device, messages, static_cast<const Complex*>(weights.data_ptr()), nullptr, nullptr, out.data_ptr(), length);
}

Tensor cyclic_combine(const Tensor& messages, const Tensor& weights, int64_t length) {
  check_pairs("cyclic_combine", messages, length);
  Tensor out = torch::stable::new_empty(messages, {length});
  cyclic_combine_out(messages, weights, out);
  return out;
}

}  // namespace

void combine(const Device& device, const Tensor& messages, const Complex* weights, const double* divisor,
             const int* action, void* out, int64_t length) {
  const int64_t columns = messages.size(1);
  if (columns == 0) return;
  dispatch_real("cyclic_combine", messages.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const WeightedSum<T> sum{static_cast<const T*>(messages.data_ptr()),
                             messages.stride(0),
                             static_cast<int>(messages.size(0)),
                             weights,
                             divisor,
                             static_cast<T*>(out),
                             columns,
                             length,
                             action};
    const int64_t steps = ceil_div(columns, kSumThreads * Vector<T>::kCount);
    const int64_t blocks = std::min(steps, int64_t{kBlocksPerMultiprocessor} * device.multiprocessors);
    const bool aligned = rows_aligned<T>(sum.rows, sum.stride, sum.count) && rows_aligned<T>(out, 0, 1);
    const auto kernel = weighted_sum<T>;
    DRACO_LAUNCH(device, kernel, blocks, kSumThreads, 0, sum, aligned);
  });
}

}  // namespace draco

DRACO_CUDA_OPS(m) {
  m.impl("cyclic_combine", TORCH_BOX(&draco::cyclic_combine));
  m.impl("cyclic_combine_out", TORCH_BOX(&draco::cyclic_combine_out));
}

// Weighted sums of rows as complex numbers on pairs of columns: the decoded gradient, and a worker's message.
//   weighted_sum   256 threads a block, 16 bytes of each row a thread and step, at most 32 blocks per multiprocessor.
//                  Reads every row whose weight is not 0 once, (count x d elements), writes d; adding reads d more.
// In the fused decode it is launched always and returns at once where nothing is left to be done.
#include "cuda/cyclic.cuh"

namespace draco {
namespace {

constexpr int kSumThreads = 256, kBlocksPerMultiprocessor = 32;
constexpr int kBatch = 256;  // rows whose weights wait in shared memory
constexpr int kParts = 64;   // weights as a kernel argument: no copy from the host that a CUDA graph could not keep

struct Given {  // on the device
  const Complex* weight;
  DRACO_MEMBER Complex operator[](int j) const { return weight[j]; }
};
struct Passed {
  Complex weight[kParts];
  DRACO_MEMBER Complex operator[](int j) const { return weight[j]; }
};

template <typename T>
struct WeightedSum {
  const T* rows;
  int64_t stride, length;  // of the rows
  int count;
  T* out;
  int64_t columns;  // of out: the length, made even
  bool add;
  const int* action;  // or nullptr: combine
};

template <typename T, bool kWhole>
DRACO_DEVICE void add_row(const WeightedSum<T>& sum, int j, T re, T im, int64_t column, Vector<T>& total) {
  const Vector<T> z = load<kWhole>(sum.rows + j * sum.stride + column, sum.length - column);
#pragma unroll
  for (int i = 0; i < Vector<T>::kCount; i += 2) {
    total.at[i] += re * z.at[i] - im * z.at[i + 1];
    total.at[i + 1] += re * z.at[i + 1] + im * z.at[i];
  }
}

template <typename T, bool kWhole>
DRACO_DEVICE void add_rows(const WeightedSum<T>& sum, const int* row, const T* re, const T* im, int used,
                           int64_t column, Vector<T>& total) {
#pragma unroll 4
  for (int i = 0; i < used; ++i) add_row<T, kWhole>(sum, row[i], re[i], im[i], column, total);
}

template <typename T, typename Weights>
__global__ void __launch_bounds__(kSumThreads, 4)
    weighted_sum(const __grid_constant__ WeightedSum<T> sum, const __grid_constant__ Weights weights, bool aligned) {
  constexpr int kCount = Vector<T>::kCount;
  DRACO_SHARED(int, row, kBatch);
  DRACO_SHARED(T, re, kBatch);
  DRACO_SHARED(T, im, kBatch);
  DRACO_SHARED(int, rows_used, 1);
  const int action = sum.action == nullptr ? kCombine : *sum.action;
  if (action == kKeep) return;
  const int64_t step = int64_t{kSumThreads} * kCount;
  for (int64_t begin = blockIdx.x * step; begin < sum.columns; begin += gridDim.x * step) {
    const int64_t column = begin + threadIdx.x * kCount, left = sum.columns - column;
    const bool whole = aligned && column + kCount <= sum.length, whole_out = aligned && left >= kCount;
    Vector<T> total;
#pragma unroll
    for (int i = 0; i < kCount; ++i) total.at[i] = action == kFillNan ? static_cast<T>(NAN) : T{0};
    if (sum.add && left > 0)
      total = whole_out ? load<true>(sum.out + column, left) : load<false>(sum.out + column, left);
    for (int first = 0; first < sum.count && action == kCombine; first += kBatch) {
      if (first > 0 || sum.count > kBatch || begin == blockIdx.x * step) {  // otherwise they are there already
        __syncthreads();
        if (threadIdx.x < kWarp) {  // the rows that count, in order
          int used = 0;
          for (int batch = first; batch < first + kBatch; batch += kWarp) {
            const int j = batch + threadIdx.x;
            const Complex weight = j < sum.count ? weights[j] : Complex{0, 0};
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
    if (whole_out) {
      store<true>(sum.out + column, left, total);
    } else {
      store<false>(sum.out + column, left, total);
    }
  }
}

template <typename T, typename Weights>
void launch(const Device& device, const WeightedSum<T>& sum, const Weights& weights) {
  if (sum.columns == 0) return;
  const int64_t steps = ceil_div(sum.columns, kSumThreads * Vector<T>::kCount);
  const int64_t blocks = std::min(steps, int64_t{kBlocksPerMultiprocessor} * device.multiprocessors);
  const bool aligned = rows_aligned<T>(sum.rows, sum.stride, sum.count) && rows_aligned<T>(sum.out, 0, 1);
  const auto kernel = weighted_sum<T, Weights>;
  DRACO_LAUNCH(device, kernel, blocks, kSumThreads, 0, sum, weights, aligned);
}

// out (+)= the weighted sum of the rows, kParts of them at a time.
template <typename T>
void encode(const Device& device, const Tensor& rows, int64_t stride, const std::vector<Complex>& weights,
            Tensor& message, bool add) {
  const int64_t length = rows.size(rows.dim() - 1);
  const auto* first = static_cast<const T*>(rows.data_ptr());
  for (size_t part = 0; part < weights.size(); part += kParts) {
    Passed passed{};
    const size_t count = std::min<size_t>(kParts, weights.size() - part);
    std::copy_n(weights.begin() + part, count, passed.weight);
    launch(device,
           WeightedSum<T>{first + part * stride, stride, length, static_cast<int>(count),
                          static_cast<T*>(message.data_ptr()), message.size(0), add || part > 0, nullptr},
           passed);
  }
}

Tensor cyclic_encode(const Tensor& gradients, int64_t workers, int64_t adversaries, int64_t worker) {
  const char* op = "cyclic_encode";
  const std::vector<Complex> weights = check_encode(op, gradients, workers, adversaries, worker);
  const Device device(gradients);
  const int64_t d = gradients.size(1);
  Tensor message = torch::stable::new_empty(gradients, {d + d % 2});
  dispatch_real(op, gradients.scalar_type(), [&](auto zero) {
    encode<decltype(zero)>(device, gradients, gradients.stride(0), weights, message, false);
  });
  return message;
}

void cyclic_encode_add_(Tensor message, const Tensor& gradient, int64_t workers, int64_t adversaries, int64_t worker,
                        int64_t part) {
  const char* op = "cyclic_encode_add_";
  const Complex weight = check_encode_add(op, message, gradient, workers, adversaries, worker, part);
  const Device device(gradient);
  dispatch_real(op, gradient.scalar_type(),
                [&](auto zero) { encode<decltype(zero)>(device, gradient, 0, {weight}, message, true); });
}

Tensor cyclic_combine(const Tensor& messages, const Tensor& weights, int64_t length) {
  const char* op = "cyclic_combine";
  check_pairs(op, messages, length);
  check_weights(op, weights, messages);
  const Device device(messages);
  Tensor out = torch::stable::new_empty(messages, {messages.size(1)});
  combine(device, messages, static_cast<const Complex*>(weights.data_ptr()), nullptr, out.data_ptr());
  return length == messages.size(1) ? out : torch::stable::narrow(out, 0, 0, length);
}

}  // namespace

void combine(const Device& device, const Tensor& messages, const Complex* weights, const int* action, void* out) {
  dispatch_real("cyclic_combine", messages.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    launch(device,
           WeightedSum<T>{static_cast<const T*>(messages.data_ptr()), messages.stride(0), messages.size(1),
                          static_cast<int>(messages.size(0)), static_cast<T*>(out), messages.size(1), false, action},
           Given{weights});
  });
}

}  // namespace draco

DRACO_CUDA_OPS(m) {
  m.impl("cyclic_encode", TORCH_BOX(&draco::cyclic_encode));
  m.impl("cyclic_encode_add_", TORCH_BOX(&draco::cyclic_encode_add_));
  m.impl("cyclic_combine", TORCH_BOX(&draco::cyclic_combine));
}

// A worker's message: the weighted sum of its parts' gradients, in twice the precision of the message, which so is
// rounded once (cpu/cyclic_encode.cpp says why).
//   encode   256 threads a block, 16 bytes of each row a thread and step, at most 32 blocks per multiprocessor. Reads
//            every row once, (count x d elements), writes d; with a carry reads 2 d more and writes d more. More than
//            64 rows take several launches, between which the sum waits in the message and a carry. Where messages are
//            shorter than a gradient, a row is one block of a gradient.
#include "cuda/reduce.cuh"

namespace draco {
namespace {

constexpr int kEncodeThreads = 256, kBlocksPerMultiprocessor = 32;
constexpr int kParts = 64;  // weights as a kernel argument: no copy from the host that a CUDA graph could not keep

struct Parts {
  EncodingWeight weight[kParts];
};

template <typename T>
struct Encode {
  const T* gradients;
  int64_t stride, length;  // of the gradients
  int blocks;              // of a gradient, `columns` apart: each is a row
  int64_t whole;           // columns that all rows have
  int first, count;        // rows
  double cancelling;       // below this part of its terms a sum is 0
  bool real, add;
  T* message;
  T* carry;         // or nullptr
  int64_t columns;  // of both
};

// A sum before it is rounded, as in cpu/kernels/encode.cpp.
template <typename T>
struct Encoded;

template <>
struct Encoded<float> {
  double sum = 0;

  __device__ __forceinline__ void start(float message, float carry) {
    sum = static_cast<double>(message) + static_cast<double>(carry);
  }
  __device__ __forceinline__ void add(DoubleDouble weight, float x) {
    sum = fma(weight.hi, static_cast<double>(x), sum);
  }
  __device__ __forceinline__ DoubleDouble total() const {
    const double rest = sum - static_cast<double>(static_cast<float>(sum));
    return {sum, rest - rest == 0 ? rest : 0};
  }
};

template <>
struct Encoded<double> {
  double hi = 0, lo = 0;

  __device__ __forceinline__ void start(double message, double carry) {
    hi = message;
    lo = carry;
  }
  __device__ __forceinline__ void add(DoubleDouble weight, double x) {
    const DoubleDouble term = two_product(weight.hi, x), sum = two_sum(hi, term.hi);
    lo += sum.lo + fma(weight.lo, x, term.lo);
    hi = sum.hi;
  }
  __device__ __forceinline__ DoubleDouble total() const { return normalised(hi, lo); }
};

// Elements that a block has from a place on: of the last blocks the gradient may have fewer than the message.
template <typename T>
DRACO_DEVICE int64_t block_left(const Encode<T>& encode, int64_t at, int64_t column) {
  const int64_t gradient = encode.length - at, message = encode.columns - column;
  return gradient < message ? gradient : message;
}

// The sums of a thread's columns and the largest of their terms. Columns that do not exist are 0.
template <typename T, bool kWhole>
DRACO_DEVICE void add_up(const Encode<T>& encode, const Parts& parts, int64_t column,
                         DoubleDouble (&total)[Vector<T>::kCount], T (&terms)[Vector<T>::kCount]) {
  constexpr int kCount = Vector<T>::kCount;
  const int64_t left = encode.columns - column;
  Encoded<T> sum[kCount];
  T largest[kCount] = {};
  if (encode.add) {
    const Vector<T> message = load<kWhole>(encode.message + column, left);
    const Vector<T> carry = load<kWhole>(encode.carry + column, left);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      sum[i].start(message.at[i], carry.at[i]);
      largest[i] = fabs(message.at[i]);
    }
  }
  int gradient = encode.first / encode.blocks, block = encode.first % encode.blocks;
  for (int j = 0; j < encode.count; ++j) {
    const int64_t at = block * encode.columns + column;
    const Vector<T> z = load<kWhole>(encode.gradients + gradient * encode.stride + at, block_left(encode, at, column));
    if (++block == encode.blocks) {
      block = 0;
      ++gradient;
    }
    const EncodingWeight& weight = parts.weight[j];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      sum[i].add(weight.re, z.at[i]);
      if (!encode.real) sum[i].add(i % 2 == 0 ? -weight.im : weight.im, z.at[i ^ 1]);
      const T size = fabs(z.at[i]);
      largest[i] = largest[i] > size ? largest[i] : size;
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    // Both of a pair enter both of a sum, if not of this part then of one before it.
    terms[i] = !encode.real && largest[i ^ 1] > largest[i] ? largest[i ^ 1] : largest[i];
    total[i] = sum[i].total();
    if (fabs(total[i].hi) < encode.cancelling * static_cast<double>(terms[i])) total[i] = {0, 0};
  }
}

template <typename T>
__global__ void __launch_bounds__(kEncodeThreads)
    encode_kernel(const __grid_constant__ Encode<T> encode, const __grid_constant__ Parts parts, bool aligned) {
  constexpr int kCount = Vector<T>::kCount;
  const int64_t step = int64_t{kEncodeThreads} * kCount;
  for (int64_t begin = blockIdx.x * step; begin < encode.columns; begin += gridDim.x * step) {
    const int64_t column = begin + threadIdx.x * kCount, left = encode.columns - column;
    const bool whole = aligned && column + kCount <= encode.whole;
    DoubleDouble total[kCount];
    T terms[kCount];
    if (whole) {
      add_up<T, true>(encode, parts, column, total, terms);
    } else {
      add_up<T, false>(encode, parts, column, total, terms);
    }
    double largest = 0, term = 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const double size = fabs(total[i].hi), own = static_cast<double>(terms[i]);
      largest = size > largest ? size : largest;
      term = own > term ? own : term;
    }
    constexpr int kTogether = kCancelBlock / kCount;  // threads that have so many columns
    const bool cancelled = largest_of_lanes(largest, kTogether) < encode.cancelling * largest_of_lanes(term, kTogether);
    Vector<T> message, carry;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      message.at[i] = cancelled ? T{0} : static_cast<T>(total[i].hi);
      carry.at[i] = cancelled ? T{0} : static_cast<T>(total[i].lo);
    }
    if (whole) {
      store<true>(encode.message + column, left, message);
      if (encode.carry != nullptr) store<true>(encode.carry + column, left, carry);
    } else {
      store<false>(encode.message + column, left, message);
      if (encode.carry != nullptr) store<false>(encode.carry + column, left, carry);
    }
  }
}

// gradients: a matrix, or one alone.
template <typename T>
void launch(const Device& device, const Tensor& gradients, int64_t stride, const EncodingWeights& weights, int blocks,
            Tensor& message, T* carry, bool add) {
  if (message.size(0) == 0) return;
  const int64_t length = gradients.size(gradients.dim() - 1), columns = message.size(0);
  const auto* from = static_cast<const T*>(gradients.data_ptr());
  auto* to = static_cast<T*>(message.data_ptr());
  const int64_t steps = ceil_div(columns, kEncodeThreads * Vector<T>::kCount);
  const int64_t grid = std::min(steps, int64_t{kBlocksPerMultiprocessor} * device.multiprocessors);
  const bool aligned = rows_aligned<T>(from, stride, gradients.dim() == 1 ? 1 : gradients.size(0)) &&
                       rows_aligned<T>(from, columns, blocks) && rows_aligned<T>(to, 0, 1) &&
                       (carry == nullptr || rows_aligned<T>(carry, 0, 1));
  const std::vector<EncodingWeight>& all = weights.of_blocks;
  for (size_t row = 0; row < all.size(); row += kParts) {
    Parts parts{};
    const size_t count = std::min<size_t>(kParts, all.size() - row);
    std::copy_n(all.begin() + row, count, parts.weight);
    const Encode<T> encode{from,
                           stride,
                           length,
                           blocks,
                           length - (blocks - 1) * columns,
                           static_cast<int>(row),
                           static_cast<int>(count),
                           cancelling<T>(parts.weight, static_cast<int>(count)),
                           weights.real,
                           add || row > 0,
                           to,
                           carry,
                           columns};
    const auto kernel = encode_kernel<T>;
    DRACO_LAUNCH(device, kernel, grid, kEncodeThreads, 0, encode, parts, aligned);
  }
}

void cyclic_encode_out(const Tensor& gradients, int64_t workers, int64_t adversaries, int64_t worker, Tensor out,
                       int64_t compression) {
  const char* op = "cyclic_encode";
  const EncodingWeights weights = check_encode(op, gradients, workers, adversaries, worker, compression);
  const int blocks = static_cast<int>(compression);
  check_out(op, out, message_length(gradients.size(1), blocks), gradients);
  const Device device(gradients);
  dispatch_real(op, gradients.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const bool several = weights.of_blocks.size() > kParts;
    Tensor carry = new_scratch(gradients, several ? out.size(0) * sizeof(T) : 0);
    launch<T>(device, gradients, gradients.stride(0), weights, blocks, out,
              several ? static_cast<T*>(carry.data_ptr()) : nullptr, false);
  });
}

Tensor cyclic_encode(const Tensor& gradients, int64_t workers, int64_t adversaries, int64_t worker,
                     int64_t compression) {
  check_matrix("cyclic_encode", "gradients", gradients);
  check_workers("cyclic_encode", workers, adversaries, compression);
  const int64_t length = message_length(gradients.size(1), static_cast<int>(compression));
  Tensor message = torch::stable::new_empty(gradients, {length});
  cyclic_encode_out(gradients, workers, adversaries, worker, message, compression);
  return message;
}

void cyclic_encode_add_(Tensor message, Tensor carry, const Tensor& gradient, int64_t workers, int64_t adversaries,
                        int64_t worker, int64_t part, bool first, int64_t compression) {
  const char* op = "cyclic_encode_add_";
  const EncodingWeights weights =
      check_encode_add(op, message, carry, gradient, workers, adversaries, worker, part, compression);
  const Device device(gradient);
  dispatch_real(op, gradient.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    launch<T>(device, gradient, 0, weights, static_cast<int>(compression), message, static_cast<T*>(carry.data_ptr()),
              !first);
  });
}

}  // namespace
}  // namespace draco

DRACO_CUDA_OPS(m) {
  m.impl("cyclic_encode", TORCH_BOX(&draco::cyclic_encode));
  m.impl("cyclic_encode_out", TORCH_BOX(&draco::cyclic_encode_out));
  m.impl("cyclic_encode_add_", TORCH_BOX(&draco::cyclic_encode_add_));
}

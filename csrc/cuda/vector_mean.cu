// The mean of vectors that lie apart. Moves count x d elements in, d out, 16 bytes a thread and step. A launch more for
// every 256 vectors: kernels get their addresses as arguments, as a CUDA graph keeps them, and write them to memory.
#include "core/majority.h"
#include "cuda/common.cuh"

namespace draco {
namespace {

constexpr int kMeanThreads = 256, kMeanBlocksPerMultiprocessor = 32;
constexpr int kAddressesPerLaunch = 256;

struct Addresses {
  const void* at[kAddressesPerLaunch];
  int count;
};

__global__ void write_addresses(const __grid_constant__ Addresses addresses, const void** to) {
  for (int i = threadIdx.x; i < addresses.count; i += blockDim.x) to[i] = addresses.at[i];
}

template <typename T, bool kWhole>
DRACO_DEVICE void mean_columns(const void* const* vectors, int count, int64_t columns, int64_t column,
                               typename Element<T>::Bits* out) {
  using Bits = typename Element<T>::Bits;
  using Sum = typename Element<T>::Sum;
  using Elements = Vector<Bits>;
  const int64_t left = columns - column;
  Sum total[Elements::kCount];
  Elements bits;
  for (int i = 0; i < count; ++i) {
    bits = load<kWhole>(static_cast<const Bits*>(vectors[i]) + column, left);
#pragma unroll
    for (int c = 0; c < Elements::kCount; ++c) {
      const Sum value = value_of<T>(bits.at[c]);
      total[c] = i == 0 ? value : total[c] + value;
    }
  }
  if (count > 1) {  // a single one's bits stay as they are
#pragma unroll
    for (int c = 0; c < Elements::kCount; ++c) bits.at[c] = mean_bits<T>(total[c] / static_cast<Sum>(count));
  }
  store<kWhole>(out + column, left, bits);
}

template <typename T>
__global__ void __launch_bounds__(kMeanThreads)
    mean_kernel(const void* const* vectors, int count, int64_t columns, bool aligned, typename Element<T>::Bits* out) {
  constexpr int kCount = Vector<typename Element<T>::Bits>::kCount;
  const int64_t step = int64_t{kMeanThreads} * kCount;
  for (int64_t begin = blockIdx.x * step; begin < columns; begin += gridDim.x * step) {
    const int64_t column = begin + threadIdx.x * kCount;
    if (aligned && column + kCount <= columns) {
      mean_columns<T, true>(vectors, count, columns, column, out);
    } else if (column < columns) {
      mean_columns<T, false>(vectors, count, columns, column, out);
    }
  }
}

void vector_mean_out(const std::vector<Tensor> vectors, Tensor out) {
  const char* op = "vector_mean";
  check_vectors(op, vectors, out);
  const Device device(out);
  const int64_t count = vectors.size(), d = out.size(0);
  if (d == 0) return;
  Tensor scratch = new_scratch(out, count * sizeof(void*));
  auto* const table = static_cast<const void**>(scratch.data_ptr());
  bool aligned = rows_aligned<unsigned char>(out.data_ptr(), 0, 1);
  Addresses addresses;
  for (int64_t first = 0; first < count; first += addresses.count) {
    addresses.count = static_cast<int>(std::min<int64_t>(kAddressesPerLaunch, count - first));
    for (int i = 0; i < addresses.count; ++i) {
      addresses.at[i] = vectors[first + i].data_ptr();
      aligned &= rows_aligned<unsigned char>(addresses.at[i], 0, 1);
    }
    DRACO_LAUNCH(device, write_addresses, 1, kMeanThreads, 0, addresses, table + first);
  }
  dispatch_floating(op, "vectors", out.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    using Bits = typename Element<T>::Bits;
    const int64_t steps = ceil_div(d, kMeanThreads * Vector<Bits>::kCount);
    const int64_t blocks = std::min(steps, int64_t{kMeanBlocksPerMultiprocessor} * device.multiprocessors);
    DRACO_LAUNCH(device, mean_kernel<T>, blocks, kMeanThreads, 0, table, static_cast<int>(count), d, aligned,
                 static_cast<Bits*>(out.data_ptr()));
  });
}

}  // namespace
}  // namespace draco

DRACO_CUDA_OPS(m) { m.impl("vector_mean_out", TORCH_BOX(&draco::vector_mean_out)); }

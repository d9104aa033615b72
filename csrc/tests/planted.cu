// Two kernels with bugs that can be switched on: what runs CUDA kernels on the host must notice them.
#include "cuda/common.cuh"

namespace draco {
namespace {

constexpr int kThreads = 64;

// Sums of neighbours; planted: the last thread reads beyond the end.
__global__ void add_neighbours(const float* from, float* to, int64_t count, bool planted) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < count) to[i] = from[i] + (i + 1 < count || planted ? from[i + 1] : 0.0f);
}

// Every block reversed through shared memory; planted: without waiting for the other threads.
__global__ void reverse_blocks(const float* from, float* to, int64_t count, bool planted) {
  DRACO_SHARED(float, values, kThreads);
  const int64_t begin = int64_t{blockIdx.x} * kThreads;
  const int present = static_cast<int>(count - begin < kThreads ? count - begin : kThreads);
  const int own = threadIdx.x;
  if (own < present) values[own] = from[begin + own];
  if (!planted) __syncthreads();
  if (own < present) to[begin + own] = values[present - 1 - own];
}

template <typename Kernel>
Tensor run(Kernel kernel, const Tensor& values, bool planted) {
  const Device device(values);
  const int64_t count = values.size(0);
  Tensor out = torch::stable::new_empty(values, {count});
  DRACO_LAUNCH(device, kernel, ceil_div(count, kThreads), kThreads, 0, static_cast<const float*>(values.data_ptr()),
               static_cast<float*>(out.data_ptr()), count, planted);
  return out;
}

Tensor planted_read(const Tensor& values, bool planted) { return run(add_neighbours, values, planted); }
Tensor planted_barrier(const Tensor& values, bool planted) { return run(reverse_blocks, values, planted); }

}  // namespace
}  // namespace draco

STABLE_TORCH_LIBRARY_FRAGMENT(DRACO_LIBRARY, m) {
  m.def("planted_read(Tensor values, bool planted) -> Tensor");
  m.def("planted_barrier(Tensor values, bool planted) -> Tensor");
}

DRACO_CUDA_OPS(m) {
  m.impl("planted_read", TORCH_BOX(&draco::planted_read));
  m.impl("planted_barrier", TORCH_BOX(&draco::planted_barrier));
}

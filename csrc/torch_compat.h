// Needs of CUDA ops beyond the stable ABI, from torch and from the runtime: the device and its current stream, launches
// with their check, shared memory, registration. The only place that knows torch's C++ versions.
//
// With DRACO_SIMT the same .cu text is compiled for the host and run by csrc/tests/simt.h: that is how it is tested
// where there is no GPU. DRACO_SHARED, DRACO_LAUNCH and DRACO_CUDA_OPS are all that differs.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "checks.h"

#ifdef DRACO_SIMT
#include "tests/simt.h"
#else
#include <cuda_runtime.h>
#endif

namespace draco {

#ifdef DRACO_SIMT

// Few multiprocessors, so that small inputs already take several rounds of a grid.
struct Device {
  static constexpr int multiprocessors = 2;
  explicit Device(const Tensor&) {}
};

#define DRACO_SHARED(type, name, count) type* const name = simt::shared<type>(count)
#define DRACO_DYNAMIC_SHARED(name) unsigned char* const name = simt::dynamic_shared()
#define DRACO_LAUNCH(device, kernel, blocks, threads, shared_bytes, ...)       \
  do {                                                                         \
    static_cast<void>(device);                                                 \
    simt::launch(blocks, threads, shared_bytes, [&] { kernel(__VA_ARGS__); }); \
  } while (0)
#define DRACO_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(DRACO_LIBRARY, CPU, m)

inline void copy_on_device(const Device&, const void* from, void* to, size_t bytes) {
  if (bytes > 0) memcpy(to, from, bytes);
}

#else

// Makes the tensor's device current for as long as it lives; kernels go to that device's current stream.
struct Device {
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;
  int multiprocessors;

  explicit Device(const Tensor& tensor) : guard(tensor.get_device_index()) {
    const int32_t index = tensor.get_device_index();
#if defined(TORCH_VERSION_2_13_0) && TORCH_FEATURE_VERSION >= TORCH_VERSION_2_13_0
    stream = static_cast<cudaStream_t>(torch::stable::accelerator::getCurrentStream(index).nativeHandle());
#else
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &current));
    stream = static_cast<cudaStream_t>(current);
#endif
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, index), "device");
  }

  // Not STD_CUDA_CHECK: it needs libtorch_cuda, and the module must load without it.
  static void check(cudaError_t error, const char* what) {
    STD_TORCH_CHECK(error == cudaSuccess, "draco_ext: CUDA ", what, ": ", cudaGetErrorString(error));
  }
};

#define DRACO_SHARED(type, name, count) __shared__ type name[count]
#define DRACO_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#define DRACO_LAUNCH(device, kernel, blocks, threads, shared_bytes, ...)                            \
  do {                                                                                              \
    kernel<<<static_cast<unsigned>(blocks), threads, shared_bytes, (device).stream>>>(__VA_ARGS__); \
    ::draco::Device::check(cudaGetLastError(), #kernel);                                            \
  } while (0)
#define DRACO_CUDA_OPS(m) STABLE_TORCH_LIBRARY_IMPL(DRACO_LIBRARY, CUDA, m)

inline void copy_on_device(const Device& device, const void* from, void* to, size_t bytes) {
  Device::check(cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, device.stream), "copy");
}

#endif

}  // namespace draco

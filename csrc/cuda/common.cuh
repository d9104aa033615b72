// Shared by the kernels: 16-byte accesses and the last block of a grid.
#pragma once

#include "core/arena.h"
#include "core/common.h"
#include "torch_compat.h"

#define DRACO_DEVICE static __device__ __forceinline__

namespace draco {

// A mask as kernels read it; its rows need not be contiguous.
struct Mask {
  const uint8_t* bits;
  int64_t stride;

  explicit Mask(const OptionalTensor& mask)
      : bits(mask.has_value() ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr),
        stride(mask.has_value() ? mask->stride(0) : 0) {}
  DRACO_MEMBER bool operator[](int64_t j) const { return bits != nullptr && bits[j * stride] != 0; }
};

namespace {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

template <typename T>
struct alignas(16) Vector {
  static constexpr int kCount = 16 / sizeof(T);
  T at[kCount];
};

// True where every row can be read 16 bytes at a time from any column that is a multiple of Vector<T>::kCount.
template <typename T>
bool rows_aligned(const void* first, int64_t stride, int64_t rows) {
  return reinterpret_cast<uintptr_t>(first) % 16 == 0 && (rows <= 1 || stride * sizeof(T) % 16 == 0);
}

// Loads the next kCount elements; those beyond the `left` that exist are 0. kWhole: all exist and are aligned.
template <bool kWhole, typename T>
DRACO_DEVICE Vector<T> load(const T* from, int64_t left) {
  if constexpr (kWhole) {
    return *reinterpret_cast<const Vector<T>*>(from);
  } else {
    Vector<T> vector;
#pragma unroll
    for (int i = 0; i < Vector<T>::kCount; ++i) vector.at[i] = i < left ? from[i] : T{};
    return vector;
  }
}

template <bool kWhole, typename T>
DRACO_DEVICE void store(T* to, int64_t left, const Vector<T>& vector) {
  if constexpr (kWhole) {
    *reinterpret_cast<Vector<T>*>(to) = vector;
  } else {
#pragma unroll
    for (int i = 0; i < Vector<T>::kCount; ++i)
      if (i < left) to[i] = vector.at[i];
  }
}

// True in all threads of the block that is the last of the grid to come here: it sees what all blocks wrote before.
DRACO_DEVICE bool is_last_block(unsigned* arrived) {
  DRACO_SHARED(unsigned, before, 1);
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    before[0] = atomicAdd(arrived, 1u);
    __threadfence();
  }
  __syncthreads();
  return before[0] == gridDim.x - 1;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bytes on the tensor's device.
inline Tensor new_scratch(const Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, ScalarType::Byte);
}

// Memory on the tensor's device for the arrays that `place` takes of an arena. Calls it twice: to count, then to have
// them.
template <typename Place>
Tensor new_arena(const Tensor& like, Place&& place) {
  Arena count;
  place(count);
  Tensor scratch = new_scratch(like, count.needed());
  Arena arena(static_cast<unsigned char*>(scratch.data_ptr()), count.needed());
  place(arena);
  return scratch;
}

}  // namespace
}  // namespace draco

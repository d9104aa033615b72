// Shared by the CPU ops: masks, row pointers, results, threads.
#pragma once

#include <sys/mman.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <vector>

#include "checks.h"
#include "core/arena.h"
#include "cpu/floating_point.h"
#include "cpu/kernels.h"

namespace draco {

// By which a kernel is found in its table.
template <typename T>
constexpr Dtype kDtype = std::is_same_v<T, float>    ? Dtype::kFloat32
                         : std::is_same_v<T, double> ? Dtype::kFloat64
                         : std::is_same_v<T, Half>   ? Dtype::kFloat16
                                                     : Dtype::kBFloat16;

// The mask's entries, one for each row of `like`; all 0 where there is no mask.
inline std::vector<uint8_t> read_mask(const char* op, const char* name, const OptionalTensor& mask,
                                      const Tensor& like) {
  std::vector<uint8_t> bits(like.size(0), 0);
  check_mask(op, name, mask, like);
  if (!mask.has_value()) return bits;
  const auto* from = static_cast<const uint8_t*>(mask->data_ptr());
  for (size_t j = 0; j < bits.size(); ++j) bits[j] = from[j * mask->stride(0)] != 0;
  return bits;
}

template <typename T>
const T* row_pointer(const Tensor& matrix, int64_t row) {
  return static_cast<const T*>(matrix.data_ptr()) + row * matrix.stride(0);
}

template <typename T>
std::vector<const T*> row_pointers(const Tensor& matrix) {
  std::vector<const T*> rows(matrix.size(0));
  for (size_t j = 0; j < rows.size(); ++j) rows[j] = row_pointer<T>(matrix, j);
  return rows;
}

// A new tensor on the CPU. Small decodes would spend much of their time in torch::stable::new_empty, which finds its op
// by name and boxes every argument.
inline Tensor new_tensor(const std::vector<int64_t>& sizes, int32_t dtype) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0; stride *= std::max<int64_t>(sizes[i], 1)) strides[i] = stride;
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(sizes.size(), sizes.data(), strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline Tensor mask_tensor(const std::vector<uint8_t>& bits) {
  Tensor mask = new_tensor({static_cast<int64_t>(bits.size())}, aoti_torch_dtype_bool());
  std::copy(bits.begin(), bits.end(), static_cast<uint8_t*>(mask.data_ptr()));
  return mask;
}

inline Tensor flag_tensor(bool value) {
  Tensor flag = new_tensor({}, aoti_torch_dtype_bool());
  *static_cast<uint8_t*>(flag.data_ptr()) = value;
  return flag;
}

// A new result of this shape. Large ones are offered huge pages: faulting in 4 KiB at a time would cost as much as a
// fifth of a decode.
inline Tensor new_result(const Tensor& like, int64_t size) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  Tensor result = new_tensor({size}, dtype);
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  const auto begin = reinterpret_cast<uintptr_t>(result.data_ptr());
  const uintptr_t end = begin + size * result.element_size(), first = (begin + kHuge - 1) & ~(kHuge - 1);
  if (first < end) madvise(reinterpret_cast<void*>(first), (end - first) & ~(kHuge - 1), MADV_HUGEPAGE);
#endif
  return result;
}

// True where a result of this many bytes would only fill the caches.
inline bool is_large(int64_t bytes) { return bytes > int64_t{4} << 20; }

// True in the child of a fork (set in dispatch.cpp).
inline bool is_forked_child = false;

// f(begin, end) for parts of at least `grain` of the range from 0 to count, on torch's threads and in their right mode.
// Threads of libgomp do not survive a fork: a child that asked for them would wait for ever, so it does without.
template <typename F>
void parallel(int64_t count, int64_t grain, const F& f) {
  const auto in_mode = [&](int64_t begin, int64_t end) {
    const FloatingPointMode mode;
    f(begin, end);
  };
  if (count > grain && !is_forked_child) return torch::stable::parallel_for(0, count, grain, in_mode);
  if (count > 0) in_mode(int64_t{0}, count);
}

// Memory of one thread for as long as it works; not from its stack, which may be a small one. The first byte is on a
// multiple of 64. Not cleared: much of it may never be touched.
class Scratch {
 public:
  explicit Scratch(int64_t bytes) : size_(bytes), bytes_(new unsigned char[bytes + 64]) {}
  void* get() const {
    return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(bytes_.get()) + 63) & ~uintptr_t{63});
  }
  Arena arena() const { return Arena(static_cast<unsigned char*>(get()), size_); }

 private:
  int64_t size_;
  std::unique_ptr<unsigned char[]> bytes_;
};

constexpr int64_t kAlignment = 64;  // columns: whole lines of the cache, whatever the dtype

// f(begin, columns, scratch) for chunks of at most `most` columns, a multiple of `alignment` but for the last, as many
// for each of torch's threads. Where chunks begin depends on the number of threads. `scratch` bytes, and as many more
// for each column of a chunk as `per_column`, are lent to a thread for one chunk after the other.
template <typename F>
void for_each_chunk(int64_t columns, int64_t most, int64_t alignment, int64_t scratch, int64_t per_column, const F& f) {
  int64_t chunks = (columns + most - 1) / most, width = columns;
  if (chunks > 1) {
    const int64_t threads = torch::stable::get_num_threads();
    chunks = (chunks + threads - 1) / threads * threads;
    width = (columns + chunks * alignment - 1) / (chunks * alignment) * alignment;
    chunks = (columns + width - 1) / width;
  }
  parallel(chunks, 1, [&](int64_t first, int64_t last) {
    const Scratch lent(scratch + per_column * width);
    for (int64_t t = first; t < last; ++t) f(t * width, std::min(width, columns - t * width), lent.get());
  });
}

}  // namespace draco

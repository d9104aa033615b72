// The mean of vectors that lie apart. Moves count x d elements in, d out; the sum of a chunk stays in the second-level
// cache.
#include "core/majority.h"
#include "cpu/common.h"

namespace draco {
namespace {

constexpr int64_t kMeanChunk = 16384;  // columns

template <typename T>
void mean(const std::vector<Tensor>& vectors, Tensor& out) {
  using Sum = typename Element<T>::Sum;
  constexpr auto kIndex = static_cast<int>(kDtype<T>);
  const int64_t count = vectors.size(), d = out.size(0);
  auto* to = static_cast<T*>(out.data_ptr());
  std::vector<const T*> from(count);
  for (int64_t i = 0; i < count; ++i) from[i] = static_cast<const T*>(vectors[i].data_ptr());
  if (count == 1) {
    if (from[0] != to) std::copy_n(from[0], d, to);
    return;
  }
  const Kernels& kernel = kernels();
  for_each_chunk(d, kMeanChunk, kAlignment, kVoteScratch, sizeof(Sum), [&](int64_t begin, int64_t columns, void* lent) {
    auto* sum = reinterpret_cast<Sum*>(static_cast<unsigned char*>(lent) + kVoteScratch);
    uint8_t differs = 0;
    VoteChunk chunk{};  // a vote of each vector alone, which adds it up
    chunk.members = 1;
    chunk.columns = columns;
    chunk.sum = sum;
    chunk.differs = &differs;
    chunk.scratch = lent;
    for (int64_t i = 0; i < count; ++i) {
      const void* row = from[i] + begin;
      chunk.rows = &row;
      chunk.first = i == 0;
      kernel.vote[kIndex](chunk);
    }
    kernel.finish[kIndex](sum, columns, static_cast<double>(count), is_large(d * sizeof(T)), to + begin);
  });
}

void vector_mean_out(const std::vector<Tensor> vectors, Tensor out) {
  const char* op = "vector_mean";
  check_vectors(op, vectors, out);
  dispatch_floating(op, "vectors", out.scalar_type(), [&](auto zero) { mean<decltype(zero)>(vectors, out); });
}

}  // namespace
}  // namespace draco

STABLE_TORCH_LIBRARY_IMPL(draco_ext, CPU, m) { m.impl("vector_mean_out", TORCH_BOX(&draco::vector_mean_out)); }

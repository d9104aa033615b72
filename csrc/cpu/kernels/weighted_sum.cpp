// Sums of messages, each times a complex weight.
#include "cpu/kernels/pairs.h"
#include "cpu/kernels/set.h"

namespace draco {
namespace {

template <typename T, int kCount, bool kPlain>
void weighted_sum_rows(const T* const* rows, const double* weights, int64_t columns, T* sum, bool add) {
  constexpr int kStep = VectorOf<T>::kSize, kVectors = kLine / kBytes;
  Vector<T> re[kCount], im[kCount];
  for (int j = 0; j < kCount && !kPlain; ++j) {
    const PairWeight<T> weight(weights[2 * j], weights[2 * j + 1]);
    re[j] = weight.re;
    im[j] = weight.im;
  }
  const T* from[kCount];
  for (int j = 0; j < kCount; ++j) from[j] = rows[j];
  const auto one = [&](int j, Vector<T> v, Vector<T> total) __attribute__((always_inline)) {
    if constexpr (kPlain) {
      return total + v;
    } else {
      return add_weighted<T>(re[j], im[j], v, total);
    }
  };
  int64_t c = 0;
  for (; c + kVectors * kStep <= columns; c += kVectors * kStep) {
    DRACO_UNROLL for (int j = 0; j < kCount; ++j) fetch_ahead(from[j] + c);
    DRACO_UNROLL for (int64_t at = c; at < c + kVectors * kStep; at += kStep) {
      Vector<T> total = add ? load(sum + at) : Vector<T>{};
      DRACO_UNROLL for (int j = 0; j < kCount; ++j) total = one(j, load(from[j] + at), total);
      store(sum + at, total);
    }
  }
  for (; c < columns; c += kStep) {  // the last columns, copied to where whole vectors may be read
    const size_t bytes = (columns - c < kStep ? columns - c : kStep) * sizeof(T);
    Vector<T> total = {};
    if (add) memcpy(&total, sum + c, bytes);
    for (int j = 0; j < kCount; ++j) {
      Vector<T> v = {};
      memcpy(&v, from[j] + c, bytes);
      total = one(j, v, total);
    }
    memcpy(sum + c, &total, bytes);
  }
}

template <typename T, bool kPlain>
void weighted_sum_list(const WeightedSumChunk<T>& chunk) {
  bool add = false;
  for (int j = 0; j < chunk.count; j += 4, add = true) {
    const T* const* rows = chunk.rows + j;
    for (int each = 0; each < chunk.sums; ++each) {
      const double* weights = kPlain ? nullptr : chunk.weights + 2 * (int64_t{each} * chunk.count + j);
      T* sum = chunk.sum + each * chunk.stride;
      switch (chunk.count - j) {
        case 1:
          weighted_sum_rows<T, 1, kPlain>(rows, weights, chunk.columns, sum, add);
          break;
        case 2:
          weighted_sum_rows<T, 2, kPlain>(rows, weights, chunk.columns, sum, add);
          break;
        case 3:
          weighted_sum_rows<T, 3, kPlain>(rows, weights, chunk.columns, sum, add);
          break;
        default:
          weighted_sum_rows<T, 4, kPlain>(rows, weights, chunk.columns, sum, add);
          break;
      }
    }
  }
  for (int each = 0; chunk.count == 0 && each < chunk.sums; ++each)
    memset(chunk.sum + each * chunk.stride, 0, chunk.columns * sizeof(T));
}

}  // namespace

namespace DRACO_ISA {

template <typename T>
void weighted_sum(const WeightedSumChunk<T>& chunk) {
  if (chunk.weights == nullptr) {
    weighted_sum_list<T, true>(chunk);
  } else {
    weighted_sum_list<T, false>(chunk);
  }
}

template void weighted_sum<float>(const WeightedSumChunk<float>&);
template void weighted_sum<double>(const WeightedSumChunk<double>&);

}  // namespace DRACO_ISA
}  // namespace draco

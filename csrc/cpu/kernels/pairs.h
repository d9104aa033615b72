// Pairs of columns as complex numbers, in vectors.
#pragma once

#include <type_traits>

#include "cpu/kernels/vectors.h"

namespace draco {
namespace {

// Real and imaginary parts of every pair exchanged.
template <typename T>
DRACO_HD Vector<T> swap_pairs(Vector<T> v) {
#if defined(__clang__)
  Vector<T> swapped;
  for (int i = 0; i < VectorOf<T>::kSize; ++i) swapped[i] = v[i ^ 1];
  return swapped;
#else
  using Index = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;
  Vector<Index> index;
  for (int i = 0; i < VectorOf<T>::kSize; ++i) index[i] = i ^ 1;
  return __builtin_shuffle(v, index);
#endif
}

// A complex number that vectors of pairs are multiplied with.
template <typename T>
struct PairWeight {
  Vector<T> re, im;  // the imaginary part's sign alternates
  DRACO_MEMBER PairWeight(double real, double imaginary) {
    for (int i = 0; i < VectorOf<T>::kSize; ++i) {
      re[i] = static_cast<T>(real);
      im[i] = static_cast<T>(i % 2 ? imaginary : -imaginary);
    }
  }
};

// sum + weight * v: the one way in which messages are added up, so that a sum has the same bits whoever makes it.
template <typename T>
DRACO_HD Vector<T> add_weighted(Vector<T> re, Vector<T> im, Vector<T> v, Vector<T> sum) {
  return multiply_add<T>(re, v, multiply_add<T>(im, swap_pairs<T>(v), sum));
}

}  // namespace
}  // namespace draco

// A worker's message: the weighted sum of its parts' gradients, as complex numbers on pairs of elements.
// cyclic_encode moves (2s+1) x d elements in and d out; cyclic_encode_add_ reads the gradient and the message, writes
// the message.
#include "core/cyclic.h"
#include "cpu/cyclic.h"

namespace draco {
namespace {

// message (+)= sum over parts of weight * gradient. An odd last element is the real part of a pair.
template <typename T>
void accumulate(const std::vector<const T*>& gradients, const std::vector<Complex>& weights, int64_t length, T* message,
                bool add) {
  combine<T>(gradients, weights.data(), length / 2 * 2, message, add);
  if (length % 2 == 0) return;
  double re = add ? message[length - 1] : 0, im = add ? message[length] : 0;
  for (size_t i = 0; i < gradients.size(); ++i) {
    re += weights[i].re * gradients[i][length - 1];
    im += weights[i].im * gradients[i][length - 1];
  }
  message[length - 1] = static_cast<T>(re);
  message[length] = static_cast<T>(im);
}

Tensor cyclic_encode(const Tensor& gradients, int64_t workers, int64_t adversaries, int64_t worker) {
  const char* op = "cyclic_encode";
  const std::vector<Complex> weights = check_encode(op, gradients, workers, adversaries, worker);
  const int64_t d = gradients.size(1);
  Tensor message = new_result(gradients, d + d % 2);
  dispatch_real(op, gradients.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    accumulate<T>(row_pointers<T>(gradients), weights, d, static_cast<T*>(message.data_ptr()), false);
  });
  return message;
}

void cyclic_encode_add_(Tensor message, const Tensor& gradient, int64_t workers, int64_t adversaries, int64_t worker,
                        int64_t part) {
  const char* op = "cyclic_encode_add_";
  const Complex weight = check_encode_add(op, message, gradient, workers, adversaries, worker, part);
  const int64_t d = gradient.size(0);
  dispatch_real(op, gradient.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    accumulate<T>({static_cast<const T*>(gradient.data_ptr())}, {weight}, d, static_cast<T*>(message.data_ptr()), true);
  });
}

}  // namespace
}  // namespace draco

STABLE_TORCH_LIBRARY_IMPL(draco_ext, CPU, m) {
  m.impl("cyclic_encode", TORCH_BOX(&draco::cyclic_encode));
  m.impl("cyclic_encode_add_", TORCH_BOX(&draco::cyclic_encode_add_));
}

// A worker's message: the weighted sum of its parts' gradients, as complex numbers on pairs of elements.
// Parts are added up in twice the precision of the message, which is so rounded once: what parts have in common and
// cancels in a message leaves no rounding behind that the decoder could take for an error.
// cyclic_encode moves (2s+1) x d elements in and d out; cyclic_encode_add_ reads the gradient and, but for the first
// part, the message and what rounding has left of it, and writes these two.
#include "core/cyclic.h"
#include "cpu/cyclic.h"

namespace draco {
namespace {

constexpr int64_t kEncodeChunk = 8192;  // columns

template <typename T>
void encode(const std::vector<const T*>& gradients, const std::vector<EncodingWeight>& weights, int64_t length,
            T* message, T* carry, bool add, bool real) {
  const Kernels& kernel = kernels();
  for_each_chunk(length, kEncodeChunk, kAlignment, 0, 0, [&](int64_t begin, int64_t columns, void*) {
    std::vector<const T*> at(gradients.size());
    for (size_t i = 0; i < gradients.size(); ++i) at[i] = gradients[i] + begin;
    kernel.encode(EncodeChunk<T>{at.data(), weights.data(), static_cast<int>(at.size()), columns, message + begin,
                                 carry == nullptr ? nullptr : carry + begin, add, real});
  });
}

void cyclic_encode_out(const Tensor& gradients, int64_t workers, int64_t adversaries, int64_t worker, Tensor out) {
  const char* op = "cyclic_encode";
  const std::vector<EncodingWeight> weights = check_encode(op, gradients, workers, adversaries, worker);
  const int64_t d = gradients.size(1);
  check_out(op, out, d + d % 2, gradients);
  dispatch_real(op, gradients.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    encode<T>(row_pointers<T>(gradients), weights, d, static_cast<T*>(out.data_ptr()), nullptr, false,
              has_real_weights(workers, adversaries));
  });
}

Tensor cyclic_encode(const Tensor& gradients, int64_t workers, int64_t adversaries, int64_t worker) {
  check_matrix("cyclic_encode", "gradients", gradients);
  const int64_t d = gradients.size(1);
  Tensor message = new_result(gradients, d + d % 2);
  cyclic_encode_out(gradients, workers, adversaries, worker, message);
  return message;
}

void cyclic_encode_add_(Tensor message, Tensor carry, const Tensor& gradient, int64_t workers, int64_t adversaries,
                        int64_t worker, int64_t part, bool first) {
  const char* op = "cyclic_encode_add_";
  const EncodingWeight weight = check_encode_add(op, message, carry, gradient, workers, adversaries, worker, part);
  const int64_t d = gradient.size(0);
  dispatch_real(op, gradient.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    encode<T>({static_cast<const T*>(gradient.data_ptr())}, {weight}, d, static_cast<T*>(message.data_ptr()),
              static_cast<T*>(carry.data_ptr()), !first, has_real_weights(workers, adversaries));
  });
}

}  // namespace
}  // namespace draco

STABLE_TORCH_LIBRARY_IMPL(draco_ext, CPU, m) {
  m.impl("cyclic_encode", TORCH_BOX(&draco::cyclic_encode));
  m.impl("cyclic_encode_out", TORCH_BOX(&draco::cyclic_encode_out));
  m.impl("cyclic_encode_add_", TORCH_BOX(&draco::cyclic_encode_add_));
}

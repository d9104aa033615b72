// The weighted sums of messages that are the gradient, or its blocks. Moves one read of every message whose weight is
// not 0, d out.
#include "cpu/cyclic.h"

namespace draco {
namespace {

void cyclic_combine_out(const Tensor& messages, const Tensor& weights, Tensor out) {
  const char* op = "cyclic_combine";
  const int64_t length = out.dim() == 1 ? out.size(0) : 0;
  const int blocks = check_weights(op, weights, messages);
  check_pairs(op, messages, length, blocks);
  check_out(op, out, length, messages);
  dispatch_real(op, messages.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    combine<T>(row_pointers<T>(messages), static_cast<const double*>(weights.data_ptr()), 1, messages.size(1),
               Blocks<T>{static_cast<T*>(out.data_ptr()), length, messages.size(1), blocks});
  });
}

Tensor cyclic_combine(const Tensor& messages, const Tensor& weights, int64_t length) {
  check_pairs("cyclic_combine", messages, length, check_weights("cyclic_combine", weights, messages));
  Tensor out = new_result(messages, length);
  cyclic_combine_out(messages, weights, out);
  return out;
}

}  // namespace
}  // namespace draco

STABLE_TORCH_LIBRARY_IMPL(draco_ext, CPU, m) {
  m.impl("cyclic_combine", TORCH_BOX(&draco::cyclic_combine));
  m.impl("cyclic_combine_out", TORCH_BOX(&draco::cyclic_combine_out));
}

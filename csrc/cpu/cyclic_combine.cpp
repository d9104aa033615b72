// The weighted sum of messages that is the gradient. Moves one read of every message whose weight is not 0, d out.
#include "cpu/cyclic.h"

namespace draco {
namespace {

Tensor cyclic_combine(const Tensor& messages, const Tensor& weights, int64_t length) {
  const char* op = "cyclic_combine";
  check_pairs(op, messages, length);
  check_weights(op, weights, messages);
  const int64_t columns = messages.size(1);
  Tensor out = new_result(messages, columns);
  dispatch_real(op, messages.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    combine<T>(row_pointers<T>(messages), static_cast<const double*>(weights.data_ptr()), 1, columns,
               static_cast<T*>(out.data_ptr()));
  });
  return length == columns ? out : torch::stable::narrow(out, 0, 0, length);
}

}  // namespace
}  // namespace draco

STABLE_TORCH_LIBRARY_IMPL(draco_ext, CPU, m) { m.impl("cyclic_combine", TORCH_BOX(&draco::cyclic_combine)); }

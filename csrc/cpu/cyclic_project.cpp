// Random projections of the messages. Moves n x d elements in; the result is 32 bytes per worker and 32768 columns.
#include "cpu/cyclic.h"

namespace draco {
namespace {

std::tuple<Tensor, Tensor> project(const char* op, const Tensor& messages, const OptionalTensor& missing,
                                   int64_t seed) {
  const FloatingPointMode mode;
  const int64_t n = messages.size(0), length = messages.size(1);
  check_pairs(op, messages, length);
  const std::vector<uint8_t> absent = read_mask(op, "missing", missing, messages);
  const int64_t tiles = tile_count(length), per_tile = projections_per_tile(length);
  Tensor projections = new_tensor({n, tiles, per_tile}, aoti_torch_dtype_complex128());
  Tensor norms = new_tensor({n, tiles}, aoti_torch_dtype_float64());
  dispatch_real(op, messages.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    std::vector<const T*> rows = row_pointers<T>(messages);
    for (int64_t j = 0; j < n; ++j)
      if (absent[j]) rows[j] = nullptr;
    Sweep<T> sweep(rows, length, static_cast<uint64_t>(seed));
    sweep.run(0, tiles, nullptr, 1, nullptr);
    const Projections& p = sweep.projections;
    auto* to = static_cast<double*>(projections.data_ptr());
    for (size_t i = 0; i < p.re.size(); ++i) {
      to[2 * i] = p.re[i];
      to[2 * i + 1] = p.im[i];
    }
    std::copy(p.norm.begin(), p.norm.end(), static_cast<double*>(norms.data_ptr()));
  });
  return {projections, norms};
}

std::tuple<Tensor, Tensor> cyclic_project(const Tensor& messages, const OptionalTensor& missing, int64_t seed) {
  return project("cyclic_project", messages, missing, seed);
}

std::tuple<Tensor, Tensor> cyclic_project_by_key(const Tensor& messages, const OptionalTensor& missing,
                                                 const Tensor& seed) {
  const char* op = "cyclic_project_by_key";
  return project(op, messages, missing, *check_seeds(op, seed, messages, 1));
}

}  // namespace
}  // namespace draco

STABLE_TORCH_LIBRARY_IMPL(draco_ext, CPU, m) {
  m.impl("cyclic_project", TORCH_BOX(&draco::cyclic_project));
  m.impl("cyclic_project_by_key", TORCH_BOX(&draco::cyclic_project_by_key));
}

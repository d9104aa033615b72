// Keyed digests of a vector's bits. Moves d elements in; a key of 7 KiB stays in the first-level cache.
#include "cpu/digest.h"

namespace draco {
namespace {

Tensor digest(const Tensor& values, std::vector<int64_t> seeds) {
  const int64_t bytes = check_digest("digest", values);
  const auto* from = static_cast<const unsigned char*>(values.data_ptr());
  const Kernels& kernel = kernels();
  const int count = static_cast<int>(seeds.size());
  Tensor out = torch::stable::new_empty(values, {count, 2}, ScalarType::Long);
  digest_blocks(
      bytes, seeds.data(), count, kDigestBlock,
      [&](const uint32_t* key, int64_t begin, int64_t size, uint64_t* sums) {
        kernel.digest(key, from + begin, size, sums);
      },
      static_cast<int64_t*>(out.data_ptr()));
  return out;
}

}  // namespace
}  // namespace draco

STABLE_TORCH_LIBRARY_IMPL(draco_ext, CPU, m) { m.impl("digest", TORCH_BOX(&draco::digest)); }

// Keyed digest of a vector's bits. Moves d elements in; the key of 19 KiB stays in the first-level cache.
#include "cpu/digest.h"

namespace draco {
namespace {

Tensor digest(const Tensor& values, int64_t seed) {
  const int64_t bytes = check_digest("digest", values);
  const auto* from = static_cast<const unsigned char*>(values.data_ptr());
  const Kernels& kernel = kernels();
  return digest_blocks(bytes, static_cast<uint64_t>(seed), kDigestBlock,
                       [&](const uint32_t* key, int64_t begin, int64_t size, uint64_t* sums) {
                         kernel.digest(key, from + begin, size, sums);
                       });
}

}  // namespace
}  // namespace draco

STABLE_TORCH_LIBRARY_IMPL(draco_ext, CPU, m) { m.impl("digest", TORCH_BOX(&draco::digest)); }

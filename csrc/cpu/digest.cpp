// Keyed digests of a vector's bits. Moves d elements in; a key of 7 KiB stays in the first-level cache.
#include "cpu/digest.h"

namespace draco {
namespace {

Tensor digests(const char* op, const Tensor& values, const int64_t* seeds, int64_t number) {
  const int64_t bytes = check_digest(op, values);
  const auto* from = static_cast<const unsigned char*>(values.data_ptr());
  const Kernels& kernel = kernels();
  const int count = static_cast<int>(number);
  Tensor out = new_tensor({count, 2}, aoti_torch_dtype_int64());
  digest_blocks(
      bytes, seeds, count, kDigestBlock,
      [&](const uint32_t* key, int64_t begin, int64_t size, uint64_t* sums) {
        kernel.digest(key, from + begin, size, sums);
      },
      static_cast<int64_t*>(out.data_ptr()));
  return out;
}

Tensor digest(const Tensor& values, std::vector<int64_t> seeds) {
  return digests("digest", values, seeds.data(), static_cast<int64_t>(seeds.size()));
}

Tensor digest_by_keys(const Tensor& values, const Tensor& seeds) {
  const char* op = "digest_by_keys";
  return digests(op, values, check_seeds(op, seeds, values), seeds.numel());
}

}  // namespace
}  // namespace draco

STABLE_TORCH_LIBRARY_IMPL(draco_ext, CPU, m) {
  m.impl("digest", TORCH_BOX(&draco::digest));
  m.impl("digest_by_keys", TORCH_BOX(&draco::digest_by_keys));
}

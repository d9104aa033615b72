// Keyed digest of a vector's bits and statistics of its tiles, in one sweep, in which the values may also be scaled.
// Moves d elements in, where they are scaled as many out, and 32 bytes out per tile; the key of 7 KiB stays in the
// first-level cache, a block of 64 KiB in the second.
#include "core/stats.h"
#include "cpu/digest.h"

namespace draco {
namespace {

// factor: nullptr, or what the values are multiplied by once they are digested.
std::tuple<Tensor, Tensor> digest_stats(const char* op, const Tensor& values, int64_t seed, const double* factor) {
  const int64_t bytes = check_digest(op, values), tile = kTile * values.element_size();
  Dtype dtype = Dtype::kFloat32;
  dispatch_floating(op, "values", values.scalar_type(), [&](auto zero) { dtype = kDtype<decltype(zero)>; });
  auto* const from = static_cast<unsigned char*>(values.data_ptr());
  const int64_t tiles = tile_count(values.size(0));
  Tensor stats = new_tensor({tiles, 4}, aoti_torch_dtype_float64());
  auto* const of_tile = static_cast<Stats*>(stats.data_ptr());
  std::fill_n(of_tile, tiles, Stats{});
  const Kernels& kernel = kernels();
  Tensor digest = new_tensor({2}, aoti_torch_dtype_int64());
  digest_blocks(
      bytes, &seed, 1, tile,
      [&](const uint32_t* key, int64_t begin, int64_t size, uint64_t* sums) {
        Stats block;
        kernel.digest_and_stats[static_cast<int>(dtype)](key, from + begin, size, sums, &block);
        merge(of_tile[begin / tile], block);
        if (factor != nullptr) kernel.scale[static_cast<int>(dtype)](from + begin, size, *factor);
      },
      static_cast<int64_t*>(digest.data_ptr()));
  return {digest, stats};
}

std::tuple<Tensor, Tensor> digest_and_stats(const Tensor& values, int64_t seed) {
  return digest_stats("digest_and_stats", values, seed, nullptr);
}

std::tuple<Tensor, Tensor> digest_stats_and_scale_(Tensor values, int64_t seed, double factor) {
  return digest_stats("digest_stats_and_scale_", values, seed, &factor);
}

}  // namespace
}  // namespace draco

STABLE_TORCH_LIBRARY_IMPL(draco_ext, CPU, m) {
  m.impl("digest_and_stats", TORCH_BOX(&draco::digest_and_stats));
  m.impl("digest_stats_and_scale_", TORCH_BOX(&draco::digest_stats_and_scale_));
}

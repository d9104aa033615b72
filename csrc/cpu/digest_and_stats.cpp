// Keyed digest of a vector's bits and statistics of its tiles, in one sweep. Moves d elements in and 32 bytes out per
// tile; the key of 19 KiB stays in the first-level cache.
#include "core/stats.h"
#include "cpu/digest.h"

namespace draco {
namespace {

std::tuple<Tensor, Tensor> digest_and_stats(const Tensor& values, int64_t seed) {
  const char* op = "digest_and_stats";
  const int64_t bytes = check_digest(op, values), tile = kTile * values.element_size();
  Dtype dtype = Dtype::kFloat32;
  dispatch_floating(op, "values", values.scalar_type(), [&](auto zero) { dtype = kDtype<decltype(zero)>; });
  const auto* from = static_cast<const unsigned char*>(values.data_ptr());
  const int64_t tiles = tile_count(values.size(0));
  Tensor stats = torch::stable::new_empty(values, {tiles, 4}, ScalarType::Double);
  auto* const of_tile = static_cast<Stats*>(stats.data_ptr());
  std::fill_n(of_tile, tiles, Stats{});
  const Kernels& kernel = kernels();
  Tensor digest = digest_blocks(
      bytes, static_cast<uint64_t>(seed), tile, [&](const uint32_t* key, int64_t begin, int64_t size, uint64_t* sums) {
        Stats block;
        kernel.digest_and_stats[static_cast<int>(dtype)](key, from + begin, size, sums, &block);
        merge(of_tile[begin / tile], block);
      });
  return {digest, stats};
}

}  // namespace
}  // namespace draco

STABLE_TORCH_LIBRARY_IMPL(draco_ext, CPU, m) { m.impl("digest_and_stats", TORCH_BOX(&draco::digest_and_stats)); }

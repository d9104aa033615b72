// Keyed digests of a vector's bits. Two launches for every 16 keys; the host waits for none:
//   digest_begin   clears 516 bytes.
//   digest         reads d elements once (cuda/digest.cuh), at most 16 blocks per multiprocessor; the last block writes
//                  16 bytes for each key.
// Sums are of integers: the same whatever their order.
#include "cuda/digest.cuh"

namespace draco {
namespace {

__global__ void __launch_bounds__(kDigestThreads)
    digest_kernel(const unsigned char* from, int64_t bytes, const __grid_constant__ DigestSeeds seeds, bool aligned,
                  DigestState* state, int64_t* out) {
  NoObserver none;
  digest_blocks(from, bytes, seeds, aligned, state, out, none);
}

Tensor digest(const Tensor& values, std::vector<int64_t> seeds) {
  const int64_t bytes = check_digest("digest", values), count = static_cast<int64_t>(seeds.size());
  const Device device(values);
  Tensor out = torch::stable::new_empty(values, {count, 2}, ScalarType::Long);
  Tensor scratch = new_scratch(values, sizeof(DigestState));
  auto* state = static_cast<DigestState*>(scratch.data_ptr());
  for (int64_t first = 0; first < count; first += kDigestSeeds) {
    DigestSeeds some = {};
    some.count = static_cast<int>(std::min<int64_t>(kDigestSeeds, count - first));
    std::copy_n(seeds.begin() + first, some.count, some.at);
    DRACO_LAUNCH(device, digest_begin, 1, 1, 0, state);
    DRACO_LAUNCH(device, digest_kernel, digest_grid(device, bytes, some.count), kDigestThreads, 0,
                 static_cast<const unsigned char*>(values.data_ptr()), bytes, some,
                 rows_aligned<unsigned char>(values.data_ptr(), 0, 1), state,
                 static_cast<int64_t*>(out.data_ptr()) + 2 * first);
  }
  return out;
}

}  // namespace
}  // namespace draco

DRACO_CUDA_OPS(m) { m.impl("digest", TORCH_BOX(&draco::digest)); }

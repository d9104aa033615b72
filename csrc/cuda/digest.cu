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

// Under `count` seeds: `seeds`, or `there` on the device.
Tensor digests(const char* op, const Tensor& values, const int64_t* seeds, const int64_t* there, int64_t count) {
  const int64_t bytes = check_digest(op, values);
  const Device device(values);
  Tensor out = torch::stable::new_empty(values, {count, 2}, ScalarType::Long);
  Tensor scratch = new_scratch(values, sizeof(DigestState));
  auto* state = static_cast<DigestState*>(scratch.data_ptr());
  for (int64_t first = 0; first < count; first += kDigestSeeds) {
    DigestSeeds some = {};
    some.count = static_cast<int>(std::min<int64_t>(kDigestSeeds, count - first));
    if (there != nullptr) {
      some.there = there + first;
    } else {
      std::copy_n(seeds + first, some.count, some.at);
    }
    DRACO_LAUNCH(device, digest_begin, 1, 1, 0, state);
    DRACO_LAUNCH(device, digest_kernel, digest_grid(device, bytes, some.count), kDigestThreads, 0,
                 static_cast<const unsigned char*>(values.data_ptr()), bytes, some,
                 rows_aligned<unsigned char>(values.data_ptr(), 0, 1), state,
                 static_cast<int64_t*>(out.data_ptr()) + 2 * first);
  }
  return out;
}

Tensor digest(const Tensor& values, std::vector<int64_t> seeds) {
  return digests("digest", values, seeds.data(), nullptr, static_cast<int64_t>(seeds.size()));
}

Tensor digest_by_keys(const Tensor& values, const Tensor& seeds) {
  const char* op = "digest_by_keys";
  return digests(op, values, nullptr, check_seeds(op, seeds, values), seeds.numel());
}

}  // namespace
}  // namespace draco

DRACO_CUDA_OPS(m) {
  m.impl("digest", TORCH_BOX(&draco::digest));
  m.impl("digest_by_keys", TORCH_BOX(&draco::digest_by_keys));
}

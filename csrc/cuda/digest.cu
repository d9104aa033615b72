// Keyed digest of a vector's bits. Two launches; the host waits for neither:
//   digest_begin   clears 36 bytes.
//   digest         reads d elements once (cuda/digest.cuh), at most 8 blocks per multiprocessor; the last block writes
//                  16 bytes.
// Sums are of integers: the same whatever their order.
#include "cuda/digest.cuh"

namespace draco {
namespace {

__global__ void __launch_bounds__(kDigestThreads) digest_kernel(const unsigned char* from, int64_t bytes, uint64_t seed,
                                                                bool aligned, DigestState* state, int64_t* out) {
  NoObserver none;
  digest_blocks(from, bytes, seed, aligned, state, out, none);
}

Tensor digest(const Tensor& values, int64_t seed) {
  const int64_t bytes = check_digest("digest", values);
  const Device device(values);
  Tensor out = torch::stable::new_empty(values, {2}, ScalarType::Long);
  Tensor scratch = new_scratch(values, sizeof(DigestState));
  auto* state = static_cast<DigestState*>(scratch.data_ptr());
  DRACO_LAUNCH(device, digest_begin, 1, 1, 0, state);
  DRACO_LAUNCH(device, digest_kernel, digest_grid(device, bytes), kDigestThreads, 0,
               static_cast<const unsigned char*>(values.data_ptr()), bytes, static_cast<uint64_t>(seed),
               rows_aligned<unsigned char>(values.data_ptr(), 0, 1), state, static_cast<int64_t*>(out.data_ptr()));
  return out;
}

}  // namespace
}  // namespace draco

DRACO_CUDA_OPS(m) { m.impl("digest", TORCH_BOX(&draco::digest)); }

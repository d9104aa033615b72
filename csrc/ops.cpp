// Every op's schema. Documentation: draco_ext/ops/; kernels: cpu/<op>.cpp, cuda/<op>.cu.
// <op>_out writes the result into a contiguous vector that is given; <op> is the same into a new one.
// DRACO_LIBRARY is draco_ext, or draco_ext_simt for the kernels that tests run on the host (tests/simt.h).
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(DRACO_LIBRARY, m) {
  // Repetition code: vote in each group of consecutive workers, fused with the mean (or sum) over the groups.
  m.def(
      "majority_vote(Tensor messages, Tensor? missing, int[] group_sizes, int adversaries, float atol, float rtol, "
      "bool mean) -> (Tensor gradient, Tensor suspects, Tensor failed)");
  m.def(
      "majority_vote_out(Tensor messages, Tensor? missing, int[] group_sizes, int adversaries, float atol, float rtol, "
      "bool mean, Tensor(a!) out) -> (Tensor suspects, Tensor failed)");

  // What a committee makes of the vectors that groups have voted on.
  m.def("vector_mean_out(Tensor[] vectors, Tensor(a!) out) -> ()");

  // What ranks compare instead of whole messages.
  m.def("digest(Tensor values, int[] seed) -> Tensor");
  m.def("digest_by_keys(Tensor values, Tensor seeds) -> Tensor");
  m.def("digest_and_stats(Tensor values, int seed) -> (Tensor digest, Tensor stats)");
  m.def("digest_stats_and_scale_(Tensor(a!) values, int seed, float factor) -> (Tensor digest, Tensor stats)");

  // Cyclic code, from the worker's side to the decoder's. Messages may be `compression` times shorter than a gradient.
  m.def("cyclic_encode(Tensor gradients, int workers, int adversaries, int worker, int compression=1) -> Tensor");
  m.def(
      "cyclic_encode_out(Tensor gradients, int workers, int adversaries, int worker, Tensor(a!) out, "
      "int compression=1) -> ()");
  m.def(
      "cyclic_encode_add_(Tensor(a!) message, Tensor(b!) carry, Tensor gradient, int workers, int adversaries, "
      "int worker, int part, bool first=False, int compression=1) -> ()");
  m.def("cyclic_project(Tensor messages, Tensor? missing, int seed) -> (Tensor projections, Tensor norms)");
  m.def("cyclic_project_by_key(Tensor messages, Tensor? missing, Tensor seed) -> (Tensor projections, Tensor norms)");
  m.def(
      "cyclic_locate(Tensor projections, Tensor norms, Tensor? missing, int adversaries, int length, bool float64, "
      "float atol, float rtol, bool mean, int compression=1) -> (Tensor weights, Tensor suspects, Tensor failed)");
  m.def("cyclic_combine(Tensor messages, Tensor weights, int length) -> Tensor");
  m.def("cyclic_combine_out(Tensor messages, Tensor weights, Tensor(a!) out) -> ()");
  m.def(
      "cyclic_decode(Tensor messages, Tensor? missing, Tensor? expected, int adversaries, int length, float atol, "
      "float rtol, bool mean, int? seed, int compression=1) -> (Tensor gradient, Tensor suspects, Tensor failed, "
      "Tensor left_out)");
  m.def(
      "cyclic_decode_out(Tensor messages, Tensor? missing, Tensor? expected, int adversaries, float atol, float rtol, "
      "bool mean, int? seed, Tensor(a!) out, int compression=1) -> (Tensor suspects, Tensor failed, Tensor left_out)");
}

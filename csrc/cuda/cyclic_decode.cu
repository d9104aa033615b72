// The fused decode: four launches; the host neither waits for one nor copies to it. Of messages that are shorter than a
// gradient, with d / k elements each, the sweep makes no sum, and weighted_sum all blocks of the gradient.
//   begin_search   the seed, and the weights of those who are not left out          (cuda/cyclic_locate.cu)
//   sweep          sum and projections: reads n x d elements, writes d              (cuda/cyclic_project.cu)
//                  projections alone: reads n x d / k
//   locate         suspects, and what remains to be done                            (cuda/cyclic_locate.cu)
//   weighted_sum   blocks: reads (n - suspects) x d / k for every eight, writes d;
//                  with newly found suspects: reads (n - suspects) x d, writes d;
//                  NaN where decoding failed; otherwise returns at once             (cuda/cyclic_combine.cu)
#include "cuda/cyclic.cuh"

namespace draco {
namespace {

std::tuple<Tensor, Tensor, Tensor> cyclic_decode_out(const Tensor& messages, const OptionalTensor& missing,
                                                     const OptionalTensor& expected, int64_t adversaries, double atol,
                                                     double rtol, bool mean, std::optional<int64_t> seed, Tensor out,
                                                     int64_t compression) {
  const char* op = "cyclic_decode";
  const int64_t length = out.dim() == 1 ? out.size(0) : 0;
  check_pairs(op, messages, length, compression);
  check_out(op, out, length, messages);
  const int64_t n = messages.size(0), columns = messages.size(1);
  check_workers(op, n, adversaries, compression);
  check_mask(op, "missing", missing, messages);
  check_mask(op, "expected", expected, messages);
  const Device device(messages);
  Tensor suspects = torch::stable::new_empty(messages, {n}, ScalarType::Bool);
  Tensor failed = torch::stable::new_empty(messages, {}, ScalarType::Bool);
  Tensor left_out = torch::stable::new_empty(messages, {n}, ScalarType::Bool);

  Search search{};
  search.workers = static_cast<int>(n);
  search.adversaries = static_cast<int>(adversaries);
  search.compression = static_cast<int>(compression);
  search.always_weigh = compression > 1;
  search.per_tile = projections_per_tile(columns);
  search.length = columns;
  search.tiles = tile_count(columns);
  search.model = noise_model(messages.scalar_type() == ScalarType::Double, search.workers, atol, rtol);
  search.mean = mean;
  search.suspects = static_cast<uint8_t*>(suspects.data_ptr());
  search.failed = static_cast<uint8_t*>(failed.data_ptr());
  search.not_in_result = static_cast<uint8_t*>(left_out.data_ptr());
  search.partials = partials_of(device, columns);

  const auto place = [&](Arena& arena) {
    place_search(search, arena);
    search.weights = arena.take<Complex>(compression * n);
    search.projections = arena.take<Complex>(n * search.tiles * search.per_tile);
    search.norms = arena.take<double>(n * search.tiles);
    search.partials.sums = arena.take<double>(search.partials.groups * n * slots(search.per_tile));
  };
  const Tensor scratch = new_arena(messages, place);

  // Without masks all count alike; with masks only the device knows.
  const bool weigh = compression == 1 && (missing.has_value() || expected.has_value());
  begin_search(device, search, Mask(missing), Mask(expected), weigh, seed);
  if (columns > 0)
    sweep(device, messages,
          Sweep{Mask(missing), &search.state->seed, weigh ? search.weights : nullptr, &search.state->divisor,
                compression == 1 ? out.data_ptr() : nullptr, compression == 1 ? length : 0},
          search.partials);
  locate(device, search);
  combine(device, messages, search.weights, search.compression, compression == 1 ? &search.state->divisor : nullptr,
          &search.state->action, out.data_ptr(), length);
  return {suspects, failed, left_out};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cyclic_decode(const Tensor& messages, const OptionalTensor& missing,
                                                         const OptionalTensor& expected, int64_t adversaries,
                                                         int64_t length, double atol, double rtol, bool mean,
                                                         std::optional<int64_t> seed, int64_t compression) {
  check_pairs("cyclic_decode", messages, length, compression);
  Tensor gradient = torch::stable::new_empty(messages, {length});
  auto [suspects, failed, left_out] =
      cyclic_decode_out(messages, missing, expected, adversaries, atol, rtol, mean, seed, gradient, compression);
  return {gradient, suspects, failed, left_out};
}

}  // namespace
}  // namespace draco

DRACO_CUDA_OPS(m) {
  m.impl("cyclic_decode", TORCH_BOX(&draco::cyclic_decode));
  m.impl("cyclic_decode_out", TORCH_BOX(&draco::cyclic_decode_out));
}

// The fused decode: sum and project in one sweep, looking for suspects after the first tiles and after the last. Moves
// n messages in and d elements out; once more for the tiles that were summed with suspects found later, the first
// sixteenth as a rule, and all for one that is bad in none of those.
#include "cpu/cyclic.h"

namespace draco {
namespace {

// Both sets of workers, or only the first where together they have more than `most`.
std::vector<uint8_t> union_up_to(int most, const std::vector<uint8_t>& set, const std::vector<uint8_t>& other) {
  std::vector<uint8_t> both = set;
  int size = 0;
  for (size_t j = 0; j < both.size(); ++j) {
    both[j] |= other[j];
    size += both[j];
  }
  return size <= most ? both : set;
}

constexpr int64_t kHeadPart = 16;  // the part of the tiles after which suspects are looked for

template <typename T>
Verdict decode(const Tensor& messages, const std::vector<uint8_t>& missing, const std::vector<uint8_t>& expected, int s,
               const NoiseModel& model, bool mean, uint64_t seed, const Blocks<T>& blocks) {
  const int n = static_cast<int>(messages.size(0));
  const int64_t length = messages.size(1);
  std::vector<const T*> rows = row_pointers<T>(messages);
  const std::vector<uint8_t> left_out = union_up_to(2 * s, missing, expected);
  int absent = 0;
  for (int j = 0; j < n; ++j) {
    if (missing[j]) rows[j] = nullptr;
    absent += missing[j];
  }
  Verdict verdict;
  if (absent > 2 * s) {
    verdict.suspects.assign(n, 0);
    verdict.failed = true;
  } else {
    Sweep<T> sweep(rows, length, seed);
    // What is left out decides the bits of the result, and not when or why: with nobody left out the plain sum, which
    // only a gradient of one block has, is divided, otherwise the weights are.
    const auto with_weights = [&](const std::vector<uint8_t>& without, const auto& f) {
      if (blocks.count == 1 && std::find(without.begin(), without.end(), 1) == without.end())
        return f(nullptr, mean ? n : 1.0);
      f(decoding_weights(n, s, blocks.count, without, mean ? 1.0 / n : 1.0).data(), 1.0);
    };
    const auto run = [&](int64_t first, int64_t last, const std::vector<uint8_t>& without) {
      with_weights(without,
                   [&](const double* weights, double divisor) { sweep.run(first, last, weights, divisor, &blocks); });
    };
    // A worker that is bad is so in the first tiles, as a rule: known from there on, it costs no second sweep.
    const int64_t tiles = tile_count(length), head = tiles / kHeadPart;
    std::vector<uint8_t> without = left_out;
    Verdict early;
    if (head > 0) {
      run(0, head, left_out);
      Projections projections = sweep.projections.head(head);
      early = find_suspects(projections, missing, s, head * kTile, model);
      if (!early.failed && !early.overflow) without = union_up_to(2 * s, early.erased, left_out);
    }
    run(head, tiles, without);
    verdict = find_suspects(sweep.projections, missing, s, length, model, head > 0 ? &early : nullptr);
    if (!verdict.failed && !verdict.overflow && (verdict.erased != without || verdict.erased != left_out)) {
      const int64_t wrong = verdict.erased != without ? length : head * kTile;
      with_weights(verdict.erased,
                   [&](const double* weights, double divisor) { combine<T>(rows, weights, divisor, wrong, blocks); });
    }
  }
  if (verdict.failed || verdict.overflow)
    std::fill(blocks.out, blocks.out + blocks.length, std::numeric_limits<T>::quiet_NaN());
  return verdict;
}

std::tuple<Tensor, Tensor, Tensor> cyclic_decode_out(const Tensor& messages, const OptionalTensor& missing,
                                                     const OptionalTensor& expected, int64_t adversaries, double atol,
                                                     double rtol, bool mean, std::optional<int64_t> seed, Tensor out,
                                                     int64_t compression) {
  const char* op = "cyclic_decode";
  const FloatingPointMode mode;
  const int64_t length = out.dim() == 1 ? out.size(0) : 0;
  check_pairs(op, messages, length, compression);
  check_out(op, out, length, messages);
  const int64_t n = messages.size(0);
  check_workers(op, n, adversaries, compression);
  const std::vector<uint8_t> absent = read_mask(op, "missing", missing, messages);
  const std::vector<uint8_t> likely = read_mask(op, "expected", expected, messages);
  const int s = static_cast<int>(adversaries);
  Verdict verdict;
  dispatch_real(op, messages.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    verdict =
        decode<T>(messages, absent, likely, s, noise_model(sizeof(T) == 8, static_cast<int>(n), atol, rtol), mean,
                  seed.has_value() ? static_cast<uint64_t>(*seed) : fresh_seed(op),
                  Blocks<T>{static_cast<T*>(out.data_ptr()), length, messages.size(1), static_cast<int>(compression)});
  });
  std::vector<uint8_t> left_out(n, 0);
  for (int64_t j = 0; j < n && !verdict.failed && !verdict.overflow; ++j) left_out[j] = verdict.erased[j] && !absent[j];
  return {mask_tensor(verdict.suspects), flag_tensor(verdict.failed), mask_tensor(left_out)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> cyclic_decode(const Tensor& messages, const OptionalTensor& missing,
                                                         const OptionalTensor& expected, int64_t adversaries,
                                                         int64_t length, double atol, double rtol, bool mean,
                                                         std::optional<int64_t> seed, int64_t compression) {
  check_pairs("cyclic_decode", messages, length, compression);
  Tensor gradient = new_result(messages, length);
  auto [suspects, failed, left_out] =
      cyclic_decode_out(messages, missing, expected, adversaries, atol, rtol, mean, seed, gradient, compression);
  return {gradient, suspects, failed, left_out};
}

}  // namespace
}  // namespace draco

STABLE_TORCH_LIBRARY_IMPL(draco_ext, CPU, m) {
  m.impl("cyclic_decode", TORCH_BOX(&draco::cyclic_decode));
  m.impl("cyclic_decode_out", TORCH_BOX(&draco::cyclic_decode_out));
}

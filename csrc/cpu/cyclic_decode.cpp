// The fused decode: sum and project in one sweep, look for suspects, and only if there are new ones sum again without
// them. Moves n x d elements in and d out; twice that with newly found suspects.
#include <random>

#include "cpu/cyclic.h"

namespace draco {
namespace {

// From the operating system, after the messages are in: a projection that is known beforehand can be attacked.
uint64_t fresh_seed() {
  std::random_device device;
  return static_cast<uint64_t>(device()) << 32 | device();
}

template <typename T>
Verdict decode(const Tensor& messages, const std::vector<uint8_t>& missing, const std::vector<uint8_t>& expected, int s,
               const NoiseModel& model, bool mean, uint64_t seed, T* out) {
  const int n = static_cast<int>(messages.size(0));
  const int64_t length = messages.size(1);
  std::vector<const T*> rows = row_pointers<T>(messages);
  std::vector<uint8_t> left_out = missing;
  int absent = 0, erased = 0;
  for (int j = 0; j < n; ++j) {
    if (missing[j]) rows[j] = nullptr;
    left_out[j] |= expected[j];
    absent += missing[j];
    erased += left_out[j];
  }
  if (erased > 2 * s) {
    left_out = missing;  // too many are expected to be bad to do without them
    erased = absent;
  }
  Verdict verdict;
  if (absent > 2 * s) {
    verdict.suspects.assign(n, 0);
    verdict.failed = true;
  } else {
    const double factor = mean ? 1.0 / n : 1.0;
    std::vector<double> weights;
    for (const Complex& b : erased ? decoding_weights(n, s, left_out, factor) : std::vector<Complex>{}) {
      weights.push_back(b.re);
      weights.push_back(b.im);
    }
    Projections projections = sweep<T>(rows, length, seed, erased ? weights.data() : nullptr, out,
                                       mean && !erased ? static_cast<double>(n) : 1.0);
    verdict = find_suspects(projections, missing, s, length, model);
    if (!verdict.failed && !verdict.overflow && verdict.erased != left_out)
      combine<T>(rows, decoding_weights(n, s, verdict.erased, factor).data(), length, out);
  }
  if (verdict.failed || verdict.overflow) std::fill(out, out + length, std::numeric_limits<T>::quiet_NaN());
  return verdict;
}

std::tuple<Tensor, Tensor, Tensor> cyclic_decode(const Tensor& messages, const OptionalTensor& missing,
                                                 const OptionalTensor& expected, int64_t adversaries, int64_t length,
                                                 double atol, double rtol, bool mean, std::optional<int64_t> seed) {
  const char* op = "cyclic_decode";
  check_pairs(op, messages, length);
  const int64_t n = messages.size(0), columns = messages.size(1);
  check_workers(op, n, adversaries);
  const std::vector<uint8_t> absent = read_mask(op, "missing", missing, messages);
  const std::vector<uint8_t> likely = read_mask(op, "expected", expected, messages);
  const int s = static_cast<int>(adversaries);
  Tensor gradient = new_result(messages, columns);
  Verdict verdict;
  dispatch_real(op, messages.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    verdict =
        decode<T>(messages, absent, likely, s, noise_model(sizeof(T) == 8, static_cast<int>(n), s, atol, rtol), mean,
                  seed.has_value() ? static_cast<uint64_t>(*seed) : fresh_seed(), static_cast<T*>(gradient.data_ptr()));
  });
  if (length < columns) gradient = torch::stable::narrow(gradient, 0, 0, length);
  return {gradient, mask_tensor(messages, verdict.suspects), flag_tensor(messages, verdict.failed)};
}

}  // namespace
}  // namespace draco

STABLE_TORCH_LIBRARY_IMPL(draco_ext, CPU, m) { m.impl("cyclic_decode", TORCH_BOX(&draco::cyclic_decode)); }

// Suspects and decoding weights from projections. Moves 16 bytes per worker and projection, from cache.
#include "cpu/cyclic.h"

namespace draco {

Verdict find_suspects(Projections& projections, const std::vector<uint8_t>& missing, int adversaries, int64_t length,
                      const NoiseModel& model, const Verdict* early) {
  const int n = static_cast<int>(projections.workers);
  const int64_t columns = projections.columns, tiles = projections.tiles;
  Verdict verdict;
  std::vector<uint8_t> nonfinite(n, 0);
  int bad = 0, absent = 0;
  for (int j = 0; j < n; ++j) {
    absent += missing[j];
    if (missing[j]) continue;
    double *re = projections.re.data() + j * columns, *im = projections.im.data() + j * columns;
    bool finite = true;
    for (int64_t c = 0; c < columns; ++c) finite &= std::isfinite(re[c]) && std::isfinite(im[c]);
    for (int64_t t = 0; t < tiles; ++t) finite &= projections.energy[j * tiles + t] < kLargestEnergy;
    if (finite) continue;
    nonfinite[j] = 1;
    ++bad;
    std::fill(re, re + columns, 0.0);
    std::fill(im, im + columns, 0.0);
  }
  verdict.suspects.assign(n, 0);
  verdict.erased = missing;
  if (absent > 2 * adversaries) {
    verdict.failed = true;
    return verdict;
  }
  if (bad > adversaries) {
    verdict.overflow = true;
    return verdict;
  }
  for (int j = 0; j < n; ++j) verdict.erased[j] |= nonfinite[j];

  const int left = 2 * adversaries - absent - bad;  // checks that remain
  const int most = std::max(0, std::min(left / 2, adversaries - bad));
  std::vector<double> noise(columns), per_column(columns);
  for (int64_t t = 0; t < tiles; ++t) {
    const double sigma = tile_noise(Alone(), model, projections.energy.data() + t, tiles, n, most,
                                    verdict.erased.data(), std::min(kTile, length - t * kTile));
    std::fill_n(noise.begin() + t * projections.per_tile, projections.per_tile, sigma);
  }
  // Not value-initialised: most of the scratch is only touched when there is something to find.
  const std::unique_ptr<unsigned char[]> scratch(new unsigned char[Locator<Alone>::scratch_bytes(n, adversaries)]);
  std::vector<uint8_t> hint(n, 0);
  int hinted = 0;
  for (int j = 0; j < n && early != nullptr && !early->failed; ++j) {
    hint[j] = early->erased[j] && !verdict.erased[j];
    hinted += hint[j];
  }
  const LocatorInput input{n,
                           adversaries,
                           projections.re.data(),
                           projections.im.data(),
                           columns,
                           1,
                           columns,
                           noise.data(),
                           missing.data(),
                           nonfinite.data(),
                           hinted > 0 && hinted <= most ? hint.data() : nullptr};
  const Kernels& kernel = kernels();
  const auto energy = [&](const Complex* check, int checks, double* out) {
    parallel(columns, 256, [&](int64_t begin, int64_t end) {
      kernel.check_energy(check, checks, n, projections.re.data() + begin, projections.im.data() + begin, columns,
                          end - begin, out + begin);
    });
  };
  Locator<Alone> locator(Alone(), input, scratch.get());
  std::vector<uint8_t> left_out(n);
  verdict.failed = !locator.locate(energy, per_column.data(), left_out.data(), verdict.suspects.data());
  if (verdict.failed) {
    verdict.suspects.assign(n, 0);
    return verdict;
  }
  for (int j = 0; j < n; ++j) verdict.erased[j] |= left_out[j];
  return verdict;
}

std::vector<Complex> decoding_weights(int workers, int adversaries, const std::vector<uint8_t>& erased, double factor) {
  const std::unique_ptr<unsigned char[]> scratch(
      new unsigned char[Locator<Alone>::scratch_bytes(workers, adversaries)]);
  LocatorInput input{};
  input.workers = workers;
  input.adversaries = adversaries;
  std::vector<Complex> weights(workers);
  Locator<Alone>(Alone(), input, scratch.get()).weights(erased.data(), factor, weights.data());
  return weights;
}

namespace {

std::tuple<Tensor, Tensor, Tensor> cyclic_locate(const Tensor& projections, const Tensor& energy,
                                                 const OptionalTensor& missing, int64_t adversaries, int64_t length,
                                                 bool float64, double atol, double rtol, bool mean) {
  const char* op = "cyclic_locate";
  check_projections(op, projections, energy, adversaries, length);
  const int64_t n = projections.size(0);
  Projections p(n, tile_count(length), projections_per_tile(length));
  const auto* from = static_cast<const double*>(projections.data_ptr());
  for (int64_t i = 0; i < n * p.columns; ++i) {
    p.re[i] = from[2 * i];
    p.im[i] = from[2 * i + 1];
  }
  const auto* squares = static_cast<const double*>(energy.data_ptr());
  std::copy(squares, squares + n * p.tiles, p.energy.begin());

  const int s = static_cast<int>(adversaries);
  const Verdict verdict = find_suspects(p, read_mask(op, "missing", missing, projections), s, length,
                                        noise_model(float64, static_cast<int>(n), s, atol, rtol));
  Tensor weights = new_vector(1, n, aoti_torch_dtype_complex128());
  auto* to = static_cast<double*>(weights.data_ptr());
  if (verdict.failed || verdict.overflow) {
    std::fill(to, to + 2 * n, std::numeric_limits<double>::quiet_NaN());
  } else {
    const auto b = decoding_weights(static_cast<int>(n), s, verdict.erased, mean ? 1.0 / static_cast<double>(n) : 1.0);
    for (int64_t j = 0; j < n; ++j) {
      to[2 * j] = b[j].re;
      to[2 * j + 1] = b[j].im;
    }
  }
  return {weights, mask_tensor(verdict.suspects), flag_tensor(verdict.failed)};
}

}  // namespace
}  // namespace draco

STABLE_TORCH_LIBRARY_IMPL(draco_ext, CPU, m) { m.impl("cyclic_locate", TORCH_BOX(&draco::cyclic_locate)); }

// Suspects and decoding weights from projections. Moves 16 bytes per worker and projection, from cache.
#include "cpu/cyclic.h"

namespace draco {

Verdict find_suspects(Projections& projections, const std::vector<uint8_t>& missing, int adversaries, int64_t length,
                      const NoiseModel& model, const Verdict* early) {
  const int n = static_cast<int>(projections.workers);
  const int64_t columns = projections.columns, tiles = projections.tiles;
  Verdict verdict;
  verdict.suspects.assign(n, 0);
  verdict.erased = missing;
  std::vector<uint8_t> nonfinite(n, 0);
  int bad = 0;
  const auto erase = [&](int j) {
    nonfinite[j] = verdict.erased[j] = 1;
    ++bad;
    std::fill_n(projections.re.begin() + j * columns, columns, 0.0);
    std::fill_n(projections.im.begin() + j * columns, columns, 0.0);
  };
  const int absent = static_cast<int>(std::count(missing.begin(), missing.end(), 1));
  for (int j = 0; j < n; ++j) {
    if (missing[j]) continue;
    const double *re = projections.re.data() + j * columns, *im = projections.im.data() + j * columns;
    bool finite = true;
    for (int64_t c = 0; c < columns; ++c) finite &= std::isfinite(re[c]) && std::isfinite(im[c]);
    for (int64_t t = 0; t < tiles; ++t) finite &= std::isfinite(projections.norm[j * tiles + t]);
    if (!finite) erase(j);
  }
  if (absent > 2 * adversaries) {
    verdict.failed = true;
    return verdict;
  }
  if (2 * bad + absent > 2 * adversaries) {
    verdict.overflow = true;
    return verdict;
  }
  std::vector<double> noise(columns), per_column(columns);
  int most = 0;
  for (;;) {  // until nobody is beyond doubt any more: without those the noise may be lower
    const int left = 2 * adversaries - absent - bad;  // checks that remain
    most = std::max(0, std::min(left / 2, adversaries - bad));
    std::vector<uint8_t> beyond(n, 0);
    for (int64_t t = 0; t < tiles; ++t) {
      const double sigma = tile_noise(Alone(), model, projections.norm.data() + t, tiles, n, most,
                                      verdict.erased.data(), std::min(kTile, length - t * kTile));
      std::fill_n(noise.begin() + t * projections.per_tile, projections.per_tile, sigma);
      for (int j = 0; j < n; ++j)
        beyond[j] |= !verdict.erased[j] && projections.norm[j * tiles + t] * (1 / kBeyondDoubt) > sigma;
    }
    const int more = static_cast<int>(std::count(beyond.begin(), beyond.end(), 1));
    if (more == 0) break;
    if (more > most) {
      verdict.failed = true;
      return verdict;
    }
    for (int j = 0; j < n; ++j)
      if (beyond[j]) erase(j);
  }
  for (int64_t c = 0; c < columns; ++c) {  // so that no square overflows
    const double scale = noise_scale(noise[c]);
    noise[c] *= scale;
    for (int j = 0; j < n; ++j) {
      projections.re[j * columns + c] *= scale;
      projections.im[j * columns + c] *= scale;
    }
  }
  const Scratch scratch(Locator<Alone>::scratch_bytes(n, adversaries));
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
  Locator<Alone> locator(Alone(), input, scratch.arena());
  std::vector<uint8_t> left_out(n);
  verdict.failed = !locator.locate(energy, per_column.data(), left_out.data(), verdict.suspects.data());
  if (verdict.failed) {
    verdict.suspects.assign(n, 0);
    return verdict;
  }
  for (int j = 0; j < n; ++j) verdict.erased[j] |= left_out[j];
  return verdict;
}

std::vector<double> decoding_weights(int workers, int adversaries, int compression, const std::vector<uint8_t>& erased,
                                     double factor) {
  const Scratch scratch(Parity<Alone>::scratch_bytes(workers, adversaries));
  Arena arena = scratch.arena();
  std::vector<Complex> weights(int64_t{compression} * workers);
  Parity<Alone>(Alone(), workers, adversaries, ParityArrays(arena, workers, adversaries))
      .weights(erased.data(), factor, weights.data(), compression);
  std::vector<double> pairs;
  for (const Complex& weight : weights) pairs.insert(pairs.end(), {weight.re, weight.im});
  return pairs;
}

namespace {

std::tuple<Tensor, Tensor, Tensor> cyclic_locate(const Tensor& projections, const Tensor& norms,
                                                 const OptionalTensor& missing, int64_t adversaries, int64_t length,
                                                 bool float64, double atol, double rtol, bool mean,
                                                 int64_t compression) {
  const char* op = "cyclic_locate";
  const FloatingPointMode mode;
  check_projections(op, projections, norms, adversaries, length);
  check_workers(op, projections.size(0), adversaries, compression);
  const int64_t n = projections.size(0);
  Projections p(n, tile_count(length), projections_per_tile(length));
  const auto* from = static_cast<const double*>(projections.data_ptr());
  for (int64_t i = 0; i < n * p.columns; ++i) {
    p.re[i] = from[2 * i];
    p.im[i] = from[2 * i + 1];
  }
  std::copy_n(static_cast<const double*>(norms.data_ptr()), n * p.tiles, p.norm.begin());

  const int s = static_cast<int>(adversaries);
  const Verdict verdict = find_suspects(p, read_mask(op, "missing", missing, projections), s, length,
                                        noise_model(float64, static_cast<int>(n), atol, rtol));
  const std::vector<int64_t> shape = compression == 1 ? std::vector<int64_t>{n} : std::vector<int64_t>{compression, n};
  Tensor weights = new_tensor(shape, aoti_torch_dtype_complex128());
  auto* to = static_cast<double*>(weights.data_ptr());
  if (verdict.failed || verdict.overflow) {
    std::fill(to, to + 2 * compression * n, std::numeric_limits<double>::quiet_NaN());
  } else {
    const auto b = decoding_weights(static_cast<int>(n), s, static_cast<int>(compression), verdict.erased,
                                    mean ? 1.0 / static_cast<double>(n) : 1.0);
    std::copy(b.begin(), b.end(), to);
  }
  return {weights, mask_tensor(verdict.suspects), flag_tensor(verdict.failed)};
}

}  // namespace
}  // namespace draco

STABLE_TORCH_LIBRARY_IMPL(draco_ext, CPU, m) { m.impl("cyclic_locate", TORCH_BOX(&draco::cyclic_locate)); }

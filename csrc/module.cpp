// The Python module: loading it registers the ops; it tells how it was built and shows the cyclic code's tables.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <complex>
#include <string>

#include "checks.h"
#include "core/limits.h"
#include "core/locator/search.h"
#include "core/noise.h"
#include "core/random.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  py::dict info;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["instruction_set"] = draco::kernels().name;
#ifdef DRACO_CUDA
  info["cuda"] = true;
  info["cuda_architectures"] = DRACO_CUDA;
#else
  info["cuda"] = false;
  info["cuda_architectures"] = "";
#endif
  info["torch"] = DRACO_TORCH_VERSION;
  return info;
}

void check(int workers, int adversaries, int compression = 1) {
  if (adversaries < 0 || compression < 1 || compression > workers || adversaries > (workers - compression) / 2 ||
      workers > draco::kMostWorkers)
    throw py::value_error("needs 0 <= adversaries, 1 <= compression and 2 * adversaries + compression <= workers <= " +
                          std::to_string(draco::kMostWorkers));
}

py::array_t<std::complex<double>> nodes(int workers) {
  check(workers, 0);
  py::array_t<std::complex<double>> table(workers);
  for (int j = 0; j < workers; ++j) {
    const draco::Complex x = draco::cyclic_node(workers, j);
    table.mutable_at(j) = {x.re, x.im};
  }
  return table;
}

py::array_t<int64_t> supports(int workers, int adversaries, int compression) {
  check(workers, adversaries, compression);
  const int r = 2 * adversaries + compression;
  py::array_t<int64_t> table({workers, r});
  for (int k = 0; k < workers; ++k)
    for (int t = 0; t < r; ++t) table.mutable_at(k, t) = (k + draco::cyclic_offset(workers, r, t)) % workers;
  return table;
}

py::array_t<int64_t> answers(int adversaries, int compression) {
  check(draco::kMostWorkers, adversaries, compression);
  py::array_t<int64_t> table(compression);
  for (int b = 0; b < compression; ++b) table.mutable_at(b) = draco::answer_moment(adversaries, compression, b);
  return table;
}

py::array_t<std::complex<double>> weights(int workers, int adversaries, int compression) {
  check(workers, adversaries, compression);
  const draco::EncodingTable& encoding = draco::encoding_table(workers, adversaries, compression);
  py::array_t<std::complex<double>> table({workers, workers, compression});
  std::fill_n(table.mutable_data(), table.size(), std::complex<double>());
  std::vector<draco::EncodingWeight> of_blocks;
  for (int t = 0; t < encoding.redundancy(); ++t) {
    const int offset = draco::cyclic_offset(workers, encoding.redundancy(), t);
    for (int part = 0; part < workers; ++part) {
      of_blocks.clear();
      encoding.append(of_blocks, part, t);
      for (int b = 0; b < compression; ++b)
        table.mutable_at((part + offset) % workers, part, b) = {of_blocks[b].re.hi, of_blocks[b].im.hi};
    }
  }
  return table;
}

double tolerance(int workers, int adversaries, bool float64) {
  check(workers, adversaries);
  return draco::kTolerance * draco::noise_model(float64, workers, 0, 0).relative;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.attr("TILE") = draco::kTile;
  m.attr("FEW_TILES") = draco::kFewTiles;
  m.attr("MOST_PROJECTIONS") = draco::kMostProjections;
  m.attr("FEWEST_PROJECTIONS") = draco::kFewestProjections;
  m.attr("PROJECTION_SCALE") = draco::kWeightPower;
  m.attr("MOST_WORKERS") = draco::kMostWorkers;
  m.attr("MOST_GROUP_MEMBERS") = draco::kMostGroupMembers;
  m.def("build_info", &build_info, "Compiler, instruction set in use, CUDA and the torch this was built against.");
  m.def("cyclic_nodes", &nodes, py::arg("workers"));
  m.def("cyclic_answers", &answers, py::arg("adversaries"), py::arg("compression"));
  m.def("cyclic_supports", &supports, py::arg("workers"), py::arg("adversaries"), py::arg("compression") = 1);
  m.def("cyclic_tolerance", &tolerance, py::arg("workers"), py::arg("adversaries"), py::arg("float64"),
        "By how much a check may miss, relative to the reference norm: root mean square over the checks.");
  m.def("cyclic_weights", &weights, py::arg("workers"), py::arg("adversaries"), py::arg("compression") = 1);
}

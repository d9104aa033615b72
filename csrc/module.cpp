// The Python module: loading it registers the ops; it tells how it was built and shows the cyclic code's tables.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <complex>
#include <string>

#include "core/cyclic.h"
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

void check(int workers, int adversaries) {
  if (adversaries < 0 || workers < 2 * adversaries + 1 || workers > draco::kMostWorkers)
    throw py::value_error("needs 0 <= adversaries and 2 * adversaries + 1 <= workers <= " +
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

py::array_t<int64_t> supports(int workers, int adversaries) {
  check(workers, adversaries);
  const int r = 2 * adversaries + 1;
  py::array_t<int64_t> table({workers, r});
  for (int k = 0; k < workers; ++k)
    for (int t = 0; t < r; ++t) table.mutable_at(k, t) = (k + draco::cyclic_offset(workers, adversaries, t)) % workers;
  return table;
}

py::array_t<std::complex<double>> weights(int workers, int adversaries) {
  check(workers, adversaries);
  py::array_t<std::complex<double>> table({workers, workers});
  std::fill_n(table.mutable_data(), table.size(), std::complex<double>());
  for (int t = 0; t <= 2 * adversaries; ++t) {
    const draco::Complex w = draco::cyclic_weight(workers, adversaries, t);
    for (int k = 0; k < workers; ++k)
      table.mutable_at((k + draco::cyclic_offset(workers, adversaries, t)) % workers, k) = {w.re, w.im};
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
  m.def("cyclic_supports", &supports, py::arg("workers"), py::arg("adversaries"));
  m.def("cyclic_tolerance", &tolerance, py::arg("workers"), py::arg("adversaries"), py::arg("float64"),
        "By how much a check may miss, relative to the reference norm: root mean square over the checks.");
  m.def("cyclic_weights", &weights, py::arg("workers"), py::arg("adversaries"));
}

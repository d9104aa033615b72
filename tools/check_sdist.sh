#!/usr/bin/env bash
# Checks what a user gets from a package index: builds the sdist, builds the wheel from nothing but the sdist, installs
# that in a fresh environment beside the torch of constraints.txt, and decodes once from another folder.
#   bash tools/check_sdist.sh [FOLDER]     the sdist and the wheel are left in FOLDER, dist by default
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-dist}")
export PIP_CONSTRAINT="$PWD/constraints.txt" PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONPATH
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
. "$work/venv/bin/activate"
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
DRACO_CUDA=off pip wheel --quiet --no-deps --wheel-dir "$work/wheel" "$work"/sdist/*.tar.gz
twine check --strict sdist/* wheel/*
pip install --quiet wheel/*.whl
python - <<'PY'
import importlib.metadata
import torch
import draco_ext

for code in (draco_ext.RepetitionCode(6, 1), draco_ext.CyclicCode(7, 1)):
    gradients = torch.arange(code.parts, dtype=torch.float32)[:, None].expand(-1, 1000).contiguous()
    messages = torch.stack([code.encode(j, gradients[list(code.assignment(j))]) for j in range(code.workers)])
    messages[2] += 1
    out = draco_ext.decode(messages, code)
    assert not out.failed and out.suspects.nonzero().flatten().tolist() == [2], out
    torch.testing.assert_close(out.gradient, gradients.mean(0))
assert draco_ext.__version__ == importlib.metadata.version("draco_ext")
print(f"draco_ext {draco_ext.__version__} decodes in {draco_ext.__file__}: {draco_ext.build_info()}")
PY
mkdir -p "$out"
cp sdist/* wheel/* "$out"
echo "$0: left in $out: $(cd "$out" && echo draco_ext-*)"

#!/usr/bin/env bash
# Runs the quick tests of unit and kernels on the oldest torch that draco_ext is for, in an environment of its own.
#   bash tools/oldest_torch.sh [FOLDER]     the environment is left in FOLDER; one that is there is used again
#
# PyPI has that release for CUDA alone, with 3 GB of libraries that nothing calls here. Empty ones take their place.
set -euo pipefail
cd "$(dirname "$0")/.."
OLDEST=2.11.0
export PIP_CONSTRAINT= PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1
unset PYTHONPATH
work=$(realpath -m "${1:-build/oldest}")
python=$work/bin/python

if [ ! -x "$python" ]; then
  python3 -m venv "$work"
  "$python" -m pip install --no-deps "torch==$OLDEST"
  # What torch asks for, less the libraries for CUDA; then the requirements of the test extra.
  "$python" -m pip install filelock fsspec jinja2 'networkx>=2.5.1' 'numpy>=1.24' 'setuptools<82' 'sympy>=1.13.3' typing-extensions
  "$python" tools/empty_libraries.py
fi
"$python" -c "import torch; print('torch', torch.__version__)"
"$python" - <<'PY' | xargs -d '\n' "$python" -m pip install
import importlib.metadata, tomllib

with open("pyproject.toml", "rb") as file:
    extras = tomllib.load(file)["project"]["optional-dependencies"]
print(*(line for name in ("demo", "test") for line in extras[name] if not line.startswith("draco_ext")), sep="\n")
PY
DRACO_CUDA=off "$python" -m pip install --no-deps --force-reinstall .
"$work/bin/pytest" -q python_tests/unit python_tests/kernels --durations=25  # not python -m, which would find the sources first

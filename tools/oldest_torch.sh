#!/usr/bin/env bash
# Runs the tests without --long on the oldest torch that draco_ext is for, in an environment of its own.
#   bash tools/oldest_torch.sh [FOLDER [--prepare]]   the environment is left in FOLDER; one that is there is used again
# --prepare: installs what is not of this project, and ends.
#
# PyPI has that release for CUDA alone, with 3 GB of libraries that nothing calls here. Empty ones take their place.
# Left out is what no torch can change: CUDA kernels run on the host, enumerations and random inputs of kernels, of codes
# and of the protocol between threads. And models that DistributedDataParallel makes with torch.Stream(), which ends in
# the empty libraries.
set -euo pipefail
cd "$(dirname "$0")/.."
OLDEST=2.11.0
export PIP_CONSTRAINT= PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_QUIET=1 PIP_COMPILE=0
unset PYTHONPATH PYTHONDONTWRITEBYTECODE
work=$(realpath -m "${1:-build/oldest}")
export PATH="$work/bin:$PATH" # the tests look for uv, cmake and ninja
part() { echo "-- $SECONDS s: $1"; }

if [ ! -x "$work/bin/python" ]; then
  part fetch
  python3 -m venv "$work"
  pip install --no-deps "torch==$OLDEST"
  python tools/empty_libraries.py
fi
part install
python - <<'PY' | xargs -d '\n' pip install "torch==$OLDEST"
import tomllib

with open("pyproject.toml", "rb") as file:
    extras = tomllib.load(file)["project"]["optional-dependencies"]
print(*(line for name in ("demo", "test") for line in extras[name] if not line.startswith("draco_ext")), sep="\n")
PY
if [ "${2:-}" = --prepare ]; then
  exit
fi
part build
DRACO_CUDA=off pip install --no-deps --force-reinstall .
python -c "import torch; assert torch.__version__.split('+')[0] == '$OLDEST', torch.__version__"
part tests
left_out=(kernels/test_{beyond,evidence,fuzz,guarantee,properties,simt}.py
  unit/test_{collusion,docstrings,network_model,server_pieces,server_shards,verified,verified_plots}.py)
pytest -q -n auto python_tests --durations=25 "${left_out[@]/#/--ignore=python_tests/}" \
  -k "not every_instruction_set and not protect_refuses"
part end

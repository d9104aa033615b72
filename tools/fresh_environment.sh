# Sourced by the tools that check what a user gets. Sets `root`, the sources, which becomes the current folder; `out`, the
# folder given to the tool, dist by default; and `work`, which is gone when the tool ends, with a virtual environment in
# it that is active and empty.
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root"
out=$(realpath -m "${1:-dist}")
export PIP_CONSTRAINT="$PWD/constraints.txt" PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_COMPILE=0
unset PYTHONPATH PYTHONDONTWRITEBYTECODE
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
. "$work/venv/bin/activate"

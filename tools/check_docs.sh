#!/usr/bin/env bash
# Builds the documentation site into site/; a warning, such as a dead link, is an error.
#   bash tools/check_docs.sh     installs the extra `docs` into the virtual environment that is active, or else into one of its own
set -euo pipefail
cd "$(dirname "$0")/.."
export PIP_CONSTRAINT="${PIP_CONSTRAINT:-$PWD/constraints.txt}" PIP_DISABLE_PIP_VERSION_CHECK=1
if [ -z "${VIRTUAL_ENV:-}" ]; then
  folder=$(mktemp -d)
  trap 'rm -rf "$folder"' EXIT
  python3 -m venv "$folder"
  . "$folder/bin/activate"
fi
# The extra's requirements alone: the site is made from the sources, and needs neither torch nor the extension.
python - <<'PY' | xargs -d '\n' pip install --quiet
import tomllib

with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["project"]["optional-dependencies"]["docs"], sep="\n")
PY
mkdocs build --strict

#!/usr/bin/env bash
# Gives a wheel the tag of the oldest manylinux that it runs on, without copying torch's libraries into it.
#   bash tools/repair_wheel.sh FOLDER WHEEL...     cibuildwheel calls this, and tools/build_wheel.sh
set -euo pipefail
out=$1
shift
exclude=()
for library in c10 c10_cuda torch torch_cpu torch_cuda torch_python; do exclude+=(--exclude "lib$library.so"); done
for wheel in "$@"; do
  auditwheel repair "${exclude[@]}" --wheel-dir "$out" "$wheel"
done

#!/usr/bin/env bash
# On a machine with a GPU: builds for it, runs the tests that use it, compute-sanitizer on a small part of them, and the
# benchmark. Leaves logs and cuda.md, the results with device, driver, torch and date, in a folder. Under 10 minutes.
#   bash bench/gpu.sh [FOLDER]     torch with CUDA, nvcc, cmake, ninja, pybind11, setuptools and the test extra needed
set -euo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:-gpu-results}")

architecture=$(python3 - <<'PY'
import torch
if torch.cuda.is_available():
    print("%d.%d" % torch.cuda.get_device_capability())
PY
)
if [ -z "$architecture" ]; then
  echo "bench/gpu.sh: torch sees no CUDA device here, so nothing was built, tested or measured." >&2
  exit 1
fi
mkdir -p "$out"
rm -f "$out/cuda.md"
export FAIL_WITHOUT_CUDA=1
tests=(-p no:cacheprovider python_tests -m)
failed=()

step() {  # NAME COMMAND...: output to a log, its last lines here; goes on after a failure
  local name=$1 begin=$SECONDS status=0
  shift
  "$@" >"$out/$name.log" 2>&1 || { status=$?; failed+=("$name"); }
  summary+="$name: exit status $status after $((SECONDS - begin)) s; $(tail -n 1 "$out/$name.log")"$'\n\n'
  echo "== $name: exit status $status after $((SECONDS - begin)) s"
  tail -n 3 "$out/$name.log"
}

summary=""
step build env DRACO_CUDA=on TORCH_CUDA_ARCH_LIST="$architecture" \
  python3 -m pip install --no-build-isolation --no-deps --force-reinstall .
if [ ${#failed[@]} -eq 0 ]; then
  step tests pytest "${tests[@]}" gpu --long
  for tool in memcheck racecheck initcheck; do
    # torch's allocator would hide what lies between two tensors
    step "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$(command -v python3)" "$(command -v pytest)" "${tests[@]}" "gpu and sanitizer"
  done
  step benchmark pytest bench/test_gpu.py --bench-output "$out"
fi
printf '\n%s' "$summary" >>"$out/cuda.md"
cat "$out/cuda.md"
if [ ${#failed[@]} -gt 0 ]; then
  echo "bench/gpu.sh: failed: ${failed[*]}; logs are in $out." >&2
  exit 1
fi
echo "bench/gpu.sh: all passed; results are in $out."

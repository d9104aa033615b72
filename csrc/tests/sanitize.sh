#!/usr/bin/env bash
# Python tests on an extension that is built with sanitizers, in a folder of its own.
#   bash csrc/tests/sanitize.sh          a part of the tests, as .ci/run does: three minutes on two cores
#   bash csrc/tests/sanitize.sh --all    every test of the ops and codes: three more
# First address,undefined; then thread, on tests that decode from several threads. torch and Python are not instrumented:
# the sanitizer's library has to be loaded before Python, and of torch's threads the thread sanitizer could follow none,
# so that build brings parallel_for with it (threads.cpp).
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$root"

library() { "${CXX:-c++}" -print-file-name="lib$1.so"; }
build() { # sanitizers, folder
  DRACO_SANITIZE=$1 DRACO_CUDA=off python setup.py --quiet build --build-base "$work/$2" >"$work/$2.log" 2>&1 ||
    { tail -n 50 "$work/$2.log"; exit 1; }
}
run() { # folder, libraries, arguments of pytest
  local package
  package=$(echo "$work/$1"/lib*)
  # Not from the root, whose draco_ext would come first. What a sanitizer says goes past pytest, before the process ends.
  (cd "$package" && env PYTHONPATH="$package" LD_PRELOAD="$2" \
    python -m pytest -q --capture=sys -p no:cacheprovider "${@:3}")
}

tests=("$root"/python_tests/{unit/test_arguments,kernels/test_{ops,fuzz,concurrency,kernels,cyclic,repetition}}.py)
some="test_arguments or every_call or every_kernel_once or (test_concurrency and not spawn) or (test_ops and opcheck)"
some+=" or (reference and not test_kernels) or tiles or missing or overflow or different_size or large_parameters"
[[ "${1:-}" == --all ]] && some="not leak"

build address,undefined address
(
  build thread thread
  # OMP_NUM_THREADS: torch's own ops stay on the thread that calls them. Of the test that takes by far longest one dtype
  # is enough.
  TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1 OMP_NUM_THREADS=1 \
    run thread "$(library tsan)" "$root/python_tests/kernels/test_concurrency.py" \
    -k "threads and not (small_stacks and float64)"
) >"$work/thread.out" 2>&1 & # beside the other tests, which seldom use two cores

echo "== address, undefined"
failed=0
# Python leaks on purpose. A use after return costs more than it finds here.
ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 UBSAN_OPTIONS=print_stacktrace=1 \
  run address "$(library asan) $(library ubsan)" "${tests[@]}" -k "($some) and not cuda" || failed=$?

echo "== thread"
wait $! || failed=$?
cat "$work/thread.out"
exit "$failed"

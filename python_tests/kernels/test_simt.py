"""What needs no GPU: the C++ tests, and every CUDA kernel compiled for the host and run there (csrc/tests/simt.h).

The tests of kernels run again in processes of their own, under the address and undefined-behaviour sanitizers, with
fresh memory full of NaN, and with the threads of a block in several orders, on which no result may depend. First it is
shown that an out-of-bounds read and a missing barrier are noticed.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX", "c++").split()[0]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """The folder in which the C++ tests were built."""
    lacking = [tool for tool in ("cmake", "ninja", COMPILER) if shutil.which(tool) is None]
    lacking += [name for name, path in sanitizers().items() if not lacking and not os.path.isabs(path)]
    if lacking:
        pytest.skip(f"not found: {', '.join(lacking)}")
    folder = tmp_path_factory.mktemp("simt")
    configure = ["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", "-DDRACO_TESTS=ON"]
    configure += [f"-DDRACO_TORCH_DIR={Path(torch.__file__).parent}", f"-DDRACO_TORCH_VERSION={torch.__version__}"]
    for command in (configure, ["cmake", "--build", folder]):
        run = subprocess.run(command, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr
    return folder


def sanitizers():
    """Libraries that have to be loaded before Python itself."""

    def where(name):
        command = [COMPILER, f"-print-file-name={name}"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    return {name: where(name) for name in ("libasan.so", "libubsan.so")}


def library(build):
    return build / "csrc" / "tests" / "libdraco_simt.so"


def start(*arguments, order="forward"):
    """Python under the sanitizers; its threads run in that order."""
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(sanitizers().values()),
        # Every byte of fresh memory 0xff: a NaN in every dtype. Python leaks on purpose.
        "ASAN_OPTIONS": "detect_leaks=0:max_malloc_fill_size=1000000000:malloc_fill_byte=255"
        ":detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "DRACO_SIMT_ORDER": order,
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd="/",  # and not the sources, from which draco_ext would be imported
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def planted(build, name, bug, order="forward"):
    """Exit status and output of a kernel of csrc/tests/planted.cu, run with its bug or without."""
    code = f"""
import torch
torch.ops.load_library({str(library(build))!r})
print(torch.ops.draco_ext_simt.planted_{name}(torch.arange(100.0), {bug}).tolist())
"""
    process = start("-c", code, order=order)
    output, _ = process.communicate(timeout=300)
    return process.returncode, output


def test_core(build):
    run = subprocess.run(
        ["ctest", "--test-dir", build, "--output-on-failure"], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout
    assert int(re.search(r"out of (\d+)", run.stdout)[1]) >= 5


def test_finds_a_read_out_of_bounds(build):
    status, output = planted(build, "read", bug=False)
    assert status == 0, output
    assert output.strip() == str([float(i + (i + 1 if i < 99 else 0)) for i in range(100)])
    status, output = planted(build, "read", bug=True)
    assert status != 0
    assert "AddressSanitizer: heap-buffer-overflow" in output
    assert "add_neighbours" in output


def test_finds_a_missing_barrier(build):
    orders = ("forward", "reverse", "7")
    values = [float(i) for i in range(100)]
    right = str(values[63::-1] + values[:63:-1])
    assert [planted(build, "barrier", bug=False, order=order) for order in orders] == [(0, right + "\n")] * 3
    wrong = [planted(build, "barrier", bug=True, order=order)[1] for order in orders]
    assert len(set(wrong)) == 3
    assert right + "\n" not in wrong


@pytest.mark.timeout(1800)
def test_kernels(build):
    """All tests that run on any device, and the kernels' own in other orders: as many at once as there are cores."""
    tests = ROOT / "python_tests"
    # The first one started is the first waited for: a short one.
    kernels = tests / "kernels" / "test_kernels.py"
    waiting = [("reverse", kernels), ("forward", tests), ("7", kernels)]
    running, failed = [], []
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            order, path = waiting.pop(0)
            arguments = ["-q", "-x", "-p", "no:cacheprovider", "--simt", library(build), path]
            running.append((order, start("-m", "pytest", *arguments, order=order)))
        order, process = running.pop(0)
        output, _ = process.communicate()
        passed = re.search(r"(\d+) passed", output)
        if process.returncode != 0 or passed is None or int(passed[1]) < 30:
            failed.append(f"order {order}: exit status {process.returncode}\n{output}")
    assert not failed, "\n".join(failed)

"""What needs no GPU: the C++ tests, and every CUDA kernel compiled for the host and run there (csrc/tests/simt.h).

The tests of kernels run again in processes of their own, under the address and undefined-behaviour sanitizers, with
fresh memory full of NaN, and with the threads of a block in several orders, on which no result may depend. First it is
shown that an out-of-bounds read and a missing barrier are noticed. All of it takes minutes, and --long.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.long
ROOT = Path(__file__).resolve().parents[2]
COMPILER = os.environ.get("CXX", "c++").split()[0]
ORDERS = ("forward", "reverse", "7")


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


def test_core(build):
    run = subprocess.run(
        ["ctest", "--test-dir", build, "--output-on-failure", "--parallel", "2"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    assert int(re.search(r"out of (\d+)", run.stdout)[1]) >= 5


PLANTED = """
import sys, torch
torch.ops.load_library(sys.argv[1])
ops, values = torch.ops.draco_ext_simt, torch.arange(100.0)
for kernel, bug in ((ops.planted_barrier, False), (ops.planted_barrier, True), (ops.planted_read, False)):
    print(kernel(values, bug).tolist())
sys.stdout.flush()
ops.planted_read(values, True)
"""


@pytest.fixture(scope="module")
def planted(build):
    """Lines that come of the kernels of csrc/tests/planted.cu in each order, and what else was said in the end."""
    processes = [start("-c", PLANTED, library(build), order=order) for order in ORDERS]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert all(process.returncode != 0 for process in processes), outputs
    return [output.split("\n", 3) for output in outputs]


def test_finds_a_read_out_of_bounds(planted):
    for _, _, right, error in planted:
        assert right == str([float(i + (i + 1 if i < 99 else 0)) for i in range(100)])
        assert "AddressSanitizer: heap-buffer-overflow" in error
        assert "add_neighbours" in error


def test_finds_a_missing_barrier(planted):
    expected = str([float(i) for i in (*range(63, -1, -1), *range(99, 63, -1))])
    assert [right for right, *_ in planted] == [expected] * len(ORDERS)
    wrong = {wrong for _, wrong, *_ in planted}
    assert len(wrong) == len(ORDERS)
    assert expected not in wrong


@pytest.mark.timeout(1800)
def test_kernels(build):
    """All tests that run on any device, and the kernels' own in other orders: as many at once as there are cores."""
    tests = ROOT / "python_tests"
    kernels = tests / "kernels" / "test_kernels.py"
    # The first one started is the first waited for: a short one.
    waiting = [("reverse", [kernels]), ("forward", [tests]), ("7", [kernels])]
    running, failed = [], []
    while waiting or running:
        while waiting and len(running) < (os.cpu_count() or 1):
            order, selected = waiting.pop(0)
            arguments = ["-q", "-x", "-p", "no:cacheprovider", "--simt", library(build), *selected]
            running.append((order, start("-m", "pytest", *arguments, order=order)))
        order, process = running.pop(0)
        output, _ = process.communicate()
        passed = re.search(r"(\d+) passed", output)
        if process.returncode != 0 or passed is None or int(passed[1]) < 30:
            failed.append(f"order {order}: exit status {process.returncode}\n{output}")
    assert not failed, "\n".join(failed)

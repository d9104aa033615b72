"""What all tests share: layers, devices, the seed, honest messages, the enumerations' attacks.

A test's folder is its layer, and its marker. Tests and cases that are marked `long` are left out without `--long`, and
the fixture `long` tells tests which size to take.

Whole folders run on all cores, by pytest-xdist; files, selections (-k, -m) and whatever else a debugger may look into
in one process, and everything with ``-n 0``. The tests of a file, which may share a fixture, are run by one process.

Tests that use the fixture `device` run on the CPU and on a GPU where there is one, or, with `--simt LIBRARY`, they
alone run, on kernels written for the GPU that were compiled for the host: the library registers every op again for CPU
tensors, as `torch.ops.draco_ext_simt`. With FAIL_WITHOUT_CUDA=1 the tests on a GPU fail where there is none.
"""

import dataclasses
import functools
import itertools
import multiprocessing.forkserver
import os
import sys

import hypothesis
import pytest
import torch

SEED = int(os.environ.get("DRACO_SEED", "20180327"))

# The folders of tests, and the marker of all tests in them.
LAYERS = {
    "unit": "no ranks: seconds",
    "ranks": "several processes that talk to each other",
    "kernels": "ops and codes against the reference, enumerations, CUDA kernels run on the host",
}

# quick and long draw the same examples every time, so that a change fails for what it does alone; thorough draws others
# each time. All print how to see a failing one again.
hypothesis.settings.register_profile("quick", max_examples=30, derandomize=True, deadline=None, print_blob=True)
for profile, examples, same in (("long", 150, True), ("thorough", 3000, False)):
    hypothesis.settings.register_profile(
        profile,
        max_examples=examples,
        derandomize=same,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


def pytest_addoption(parser):
    parser.addoption("--long", action="store_true", help="run the long layer too: all cases, at full size")
    parser.addoption(
        "--simt",
        metavar="LIBRARY",
        help="run the tests of kernels on the CUDA kernels compiled for the host: this library",
    )


MOST_PROCESSES = 8  # each imports torch, and starts ranks of its own


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Take all cores, where whole folders are to be run and the command says nothing else."""
    option = config.option
    if not config.pluginmanager.hasplugin("xdist") or hasattr(config, "workerinput"):
        return
    alone = option.usepdb or option.capture == "no" or option.collectonly or option.simt or option.keyword
    if option.numprocesses is None and not alone and not option.markexpr and all(map(os.path.isdir, config.args)):
        option.numprocesses = min(len(os.sched_getaffinity(0)), MOST_PROCESSES)
    if option.numprocesses and option.dist == "no":
        option.dist = "loadfile"
        option.loadscopereorder = False


def pytest_configure(config):
    if hasattr(config, "workerinput"):
        # Its share of the cores; threads that wait for each other's core are slow.
        threads = max(1, len(os.sched_getaffinity(0)) // config.workerinput["workercount"])
        os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # of processes that tests start
        torch.set_num_threads(threads)
    for layer, meaning in LAYERS.items():
        config.addinivalue_line("markers", f"{layer}: {meaning}")
    config.addinivalue_line("markers", "long: takes long, and runs with --long alone")
    config.addinivalue_line("markers", "gpu: runs on a GPU; set by itself for every test that uses one")
    config.addinivalue_line("markers", "sanitizer: every kernel once, small: for runs under compute-sanitizer")
    if config.getoption("--hypothesis-profile", None) is None:
        hypothesis.settings.load_profile("long" if config.getoption("--long") else "quick")
    library = config.getoption("--simt")
    if library is not None:
        if not os.path.exists(library):
            raise pytest.UsageError(f"--simt: there is no {library}")
        torch.ops.load_library(os.path.abspath(library))
        if not hasattr(torch.ops.draco_ext_simt, "majority_vote"):
            raise pytest.UsageError(f"--simt: {library} does not register the ops as draco_ext_simt")


def pytest_report_header(config):
    import draco_ext

    simt = config.getoption("--simt")
    on_simt = "" if simt is None else f", kernels of {simt}"
    layers = "all layers" if config.getoption("--long") else "without the long layer (--long)"
    return f"draco_ext: {layers}, DRACO_SEED={SEED}, {draco_ext.build_info()}{on_simt}"


# ------------------------------------------------------------------------------------------------------ layers


def pytest_itemcollected(item):
    layer = item.path.parent.name
    if layer in LAYERS:
        item.add_marker(layer)
    if _uses_gpu(item):
        item.add_marker(pytest.mark.gpu)


# Files of half a minute and more begin first, so that no process is left with one of them in the end.
LONGEST = (
    "test_simt",
    "test_protect",
    "test_ops",
    "test_verified",
    "test_hosts",
    "test_audit_fsdp",
    "test_audit",
    "test_state",
    "test_train",
)


def _begins(item):
    """The place of a test's file among those that begin first; others stay as they are."""
    file = item.path.stem
    return LONGEST.index(file) if file in LONGEST else len(LONGEST)


def pytest_collection_modifyitems(config, items):
    def wanted(item):
        if config.getoption("--simt") is not None and "device" not in item.fixturenames:
            return False
        if "cuda" in item.fixturenames and not with_cuda():
            return False
        return config.getoption("--long") or item.get_closest_marker("long") is None

    config.hook.pytest_deselected(items=[item for item in items if not wanted(item)])
    items[:] = sorted(filter(wanted, items), key=_begins)


@pytest.fixture
def long(request):
    """Whether tests are to take their full size."""
    return request.config.getoption("--long")


def pytest_runtest_setup(item):
    if item.get_closest_marker("ranks") is not None:
        modules = {other.module.__name__ for other in item.session.items if other.get_closest_marker("ranks")}
        _start_forkserver(tuple(sorted(modules)))


@functools.cache
def _start_forkserver(modules):
    """Start the process that ranks are forked from, with all that they import: a second for each of them."""
    multiprocessing.set_forkserver_preload(["torch._dynamo", "pytest", *modules])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # which it does not take over before Python 3.13
        multiprocessing.forkserver.ensure_running()


# ----------------------------------------------------------------------------------------------------- devices


def pytest_generate_tests(metafunc):
    kinds = ["cpu", "cuda"] if with_cuda() else ["cpu"]
    if "device" in metafunc.fixturenames:
        on_host = metafunc.config.getoption("--simt") is not None
        metafunc.parametrize("device", ["simt"] if on_host else kinds, indirect=True)
    if "real_device" in metafunc.fixturenames:
        metafunc.parametrize("real_device", kinds, indirect=True)


def _uses_gpu(item):
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    return "cuda" in item.fixturenames or "cuda" in (parameters.get("device"), parameters.get("real_device"))


@functools.cache
def lacking_for_cuda():
    """What keeps tests from running on a GPU, or None."""
    import draco_ext

    if not torch.cuda.is_available():
        return "no CUDA device"
    return None if draco_ext.build_info()["cuda"] else "draco_ext was built without CUDA"


def with_cuda():
    """Whether tests on a GPU are collected. `test_kernels.py::test_on_a_gpu` is skipped in place of them all."""
    return lacking_for_cuda() is None or os.environ.get("FAIL_WITHOUT_CUDA") == "1"


def _usable(kind):
    if kind != "cuda":
        return torch.device("cpu")
    if lacking_for_cuda() is not None:
        pytest.fail(f"{lacking_for_cuda()}, and FAIL_WITHOUT_CUDA=1", pytrace=False)
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def device(request, monkeypatch):
    """The device that a test runs on: cpu and cuda, or simt alone, whose tensors are the CPU's."""
    if request.param == "simt":
        monkeypatch.setattr(torch.ops, "draco_ext", torch.ops.draco_ext_simt)
    yield _usable(request.param)
    if request.param == "cuda":
        torch.cuda.synchronize()  # an error of this test's kernels shows in this test


@pytest.fixture
def real_device(request):
    """As `device`, but never simt: for what needs the namespace draco_ext itself, with its fake kernels."""
    return _usable(request.param)


@pytest.fixture
def cuda():
    """The GPU, for what exists there alone."""
    return _usable("cuda")


@pytest.fixture
def simt(request):
    """Whether kernels run on the host, a thousand times slower than on a GPU: enumerations are to be cut down.

    Not with --long.
    """
    return request.config.getoption("--simt") is not None and not request.config.getoption("--long")


@pytest.fixture
def one_core(request):
    """Let the threads of a test take turns on one core.

    The interpreter runs one of them at a time. On several cores each op of torch, which lets go of the interpreter,
    makes them fight for it, at more processor time than the ops take.
    """
    cores = os.sched_getaffinity(0)
    process = getattr(request.config, "workerinput", {"workerid": "gw0"})["workerid"]
    os.sched_setaffinity(0, {sorted(cores)[int(process.removeprefix("gw")) % len(cores)]})
    yield
    os.sched_setaffinity(0, cores)


def on(device, function, *args, **kwargs):
    """function(*args, **kwargs) on the device: tensors among the arguments are moved there, and those it returns back.

    Tensors that are on the device already are left as they are, strides included.
    """

    def there(value):
        return value.to(device) if isinstance(value, torch.Tensor) else value

    def back(value):
        assert value.device == device
        return value.cpu()

    result = function(*map(there, args), **{name: there(value) for name, value in kwargs.items()})
    if isinstance(result, torch.Tensor):
        return back(result)
    if isinstance(result, tuple):
        return tuple(map(back, result))
    return dataclasses.replace(
        result, gradient=back(result.gradient), suspects=back(result.suspects), failed=back(result.failed)
    )


# ------------------------------------------------------------------------------------------ messages and attacks


@pytest.fixture(autouse=True)
def generator():
    """A generator seeded by DRACO_SEED; torch's own is seeded too."""
    torch.manual_seed(SEED)
    return torch.Generator().manual_seed(SEED)


def honest_messages(code, gradients):
    """One message per worker for gradients (parts, d)."""
    return torch.stack([code.encode(j, gradients[list(code.assignment(j))]) for j in range(code.workers)])


def _flip_bit(message, bit):
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[message.element_size()]
    flipped = message.clone()
    view = flipped.view(integer)
    view[len(view) // 2] ^= 1 << bit if bit < 8 * message.element_size() - 1 else torch.iinfo(integer).min
    return flipped


def _minus_zero(message):
    """-0 where there was 0: the message with every zero negated."""
    return torch.where(message == 0, -message, message)


# name -> f(message, generator, colluding message) -> what the bad worker sends
ATTACKS = {
    "reversed": lambda z, g, c: -100 * z,
    "negated": lambda z, g, c: -z,
    "constant": lambda z, g, c: torch.full_like(z, -100),
    "zero": lambda z, g, c: torch.zeros_like(z),
    "gaussian": lambda z, g, c: torch.randn(z.shape, generator=g).to(z.dtype) * 30,
    "collude": lambda z, g, c: c,
    "add-same": lambda z, g, c: z + c,
    "nan": lambda z, g, c: torch.full_like(z, torch.nan),
    "one-nan": lambda z, g, c: z.index_fill(0, torch.tensor([len(z) // 2]), torch.nan),
    "inf": lambda z, g, c: torch.full_like(z, torch.inf),
    "one-minus-inf": lambda z, g, c: z.index_fill(0, torch.tensor([0]), -torch.inf),
    "huge": lambda z, g, c: z * (1e4 if z.element_size() == 2 else 1e30),
    "minus-zero": lambda z, g, c: _minus_zero(z),
    "low-bit": lambda z, g, c: _flip_bit(z, 0),
    "exponent-bit": lambda z, g, c: _flip_bit(z, 8 * z.element_size() - 3),
    "sign-bit": lambda z, g, c: _flip_bit(z, 8 * z.element_size() - 1),
    "small": lambda z, g, c: z * 1.01,
}


def attacked(messages, bad, attack, generator):
    """The messages with those of the workers in `bad` replaced."""
    out = messages.clone()
    common = torch.randn(messages.size(1), generator=generator).to(messages.dtype)
    for j in bad:
        out[j] = ATTACKS[attack](messages[j], generator, common)
    return out


def erasure_cases(code, messages, generator):
    """Every set of missing workers with every set of at most s colluders among the others.

    Yields (missing workers, bad workers, mask of the missing, messages as they come in).
    """
    n = code.workers
    for f in range(n + 1):
        for gone in itertools.combinations(range(n), f):
            mask = torch.zeros(n, dtype=torch.bool)
            mask[list(gone)] = True
            for e in range(code.adversaries + 1):
                for bad in itertools.combinations([j for j in range(n) if j not in gone], e):
                    sent = attacked(messages, bad, "collude", generator)
                    sent[list(gone)] = torch.nan  # must not be looked at
                    yield gone, bad, mask, sent


def named(suspects):
    """The set of suspects."""
    return set(suspects.nonzero().flatten().tolist())


def relative_error(value, truth):
    """Norm of the difference over the norm of the truth, in float64; inf if anything is not finite."""
    error = ((value.double() - truth.double()).norm() / truth.double().norm()).item()
    return error if error == error else float("inf")

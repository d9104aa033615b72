"""What all tests share: the devices, the seed, printed and settable, honest messages, the enumerations' attacks.

Tests that use the fixture `device` run on the CPU and on a GPU, or, with `--simt LIBRARY`, they alone run, on kernels
written for the GPU that were compiled for the host: the library registers every op again for CPU tensors, as
`torch.ops.draco_ext_simt`. Without a GPU the tests on one are skipped, or fail where FAIL_WITHOUT_CUDA=1.
"""

import dataclasses
import functools
import itertools
import os

import hypothesis
import pytest
import torch

SEED = int(os.environ.get("DRACO_SEED", "20180327"))

# The folders of tests, and the marker of all tests in them.
LAYERS = {
    "unit": "no ranks and no sizes that take time: seconds",
    "ranks": "several processes that talk to each other",
    "kernels": "ops and codes against the reference, enumerations, CUDA kernels run on the host",
}

# ci draws the same examples every time, long many others; both print how to see a failing one again.
hypothesis.settings.register_profile("ci", max_examples=30, derandomize=True, deadline=None, print_blob=True)
hypothesis.settings.register_profile(
    "long", max_examples=3000, deadline=None, print_blob=True, suppress_health_check=list(hypothesis.HealthCheck)
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser):
    parser.addoption(
        "--simt",
        metavar="LIBRARY",
        help="run the tests of kernels on the CUDA kernels compiled for the host: this library",
    )


def pytest_configure(config):
    for layer, meaning in LAYERS.items():
        config.addinivalue_line("markers", f"{layer}: {meaning}")
    config.addinivalue_line("markers", "gpu: runs on a GPU; set by itself for every test that uses one")
    config.addinivalue_line("markers", "sanitizer: every kernel once, small: for runs under compute-sanitizer")
    config.addinivalue_line("markers", "slow: takes tens of seconds, or tens of GB")
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
    return f"draco_ext: DRACO_SEED={SEED}, {draco_ext.build_info()}{on_simt}"


# ----------------------------------------------------------------------------------------------------- devices


def pytest_generate_tests(metafunc):
    if "device" in metafunc.fixturenames:
        kinds = ["cpu", "cuda"] if metafunc.config.getoption("--simt") is None else ["simt"]
        metafunc.parametrize("device", kinds, indirect=True)
    if "real_device" in metafunc.fixturenames:
        metafunc.parametrize("real_device", ["cpu", "cuda"], indirect=True)


def pytest_itemcollected(item):
    layer = item.path.parent.name
    if layer in LAYERS:
        item.add_marker(layer)
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    if "cuda" in item.fixturenames or "cuda" in (parameters.get("device"), parameters.get("real_device")):
        item.add_marker(pytest.mark.gpu)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--simt") is not None:
        others = [item for item in items if "device" not in item.fixturenames]
        items[:] = [item for item in items if "device" in item.fixturenames]
        config.hook.pytest_deselected(items=others)


@functools.cache
def _lacking_for_cuda():
    import draco_ext

    if not torch.cuda.is_available():
        return "no CUDA device"
    return None if draco_ext.build_info()["cuda"] else "draco_ext was built without CUDA"


def _usable(kind):
    if kind != "cuda":
        return torch.device("cpu")
    lacking = _lacking_for_cuda()
    if lacking is None:
        return torch.device("cuda", torch.cuda.current_device())
    if os.environ.get("FAIL_WITHOUT_CUDA") == "1":
        pytest.fail(f"{lacking}, and FAIL_WITHOUT_CUDA=1", pytrace=False)
    pytest.skip(f"{lacking} (FAIL_WITHOUT_CUDA=1 makes this a failure)")


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

    Not under HYPOTHESIS_PROFILE=long.
    """
    return request.config.getoption("--simt") is not None and os.environ.get("HYPOTHESIS_PROFILE") != "long"


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

"""The ops as torch sees them: schemas, fakes, compile, dispatch, threads, instruction sets."""

import os
import platform
import subprocess
import sys
import threading

import pytest
import torch
from conftest import attacked, honest_messages, named, on

import draco_ext
from draco_ext import _C, CyclicCode, RepetitionCode, ops

NAMES = [
    "majority_vote",
    "majority_vote_out",
    "vector_mean_out",
    "digest",
    "digest_by_keys",
    "digest_and_stats",
    "digest_stats_and_scale_",
    "cyclic_encode",
    "cyclic_encode_out",
    "cyclic_encode_add_",
    "cyclic_project",
    "cyclic_project_by_key",
    "cyclic_locate",
    "cyclic_combine",
    "cyclic_combine_out",
    "cyclic_decode",
    "cyclic_decode_out",
]
VOTE_DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
CYCLIC_DTYPES = [torch.float32, torch.float64]


def op(name):
    return getattr(torch.ops.draco_ext, name).default


def cyclic_messages(n, s, d, dtype=torch.float32):
    return honest_messages(CyclicCode(n, s), torch.randn(n, d, dtype=dtype))


def test_every_op_is_in_this_list():
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("draco_ext::")}
    assert registered == {f"draco_ext::{name}" for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_registered(name):
    """A kernel for each device that this build is for, and a fake one."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    wanted = {"CPU": True, "CUDA": _C.build_info()["cuda"], "Meta": True}
    assert {key: has(f"draco_ext::{name}", key) for key in wanted} == wanted
    assert torch._library.simple_registry.singleton.find(f"draco_ext::{name}").fake_impl.kernel is not None


@pytest.mark.parametrize("dtype", VOTE_DTYPES, ids=str)
@pytest.mark.parametrize("tolerance", [0.0, 0.01])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck_vote(dtype, tolerance, masked, real_device):
    messages = torch.randn(2, 50).to(real_device, dtype).repeat_interleave(3, 0)
    missing = torch.tensor([True] + [False] * 5, device=real_device) if masked else None
    torch.library.opcheck(op("majority_vote"), (messages, missing, [3, 3], 1, tolerance, 0.0, True))


@pytest.mark.parametrize("dtype", VOTE_DTYPES, ids=str)
def test_opcheck_vector_mean(dtype, real_device):
    vectors = list(torch.randn(3, 50).to(real_device, dtype))
    torch.library.opcheck(op("vector_mean_out"), (vectors, torch.zeros_like(vectors[0])))


@pytest.mark.parametrize("dtype", ops.DIGEST_DTYPES, ids=str)
def test_opcheck_digest(dtype, real_device):
    values = torch.randint(0, 99, (50,)).to(real_device, dtype)
    torch.library.opcheck(op("digest"), (values, [3, -4]))
    torch.library.opcheck(op("digest_by_keys"), (values, torch.tensor([3, -4], device=real_device)))


@pytest.mark.parametrize("dtype", VOTE_DTYPES, ids=str)
@pytest.mark.parametrize("d", [0, 50, ops.TILE + 1])
def test_opcheck_digest_and_stats(d, dtype, real_device):
    torch.library.opcheck(op("digest_and_stats"), (torch.randn(d).to(real_device, dtype), 3))
    torch.library.opcheck(op("digest_stats_and_scale_"), (torch.randn(d).to(real_device, dtype), 3, 0.5))


def test_digest_and_stats_compiles_for_any_length(real_device):
    compiled = torch.compile(lambda x: ops.digest_and_stats(x * 2, 3), fullgraph=True, dynamic=True)
    for d in (5, ops.TILE, 3 * ops.TILE + 1):
        values = torch.randn(d).to(real_device)
        for got, wanted in zip(compiled(values), ops.digest_and_stats(values * 2, 3), strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", CYCLIC_DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck_cyclic(dtype, masked, real_device):
    n, s, d = 7, 2, 50
    like = {"dtype": dtype, "device": real_device}
    messages = cyclic_messages(n, s, d, dtype).to(real_device)
    mask = torch.tensor([True] + [False] * 6, device=real_device) if masked else None
    check = torch.library.opcheck
    check(op("cyclic_encode"), (torch.randn(5, 33, **like), n, s, 1))
    check(op("cyclic_encode_add_"), (messages[0].clone(), messages[1].clone(), torch.randn(50, **like), n, s, 0, 0))
    check(op("cyclic_project"), (messages, mask, 3))
    check(op("cyclic_project_by_key"), (messages, mask, torch.tensor([3], device=real_device)))
    projections, norms = ops.cyclic_project(messages, 3, missing=mask)
    check(
        op("cyclic_locate"),
        (projections, norms, mask, s, d, dtype == torch.float64, 0.0, 0.0, True),
    )
    check(op("cyclic_combine"), (messages, torch.randn(n, dtype=torch.complex128, device=real_device), d - 1))
    for seed in (None, 4):
        check(op("cyclic_decode"), (messages, mask, mask, s, d - 1, 0.0, 0.0, True, seed))


@pytest.mark.parametrize("code", [RepetitionCode(6, 1), CyclicCode(7, 2)], ids=repr)
def test_compile_fullgraph(code, real_device, generator):
    messages = honest_messages(code, torch.randn(code.parts, 300, generator=generator))

    def step(messages):
        out = draco_ext.decode(messages * 1.0, code)
        return torch.where(out.failed, 0.0, out.gradient * 2), out.suspects, out

    compiled = torch.compile(step, fullgraph=True)
    for bad in ((), (1,)):
        sent = attacked(messages, bad, "reversed", generator).to(real_device)
        gradient, suspects, out = compiled(sent)
        eager = step(sent)
        torch.testing.assert_close(gradient, eager[0], rtol=0, atol=1e-6)
        assert torch.equal(suspects, eager[1])
        assert named(out.suspects) == set(bad)
        out.raise_if_failed()


def test_compiled_decode_draws_a_new_projection_every_time(real_device, generator):
    """A seed baked into the graph would be a projection that workers can know."""
    messages = cyclic_messages(7, 2, 4096)
    sent = messages.clone()
    # At the noise floor the projection decides whether an error is noticed.
    sent[3] += 4e-6 * torch.randn(4096, generator=generator) * messages[3].abs().mean()
    messages, sent = messages.to(real_device), sent.to(real_device)
    compiled = torch.compile(lambda m: draco_ext.decode(m, CyclicCode(7, 2)).suspects, fullgraph=True)
    scales = torch.logspace(-1, 1, 40)
    seen = {tuple(compiled(messages + scale * (sent - messages)).tolist()) for scale in scales for _ in range(3)}
    assert len(seen) == 2


def test_export(real_device):
    class Decoder(torch.nn.Module):
        def forward(self, messages):
            return draco_ext.decode(messages, RepetitionCode(3, 1)).gradient

    messages = torch.randn(1, 20).to(real_device).repeat(3, 1)
    program = torch.export.export(Decoder(), (messages,))
    assert torch.equal(program.module()(messages), messages[0])


def test_concurrent_calls(device, simt):
    """Different codes from several threads at once."""
    failures = []

    def work(n, s):
        try:
            code = CyclicCode(n, s)
            messages = honest_messages(code, torch.randn(n, 3000))
            messages[1] *= -7
            for _ in range(3 if simt else 30):
                assert named(on(device, draco_ext.decode, messages, code).suspects) == {1}
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(n, s)) for n, s in [(3, 1), (7, 3), (9, 2), (15, 3)]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_build_info():
    info = draco_ext.build_info()
    assert info["instruction_set"] in ("baseline", "avx2", "avx512", "neon")
    assert set(info) == {"compiler", "instruction_set", "cuda", "cuda_architectures", "torch"}
    assert info["torch"][0].isdigit()


def usable_instruction_sets():
    flags = ""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            flags = file.read()
    sets = ["neon" if platform.machine() in ("aarch64", "arm64") else "baseline"]
    sets += ["avx2"] if " avx2 " in flags and " fma " in flags else []
    sets += ["avx512"] if all(f" avx512{part} " in flags for part in ("f", "bw", "dq", "vl")) else []
    return sets


@pytest.fixture(scope="module")
def other_instruction_sets(request, tmp_path_factory):
    """The exhaustive and the reference tests in a process for each instruction set, which is made to use it.

    All run at the same time: each of them on one core.
    """
    here = os.path.dirname(__file__)
    depend = (
        "every_bad_set or matches_reference or fused or sum or bit or half or missing or large_param or test_kernels"
    )
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", f"({depend}) and not cuda"]
    command += [os.path.join(here, name) for name in ("test_repetition.py", "test_cyclic.py")]
    command += [f"{here}/test_kernels.py::{name}" for name in DIGEST_TESTS]
    command += ["--long"] * request.config.getoption("--long")
    processes = {
        isa: subprocess.Popen(
            command,
            env={**os.environ, "DRACO_ISA": isa, "OMP_NUM_THREADS": "1"},
            cwd=tmp_path_factory.mktemp(isa),  # not the source tree, whose draco_ext may have no compiled module
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for isa in OTHER_INSTRUCTION_SETS
    }
    yield processes
    for process in processes.values():
        process.kill()


DIGEST_TESTS = [
    "test_digest",
    "test_digests_of_many_seeds",
    "test_digest_and_stats",
    "test_digest_and_stats_of_tiles_and_their_edges",
    "test_each_place_of_a_tile_counts",
    "test_stats_at_the_limits_of_a_dtype",
]
OTHER_INSTRUCTION_SETS = [
    isa
    for isa in usable_instruction_sets()
    if isa != draco_ext.build_info()["instruction_set"] and "DRACO_ISA" not in os.environ
]


@pytest.mark.parametrize("isa", OTHER_INSTRUCTION_SETS)
def test_every_instruction_set(isa, other_instruction_sets):
    output, _ = other_instruction_sets[isa].communicate(timeout=900)
    assert other_instruction_sets[isa].returncode == 0, output[-4000:]


STATS = """
import sys, torch
from draco_ext import ops
values = torch.randn(100_003, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
values[::1000] = torch.nan
dtypes = (torch.float32, torch.float16, torch.bfloat16)
torch.save([ops.digest_and_stats(values.to(dtype), 2)[1] for dtype in dtypes], sys.argv[1])
"""


def test_stats_have_the_same_bits_with_every_instruction_set(tmp_path):
    """Products are exact and the order of summation is fixed. Of float64 they are not: with and without FMA."""
    results = []
    for name in usable_instruction_sets():
        command = [sys.executable, "-c", STATS, str(tmp_path / name)]
        subprocess.run(command, env={**os.environ, "DRACO_ISA": name}, cwd=tmp_path, check=True)
        results.append(torch.load(tmp_path / name))
    first, *others = results
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def test_unknown_instruction_set_is_named(tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", "import draco_ext; print(draco_ext.build_info())"],
        env={**os.environ, "DRACO_ISA": "avx9"},
        cwd=tmp_path,  # not the source tree, whose draco_ext may have no compiled module
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode != 0
    assert "DRACO_ISA=avx9 cannot be used here" in run.stderr
    assert usable_instruction_sets()[0] in run.stderr


def every_call(messages, projections, norms):
    """Every op on these, as functions of one tensor."""
    ones, carry = torch.ones(9, dtype=torch.complex128), torch.zeros(50)
    return {
        "majority_vote": (lambda x: ops.majority_vote(x, (5, 4), 1)[0], messages),
        "majority_vote_out": (lambda x: ops.majority_vote(messages, (5, 4), 1, out=x)[0], torch.zeros(50)),
        "vector_mean_out": (lambda x: ops.vector_mean([messages[0], x]), messages[1]),
        "digest": (lambda x: ops.digest(x, 1), messages[0]),
        "digest_by_keys": (lambda x: ops.digest(x, torch.ones(1, dtype=torch.int64)), messages[0]),
        "digest_and_stats": (lambda x: ops.digest_and_stats(x, 1)[1], messages[0]),
        "digest_stats_and_scale_": (lambda x: ops.digest_stats_and_scale_(x, 1, 0.5)[1], messages[0]),
        "cyclic_encode": (lambda x: ops.cyclic_encode(x, 9, 1, 0), messages[:3]),
        "cyclic_encode_out": (lambda x: ops.cyclic_encode(messages[:3], 9, 1, 0, out=x), torch.zeros(50)),
        "cyclic_encode_add_": (lambda x: ops.cyclic_encode_add_(torch.zeros(50), carry, x, 9, 1, 0, 0), messages[0]),
        "cyclic_project": (lambda x: ops.cyclic_project(x, 1)[0], messages),
        "cyclic_project_by_key": (lambda x: ops.cyclic_project(x, torch.ones(1, dtype=torch.int64))[0], messages),
        "cyclic_locate": (lambda x: ops.cyclic_locate(projections, x, 2, 50)[0], norms),
        "cyclic_combine": (lambda x: ops.cyclic_combine(x, ones), messages),
        "cyclic_combine_out": (lambda x: ops.cyclic_combine(messages, ones, out=x), torch.zeros(50)),
        "cyclic_decode": (lambda x: ops.cyclic_decode(x, 2)[0], messages),
        "cyclic_decode_out": (lambda x: ops.cyclic_decode(messages, 2, out=x)[0], torch.zeros(50)),
    }


@pytest.mark.parametrize("name", NAMES)
def test_differentiation_is_refused(name):
    """Backward, forward and torch.func's: never a gradient or tangent of zeros."""
    messages = cyclic_messages(9, 2, 50)
    call, x = every_call(messages, *ops.cyclic_project(messages, 1))[name]
    with pytest.raises(ValueError, match="must not require grad"):
        call(x.clone().requires_grad_())
    with pytest.raises(ValueError, match="must not require grad"):
        torch.func.grad(lambda x: call(x).real.float().sum())(x)
    with pytest.raises(ValueError, match="must not have a forward-mode tangent"):
        torch.func.jvp(call, (x,), (torch.ones_like(x),))
    with torch.autograd.forward_ad.dual_level():
        call(x)  # what is not differentiated may be used
        with pytest.raises(ValueError, match="must not have a forward-mode tangent"):
            call(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))

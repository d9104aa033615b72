"""Every kernel against plain float64 torch, and the vote bit for bit against the CPU's.

Lengths around vectors, chunks and tiles; rows of any stride and alignment, between NaN that must not be read; results
in memory that was full of garbage, every element of them looked at, and twice the same bits. A `check_` function tries
one configuration and names it when it fails; the tests loop over configurations.
"""

import contextlib
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import attacked, honest_messages, lacking_for_cuda, named, on, with_cuda

import draco_ext
from draco_ext import CyclicCode, RepetitionCode, ops, reference

VOTE_DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
CYCLIC_DTYPES = [torch.float32, torch.float64]
LENGTHS = [0, 1, 2, 31, 32, 33, 127, 1023, 1025]
LONG = [32767, 32770, 65538, 131075]  # one tile and several, with four and two projections of each
EVERY_CODE = [RepetitionCode(9, 1), CyclicCode(9, 2)]

# The CPU's vote, taken now: where kernels compiled for the host are tested, the name stands for theirs later on.
VOTE_ON_CPU = torch.ops.draco_ext.majority_vote.default


@pytest.fixture(autouse=True)
def several_threads(request):
    """Have kernels divide columns among threads, also where this is one of several processes and has one."""
    before = torch.get_num_threads()
    if hasattr(request.config, "workerinput"):
        torch.set_num_threads(max(2, before))
    yield
    torch.set_num_threads(before)


def test_on_a_gpu():
    """Stands for all tests on a GPU where there is none."""
    if not with_cuda():
        pytest.skip(f"{lacking_for_cuda()}: no test on a GPU has run (FAIL_WITHOUT_CUDA=1 makes this a failure)")
    assert lacking_for_cuda() is None


# ----------------------------------------------------------------------------------------------------- helpers

LAYOUTS = ["contiguous", "odd stride", "off by one", "aligned", "every second row"]
GARBAGE = 0x5A  # a large finite number in every dtype, and in a bool neither False nor True


def laid_out(matrix, layout, device):
    """The matrix on the device, with NaN before, between and behind its rows."""
    n, d = matrix.shape
    offset, stride = {
        "contiguous": (0, d),
        "odd stride": (0, d + 1 + d % 2),
        "off by one": (1, d),
        "aligned": (0, d + 64 - d % 64),
        "every second row": (3, 2 * d),
    }[layout]
    buffer = torch.full((offset + n * stride + 1,), torch.nan, dtype=matrix.dtype, device=device)
    view = buffer.as_strided((n, d), (stride, 1), offset)
    view.copy_(matrix)
    return view


def mask_of(n, members, device):
    """(n,) bool, or None for no members: then half of what is tested has no mask at all."""
    mask = torch.zeros(n, dtype=torch.bool)
    mask[list(members)] = True
    return mask.to(device) if members else None


def raw(tensor):
    return tensor.contiguous().view(torch.uint8)


def results(function, *args, **kwargs):
    """What the function returns, as a list on the CPU."""
    returned = function(*args, **kwargs)
    return [value.cpu() for value in (returned if isinstance(returned, tuple) else (returned,))]


def assert_same(one, other):
    """That two lists of results agree in every bit."""
    for a, b in zip(one, other, strict=True):
        assert torch.equal(raw(a), raw(b)), "results differ"


def run(function, *args, **kwargs):
    """Results of the second of two equal calls, whose memory was left as garbage by the first: both must agree."""
    first = function(*args, **kwargs)
    first = list(first) if isinstance(first, tuple) else [first]
    kept = [value.to("cpu", copy=True) for value in first]
    while first:
        first.pop().view(torch.uint8).fill_(GARBAGE)
    second = results(function, *args, **kwargs)
    assert_same(kept, second)
    for value in second:
        assert value.dtype != torch.bool or (raw(value) <= 1).all(), "a bool is neither 0 nor 1"
    return second


def same_bits(a, b):
    """Equal to the last bit, -0 and +0 apart, except that a NaN may be any NaN."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return bool(((a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())).all())


@contextlib.contextmanager
def naming(where):
    """Puts the configuration in front of whatever goes wrong in it."""
    try:
        yield
    except Exception as error:
        raise AssertionError(f"{where}: {error}") from error


def every(step, cases):
    """Every step-th of the cases."""
    return itertools.islice(cases, 0, None, step)


def spread(n, count, first=0):
    """`count` of n workers, as far apart as can be."""
    return {(first + i * n // max(count, 1)) % n for i in range(count)}


# -------------------------------------------------------------------------------------------- repetition code

GROUPS = [
    (1,), (2,), (3,), (4,), (5,), (7,), (9,), (64,), (1, 1, 1), (4, 3), (3, 3, 3), (7, 5, 9), (9, 8, 7), (31, 33),
    (3,) * 21, (5, 4) * 7, (9,) * 7,
]  # fmt: skip
FATES = ["all come", "one of each group is missing", "a group is missing", "no majority"]


def flip_last_bit(message, column):
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[message.element_size()]
    message.view(integer)[column] ^= 1


def votes(sizes, d, dtype, fate, noise, generator):
    """Messages of groups in which as many members are bad as can be; who is missing, who is bad."""
    s = (min(sizes) - 1) // 2
    parts = torch.randn(len(sizes), d, generator=generator, dtype=torch.float64)
    messages = parts.repeat_interleave(torch.tensor(sizes), 0)
    if noise:
        messages *= 1 + noise * (torch.rand(messages.shape, generator=generator, dtype=torch.float64) - 0.5)
    messages = messages.to(dtype)
    if d > 31:
        smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        special = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, smallest, -3 * smallest])
        messages[:, 20:27] = special.to(dtype)
    missing, bad, first = set(), set(), 0
    for g, size in enumerate(sizes):
        members = list(range(first, first + size))
        first += size
        if fate == "a group is missing" and g == len(sizes) - 1:
            missing.update(members)
            continue
        if fate == "one of each group is missing" and size > 1:
            missing.add(members.pop(g % size))
        count = min(s, (len(members) - 1) // 2) + (fate == "no majority" and g == 0 and size > 1)
        for i in range(min(count, len(members))):
            j = members[(2 * i + g) % len(members)]
            bad.add(j)
            kind = 3 if fate == "no majority" else (i + g) % 5
            if kind == 4:
                messages[j] = torch.nan
            elif kind == 3 or d == 0:
                messages[j] = torch.randn(d, generator=generator).to(dtype) * 30
            else:  # the last bit of one element: the first, the last, the one in the middle
                flip_last_bit(messages[j], [0, d - 1, d // 2][kind])
    messages[list(missing)] = torch.nan  # must not be looked at
    return messages, missing, bad if d else set()


def check_vote(sizes, d, dtype, tolerant, fate, layout, mean, device, generator):
    n, s = sum(sizes), (min(sizes) - 1) // 2
    eps = torch.finfo(dtype).eps
    rtol, atol = (8 * eps, 1e-3 if mean else 0.0) if tolerant else (0.0, 0.0)
    messages, missing, bad = votes(sizes, d, dtype, fate, rtol / 4, generator)
    with naming(f"sizes={sizes} d={d} {dtype} atol={atol} rtol={rtol} '{fate}' '{layout}' mean={mean}"):
        gradient, suspects, failed = run(
            ops.majority_vote,
            laid_out(messages, layout, device),
            sizes,
            s,
            missing=mask_of(n, missing, device),
            atol=atol,
            rtol=rtol,
            mean=mean,
        )
        assert gradient.shape == (d,)
        assert gradient.dtype == dtype
        assert not named(suspects) & missing
        if fate == "a group is missing":
            assert failed
            assert gradient.isnan().all()
            assert named(suspects) <= bad
            return
        mask = mask_of(n, missing, "cpu")
        on_cpu = VOTE_ON_CPU(messages, mask, list(sizes), s, atol, rtol, mean)
        assert torch.equal(failed, on_cpu[2])
        assert torch.equal(suspects, on_cpu[1])
        assert same_bits(gradient, on_cpu[0])
        if n * d <= 70_000:
            truth, wrong, none = reference.majority_vote(
                messages, sizes, s, missing=mask, atol=atol, rtol=rtol, mean=mean
            )
            assert torch.equal(failed, none)
            bound = (2 + len(sizes)) * eps
            torch.testing.assert_close(gradient.double(), truth, rtol=bound, atol=2 * bound, equal_nan=True)
            # Without a majority there is no right winner to differ from.
            assert failed or torch.equal(suspects, wrong)
        if failed:
            assert gradient.isnan().all()
            assert fate == "no majority"
        elif not tolerant:  # otherwise a wrong last bit is tolerated
            assert fate != "no majority" or d == 0 or sizes[0] == 1
            assert named(suspects) == bad


@pytest.mark.parametrize("dtype", VOTE_DTYPES, ids=str)
@pytest.mark.parametrize("tolerant", [False, True], ids=["bitwise", "tolerant"])
def test_vote(tolerant, dtype, device, simt, long, generator):
    layouts, means = itertools.cycle(LAYOUTS), itertools.cycle([True, False, False])
    for sizes, d, fate in every(1 if long else 5, itertools.product(GROUPS, LENGTHS, FATES)):
        check_vote(sizes, d, dtype, tolerant, fate, next(layouts), next(means), device, generator)


@pytest.mark.parametrize("dtype", VOTE_DTYPES, ids=str)
@pytest.mark.parametrize("tolerant", [False, True], ids=["bitwise", "tolerant"])
def test_vote_over_many_columns(tolerant, dtype, device, simt, generator):
    layouts = itertools.cycle(LAYOUTS)
    for sizes, fate in [((3,), FATES[0]), ((4, 3), FATES[1]), ((5, 9), FATES[0]), ((7, 7), FATES[3])]:
        for d in (100_003,) if simt else (40_000, 100_003):
            check_vote(sizes, d, dtype, tolerant, fate, next(layouts), True, device, generator)
        if simt:
            break


@pytest.mark.parametrize("dtype", VOTE_DTYPES, ids=str)
def test_tolerance_includes_its_edge(dtype, device):
    for winner, near, options in [(1.0, (1.5, 0.5), {"atol": 0.5}), (-2.0, (-3.0, -1.0), {"rtol": 0.5})]:
        messages = torch.tensor([*near, winner, winner, winner, winner, near[0]]).to(dtype)[:, None].repeat(1, 40)
        for column in (0, 17, 39):
            sent = messages.clone()
            flip_last_bit(sent[6], column)  # the next number after the edge, away from the winner
            assert sent[6, column].abs() > abs(near[0])
            gradient, suspects, failed = run(ops.majority_vote, sent.to(device), (7,), 3, **options)
            assert (gradient == winner).all(), f"{options} {column}"
            assert named(suspects) == {6}, f"{options} {column}"
            assert not failed


# ------------------------------------------------------------------------------------------------ cyclic code

BOUND = {torch.float32: 1e-6, torch.float64: 1e-13}  # of a decoded mean, relative to what a mean of the parts is like


def random(*shape, generator, dtype=torch.float64):
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def code_words(n, s, gradients):
    """What n honest workers send, in float64: (n, L) for gradients (n, d)."""
    weights = torch.tensor(reference.cyclic_tables(n, s)[2])
    padded = torch.nn.functional.pad(gradients.double(), (0, gradients.size(1) % 2))
    return torch.view_as_real(weights @ torch.view_as_complex(padded.unflatten(1, (-1, 2)))).flatten(1)


def check_encode(n, s, worker, d, dtype, layout, device, generator):
    gradients = random(2 * s + 1, d, generator=generator, dtype=dtype)
    eps = torch.finfo(dtype).eps
    expected = reference.cyclic_encode(gradients, n, s, worker)
    with naming(f"n={n} s={s} worker={worker} d={d} {dtype} '{layout}'"):
        there = laid_out(gradients, layout, device)
        (message,) = run(ops.cyclic_encode, there, n, s, worker)
        assert message.shape == (d + d % 2,)
        assert message.dtype == dtype
        torch.testing.assert_close(message.double(), expected, rtol=0, atol=32 * eps)

        # In place, in the middle of other data, on top of what the message holds.
        guarded = random(2, d + d % 2 + 8, generator=generator, dtype=dtype)
        guarded[1] *= eps / 4
        offset = 1 if layout == "off by one" else 4
        inside = slice(offset, offset + d + d % 2)
        after, before = guarded.to(device), guarded.clone()
        message, carry = after[:, inside]
        parts = CyclicCode(n, s).assignment(worker)
        for part, gradient in zip(parts, there, strict=True):
            assert ops.cyclic_encode_add_(message, carry, gradient, n, s, worker, part) is message
        after = after.cpu()
        torch.testing.assert_close(after[0, inside].double(), before[0, inside] + expected, rtol=0, atol=32 * eps)
        assert (after[1, inside].abs() <= eps * after[0, inside].abs()).all()
        after[:, inside] = before[:, inside]
        assert torch.equal(after, before), "wrote beyond the message"

        # The first part replaces what is there.
        guarded[:] = torch.nan
        message, carry = guarded.to(device)[:, inside]
        for i, (part, gradient) in enumerate(zip(parts, there, strict=True)):
            ops.cyclic_encode_add_(message, carry, gradient, n, s, worker, part, first=i == 0)
        torch.testing.assert_close(message.cpu().double(), expected, rtol=0, atol=32 * eps)


ENCODERS = [(1, 0), (5, 0), (3, 1), (8, 3), (9, 4), (64, 5), (64, 31)]


@pytest.mark.parametrize("dtype", CYCLIC_DTYPES, ids=str)
def test_encode(dtype, device, simt, generator):
    layouts = itertools.cycle(LAYOUTS)
    cases = [(n, s, d) for (n, s), d in itertools.product(ENCODERS, LENGTHS)]
    cases += [(8, 3, 100_003)] if simt else [(n, s, d) for n, s in ((3, 1), (8, 3)) for d in LONG]
    for index, (n, s, d) in enumerate(cases):
        if not simt or index % 2 or d > 2000:
            check_encode(n, s, index % n, d, dtype, next(layouts), device, generator)


def check_project(n, length, dtype, gone, seed, layout, device, generator):
    messages = random(n, length, generator=generator, dtype=dtype)
    messages *= torch.logspace(-2, 2, n, dtype=torch.float64)[:, None].to(dtype)  # every row on a scale of its own
    messages[list(gone)] = torch.nan  # must not be read
    eps = torch.finfo(dtype).eps
    with naming(f"n={n} length={length} {dtype} missing={gone} seed={seed} '{layout}'"):
        projections, norms = run(
            ops.cyclic_project, laid_out(messages, layout, device), seed, missing=mask_of(n, gone, device)
        )
        assert projections.shape == (n, *ops.projections_shape(length))
        expected, expected_norms = reference.cyclic_project(messages, seed, missing=mask_of(n, gone, "cpu"))
        assert (projections[list(gone)] == 0).all()
        assert (norms[list(gone)] == 0).all()
        torch.testing.assert_close(norms, expected_norms, rtol=32 * eps, atol=0)
        missed = (projections - expected).abs() / expected_norms[:, :, None].clamp(min=1e-300)
        assert (missed <= 8 * eps).all(), f"projections are off by {missed.max() / eps} of the rounding of their tile"


EVEN_LENGTHS = [0, 2, 30, 32, 34, 126, 1022, 1024, 1026, 2050]
SEEDS = [0, -1, 2**62 + 12345]


@pytest.mark.parametrize("dtype", CYCLIC_DTYPES, ids=str)
def test_project(dtype, device, simt, generator):
    layouts, seeds = itertools.cycle(LAYOUTS), itertools.cycle(SEEDS)
    cases = list(every(2 if simt else 1, itertools.product((1, 2, 3, 5, 8, 33, 64), EVEN_LENGTHS)))
    cases += [(5, 32768), (3, 32770), (2, 131_074)]
    cases += [] if simt else [(9, 32768), (9, 32770), (33, 65536), (7, 65538), (11, 131_074)]
    for index, (n, length) in enumerate(cases):
        gone = [set(), {n - 1}, {0, n // 2}][index % 3]
        check_project(n, length, dtype, gone, next(seeds), next(layouts), device, generator)


def check_combine(n, length, columns, dtype, which, layout, device, generator):
    messages = random(n, columns, generator=generator, dtype=dtype)
    weights = torch.randn(n, generator=generator, dtype=torch.complex128)
    if which == "real":
        weights.imag = 0
    elif which == "imaginary":
        weights.real = 0
    elif which == "some are 0":
        weights[torch.arange(n) % 3 == 0] = 0
    elif which == "all are 0":
        weights[:] = 0
    messages[weights == 0] = torch.nan  # must not be read
    expected = reference.cyclic_combine(messages, weights, length=length)
    with naming(f"n={n} length={length} of {columns} {dtype} weights: {which} '{layout}'"):
        there = laid_out(messages, layout, device)
        (out,) = run(ops.cyclic_combine, there, weights.to(device), length=length)
        assert out.shape == (length,)
        torch.testing.assert_close(out.double(), expected, rtol=0, atol=8 * n * torch.finfo(dtype).eps)
        undefined = torch.full((n,), torch.nan, dtype=torch.complex128, device=device)
        assert ops.cyclic_combine(there, undefined, length=length).isnan().all()


@pytest.mark.parametrize("dtype", CYCLIC_DTYPES, ids=str)
def test_combine(dtype, device, simt, generator):
    layouts = itertools.cycle(LAYOUTS)
    kinds = itertools.cycle(["complex", "some are 0", "real", "imaginary", "some are 0", "all are 0"])
    sizes = itertools.product((1, 2, 3, 4, 5, 8, 33, 64), LENGTHS)
    for n, length in itertools.chain(every(2 if simt else 1, sizes), [(5, 32770), (2, 140_003)]):
        check_combine(n, length, length + length % 2, dtype, next(kinds), next(layouts), device, generator)


def check_weights(weights, n, s, erased, factor):
    """That these decode: 0 on the erased, from every part factor times its gradient, and no larger than need be."""
    expected = reference.decoding_weights(n, s, erased)
    b = weights.numpy() / factor
    size = np.linalg.norm(b)
    assert (b[list(erased)] == 0).all()
    assert np.abs(b @ reference.cyclic_tables(n, s)[2] - 1).max() <= 1e-13 * size * n
    assert size <= 1.001 * np.linalg.norm(expected)
    if len(erased) * 4 <= n:  # and well conditioned
        np.testing.assert_allclose(b, expected, rtol=0, atol=1e-10 * size)


def check_locate(n, s, length, dtype, bad, gone, device, generator, *, nonfinite=0, mean=True):
    """Projections of code words, drawn themselves; the workers in `bad` have others, the first of them not finite."""
    tiles, k = ops.projections_shape(length)
    gradients = random(n, 2 * tiles * k, generator=generator)
    projections = torch.view_as_complex(code_words(n, s, gradients).unflatten(1, (tiles, k, 2)))
    for i, j in enumerate(sorted(bad)):
        projections[j] += 10.0 ** (i % 5 - 1) * torch.randn(tiles, k, generator=generator, dtype=torch.complex128)
    projections[list(gone)] = 0
    norms = projections.abs().square().mean(2).sqrt()
    for i, j in enumerate(sorted(bad)[:nonfinite]):
        if i % 4 == 0:
            projections[j, tiles // 2, k - 1] = torch.nan
        elif i % 4 == 1:
            projections[j, tiles - 1, 0] = complex(0, -torch.inf)
        else:
            norms[j, tiles - 1] = [torch.inf, torch.nan][i % 4 - 2]
    where = f"n={n} s={s} length={length} {dtype} bad={bad} of them {nonfinite} not finite missing={gone} mean={mean}"
    with naming(where):
        weights, suspects, failed = run(
            ops.cyclic_locate,
            projections.to(device),
            norms.to(device),
            s,
            length,
            missing=mask_of(n, gone, device),
            dtype=dtype,
            mean=mean,
        )
        if 2 * nonfinite + len(gone) > 2 * s and len(gone) <= 2 * s:  # the gradient itself has overflowed
            assert not failed
            assert not suspects.any()
            assert weights.real.isnan().all()
            return
        if len(bad) > s or len(gone) > 2 * s:
            assert failed
            assert not suspects.any()
            assert weights.real.isnan().all()
            if n <= 9 and not nonfinite:
                noise = norms.amax(0) * 1e-7
                assert reference.cyclic_locate(projections, s, noise, missing=mask_of(n, gone, "cpu")) is None
            return
        assert not failed
        assert named(suspects) == bad
        if n <= 9 and not nonfinite:
            noise = norms.sort(0, descending=True).values[len(bad)] * 1e-7
            assert reference.cyclic_locate(projections, s, noise, missing=mask_of(n, gone, "cpu")) == bad
        check_weights(weights, n, s, bad | gone, 1 / n if mean else 1.0)


LOCATORS = [(1, 0), (6, 0), (3, 1), (5, 2), (8, 3), (9, 4), (16, 3), (45, 5), (64, 5), (64, 31)]


@pytest.mark.parametrize("dtype", CYCLIC_DTYPES, ids=str)
def test_locate(dtype, device, simt, long, generator):
    """From (bad, of them not finite, missing) = (0, 0, 0) to more than can be told."""
    means, step = itertools.cycle([True, False, True]), 4 if simt else 1 if long else 2
    for (n, s), length in itertools.product(LOCATORS, (200, 32770, 140_003)):
        cases = {(0, 0, 0), (0, 0, 1), (0, 0, 2 * s), (0, 0, 2 * s + 1)}
        cases |= (
            {(1, 0, 0), (1, 0, 2 * s - 2), (1, 1, 0), (s, 0, 0), (s, 1, 0), (s - 1, 0, 2), (s, s, 0)} if s else set()
        )
        cases |= {(s + 1, 0, 0), (s + 1, s + 1, 0), (s + 1, 1, 0)}
        for index, (bad, nonfinite, missing) in enumerate(sorted(cases)):
            hopeless = bad > s and nonfinite <= s  # then all of the search is gone through
            if missing > n or bad > n or (length + index + n) % step or (hopeless and n > 9 and length > 200):
                continue
            if hopeless and (s == 0 or (simt and n > 9)):
                continue  # nothing shows without redundancy
            gone = spread(n, missing)
            wrong = set(sorted(set(range(n)) - gone)[index % 2 :: 2][:bad])
            if len(wrong) < bad:
                wrong = set(sorted(set(range(n)) - gone)[:bad])
            check_locate(n, s, length, dtype, wrong, gone, device, generator, nonfinite=nonfinite, mean=next(means))


@pytest.mark.parametrize("tolerance", ["atol", "rtol"])
def test_locate_tolerates(tolerance, device, generator):
    n, s, length = 7, 2, 4096
    messages = code_words(n, s, random(n, length, generator=generator))
    messages += 1e-4 * random(n, length, generator=generator)
    messages[5] += 1.0 * random(length, generator=generator)
    projections, norms = reference.cyclic_project(messages.float(), 1)
    for value, expected in ((1e-3, {5}), (1.0, set())):
        weights, suspects, failed = run(
            ops.cyclic_locate, projections.to(device), norms.to(device), s, length, **{tolerance: value}
        )
        assert not failed
        assert named(suspects) == expected
        check_weights(weights, n, s, expected, 1 / n)
    assert run(ops.cyclic_locate, projections.to(device), norms.to(device), s, length)[2]


DECODE_SCENES = [
    "clean", "bad", "missing", "bad and missing", "expected", "expected wrongly", "too many expected",
    "expected and missing", "overflow", "failed", "too many missing",
]  # fmt: skip


def check_decode(n, s, d, dtype, scene, layout, mean, seed, device, generator):
    gradients = random(n, d, generator=generator, dtype=dtype)
    messages = code_words(n, s, gradients).to(dtype)
    bad, gone, likely = set(), set(), set()
    if scene in ("bad", "expected", "expected wrongly", "too many expected"):
        bad = spread(n, s, 1)
    if scene == "bad and missing":
        gone, bad = spread(n, 2 * s - 2 * (s // 2)), spread(n, s // 2, 1)
        bad = set(sorted(set(range(n)) - gone)[:: max(2, n // 4)][: s // 2])
    if scene == "expected and missing":
        gone, likely = spread(n, s), spread(n, s, 1)
    if scene in ("missing", "too many missing"):
        gone = spread(n, 2 * s + (scene == "too many missing"))
    if scene == "expected":
        likely = bad
    if scene == "expected wrongly":
        likely = spread(n, s, 2) | set(sorted(bad)[:1])
    if scene == "too many expected":
        likely = set(range(min(n, 2 * s + 1)))
    broken = set(range(s + 1)) if scene in ("overflow", "failed") else set()
    for i, j in enumerate(sorted(bad | (broken if scene == "failed" else set()))):
        messages[j] += 10.0 ** (i % 3) * (2 + random(messages.size(1), generator=generator, dtype=dtype))
    if scene == "overflow" and d:
        for i, j in enumerate(sorted(broken)):
            messages[j, [0, d - 1, d // 2][i % 3]] = [torch.nan, torch.inf][i % 2]
    messages[list(gone)] = torch.nan  # must not be read
    where = f"n={n} s={s} d={d} {dtype} '{scene}' '{layout}' mean={mean} seed={seed}"
    with naming(where):
        there = laid_out(messages, layout, device)
        options = {
            "missing": mask_of(n, gone, device),
            "expected": mask_of(n, likely, device),
            "length": d,
            "mean": mean,
            "seed": seed,
        }
        # Twice the same bits: also with a fresh seed, which must not show in the gradient.
        gradient, suspects, failed, left_out = run(ops.cyclic_decode, there, s, **options)
        assert gradient.shape == (d,)
        assert gradient.dtype == dtype
        assert named(left_out) == named(suspects)  # errors far above the noise
        if scene == "too many missing" or (scene == "failed" and d > 0):
            assert failed
            assert not suspects.any()
            assert gradient.isnan().all()
            return
        assert not failed
        if scene == "overflow" and d > 0:
            assert not suspects.any()
            assert gradient.isnan().all()
            return
        assert named(suspects) == (bad if d else set())
        truth = gradients.double().mean(0) if mean else gradients.double().sum(0)
        size = gradients.double().norm() / (n if mean else 1)
        left_out = bad | gone | (likely if len(likely | gone) <= 2 * s else set())
        amplified = np.linalg.norm(reference.decoding_weights(n, s, left_out)) / np.sqrt(n)
        error = (gradient.double() - truth).norm()
        assert error <= BOUND[dtype] * size * max(1.0, amplified), f"error {error / size}"


DECODERS = [(1, 0), (5, 0), (3, 1), (4, 1), (7, 2), (8, 3), (9, 4), (15, 3), (33, 4), (64, 5)]


@pytest.mark.parametrize("dtype", CYCLIC_DTYPES, ids=str)
def test_decode(dtype, device, simt, long, generator):
    layouts, means = itertools.cycle(LAYOUTS), itertools.cycle([True, True, False])
    seeds = itertools.cycle([None, *SEEDS])
    cases = [(n, s, d, scene) for (n, s), d, scene in itertools.product(DECODERS, LENGTHS, DECODE_SCENES)]
    cases = list(every(16 if simt else 1 if long else 3, cases))
    wide = [(n, s, d, scene) for (n, s), d, scene in itertools.product([(3, 1), (7, 2), (15, 3)], LONG, DECODE_SCENES)]
    cases += every(13 if simt else 1 if long else 3, wide)
    for n, s, d, scene in cases:
        if scene == "failed" and (s == 0 or (n > 9 and d != 33)):
            continue  # without redundancy nothing shows; and with many workers all of the search takes long
        if scene == "too many missing" and 2 * s + 1 > n:
            continue
        check_decode(n, s, d, dtype, scene, next(layouts), next(means), next(seeds), device, generator)


def test_decode_where_squares_overflow(device, generator):
    """Finite, but its square is not: one message, then all of them."""
    messages = code_words(7, 2, random(7, 50, generator=generator))
    truth = messages.sum(0) / 7
    messages[3] *= 1e90
    for scale in (1.0, 1e200):
        gradient, suspects, failed, _ = run(ops.cyclic_decode, (scale * messages).to(device), 2, seed=1)
        assert named(suspects) == {3}
        assert not failed
        torch.testing.assert_close(gradient / scale, truth, rtol=1e-12, atol=1e-13)


# --------------------------------------------------------------------------------------------------- vector mean


def check_vector_mean(count, d, dtype, offset, seed, device):
    """Vectors that lie apart, some of them not aligned; the mean beside them, and in the place of each of them."""
    generator = torch.Generator().manual_seed(seed)
    matrix = random(count, d, generator=generator).to(dtype)
    matrix[:, : d // 8] *= torch.tensor([1.0, -0.0, torch.inf, torch.nan]).repeat(count)[:count, None].to(dtype)
    vectors = [
        torch.full((d + 2 * offset,), torch.nan, dtype=dtype, device=device)[offset * (i % 2) :][:d]
        for i in range(count)
    ]
    for vector, row in zip(vectors, matrix, strict=True):
        vector.copy_(row)
    with naming(f"vector_mean of {count}, d={d} {dtype} offset={offset} seed={seed}"):
        (mean,) = run(ops.vector_mean, vectors)
        assert same_bits(mean, VOTE_ON_CPU(matrix, None, [1] * count, 0, 0.0, 0.0, True)[0])
        exact = reference.vector_mean(list(matrix))
        finite = exact.isfinite()
        assert torch.equal(mean.isnan(), exact.isnan())
        limits = torch.finfo(torch.float32 if dtype.itemsize < 8 else dtype)
        bound = (count * limits.eps * matrix.double().abs().sum(0) + torch.finfo(dtype).eps * exact.abs())[finite]
        assert ((mean.double() - exact)[finite].abs() <= bound).all()
        for i in {0, count // 2, count - 1}:
            before = vectors[i].clone()
            assert ops.vector_mean(vectors, out=vectors[i]) is vectors[i]
            assert torch.equal(raw(vectors[i].cpu()), raw(mean))
            vectors[i].copy_(before)
        assert all(torch.equal(raw(vector.cpu()), raw(row)) for vector, row in zip(vectors, matrix, strict=True))


@pytest.mark.parametrize("dtype", VOTE_DTYPES, ids=str)
def test_vector_mean(dtype, device, simt):
    seeds = itertools.count()
    for count, d, offset in itertools.product((1, 2, 3, 7, 21), (*LENGTHS, *LONG[1:3]), (0, 1)):
        if not (simt and d > 2000):
            check_vector_mean(count, d, dtype, offset, next(seeds), device)
    for count in (255, 256, 257, 600):  # addresses go to a GPU 256 at a time
        check_vector_mean(count, 65, dtype, 1, next(seeds), device)


# ------------------------------------------------------------------------------------------------------- digest


def check_digest(d, dtype, offset, seed, device, generator):
    values = torch.randint(0, 256, (d * dtype.itemsize,), dtype=torch.uint8, generator=generator).view(dtype)
    buffer = torch.full((d + offset + 64,), 99, dtype=dtype, device=device)
    row = buffer[offset : offset + d]
    row.copy_(values)
    with naming(f"digest d={d} {dtype} offset={offset} seed={seed}"):
        first, again = (on(device, ops.digest, row, seed) for _ in range(2))
        assert torch.equal(first, again)
        assert torch.equal(first, reference.digest(values, seed))
        seeds = [seed, 5, seed][: d % 4]
        assert torch.equal(on(device, ops.digest, row, seeds), reference.digest(values, seeds))


@pytest.mark.parametrize("dtype", ops.DIGEST_DTYPES, ids=str)
def test_digest(dtype, device, generator):
    seeds = itertools.cycle([0, 1, -1, 2**63 - 1, -(2**63), 20180327])
    for d in (*LENGTHS, 3, 4, 5, 7, 8, 9, 127, 128, 129, 2049, 16383, 16384, 16385, LONG[-1]):
        for offset in (0, 1):
            check_digest(d, dtype, offset, next(seeds), device, generator)


def test_digests_of_many_seeds(device, generator):
    """More than a launch of the CUDA kernel takes, in more than one block, in any kind of sequence."""
    values = torch.rand(2 * 16384 + 100, generator=generator)
    seeds = [(-1) ** i * (2**63 - 1 - i) for i in range(19)]
    wanted = reference.digest(values, seeds)
    for kind in (list, tuple):
        assert torch.equal(on(device, ops.digest, values, kind(seeds)), wanted)
    assert len(set(map(tuple, wanted.tolist()))) == len(seeds)


@pytest.mark.parametrize("length", [0, 5, 70_001])
def test_seeds_that_the_host_need_not_know(length, device, generator):
    """They lie on the device, and give what the same numbers on the host do."""
    values = torch.randn(length, generator=generator)
    numbers = torch.randint(-(2**62), 2**62, (19,), generator=generator)
    expected = ops.digest(values, numbers.tolist())
    assert torch.equal(on(device, ops.digest, values, numbers), expected)
    assert on(device, ops.digest, values, numbers[:0]).shape == (0, 2)
    messages = torch.randn(5, length + length % 2, generator=generator)
    of_numbers = on(device, ops.cyclic_project, messages, int(numbers[0]))
    for there, expected in zip(on(device, ops.cyclic_project, messages, numbers[:1]), of_numbers, strict=True):
        assert torch.equal(there, expected)


def test_digest_tells_all_bits_places_and_lengths(generator):
    """Flipped bits, exchanged values, chunks and blocks, more zeros, another seed: never the same digest."""
    values = torch.randint(1, 2**31 - 1, (9000,), dtype=torch.int32, generator=generator)
    words = values.view(torch.float32)
    variants = [values]
    for bit in range(32):
        flip = 1 << bit if bit < 31 else -(2**31)
        for places in ((0,), (1,), (4095,), (4096,), (8999,), (0, 512), (0, 3584), (7, 7 + 4096)):
            variants.append(values.clone())
            variants[-1][list(places)] ^= flip
    line, group, row = 16, 128, 2048
    # XORs of rows, of columns, and of both stay as they were.
    for places in (
        (0, line),
        (3 * line, 7 * line),
        (0, row),
        (group, group + 3 * row),
        (0, line, row, row + line),
        (5 + line, 5 + 7 * line, 5 + line + 3 * row, 5 + 7 * line + 3 * row),
    ):
        variants.append(values.clone())
        variants[-1][list(places)] ^= 12345
    for i, j, count in (
        *((0, 1, 1), (0, 2, 1), (0, line, 1), (0, line, line), (0, group, group), (0, row, 1), (0, row, row)),
        *((0, row + group, group), (line, row, line), (0, 4096, 4096)),
    ):
        variants.append(values.clone())
        variants[-1][i : i + count], variants[-1][j : j + count] = values[j : j + count], values[i : i + count]
    zeros = torch.zeros(9000, dtype=torch.int32)
    variants += [zeros[:count] for count in (0, 1, 2, 3, 4, 5, 4095, 4096, 4097, 9000)]
    variants += [torch.cat([values, zeros[:1]]), values[:-1]]
    seen = {tuple(ops.digest(variant.view(torch.float32), 7).tolist()) for variant in variants}
    assert len(seen) == len(variants)
    assert len({tuple(ops.digest(words, seed).tolist()) for seed in range(20)}) == 20


def test_digest_bits_are_uniform():
    """Every bit of the digests of near vectors is set about half of the time."""
    count = 400
    digests = torch.stack([ops.digest(torch.full((3,), float(i)), 5) for i in range(count)])
    share = torch.stack([(digests >> bit & 1).double().mean(0) for bit in range(64)])
    assert ((share - 0.5).abs() < 6 * 0.5 / count**0.5).all()


# ------------------------------------------------------------------------------------- digest and statistics

VALUE_SCENES = ["ordinary", "any bits", "special", "all zero", "none finite"]


def scene_values(d, dtype, scene, generator):
    if scene == "any bits":  # NaN of every kind; of float64 numbers whose squares overflow
        return torch.randint(0, 256, (d * dtype.itemsize,), dtype=torch.uint8, generator=generator).view(dtype)
    values = random(d, generator=generator).to(dtype)
    limits = torch.finfo(dtype)
    special = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, limits.tiny, -limits.tiny / 2, limits.smallest_normal]
    some = {"ordinary": [], "special": special, "all zero": [0.0, -0.0], "none finite": special[2:5]}[scene]
    if some:
        chosen = torch.tensor(some, dtype=torch.float64).to(dtype)[torch.randint(len(some), (d,), generator=generator)]
        rare = torch.rand(d, generator=generator) < (0.01 if scene == "special" else 2)
        values = torch.where(rare, chosen, values)
    return values


def check_digest_and_stats(d, dtype, offset, scene, seed, device, generator):
    values = scene_values(d, dtype, scene, generator)
    buffer = torch.full((d + offset + 64,), torch.nan, dtype=dtype, device=device)
    row = buffer[offset : offset + d]
    row.copy_(values)
    with naming(f"digest_and_stats d={d} {dtype} offset={offset} {scene}"):
        digest, stats = run(ops.digest_and_stats, row, seed)
        wanted_digest, wanted = reference.digest_and_stats(values, seed)
        assert torch.equal(digest, wanted_digest)
        assert torch.equal(digest, on(device, ops.digest, row, seed))
        torch.testing.assert_close(stats[:, 0], wanted[:, 0], rtol=1e-13 * max(1, d) ** 0.5, atol=1e-300)
        assert torch.equal(stats[:, 1:], wanted[:, 1:])
        check_scaled(buffer, row, (digest, stats), seed, next(FACTORS), device)


FACTORS = itertools.cycle([1 / 3, -1.0, 0.0, 1 / 8, 1e-30, 1e30])


def check_scaled(buffer, row, wanted, seed, factor, device):
    """Products are those of torch, to the last bit but for the bits of a NaN; nothing beside the row is written."""
    before, scaled = buffer.clone(), buffer.clone().copy_(buffer)
    before[row.storage_offset() : row.storage_offset() + len(row)].mul_(factor)
    own = scaled[row.storage_offset() : row.storage_offset() + len(row)]
    found = on(device, ops.digest_stats_and_scale_, own, seed, factor)
    for got, of_values in zip(found, wanted, strict=True):
        assert torch.equal(got, of_values)
    if row.dtype.itemsize > 2:
        assert torch.equal(scaled.view(torch.uint8), before.view(torch.uint8))
    else:
        numbers = ~before.isnan()
        assert torch.equal(scaled.isnan(), ~numbers)
        assert torch.equal(scaled[numbers].view(torch.uint8), before[numbers].view(torch.uint8))


@pytest.mark.parametrize("dtype", VOTE_DTYPES, ids=str)
def test_digest_and_stats(dtype, device, generator):
    lengths = (*LENGTHS, 3, 7, 8, 2047, 2048, 4095, 4096, 4097, 8193)
    for (d, offset), scene in zip(itertools.product(lengths, (0, 1)), itertools.cycle(VALUE_SCENES)):
        check_digest_and_stats(d, dtype, offset, scene, 7, device, generator)


@pytest.mark.parametrize("dtype", VOTE_DTYPES, ids=str)
def test_digest_and_stats_of_tiles_and_their_edges(dtype, device, simt, generator):
    scenes = itertools.cycle(VALUE_SCENES)
    for d in (ops.TILE, ops.TILE + 1, 2 * ops.TILE + 5) if simt else (ops.TILE - 1, *LONG, ops.TILE, ops.TILE + 1):
        for offset in (0,) if simt else (0, 1, 3):
            check_digest_and_stats(d, dtype, offset, next(scenes), -1, device, generator)


@pytest.mark.parametrize("dtype", VOTE_DTYPES, ids=str)
def test_each_place_of_a_tile_counts(dtype, device, simt):
    """One value in a vector of zeros, at both ends of lines, chunks and blocks: exact sums, and the row of its tile."""
    d = ops.TILE + 4099
    edges = {k * size + i for size in (8, 16, 32, 512, 1024, 4096, ops.TILE) for k in (0, 1, 3) for i in (-1, 0, 1)}
    for place in sorted(edge % d for edge in edges)[:: 7 if simt else 1]:
        for value, row in ((-3.0, [9, 3, 0]), (torch.nan, [0, 0, 1]), (-torch.inf, [0, 0, 1])):
            values = torch.zeros(d, dtype=dtype)
            values[place] = value
            wanted = torch.tensor([[0.0, 0, 0, ops.TILE], [0, 0, 0, 4099]], dtype=torch.float64)
            wanted[place // ops.TILE] += torch.tensor([*row, -1.0], dtype=torch.float64)
            assert torch.equal(on(device, ops.digest_and_stats, values, 1)[1], wanted), f"{value} at {place}"


@pytest.mark.parametrize("dtype", VOTE_DTYPES, ids=str)
def test_stats_at_the_limits_of_a_dtype(dtype, device):
    """The largest and the smallest numbers: their squares overflow or vanish for float64 alone."""
    limits = torch.finfo(dtype)
    tiniest = torch.tensor([1], dtype={2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]).view(dtype)
    for value in (limits.max, limits.min, limits.tiny, tiniest.item()):
        values = torch.full((40,), value, dtype=dtype)
        ((square, *others),) = on(device, ops.digest_and_stats, values, 1)[1].tolist()
        assert others == [abs(value), 0, 0]
        assert math.isclose(square, 40 * (value * value), rel_tol=1e-14)


# --------------------------------------------------------------------------------------------------- both codes


@pytest.mark.sanitizer
def test_every_kernel_once(device, generator):
    """Few configurations of every kernel, among them those that end within a vector, a chunk and a tile."""
    for dtype, layout, d in zip(VOTE_DTYPES, LAYOUTS[:4], (33, 127, 1025, 31), strict=True):
        for tolerant, (sizes, fate) in itertools.product((False, True), zip([(3, 4), (9,)], FATES[:2], strict=True)):
            check_vote(sizes, d, dtype, tolerant, fate, layout, True, device, generator)
    for dtype, count in zip(VOTE_DTYPES, (2, 3, 257, 1), strict=True):
        check_vector_mean(count, 1029, dtype, 1, count, device)
    for d, offset in ((33, 0), (4097, 1)):
        check_digest(d, torch.float32, offset, 3, device, generator)
    for dtype, d, scene in zip(VOTE_DTYPES, (33, 4097, 32770, 1025), VALUE_SCENES[1:], strict=True):
        check_digest_and_stats(d, dtype, 1, scene, 3, device, generator)
    for dtype, layout, d in zip(CYCLIC_DTYPES, ("off by one", "odd stride"), (1025, 33), strict=True):
        check_encode(8, 3, 1, d, dtype, layout, device, generator)
        check_project(5, d + 1, dtype, {1}, 3, layout, device, generator)
        check_project(3, 32770, dtype, set(), 3, layout, device, generator)
        check_combine(5, d, d + 1, dtype, "some are 0", layout, device, generator)
        check_locate(8, 3, 200, dtype, {1, 4}, {2}, device, generator)
        for scene in ("clean", "bad", "expected and missing"):
            check_decode(7, 2, d, dtype, scene, layout, True, 3, device, generator)
        check_decode(3, 1, 32769, dtype, "bad", layout, True, 3, device, generator)


def test_rows_of_any_stride(device, generator):
    """Stride 0, rows that overlap, a column of a matrix: what counts is that each row is contiguous."""
    row = random(1, 1026, generator=generator).to(device)
    column = random(6, 2, generator=generator).to(device)
    weights = torch.randn(6, generator=generator, dtype=torch.complex128).to(device)
    long = [row.expand(6, 1026), row[0].unfold(0, 500, 2)[:6]]
    short = [column[:, 1:], column.T.contiguous().T[:, 1:]]
    calls = {
        "vote": lambda m: ops.majority_vote(m, (6,), 0),
        "encode": lambda m: ops.cyclic_encode(m[:3], 6, 1, 0),
        "project": lambda m: ops.cyclic_project(m, 1),
        "combine": lambda m: ops.cyclic_combine(m, weights),
        "decode": lambda m: ops.cyclic_decode(m, 1, seed=1),
    }
    for name, call in calls.items():
        for matrix in long + (short if name in ("vote", "encode") else []):
            with naming(f"{name} with strides {matrix.stride()}"):
                assert_same(run(call, matrix), run(call, matrix.clone(memory_format=torch.contiguous_format)))


def test_many_blocks_give_the_same_bits_again(device, simt, generator):
    n, d = 33, 5000 if simt else 300_000
    messages = random(n, d, generator=generator, dtype=torch.float32).to(device)
    messages[4] *= 1e3
    for call in (
        lambda: ops.cyclic_project(messages, 7),
        lambda: ops.cyclic_decode(messages, 4, seed=7),
        lambda: ops.majority_vote(messages[:1].repeat(n, 1), (3,) * 11, 1),
        lambda: ops.digest_and_stats(messages.flatten(), 7),
    ):
        first = results(call)
        for _ in range(1 if simt else 5):
            assert_same(first, results(call))


# ------------------------------------------------------------------------------------------------- CUDA alone


def sent_to(code, bad, generator, d=5000):
    """Messages in which the workers in `bad` lie, and the honest gradient."""
    gradients = torch.randn(code.parts, d, generator=generator)
    messages = honest_messages(code, gradients)
    return attacked(messages, bad, "gaussian", generator), gradients.mean(0)


def assert_decoded(out, bad, truth):
    assert named(out.suspects) == set(bad)
    assert not out.failed
    torch.testing.assert_close(out.gradient.cpu(), truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize("code", EVERY_CODE, ids=repr)
def test_streams(code, cuda, generator):
    """On a stream of its own, whose data come late: every kernel must be in line behind them."""
    sent, truth = sent_to(code, (2,), generator)
    ready = sent.to(cuda)
    missing = torch.zeros(code.workers, dtype=torch.bool, device=cuda)
    missing[7] = True
    draco_ext.decode(ready, code, missing=missing)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        late, gone = torch.full_like(ready, torch.nan), torch.ones_like(missing)
        torch.cuda._sleep(200_000_000)
        late.copy_(ready)
        gone.copy_(missing)
        out = draco_ext.decode(late, code, missing=gone)
    stream.synchronize()
    assert_decoded(out, (2,), truth)


@pytest.mark.parametrize("code", EVERY_CODE, ids=repr)
def test_second_gpu(code, cuda, generator):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    sent, truth = sent_to(code, (2,), generator)
    other = torch.device("cuda", (cuda.index + 1) % torch.cuda.device_count())
    out = draco_ext.decode(sent.to(other), code)
    assert out.gradient.device == out.suspects.device == out.failed.device == other
    assert torch.cuda.current_device() == cuda.index
    assert_decoded(out, (2,), truth)


@pytest.mark.parametrize("code", EVERY_CODE, ids=repr)
def test_graph(code, cuda, generator):
    """Captured once, replayed on other messages and other masks."""
    d = 40_000
    static = torch.zeros(code.workers, d, device=cuda)
    missing, expected = (torch.zeros(code.workers, dtype=torch.bool, device=cuda) for _ in range(2))
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            draco_ext.decode(static, code, missing=missing, expected=expected)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = draco_ext.decode(static, code, missing=missing, expected=expected)
    for bad, gone, likely in [((), (), ()), ((1,), (), ()), ((), (), ()), ((8,), (4,), ()), ((5,), (), (5, 6))]:
        with naming(f"bad={bad} missing={gone} expected={likely}"):
            sent, truth = sent_to(code, bad, generator, d)
            sent[list(gone)] = torch.nan
            static.copy_(sent)
            for mask, members in ((missing, gone), (expected, likely)):
                mask.zero_()
                mask[list(members)] = True
            graph.replay()
            assert_decoded(out, bad, truth)
    static[:, 5] = torch.nan
    missing.zero_()
    missing[:7] = True
    graph.replay()
    assert out.failed
    assert out.gradient.isnan().all()


def test_host_is_never_waited_for(cuda, generator):
    """While the GPU is busy with something else, every op returns; torch's own check of synchronisation agrees."""
    n, s = 9, 2
    both = {code: sent_to(code, (3,), generator)[0].to(cuda) for code in EVERY_CODE}
    messages = both[EVERY_CODE[1]]
    missing = mask_of(n, {4}, cuda)
    message, carry, gradient = (torch.full((5000,), x, device=cuda) for x in (0.0, 0.0, 1.0))

    def everything():
        for code, sent in both.items():
            for length in (5000, 64):
                yield draco_ext.decode(sent[:, :length], code)
                yield draco_ext.decode(sent[:, :length], code, missing=missing, expected=missing, rtol=1e-6)
        yield ops.cyclic_encode(messages[:5], n, s, 0)
        yield ops.cyclic_encode_add_(message, carry, gradient, n, s, 0, 0)
        projections, norms = ops.cyclic_project(messages, 1, missing=missing)
        weights = ops.cyclic_locate(projections, norms, s, 5000, missing=missing)[0]
        yield ops.cyclic_combine(messages, weights)

    kept = list(everything())  # loads kernels and fills the allocator's cache, which may wait
    kept += list(everything())
    del kept
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda._sleep(4_000_000_000)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kept = list(everything())
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert not torch.cuda.current_stream().query(), "some op has waited for the device"
    torch.cuda.synchronize()
    assert len(kept) == 11


def need_memory(gib):
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory, has {free:.0f}")


def farthest(a, b):
    """The largest difference, without a copy of the whole."""
    return max((x - y).abs().max().item() for x, y in zip(a.split(2**27), b.split(2**27), strict=True))


@pytest.mark.parametrize(
    ("code", "d", "dtype"),
    [
        (RepetitionCode(45, 1), 100_000_000, torch.float32),
        (CyclicCode(45, 5), 100_000_000, torch.float32),
        (RepetitionCode(3, 1), 2**31 + 6, torch.float16),
        (CyclicCode(3, 1), 2**31 + 6, torch.float32),
    ],
    ids=lambda value: repr(value).removeprefix("torch."),
)
def test_64_bit_indices(code, d, dtype, cuda):
    """More elements than 32 bits count, in the matrix and in a row; the last of them is wrong."""
    item = torch.finfo(dtype).bits // 8
    need_memory(((code.workers + 3) * d * item) / 2**30 + 3)
    row = torch.randint(-100, 101, (d,), device=cuda, dtype=torch.int8).to(dtype)
    messages = torch.empty(code.workers, d, dtype=dtype, device=cuda)
    messages.copy_(row)  # parts that are all the same are sent as they are by both codes
    for column in (0, d - 1, d - 40_000):
        messages[-1, column] = 10_000
        out = draco_ext.decode(messages, code)
        assert named(out.suspects) == {code.workers - 1}, column
        assert not out.failed
        assert farthest(out.gradient, row) <= (0 if isinstance(code, RepetitionCode) else 1e-3)
        messages[-1, column] = row[column]
        del out
    assert not draco_ext.decode(messages, code).suspects.any()

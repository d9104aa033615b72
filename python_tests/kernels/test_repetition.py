import itertools

import pytest
import torch
from conftest import ATTACKS, attacked, erasure_cases, honest_messages, named, on

import draco_ext
from draco_ext import RepetitionCode, ops, reference

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
CODES = [(n, s) for n in range(1, 11) for s in range((n - 1) // 2 + 1)]
SMALL = [(n, s) for n, s in CODES if n <= 7]
SMALL_FIRST = [*SMALL, *(pytest.param(n, s, marks=pytest.mark.long) for n, s in CODES if n > 7)]


def bits(t):
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def gradients_for(code, d, dtype, generator):
    gradients = torch.randn(code.parts, d, generator=generator).to(dtype)
    gradients[:, ::7] = 0  # so that -0 for 0 is an attack
    gradients[:, 1::11] = -0.0
    return gradients


@pytest.mark.parametrize(("n", "s"), SMALL_FIRST)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_bad_set_and_attack(n, s, dtype, device, simt, generator):
    if simt and n > 4:
        pytest.skip("left to the faster devices")
    code = RepetitionCode(n, s)
    messages = honest_messages(code, gradients_for(code, 37, dtype, generator))
    clean = on(device, draco_ext.decode, messages, code)
    assert not clean.failed
    assert not clean.suspects.any()
    few = ["reversed", "collude", "nan", "minus-zero", "low-bit"]
    kinds = few if dtype.itemsize == 2 else ATTACKS
    for size in range(s + 1):
        for bad in itertools.combinations(range(n), size):
            for attack in kinds:
                sent = attacked(messages, bad, attack, generator)
                out = on(device, draco_ext.decode, sent, code)
                differing = {j for j in range(n) if not torch.equal(bits(sent[j]), bits(messages[j]))}
                where = f"n={n} s={s} bad={bad} attack={attack} dtype={dtype}"
                assert torch.equal(bits(out.gradient), bits(clean.gradient)), where
                assert named(out.suspects) == differing, where
                assert not out.failed, where


@pytest.mark.parametrize(
    "sizes",
    [(1,), (2,), (3,), (4, 3), (5, 5), (7,), (8, 7), (9,), (11, 12), (13, 3), (45,), (255,)],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [0, 1, 15, 16, 17, 1023, 1025, 40001])
def test_matches_reference(sizes, dtype, d, device, simt, generator):
    if simt and d not in (0, 17, 1025):
        pytest.skip("left to the faster devices")
    if len(sizes) and sizes[0] > 40 and d > 2000:
        d = 2000
    s = (min(sizes) - 1) // 2
    parts = torch.randn(len(sizes), d, generator=generator).to(dtype)
    messages = parts.repeat_interleave(torch.tensor(sizes), 0)
    first = 0
    for size in sizes:  # s bad workers in every group, each differing in its own way
        for i in range(s):
            messages[first + (2 * i) % size] = torch.randn(d, generator=generator).to(dtype) * (i + 1)
        first += size
    for mean in (True, False):
        gradient, suspects, failed = on(device, ops.majority_vote, messages, sizes, s, mean=mean)
        expected, expected_suspects, expected_failed = reference.majority_vote(messages, sizes, s, mean=mean)
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(gradient.double(), expected, rtol=2 * unit, atol=4 * unit, equal_nan=True)
        assert torch.equal(suspects, expected_suspects)
        assert torch.equal(failed, expected_failed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(3,), (4, 5), (7, 8), (11,), (23,)])
@pytest.mark.parametrize("d", [1, 33, 5000])
def test_tolerant_matches_reference(dtype, sizes, d, device, simt, generator):
    if simt and d > 33:
        pytest.skip("left to the faster devices")
    s = (min(sizes) - 1) // 2
    rtol = 8 * torch.finfo(dtype).eps
    parts = torch.randn(len(sizes), d, generator=generator).double()
    messages = parts.repeat_interleave(torch.tensor(sizes), 0)
    noise = torch.rand(messages.shape, generator=generator, dtype=torch.float64) - 0.5
    messages = (messages * (1 + rtol / 4 * noise)).to(dtype)
    honest = messages.clone()
    first, bad = 0, set()
    for size in sizes:
        for i in range(s):
            j = first + (2 * i) % size
            bad.add(j)
            messages[j] = [torch.nan, 1e4, -1e4, -torch.inf][i % 4]
        first += size
    gradient, suspects, failed = on(device, ops.majority_vote, messages, sizes, s, rtol=rtol)
    expected, expected_suspects, expected_failed = reference.majority_vote(messages, sizes, s, rtol=rtol)
    torch.testing.assert_close(gradient.double(), expected, rtol=4 * rtol, atol=rtol)
    assert torch.equal(suspects, expected_suspects)
    assert named(suspects) == bad
    assert torch.equal(failed, expected_failed)
    assert not failed
    if len(sizes) == 1:  # the median stays inside the honest range
        good = [j for j in range(sizes[0]) if j not in bad]
        assert (gradient >= honest[good].amin(0)).all()
        assert (gradient <= honest[good].amax(0)).all()


def test_tolerant_equals_vote_when_the_honest_agree(device, generator):
    code = RepetitionCode(10, 2)
    messages = honest_messages(code, gradients_for(code, 1000, torch.float32, generator))
    sent = attacked(messages, (0, 7), "gaussian", generator)
    vote, tolerant = on(device, draco_ext.decode, sent, code), on(device, draco_ext.decode, sent, code, rtol=1e-3)
    assert torch.equal(bits(vote.gradient), bits(tolerant.gradient))
    assert named(tolerant.suspects) == {0, 7}


def test_infinite_winner_is_not_a_licence(device):
    messages = torch.tensor([[torch.inf], [torch.inf], [1.0], [torch.inf], [-torch.inf]])
    out = on(device, draco_ext.decode, messages, RepetitionCode(5, 2), rtol=0.1)
    assert named(out.suspects) == {2, 4}
    assert out.gradient.item() == torch.inf


@pytest.mark.parametrize("scale", [2.0**-149, 1.0], ids=["denormal", "normal"])
def test_tolerance_is_rounded_once(scale, device):
    """The last gap within and the first that is not: rtol times the winner is rounded to nearest, and nothing else.

    By half of the last bit, so that a gap may be within that is not in exact arithmetic, never the reverse.
    """
    rtol = torch.tensor(0.01).item()  # in float32, as the op takes it
    generous = 0
    for winner in range(1, 40000, 317):
        winner = torch.tensor(winner * scale)
        tolerated = winner.double() * rtol
        bit = torch.nextafter(winner, winner.new_tensor(torch.inf)).double() - winner.double()
        for bits_off in range(-1, 3):
            other = (winner.double() + ((tolerated / bit).floor() + bits_off) * bit).float()
            gap = other.double() - winner.double()
            messages = torch.stack([other, winner, winner])[:, None]
            out = on(device, draco_ext.decode, messages, RepetitionCode(3, 1), rtol=rtol)
            within = bool(gap.abs() <= tolerated.float().double())
            assert named(out.suspects) == (set() if within else {0}), f"{winner} {other}"
            assert within or bool(gap.abs() > tolerated)
            generous += within and bool(gap > tolerated)
    assert generous > 0


@pytest.mark.parametrize(("n", "s"), SMALL)
def test_missing_are_erasures(n, s, device, simt, generator):
    if simt and n > 4:
        pytest.skip("left to the faster devices")
    code = RepetitionCode(n, s)
    messages = honest_messages(code, gradients_for(code, 20, torch.float32, generator))
    clean = on(device, draco_ext.decode, messages, code)
    group = [code.assignment(j)[0] for j in range(n)]
    for gone, bad, mask, sent in erasure_cases(code, messages, generator):
        e, f = len(bad), len(gone)
        out = on(device, draco_ext.decode, sent, code, missing=mask)
        where = f"n={n} s={s} missing={gone} bad={bad}"
        if 2 * e + f <= 2 * s:
            assert torch.equal(out.gradient, clean.gradient), where
            assert named(out.suspects) == set(bad), where
            assert not out.failed, where
        if any(all(j in gone for j in range(n) if group[j] == g) for g in range(code.parts)):
            assert out.failed, where
        if out.failed:
            assert out.gradient.isnan().all(), where
        assert not (out.suspects & mask).any(), where


def test_too_many_bad_fails_unless_they_are_a_majority(device, simt, long, generator):
    for n, s in CODES[:9] if simt else CODES if long else SMALL:
        if s == 0:
            continue  # groups of one: nothing shows that a lone message is wrong
        code = RepetitionCode(n, s)
        messages = honest_messages(code, gradients_for(code, 20, torch.float32, generator))
        for bad in itertools.combinations(range(n), s + 1):
            sent = attacked(messages, bad, "gaussian", generator)  # each different
            out = on(device, draco_ext.decode, sent, code)
            sizes = code.group_sizes
            first, must_fail = 0, False
            for size in sizes:
                in_group = sum(first <= j < first + size for j in bad)
                must_fail |= size - in_group < size - s
                first += size
            assert bool(out.failed) == must_fail, f"n={n} s={s} bad={bad}"
            if must_fail:
                assert out.gradient.isnan().all()
                with pytest.raises(draco_ext.DecodingError, match=f"of the {n} workers"):
                    out.raise_if_failed()


def test_assignment_partitions_the_workers():
    for n in range(1, 60):
        for s in range((n - 1) // 2 + 1):
            code = RepetitionCode(n, s)
            assert code.parts == n // (2 * s + 1)
            assert code.redundancy == 2 * s + 1
            parts = [code.assignment(j)[0] for j in range(n)]
            assert parts == sorted(parts)
            assert [parts.count(g) for g in range(code.parts)] == list(code.group_sizes)
            assert min(code.group_sizes) >= 2 * s + 1


def test_row_strided_input_and_sum(device, generator):
    code = RepetitionCode(6, 1)
    messages = honest_messages(code, torch.randn(2, 999, generator=generator)).to(device)
    wide = torch.full((6, 1200), torch.nan, device=device)
    wide[:, 100:1099] = messages
    view = wide[:, 100:1099]
    assert not view.is_contiguous()
    assert torch.equal(draco_ext.decode(view, code).gradient, draco_ext.decode(messages, code).gradient)
    double = torch.cat([messages, messages], 1).view(12, 999)[::2]  # every other row
    assert torch.equal(
        draco_ext.decode(double, code).gradient,
        draco_ext.decode(double.contiguous(), code).gradient,
    )
    total = draco_ext.decode(messages, code, reduction="sum").gradient
    assert torch.equal(total, messages[0] + messages[3])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_group_keeps_every_bit(dtype, device, generator):
    """NaN payloads, -0 and subnormals come back as they were."""
    size = torch.finfo(dtype).bits // 8
    raw = torch.randint(-128, 128, (1000 * size,), generator=generator, dtype=torch.int8)
    message = raw.view(dtype)
    out = on(device, draco_ext.decode, message.repeat(3, 1), RepetitionCode(3, 1))
    assert torch.equal(bits(out.gradient), bits(message))
    assert not out.suspects.any()


def test_half_conversion_is_torchs(device, generator):
    """Every float16 and bfloat16 value through the sum of two groups, one of them zero."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        x = every.view(dtype)
        messages = torch.stack([x, torch.zeros_like(x)])
        code = RepetitionCode(2, 0)
        total = on(device, draco_ext.decode, messages, code, reduction="sum").gradient
        torch.testing.assert_close(total, x + torch.zeros_like(x), rtol=0, atol=0, equal_nan=True)
        y = every[torch.randperm(len(every), generator=generator)].view(dtype)
        mean = on(device, draco_ext.decode, torch.stack([x, y]), code).gradient
        expected = ((x.float() + y.float()) / 2).to(dtype)
        torch.testing.assert_close(mean, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_results_are_those_of_small_ones(dtype, device, simt, generator):
    """Beyond 4 MiB the CPU stores them past its caches; of every size, with every value, the bits must be the same."""
    size = torch.finfo(dtype).bits // 8
    d = (2**12 if simt else 2**23 // size) + 37
    raw = torch.randint(-128, 128, (2, d * size), generator=generator, dtype=torch.int8)
    gradients = raw.view(dtype)
    messages = gradients.repeat_interleave(3, 0)
    messages[4] = messages[4].neg()
    whole = on(device, draco_ext.decode, messages, RepetitionCode(6, 1))
    assert named(whole.suspects) == {4}
    wide = gradients if size > 2 else gradients.float()
    expected = ((wide[0] + wide[1]) / 2).to(dtype)
    torch.testing.assert_close(whole.gradient, expected, rtol=0, atol=0, equal_nan=True)
    pieces = [on(device, draco_ext.decode, piece, RepetitionCode(6, 1)) for piece in messages.split(2**17, dim=1)]
    assert torch.equal(bits(whole.gradient), bits(torch.cat([piece.gradient for piece in pieces])))


NAN_BITS = {torch.float16: 0x7E00, torch.bfloat16: 0x7FC0, torch.float32: 0x7FC00000, torch.float64: 0x7FF8 << 48}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan(dtype, device):
    """With a tolerance all NaN agree; a mean that is NaN has the same bits everywhere, whatever went into it."""
    negative = -torch.tensor([torch.nan], dtype=dtype)
    payload = (bits(torch.tensor([torch.nan], dtype=dtype)) + 3).view(dtype)
    row = torch.arange(300).to(dtype)
    messages = row.repeat(6, 1)
    for j, nan in enumerate((negative, payload, torch.nan, payload, payload, negative)):
        messages[j, 7:70:3] = nan
    tolerant = on(device, draco_ext.decode, messages, RepetitionCode(6, 1), atol=1e-3)
    assert not tolerant.suspects.any()
    assert not tolerant.failed
    messages[4, 9] = 5.0
    assert named(on(device, draco_ext.decode, messages, RepetitionCode(6, 1), atol=1e-3).suspects) == {4}
    exact = on(device, draco_ext.decode, messages, RepetitionCode(6, 0))
    for out in (tolerant, exact):
        nans = out.gradient.isnan()
        assert named(nans) == set(range(7, 70, 3))
        assert (bits(out.gradient[nans]) == NAN_BITS[dtype]).all()

"""SolonCode: messages that are k times shorter than a gradient. What it shares with the cyclic code is tested there."""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import ATTACKS, attacked, erasure_cases, honest_messages, named, on, relative_error
from test_cyclic import BOUND, DTYPES, INVISIBLE, OWN_ERRORS, random_gradients

import draco_ext
from draco_ext import CyclicCode, SolonCode, ops, reference

# Every code of up to 9 workers with k = 2, 3, 4.
CODES = [(n, s, k) for k in (2, 3, 4) for n in range(k, 10) for s in range((n - k) // 2 + 1)]
FIRST = [case if case[0] <= 7 else pytest.param(*case, marks=pytest.mark.long) for case in CODES]
LARGE = [(15, 3, 4), (45, 5, 4), (64, 3, 8), (64, 5, 8)]


def bits(tensor):
    return tensor.contiguous().view({4: torch.int32, 8: torch.int64}[tensor.element_size()])


# ------------------------------------------------------------------------------------------------------ tables


def test_tables_match_their_definition():
    for n, s, k in [*CODES, (12, 4, 4), (13, 3, 7), (30, 2, 26), (64, 5, 8), (96, 0, 96), (255, 8, 8)]:
        code = SolonCode(n, s, k)
        nodes, supports, weights = reference.cyclic_tables(n, s, k)
        np.testing.assert_array_equal(code.supports, supports)
        np.testing.assert_allclose(code.weights, weights.reshape(n, n, k), atol=1e-13)
        assert list(code.moments) == reference.solon_moments(s, k)
        # Every block's sum is its moment of the messages, and the checks vanish.
        window = np.concatenate([code.moments, np.arange(1, 2 * s + 1)])
        powers = nodes[:, None] ** window
        wanted = np.broadcast_to(np.eye(2 * s + k, k)[:, None], (2 * s + k, n, k))
        np.testing.assert_allclose(np.einsum("jm,jpb->mpb", powers, code.weights), wanted, atol=1e-12)
        for j in range(n):
            assert code.assignment(j) == tuple(np.flatnonzero(np.any(supports == j, axis=1)))
            assert len(code.assignment(j)) == code.redundancy == 2 * s + k
        for part in range(n):
            assert code.holders(part) == tuple(sorted(supports[part]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_compression_it_is_the_cyclic_code(dtype, device, generator):
    """To the last bit: weights, messages, the decoded gradient, what is known of it."""
    for n, s in [(1, 0), (3, 1), (8, 3), (15, 2)]:
        solon, cyclic = SolonCode(n, s, compression=1), CyclicCode(n, s)
        assert (solon.weights[..., 0] == cyclic.weights).all()
        assert solon.error_bound(dtype, length=9) == cyclic.error_bound(dtype, length=9)
        assert solon.noise_amplification() == cyclic.noise_amplification()
        for d in (0, 1, 33, 5000):
            gradients = random_gradients(n, d, dtype, generator).to(device)
            for code in (solon, cyclic):
                assert code.message_length(d) == d + d % 2
            messages = honest_messages(solon, gradients)
            assert torch.equal(bits(messages), bits(honest_messages(cyclic, gradients)))
            messages[:s] *= -2
            for length in (d, d + d % 2):
                own, other = (
                    ops.cyclic_decode(messages, s, length=length, seed=4, **more) for more in ({}, {"compression": 1})
                )
                for one, same in zip(own, other, strict=True):
                    assert torch.equal(one, same)
            out = on(device, solon.decode, messages, length=d, seed=4)
            assert torch.equal(bits(out.gradient), bits(on(device, cyclic.decode, messages, length=d, seed=4).gradient))


# --------------------------------------------------------------------------------------------------------- ops


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [0, 1, 2, 15, 16, 61, 1025, 33001])
def test_encode_matches_reference(dtype, d, device, simt, generator):
    eps = torch.finfo(dtype).eps
    for n, s, k in [(3, 1, 1), (8, 2, 3), (9, 2, 4), (6, 0, 6), (20, 3, 13)][: 3 if simt else None]:
        code = SolonCode(n, s, k)
        gradients = random_gradients(n, d, dtype, generator)
        wide = torch.full((code.redundancy, d + 5), torch.nan, dtype=dtype)  # rows further apart
        for j in (0, n - 1):
            wide[:, 1 : d + 1] = own = gradients[list(code.assignment(j))]
            message = on(device, code.encode, j, wide[:, 1 : d + 1])
            assert message.shape == (code.message_length(d),)
            expected = reference.cyclic_encode(own, n, s, j, compression=k)
            torch.testing.assert_close(message.double(), expected, rtol=0, atol=32 * eps)
            assert torch.equal(bits(on(device, code.encode, j, own)), bits(message))
            added = torch.full_like(message, torch.nan, device=device)
            carry = added.clone()
            for i, (part, gradient) in enumerate(zip(code.assignment(j), own.to(device), strict=True)):
                assert code.encode_add_(added, carry, gradient, j, part, first=i == 0) is added
            torch.testing.assert_close(added.cpu().double(), expected, rtol=0, atol=32 * eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_that_cancel(dtype, device, generator):
    """A message is rounded once: what its terms have in common and cancels leaves nothing that looks like an error."""
    for n, s, k in [(7, 1, 3), (9, 2, 4), (12, 2, 2), (15, 3, 4)]:
        code, d = SolonCode(n, s, k), 24 * k
        null = torch.linalg.svd(torch.from_numpy(code.weights.reshape(n, n * k))).Vh[n:].conj()
        for direction, own_size in itertools.product((null[0], null[-1]), (0, 1e-6, 0.02)):
            common = torch.randn(d // k // 2, generator=generator, dtype=torch.complex128)
            parts = torch.view_as_real(torch.outer(direction, common)).reshape(n, d)
            parts = parts + own_size * torch.randn(n, d, generator=generator, dtype=torch.float64)
            parts = parts.to(dtype)
            for encode in (code.encode, lambda j, own, code=code: streamed_by(code, j, own)):
                messages = torch.stack([encode(j, parts[list(code.assignment(j))].to(device)) for j in range(n)])
                out = on(device, draco_ext.decode, messages, code)
                where = f"n={n} s={s} k={k} own={own_size}"
                assert not out.failed, where
                assert not out.suspects.any(), where
                sums = [math.fsum(column) for column in parts.double().T.tolist()]
                exact = torch.tensor(sums, dtype=torch.float64) / n
                rounding = 8 * n * torch.finfo(dtype).eps * messages.norm().item()
                cancelled = {torch.float32: 2.0**-44, torch.float64: 2.0**-95}[dtype] * parts.double().norm()
                assert (out.gradient.double() - exact).norm() <= rounding + cancelled, where


def streamed_by(code, worker, own):
    """A message, its parts added up one after the other."""
    message = own.new_full((code.message_length(own.size(1)),), torch.nan)
    carry = message.clone()
    for i, (part, gradient) in enumerate(zip(code.assignment(worker), own, strict=True)):
        code.encode_add_(message, carry, gradient, worker, part, first=i == 0)
    return message


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [0, 2, 16, 34, 1026, 20000])
def test_combine_matches_reference(dtype, columns, device, simt, generator):
    """All blocks from one read; rows without a weight are not looked at; the last blocks may be cut off."""
    for n, k in [(1, 1), (7, 2), (5, 3), (33, 4), (7, 8), (70, 9), (3, 17)][: 5 if simt else None]:
        messages = torch.randn(n, columns, generator=generator, dtype=torch.float64).to(dtype)
        weights = torch.randn(k, n, generator=generator, dtype=torch.complex128)
        if n > 4:
            weights[:, 3] = 0
            weights[0, 2] = 0
            messages[3] = torch.nan
        for short in {0, 1, 2 * k - 1}:
            length = max(0, k * columns - short)
            expected = reference.cyclic_combine(messages, weights, length=length)
            out = on(device, ops.cyclic_combine, messages, weights, length=length)
            torch.testing.assert_close(out.double(), expected, rtol=0, atol=8 * n * torch.finfo(dtype).eps)
            into = torch.full((length + 2,), torch.nan, dtype=dtype, device=device)
            ops.cyclic_combine(messages.to(device), weights.to(device), length=length, out=into[1:-1])
            assert torch.equal(bits(into[1:-1].cpu()), bits(out))
            assert into[[0, -1]].isnan().all()


def test_decoding_weights_match_least_squares(device, simt, generator):
    """Of every block, for every number of missing workers, side by side and spread out."""
    for n, s, k in [(9, 2, 4), (15, 3, 4), (45, 5, 4), (64, 5, 8)][: 2 if simt else None]:
        code = SolonCode(n, s, k)
        for f in range(2 * s + 1):
            for gone in [range(f), [(i * n) // max(f, 1) for i in range(f)]]:
                missing = torch.zeros(n, dtype=torch.bool)
                missing[list(gone)] = True
                projections, norms = torch.zeros(n, 1, 4, dtype=torch.complex128), torch.ones(n, 1).double()
                weights, _, failed = on(
                    device,
                    ops.cyclic_locate,
                    projections,
                    norms,
                    s,
                    2,
                    missing=missing,
                    mean=False,
                    compression=k,
                )
                assert not failed
                assert weights.shape == (k, n)
                assert (weights[:, missing] == 0).all()
                decoded = np.einsum("aj,jpb->apb", weights.numpy(), code.weights)
                size = np.linalg.norm(weights.numpy(), axis=1)
                wanted = np.broadcast_to(np.eye(k)[:, None], decoded.shape)
                assert np.abs(decoded - wanted).max() < 1e-13 * size.max() * n
                for b, moment in enumerate(code.moments):
                    expected = reference.decoding_weights(n, s, gone, int(moment))
                    assert size[b] <= np.linalg.norm(expected) * 1.001


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fused_decode_is_its_pieces(dtype, device, simt, generator):
    """To the last bit, and the weights of locate give them all."""
    for n, s, k, d in [(9, 2, 4, 1001), (15, 3, 4, 700 if simt else 400_001), (5, 0, 3, 10)]:
        code = SolonCode(n, s, k)
        messages = honest_messages(code, random_gradients(n, d, dtype, generator))
        for bad in ((), (0,), (n - 1, 2)):
            if len(bad) > s:
                continue
            sent = attacked(messages, bad, "gaussian", generator).to(device)
            projections, norms = code.project(sent, 5)
            weights, suspects, failed = code.locate(projections, norms, sent.size(1), dtype=dtype)
            whole = code.decode(sent, length=d, seed=5)
            assert torch.equal(suspects, whole.suspects)
            assert torch.equal(failed, whole.failed)
            assert torch.equal(bits(code.combine(sent, weights)[:d]), bits(whole.gradient))
            total = code.decode(sent, length=d, seed=5, reduction="sum").gradient
            torch.testing.assert_close(total, n * whole.gradient)
            into = torch.full((d,), torch.nan, dtype=dtype, device=device)
            assert code.decode(sent, length=d, seed=5, out=into).gradient is into
            assert torch.equal(bits(into), bits(whole.gradient))


# ------------------------------------------------------------------------------------------------ the guarantee


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "s", "k"), FIRST)
def test_every_bad_set_and_attack(n, s, k, dtype, device, simt, long, generator):
    if simt and n > 6:
        pytest.skip("left to the faster devices")
    code = SolonCode(n, s, k)
    d = 61  # odd, and not a multiple of any k
    gradients = random_gradients(n, d, dtype, generator)
    messages = honest_messages(code, gradients)
    truth = gradients.double().mean(0)
    clean = on(device, draco_ext.decode, messages, code, length=d)
    assert not clean.suspects.any()
    assert not clean.failed
    assert relative_error(clean.gradient, truth) <= BOUND[dtype]
    kinds = itertools.cycle(ATTACKS)
    for size in range(1, s + 1):
        for bad in itertools.combinations(range(n), size):
            for attack in itertools.islice(kinds, 3 if simt else len(ATTACKS) if long else 5):
                sent = attacked(messages, bad, attack, generator)
                out = on(device, draco_ext.decode, sent, code, length=d)
                where = f"n={n} s={s} k={k} bad={bad} attack={attack} dtype={dtype}"
                assert not out.failed, where
                assert relative_error(out.gradient, truth) <= 2 * BOUND[dtype], where
                changed = {j for j in bad if not torch.equal(sent[j], messages[j])}
                if attack in INVISIBLE:
                    assert named(out.suspects) <= set(bad), where
                else:
                    assert named(out.suspects) == changed, where


@pytest.mark.parametrize(("n", "s", "k"), [case for case in CODES if case[0] <= 8 and case[2] < 4])
def test_missing_are_erasures(n, s, k, device, simt, long, generator):
    if simt and n > 5:
        pytest.skip("left to the faster devices")
    code = SolonCode(n, s, k)
    gradients = random_gradients(n, 40, torch.float32, generator)
    messages = honest_messages(code, gradients)
    truth = gradients.double().mean(0)
    every = 1 if long or n <= 6 else 7
    for gone, bad, mask, sent in itertools.islice(erasure_cases(code, messages, generator), 0, None, every):
        e, f = len(bad), len(gone)
        out = on(device, draco_ext.decode, sent, code, missing=mask, length=40)
        where = f"n={n} s={s} k={k} missing={gone} bad={bad}"
        if 2 * e + f <= 2 * s:
            assert relative_error(out.gradient, truth) <= 1e-5, where
            assert named(out.suspects) == set(bad), where
            assert not out.failed, where
        if f > 2 * s:
            assert out.failed, where
        if out.failed:
            assert out.gradient.isnan().all(), where
        assert not (out.suspects & mask).any(), where


def test_more_than_s_bad_never_pass_as_right(device, simt, generator):
    wrong = failed = 0
    for n, s, k in [case for case in CODES if case[1] >= 1 and case[0] <= (6 if simt else 8)]:
        code = SolonCode(n, s, k)
        gradients = random_gradients(n, 64, torch.float32, generator)
        messages = honest_messages(code, gradients)
        for e in range(s + 1, n + 1):
            for bad in itertools.islice(itertools.combinations(range(n), e), 3 if simt else 10):
                out = on(device, draco_ext.decode, attacked(messages, bad, "gaussian", generator), code, length=64)
                failed += bool(out.failed)
                if out.failed:
                    assert out.gradient.isnan().all()
                else:
                    wrong += relative_error(out.gradient, gradients.double().mean(0)) > 1e-6
    assert wrong == 0
    assert failed > (20 if simt else 100)


def test_overflow_is_not_a_fault(device, generator):
    """More than s senders of NaN: the gradient is NaN in all its blocks, and nobody is accused."""
    code = SolonCode(9, 2, 4)
    messages = honest_messages(code, random_gradients(9, 50, torch.float32, generator))
    for count, value in itertools.product(range(10), (torch.nan, torch.inf)):
        sent = messages.clone()
        sent[:count, 3] = value
        out = on(device, draco_ext.decode, sent, code)
        assert not out.failed
        assert named(out.suspects) == (set(range(count)) if count <= 2 else set())
        assert (out.gradient.isfinite() if count <= 2 else out.gradient.isnan()).all()


def test_too_many_missing_is_a_failure(device, generator):
    code = SolonCode(9, 2, 3)
    sent = honest_messages(code, random_gradients(9, 50, torch.float32, generator))
    for missing in (4, 5):
        mask = torch.arange(9) >= 9 - missing
        out = on(device, draco_ext.decode, sent, code, missing=mask)
        assert out.failed == (missing == 5)
        assert (out.gradient.isnan() if missing == 5 else out.gradient.isfinite()).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expected_changes_nothing_but_time(dtype, device, simt, generator):
    """To the last bit, whether the first tiles show who is bad or only the later ones."""
    code, columns = SolonCode(9, 2, 4), (1 if simt else 17) * ops.TILE + 778
    d = 4 * columns - 3
    honest = honest_messages(code, random_gradients(9, d, dtype, generator))
    cases = (((), slice(0)), ((1, 6), slice(None)), ((1, 6), slice(columns - 9, columns)), ((4,), slice(0, 9)))
    for bad, which in cases[: 2 if simt else None]:
        sent = honest.clone()
        sent[list(bad), which] *= -3
        plain = on(device, draco_ext.decode, sent, code, length=d)
        assert named(plain.suspects) == set(bad)
        for guess in ((1, 6), (1, 7), tuple(range(9))):
            likely = torch.zeros(9, dtype=torch.bool)
            likely[list(guess)] = True
            out = on(device, draco_ext.decode, sent, code, expected=likely, length=d)
            assert torch.equal(out.suspects, plain.suspects)
            assert torch.equal(bits(out.gradient), bits(plain.gradient)), f"bad={bad} expected={guess}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "s", "k"), LARGE)
def test_natural_errors(n, s, k, dtype, device, simt, generator):
    """Side by side and anywhere: what is named was bad, and the gradient is right."""
    if simt and n > 15:
        pytest.skip("left to the faster devices")
    code, d, rng = SolonCode(n, s, k), 600, np.random.default_rng(generator.initial_seed())
    gradients = random_gradients(n, d, dtype, generator)
    messages, mean = honest_messages(code, gradients), gradients.double().mean(0)
    before = honest_messages(code, random_gradients(n, d, dtype, generator))
    for kind, error in OWN_ERRORS.items():
        first = int(rng.integers(n))
        for bad in ([(first + i) % n for i in range(s)], rng.choice(n, s, replace=False).tolist()):
            sent = messages.clone()
            sent[bad] = error(messages[bad], before[bad], generator)
            out = on(device, draco_ext.decode, sent, code, length=d)
            assert not out.failed, f"{kind} {bad}"
            assert named(out.suspects) <= set(bad), f"{kind} {bad}"
            wrong = relative_error(out.gradient, mean)
            assert wrong <= 100 * BOUND[dtype], f"{kind} {bad}: {wrong}"


def test_figures_of_the_design(generator):
    """Noise grows as was computed when the layout was chosen, and float32 decodes of random attacks stay below 1e-6."""
    for (n, s, k), clean, erased in zip(LARGE, (0.73, 0.56, 0.77, 0.69), (1.9, 4.2, 5.0, 19), strict=True):
        code, d = SolonCode(n, s, k), 40 * k
        assert code._amplification(0) == pytest.approx(clean, rel=0.02)
        assert code.noise_amplification() == pytest.approx(erased, rel=0.05)
        assert np.abs(code.weights).max() <= 0.38
        gradients = random_gradients(n, d, torch.float32, generator)
        messages, worst = honest_messages(code, gradients), 0.0
        for trial in range(60):
            bad = torch.randperm(n, generator=generator)[:s].tolist()
            sent = attacked(messages, bad, ("gaussian", "add-same", "negated")[trial % 3], generator)
            out = draco_ext.decode(sent, code)
            assert named(out.suspects) == set(bad)
            worst = max(worst, relative_error(out.gradient, gradients.double().mean(0)))
        print(f"n={n} s={s} k={k}: {code._amplification(0):.2f} / {code.noise_amplification():.1f}, {worst:.0e}")  # -s
        assert worst < 1e-6, f"n={n} s={s} k={k}: {worst}"


def test_result_does_not_depend_on_threads(generator):
    code, d = SolonCode(9, 2, 4), 300_001
    messages = honest_messages(code, random_gradients(9, d, torch.float32, generator))
    messages[4] *= -1
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(code.decode(messages, length=d, seed=9).gradient)
    torch.set_num_threads(threads)
    for result in results[1:]:
        assert torch.equal(result, results[0])


# ---------------------------------------------------------------------------------------------- torch, arguments


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(dtype, masked, real_device):
    code, d = SolonCode(7, 1, 3), 50
    like = {"dtype": dtype, "device": real_device}
    messages = honest_messages(code, torch.randn(7, d, **like))
    mask = torch.tensor([True] + [False] * 6, device=real_device) if masked else None
    projections, norms = ops.cyclic_project(messages, 3, missing=mask)
    weights = torch.randn(3, 7, dtype=torch.complex128, device=real_device)
    own, length = torch.randn(5, d, **like), messages.size(1)
    for name, arguments in (
        ("cyclic_encode", (own, 7, 1, 1, 3)),
        ("cyclic_encode_out", (own, 7, 1, 1, own.new_empty(length), 3)),
        ("cyclic_encode_add_", (messages[0].clone(), messages[1].clone(), own[0], 7, 1, 0, 0, False, 3)),
        ("cyclic_locate", (projections, norms, mask, 1, length, dtype == torch.float64, 0.0, 0.0, True, 3)),
        ("cyclic_combine", (messages, weights, d)),
        ("cyclic_combine_out", (messages, weights, own.new_empty(d))),
        ("cyclic_decode", (messages, mask, mask, 1, d, 0.0, 0.0, True, 4, 3)),
        ("cyclic_decode_out", (messages, mask, mask, 1, 0.0, 0.0, True, 4, own.new_empty(d), 3)),
    ):
        torch.library.opcheck(getattr(torch.ops.draco_ext, name).default, arguments)


def test_compile_fullgraph(real_device, generator):
    code = SolonCode(7, 1, 3)
    messages = honest_messages(code, torch.randn(7, 300, generator=generator))
    compiled = torch.compile(lambda m: draco_ext.decode(m * 1.0, code, length=299).gradient * 2, fullgraph=True)
    for bad in ((), (1,)):
        sent = attacked(messages, bad, "reversed", generator).to(real_device)
        wanted = draco_ext.decode(sent, code, length=299).gradient * 2
        torch.testing.assert_close(compiled(sent), wanted, rtol=0, atol=1e-6)


def test_arguments():
    code = SolonCode(9, 2, 4)
    assert (code.blocks, code.redundancy, code.parts) == (4, 8, 9)
    assert [code.message_length(d) for d in (0, 1, 8, 9, 61)] == [0, 2, 2, 4, 16]
    with pytest.raises(ValueError, match="workers must be at least 2 \\* adversaries \\+ compression = 8, got 7"):
        SolonCode(7, 2, 4)
    with pytest.raises(ValueError, match="compression must be at least 1, got 0"):
        SolonCode(7, 2, 0)
    with pytest.raises(TypeError, match="compression must be an int, got float"):
        SolonCode(7, 2, 2.0)
    messages = torch.zeros(9, 10)
    for length in (32, 41):
        with pytest.raises(ValueError, match=f"length must be from 33 to 40, got {length}"):
            draco_ext.decode(messages, code, length=length)
    with pytest.raises(ValueError, match="out must have 40 elements, got 10"):
        draco_ext.decode(messages, code, out=torch.zeros(10))
    with pytest.raises(ValueError, match="gradients must have 2 \\* adversaries \\+ compression = 8 rows, got 5"):
        code.encode(0, torch.zeros(5, 8))
    with pytest.raises(ValueError, match="message must have 2 elements, got 8"):
        code.encode_add_(torch.zeros(8), torch.zeros(8), torch.zeros(8), 0, 0)
    part = next(part for part in range(9) if part not in code.assignment(0))
    with pytest.raises(ValueError, match=f"part must be one that worker 0 computes, got {part}"):
        code.encode_add_(torch.zeros(2), torch.zeros(2), torch.zeros(8), 0, part)
    with pytest.raises(ValueError, match="weights must be contiguous with 9 entries, got 4"):
        ops.cyclic_combine(messages, torch.zeros(9, 4, dtype=torch.complex128))
    with pytest.raises(ValueError, match="weights must have from 1 to 32767 rows, got 0"):
        ops.cyclic_combine(messages, torch.zeros(0, 9, dtype=torch.complex128))


def test_raw_ops_keep_memory_safe(device):
    raw = torch.ops.draco_ext
    messages, own = torch.zeros(9, 10, device=device), torch.zeros(8, 33, device=device)
    weights = torch.zeros(4, 9, dtype=torch.complex128, device=device)
    for call in (
        lambda: raw.cyclic_decode(messages, None, None, 2, 41, 0.0, 0.0, True, 1, 4),
        lambda: raw.cyclic_decode(messages, None, None, 2, 40, 0.0, 0.0, True, 1, 6),
        lambda: raw.cyclic_decode(messages, None, None, 2, 0, 0.0, 0.0, True, 1, 0),
        lambda: raw.cyclic_combine(messages, weights, 41),
        lambda: raw.cyclic_combine(messages, weights[:, :8].contiguous(), 40),
        lambda: raw.cyclic_encode(own, 9, 2, 0, 3),
        lambda: raw.cyclic_encode(own, 7, 2, 0, 4),
        lambda: raw.cyclic_encode(own, 9, 2, 0, 2**40),
        lambda: raw.cyclic_encode_out(own, 9, 2, 0, torch.zeros(34, device=device), 4),
        lambda: raw.cyclic_encode_add_(own[0].clone(), own[0].clone(), own[1], 9, 2, 0, 0, False, 4),
    ):
        with pytest.raises(RuntimeError):
            call()

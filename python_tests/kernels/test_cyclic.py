import decimal
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import ATTACKS, attacked, erasure_cases, honest_messages, named, on, relative_error

import draco_ext
from draco_ext import CyclicCode, ops, reference
from draco_ext.protocol.encoder import GradientEncoder
from draco_ext.protocol.messages import GradientBuffer

DTYPES = [torch.float32, torch.float64]
CODES = [(n, s) for n in range(1, 11) for s in range((n - 1) // 2 + 1)]
SMALL = [(n, s) for n, s in CODES if n <= 7]
SMALL_FIRST = [*SMALL, *(pytest.param(n, s, marks=pytest.mark.long) for n, s in CODES if n > 7)]
BOUND = {torch.float32: 1e-6, torch.float64: 1e-13}  # on the decoded mean, whatever is sent
INVISIBLE = {"low-bit", "minus-zero"}  # may be below the rounding that the code itself makes


def random_gradients(n, d, dtype, generator):
    return torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)


# ------------------------------------------------------------------------------------------------------ tables


def test_tables_match_their_definition():
    for n in range(1, 40):
        for s in range((n - 1) // 2 + 1):
            code = CyclicCode(n, s)
            nodes, supports, weights = reference.cyclic_tables(n, s)
            np.testing.assert_allclose(code.nodes, nodes, atol=1e-14)
            np.testing.assert_array_equal(code.supports, supports)
            np.testing.assert_allclose(code.weights, weights, atol=1e-12)
            powers = nodes[:, None] ** np.arange(2 * s + 1)
            np.testing.assert_allclose(powers.T @ code.weights, np.eye(2 * s + 1, 1) @ np.ones((1, n)), atol=1e-11)
            assert np.abs(code.weights).max() <= (1 if s == 0 else 0.5) + 1e-12
            if n % (2 * s + 1) == 0:
                assert set(np.unique(code.weights)) <= {0, 1 / (2 * s + 1)}
            for j in range(n):
                assert code.assignment(j) == tuple(np.flatnonzero(np.any(supports == j, axis=1)))
                assert len(code.assignment(j)) == code.redundancy


def test_decoding_weights_match_least_squares(device, simt):
    for n, s in [(7, 3), (15, 3), (45, 5), (64, 5), (33, 16)][: 3 if simt else None]:
        for f in range(2 * s + 1):
            for bad in [range(f), [(i * n) // max(f, 1) for i in range(f)]]:
                missing = torch.zeros(n, dtype=torch.bool)
                missing[list(bad)] = True
                weights, _, failed = on(
                    device,
                    ops.cyclic_locate,
                    torch.zeros(n, 1, 4, dtype=torch.complex128),
                    torch.ones(n, 1, dtype=torch.float64),
                    s,
                    2,
                    missing=missing,
                    mean=False,
                )
                assert not failed
                b = weights.numpy()
                assert (b[list(bad)] == 0).all()
                # What decoding needs: b is 1 plus a check, so that b @ W = 1 for every part.
                size = np.linalg.norm(b)
                assert np.abs(b @ CyclicCode(n, s).weights - 1).max() < 1e-13 * size * n
                expected = reference.decoding_weights(n, s, bad)
                assert size <= np.linalg.norm(expected) * 1.001


# --------------------------------------------------------------------------------------------------------- ops


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [0, 1, 2, 15, 16, 31, 1025, 33001])
def test_encode_matches_reference(dtype, d, device, generator):
    for n, s in [(3, 1), (8, 3), (9, 4), (16, 2)]:
        code = CyclicCode(n, s)
        gradients = random_gradients(n, d, dtype, generator)
        for j in (0, n - 1):
            own = gradients[list(code.assignment(j))]
            message = on(device, code.encode, j, own)
            assert message.shape == (code.message_length(d),)
            expected = reference.cyclic_encode(own, n, s, j)
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(message.double(), expected, rtol=0, atol=32 * eps)
            added, carry = torch.zeros_like(message, device=device), torch.zeros_like(message, device=device)
            for part, gradient in zip(code.assignment(j), own.to(device), strict=True):
                result = ops.cyclic_encode_add_(added, carry, gradient, n, s, j, part)
                assert result is added
            torch.testing.assert_close(added.cpu().double(), expected, rtol=0, atol=32 * eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [0, 2, 14, 16, 30, 1024, 1026, 32768, 66666, 131074])
def test_project_matches_reference(dtype, length, device, generator):
    messages = torch.randn(7, length, generator=generator, dtype=torch.float64).to(dtype)
    missing = torch.tensor([False, True, False, False, False, False, False])
    for seed in (0, -1, 2**62 + 12345):
        projections, norms = on(device, ops.cyclic_project, messages, seed, missing=missing)
        expected, expected_norms = reference.cyclic_project(messages, seed, missing=missing)
        scale = expected_norms.max().item() if length else 1.0
        torch.testing.assert_close(projections, expected, rtol=0, atol=8 * torch.finfo(dtype).eps * scale)
        torch.testing.assert_close(norms, expected_norms, rtol=32 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [0, 2, 16, 34, 1026, 70000])
def test_combine_matches_reference(dtype, length, device, generator):
    for n in (1, 4, 7, 33):
        messages = torch.randn(n, length, generator=generator, dtype=torch.float64).to(dtype)
        weights = torch.randn(n, generator=generator, dtype=torch.complex128)
        if n > 4:
            weights[3] = 0
            messages[3] = torch.nan  # must not be read
        for w in (weights, weights.real.to(torch.complex128)):
            expected = reference.cyclic_combine(messages, w)
            out = on(device, ops.cyclic_combine, messages, w)
            eps = torch.finfo(dtype).eps
            torch.testing.assert_close(out.double(), expected, rtol=0, atol=8 * n * eps)


def test_fused_decode_is_its_pieces(device, generator):
    for n, s, d in [(7, 2, 1000), (15, 3, 40000), (5, 0, 10)]:
        code = CyclicCode(n, s)
        messages = honest_messages(code, random_gradients(n, d, torch.float32, generator))
        for bad in ((), (0,), (n - 1, 2)):
            if len(bad) > s:
                continue
            sent = attacked(messages, bad, "gaussian", generator).to(device)
            projections, norms = ops.cyclic_project(sent, 5)
            weights, suspects, failed = ops.cyclic_locate(projections, norms, s, d)
            whole = ops.cyclic_decode(sent, s, seed=5)
            assert torch.equal(suspects, whole[1])
            assert torch.equal(failed, whole[2])
            gradient = ops.cyclic_combine(sent, weights)
            torch.testing.assert_close(gradient, whole[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_expected_changes_nothing_but_time(dtype, device, simt, generator):
    """To the last bit, for bad workers who were expected and who were not, and where only the later tiles show them."""
    code, d = CyclicCode(9, 2), (1 if simt else 17) * ops.TILE + 778
    honest = honest_messages(code, random_gradients(9, d, dtype, generator))
    for bad, columns in (((), slice(0)), ((1, 6), slice(None)), ((1, 6), slice(d - 9, d)), ((4,), slice(0, 9))):
        sent = honest.clone()
        sent[list(bad), columns] *= -3
        for gone in ((), (8,))[: 1 + (len(bad) < 2)]:
            mask = torch.zeros(9, dtype=torch.bool)
            mask[list(gone)] = True
            plain = on(device, draco_ext.decode, sent, code, missing=mask)
            assert named(plain.suspects) == set(bad)
            for guess in ((1, 6), (1, 7), (), tuple(range(9))):
                likely = torch.zeros(9, dtype=torch.bool)
                likely[list(guess)] = True
                out = on(device, draco_ext.decode, sent, code, missing=mask, expected=likely)
                assert torch.equal(out.suspects, plain.suspects)
                assert torch.equal(out.gradient, plain.gradient), f"bad={bad} missing={gone} expected={guess}"


# -------------------------------------------------------------------------------------------- parts that cancel


def streamed(code, worker, own):
    """A message, its parts added up one after the other."""
    message = own.new_zeros(code.message_length(own.size(1)))
    carry = torch.zeros_like(message)
    for part, gradient in zip(code.assignment(worker), own, strict=True):
        ops.cyclic_encode_add_(message, carry, gradient, code.workers, code.adversaries, worker, part)
    return message


def encoded_by_protect(code, worker, own):
    """A message as `protect` makes it, of a bucket of one parameter."""
    values = torch.empty_like(own[0])
    buffer = GradientBuffer(values, (len(values),), ("parameter",), "bucket")
    encoder = GradientEncoder(code, worker, scale_into_buffer=True)
    for index, gradient in enumerate(own):
        values.copy_(gradient)
        encoder.add(buffer, code.assignment(worker), index)
    return encoder.message(buffer).values


CANCELLED = {torch.float32: 2.0**-44, torch.float64: 2.0**-95}  # of the terms: counts as 0
ENCODERS = [lambda code, worker, own: code.encode(worker, own), streamed, encoded_by_protect]


def cancelling_parts(code, d, generator):
    """Parts (n, d) in float64 whose weighted sums vanish, exactly or up to the rounding of the parts."""
    n, weights = code.workers, torch.from_numpy(code.weights)
    null = torch.linalg.svd(weights).Vh[n - 2 * code.adversaries :].conj()
    modes = torch.polar(torch.ones(n, n).double(), 2 * math.pi / n * torch.outer(*2 * [torch.arange(n).double()]))
    modes = modes[(weights @ modes).abs().amax(0) < 1e-12]
    common = torch.randn(d, generator=generator, dtype=torch.float64)
    alternating = torch.tensor([1.0, -1.0], dtype=torch.complex128).repeat(n)[:n]
    for direction in (alternating, *modes, *null):
        yield torch.view_as_real(torch.outer(direction, torch.view_as_complex(common.view(-1, 2)))).flatten(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parts_that_cancel(dtype, device, simt, long, generator):
    """Nobody is bad: what the parts have in common and no message shows leaves no rounding like an error."""
    codes = [(n, s) for n in range(3, 16 if long else 10) for s in range(1, (n - 1) // 2 + 1)]
    for n, s in [(4, 1), (6, 2), (15, 2)] if simt else codes:
        code, own_sizes = CyclicCode(n, s), itertools.cycle((0, 1e-6, 0.02, 1))
        for number, common in enumerate(cancelling_parts(code, 24, generator)):
            for own_size in itertools.islice(own_sizes, 3):  # not four: other ones first each time
                own = own_size * torch.randn(n, 24, generator=generator, dtype=torch.float64)
                parts = (common + own).to(dtype).to(device)
                encode = ENCODERS[(number + int(own_size > 0)) % len(ENCODERS)]
                messages = [encode(code, j, parts[list(code.assignment(j))]) for j in range(n)]
                out = on(device, draco_ext.decode, torch.stack(messages), code)
                where = f"n={n} s={s} direction {number} own={own_size} by {encode}"
                assert not out.failed, where
                assert not out.suspects.any(), where
                # Of the sum, as the messages have rounded theirs once.
                exact = torch.tensor(
                    [math.fsum(column) / n for column in parts.cpu().double().T.tolist()], dtype=torch.float64
                )
                error = (out.gradient.cpu().double() - exact).norm()
                rounding = 4 * n * torch.finfo(dtype).eps * torch.stack(messages).norm().item()
                assert error <= rounding + CANCELLED[dtype] * parts.double().norm(), where


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_message_is_rounded_once(dtype, device, generator):
    """To half a unit in the last place, where terms are a million times larger too, and far below that."""
    for n, s in ((7, 1), (8, 3), (9, 4), (15, 2)):
        code = CyclicCode(n, s)
        common = torch.randn(1, 200, generator=generator, dtype=torch.float64)
        sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(n)[:n, None]
        parts = (sign * common + 1e-6 * torch.randn(n, 200, generator=generator, dtype=torch.float64)).to(dtype)
        own = parts[list(code.assignment(1))]
        exact = exactly_encoded(code, 1, own)
        for encode in ENCODERS[:2]:
            message = encode(code, 1, own.to(device)).cpu()
            for element, wanted in zip(message.tolist(), exact, strict=True):
                tolerated = torch.finfo(dtype).eps * 0.501 * abs(float(wanted)) + CANCELLED[dtype] / 32 * 4
                assert abs(float(decimal.Decimal(element) - wanted)) <= tolerated, f"n={n} s={s}"


def exactly_encoded(code, worker, own):
    """A message to 60 digits, from the definition of the weights."""
    n, r = code.workers, code.redundancy
    with decimal.localcontext(prec=60):
        pi = decimal.Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")

        def node(power):
            angle, re, im, term, k = (
                2 * pi * (power % n) / n,
                decimal.Decimal(0),
                decimal.Decimal(0),
                decimal.Decimal(1),
                0,
            )
            while k < 80:
                re, im = (re + (-1) ** (k // 2) * term, im) if k % 2 == 0 else (re, im + (-1) ** (k // 2) * term)
                k += 1
                term = term * angle / k
            return re, im

        def times(a, b):
            return a[0] * b[0] - a[1] * b[1], a[0] * b[1] + a[1] * b[0]

        offsets = [(2 * t * n + r) // (2 * r) for t in range(r)]
        sums = [[decimal.Decimal(0)] * 2 for _ in range(own.size(1) // 2)]
        for part, gradient in zip(code.assignment(worker), own.double().tolist(), strict=True):
            support = [(part + offset) % n for offset in offsets]
            weight = (decimal.Decimal(1), decimal.Decimal(0))
            for i in support:
                if i == worker:
                    continue
                x, y = node(i), node(worker)
                gap = (x[0] - y[0], y[1] - x[1])  # conjugated
                size = gap[0] ** 2 + gap[1] ** 2
                weight = times(weight, tuple(value / size for value in times(x, gap)))
            for pair, total in enumerate(sums):
                term = times(weight, tuple(map(decimal.Decimal, gradient[2 * pair : 2 * pair + 2])))
                total[0] += term[0]
                total[1] += term[1]
        return [element for total in sums for element in total]


# ---------------------------------------------------------------------------------------- the ends of the numbers


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, x) for x in (1e-38, 1e30, None)]
    + [(torch.float64, x) for x in (1e-40, 1e79, 1e120, 1e160, 1e250, None)],
    ids=str,
)
def test_finite_messages_of_any_size(dtype, scale, device, simt, generator):
    """None: so large that the parts' sum only just does not overflow."""
    most, given = torch.finfo(dtype).max, scale
    for (n, s), d in [((7, 2), 3000), ((15, 3), 100), ((3, 1), 2)][: 1 if simt else 3]:
        code, scale = CyclicCode(n, s), most / n * 0.99 if given is None else given
        bound = 1e-4 if scale < 1e-37 else BOUND[dtype]
        gradients = 2 * torch.rand(n, d, generator=generator, dtype=torch.float64) - 1
        messages = honest_messages(code, (gradients * scale).to(dtype))
        assert messages.isfinite().all()
        for bad in ((), (1,), tuple(range(s))):
            for value in (-messages[list(bad)], torch.full((len(bad), d), most / 2, dtype=dtype), 0.0):
                sent = messages.clone()
                sent[list(bad)] = value
                out = on(device, draco_ext.decode, sent, code)
                where = f"n={n} s={s} d={d} bad={bad}"
                assert not out.failed, where
                assert named(out.suspects) == set(bad), where
                assert relative_error(out.gradient.double() / scale, gradients.mean(0)) <= bound, where


def test_far_beyond_the_others(device, generator):
    """What is so large that squares overflow is bad beyond doubt, also where the others are 0 or it is in few tiles."""
    code, d = CyclicCode(9, 2), ops.TILE + 100
    honest = honest_messages(code, random_gradients(9, d, torch.float64, generator) * 1e-20)
    honest[:, -100:] = 0
    for size in (1e50, 1e150, 1e300):
        for bad, columns in (
            ((3,), slice(0, 9)),
            ((3, 8), slice(d - 9, d)),
            ((2, 3), slice(5, d - 5)),
            ((1, 2, 5), slice(0, 9)),
        ):
            sent = honest.clone()
            sent[list(bad), columns] = (
                size * torch.randn(len(bad), len(range(d)[columns]), generator=generator).double()
            )
            out = on(device, draco_ext.decode, sent, code)
            assert out.failed == (len(bad) > 2), f"{size} {bad}"
            if len(bad) <= 2:
                assert named(out.suspects) == set(bad), f"{size} {bad}"
                assert relative_error(out.gradient, on(device, draco_ext.decode, honest, code).gradient) < 1e-13


# ------------------------------------------------------------------------------------------------ the guarantee


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "s"), SMALL_FIRST)
def test_every_bad_set_and_attack(n, s, dtype, device, simt, generator):
    if simt and n > 5:
        pytest.skip("left to the faster devices")
    code = CyclicCode(n, s)
    d = 61  # odd: the last element has no partner
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
            for attack in itertools.islice(kinds, 3 if simt else len(ATTACKS)):
                sent = attacked(messages, bad, attack, generator)
                out = on(device, draco_ext.decode, sent, code, length=d)
                where = f"n={n} s={s} bad={bad} attack={attack} dtype={dtype}"
                assert not out.failed, where
                assert relative_error(out.gradient, truth) <= BOUND[dtype], where
                changed = {j for j in bad if not torch.equal(sent[j], messages[j])}
                if attack in INVISIBLE:
                    assert named(out.suspects) <= set(bad), where
                else:
                    assert named(out.suspects) == changed, where


@pytest.mark.parametrize(("n", "s"), [(45, 5), (64, 5)])
@pytest.mark.parametrize("place", ["adjacent", "random"])
@pytest.mark.parametrize("kind", ["independent", "colluding", "scaled"])
def test_large_codes_over_magnitudes(n, s, place, kind, device, simt, long, generator):
    if simt and n > 45:
        pytest.skip("left to the faster devices")
    code, d, rng = CyclicCode(n, s), 1000, np.random.default_rng(generator.initial_seed())
    found_any = False
    for trial in range(1 if simt else 6 if long else 2):
        gradients = random_gradients(n, d, torch.float32, generator)
        messages = honest_messages(code, gradients)
        truth = gradients.double().mean(0)
        size = messages[0].norm() / math.sqrt(d)
        for exponent in range(6, -7, -6 if simt else -1):
            start = int(rng.integers(n))
            bad = (
                [(start + i) % n for i in range(s)] if place == "adjacent" else rng.choice(n, s, replace=False).tolist()
            )
            error = torch.randn(s, d, generator=generator)
            if kind == "colluding":
                error[:] = error[0].clone()
            elif kind == "scaled":
                # Of size 1/2 to 3/2: with one of nearly 0 there are fewer bad workers than s, and a small error more.
                scale = torch.rand(s, 1, generator=generator) * 2 - 1
                error[:] = (scale + scale.sign() / 2) * error[0].clone()
            sent = messages.clone()
            sent[bad] += 10.0**exponent * size * error
            out = on(device, draco_ext.decode, sent, code)
            where = f"n={n} trial={trial} magnitude=1e{exponent} bad={sorted(bad)}"
            assert not out.failed, where
            error = relative_error(out.gradient, truth)
            assert error <= 1e-4, f"{where}: {error}"
            if named(out.suspects) >= set(bad):
                found_any = True
                assert error <= 1e-6, f"{where}: {error}"
            assert named(out.suspects) <= set(bad), where
            if exponent >= 1:  # below that neighbours' errors may be explained by others within a few times the noise
                assert named(out.suspects) == set(bad), where
    assert found_any


def messages_of(code, d, dtype, generator):
    """Honest messages of random gradients, elements of size 1, and the gradients' mean, without n^2 encodings."""
    gradients = torch.randn(code.parts, d // 2, dtype=torch.complex128, generator=generator)
    weights = torch.from_numpy(code.weights.copy())
    gradients /= weights.abs().square().sum(1).max().sqrt()
    return torch.view_as_real(weights @ gradients).flatten(1).to(dtype), torch.view_as_real(gradients.mean(0)).flatten()


def one_element_wrong(messages, generator):
    sent = messages.clone()
    sent[range(len(sent)), torch.randint(sent.size(1), sent.shape[:1], generator=generator)] += 30
    return sent


# f(honest messages of the bad, other honest messages of theirs, generator) -> what they send instead
OWN_ERRORS = {
    **{
        f"all elements, {size:g}": lambda z, old, g, size=size: z + size * torch.randn(z.shape, generator=g).to(z)
        for size in (1, 0.1, 1e-3, 1e-4)
    },
    "scaled by 2": lambda z, old, g: 2 * z,
    "flipped sign": lambda z, old, g: -z,
    "zero": lambda z, old, g: torch.zeros_like(z),
    "scaled, each otherwise": lambda z, old, g: z * (1 + torch.randn(len(z), 1, generator=g).to(z)),
    "one element": lambda z, old, g: one_element_wrong(z, g),
    "bfloat16": lambda z, old, g: z.bfloat16().to(z),
    "stale": lambda z, old, g: old,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "s"),
    [(48, 20), (63, 26), (64, 16), (128, 32)]
    + [pytest.param(n, s, marks=pytest.mark.long) for n, s in ((127, 58), (255, 30), (255, 64), (255, 127))],
)
def test_any_number_of_bad_workers_that_do_not_collude(n, s, dtype, device, simt, generator):
    """All s, and some number below, wrong in the natural ways: they are found, and nobody else is named."""
    if simt and (n > 48 or dtype == torch.float64):
        pytest.skip("left to the faster devices")
    code, d, rng = CyclicCode(n, s), 500, np.random.default_rng(generator.initial_seed())
    messages, mean = messages_of(code, d, dtype, generator)
    before = messages_of(code, d, dtype, generator)[0]
    for count in (s,) if simt else (s, int(rng.integers(s // 2, s))):
        for kind, error in OWN_ERRORS.items():
            if simt and kind not in ("all elements, 0.1", "flipped sign", "stale"):
                continue
            bad = rng.choice(n, count, replace=False).tolist()
            sent = messages.clone()
            sent[bad] = error(messages[bad], before[bad], generator)
            out = on(device, draco_ext.decode, sent, code)
            assert not out.failed, f"{kind} {count}"
            assert named(out.suspects) <= set(bad), f"{kind} {count}"
            wrong = relative_error(out.gradient, mean)
            assert wrong <= 30 * BOUND[dtype], f"{kind} {count}: {wrong}"


def test_each_bad_worker_is_wrong_in_a_tile_of_its_own(device, simt, generator):
    """As many columns have to be looked at as there are bad workers."""
    n, s, d = (12, 3, 3 * ops.TILE) if simt else (48, 20, 20 * ops.TILE)
    code, rng = CyclicCode(n, s), np.random.default_rng(generator.initial_seed())
    messages, mean = messages_of(code, d, torch.float32, generator)
    bad = rng.choice(n, s, replace=False).tolist()
    for i, j in enumerate(bad):
        messages[j, i * ops.TILE : (i + 1) * ops.TILE] += 0.1 * torch.randn(ops.TILE, generator=generator)
    out = on(device, draco_ext.decode, messages, code)
    assert not out.failed
    assert named(out.suspects) <= set(bad)
    assert relative_error(out.gradient, mean) <= 30 * BOUND[torch.float32]


def test_clean_runs_accuse_nobody(device, simt, long, generator):
    codes = [(3, 1), (7, 2), (8, 3), (15, 3), (16, 3), (45, 5), (41, 20)]
    cases = itertools.product(codes, DTYPES, (1e-30, 1e-6, 1.0, 1e20), (1, 2, 7, 130, 3000))
    for (n, s), dtype, scale, d in itertools.islice(cases, 0, None, 9 if simt else 1 if long else 3):
        code = CyclicCode(n, s)
        gradients = random_gradients(n, d, dtype, generator) * scale
        gradients[:, : d // 3] *= 1e-4  # layers of different size
        gradients[:, d // 2 : d // 2 + d // 8] = 0
        out = on(device, draco_ext.decode, honest_messages(code, gradients), code, length=d)
        where = f"n={n} s={s} d={d} scale={scale} {dtype}"
        assert not out.suspects.any(), where
        assert not out.failed, where
    for messages in (torch.zeros(9, 100), torch.full((9, 64), 1e-44)):
        out = on(device, draco_ext.decode, messages, CyclicCode(9, 2))
        assert not out.suspects.any()
        assert not out.failed


def test_noise_model(device, simt, generator):
    """The root mean square of honest checks stays below what core/noise.h assumes."""
    worst = dict.fromkeys(DTYPES, 0.0)
    for n, s in [(15, 3), (16, 3), (45, 5), (64, 5), (100, 10), (30, 14)][: 2 if simt else None]:
        powers = np.outer(np.arange(1, 2 * s + 1), np.arange(n)) % n
        checks = torch.from_numpy(np.exp(2j * np.pi * powers / n) / math.sqrt(n))
        for dtype in DTYPES:
            unit = torch.finfo(dtype).eps / 2
            model = math.sqrt(36 + n) if dtype == torch.float64 else 2
            messages = honest_messages(CyclicCode(n, s), random_gradients(n, 2000, dtype, generator))
            projections, norms = on(device, ops.cyclic_project, messages, 1)
            missed = (torch.einsum("mj,jtk->mtk", checks, projections).abs() ** 2).mean(0).amax().sqrt()
            reference_norm = norms.sort(0, descending=True).values[s]
            ratio = (missed / reference_norm / unit / model).item()
            worst[dtype] = max(worst[dtype], ratio)
            assert ratio < 2, f"n={n} s={s} {dtype}: {ratio}"
    assert all(ratio > 0.05 for ratio in worst.values()), "the model has become far too loose"


def test_locator_matches_exhaustive_search(device, simt, generator):
    for n, s in [(5, 2), (8, 3), (11, 2), (12, 4)]:
        code = CyclicCode(n, s)
        messages = honest_messages(code, random_gradients(n, 200, torch.float64, generator))
        for size in range(s + 1):
            for _ in range(1 if simt else 4):
                bad = torch.randperm(n, generator=generator)[:size].tolist()
                sent = attacked(messages, bad, "add-same", generator)
                projections, norms = on(device, ops.cyclic_project, sent, 3)
                _, suspects, failed = on(device, ops.cyclic_locate, projections, norms, s, 200, dtype=torch.float64)
                noise = norms.sort(0, descending=True).values[s] * 1e-14
                assert not failed
                assert named(suspects) == reference.cyclic_locate(projections, s, noise) == set(bad)


@pytest.mark.parametrize(("n", "s"), SMALL)
def test_missing_are_erasures(n, s, device, simt, generator):
    if simt and n > 5:
        pytest.skip("left to the faster devices")
    code = CyclicCode(n, s)
    gradients = random_gradients(n, 40, torch.float32, generator)
    messages = honest_messages(code, gradients)
    truth = gradients.double().mean(0)
    for gone, bad, mask, sent in itertools.islice(erasure_cases(code, messages, generator), 0, None, 5 if simt else 1):
        e, f = len(bad), len(gone)
        out = on(device, draco_ext.decode, sent, code, missing=mask)
        where = f"n={n} s={s} missing={gone} bad={bad}"
        if 2 * e + f <= 2 * s:
            assert relative_error(out.gradient, truth) <= 2e-6, where
            assert named(out.suspects) == set(bad), where
            assert not out.failed, where
        if f > 2 * s:
            assert out.failed, where
        if out.failed:
            assert out.gradient.isnan().all(), where
        assert not (out.suspects & mask).any(), where


def test_more_than_s_bad_never_pass_as_right(device, simt, long, generator):
    right = wrong = failed = 0
    for n, s in CODES[:9] if simt else CODES if long else SMALL:
        if s == 0:
            continue  # no redundancy: nothing shows
        code = CyclicCode(n, s)
        gradients = random_gradients(n, 64, torch.float32, generator)
        messages = honest_messages(code, gradients)
        for e in range(s + 1, n + 1):
            for bad in itertools.islice(itertools.combinations(range(n), e), 3 if simt else 40):
                for attack in ("gaussian", "huge", "add-same"):
                    out = on(device, draco_ext.decode, attacked(messages, bad, attack, generator), code)
                    if out.failed:
                        failed += 1
                        assert out.gradient.isnan().all()
                    elif relative_error(out.gradient, gradients.double().mean(0)) <= 1e-6:
                        right += 1
                    elif attack == "gaussian":  # each different; colluders may send what other workers could have sent
                        wrong += 1
    assert wrong == 0
    assert failed > (20 if simt else 1000 if long else 300)


def test_overflow_is_not_a_fault(device, generator):
    code = CyclicCode(7, 2)
    messages = honest_messages(code, random_gradients(7, 50, torch.float32, generator))
    for count in range(8):
        for value in (torch.nan, torch.inf):
            sent = messages.clone()
            sent[:count, 3] = value
            out = on(device, draco_ext.decode, sent, code)
            assert not out.failed
            if count <= 2:
                assert named(out.suspects) == set(range(count))
                assert out.gradient.isfinite().all()
            else:
                assert not out.suspects.any()
                assert out.gradient.isnan().all()


def test_overflow_with_workers_missing(device, simt, generator):
    """Where 2 * nonfinite + missing > 2 * s, the gradient itself has overflowed."""
    code = CyclicCode(9, 3)
    messages = honest_messages(code, random_gradients(9, 50, torch.float32, generator))
    for missing, nonfinite in itertools.product(range(7), range(4)):
        if simt and (missing + nonfinite) % 3:
            continue
        mask = torch.arange(9) < missing
        sent = messages.clone()
        sent[missing : missing + nonfinite, 7] = torch.inf
        out = on(device, draco_ext.decode, sent, code, missing=mask)
        where = f"missing={missing} nonfinite={nonfinite}"
        assert not out.failed, where
        if 2 * nonfinite + missing <= 6:
            assert named(out.suspects) == set(range(missing, missing + nonfinite)), where
            assert out.gradient.isfinite().all(), where
        else:
            assert not out.suspects.any(), where
            assert out.gradient.isnan().all(), where


def test_too_many_missing_is_a_failure_whatever_the_others_sent(device, generator):
    code = CyclicCode(9, 2)
    sent = honest_messages(code, random_gradients(9, 50, torch.float32, generator))
    sent[:4] = torch.nan
    for missing, failed in ((4, False), (5, True)):
        mask = torch.arange(9) >= 9 - missing
        out = on(device, draco_ext.decode, sent, code, missing=mask)
        assert out.failed == failed
        assert out.gradient.isnan().all()
        projections, norms = on(device, ops.cyclic_project, sent, 3, missing=mask)
        weights, suspects, gave_up = on(device, ops.cyclic_locate, projections, norms, 2, 50, missing=mask)
        assert gave_up == failed
        assert weights.isnan().all()
        assert not suspects.any()


def test_errors_of_very_different_size(device, generator):
    """One huge and one small: the huge one must not drown the small one, in any tile or the same."""
    code = CyclicCode(15, 3)
    gradients = random_gradients(15, 40000, torch.float32, generator)
    messages = honest_messages(code, gradients)
    for columns in (
        (slice(0, 100), slice(0, 100), slice(0, 100)),
        (slice(0, 9), slice(39000, None), slice(500, 600)),
    ):
        for sizes in ((1e30, 1.0, 1e-2), (1e12, 1e12, 1e-3), (1e3, 1e20, 1e36)):
            sent = messages.clone()
            for j, column, size in zip((3, 4, 11), columns, sizes, strict=True):
                sent[j, column] += size * torch.randn(sent[j, column].shape, generator=generator)
            out = on(device, draco_ext.decode, sent, code)
            assert named(out.suspects) == {3, 4, 11}, f"{columns} {sizes}"
            assert relative_error(out.gradient, gradients.double().mean(0)) < 1e-6


def test_every_projection_that_may_join_the_search(device):
    """Bad workers in tiles of their own, each much worse than the next: found in turns, until there is no room left."""
    code, bad, missing = CyclicCode(14, 5), (1, 4, 7, 11), [0, 9]
    rng = np.random.default_rng(5)
    tiles = 4 * len(bad)  # with 2 projections each; 8 join the search in a turn, 32 in all
    projections = code.weights @ (rng.standard_normal((14, 2 * tiles)) + 1j * rng.standard_normal((14, 2 * tiles)))
    for i, j in enumerate(bad):
        projections[j, 8 * i : 8 * i + 8] += 1e3 ** (3 - i) * rng.standard_normal(8)
    projections[missing] = 0
    absent = torch.zeros(14, dtype=torch.bool)
    absent[missing] = True
    norms = torch.ones(14, tiles, dtype=torch.float64)
    weights, suspects, failed = on(
        device,
        ops.cyclic_locate,
        torch.from_numpy(projections.reshape(14, tiles, 2)),
        norms,
        code.adversaries,
        tiles * ops.TILE,
        missing=absent,
    )
    assert not failed
    assert named(suspects) == set(bad)
    exact = reference.decoding_weights(14, 5, (*bad, *missing)) / 14
    np.testing.assert_allclose(weights.cpu().numpy(), exact, atol=1e-12)


def test_suspects_in_few_of_many_tiles(device, simt, generator):
    """The CPU looks for suspects after the first tiles already: whoever is bad there, elsewhere or in both is found.

    The result is one that is stored past the caches.
    """
    code, d = CyclicCode(7, 2), (1 if simt else 33) * ops.TILE + 77
    gradients = random_gradients(7, d, torch.float32, generator)
    honest = honest_messages(code, gradients)
    exact = gradients.double().mean(0)
    head, tail, both = slice(0, 100), slice(d - 5000, d), slice(0, d)
    for case in (
        {},
        {3: head},
        {3: tail},
        {3: both},
        {3: head, 5: tail},
        {3: tail, 5: tail},
        {3: head, 5: both},
        {3: head, 5: tail, 1: both},  # too many
    ):
        for value in (50.0, torch.inf):
            sent = honest.clone()
            for j, columns in case.items():
                sent[j, columns] *= value
            for guess in ((), (3,), (0, 6)):
                mask = torch.zeros(7, dtype=torch.bool)
                mask[list(guess)] = True
                out = on(device, draco_ext.decode, sent, code, expected=mask, length=d)
                if len(case) <= 2:
                    assert not out.failed
                    assert named(out.suspects) == set(case), f"{case} {value} {guess}"
                    assert relative_error(out.gradient, exact) < BOUND[torch.float32], f"{case} {value} {guess}"
                else:  # an overflow of the gradient itself, where more are not finite than may be bad
                    assert out.failed == (value == 50)
                    assert out.gradient.isnan().all()


def test_fixed_projection_can_be_attacked_and_a_fresh_one_cannot(device, simt, generator):
    """Why the seed is drawn after the messages are in."""
    code, d = CyclicCode(7, 2), 4096
    gradients = random_gradients(7, d, torch.float64, generator)
    messages = honest_messages(code, gradients)
    known = reference.projection_weights(d, 1, torch.float64)
    error = torch.randn(d, generator=generator, dtype=torch.float64)
    for parity in (0, 1):  # orthogonal for real and imaginary parts alike
        basis = torch.linalg.qr(known[:, parity::2].T).Q
        for _ in range(2):  # once more for what rounding left
            error[parity::2] -= basis @ (basis.T @ error[parity::2])
    sent = messages.clone()
    sent[2] += 0.1 * error
    assert named(on(device, ops.cyclic_decode, sent, 2, seed=1)[1]) == set()
    for _ in range(5 if simt else 20):
        out = on(device, draco_ext.decode, sent, code)
        assert named(out.suspects) == {2}
        assert relative_error(out.gradient, gradients.mean(0)) < 1e-13


def test_row_strided_input_and_sum(device, generator):
    code = CyclicCode(6, 1)
    messages = honest_messages(code, torch.randn(6, 998, generator=generator)).to(device)
    wide = torch.full((6, 1200), torch.nan, device=device)
    wide[:, 101:1099] = messages
    strided = ops.cyclic_decode(wide[:, 101:1099], 1, seed=1)
    contiguous = ops.cyclic_decode(messages, 1, seed=1)
    assert torch.equal(strided[0], contiguous[0])
    total = draco_ext.decode(messages, code, reduction="sum").gradient
    torch.testing.assert_close(total, 6 * contiguous[0])


def test_result_does_not_depend_on_threads(generator):
    code = CyclicCode(9, 2)
    messages = honest_messages(code, torch.randn(9, 200_000, generator=generator))
    messages[4] *= -1
    results, threads = [], torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(ops.cyclic_decode(messages, 2, seed=9))
    torch.set_num_threads(threads)
    for result in results[1:]:
        assert torch.equal(result[0], results[0][0])


def test_large_parameters(device, simt, generator):
    for n, s, size in [(255, 8, 8), (255, 127, 3), (128, 63, 1), (601, 2, 2)][: 1 if simt else None]:
        code = CyclicCode(n, s)
        gradients = random_gradients(n, 64, torch.float64, generator)
        messages = honest_messages(code, gradients)
        bad = torch.randperm(n, generator=generator)[:size].tolist()
        out = on(device, draco_ext.decode, attacked(messages, bad, "gaussian", generator), code)
        assert named(out.suspects) == set(bad)
        assert relative_error(out.gradient, gradients.mean(0)) < 1e-12

"""What holds for every code, gradient and adversary that strategies.py can draw.

`--long` draws five times as many, `--hypothesis-profile=thorough` a hundred times and others each time; a failure
prints how to see it again.
"""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import strategies as our
import torch
from conftest import named
from hypothesis import given, note
from hypothesis import strategies as st

import draco_ext
from draco_ext import CyclicCode, RepetitionCode, SolonCode, ops, reference

TESTS = Path(__file__).resolve().parent.parent
KINDS = {"repetition": RepetitionCode, "cyclic": CyclicCode, "short messages": SolonCode}
ALL = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
BOTH = pytest.mark.parametrize("kind", [RepetitionCode, CyclicCode], ids=["repetition", "cyclic"])


def bits(t):
    return t.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def decode(step, messages=None, **options):
    """Decodes, with a seed, so that the same messages give the same bits."""
    code, messages = step.code, step.sent if messages is None else messages
    if isinstance(code, CyclicCode):
        result = ops.cyclic_decode(
            messages, code.adversaries, missing=step.mask, seed=1, compression=code.blocks, **options
        )
        return draco_ext.Decoded(*result, code)
    return draco_ext.decode(messages, code, missing=step.mask, **options)


def exact(t):
    """The numbers in numpy's next wider type, in which squares do not overflow and sums are as good as not rounded."""
    return t.double().numpy().astype({torch.float32: np.float64, torch.float64: np.longdouble}[t.dtype])


def tile_norms(vectors):
    """(n, tiles), the norm of each tile of ops.TILE columns: these have noise floors of their own."""
    cuts = range(ops.TILE, vectors.shape[1], ops.TILE)
    return np.stack([np.linalg.norm(tile, axis=1) for tile in np.split(vectors, cuts, axis=1)], axis=1)


def noise(step):
    """(tiles,), the cyclic decoder's noise model (csrc/core/noise.h) for the largest honest message.

    A message's rounding, relative to its norm; but at least that of numbers whose products with a projection's weights
    are denormal. What is decoded and who is named is right in units of this, and of nothing smaller.
    """
    n, length = step.honest.shape
    relative, least = {
        torch.float32: (2.0**-23, 2e-43),
        torch.float64: (2.0**-53 * math.sqrt(36 + n), 1e-60),
    }[step.honest.dtype]
    elements = np.diff([*range(0, length, ops.TILE), length]) if length else np.zeros(1)
    return np.hypot(relative * tile_norms(exact(step.honest)).max(0), least * np.sqrt(elements))


# Times the noise. An error stays in the gradient if every check lets it pass: if the root mean square of the checks is
# at most 6 in all four projections. A projection's weights are between 3/7 and 12/7 of their own root mean square, and
# so is the norm that the noise is taken from. So one wrong pair of elements of one worker adds at most
# 6 * 7/3 * 12/7 / sqrt(n) = 24 / sqrt(n) to the mean. Errors of many elements or workers cancel in some projections and
# may add more, but hardly in all four: of 400000 decodes of errors of 1 to 1e5 times the noise none was off by more
# than 12, and one in 10000 by more than 5. What is promised is larger, as it is for errors that are made to pass:
# Code.error_bound, and test_guarantee.py.
MOST_LEFT = 24
# From here on an error is not only left out but its sender is named, as is promised from 1e-3 of a float32 message on,
# four times as much (docs/guarantee.md, for workers that are not neighbours or do not collude). Largest not named in
# those decodes: 520.
NAMED_FROM = 2100


def is_right(step, gradient):
    """To the last bit with the repetition code, to the noise with the cyclic code, to what it promises with Solon's."""
    if isinstance(step.code, RepetitionCode):
        groups = torch.tensor(step.code.group_sizes)
        clean = draco_ext.decode(step.gradients.repeat_interleave(groups, 0), step.code)
        return torch.equal(bits(gradient), bits(clean.gradient))
    # A mean in float64 would be further off than the decoded one where gradients cancel.
    error = exact(gradient[: step.d]) - exact(step.gradients).mean(0)
    if isinstance(step.code, SolonCode):
        least = {torch.float32: 1.7e-36, torch.float64: 1.5e-45}[step.honest.dtype]  # see Code.error_bound
        norms = np.linalg.norm(exact(step.gradients), axis=1)
        size = np.sqrt((norms**2).sum() + step.code.parts * step.honest.size(1) * np.square(norms.dtype.type(least)))
        bound = step.code.error_bound(step.honest.dtype, length=step.honest.size(1))
        return bool(np.linalg.norm(error) <= bound * size / step.code.parts)
    return bool((tile_norms(error[None])[0] <= MOST_LEFT * noise(step)).all())


def changed(step):
    """The bad workers whose message is not what an honest one would have sent, and those for whom that must show.

    The cyclic code cannot see what is below its noise floor; from where on Solon's code names is not promised.
    """
    differ = {j for j in step.adversary.bad if not torch.equal(bits(step.sent[j]), bits(step.honest[j]))}
    if isinstance(step.code, RepetitionCode):
        return differ, differ
    if isinstance(step.code, SolonCode):
        return differ, set()
    error = tile_norms(exact(step.sent) - exact(step.honest))
    visible = (~(error <= NAMED_FROM * noise(step))).any(1)  # NaN is visible
    return differ, differ & set(np.flatnonzero(visible).tolist())


@ALL
@given(data=st.data())
def test_up_to_s_bad_are_corrected_and_named(kind, data):
    step = data.draw(our.rounds((kind,)))
    differ, visible = changed(step)
    out = decode(step)
    note(f"suspects {named(out.suspects)}, failed {bool(out.failed)}")
    assert not out.failed
    assert visible <= named(out.suspects) <= differ
    assert is_right(step, out.gradient)


@ALL
@given(data=st.data())
def test_honest_workers_are_never_accused(kind, data):
    step = data.draw(our.rounds((kind,), attacks=("minus-zero",)))
    out = decode(step, step.honest)
    assert not out.failed
    assert not out.suspects.any()
    assert is_right(step, out.gradient)


@given(step=our.rounds((RepetitionCode,), within=False, least_adversaries=1))
def test_too_many_bad_repetition(step):
    """Right, or failed, or a group in which so many sent the same wrong thing that they look like the honest ones."""
    out = decode(step)
    if out.failed:
        assert out.gradient.isnan().all()
        return
    differ, _ = changed(step)
    outvoted, first = False, 0
    for size in step.code.group_sizes:
        members = range(first, first + size)
        first += size
        lies = [tuple(bits(step.sent[j]).tolist()) for j in members if j in differ]
        outvoted |= any(lies.count(lie) >= size - step.code.adversaries for lie in lies)
    if not outvoted:
        assert is_right(step, out.gradient)
        assert named(out.suspects) == differ


@given(step=our.rounds((CyclicCode,), within=False, least_adversaries=1, attacks=("gaussian", "nan", "one-minus-inf")))
def test_too_many_bad_cyclic(step):
    """Right, or failed, or not finite, where no two bad workers agree on an error."""
    size = step.honest.double().abs().max().item() or 1.0
    for j, kind in step.adversary.attacks.items():
        if kind == "gaussian":  # beside messages of 1e9 what this attack sends is a zero, and they would agree
            step.sent[j] = step.honest[j] + size * step.sent[j]
    out = decode(step)
    nonfinite = int((~step.sent.isfinite()).any(1).sum())
    if out.failed or nonfinite > step.code.adversaries:
        assert out.gradient.isnan().all()
        assert not out.suspects.any()
        assert out.failed == (nonfinite <= step.code.adversaries)
    else:
        assert is_right(step, out.gradient)


@BOTH
@given(data=st.data())
def test_layout_does_not_matter(kind, data):
    step = data.draw(our.rounds((kind,)))
    plain, view = decode(step), decode(step, data.draw(our.views(step.sent)))
    assert torch.equal(bits(view.gradient), bits(plain.gradient))
    assert torch.equal(view.suspects, plain.suspects)


@BOTH
@given(data=st.data())
def test_order_of_columns_does_not_matter(kind, data):
    step = data.draw(our.rounds((kind,)))
    length = step.sent.size(1)
    together = 1 if kind is RepetitionCode else 2  # pairs are complex numbers
    generator = torch.Generator().manual_seed(data.draw(our.seeds))
    order = torch.randperm(length // together, generator=generator).repeat_interleave(together) * together
    order += torch.arange(length) % together
    permuted = step.columns(order)
    out = decode(permuted)
    assert not out.failed
    assert is_right(permuted, out.gradient)
    differ, visible = changed(permuted)  # tiles have floors of their own: others than before
    assert visible <= named(out.suspects) <= differ
    if kind is RepetitionCode:
        assert torch.equal(bits(out.gradient), bits(decode(step).gradient[order]))


@BOTH
@given(data=st.data())
def test_columns_can_be_decoded_apart(kind, data):
    """Buckets: whatever a message is cut into, the whole result is that of its pieces."""
    step = data.draw(our.rounds((kind,)))
    length = step.sent.size(1)
    cut = data.draw(st.integers(0, length // 2)) * 2
    whole, steps = decode(step), [step.columns(slice(cut)), step.columns(slice(cut, None))]
    pieces = [decode(piece) for piece in steps]
    assert not any(piece.failed for piece in pieces)
    if kind is RepetitionCode:
        joined = torch.cat([piece.gradient for piece in pieces])
        assert torch.equal(bits(joined), bits(whole.gradient))
        assert torch.equal(pieces[0].suspects | pieces[1].suspects, whole.suspects)
    else:  # the pieces have other tiles than the whole, and each tile a noise floor of its own
        for part, out in zip(steps, pieces, strict=True):
            differ, visible = changed(part)
            assert visible <= named(out.suspects) <= differ
            assert is_right(part, out.gradient)


@given(step=our.rounds((RepetitionCode,)), sum_of=st.booleans(), rtol=st.sampled_from([0.0, 1e-2]))
def test_vote_is_the_reference(step, sum_of, rtol):
    """Within the tolerance is as the reference says, but for the one rounding that differs.

    float64: none does. Others are compared in float32, with rtol rounded to it: the gap is exact where it is near the
    tolerance, and rtol * winner is rounded to nearest, by up to 2^-24 of it or, where it is denormal, 2^-150. What is
    within before is so afterwards, as rounding keeps the order; a gap that is so much larger may be.
    """
    sizes, s = step.code.group_sizes, step.code.adversaries
    options = {"missing": step.mask, "mean": not sum_of}
    gradient, suspects, failed = ops.majority_vote(step.sent, sizes, s, rtol=rtol, **options)
    least = most = {"rtol": rtol}
    if rtol > 0 and step.sent.dtype != torch.float64:
        least = {"rtol": torch.tensor(rtol, dtype=torch.float32).item()}
        most = {"rtol": least["rtol"] * (1 + 2.0**-24), "atol": 2.0**-150}
    expected, least_suspects, least_failed = reference.majority_vote(step.sent, sizes, s, **most, **options)
    strict, most_suspects, most_failed = reference.majority_vote(step.sent, sizes, s, **least, **options)
    assert named(least_suspects) <= named(suspects) <= named(most_suspects)
    assert least_failed <= failed <= most_failed
    if failed:  # of the same medians
        expected = strict
    info = torch.finfo(step.sent.dtype)
    terms = step.gradients.double().abs().sum(0)
    bound = 4 * info.eps * terms + info.smallest_normal * info.eps
    inside = expected.isfinite() & (terms < info.max / 4)
    assert bool(((gradient.double() - expected).abs() <= bound)[inside].all())
    assert torch.equal(gradient.isnan(), expected.isnan())


@given(data=st.data(), dtype=st.sampled_from(ops.CYCLIC_DTYPES))
def test_encoding_is_the_reference(data, dtype):
    code = data.draw(our.codes((CyclicCode,)))
    own = data.draw(our.gradients(code, dtype))
    worker = data.draw(st.integers(0, code.workers - 1))
    own = own[list(code.assignment(worker))]
    expected = reference.cyclic_encode(own, code.workers, code.adversaries, worker)
    info = torch.finfo(dtype)
    pairs = torch.nn.functional.pad(own.double().abs().sum(0), (0, code.message_length(own.size(1)) - own.size(1)))
    size = pairs.view(-1, 2).sum(1).repeat_interleave(2)  # both of a pair enter both of a result
    added, carry = (torch.full_like(expected, torch.nan, dtype=dtype) for _ in range(2))  # not read by the first
    for i, (part, gradient) in enumerate(zip(code.assignment(worker), own, strict=True)):
        ops.cyclic_encode_add_(added, carry, gradient, code.workers, code.adversaries, worker, part, first=i == 0)
    for message in (code.encode(worker, own), added):
        assert bool(((message.double() - expected).abs() <= 8 * info.eps * (size + info.smallest_normal)).all())


@given(step=our.rounds((CyclicCode,), attacks=("gaussian", "nan", "huge", "add-same")))
def test_pieces_of_the_cyclic_decoder_are_the_whole(step):
    s, length = step.code.adversaries, step.sent.size(1)
    whole = decode(step)
    projections, norms = ops.cyclic_project(step.sent, 1, missing=step.mask)
    weights, suspects, failed = ops.cyclic_locate(
        projections, norms, s, length, missing=step.mask, dtype=step.sent.dtype
    )
    assert torch.equal(suspects, whole.suspects)
    assert torch.equal(failed, whole.failed)
    assert is_right(step, ops.cyclic_combine(step.sent, weights))


@given(data=st.data(), dtype=st.sampled_from(ops.DIGEST_DTYPES), seed=st.integers(-(2**63), 2**63 - 1))
def test_digest_is_the_reference(data, dtype, seed):
    length = data.draw(st.one_of(st.just(0), our.LENGTHS))
    raw = torch.randint(
        0, 256, (length * dtype.itemsize,), generator=torch.Generator().manual_seed(data.draw(our.seeds))
    )
    values = raw.to(torch.uint8).view(dtype)
    assert torch.equal(ops.digest(values, seed), reference.digest(values, seed))


@given(data=st.data(), dtype=st.sampled_from(ops.VOTE_DTYPES), seed=st.integers(-(2**63), 2**63 - 1))
def test_digest_and_stats_are_the_reference(data, dtype, seed):
    length = data.draw(st.one_of(st.just(0), our.LENGTHS))
    generator = torch.Generator().manual_seed(data.draw(our.seeds))
    values = torch.randint(0, 256, (length * dtype.itemsize,), generator=generator).to(torch.uint8).view(dtype)
    digest, stats = ops.digest_and_stats(values, seed)
    wanted_digest, wanted = reference.digest_and_stats(values, seed)
    assert torch.equal(digest, wanted_digest)
    torch.testing.assert_close(stats, wanted, rtol=1e-11, atol=1e-300)
    assert torch.equal(stats[:, 1:], wanted[:, 1:])


def test_a_failure_prints_a_reproducer(tmp_path):
    """What whoever breaks something sees: the example, and how to get it again."""
    (tmp_path / "test_broken.py").write_text(
        "import hypothesis, strategies\n\n\n@hypothesis.given(step=strategies.rounds())\n"
        "def test_broken(step):\n    assert step.code.workers < 3\n"
    )
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider", tmp_path],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert run.returncode == 1, run.stdout + run.stderr
    assert "step=Round(" in run.stdout
    assert "@reproduce_failure(" in run.stdout

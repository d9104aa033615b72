"""Placements of parts: how many parts colluders spoil, as published, and who is named by agreement."""

import itertools
import math

import pytest
import torch
from conftest import attacked, honest_messages

import draco_ext
from draco_ext import ByzShieldCode, CyclicCode, RepetitionCode
from draco_ext.codes.collusion import agreement, certain_colluders, worst_colluders

# The most parts of 25 that so many colluders spoil: ByzShield (arXiv 2010.04902), tables 3 (15 workers) and 4 (25), as
# the authors' program counts them.
PUBLISHED = {(15, 1): {2: 1, 3: 3, 4: 5, 5: 8}, (25, 2): {3: 1, 4: 1, 5: 2, 6: 4, 7: 5}}
CODES = [ByzShieldCode(9, 1), ByzShieldCode(15, 1), ByzShieldCode(25, 2), ByzShieldCode(21, 1), RepetitionCode(11, 2)]


def spoilt(code, count):
    return len(code.distorted_parts(worst_colluders(code, count)))


@pytest.mark.parametrize(("workers", "adversaries"), PUBLISHED)
def test_published_distortion(workers, adversaries):
    code = ByzShieldCode(workers, adversaries)
    published = PUBLISHED[workers, adversaries]
    assert {count: spoilt(code, count) for count in published} == published
    assert code.parts == 25


@pytest.mark.parametrize(("workers", "adversaries"), PUBLISHED)
def test_groups_lose_more(workers, adversaries):
    """DETOX's groups: s+1 colluders win one, which is a fifth of the batch."""
    code = RepetitionCode(workers, adversaries)
    for count, fewer in PUBLISHED[workers, adversaries].items():
        assert spoilt(code, count) == count // (adversaries + 1)
        assert spoilt(code, count) / code.parts > fewer / 25


@pytest.mark.parametrize(
    "code", [ByzShieldCode(9, 1), RepetitionCode(7, 1), RepetitionCode(8, 1), CyclicCode(5, 1)], ids=repr
)
def test_the_search_finds_what_trying_all_sets_finds(code):
    for count in range(code.workers + 1):
        sets = itertools.combinations(range(code.workers), count)
        assert spoilt(code, count) == max(len(code.distorted_parts(chosen)) for chosen in sets)


@pytest.mark.parametrize("code", CODES, ids=repr)
def test_any_two_workers_share_at_most_one_part(code):
    shared = [
        len(set(code.assignment(i)) & set(code.assignment(j)))
        for i, j in itertools.combinations(range(code.workers), 2)
    ]
    assert max(shared) == 1
    assert all(len(code.holders(part)) >= code.redundancy for part in range(code.parts))
    if isinstance(code, ByzShieldCode):
        assert all(len(code.assignment(worker)) == code.load for worker in range(code.workers))
        # Of two parts the workers are never the same, so no group of workers has parts of its own.
        assert len({code.holders(part) for part in range(code.parts)}) == code.parts


def test_arguments():
    code = ByzShieldCode(15, 1)
    with pytest.raises(ValueError, match="worker must be from 0 to 14, got 15"):
        code.distorted_parts([15])
    with pytest.raises(ValueError, match="count must be from 0 to 15, got 16"):
        worst_colluders(code, 16)
    for workers, adversaries in ((14, 1), (12, 1), (15, 2), (3, 1), (18, 1)):
        with pytest.raises(ValueError, match=rf"workers must be 2 \* adversaries \+ 1 = .* got {workers}"):
            ByzShieldCode(workers, adversaries)
    with pytest.raises(ValueError, match="agrees must be a symmetric matrix"):
        certain_colluders(torch.tensor([[True, False], [True, True]]), 1)
    with pytest.raises(
        ValueError, match="code must be a RepetitionCode or ByzShieldCode, whose messages are gradients"
    ):
        agreement(torch.zeros(5, 4), CyclicCode(5, 1))
    with pytest.raises(ValueError, match="messages must have 5 gradients in a row, got 4 columns"):
        agreement(torch.zeros(15, 4), code)


# ------------------------------------------------------------------------------------------------- agreement


@pytest.mark.parametrize("code", [ByzShieldCode(9, 1), RepetitionCode(9, 1)], ids=repr)
def test_agreement_and_who_is_named(code, generator):
    """Nobody honest is named, whoever lies about which of its parts; who lies to all that it meets is named."""
    messages = honest_messages(code, torch.randn(code.parts, 6, generator=generator))
    load = len(code.assignment(0))
    for count in range(code.workers // 2 + 1):
        for bad in itertools.combinations(range(code.workers), count):
            sent = messages.clone().view(code.workers, load, 6)
            lies = torch.rand(code.workers, load, generator=generator) < 0.6
            for worker in bad:
                sent[worker, lies[worker]] = 7.0
            agrees = agreement(sent.view(code.workers, -1), code)
            named = certain_colluders(agrees, count)
            assert set(named) <= set(bad)
    if load > 1:
        bad = (0, 4)
        agrees = agreement(attacked(messages, bad, "reversed", generator), code)
        assert certain_colluders(agrees, 2) == bad
        missing = torch.zeros(9, dtype=torch.bool)
        missing[0] = True
        agrees = agreement(attacked(messages, bad, "reversed", generator), code, missing=missing)
        assert certain_colluders(agrees, 2) == (4,)


def with_all_subsets(workers, redundancy, bad, framed):
    """Agreement and spoilt parts with Aspis's placement, whose colluders disagree with the framed workers alone."""
    agrees, spoilt_parts = torch.ones(workers, workers, dtype=torch.bool), 0
    for part in itertools.combinations(range(workers), redundancy):
        liars = set(part) & bad
        if 2 * len(liars) > redundancy and set(part) <= bad | framed:
            spoilt_parts += 1
            for i, j in itertools.product(liars, set(part) - bad):
                agrees[i, j] = agrees[j, i] = False
    return agrees, spoilt_parts


@pytest.mark.parametrize("count", [2, 3, 4])
def test_what_colluders_reach_against_aspis(count):
    """They spoil C(2q, r) / 2 parts unnamed if they frame as many honest workers; with one more they are named."""
    bad = set(range(count))
    agrees, parts = with_all_subsets(11, 3, bad, set(range(count, 2 * count)))
    assert parts == math.comb(2 * count, 3) // 2
    assert certain_colluders(agrees, count) == ()
    agrees, _ = with_all_subsets(11, 3, bad, set(range(count, 2 * count + 1)))
    assert set(certain_colluders(agrees, count)) == bad
    # With one less the largest clique alone is the one with the colluders: Aspis's rule would name honest workers.
    agrees, _ = with_all_subsets(11, 3, bad, set(range(count, 2 * count - 1)))
    assert certain_colluders(agrees, count) == ()


# ------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("beyond", ["median", "fail", "trimmed-mean"])
@pytest.mark.parametrize(("workers", "adversaries"), [(9, 1), (15, 1), (25, 2)])
def test_every_set_of_few_bad_workers(workers, adversaries, beyond, generator):
    """With up to s bad workers all votes are right, and exactly the bad ones are suspects."""
    code = ByzShieldCode(workers, adversaries, beyond=beyond)
    gradients = torch.randn(code.parts, 7, generator=generator)
    messages = honest_messages(code, gradients)
    clean = draco_ext.decode(messages, code)
    expected = {"median": gradients.median(0).values, "fail": gradients.mean(0), "trimmed-mean": None}[beyond]
    if expected is not None:
        torch.testing.assert_close(clean.gradient, expected)
    assert clean.bounded == (beyond != "fail")
    for bad in itertools.combinations(range(workers), adversaries):
        for attack in ("collude", "nan"):
            out = draco_ext.decode(attacked(messages, bad, attack, generator), code)
            assert torch.equal(out.gradient, clean.gradient)
            assert set(out.suspects.nonzero().flatten().tolist()) == set(bad)
            assert torch.equal(out.suspects, out.left_out)
            assert not out.failed


@pytest.mark.parametrize("attack", ["collude", "gaussian", "inf"])
def test_every_set_of_bad_workers_is_bounded_or_fails(attack, generator):
    code = ByzShieldCode(9, 1)
    gradients = torch.randn(9, 3, generator=generator)
    messages = honest_messages(code, gradients)
    for count in range(10):
        for bad in itertools.combinations(range(9), count):
            out = draco_ext.decode(attacked(messages, bad, attack, generator), code)
            lost = code.distorted_parts(bad)
            if len(lost) > code.corruptible:
                assert not out.failed or out.gradient.isnan().all()
                continue
            honest = gradients[[part for part in range(9) if part not in lost]]
            assert not out.failed
            assert (out.gradient >= honest.min(0).values).all(), bad
            assert (out.gradient <= honest.max(0).values).all(), bad


@pytest.mark.parametrize(("workers", "adversaries"), [(9, 1), (25, 2)])
def test_missing_workers(workers, adversaries, generator):
    code = ByzShieldCode(workers, adversaries, beyond="fail")
    gradients = torch.randn(code.parts, 7, generator=generator)
    messages = honest_messages(code, gradients)
    missing = torch.zeros(workers, dtype=torch.bool)
    missing[[3, workers - 1]] = True
    messages[missing] = torch.nan
    if adversaries == 2:
        messages[0] = 5
    out = draco_ext.decode(messages, code, missing=missing)
    assert not out.failed
    assert out.suspects.nonzero().flatten().tolist() == ([0] if adversaries == 2 else [])
    torch.testing.assert_close(out.gradient, gradients.mean(0))
    missing[:3] = True
    assert draco_ext.decode(messages, code, missing=missing).failed == (adversaries == 1)


def test_messages_and_other_arguments():
    code = ByzShieldCode(9, 1)
    gradients = torch.randn(3, 4)
    assert code.message_length(4) == 12
    out = torch.empty(12)
    assert code.encode(0, gradients, out=out) is out
    assert torch.equal(out, code.encode(0, gradients))
    with pytest.raises(ValueError, match="gradients must have 3 rows, one for each part, got 2"):
        code.encode(0, gradients[:2])
    with pytest.raises(ValueError, match=r"part must be one of worker 0, \(0, 5, 7\), got 1"):
        code.encode_add_(out, out, torch.ones(4), 0, 1, first=True)
    with pytest.raises(ValueError, match="message must have 15 elements, got 12"):
        code.encode_add_(out, out, torch.ones(5), 0, 0, first=True)
    messages = torch.randn(9, 12)
    with pytest.raises(ValueError, match="messages must have 3 gradients in a row, got 11 columns"):
        draco_ext.decode(messages[:, :11], code)
    with pytest.raises(ValueError, match="length must be from 4 to 4, got 12"):
        draco_ext.decode(messages, code, length=12)
    with pytest.raises(ValueError, match="out must have 4 elements, got 12"):
        draco_ext.decode(messages, code, out=torch.empty(12))
    with pytest.raises(ValueError, match="out must not share memory with messages"):
        draco_ext.decode(messages, code, out=messages[0, :4])
    total = torch.empty(4)
    decoded = draco_ext.decode(honest_messages(code, torch.ones(9, 4)), code, reduction="sum", out=total)
    assert decoded.gradient is total
    assert total.tolist() == [9.0] * 4

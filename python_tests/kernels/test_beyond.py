"""The second stage of the repetition code: every set of bad workers, also more than the vote can correct."""

import itertools
import math

import pytest
import torch
from conftest import attacked, honest_messages, named, on
from torch._subclasses.fake_tensor import FakeTensorMode

import draco_ext
from draco_ext import RepetitionCode, ops, reference
from draco_ext.codes.robust import robust_mean

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SMALL = [
    RepetitionCode(3, 0, beyond="median"),
    RepetitionCode(6, 0, beyond="median"),
    RepetitionCode(7, 0, beyond="trimmed-mean", trim=2),
    RepetitionCode(9, 1, beyond="median"),
    pytest.param(RepetitionCode(9, 1, beyond="trimmed-mean"), marks=pytest.mark.long),
    pytest.param(RepetitionCode(10, 1, beyond="median"), marks=pytest.mark.long),
    pytest.param(RepetitionCode(12, 1, beyond="median"), marks=pytest.mark.long),
]
LARGE = RepetitionCode(15, 1, beyond="median")  # of whose workers there are 32768 sets


def every_set(workers):
    return itertools.chain.from_iterable(itertools.combinations(range(workers), size) for size in range(workers + 1))


def corrupted(code, bad):
    """The groups in which more than s are bad."""
    return [g for g, members in enumerate(code.replica_groups) if len(set(members) & set(bad)) > code.adversaries]


def check_between(gradient, gradients, where):
    assert (gradient >= gradients.min(0).values).all(), where
    assert (gradient <= gradients.max(0).values).all(), where


def with_room(winners):
    """The rows with the one more that a median uses."""
    return torch.cat([winners, torch.empty_like(winners[:1])])


@pytest.mark.parametrize("code", SMALL, ids=repr)
@pytest.mark.parametrize("attack", ["collude", "gaussian", "nan", "inf", "huge", "one-minus-inf"])
def test_every_set_of_bad_workers_is_bounded_or_fails(code, attack, device, simt, generator):
    """Colluders, and each in its own way: gradients are between those of the groups that are not corrupted."""
    if simt and code.workers > 6:
        pytest.skip("left to the faster devices")
    check_every_set(code, attack, device, generator)


@pytest.mark.long
def test_every_set_of_fifteen_workers_is_bounded_or_fails(device, generator):
    """Against colluders; the other attacks are those of twelve."""
    check_every_set(LARGE, "collude", device, generator)


def check_every_set(code, attack, device, generator):
    gradients = torch.randn(code.parts, 5, generator=generator)
    messages = honest_messages(code, gradients)
    clean = on(device, draco_ext.decode, messages, code)
    for bad in every_set(code.workers):
        sent = attacked(messages, bad, attack, generator)
        out = on(device, draco_ext.decode, sent, code)
        groups, where = corrupted(code, bad), f"{code!r} bad={bad} attack={attack}"
        assert out.bounded
        if len(groups) > code.corruptible:
            assert not out.failed or out.gradient.isnan().all(), where
            continue
        assert not out.failed, where
        if not groups:
            assert torch.equal(out.gradient, clean.gradient), where
        others = [g for g in range(code.parts) if g not in groups]
        check_between(out.gradient, gradients[others], where)
        for g in others:  # here suspects are exactly the bad ones
            assert named(out.suspects) & set(code.replica_groups[g]) == set(bad) & set(code.replica_groups[g]), where


def test_the_median_breaks_with_one_corrupted_group_more():
    """The bound on the number of groups is not a pessimistic one."""
    code = RepetitionCode(15, 1, beyond="median")
    messages = honest_messages(code, torch.arange(5.0)[:, None].expand(5, 4).contiguous())
    for groups in (2, 3):
        sent = messages.clone()
        for members in code.replica_groups[:groups]:
            sent[list(members[:2])] = 1e6
        out = draco_ext.decode(sent, code)
        assert not out.failed
        assert out.gradient.tolist() == [4.0 if groups == 2 else 1e6] * 4
        # The honest member of a group that colluders have won differs from the group's winner.
        assert named(out.suspects) == {members[2] for members in code.replica_groups[:groups]}


@pytest.mark.parametrize("beyond", ["median", "trimmed-mean"])
def test_groups_without_a_majority_are_left_out(beyond, device, generator):
    code = RepetitionCode(15, 1, beyond=beyond, trim=2 if beyond == "trimmed-mean" else None)
    gradients = torch.randn(5, 50, generator=generator)
    sent = honest_messages(code, gradients)
    for split in range(1, 5):
        members = code.replica_groups[split - 1]
        sent[members[1]] += 1
        sent[members[2]] -= 1
        out = on(device, draco_ext.decode, sent, code)
        if split > 2:
            assert out.failed
            assert out.gradient.isnan().all()
            with pytest.raises(draco_ext.DecodingError, match=r"more parts have no majority .* \(2 of 5\)"):
                out.raise_if_failed()
            continue
        assert not out.failed
        assert not out.suspects.any()
        assert named(out.left_out) == {j for each in code.replica_groups[:split] for j in each}
        lost = torch.arange(5) < split
        expected = reference.robust_mean(gradients, lost, code.trim)
        torch.testing.assert_close(out.gradient.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_median_holds_with_lost_and_won_groups_together():
    """With e groups without a majority and c won by colluders it holds while 2c + e < G."""
    code = RepetitionCode(21, 1, beyond="median")
    gradients = torch.arange(7.0)[:, None].expand(7, 3).contiguous()
    for lost, won in itertools.product(range(4), range(7)):
        sent = honest_messages(code, gradients)
        for members in code.replica_groups[:lost]:
            sent[list(members)] = torch.tensor([[1e6], [2e6], [3e6]])
        for members in code.replica_groups[lost : lost + won]:
            sent[list(members[:2])] = -torch.inf
        if 2 * won + lost < 7:
            out = draco_ext.decode(sent, code)
            assert not out.failed
            check_between(out.gradient, gradients[lost + won :], (lost, won))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [3, 4, 5, 6, *(pytest.param(n, marks=pytest.mark.long) for n in (7, 8, 9))])
@pytest.mark.parametrize("finite", [True, False])
def test_robust_mean_matches_reference(finite, count, dtype, device, simt, generator):
    """Every set of lost rows, with -0, and with NaN and infinities."""
    winners = torch.randn(count, 40001 if count == 5 and not simt else 37, generator=generator).to(dtype)
    winners[0, 1::5], winners[1, 1::5] = -0.0, 0.0
    if not finite:
        winners[0, ::5], winners[0, 1::7], winners[0, 2::9] = torch.nan, -torch.inf, torch.inf
        winners[count - 1, ::6] = torch.inf
    for trim in (None, *range(1, (count - 1) // 2 + 1)):
        for lost in itertools.product([False, True], repeat=count):
            lost = torch.tensor(lost)
            out = torch.empty_like(winners[0]).to(device)
            robust_mean(with_room(winners).to(device), lost.to(device), trim, factor=1, out=out)
            expected = reference.robust_mean(winners, lost, trim)
            tolerance = 4 * torch.finfo(dtype).eps
            torch.testing.assert_close(
                out.cpu().double(), expected, rtol=tolerance, atol=tolerance, equal_nan=True, msg=f"{trim} {lost}"
            )
            if winners.size(1) > 1000 and lost.sum() > 1:
                break


def test_middle_of_large_and_of_denormal_values():
    largest, tiny = torch.finfo(torch.float32).max, 1e-45
    winners = torch.tensor([[largest, tiny, 0.0], [largest, tiny, tiny], [largest, tiny, -0.0], [largest, tiny, 0.0]])
    for trim in (None, 1):
        out = torch.empty(3)
        robust_mean(with_room(winners), torch.zeros(4, dtype=torch.bool), trim, factor=1, out=out)
        assert out.tolist() == [largest, winners[0, 1].item(), 0.0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_clean_messages(dtype, device, generator):
    """The median of the groups, not their mean, also if nobody is bad."""
    code = RepetitionCode(15, 1, beyond="median")
    gradients = torch.randn(5, 33, generator=generator).to(dtype)
    messages = honest_messages(code, gradients)
    out = on(device, draco_ext.decode, messages, code)
    assert torch.equal(out.gradient, gradients.median(0).values)
    assert out.bounded
    assert not out.suspects.any()
    assert not draco_ext.decode(messages, RepetitionCode(15, 1)).bounded
    target = torch.empty(33, dtype=dtype)
    total = draco_ext.decode(messages, code, reduction="sum", out=target)
    assert total.gradient is target
    torch.testing.assert_close(target, 5 * gradients.median(0).values)


def test_missing_workers(device, generator):
    """A group that is missing altogether is left out; of others as many as before may be missing."""
    code = RepetitionCode(9, 1, beyond="median")
    gradients = torch.randn(3, 20, generator=generator)
    messages = honest_messages(code, gradients)
    missing = torch.zeros(9, dtype=torch.bool)
    missing[[0, 1, 2, 4, 7, 8]] = True
    messages[missing] = torch.nan
    out = on(device, draco_ext.decode, messages, code, missing=missing)
    assert not out.failed
    assert not out.left_out.any()
    torch.testing.assert_close(out.gradient, gradients[1:].mean(0))
    missing[[3, 5]] = True
    assert on(device, draco_ext.decode, messages, code, missing=missing).failed


def test_tolerance(generator):
    code = RepetitionCode(9, 1, beyond="median")
    gradients = torch.randn(3, 20, generator=generator)
    messages = honest_messages(code, gradients)
    messages *= 1 + 1e-6 * torch.randn(messages.shape, generator=generator)
    assert draco_ext.decode(messages, code).failed
    messages[0] = 100
    out = draco_ext.decode(messages, code, rtol=1e-4)
    assert not out.failed
    assert named(out.suspects) == {0}
    torch.testing.assert_close(out.gradient, gradients.median(0).values, rtol=1e-4, atol=1e-6)


def test_it_does_not_wait_for_the_device():
    """On fake tensors nothing can be asked of a value."""
    code = RepetitionCode(9, 1, beyond="trimmed-mean")
    with FakeTensorMode():
        out = draco_ext.decode(torch.empty(9, 100), code, missing=torch.zeros(9, dtype=torch.bool))
    assert out.gradient.shape == (100,)
    assert out.failed.shape == ()


def test_compiled(generator):
    code = RepetitionCode(9, 1, beyond="median")
    messages = honest_messages(code, torch.randn(3, 40, generator=generator))

    def decoded(messages):
        out = draco_ext.decode(messages, code)
        return out.gradient, out.failed

    gradient, failed = torch.compile(decoded, fullgraph=True, backend="aot_eager")(messages)
    assert torch.equal(gradient, draco_ext.decode(messages, code).gradient)
    assert not failed


def test_arguments():
    assert RepetitionCode(9, 1).beyond == "fail"
    assert RepetitionCode(9, 1).corruptible == 0
    assert repr(RepetitionCode(9, 1)) == "RepetitionCode(workers=9, adversaries=1)"
    code = RepetitionCode(27, 1, beyond="trimmed-mean")
    assert code.corruptible == 2
    assert repr(code) == "RepetitionCode(workers=27, adversaries=1, beyond='trimmed-mean')"
    assert RepetitionCode(27, 1, beyond="median").corruptible == 4
    assert code != RepetitionCode(27, 1)
    assert code.error_bound(torch.float32) == math.inf
    assert RepetitionCode(9, 1).error_bound(torch.float32) == 0
    for error, match, arguments in (
        (ValueError, "beyond must be 'fail', 'median' or 'trimmed-mean', got 'mean'", {"beyond": "mean"}),
        (ValueError, "beyond must be 'fail', 'median' or 'trimmed-mean', got int", {"beyond": 1}),
        (ValueError, "trim must be left out with beyond='median', got 1", {"beyond": "median", "trim": 1}),
        (ValueError, "trim must be left out with beyond='fail', got 1", {"trim": 1}),
        (ValueError, "trim must be from 1 to 1, got 2", {"beyond": "trimmed-mean", "trim": 2}),
        (TypeError, "trim must be an int, got float", {"beyond": "trimmed-mean", "trim": 1.0}),
    ):
        with pytest.raises(error, match=match):
            RepetitionCode(9, 1, **arguments)
    with pytest.raises(ValueError, match="beyond must be 'fail' with fewer than 3 parts, got 'median' with 2"):
        RepetitionCode(6, 1, beyond="median")
    code, messages = RepetitionCode(9, 1, beyond="median"), torch.zeros(9, 4)
    with pytest.raises(ValueError, match="messages must have a row for each of the 9 workers"):
        draco_ext.decode(messages[:8], code)
    with pytest.raises(ValueError, match="out must not share memory with messages"):
        draco_ext.decode(messages, code, out=messages[0])
    with pytest.raises(ValueError, match="missing must have 9 entries, got 3"):
        draco_ext.decode(messages, code, missing=torch.zeros(3, dtype=torch.bool))
    with pytest.raises(TypeError, match="messages must have dtype"):
        draco_ext.decode(messages.int(), code)


def test_a_nan_does_not_spread():
    """With s = 0 every message is a winner, and NaN is an extreme value."""
    code = RepetitionCode(5, 0, beyond="median")
    messages = torch.tensor([[1.0], [2.0], [3.0], [torch.nan], [torch.inf]])
    assert draco_ext.decode(messages, code).gradient.item() == 3
    assert ops.majority_vote(messages, (1,) * 5, 0)[0].isnan()

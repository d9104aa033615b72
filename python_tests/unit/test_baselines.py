"""The baselines against literal or independent implementations."""

import math

import numpy as np
import pytest
import torch

from draco_ext import baselines
from draco_ext.baselines import AGGREGATORS

DTYPES = [torch.float32, torch.float64]
ROBUST = [name for name in AGGREGATORS if name != "mean"]
GEOMETRIC = [baselines.geometric_median, baselines.geometric_median_gram]


def normal(n, d, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)


def gradients(n, d, bad=0, seed=0, dtype=torch.float64):
    """Noisy copies of one vector, the first few reversed, and the mean without them."""
    messages = normal(1, d, seed, dtype) + 0.5 * normal(n, d, seed + 1, dtype)
    honest = messages[bad:].mean(0)
    messages[:bad] *= -100
    return messages, honest


def test_names():
    assert list(AGGREGATORS) == [
        "mean",
        "coordinate-median",
        "trimmed-mean",
        "krum",
        "multi-krum",
        "geometric-median",
        "geometric-median-gram",
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", AGGREGATORS)
def test_contract(name, dtype):
    rule = AGGREGATORS[name]
    messages, _ = gradients(9, 50, dtype=dtype)
    before = messages.clone()
    result = rule(messages, 2)
    assert result.shape == (50,)
    assert result.dtype == dtype
    assert torch.equal(messages, before)
    assert result.untyped_storage().data_ptr() != messages.untyped_storage().data_ptr()

    wide = torch.zeros(9, 80, dtype=dtype)
    wide[:, :50] = messages
    torch.testing.assert_close(rule(wide[:, :50], 2), result)
    assert rule(messages[:, :0], 2).shape == (0,)
    torch.testing.assert_close(rule(messages[:1].expand(9, 50).clone(), 2), messages[0])


@pytest.mark.parametrize("name", AGGREGATORS)
def test_order_of_workers_does_not_matter(name):
    messages, _ = gradients(11, 40, bad=2)
    order = torch.randperm(11, generator=torch.Generator().manual_seed(3))
    rule = AGGREGATORS[name]
    torch.testing.assert_close(rule(messages[order], 2), rule(messages, 2))


@pytest.mark.parametrize("name", ROBUST)
@pytest.mark.parametrize("n", [9, 10, 45])
def test_bounds_the_damage_but_is_not_exact(name, n):
    messages, honest = gradients(n, 3000, bad=3)
    error = (AGGREGATORS[name](messages, 3) - honest).norm() / honest.norm()
    assert 1e-4 < error < 1
    assert (baselines.mean(messages) - honest).norm() > 5 * honest.norm()


@pytest.mark.parametrize("name", ["krum", "multi-krum", "geometric-median", "geometric-median-gram"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e30])
def test_a_message_that_is_not_finite_is_left_out(name, value):
    messages, _ = gradients(9, 60, dtype=torch.float32)
    messages[4, 7] = value
    result = AGGREGATORS[name](messages, 1)
    assert result.isfinite().all()
    assert (result - messages[0]).norm() < 2 * messages[0].norm()


@pytest.mark.parametrize("rule", GEOMETRIC)
def test_geometric_median_of_nothing_finite_is_nan(rule):
    assert rule(torch.full((3, 4), math.nan)).isnan().all()


@pytest.mark.parametrize("n", range(1, 20))
def test_coordinate_median_and_trimmed_mean_against_sorting(n):
    messages = normal(n, 70, seed=n)
    messages[:, :10] = messages[:, :10].round()  # ties
    messages[n // 2, 20:30] = math.inf
    ordered = messages.sort(dim=0).values
    expected = np.median(messages.numpy(), axis=0)
    np.testing.assert_allclose(baselines.coordinate_median(messages).numpy(), expected)
    for adversaries in range((n - 1) // 2 + 1):
        torch.testing.assert_close(
            baselines.trimmed_mean(messages, adversaries),
            ordered[adversaries : n - adversaries].mean(0),
        )


def test_coordinate_rules_work_across_tiles(monkeypatch):
    monkeypatch.setattr(baselines.averages, "_TILE", 16)
    messages = normal(7, 50)
    torch.testing.assert_close(baselines.coordinate_median(messages), messages.median(0).values)


def test_nan_spreads_in_its_coordinate_only():
    messages = normal(5, 4)
    messages[3, 2] = math.nan
    for result in (
        baselines.coordinate_median(messages),
        baselines.trimmed_mean(messages, 1),
    ):
        assert result.isnan().tolist() == [False, False, True, False]


def literal_krum_scores(messages, adversaries):
    n = len(messages)
    scores = []
    for i in range(n):
        squares = sorted(float(((messages[i] - messages[j]) ** 2).sum()) for j in range(n) if j != i)
        scores.append(sum(squares[: n - adversaries - 2]))
    return scores


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "adversaries"), [(4, 0), (5, 1), (9, 3), (12, 2), (45, 5)])
def test_krum_against_a_literal_loop(n, adversaries, dtype):
    for seed in range(5):
        messages, _ = gradients(n, 30, bad=adversaries, seed=seed, dtype=dtype)
        order = np.argsort(literal_krum_scores(messages.double(), adversaries), kind="stable")
        assert torch.equal(baselines.krum(messages, adversaries), messages[order[0]])
        for selected in (1, 2, n - adversaries):
            torch.testing.assert_close(
                baselines.multi_krum(messages, adversaries, selected=selected),
                messages[order[:selected].copy()].mean(0),
            )
        default = baselines.multi_krum(messages, adversaries)
        best = order[: n - adversaries - 2].copy()
        torch.testing.assert_close(default, messages[best].mean(0))


@pytest.mark.parametrize("rule", GEOMETRIC)
@pytest.mark.parametrize(("n", "d"), [(3, 2), (5, 1), (8, 3), (15, 6)])
def test_geometric_median_against_scipy(rule, n, d):
    optimize = pytest.importorskip("scipy.optimize")
    messages = normal(n, d, seed=n)

    def total_distance(point):
        return (messages - torch.as_tensor(point)).norm(dim=1).sum().item()

    best = min(
        optimize.minimize(
            total_distance,
            start,
            method="Nelder-Mead",
            options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 20000, "maxfev": 20000},
        ).fun
        for start in [messages.mean(0).numpy(), messages.median(0).values.numpy()]
    )
    found = total_distance(rule(messages, iterations=5000, tolerance=1e-12))
    assert found == pytest.approx(best, rel=1e-6)
    assert total_distance(rule(messages)) == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "bad"), [(1, 0), (2, 0), (7, 0), (7, 3), (45, 5)])
def test_both_geometric_medians_agree(n, bad, dtype):
    messages, honest = gradients(n, 2000, bad=bad, dtype=dtype)
    one, other = (rule(messages) for rule in GEOMETRIC)
    assert (one - other).norm() <= 1e-5 * honest.norm()


@pytest.mark.parametrize("rule", GEOMETRIC)
def test_geometric_median_stays_at_the_point_of_a_majority(rule):
    messages = normal(9, 20)
    messages[:5] = messages[0]
    assert (rule(messages) - messages[0]).norm() < 1e-4 * messages[0].norm()


@pytest.mark.parametrize("rule", GEOMETRIC)
def test_geometric_median_scales_with_the_messages(rule):
    messages, _ = gradients(9, 30, bad=2)
    torch.testing.assert_close(rule(messages * 1e-9), rule(messages) * 1e-9, rtol=1e-6, atol=0)
    assert torch.equal(rule(torch.zeros(4, 3)), torch.zeros(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group_size", [1, 3, 5])
def test_vote_names_who_differs(dtype, group_size):
    parts = normal(3, 25, dtype=dtype)
    messages = parts.repeat_interleave(group_size, dim=0)
    expected = parts[0] + parts[1] + parts[2]
    expected = expected.div(3)
    for bad in range((group_size - 1) // 2 + 1):
        wrong = [1 + group_size + i for i in range(bad)]
        sent = messages.clone()
        sent[wrong, 3] = math.nan if bad == 1 else -0.5
        gradient, suspects = baselines.vote_torch(sent, group_size)
        assert torch.equal(gradient, expected)
        assert suspects.nonzero().flatten().tolist() == wrong


def test_vote_compares_bits():
    messages = torch.zeros(3, 4)
    messages[1] = -0.0
    assert baselines.vote_torch(messages, 3)[1].tolist() == [False, True, False]
    messages = torch.full((3, 4), math.nan)
    assert not baselines.vote_torch(messages, 3)[1].any()


def test_vote_needs_a_majority():
    messages = torch.zeros(6, 2)
    messages[3:] = torch.arange(3.0)[:, None]
    with pytest.raises(ValueError, match=r"majority in group \[3, 4, 5\]"):
        baselines.vote_torch(messages, 3)


@pytest.mark.parametrize("name", AGGREGATORS)
@pytest.mark.parametrize(
    ("messages", "error", "words"),
    [
        ([[1.0]], TypeError, "messages must be a Tensor, got list"),
        (torch.zeros(5, 3, dtype=torch.int32), TypeError, "messages must have dtype float32"),
        (torch.zeros(5, 3, dtype=torch.float16), TypeError, "messages must have dtype float32"),
        (torch.zeros(5), ValueError, r"messages must have 2 dimension\(s\), got shape \(5,\)"),
        (torch.zeros(0, 3), ValueError, "messages must have at least one row"),
    ],
    ids=["list", "integers", "half", "vector", "no rows"],
)
def test_bad_messages(name, messages, error, words):
    with pytest.raises(error, match=words):
        AGGREGATORS[name](messages, 1)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda m: baselines.trimmed_mean(m, 3), ValueError, "at least .* = 7 rows"),
        (lambda m: baselines.trimmed_mean(m, -1), ValueError, "adversaries must be at least 0"),
        (lambda m: baselines.krum(m, 2), ValueError, "at least .* = 7 rows"),
        (lambda m: baselines.krum(m, 1.0), TypeError, "adversaries must be an int, got float"),
        (lambda m: baselines.multi_krum(m, 1, 6), ValueError, "selected must be from 1 to 5"),
        (lambda m: baselines.geometric_median(m, iterations=0), ValueError, "iterations must be"),
        (
            lambda m: baselines.geometric_median_gram(m, tolerance=-1.0),
            ValueError,
            "tolerance must be finite and at least 0",
        ),
        (
            lambda m: baselines.geometric_median(m, smoothing=math.nan),
            ValueError,
            "smoothing must be finite and at least 0",
        ),
        (lambda m: baselines.vote_torch(m, 4), ValueError, "group_size must divide the 6"),
        (lambda m: baselines.vote_torch(m, 0), ValueError, "group_size must be at least 1"),
    ],
)
def test_bad_arguments(call, error, words):
    with pytest.raises(error, match=words):
        call(torch.zeros(6, 3))

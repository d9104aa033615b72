"""docs/guarantee.md, attacked: what s workers can do at worst who know the code, its decoder and all honest messages.

They do not know the projections, which are drawn afterwards. --long makes more trials, and
--hypothesis-profile=thorough many times as many.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from conftest import ATTACKS, attacked, honest_messages, named, relative_error

import draco_ext
from draco_ext import CyclicCode, RepetitionCode, SolonCode, ops, reference
from draco_ext.codes.cyclic import _coefficients


@pytest.fixture
def trials(request):
    """How many trials to make: one of three numbers."""
    options = request.config
    thorough = options.getoption("--hypothesis-profile") == "thorough"
    return lambda quick, long, most: most if thorough else long if options.getoption("--long") else quick


def random_gradients(code, d, dtype, generator):
    return torch.randn(code.parts, d, generator=generator, dtype=torch.float64).to(dtype)


TINY = {torch.float32: 1.7e-36, torch.float64: 1.5e-45}  # docs/guarantee.md: t


def error_in_bounds(out, gradients):
    """The error of a decoded mean in the unit of Code.error_bound."""
    mean = gradients.double().mean(0)
    least = TINY[gradients.dtype] * math.sqrt(gradients.numel())
    size = math.hypot(gradients.double().norm().item(), least)
    return (out.gradient.double() - mean).norm().item() / (size / len(gradients))


# ---------------------------------------------------------------------------------------------------- the bound


def test_weights_amplify_no_more_than_the_bound_says():
    """All sets of at most 2s erased workers, for n <= 10."""
    for n in range(1, 11):
        for s in range((n - 1) // 2 + 1):
            largest = [0.0] * (2 * s + 1)
            for size in range(2 * s + 1):
                for erased in itertools.combinations(range(n), size):
                    weights = reference.decoding_weights(n, s, erased)
                    largest[size] = max(largest[size], float(np.linalg.norm(weights)) / math.sqrt(n))
                assert largest[size] <= math.sqrt(math.comb(2 * size, size)) * (1 + 1e-9), f"n={n} s={s} erased={size}"
            assert largest == sorted(largest)


def test_weights_of_blocks_amplify_no_more_than_the_bound_says():
    """All sets of at most 2s erased workers, for n <= 9, of every block."""
    tight = 0.0
    cases = [(n, s, k) for n in range(2, 10) for s in range(4) for k in range(2, n - 2 * s + 1)]
    for n, s, k in cases:
        for block, moment in enumerate(SolonCode(n, s, k).moments):
            gap = block if moment <= 0 else block - (k + 1) // 2
            for size in range(2 * s + 1):
                bound = np.linalg.norm(_coefficients(size, gap))
                for erased in itertools.combinations(range(n), size):
                    weights = reference.decoding_weights(n, s, erased, int(moment))
                    amplified = float(np.linalg.norm(weights)) / math.sqrt(n)
                    assert amplified <= bound * (1 + 1e-9), f"n={n} s={s} k={k} block {block} erased={erased}"
                    tight = max(tight, amplified / bound if gap > 0 and size > 0 else 0.0)
    assert tight > 0.5, "the bound has become far too loose"


def test_small_ball(trials):
    """A sum with the projection's weights is small no more often than the bound assumes; near it for two elements."""
    seeds = trials(400, 800, 4000)
    for pattern in ({0: 1.0}, {0: 1.0, 2: -1.0}, {0: 1.0, 2: 1.0, 4: -1.0}, {2 * i: 1.0 for i in range(50)}):
        message = torch.zeros(1, 128)
        for place, value in pattern.items():
            message[0, place] = value
        norm = message.norm().item() * reference.PHI_SCALE[torch.float32]
        sums = torch.stack([ops.cyclic_project(message, seed)[0].abs() for seed in range(seeds)]).flatten()
        for x in (0.1, 0.2, 0.3):
            share = (sums <= x * norm).double().mean().item()
            assert share <= 2 * x + 4 * math.sqrt(x / len(sums)), f"{pattern} {x}: {share}"
            if len(pattern) == 2:
                assert share >= 0.8 * x, f"{pattern} {x}: {share}"


def test_bound_follows_its_arguments():
    code = CyclicCode(9, 2)
    assert 1e-5 < code.error_bound(torch.float32, length=100) < 1e-2
    assert code.error_bound(torch.float64) < 1e-7 * code.error_bound(torch.float32)
    assert code.error_bound(torch.float32, length=100) < code.error_bound(torch.float32)
    assert code.error_bound(torch.float32) == code.error_bound(torch.float32, length=4 * ops.TILE + 2)
    likelier = [code.error_bound(torch.float32, probability=p) for p in (1e-9, 1e-6, 1e-3, 1.0)]
    assert likelier == sorted(likelier, reverse=True)
    sizes = [CyclicCode(21, s).error_bound(torch.float32) for s in range(4)]
    assert sizes == sorted(sizes)
    assert CyclicCode(7, 0).error_bound(torch.float32) < 1e-5
    for dtype in ops.VOTE_DTYPES:
        assert RepetitionCode(9, 1).error_bound(dtype) == 0


@pytest.mark.parametrize(
    ("n", "s", "float32", "float64"),
    [(3, 1, 0.00057891, 3.35846e-12), (9, 2, 0.00382509, 2.38338e-11), (15, 3, 0.0145475, 9.65024e-11)],
)
def test_bound_is_that_of_the_table(n, s, float32, float64):
    """Of docs/guarantee.md, with more digits: a factor that slips is still a bound, but not the one derived there."""
    assert CyclicCode(n, s).error_bound(torch.float32, length=100) == pytest.approx(float32, rel=1e-4)
    assert CyclicCode(n, s).error_bound(torch.float64, length=100) == pytest.approx(float64, rel=1e-4)


@pytest.mark.parametrize(
    ("dtype", "floor", "sizes"),
    [
        (torch.float32, 2e-43, (1e-44, 3.1e-43, 1e-42, 1e-40, 1e-36, 1e-35)),
        (torch.float64, 1e-60, (1e-70, 1e-60, 1e-58, 1e-50, 1e-45, 1e-44)),
    ],
    ids=["float32", "float64"],
)
def test_bound_of_tiny_gradients(dtype, floor, sizes):
    """The smallest case: three workers, one pair of elements, one of them wrong in it by a bit or a sign or more.

    No weight of a projection is below 3/7 of its root mean square, so what passes is certain: 6 times the noise in a
    check, from sqrt(3) times that in the message, of which the mean has a third. Above, the worker is left out.
    """
    code = CyclicCode(3, 1)
    hidden, largest = 6 * 7 / 3 * floor * math.sqrt(2) / math.sqrt(3), 0.0
    for size in sizes:
        gradients = torch.full((3, 2), size, dtype=torch.float64).to(dtype)
        relative = {torch.float32: 2.0**-23, torch.float64: 2.0**-53 * math.sqrt(39)}[dtype]
        passes = math.hypot(hidden, 24 / math.sqrt(3) * relative * gradients[0].double().norm().item())
        sent = honest_messages(code, gradients)
        honest = sent[0].clone()
        for error in [-2 * size, *(floor * 2.0**k for k in range(-3, 12))]:
            sent[0] = (honest.double() + error).to(dtype)
            for seed in range(10):
                out = draco_ext.Decoded(*ops.cyclic_decode(sent, 1, seed=seed), code)
                assert not out.failed
                assert error_in_bounds(out, gradients) <= code.error_bound(dtype, length=2), f"{size} {error}"
                wrong = (out.gradient.double() - gradients[0].double()).norm().item()
                assert wrong <= passes, f"{size} {error}"
                if size < 100 * floor:
                    largest = max(largest, wrong)
    assert largest > hidden / 5, "the floor has become lower: docs/guarantee.md says more than is needed"


@pytest.mark.parametrize("code", [CyclicCode(7, 2), RepetitionCode(6, 1)], ids=str)
def test_bound_rejects(code):
    for arguments, error, words in (
        ({"dtype": torch.int32}, TypeError, "dtype must be float32"),
        ({"dtype": "float32"}, TypeError, "dtype must be float32"),
        ({"length": 1.5}, TypeError, "length must be an int, got float"),
        ({"length": -1}, ValueError, "length must be at least 0, got -1"),
        ({"probability": 0}, ValueError, "probability must be above 0 and at most 1, got 0"),
        ({"probability": 1.1}, ValueError, "got 1.1"),
        ({"probability": math.nan}, ValueError, "got nan"),
        ({"probability": "no"}, TypeError, "probability must be a float, got str"),
        ({"probability": True}, TypeError, "probability must be a float, got bool"),
    ):
        with pytest.raises(error, match=words):
            code.error_bound(**{"dtype": torch.float32, **arguments})


# ------------------------------------------------------------------------------------------- adaptive adversaries


def weak_direction(code, bad, kind, rng):
    """(bad,) complex: errors that show little in the syndromes, for what they do to the gradient or for their size."""
    n, s = code.workers, code.adversaries
    powers = np.outer(np.arange(1, 2 * s + 1), bad) % n
    checks = np.exp(2j * np.pi * powers / n) / math.sqrt(n)
    gram = checks.conj().T @ checks + 1e-14 * np.eye(len(bad))
    if kind == "most damage":  # to the gradient, or to one of its blocks
        moment = rng.choice(code.moments) if code.blocks > 1 else 0
        error = np.linalg.solve(gram, np.exp(-2j * np.pi * (np.array(bad) * moment % n) / n))
    elif kind == "near-codeword":
        error = np.linalg.eigh(gram)[1][:, 0]
    else:  # one of the weak ones
        error = np.linalg.solve(gram, rng.standard_normal(len(bad)) + 1j * rng.standard_normal(len(bad)))
    return error / np.linalg.norm(checks @ error)


def misplace(messages, bad, error, columns, size):
    """The messages plus size * error in each pair of `columns`, times the pair's factor."""
    sent = messages.clone()
    pairs = torch.view_as_complex(sent.unflatten(1, (-1, 2)))
    for place, factor in columns.items():
        added = torch.from_numpy(size * factor * error).to(pairs.dtype)
        pairs[list(bad), place] += added
    return sent


def sets_of_bad(n, s, rng):
    """Neighbours, every other one, two clusters, anyone."""
    first = int(rng.integers(n))
    yield [(first + i) % n for i in range(s)]
    if 2 * s <= n:
        yield [(first + 2 * i) % n for i in range(s)]
    yield [(first + i + (i >= s // 2) * (n // 2)) % n for i in range(s)]
    yield rng.choice(n, s, replace=False).tolist()


class Search:
    """Looks for the messages of s bad workers that move the decoded gradient most, as an adversary at home would.

    It tries directions that show little, and climbs in size and in the direction itself as long as decodes go wrong by
    more than before; every decode draws its projections anew.
    """

    def __init__(self, code, d, dtype, seed):
        self.code, self.rng = code, np.random.default_rng(seed)
        generator = torch.Generator().manual_seed(seed)
        self.gradients = random_gradients(code, d, dtype, generator)
        self.honest = honest_messages(code, self.gradients)
        self.mean = self.gradients.double().mean(0)
        self.unit = torch.finfo(dtype).eps / 2
        self.worst = self.worst_in_bounds = 0.0
        self.decodes = self.failures = self.framed = 0

    def decode(self, sent, bad):
        """The decoded gradient's relative error, or 0 where decoding failed."""
        out = draco_ext.decode(sent, self.code)
        self.decodes += 1
        self.framed += not named(out.suspects) <= set(bad)
        if out.failed:
            self.failures += 1
            return 0.0
        error = relative_error(out.gradient, self.mean)
        self.worst_in_bounds = max(self.worst_in_bounds, error_in_bounds(out, self.gradients))
        self.worst = max(self.worst, error)
        return error

    def run(self, steps):
        code, rng, pairs = self.code, self.rng, self.honest.size(1) // 2
        norm = self.honest[0].double().norm().item()
        for bad in sets_of_bad(code.workers, code.adversaries, rng):
            for kind in ("most damage", "near-codeword", "weak"):
                error = weak_direction(code, bad, kind, rng)
                # One element, two that may cancel in a projection, in one chunk and in two, or many.
                for count, reach in ((1, 1), (2, 400), (2, pairs), (40, pairs)):
                    places = rng.choice(min(reach, pairs), min(count, reach, pairs), replace=False)
                    columns = {int(p): rng.choice([-1.0, 1.0]) / math.sqrt(count) for p in places}
                    size, reached = 8 * self.unit * norm, 0.0
                    for _ in range(steps):
                        nearby = error * (1 + 0.1 * rng.standard_normal(len(bad)))
                        step = float(rng.choice([0.5, 1.5, 4.0]))
                        now = self.decode(misplace(self.honest, bad, nearby, columns, size * step), bad)
                        if now > reached:
                            error, size, reached = nearby, size * step, now


ADAPTIVE = [
    (7, 2, 200),
    (15, 3, 1000),
    (64, 5, 1000),
    (15, 3, 2 * ops.TILE),
    pytest.param(64, 5, 5 * ops.TILE, marks=pytest.mark.long),
    (100, 10, 300),
    (255, 8, 300),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("n", "s", "d"), ADAPTIVE)
def test_adaptive_adversary(n, s, d, dtype, trials, generator):
    search = Search(CyclicCode(n, s), d, dtype, generator.initial_seed())
    search.run(steps=trials(1, 1 if n * d > 1e6 else 3, 60))
    told = (
        f"n={n} s={s} d={d} {dtype}: {search.decodes} decodes, worst error {search.worst:.1e}, "
        f"failed {search.failures}, honest accused {search.framed}"
    )
    print(told)
    probability = 1e-6
    assert search.worst_in_bounds <= search.code.error_bound(dtype, length=d, probability=probability), told
    if s <= 5:
        assert search.worst <= (1e-4 if dtype == torch.float32 else 1e-12), told
        assert search.failures <= 0.02 * search.decodes, told
    assert search.framed <= 0.01 * search.decodes, told
    assert search.worst > search.unit, "no attack did anything"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("n", "s", "k", "d"), [(9, 2, 4, 400), (15, 3, 4, 4000), (45, 5, 4, 2400), (64, 5, 8, 4000)])
def test_adaptive_adversary_and_short_messages(n, s, k, d, dtype, trials, generator):
    """The checks are those of the cyclic code; what is hidden from them moves blocks by more than the gradient."""
    search = Search(SolonCode(n, s, k), d, dtype, generator.initial_seed())
    search.run(steps=trials(1, 3, 60))
    told = (
        f"n={n} s={s} k={k} d={d} {dtype}: {search.decodes} decodes, worst error {search.worst:.1e}, "
        f"failed {search.failures}, honest accused {search.framed}"
    )
    print(told)
    assert search.worst_in_bounds <= search.code.error_bound(dtype, length=d // k, probability=1e-6), told
    assert search.worst <= (1e-3 if dtype == torch.float32 else 1e-11), told
    assert search.failures <= 0.02 * search.decodes, told
    assert search.framed <= 0.01 * search.decodes, told
    assert search.worst > search.unit, "no attack did anything"


@pytest.mark.parametrize(("n", "s"), [(64, 3), (64, 5)])
def test_neighbours_that_collude_have_no_honest_worker_named(n, s, trials, generator):
    """Their errors nearly cancel, so that other sets nearly explain them."""
    code, d, rng = CyclicCode(n, s), 1000, np.random.default_rng(generator.initial_seed())
    honest = honest_messages(code, random_gradients(code, d, torch.float32, generator))
    norm, some_named = honest[0].norm().item(), False
    for trial in range(trials(200, 200, 2000)):
        first = int(rng.integers(n))
        bad = [(first + i) % n for i in range(s)]
        error = weak_direction(code, bad, ("most damage", "near-codeword", "weak")[trial % 3], rng)
        size = (0.01, 0.1, 0.1, 4.0)[trial % 4] * norm / np.abs(error).max()
        sent = misplace(honest, bad, error, {trial % (d // 2): 1.0}, size)
        suspects = named(code.decode(sent, seed=trial).suspects)  # few trials name all: the same ones in every run
        assert suspects <= set(bad), f"trial {trial}: {suspects}, bad {bad}"
        some_named |= suspects == set(bad)
    assert some_named


def test_one_huge_one_tiny_and_different_sets_in_different_tiles(generator):
    code, d = CyclicCode(45, 5), 3 * ops.TILE
    gradients = random_gradients(code, d, torch.float32, generator)
    honest = honest_messages(code, gradients)
    mean = gradients.double().mean(0)
    for size in (1e-6, 1e-3, 1.0, 1e6):
        sent = honest.clone()
        sent[3] *= 1e25
        sent[[8, 9], : ops.TILE] += size * torch.randn(2, ops.TILE, generator=generator)
        sent[[20, 40], ops.TILE : 2 * ops.TILE] *= 1 + size
        out = draco_ext.decode(sent, code)
        assert not out.failed
        assert {3} <= named(out.suspects) <= {3, 8, 9, 20, 40}
        assert relative_error(out.gradient, mean) <= 1e-5, size


# ------------------------------------------------------------------------------------------ beyond the guarantee


def any_code(rng):
    s = int(rng.integers(1, 5))
    n = int(rng.integers(2 * s + 1, 24))
    return CyclicCode(n, s) if rng.integers(2) else RepetitionCode(n, s)


def test_beyond_s_it_fails_or_is_right(trials, generator):
    """s+1 .. n-1 bad workers, each wrong in its own way."""
    rng = np.random.default_rng(generator.initial_seed())
    told = {"right": 0, "failed": 0, "wrong": 0, "overflow": 0}
    alone = [name for name in ATTACKS if name not in ("collude", "constant", "zero", "nan", "inf", "low-bit")]
    for _ in range(trials(1000, 3000, 100_000)):
        code = any_code(rng)
        gradients = random_gradients(code, 2 * int(rng.integers(1, 45)), torch.float32, generator)
        honest = honest_messages(code, gradients)
        bad = rng.choice(code.workers, int(rng.integers(code.adversaries + 1, code.workers)), replace=False)
        sent = honest.clone()
        for j in bad.tolist():  # one by one: each has its own random numbers
            sent[j] = attacked(honest, [j], alone[rng.integers(len(alone))], generator)[j]
            sent[j] *= 1 + 0.1 * torch.rand(sent.size(1), generator=generator)
            sent[j] += torch.randn(sent.size(1), generator=generator)
        out = draco_ext.decode(sent, code)
        if out.failed:
            assert out.gradient.isnan().all()
            told["failed"] += 1
        elif out.gradient.isnan().all():
            told["overflow"] += 1  # more messages are not finite than may be bad
        else:
            right = relative_error(out.gradient, gradients.double().mean(0)) <= 1e-5
            told["right" if right else "wrong"] += 1
    print(told)
    assert told["wrong"] == 0, told
    assert told["failed"] > sum(told.values()) / 2, told


def test_honest_are_never_accused(trials, generator):
    """Sizes and scales from denormal to 1e30, layers of their own scale, one of zeros. At most 1e6 decodes."""
    rng = np.random.default_rng(generator.initial_seed())
    for trial in range(trials(50, 150, 25_000)):
        code = any_code(rng)
        dtype = ops.CYCLIC_DTYPES[trial % 2]
        gradients = random_gradients(code, int(rng.integers(1, 3000)) * 2, dtype, generator)
        layers = list(gradients.tensor_split(int(rng.integers(1, 6)), dim=1))
        for layer in layers:
            layer *= 10.0 ** rng.integers(-44, 31)
        layers[rng.integers(len(layers))].zero_()
        messages = honest_messages(code, gradients)
        for _ in range(40):  # the projections are new in each
            out = draco_ext.decode(messages, code)
            assert not out.suspects.any(), f"{code} trial {trial}"
            assert not out.failed, f"{code} trial {trial}"

"""What Audit draws, and the chances that it promises, by simulation and by enumeration.

Counts are compared with what chance gives, within 5 standard deviations: nearly every DRACO_SEED passes.
"""

import collections
import itertools
import math
import random
from fractions import Fraction

import pytest
from conftest import SEED

import draco_ext
from draco_ext import Audit


def assert_binomial(successes, trials, chance):
    """Assert that a count is one that a coin with this chance gives."""
    deviation = math.sqrt(trials * chance * (1 - chance))
    assert abs(successes - trials * chance) <= 5 * deviation, (successes, trials, chance)


def assert_uniform(drawn, values):
    """Assert that all of the values, and nothing else, were drawn equally often."""
    counts = collections.Counter(drawn)
    assert set(counts) <= set(values)
    for value in values:
        assert_binomial(counts[value], len(drawn), 1 / len(values))


def auditors(audit, part, shifts):
    return [(part - shift) % audit.workers for shift in shifts]


# ---------------------------------------------------------------------------------------------- arguments


def test_fields_may_be_positional():
    assert Audit(3, 1, 0.5) == Audit(workers=3, adversaries=1, rate=0.5)
    assert not isinstance(Audit(3, 1, 1), draco_ext.Code)
    with pytest.raises(AttributeError):
        Audit(3, 1, 1).rate = 0.5


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ((3.0, 1, 0.5), TypeError, "workers must be an int, got float"),
        ((3, True, 0.5), TypeError, "adversaries must be an int, got bool"),
        ((3, 1, "1%"), TypeError, "rate must be a number, got str"),
        ((3, 1, True), TypeError, "rate must be a number, got bool"),
        ((3, 0, 0.5), ValueError, "adversaries must be at least 1, got 0"),
        ((4, 2, 0.5), ValueError, r"workers must be at least 2 \* adversaries \+ 1 = 5, got 4"),
        ((3, 1, 0), ValueError, "rate must be above 0 and at most 1, got 0"),
        ((3, 1, 1.01), ValueError, "rate must be above 0 and at most 1, got 1.01"),
        ((3, 1, math.nan), ValueError, "rate must be above 0 and at most 1, got nan"),
    ],
)
def test_bad_fields(arguments, error, said):
    with pytest.raises(error, match=said):
        Audit(*arguments)


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda a: a.is_audited(0.0, 0), TypeError, "seed must be an int, got float"),
        (lambda a: a.is_audited(0, -1), ValueError, "step must be at least 0, got -1"),
        (lambda a: a.is_audited(0, 0, 0), ValueError, "passes must be at least 1, got 0"),
        (lambda a: a.shifts(-1, 0), ValueError, "seed must be at least 0, got -1"),
        (lambda a: a.shifts(0, 0, "abc"), TypeError, "hosts must be a sequence of str, got str"),
        (lambda a: a.shifts(0, 0, [0, 1, 2]), TypeError, "hosts must be a sequence of str, got an entry of type int"),
        (lambda a: a.shifts(0, 0, ["a"] * 4), ValueError, "hosts must have an entry for each of the 3 workers, got 4"),
        (lambda a: a.shifts(0, 0, avoid=1), TypeError, "avoid must be a collection of workers, got int"),
        (lambda a: a.shifts(0, 0, avoid=[3]), ValueError, "avoid's entries must be from 0 to 2, got 3"),
        (lambda a: a.expected_wrong_updates(2), ValueError, "trigger_chance must be from 0 to 1, got 2"),
        (lambda a: a.expected_wrong_updates(None), TypeError, "trigger_chance must be a number, got NoneType"),
        (lambda a: a.wrong_updates_quantile(1), ValueError, "level must be above 0 and below 1, got 1"),
        (lambda a: a.wrong_updates_quantile(0.9, passes=0), ValueError, "passes must be at least 1, got 0"),
        (lambda a: a.cost(-0.1), ValueError, "false_triggers must be from 0 to 1, got -0.1"),
        (lambda a: a.cost(0, 0), ValueError, "steps must be at least 1, got 0"),
    ],
)
def test_bad_arguments(call, error, said):
    with pytest.raises(error, match=said):
        call(Audit(3, 1, 0.5))


# ---------------------------------------------------------------------------------------------- the coin


@pytest.mark.parametrize(("rate", "passes"), [(0.008, 1), (0.1, 1), (0.5, 1), (0.008, 16)])
def test_the_coin_falls_at_the_rate(rate, passes):
    audit = Audit(3, 1, rate)
    fallen = sum(audit.is_audited(SEED, step, passes) for step in range(20_000))
    assert_binomial(fallen, 20_000, rate * passes)


@pytest.mark.parametrize("seed", range(5))
def test_the_first_steps_are_audited_at_any_rate(seed):
    audit = Audit(3, 1, 1e-12)
    assert [step for step in range(1000) if audit.is_audited(seed, step)] == [0, 1]
    assert [step for step in range(3) if audit.covers_all(step)] == [0]
    assert all(Audit(3, 1, 1).covers_all(step) for step in range(3))


def test_every_step_is_audited_at_a_rate_of_1():
    assert all(Audit(3, 1, 1).is_audited(SEED, step) for step in range(10_000))
    assert all(Audit(3, 1, 0.3).is_audited(SEED, step, 4) for step in range(10_000))


def test_what_is_drawn_depends_on_seed_and_step_alone():
    """Machines and Python's own hash seed make no difference: these are the values of the machine it was written on."""
    audit = Audit(7, 3, 0.02)
    assert [step for step in range(300) if audit.is_audited(0, step)] == [0, 1, 54, 75, 154]
    assert [audit.shifts(0, step) for step in range(3)] == [(1, 3, 6), (2, 3, 5), (1, 6, 2)]


def test_asking_in_another_order_changes_nothing():
    def ask(step):
        audit = Audit(7, 2, 0.3)
        random.random()  # generators of others have no part in it
        return audit.is_audited(SEED, step), audit.shifts(SEED, step)

    steps = list(range(500))
    in_order = {step: ask(step) for step in steps}
    random.Random(SEED).shuffle(steps)
    assert {step: ask(step) for step in steps} == in_order
    assert len(set(in_order.values())) == 2 * 6 * 5  # the coin, and two shifts of six


@pytest.mark.parametrize("lag", [1, 2, 3, 7, 20, 1000])
def test_steps_are_independent(lag):
    audit, steps = Audit(3, 1, 0.2), 20_000
    coins = [audit.is_audited(SEED, step) for step in range(steps + lag)]
    assert_binomial(sum(coins[step] and coins[step + lag] for step in range(steps)), steps, 0.2**2)


@pytest.mark.parametrize("other", [SEED ^ 1, SEED + 1, SEED + 2**32, SEED + 2**64])
def test_seeds_are_independent(other):
    audit, steps = Audit(3, 1, 0.2), 20_000
    both = sum(audit.is_audited(SEED, step) and audit.is_audited(other, step) for step in range(steps))
    assert_binomial(both, steps, 0.2**2)
    same = sum(audit.shifts(SEED, step) == audit.shifts(other, step) for step in range(5_000))
    assert_binomial(same, 5_000, 1 / 2)


# ---------------------------------------------------------------------------------------------- who audits whom


@pytest.mark.parametrize(("workers", "adversaries"), [(n, s) for n in range(3, 10) for s in range(1, (n + 1) // 2)])
def test_every_part_has_as_many_auditors_as_adversaries(workers, adversaries):
    audit = Audit(workers, adversaries, 1)
    for step in range(50):
        shifts = audit.shifts(SEED, step)
        assert len(shifts) == adversaries
        audited = collections.Counter()
        for part in range(workers):
            by = auditors(audit, part, shifts)
            assert len({*by, part}) == adversaries + 1  # different workers, and not the owner
            audited.update(by)
        assert set(audited.values()) == {adversaries}  # everybody has the same work


def test_shifts_are_uniform():
    audit = Audit(6, 2, 0.5)
    drawn = [(audit.is_audited(SEED, step), audit.shifts(SEED, step)) for step in range(12_000)]
    pairs = list(itertools.permutations(range(1, 6), 2))
    assert_uniform([shifts for _, shifts in drawn], pairs)
    assert_uniform([shifts for fallen, shifts in drawn if fallen], pairs)


def test_shifts_of_steps_are_independent():
    audit = Audit(5, 1, 0.5)
    shifts = [audit.shifts(SEED, step)[0] for step in range(12_001)]
    assert_uniform(list(itertools.pairwise(shifts)), list(itertools.product(range(1, 5), repeat=2)))


@pytest.mark.parametrize(("workers", "adversaries"), [(3, 1), (4, 1), (5, 1), (5, 2), (6, 2)])
def test_every_placement_on_three_hosts(workers, adversaries):
    """The shifts are those by which most auditors are on another host than the owner; enumerated."""
    audit = Audit(workers, adversaries, 1)
    for hosts in itertools.product("abc", repeat=workers):
        apart = {
            shift: sum(hosts[part] != hosts[(part - shift) % workers] for part in range(workers))
            for shift in range(1, workers)
        }
        best = sorted(apart.values(), reverse=True)[:adversaries]
        for step in range(3):
            assert [apart[shift] for shift in audit.shifts(SEED, step, hosts)] == best


def test_shifts_are_uniform_among_those_that_reach_another_host():
    # Two hosts of four: of the shifts 1 to 7, only 4 is to another host for all, then 3 and 5 for six of eight.
    first, second, third = zip(*(Audit(8, 3, 1).shifts(SEED, t, list("aaaabbbb")) for t in range(4_000)), strict=True)
    assert set(first) == {4}
    assert_uniform(second, [3, 5])
    assert_uniform(third, [3, 5])
    # In turn on two hosts: all odd shifts.
    assert_uniform([Audit(8, 1, 1).shifts(SEED, t, list("abababab"))[0] for t in range(4_000)], [1, 3, 5, 7])
    # One host: all.
    assert_uniform([Audit(8, 1, 1).shifts(SEED, t, ["a"] * 8)[0] for t in range(4_000)], range(1, 8))


@pytest.mark.parametrize(("workers", "adversaries"), [(3, 1), (5, 2), (6, 2), (7, 3), (8, 3), (9, 4)])
def test_every_set_of_convicted_workers(workers, adversaries):
    """Convicted workers audit each other only where no shifts are without that, and then as little as can be."""
    audit = Audit(workers, adversaries, 1)
    hosts = [str(worker // 2) for worker in range(workers)]
    unavoidable = 0
    for size in range(adversaries + 1):
        for convicted in itertools.combinations(range(workers), size):

            def together(shifts, convicted=convicted):
                return sum(by in convicted for part in convicted for by in auditors(audit, part, shifts))

            fewest = min(map(together, itertools.combinations(range(1, workers), adversaries)))
            unavoidable += fewest > 0
            for step in range(2):
                assert together(audit.shifts(SEED, step, avoid=convicted)) == fewest
                assert together(audit.shifts(SEED, step, hosts, avoid=list(convicted))) == fewest
    assert bool(unavoidable) == (adversaries >= 3)


@pytest.mark.parametrize(("workers", "adversaries"), [(3, 1), (5, 2), (6, 2), (7, 3)])
def test_every_part_has_an_opinion_of_a_rank_that_is_right(workers, adversaries):
    """Step 1 of the proof in docs/guarantee.md: opinions of convicted ranks do not count."""
    audit = Audit(workers, adversaries, 1)
    for bad in itertools.combinations(range(workers), adversaries):
        for size in range(adversaries + 1):
            for convicted in itertools.combinations(bad, size):
                for avoid in ((), convicted):
                    shifts = audit.shifts(SEED, 0, avoid=avoid)
                    for part in range(workers):
                        opinions = {part, *auditors(audit, part, shifts)} - {*convicted}
                        assert opinions - {*bad}


def test_shifts_are_uniform_among_those_without_a_convicted_auditor():
    audit = Audit(7, 2, 1)
    drawn = [audit.shifts(SEED, step, avoid={0, 2}) for step in range(6_000)]
    assert_uniform(drawn, list(itertools.permutations([1, 3, 4, 6], 2)))


def test_another_host_counts_less_than_a_convicted_auditor():
    hosts, audit = list("abab"), Audit(4, 1, 1)
    assert {audit.shifts(SEED, step, hosts) for step in range(50)} == {(1,), (3,)}
    assert {audit.shifts(SEED, step, hosts, avoid={0, 1}) for step in range(50)} == {(2,)}


# ---------------------------------------------------------------------------------------------- wrong updates


def wrong_updates(audit, seed, *, passes=1, wrong_in_one=False, trigger_chance=0.0, frequency=1.0):
    """Simulate a worker that is bad from a step on, and count its wrong updates until it is found.

    Args:
        audit: draws the audited steps.
        seed: of the run.
        passes: the number of micro-batches of a step.
        wrong_in_one: whether one micro-batch, any one, is wrong, and not all. The first one is audited.
        trigger_chance: that a wrong step triggers an audit.
        frequency: the share of steps that are wrong.
    """
    own = random.Random(seed)
    updates = 0
    for step in itertools.count(own.randrange(10**6)):
        if own.random() >= frequency:
            continue
        is_seen = not wrong_in_one or own.randrange(passes) == 0
        if audit.is_audited(seed, step, passes) and is_seen:
            return updates
        if own.random() < trigger_chance:
            return updates
        updates += 1


def assert_law(updates, audit, **given):
    """Assert that simulated numbers have the promised mean and quantiles, and are geometric between."""
    runs, mean = len(updates), audit.expected_wrong_updates(**given)
    found = 1 / (1 + mean)
    deviation = math.sqrt(1 - found) / found
    assert abs(sum(updates) / runs - mean) <= 5 * deviation / math.sqrt(runs)
    for level in (0.3, 0.5, 0.9, 0.99):
        quantile = audit.wrong_updates_quantile(level, **given)
        assert_binomial(sum(count > quantile for count in updates), runs, (1 - found) ** (quantile + 1))
        assert (1 - found) ** (quantile + 1) <= 1 - level < (1 - found) ** quantile


@pytest.mark.parametrize("frequency", [1.0, 0.2])
@pytest.mark.parametrize(("rate", "trigger_chance"), [(0.05, 0.0), (0.2, 0.0), (0.02, 0.13), (0.3, 0.5)])
def test_wrong_updates_are_geometric_however_often_a_worker_is_wrong(rate, trigger_chance, frequency):
    audit = Audit(5, 2, rate)
    runs = [
        wrong_updates(audit, SEED + run, trigger_chance=trigger_chance, frequency=frequency) for run in range(4_000)
    ]
    assert_law(runs, audit, trigger_chance=trigger_chance)


def test_wrong_updates_at_a_hundredth():
    audit = Audit(3, 1, 0.01)
    assert audit.expected_wrong_updates() == pytest.approx(99)
    assert audit.expected_wrong_updates(0.13) == pytest.approx((1 - 0.1387) / 0.1387)
    assert audit.wrong_updates_quantile(0.99) == 458  # 0.99^459 is the first power below 0.01
    assert_law([wrong_updates(audit, SEED + run) for run in range(2_000)], audit)


def test_no_wrong_update_if_every_step_is_audited_or_triggers():
    assert Audit(3, 1, 1).expected_wrong_updates() == 0 == Audit(3, 1, 0.1).expected_wrong_updates(1)
    assert Audit(3, 1, 1).wrong_updates_quantile(0.999) == 0 == Audit(3, 1, 0.1).wrong_updates_quantile(0.999, 1)
    assert {wrong_updates(Audit(3, 1, 1), SEED + run) for run in range(100)} == {0}


def test_quantiles_are_those_of_exact_arithmetic():
    for rate, level in itertools.product((0.008, 0.1, 0.25, 0.5, 0.9, 0.999), (0.001, 0.25, 0.5, 0.75, 0.9, 0.99)):
        missed, k = 1 - Fraction(rate), 0
        while 1 - missed ** (k + 1) < Fraction(level):
            k += 1
        assert Audit(3, 1, rate).wrong_updates_quantile(level) == k, (rate, level)


def test_accumulation_finds_faults_sooner_at_the_same_cost():
    """Audited is one micro-batch of 8, in 8 times as many steps: 1% of all micro-batches, as without accumulation."""
    audit, passes, steps = Audit(5, 2, 0.01), 8, 20_000
    audited = sum(audit.is_audited(SEED, step, passes) for step in range(steps))
    assert_binomial(audited, steps * passes, 0.01)  # of the micro-batches

    every = [wrong_updates(audit, SEED + run, passes=passes) for run in range(3_000)]
    assert_law(every, audit, passes=passes)
    alone = [wrong_updates(audit, SEED + run) for run in range(1_500)]
    assert sum(alone) / len(alone) > 7 * sum(every) / len(every)  # 99 updates, and 11.5

    # A fault in one micro-batch alone is found as often as without accumulation, and not sooner.
    one = [wrong_updates(audit, SEED + run, passes=passes, wrong_in_one=True) for run in range(1_500)]
    assert_law(one, audit)


def test_accumulation_of_many_micro_batches_audits_every_step():
    audit = Audit(3, 1, 0.2)
    assert audit.expected_wrong_updates(passes=5) == 0 == audit.wrong_updates_quantile(0.99, passes=5)
    assert {wrong_updates(audit, SEED + run, passes=5) for run in range(100)} == {0}


@pytest.mark.parametrize(("adversaries", "rate", "false_triggers"), [(1, 0.008, 0.001), (2, 0.1, 0.02), (3, 1, 0)])
def test_cost_is_that_of_a_simulated_run(adversaries, rate, false_triggers):
    audit, own, steps, extra = Audit(7, adversaries, rate), random.Random(SEED), 20_000, 0
    for step in range(steps):
        if audit.is_audited(SEED, step):
            extra += len(audit.shifts(SEED, step))
        if own.random() < false_triggers:
            extra += 2
    deviation = math.sqrt(adversaries**2 * rate * (1 - rate) + 4 * false_triggers * (1 - false_triggers))
    assert abs(extra / steps - audit.cost(false_triggers)) <= 5 * deviation / math.sqrt(steps) + 1e-12


@pytest.mark.parametrize(("adversaries", "rate"), [(1, 0.008), (2, 0.3), (3, 1)])
@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_cost_with_the_beginning(adversaries, rate, steps):
    """Counted over seeds: s passes in an audited step, and the own pass of the first step twice."""
    audit, seeds = Audit(7, adversaries, rate), 400
    audited = sum(audit.is_audited(seed, step) for seed in range(seeds) for step in range(steps))
    found = (adversaries * audited / seeds + 1) / steps
    deviation = adversaries * math.sqrt(rate * (1 - rate) / seeds)
    assert abs(found - audit.cost(0, steps)) <= 5 * deviation + 1e-12
    assert audit.cost(0, steps, rehearsal=False) == pytest.approx(audit.cost(0, steps) - 1 / steps)
    assert audit.cost(0, 10**9) == pytest.approx(audit.cost(0), rel=1e-6)


def test_the_default_rate_of_false_triggers_makes_one_percent():
    assert Audit(3, 1, 0.008).cost() == pytest.approx(0.01)

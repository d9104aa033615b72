"""Checks of a comparison against theory."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import inf

import numpy as np

from draco_ext.cli.faults import Fault
from draco_ext.cli.training import CODES, PROTECTED, Audited, Config, Outcome

# The cyclic code may not notice a change that is smaller than this, relative to the message.
VISIBLE = 1e-4
# The cyclic code rounds differently in a clean and in an attacked run, and training amplifies the difference. The
# distance is at most this, or, in trainings that are less stable, this multiple of the distance between two clean runs.
ROUNDING = 1e-4
ROUNDING_FACTOR = 10
# The accuracy that the net reaches on the digits with the default settings, for every seed (97% for most).
GOOD_ACCURACY = 0.93
# The chance of a false alarm about the number of wrong updates that an audit lets pass.
UNLIKELY = 1e-6
# With the default settings a training has time to learn after so many wrong updates at its beginning, in which one
# gradient of so many workers' or more is wrong.
FEW = 10
LEAST_WORKERS = 9
# A model that loses this much accuracy counts as ruined.
RUIN = 0.3
# Attacks that ruin plain averaging, with the weight of a bad worker's message relative to a good one's.
RUINOUS = {"reversed": 100.0, "constant": inf, "gaussian": inf, "nan": inf, "inf": inf}


@dataclass(frozen=True)
class Check:
    """A statement of theory about a comparison, and whether it holds."""

    statement: str
    holds: bool
    found: str


def judge(config: Config, outcomes: list[Outcome], *, learns: bool) -> list[Check]:
    """Return all checks that apply.

    Args:
        config: the configuration of the comparison.
        outcomes: the outcomes of its trainings.
        learns: whether the net is known to learn well with these settings, so that accuracy is judged, too.
    """
    return list(_checks(config, outcomes, learns))


def _checks(config: Config, outcomes: list[Outcome], learns: bool) -> Iterator[Check]:
    clean = {o.training.rule: o for o in outcomes if not o.training.attacked}
    for outcome in outcomes:
        rule, attacked, label = outcome.training.rule, outcome.training.attacked, outcome.training.label
        if not attacked:
            finite = bool(np.isfinite(outcome.parameters).all())
            found = f"parameters are {'' if finite else 'not '}finite"
            yield Check(f"{label} without adversaries does not diverge", finite, found)
        if rule in CODES and np.isfinite(clean[rule].parameters).all():
            yield from _code_checks(outcome, clean[rule])
        if outcome.audit is not None and np.isfinite(clean[rule].parameters).all():
            yield from _audit_checks(config, outcome, outcome.audit, learns)
        if learns and not attacked and rule in ("mean", *PROTECTED):
            yield Check(
                f"{label} without adversaries learns: accuracy of at least {GOOD_ACCURACY:.0%}",
                outcome.accuracy >= GOOD_ACCURACY,
                f"{outcome.accuracy:.1%}",
            )
        ruinous = config.adversaries * RUINOUS.get(config.attack, 0.0) >= 2 * config.workers
        if rule == "mean" and attacked and ruinous and clean[rule].accuracy >= GOOD_ACCURACY:
            yield Check(
                f"{label} is ruined by the attack",
                outcome.accuracy <= clean[rule].accuracy - RUIN,
                f"accuracy {outcome.accuracy:.1%} against {clean[rule].accuracy:.1%}",
            )


def _code_checks(outcome: Outcome, clean: Outcome) -> Iterator[Check]:
    """Yield the checks of a code's guarantee: no failure, the bad workers named, the clean run's parameters."""
    attacked, exact = outcome.training.attacked, outcome.training.rule == "repetition"
    name = f"{outcome.training.label} {'under attack' if attacked else 'without adversaries'}"
    steps = len(outcome.suspects)
    yield Check(
        f"{name}: every step decodes",
        not outcome.failed,
        f"{len(outcome.failed)} of {steps} steps failed{_first(outcome.failed)}",
    )
    wrong = []
    for step, (suspects, changes) in enumerate(zip(outcome.suspects, outcome.changes, strict=True)):
        visible = {worker for worker, change in changes.items() if exact or change >= VISIBLE}
        if not visible <= set(suspects or ()) <= changes.keys():
            wrong.append(step)
    yield Check(
        f"{name}: names {'exactly the workers that sent wrong messages' if attacked else 'nobody'}",
        not wrong,
        f"{len(wrong)} of {steps} steps name others{_first(wrong)}",
    )
    if attacked:
        distance = inf if outcome.distance is None else outcome.distance
        bound = 0.0 if exact else max(ROUNDING, ROUNDING_FACTOR * (clean.distance or 0.0))
        yield Check(
            f"{name}: distance from its clean run {'is 0' if exact else f'is at most {bound:.2g}'}",
            distance <= bound,
            f"{distance:.3g}",
        )


def _audit_checks(config: Config, outcome: Outcome, audit: Audited, learns: bool) -> Iterator[Check]:
    """Yield the checks of an audit: who is convicted and when, and what the wrong updates before do."""
    attacked, steps = outcome.training.attacked, len(outcome.suspects)
    name = f"{outcome.training.label} {'with a faulty worker' if attacked else 'without faults'}"
    yield Check(
        f"{name}: no step fails",
        not outcome.failed,
        f"{len(outcome.failed)} of {steps} steps failed{_first(outcome.failed)}",
    )
    if not attacked:
        yield Check(f"{name}: names nobody", not outcome.named, f"named are {sorted(outcome.named)}")
        return
    steps -= Fault.BEGIN
    wrong = steps if audit.wrong_updates is None else audit.wrong_updates
    most = config.audit.wrong_updates_quantile(1 - UNLIKELY)
    yield Check(
        f"{name}: at most {most} wrong updates, except with a probability of {UNLIKELY:g}", wrong <= most, f"{wrong}"
    )
    drawn = steps if audit.first is None else audit.first - Fault.BEGIN
    if min(wrong, drawn) < steps:
        bad = set(outcome.bad[-1])
        yield Check(
            f"{name}: convicts worker {', '.join(map(str, bad))} and no other, in the first audited step at the latest",
            outcome.named.keys() == audit.report.convicted.keys() == bad and wrong <= drawn,
            f"convicted are {sorted(audit.report.convicted)}, after {wrong} wrong steps; one was drawn after {drawn}",
        )
    if wrong == 0:
        distance = inf if outcome.distance is None else outcome.distance
        yield Check(
            f"{name}: no update is wrong, so its distance from its clean run is 0", distance == 0, f"{distance:.3g}"
        )
    if learns and wrong <= FEW and config.workers >= LEAST_WORKERS:
        yield Check(
            f"{name}: learns after {wrong} wrong updates: accuracy of at least {GOOD_ACCURACY:.0%}",
            outcome.accuracy >= GOOD_ACCURACY,
            f"{outcome.accuracy:.1%}",
        )


def _first(steps: list[int]) -> str:
    return f", the first is step {steps[0] + 1}" if steps else ""

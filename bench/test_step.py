"""A training step's communication and decoding, under plain DistributedDataParallel and under `protect`.

    pytest bench/test_step.py [--quick] [--ranks 6] [--bench-output FOLDER]

The ranks run over gloo on this machine, with a model whose gradient costs almost nothing. Every variant alternates with
the plain one, round by round. The time is measured on rank 0 from a barrier: a backward pass that communicates, minus
one that does not (but encodes, if a code has several parts). A step of an audit is measured as a whole, minus as many
backward passes that do not communicate as it has passes.
"""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import draco_ext
from draco_ext import Audit, CyclicCode, RepetitionCode
from draco_ext.protocol.transports import TRANSPORTS
from draco_ext.testing.local import run_local
from draco_ext.training.audit.guard import AuditGuard

SENT = Path("/sys/class/net/lo/statistics/tx_bytes")
SPLIT = ("encode", "communicate", "decode")
PLAIN = "DistributedDataParallel"
CODES = {
    "repetition s=0": (RepetitionCode, 0),
    "repetition s=1": (RepetitionCode, 1),
    "cyclic s=1": (CyclicCode, 1),
}
NEVER = 1e-12  # a rate at which the coin falls on none of the steps
# name -> code as a function of the number of ranks, options of `protect`
VARIANTS = {PLAIN: None} | {
    f"{transport}, {name}": (functools.partial(code, adversaries=s), {"transport": transport})
    for transport in TRANSPORTS
    for name, (code, s) in CODES.items()
}
# The others compare parameters in the first step, which is not measured.
VARIANTS["allreduce, repetition s=1, parameters compared in every step"] = (
    functools.partial(RepetitionCode, adversaries=1),
    {"transport": "allreduce", "check_state_every": 1},
)
VARIANTS["Audit s=1, not audited"] = (functools.partial(Audit, adversaries=1, rate=NEVER), {})
VARIANTS["Audit s=1, audited"] = (functools.partial(Audit, adversaries=1, rate=1.0), {})


class Scales(nn.Module):
    """A model of d parameters in ten tensors, whose gradient is constant."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.scales = nn.ParameterList(torch.zeros(d // 10) for _ in range(10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(scale.sum() for scale in self.scales) * x.sum()


class Step(NamedTuple):
    """The seconds of backward passes without and with communication, and the bytes and times of the latter."""

    alone: float
    seconds: float
    sent: int
    split: dict[str, float]

    @property
    def exchange(self) -> float:
        """The seconds of communication and decoding."""
        return self.seconds - self.alone


class Variant:
    def __init__(self, d: int, protection, aside: dist.ProcessGroup) -> None:
        self.aside = aside
        self.model = DistributedDataParallel(Scales(d))
        self.guard = None
        if protection is not None:
            make_code, options = protection
            code = make_code(dist.get_world_size())
            self.guard = draco_ext.protect(self.model, code, **options)
            if isinstance(code, Audit):
                self.steps = self.guard.steps(itertools.repeat(torch.ones(1)))

    def step(self, alone: float = 0.0) -> Step:
        """Measure a step; `alone`: the seconds of the plain variant's backward pass without communication."""
        if self.guard is None:
            with self.model.no_sync():
                alone, _ = self.backward()
            return Step(alone, *self.backward(), {})
        return self.audit_step(alone) if isinstance(self.guard, AuditGuard) else self.code_step()

    def code_step(self) -> Step:
        self.model.zero_grad()  # no optimizer uses the last ones
        parts = len(self.guard.code.assignment(self.guard.worker))
        if parts == 1:
            with self.model.no_sync():
                alone, _ = self.backward()
        for step in self.guard.steps(range(parts)):
            for part in step:
                before = self.guard_seconds()
                seconds, sent = self.backward()
                if part < parts - 1:
                    alone = seconds  # encodes, as the last one does
        return Step(alone, seconds, sent, self.split_since(before))

    def audit_step(self, alone: float) -> Step:
        before = self.guard_seconds()
        passes, seconds, sent = 0, 0.0, 0
        self.model.zero_grad()  # no optimizer uses them
        mini_batches = next(self.steps)
        while True:
            more, spent, sent_between = self.measured(lambda: next(mini_batches, None))
            seconds, sent = seconds + spent, sent + sent_between
            if more is None:
                return Step(passes * alone, seconds, sent, self.split_since(before))
            spent, sent_backward = self.backward()
            seconds, sent, passes = seconds + spent, sent + sent_backward, passes + 1

    def guard_seconds(self) -> dict[str, float]:
        return vars(self.guard.report().seconds)

    def split_since(self, before: dict[str, float]) -> dict[str, float]:
        return {name: after - before[name] for name, after in self.guard_seconds().items()}

    def backward(self) -> tuple[float, int]:
        self.model.zero_grad()
        loss = self.model(torch.ones(1))
        _, seconds, sent = self.measured(loss.backward)
        return seconds, sent

    def measured(self, call: Callable[[], object]) -> tuple[object, float, int]:
        """Return what a call on all ranks returns, its seconds on this one, and the bytes that all have sent in it."""
        dist.barrier(self.aside)
        sent = int(SENT.read_text()) if SENT.exists() else 0
        begin = time.perf_counter()
        result = call()
        seconds = time.perf_counter() - begin
        dist.barrier(self.aside)
        return result, seconds, (int(SENT.read_text()) if SENT.exists() else 0) - sent


def _rank(rank, report, d, name, rounds):
    torch.set_num_threads(1)
    aside = dist.new_group()  # a guard would take a collective on the model's group for one of the loss
    plain = Variant(d, None, aside)
    variant = Variant(d, VARIANTS[name], aside)
    for i in range(2 + rounds):
        beside = plain.step()
        measured = beside, variant.step(beside.alone)
        if i >= 2:  # DDP makes new buckets after the first
            report(measured)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("d", [10**6, 25 * 10**6])
def test_step(request, d, name, add_row):
    quick = request.config.option.quick
    if quick and (d > 10**6 or "s=0" in name):
        pytest.skip("--quick")
    ranks = request.config.option.ranks
    rounds = list(run_local(_rank, ranks, d, name, 3 if quick else 11))
    add_row(
        report="step",
        n=ranks,
        d=d,
        rule=name,
        seconds=statistics.median(own.exchange for _, own in rounds),
        to_yardstick=statistics.median(own.exchange / plain.exchange for plain, own in rounds),
        bytes=int(statistics.median(own.sent for _, own in rounds)),
        split={part: statistics.median(own.split.get(part, 0.0) for _, own in rounds) for part in SPLIT},
    )

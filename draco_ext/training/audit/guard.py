"""The guard of `Audit`: plain data parallelism, in which a step with a wrong gradient is put right."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from draco_ext import _checks
from draco_ext.codes import Audit, DecodingError, RepetitionCode
from draco_ext.protocol.exchange import run_alone
from draco_ext.protocol.groups import gather_json
from draco_ext.protocol.messages import ExchangeOutcome, Message
from draco_ext.reporting.report import Report
from draco_ext.training.adapter import AuditAdapter, Bucket
from draco_ext.training.audit import opinions, shipping
from draco_ext.training.audit.measures import Bits, Projections
from draco_ext.training.audit.opinions import Row
from draco_ext.training.audit.passes import OWN, Passes, PassRunner
from draco_ext.training.audit.triggers import Triggers
from draco_ext.training.audit.verdict import StepVerdict, Verdicts
from draco_ext.training.base import GuardBase
from draco_ext.training.pending import PendingGradients
from draco_ext.training.record import Claims

ON_CONVICTION = ("substitute", "drop", "raise")
ATTEMPTS = 4  # how often the passes of a step are made again before it fails

# Makes a rank bad, for tests: f(step, gradient of a parameter, "own", "audit" or "opinion") -> gradient.
AuditAdversary = Callable[[int, Tensor, str], Tensor]


class AuditStep(Iterator[Any]):
    """The mini-batches of one step, in the order in which they are to be passed forward and backward.

    Attributes:
        own: whether the last mini-batch is this rank's own. Others' come first if the step is audited, and this rank's
            own may come again.
    """

    def __init__(self, passes: Iterator[tuple[Any, str]]) -> None:
        self.own = False
        self._passes = passes

    def __next__(self) -> Any:
        """Return the next mini-batch.

        Raises:
            DecodingError: the step cannot be put right; see `AuditGuard.steps`.
            RuntimeError: the mini-batch before was not passed backward, or see `AuditGuard.steps`.
        """
        mini_batch, kind = next(self._passes)
        self.own = kind == OWN
        return mini_batch


class AuditGuard(GuardBase):
    """A guard whose ranks recompute each other's gradients; made by `protect` with an `Audit`.

    Attributes:
        audit: the audit.
        worker: this rank's worker number, which is its rank in the model's process group.
        failed: whether the last step failed; see `Guard`.
    """

    _is_audit = True
    _adapter: AuditAdapter

    def __init__(
        self,
        model: torch.nn.Module,
        audit: Audit,
        *,
        adversary: AuditAdversary | None,
        on_conviction: str,
        batch_of: Callable[[int, int], Any] | None,
        seed: int,
        **settings: Any,
    ) -> None:
        n = audit.workers
        super().__init__(
            model,
            RepetitionCode(n, 0),
            workers=tuple(range(n)),
            setup={"code": repr(audit), "on_conviction": on_conviction, "batch_of": batch_of is not None},
            seed=seed,
            helpers=audit.adversaries + 1,
            **settings,
        )
        self.audit = audit
        self._batch_of = batch_of
        self._seed = seed
        self._number = 0
        self._exchanges = 0
        self._finished = True  # whether the last step has come to its end
        self._doubts: list[str] = []  # why this rank doubts
        self._triggers = Triggers(n)
        self._attach(steps_after="the loop over a step of guard.steps()")
        self._make_bad(adversary)  # before its gradients are measured
        tolerant = settings["atol"] > 0 or settings["rtol"] > 0
        self._measure = Projections(settings["atol"], settings["rtol"]) if tolerant else Bits()
        self._verdicts = Verdicts(audit, self._ranks, self._recorder, self._measure.agree, on_conviction)
        self._passes = PassRunner(
            adapter=self._adapter,
            communicator=self._communicator,
            transport=self._transport,
            record=self._record,
            unused=self._unused,
            state=self._state_check.state,
            measure=self._measure,
            batch_of=batch_of,
            count=self._verdicts.count_passes,
        )
        self._pending = PendingGradients(
            self._adapter.reduced(),
            "accumulate by guard.steps(loader, accumulate=...), whose steps have several mini-batches",
        )
        self._conviction: str | None = None  # why the step ends with an error although its gradient is right

    @property
    def step(self) -> int:
        """The number of the next step."""
        return self._number

    # ------------------------------------------------------------------------------------------------ a step

    def steps(self, loader: Iterable[Any], accumulate: int = 1) -> Iterator[AuditStep]:
        """Cut a loader into steps.

        ``for step in guard.steps(loader): for x, y in step: loss(x, y).backward()``, then the optimizer's step. Each
        step yields this rank's own mini-batch and, if it is audited or put right, those of other ranks before. Each of
        them needs a forward and a backward pass. What must happen once in a step, such as clipping, the optimizer's
        step or a moving average of parameters, comes after the loop over the step.

        Args:
            loader: any iterable of mini-batches. Every rank has its own, of the same length.
            accumulate: the number of mini-batches whose gradients a step adds up. Only the last one's backward pass
                communicates, without ``no_sync()`` in the loop. An audit covers the first one; in step 0, and at a
                rate of 1, all of them.

        Yields:
            The steps.

        Raises:
            DecodingError: more ranks are wrong than the audit can correct; the loop over a step does not compute with
                the mini-batch that it yields, or changes gradients; or, with ``on_conviction="raise"``, a rank is
                convicted.
            RuntimeError: a step ended before all its mini-batches were taken and passed backward; or the gradients of
                the step before would be lost, since no optimizer has used them.
            TypeError: the loader yields something that cannot be sent to other ranks.
            ValueError: ranks are at different steps.
        """
        _checks.check_int("accumulate", accumulate, 1)
        self._agree_on_step()
        iterator = iter(loader)
        while mini_batches := list(itertools.islice(iterator, accumulate)):
            if self._batch_of is None and self._passes.own_passes == 0:
                self._check_inputs(mini_batches)
            self._finished = False
            passes = self._run(mini_batches)
            yield AuditStep(passes)
            if not self._finished:
                passes.close()
                raise self._passes.incomplete()

    def doubt(self, reason: str) -> None:
        """Audit the current step, or the next one if none is in progress.

        Anything that has noticed something may call it, on any rank.

        Args:
            reason: the reason that the report gives.

        Raises:
            TypeError: the reason is not a str.
        """
        if not isinstance(reason, str):
            raise TypeError(f"reason must be a str, got {type(reason).__name__}")
        self._doubts.append(reason[:1000])

    def _run(self, mini_batches: list[Any]) -> Passes:
        """Make the passes of one step, and end it."""
        self._forget_step()
        self._pending.check(self._number)
        self._passes.begin_step(self._number, mini_batches, self._seed)
        try:
            claims, failure = yield from self._make_passes(len(mini_batches))
        except BaseException:
            self._adapter.synchronise(True)
            self._abort()
            raise
        self._end_step(claims, failure)

    def _make_passes(self, mini_batches: int) -> Passes:
        """Make passes until the gradient is right; return the ranks' records, and why the step failed or None."""
        step, verdicts, passes = self._number, self._verdicts, self._passes
        substituting = bool(verdicts.substituted)
        in_buckets = self._adapter.buckets_in_all_passes  # where gradients are not in .grad before all are added up
        audited = substituting or self.audit.is_audited(self._seed, step, 1 if in_buckets else mini_batches)
        with_state = self._state_check.is_due(step)
        earlier: Sequence[Row] = ()  # what ranks said before a doubt
        whole = substituting or mini_batches == 1 or self.audit.covers_all(step) or in_buckets
        shifts: tuple[int, ...] = ()
        for _ in range(ATTEMPTS):
            if audited:
                shifts = self.audit.shifts(self._seed, step, self._hosts, verdicts.convicted)
            yield from passes.audit_passes(shifts, verdicts.helpers(shifts), whole=whole)
            # DDP makes other buckets after its first synchronised pass, in which sums over ranks round differently. So
            # what an audit finds before is put right before, too.
            rehearse = bool(shifts) and passes.own_passes == 0 and not in_buckets
            yield from passes.own_pass(measured=bool(shifts), rehearse=rehearse)
            rows, claims = self._gather(len(shifts), with_state)
            disputed = verdicts.disputed(rows, shifts)
            if disputed and not claims.state:
                with self._adapter.own_collectives():
                    claims = replace(claims, state=self._state_check.gather(step))
            if claims.state:
                differing, problem = self._repair_state(claims)
                if problem is not None:
                    return claims, problem
                if differing:  # their gradients are wrong, too
                    earlier, with_state = (), True
                    continue
            if not shifts and self._is_doubtful(rows):
                audited, with_state, earlier = True, True, rows if self._measure.is_digest else ()
                continue
            break
        else:
            return claims, f"no gradient in step {step}: ranks have other parameters than the majority again and again"
        if not shifts:
            self._observe(rows)
            return claims, None
        if not disputed:
            self._measure.learn(verdicts.pairs(rows, shifts))
        verdicts.found.audited += 1
        self._doubts = []
        verdict = StepVerdict(verdicts, step, rows, shifts, disputed, earlier, whole=passes.whole)
        return (yield from self._put_right(verdict, rows, disputed, claims, rehearsed=rehearse))

    def _put_right(
        self, verdict: StepVerdict, rows: list[Row], disputed: list[int], claims: Claims, *, rehearsed: bool
    ) -> Passes:
        """Settle the disputes of an audited step, and contribute the right gradients; see `_make_passes`."""
        for _ in range(ATTEMPTS):
            if not disputed and not rehearsed:
                break
            rehearsed = False
            for part in disputed:
                said = yield from self._passes.opinion_pass(part)
                problem, helper = verdict.settle(part, said)
                if problem is not None:
                    return claims, problem
                if helper is not None:
                    self._passes.hand_over(helper, part)
            yield from self._passes.own_pass(measured=True)
            rows, claims = self._gather(0, with_state=False)
            disputed = verdict.compare(rows)
        else:
            return claims, self._verdicts.explain(self._number, "gradients are wrong again and again")
        self._observe(rows)
        failure, self._conviction = self._verdicts.conclude(verdict)
        return claims, failure

    # ------------------------------------------------------------------------------------------------ between passes

    def _gather(self, shifts: int, with_state: bool) -> tuple[list[Row], Claims]:
        """Gather what all ranks say after an own pass, in one exchange."""
        device, passes = self._adapter.device, self._passes
        with self._seconds.decoding():
            computed, contributed, first = passes.gradients.of_own_pass()
            measures = [computed, contributed, computed if passes.whole else first, *(passes.audits if shifts else [])]
            doubts = torch.tensor([len(self._doubts) > 0], dtype=torch.int64, device=device)
            statistics = passes.gradients.statistics().to(device)
            state = self._state_check.digests(self._number) if with_state else None
            record = self._record.vector(self._number, state, device)
            numbers = torch.cat([*measures, doubts, statistics.view(-1).view(torch.int64), record])
        with self._adapter.own_collectives():
            gathered, _ = run_alone(self._transport.gather_record(numbers))
        lengths = [measure.numel() for measure in measures]
        read = [opinions.read_row(row, lengths, len(statistics), self._measure.read) for row in gathered]
        claims = self._record.read(torch.stack([rest for _, rest in read]), ())
        used = {j: of_rank for j, of_rank in claims.used.items() if j not in self._verdicts.dropped}
        return [row for row, _ in read], replace(claims, used=used)

    def _repair_state(self, claims: Claims) -> tuple[bool, str | None]:
        """Give the majority's parameters to ranks with others; return whether there were any, and what is wrong."""
        verdict = self._state_check.judge(claims.state)
        with self._adapter.own_collectives():
            problem = self._state_check.repair(verdict, self._number)
        return bool(verdict.wrong), problem

    def _is_doubtful(self, rows: Sequence[Row]) -> bool:
        """Return whether there is reason to audit a step on which the coin did not fall, and record it."""
        found = self._triggers.judge([row.statistics for row in rows], self._passes.gradients.lengths)
        if any(row.doubts for row in rows):
            with self._adapter.own_collectives():
                reasons = gather_json(self._doubts, self._adapter.group, self._adapter.device)
            for j, row in enumerate(rows):
                if row.doubts:
                    found[j] = "; ".join(map(str, reasons[self._ranks[j]]))
        self._verdicts.add_triggers(self._number, found)
        return bool(found)

    def _observe(self, rows: Sequence[Row]) -> None:
        """Add the statistics of an accepted step to those with which the next ones are compared."""
        self._triggers.observe([row.statistics for row in rows], self._passes.gradients.lengths)

    def _forget_step(self) -> None:
        """See `GuardBase`."""
        self._passes.forget()
        self._record.begin()
        if self._unused is not None:
            self._unused.forget()

    def _end_step(self, claims: Claims, failure: str | None) -> None:
        """End a step after its last pass."""
        step, conviction = self._number, self._conviction
        self._number += 1
        self._finished = True
        self._conviction = None
        self.failed = failure is not None
        self._adapter.finish_step()
        if failure is not None or conviction is not None:
            self._passes.undo()
        if failure is not None:
            self._recorder.add_failure(step)
        else:
            if self._unused is not None:
                self._unused.settle(claims.used_parameters())
            # The buffers of dropped ranks may be wrong, and DDP may give rank 0's to all.
            self._passes.send_buffers(self._verdicts.in_sum[0], sorted(self._verdicts.dropped))
        self._pending.begin()
        self._forget_step()
        self._recorder.deliver()
        if conviction is not None:
            raise DecodingError(conviction)
        self._policy.apply(failure)

    # ------------------------------------------------------------------------------------------------ hooks

    def _before_forward(self, module: torch.nn.Module, arguments: Any, keywords: Any) -> None:
        """Refuse a pass that no step has asked for."""
        if torch.is_grad_enabled() and module.training:
            self._check_in_step()

    def _check_in_step(self) -> None:
        if self._passes.kind is None:
            raise RuntimeError(
                "an Audit needs the loop `for step in guard.steps(loader): for batch in step:` around forward and "
                "backward passes; got a pass outside it"
            )

    def _take(self, bucket: Bucket) -> None:
        """Measure a bucket of the own pass, and add up those of all ranks."""
        self._check_in_step()
        if self._passes.kind != OWN:
            if not self._adapter.buckets_in_all_passes:
                raise RuntimeError(
                    "model.require_backward_grad_sync must be left to the guard, got a change in an audit: remove it "
                    "and no_sync() from the loop, and accumulate with guard.steps(loader, accumulate=...)"
                )
            self._passes.see(bucket)
            return
        buffer, dropped = bucket.buffer, self._verdicts.dropped
        with self._seconds.decoding():
            factor = None if self.worker in dropped or bucket.reduce is not None else 1 / self.audit.workers
            is_scaled = self._passes.take(bucket, factor=factor)
            if self.worker in dropped:
                buffer.values.fill_(-0.0)  # x + -0.0 == x, to the last bit

        left = self.audit.workers - len(dropped)
        if bucket.reduce is not None:
            bucket.reduce(self.audit.workers / left)
            return

        def complete(outcome: ExchangeOutcome) -> None:
            if dropped:
                buffer.values.mul_(self.audit.workers / left)
            bucket.complete()

        exchange = self._transport.exchange(Message(buffer.values, buffer, is_scaled), self._exchanges)
        self._exchanges += 1
        self._scheduler.start(exchange, name=f"no gradient in step {self.step}, {buffer.name}", complete=complete)
        if bucket.is_last:
            self._scheduler.complete_all()

    def _make_bad(self, adversary: AuditAdversary | None) -> None:
        """Let an adversary change every gradient that this rank computes."""
        if adversary is None:
            return

        def change(gradient: Tensor) -> Tensor:
            kind = self._passes.kind
            return gradient if kind is None else adversary(self._number, gradient.clone(), kind)

        self._adapter.change_gradients(change)

    # ------------------------------------------------------------------------------------------------ between steps

    def _check_inputs(self, mini_batches: list[Any]) -> None:
        """Refuse mini-batches that cannot be sent in the first step, and not in the first audit; on all ranks."""
        problem = ""
        try:
            shipping.pack(mini_batches)
        except TypeError as error:
            problem = str(error)
        with self._adapter.own_collectives():
            problems = gather_json(problem, self._adapter.group, self._adapter.device)
        for text in [problem, *problems]:
            if text:
                raise TypeError(text)

    def _agree_on_step(self) -> None:
        """Refuse ranks at other steps, which would not make the same passes."""
        number = torch.tensor([self._number], device=self._adapter.device)
        with self._adapter.own_collectives():
            steps = self._communicator.all_gather(number).wait().flatten().tolist()
        if len(set(steps)) > 1:
            by_rank = dict(zip(self._ranks, steps, strict=True))
            raise ValueError(f"all ranks must be at the same step, got {by_rank}: all must call load_state_dict")

    def state_dict(self, check: bool = True) -> dict[str, Any]:
        """See `Guard.state_dict`."""
        return {**super().state_dict(check), "audit": self._verdicts.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Guard.load_state_dict`."""
        super().load_state_dict(state)
        if "audit" in state:  # not in the checkpoint of a run with a code
            self._verdicts.load_state_dict(state["audit"])

    def _restart(self, step: int) -> None:
        """See `GuardBase`."""
        self._number = step
        self._pending.forget()

    def report(self) -> Report:
        """Return what was found so far, with `Report.audit`; see `Guard.report`."""
        found = replace(self._verdicts.found.snapshot(), sees=self._measure.sees)
        return replace(super().report(), trust=TRUST, audit=found)


TRUST = (
    "audit: up to s ranks may compute anything wrong in a step; what ranks send is not altered on the way; a fault is "
    "found when its step is audited."
)

"""The guard of `Audit`: plain data parallelism, in which a step with a wrong gradient is put right."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from draco_ext import _checks, ops
from draco_ext.codes import Audit, DecodingError, RepetitionCode
from draco_ext.protocol.exchange import run_alone
from draco_ext.protocol.groups import gather_json
from draco_ext.protocol.messages import ExchangeOutcome, Message
from draco_ext.reporting.report import AuditReport, Dispute, Report, Trigger
from draco_ext.training.adapter import Bucket
from draco_ext.training.audit import gradients, opinions, shipping
from draco_ext.training.audit.convictions import Convictions
from draco_ext.training.audit.gradients import GradientMeasure, PartResult
from draco_ext.training.audit.measures import Bits, Measured, Projections
from draco_ext.training.audit.opinions import Row
from draco_ext.training.audit.triggers import Triggers
from draco_ext.training.base import GuardBase
from draco_ext.training.ddp import DDPAdapter
from draco_ext.training.record import Claims

ON_CONVICTION = ("substitute", "drop", "raise")
ATTEMPTS = 4  # how often the passes of a step are made again before it fails
# What to look at if a step cannot be put right although no rank has a fault.
HINT = (
    " (without a fault: the loop over a step must compute with the mini-batch that it yields and leave gradients as "
    "they are, and all ranks must compute the same bits, which guard.self_test() tests)"
)
OWN, AUDIT, OPINION = "own", "audit", "opinion"  # what a pass is for

# Makes a rank bad, for tests: f(step, gradient of a parameter, "own", "audit" or "opinion") -> gradient.
AuditAdversary = Callable[[int, Tensor, str], Tensor]
# The passes of a step: yields mini-batches, each with what its pass is for.
Passes = Generator[tuple[Any, str], None, Any]


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
            RuntimeError: the mini-batch before was not passed backward.
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

    _adapter: DDPAdapter

    def __init__(
        self,
        model: DistributedDataParallel,
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
        self._on_conviction = on_conviction
        self._batch_of = batch_of
        self._seed = seed
        self._number = 0
        self._exchanges = 0
        self._own_passes = 0
        self._kind: str | None = None  # what the current pass is for
        self._mini_batches: list[Any] = []  # this rank's, in the current step
        self._buffers: dict[str, Tensor] = {}  # the buffers with which the step began
        self._used = b""  # see `StepRecord.reached`: in the last pass
        self._finished = True  # whether the last step has come to its end
        self._doubts: list[str] = []  # why this rank doubts
        self._convictions = Convictions()
        self._triggers = Triggers(n)
        self._found = AuditReport(last_clean_audit=dict.fromkeys(range(n)))
        self._attach(steps_after="the loop over a step of guard.steps()")
        self._parameters = self._adapter.reduced()
        self._make_bad(adversary)  # before its gradients are measured
        tolerant = settings["atol"] > 0 or settings["rtol"] > 0
        self._measure = Projections(settings["atol"], settings["rtol"]) if tolerant else Bits()
        self._agree = self._measure.agree
        self._gradients = GradientMeasure(self._parameters, self._adapter.device, self._measure)
        self._received: PartResult | None = None  # the right result of this rank's part, if it cannot compute it
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
                communicates, without ``no_sync()`` in the loop. An audit covers the first one, or all at a rate of 1.

        Yields:
            The steps.

        Raises:
            DecodingError: more ranks are wrong than the audit can correct; the loop over a step does not compute with
                the mini-batch that it yields, or changes gradients; or, with ``on_conviction="raise"``, a rank is
                convicted.
            RuntimeError: a step ended before all its mini-batches were taken and passed backward.
            TypeError: the loader yields something that cannot be sent to other ranks.
            ValueError: ranks are at different steps.
        """
        _checks.check_int("accumulate", accumulate, 1)
        self._agree_on_step()
        iterator = iter(loader)
        while mini_batches := list(itertools.islice(iterator, accumulate)):
            if self._batch_of is None and self._own_passes == 0:
                self._check_inputs(mini_batches)
            self._finished = False
            passes = self._run(mini_batches)
            yield AuditStep(passes)
            if not self._finished:
                passes.close()
                raise self._incomplete()

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
        # The loop may change what it gets, so later passes get copies.
        self._mini_batches = mini_batches if self._batch_of else shipping.copy(mini_batches)
        self._originals = mini_batches
        self._generators = shipping.generator_states(self._adapter.device)
        self._buffers = self._adapter.buffers()
        self._buffers_of_this_rank = self._adapter.buffers_of_this_rank()
        self._broadcasts_buffers = self._adapter.broadcasts_buffers
        self._is_first_pass = self._is_first_own_pass = True
        known = self._own_passes > 0 and self._adapter.buckets_are_final
        self._gradients.begin_step(self._seed, self._number, by_parameter=not known)
        try:
            claims, failure = yield from self._make_passes()
        except BaseException:
            self._kind = None
            self._adapter.synchronise(True)
            self._abort()
            raise
        self._kind = None
        self._end_step(claims, failure)

    def _make_passes(self) -> Passes:
        """Make passes until the gradient is right; return the ranks' records, and why the step failed or None."""
        step = self._number
        substituting = bool(self._substituted)
        audited = substituting or self.audit.is_audited(self._seed, step, len(self._mini_batches))
        with_state = self._state_check.is_due(step)
        earlier: Sequence[Row] = ()  # what ranks said before a doubt
        whole = substituting or len(self._mini_batches) == 1 or self.audit.rate == 1
        shifts: tuple[int, ...] = ()
        for _ in range(ATTEMPTS):
            if audited:
                shifts = self.audit.shifts(self._seed, step, self._hosts, self._convictions.convicted)
            yield from self._audit_passes(shifts, whole=whole)
            # DDP makes other buckets after its first synchronised pass, in which sums over ranks round differently. So
            # what an audit finds before is put right before, too.
            rehearse = bool(shifts) and self._own_passes == 0
            yield from self._own_pass(measured=bool(shifts), rehearse=rehearse)
            rows, claims = self._gather(len(shifts), with_state)
            disputed = self._disputed(rows, shifts)
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
            self._measure.learn(self._pairs(rows, shifts))
        self._found.audited += 1
        self._doubts = []
        return (yield from self._put_right(rows, shifts, disputed, claims, earlier, rehearsed=rehearse))

    def _put_right(
        self,
        rows: list[Row],
        shifts: Sequence[int],
        disputed: list[int],
        claims: Claims,
        earlier: Sequence[Row],
        *,
        rehearsed: bool,
    ) -> Passes:
        """Settle the disputes of an audited step, and contribute the right gradients; see `_make_passes`."""
        convicted = self._convictions.convicted
        first = rows
        accepted = {k: rows[k].contributed for k in self._in_sum if k not in disputed}
        # Who was wrong, about which part and as what; and who was wrong again.
        wrong: dict[int, tuple[int, str]] = {
            k: (k, "owner")
            for k, row in enumerate(earlier)
            if k in accepted and not self._agree(row.contributed, accepted[k])
        }
        again: set[int] = set()
        for _ in range(ATTEMPTS):
            if not disputed and not rehearsed:
                break
            rehearsed = False
            for part in disputed:
                said = yield from self._opinion_pass(part)
                right = opinions.settle(said, self._agree, convicted=convicted, least=self.audit.adversaries + 1)
                if right is None or not self._agree(accepted.setdefault(part, right), right):
                    why = f"{self.audit.adversaries + 1} ranks do not agree on part {part}"
                    return claims, self._explain(why) + HINT
                for j, role in self._wrong_about(part, right, first, shifts):
                    wrong.setdefault(j, (part, role))
                right_again = {j for j, measure in said.items() if self._agree(measure, right)}
                for j in said:
                    if j not in right_again and j not in convicted:
                        if j in wrong:
                            again.add(j)
                        else:
                            wrong[j] = (part, "auditor")
                if not self._agree(rows[part].contributed, right) or part in convicted:
                    helpers = sorted(right_again - convicted - wrong.keys())
                    if not helpers:
                        return claims, self._explain(f"no rank without a fault has the gradient of part {part}") + HINT
                    self._hand_over(helpers[0], part)
            yield from self._own_pass(measured=True)
            rows, claims = self._gather(0, with_state=False)
            disputed = []
            for part, right in accepted.items():
                if not self._agree(rows[part].contributed, right):
                    disputed.append(part)
                if part not in convicted and not self._agree(rows[part].computed, right):
                    if part in wrong:
                        again.add(part)
                    else:
                        wrong[part] = (part, "owner")
        else:
            return claims, self._explain("gradients are wrong again and again")
        self._observe(rows)
        return claims, self._judge(accepted, first, shifts, wrong, again)

    def _judge(
        self,
        accepted: dict[int, Measured],
        rows: Sequence[Row],
        shifts: Sequence[int],
        wrong: dict[int, tuple[int, str]],
        again: set[int],
    ) -> str | None:
        """Record who was wrong in a step that is right now, convict and acquit; return why the step fails, or None."""
        step, before = self._number, self._convictions.convicted
        if len(before | wrong.keys()) > self.audit.adversaries:
            return self._explain("more ranks were wrong", [*before, *wrong])
        convicted = []
        for j, (part, role) in sorted(wrong.items()):
            self._found.disputes.append(Dispute(step, self._ranks[j], part, role, j in again))
            self._recorder.add_audit(j, step=step, persistent=j in again)
            if self._convictions.lose(j, persistent=j in again):
                convicted.append(j)
                self._found.convicted[self._ranks[j]] = step
                self._recorder.log("%s is convicted in step %d", self._recorder.name(self._ranks[j]), step)
        for k in range(self.audit.workers):
            if k in before:
                # A part that is left out has no right measure but those of its auditors.
                others = opinions.opinions_of_others(rows, shifts, k)
                known = [accepted[k]] if k in accepted else [m for j, m in others.items() if j not in before]
                own = rows[k].computed if k in accepted else rows[k].audited
                if known and self._convictions.compare(k, right=self._agree(own, known[0])):
                    del self._found.convicted[self._ranks[k]]
                    self._found.acquitted.setdefault(self._ranks[k], []).append(step)
                    self._recorder.log("%s is acquitted in step %d", self._recorder.name(self._ranks[k]), step)
            elif k not in wrong:
                self._found.last_clean_audit[self._ranks[k]] = step
        if convicted and self._on_conviction == "raise":
            names = ", ".join(self._recorder.name(self._ranks[j]) for j in convicted)
            self._conviction = f"{names} computed wrong gradients, most recently in step {step}, and is convicted"
        return None

    def _wrong_about(
        self, part: int, right: Measured, rows: Sequence[Row], shifts: Sequence[int]
    ) -> Iterator[tuple[int, str]]:
        """Yield who was wrong about a part before the dispute, and as what."""
        convicted = self._convictions.convicted
        owner_is_right = self._agree(rows[part].contributed, right)
        if not owner_is_right and part not in convicted:
            yield part, "owner"
        # An audit of one mini-batch of several can only be compared with that of a right owner.
        if self._whole or owner_is_right:
            expected = right if self._whole else rows[part].audited
            for j, measure in opinions.opinions_of_others(rows, shifts, part).items():
                if j not in convicted and not self._agree(measure, expected):
                    yield j, "auditor"

    # ------------------------------------------------------------------------------------------------ passes

    def _audit_passes(self, shifts: Sequence[int], *, whole: bool) -> Passes:
        """Compute parts of other ranks; hand over those of substituted ranks."""
        n, own = self.audit.workers, self.worker
        self._whole = whole or not shifts
        self._audits: list[Tensor] = []
        self._received = None
        if not shifts:
            return
        waiting = set(self._substituted)
        packed = shipping.pack(self._inputs(whole=whole))
        for shift in shifts:
            with self._adapter.own_collectives():
                data = shipping.shift(packed, shift, self._communicator, self._adapter.device)
            self._audits.append((yield from self._pass_of((own + shift) % n, data, AUDIT, whole=whole)))
            for k in sorted(waiting):
                helper = (k - shift) % n
                if helper not in self._convictions.convicted:
                    self._hand_over(helper, k)
                    waiting.discard(k)

    def _opinion_pass(self, part: int) -> Passes:
        """Compute one part on all ranks; return its measures by worker."""
        device = self._adapter.device
        data = shipping.pack(self._inputs(whole=True)) if part == self.worker else None
        with self._adapter.own_collectives():
            data = shipping.broadcast(data, part, self._communicator, device)
        measure = yield from self._pass_of(part, data, OPINION, whole=True)
        with self._adapter.own_collectives():
            rows, _ = run_alone(self._transport.gather_record(measure))
        return {j: self._measure.read(row) for j, row in enumerate(rows)}

    def _inputs(self, *, whole: bool) -> list[Any]:
        """Return what other ranks need to compute this rank's part."""
        mini_batches = self._mini_batches if whole else self._mini_batches[:1]
        buffers = {name: value for name, value in self._buffers.items() if name in self._buffers_of_this_rank}
        return [None if self._batch_of else mini_batches, self._generators, buffers]

    def _from_batch_of(self, part: int) -> list[Any]:
        """Return a part's mini-batches as the user's function gives them."""
        assert self._batch_of is not None
        given = self._batch_of(self._number, part)
        return [given] if len(self._mini_batches) == 1 else list(given)

    def _pass_of(self, part: int, data: Tensor, kind: str, *, whole: bool) -> Passes:
        """Pass a part of another rank forward and backward without communication; return the gradient's measure."""
        like = self._inputs(whole=whole)
        mini_batches, generators, buffers = shipping.unpack(data, like, self._adapter.device)
        if self._batch_of is not None:
            mini_batches = self._from_batch_of(part)[: None if whole else 1]
        self._begin_pass(kind, generators, buffers)
        self._adapter.synchronise(False)
        for mini_batch in mini_batches:
            yield mini_batch, kind
        self._check_passed(any(parameter.grad is not None for parameter in self._parameters))
        self._found.passes += len(mini_batches) / len(self._mini_batches)
        self._used = self._record.reached()
        rest = self._digest_of_rest(self._used)
        return self._gradients.of_gradients(rest) if whole else self._gradients.of_gradients_by_parameter(rest)

    def _own_pass(self, *, measured: bool, rehearse: bool = False) -> Passes:
        """Pass this rank's own part forward and backward; unless it rehearses, add up the gradients of all ranks."""
        if self._is_first_own_pass:
            mini_batches = self._originals
        else:
            mini_batches = self._from_batch_of(self.worker) if self._batch_of else shipping.copy(self._mini_batches)
        self._is_first_own_pass = False
        self._begin_pass(OWN, self._generators, {})
        if self._unused is not None:
            self._unused.forget()
        self._gradients.begin_own_pass(measured=measured)
        last = len(mini_batches) - 1
        for i, mini_batch in enumerate(mini_batches):
            self._adapter.synchronise(i == last and not rehearse)
            yield mini_batch, OWN
            if i == 0 and not self._whole:
                self._gradients.add_first_mini_batch(self._digest_of_rest(self._record.reached()))
        if rehearse:
            self._gradients.add_gradients({} if self._received is None else self._received.gradients)
            self._end_record()
        self._check_passed(self._gradients.is_complete)
        rest = self._digest_of_rest(self._used)
        contributed = rest
        if self._received is not None:
            self._adapter.set_buffers(self._received.buffers)
            contributed = self._digest_of_rest(self._received.used)
        self._gradients.end_own_pass(rest, contributed)
        self._own_passes += not rehearse
        self._found.passes += 1

    def _end_record(self) -> None:
        """Record which parameters are used at the end of an own pass."""
        self._used = self._record.reached()
        self._record.end_part(None if self._received is None else self._received.used)

    def _digest_of_rest(self, used: bytes) -> Tensor:
        """Return the digest (2,) of what a pass has left besides gradients: buffers, and which parameters are used."""
        buffers = self._state_check.state.digest("buffers", self._number)
        words = torch.frombuffer(bytearray(used + b"\0"), dtype=torch.uint8).to(buffers.device)
        return ops.digest(torch.cat([buffers.view(torch.uint8), words]), self._number)

    def _begin_pass(self, kind: str, generators: Any, buffers: Any) -> None:
        """Begin a pass from the state in which the step began."""
        self._kind = kind
        self._adapter.begin_pass(broadcast_buffers=self._broadcasts_buffers)
        self._record.begin()
        if not (self._is_first_pass and kind == OWN):  # else this is the state
            self._adapter.set_buffers(self._buffers)
            self._adapter.set_buffers(buffers)
            shipping.set_generator_states(generators, self._adapter.device)
        self._is_first_pass = False

    def _check_passed(self, passed: bool) -> None:
        if not passed:
            raise self._incomplete()

    def _incomplete(self) -> RuntimeError:
        return RuntimeError(
            f"step {self._number} is not complete: each mini-batch that it yields needs one forward and one backward "
            "pass, until it yields no more, without no_sync() or another change of model.require_backward_grad_sync"
        )

    def _hand_over(self, helper: int, worker: int) -> None:
        """Send the result of one worker's last pass to another, which will contribute it."""
        with self._adapter.own_collectives():
            if self.worker == helper:
                buffers = self._adapter.buffers()
                gradients.hand_over(self._parameters, self._used, buffers, self._communicator, worker)
            elif self.worker == worker:
                self._received = gradients.take_over(self._parameters, self._communicator, helper)

    def _replace_buffers_of_dropped(self) -> None:
        """Give dropped ranks the buffers of another: theirs may be wrong, and DDP may give rank 0's to all."""
        device, helper = self._adapter.device, self._in_sum[0]
        with self._adapter.own_collectives():
            for worker in sorted(self._dropped) if self._buffers else ():
                if self.worker == helper:
                    shipping.send(shipping.pack(self._adapter.buffers()), self._communicator, worker, device)
                elif self.worker == worker:
                    data = shipping.receive(self._communicator, helper, device)
                    self._adapter.set_buffers(shipping.unpack(data, None, device))

    # ------------------------------------------------------------------------------------------------ hooks

    def _before_forward(self, module: torch.nn.Module, arguments: Any, keywords: Any) -> None:
        """Refuse a pass that no step has asked for."""
        if torch.is_grad_enabled() and module.training:
            self._check_in_step()

    def _check_in_step(self) -> None:
        if self._kind is None:
            raise RuntimeError(
                "an Audit needs the loop `for step in guard.steps(loader): for batch in step:` around forward and "
                "backward passes; got a pass outside it"
            )

    def _take(self, bucket: Bucket) -> None:
        """Measure a bucket of the own pass, and add up those of all ranks."""
        self._check_in_step()
        if self._kind != OWN:
            raise RuntimeError(
                "model.require_backward_grad_sync must be left to the guard, got a change in an audit: remove it and "
                "no_sync() from the loop, and accumulate with guard.steps(loader, accumulate=...)"
            )
        buffer = bucket.buffer
        if self._unused is not None:
            self._unused.see(buffer)
            if bucket.is_last:
                self._end_record()
        with self._seconds.decoding():
            self._gradients.add(bucket)
            if self._received is not None:
                pieces = buffer.values.split(list(buffer.lengths))
                for piece, parameter in zip(pieces, buffer.keys, strict=True):
                    piece.copy_(self._received.gradients[parameter])  # type: ignore[index]
                self._gradients.add_contributed(bucket)
            if self.worker in self._dropped:
                buffer.values.fill_(-0.0)  # x + -0.0 == x, to the last bit

        left = self.audit.workers - len(self._dropped)

        def complete(outcome: ExchangeOutcome) -> None:
            if self._dropped:
                buffer.values.mul_(self.audit.workers / left)
            bucket.complete()

        exchange = self._transport.exchange(Message(buffer.values, buffer), self._exchanges)
        self._exchanges += 1
        self._scheduler.start(exchange, name=f"no gradient in step {self.step}, {buffer.name}", complete=complete)
        if bucket.is_last:
            self._scheduler.complete_all()

    def _make_bad(self, adversary: AuditAdversary | None) -> None:
        """Let an adversary change every gradient that this rank computes."""
        if adversary is None:
            return

        def change(gradient: Tensor) -> Tensor:
            return gradient if self._kind is None else adversary(self._number, gradient.clone(), self._kind)

        for parameter in self._parameters:
            parameter.register_hook(change)

    # ------------------------------------------------------------------------------------------------ between passes

    @property
    def _substituted(self) -> frozenset[int]:
        return self._convictions.convicted if self._on_conviction != "drop" else frozenset()

    @property
    def _dropped(self) -> frozenset[int]:
        return self._convictions.convicted if self._on_conviction == "drop" else frozenset()

    @property
    def _in_sum(self) -> list[int]:
        return [k for k in range(self.audit.workers) if k not in self._dropped]

    def _disputed(self, rows: Sequence[Row], shifts: Sequence[int]) -> list[int]:
        return opinions.disputed_parts(
            rows, shifts, self._agree, convicted=self._convictions.convicted, dropped=self._dropped
        )

    def _pairs(self, rows: Sequence[Row], shifts: Sequence[int]) -> list[tuple[Measured, Measured]]:
        """Return each part's measure by its owner and by each auditor, without convicted ranks."""
        return [
            (rows[part].audited, measure)
            for part in self._in_sum
            for j, measure in opinions.opinions_of_others(rows, shifts, part).items()
            if not {part, j} & self._convictions.convicted
        ]

    def _gather(self, shifts: int, with_state: bool) -> tuple[list[Row], Claims]:
        """Gather what all ranks say after an own pass, in one exchange."""
        device = self._adapter.device
        with self._seconds.decoding():
            computed, contributed, first = self._gradients.of_own_pass()
            measures = [computed, contributed, computed if self._whole else first, *(self._audits if shifts else [])]
            doubts = torch.tensor([len(self._doubts) > 0], dtype=torch.int64, device=device)
            statistics = self._gradients.statistics().to(device)
            state = self._state_check.digests(self._number) if with_state else None
            record = self._record.vector(self._number, state, device)
            numbers = torch.cat([*measures, doubts, statistics.view(-1).view(torch.int64), record])
        with self._adapter.own_collectives():
            gathered, _ = run_alone(self._transport.gather_record(numbers))
        lengths = [measure.numel() for measure in measures]
        read = [opinions.read_row(row, lengths, len(statistics), self._measure.read) for row in gathered]
        claims = self._record.read(torch.stack([rest for _, rest in read]), ())
        used = {j: of_rank for j, of_rank in claims.used.items() if j not in self._dropped}
        return [row for row, _ in read], replace(claims, used=used)

    def _repair_state(self, claims: Claims) -> tuple[bool, str | None]:
        """Give the majority's parameters to ranks with others; return whether there were any, and what is wrong."""
        verdict = self._state_check.judge(claims.state)
        with self._adapter.own_collectives():
            problem = self._state_check.repair(verdict, self._number)
        return bool(verdict.wrong), problem

    def _is_doubtful(self, rows: Sequence[Row]) -> bool:
        """Return whether there is reason to audit a step on which the coin did not fall, and record it."""
        found = self._triggers.judge([row.statistics for row in rows], self._gradients.lengths)
        if any(row.doubts for row in rows):
            with self._adapter.own_collectives():
                reasons = gather_json(self._doubts, self._adapter.group, self._adapter.device)
            for j, row in enumerate(rows):
                if row.doubts:
                    found[j] = "; ".join(map(str, reasons[self._ranks[j]]))
        for j, reason in sorted(found.items()):
            self._found.triggers.append(Trigger(self._number, self._ranks[j], reason))
        return bool(found)

    def _observe(self, rows: Sequence[Row]) -> None:
        """Add the statistics of an accepted step to those with which the next ones are compared."""
        self._triggers.observe([row.statistics for row in rows], self._gradients.lengths)

    def _explain(self, why: str, workers: Iterable[int] = ()) -> str:
        """Return why a step has failed."""
        named = sorted({self._ranks[j] for j in workers})
        return f"no gradient in step {self._number}: {why}" + (
            f" than {self.audit!r} can correct: ranks {named}" if named else f", with {self.audit!r}"
        )

    def _forget_step(self) -> None:
        """See `GuardBase`."""
        self._mini_batches = self._originals = []
        self._buffers = {}
        self._received = None
        self._record.begin()
        if self._unused is not None:
            self._unused.forget()

    def _end_step(self, claims: Claims, failure: str | None) -> None:
        """End a step after its last pass."""
        step = self._number
        self._number += 1
        self._finished = True
        self.failed = failure is not None
        self._adapter.finish_step()
        if failure is not None or self._conviction is not None:
            self._adapter.drop_gradients()
            self._adapter.set_buffers(self._buffers)  # as if the step had not been
        if failure is not None:
            self._recorder.add_failure(step)
        else:
            if self._unused is not None:
                self._unused.settle(claims.used_parameters())
            self._replace_buffers_of_dropped()
        self._forget_step()
        self._recorder.deliver()
        if self._conviction is not None:
            conviction, self._conviction = self._conviction, None
            raise DecodingError(conviction)
        self._policy.apply(failure)

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
        return {
            **super().state_dict(check),
            "audit": {"convictions": self._convictions.state_dict(), "found": asdict(self._found)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Guard.load_state_dict`."""
        super().load_state_dict(state)
        if "audit" in state:  # not in the checkpoint of a run with a code
            self._convictions.load_state_dict(state["audit"]["convictions"])
            self._found = AuditReport.from_dict(state["audit"]["found"])

    def _restart(self, step: int) -> None:
        """See `GuardBase`."""
        self._number = step

    def report(self) -> Report:
        """Return what was found so far, with `Report.audit`; see `Guard.report`."""
        found = replace(deepcopy(self._found), sees=self._measure.sees)
        return replace(super().report(), trust=TRUST, audit=found)


TRUST = (
    "audit: up to s ranks may compute anything wrong in a step; what ranks send is not altered on the way; a fault is "
    "found when its step is audited."
)

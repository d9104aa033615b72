"""The guard, which puts a code between the gradients of a data-parallel model and its optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from draco_ext.codes import Code
from draco_ext.protocol.encoder import GradientEncoder
from draco_ext.protocol.messages import ExchangeOutcome
from draco_ext.training.adapter import Bucket
from draco_ext.training.agreement import BucketOutcome, StepFindings
from draco_ext.training.base import GuardBase
from draco_ext.training.inputs import InputCheck
from draco_ext.training.pending import PendingGradients
from draco_ext.training.placement import place_ranks
from draco_ext.training.record import Claims, majority
from draco_ext.training.sampler import announce_guard, check_workers_of_samplers, step_taken
from draco_ext.training.seeding import BATCH, LOADER
from draco_ext.training.step import Step
from draco_ext.training.watch import is_training

# A function that returns a bad rank's message: f(step, honest message) -> message. For tests and demonstrations.
Adversary = Callable[[int, Tensor], Tensor]


class Guard(GuardBase):
    """A guard, which decodes the gradients of a data-parallel model; made by `protect`.

    Attributes:
        code: the code.
        worker: this rank's worker number; with FSDP2 its replica's.
        failed: whether the last step failed. With ``on_failure="skip"`` do not call a GradScaler's ``step`` and
            ``update`` then, since it raises an error without gradients.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        code: Code,
        *,
        adversary: Adversary | None,
        seed: int,
        ranks_per_host: int | Sequence[int] | None,
        **settings: Any,
    ) -> None:
        super().__init__(
            model,
            code,
            workers=place_ranks(code, ranks_per_host),
            setup={"code": repr(code), "ranks_per_host": ranks_per_host},
            seed=seed,
            helpers=code.adversaries + 1,
            **settings,
        )
        self._adversary = adversary
        self._encoder = GradientEncoder(code, self.worker, scale_into_buffer=self._transport.needs_scaled_values)
        self._step = Step(code, self.worker, seed, shard=self._adapter.shard, shards=self._adapter.shards)
        self._exchanges = 0  # the number of exchanges so far; 0 until the first step's messages are sent
        self._inputs = InputCheck(code, self._ranks)  # used in the first step
        self._outcomes: list[BucketOutcome] = []  # the current step's
        self._claims: Claims | None = None  # the current step's
        self._waiting = 0  # bytes of the buckets whose exchange begins with the next bucket's
        self._elsewhere: set[int] = set()  # workers at another step, for which that was logged

        self._attach()
        self._pending = PendingGradients(self._adapter.reduced(), self._adapter.how_to_accumulate)
        self._step.seed(LOADER)
        announce_guard(self, code)

    @property
    def step(self) -> int:
        """The number of the next step."""
        return self._step.number

    # ------------------------------------------------------------------------------------------------ a step

    def steps(self, loader: Iterable[Any]) -> Iterator[Iterator[Any]]:
        """Cut a loader into steps.

        ``for step in guard.steps(loader): for x, y in step: loss(x, y).backward()``, then the optimizer's step. Each
        step yields the mini-batches of this rank's parts. Every mini-batch needs one forward and backward pass. With
        several parts, each gradient is encoded when it is computed, into one buffer of the gradient's size.

        Args:
            loader: a loader over a `RedundantBatchSampler`, or any iterable of mini-batches that yields those of
                `data_ranks` in order, step after step. Whatever is drawn while it makes one is drawn alike on ranks
                with that part.

        Raises:
            RuntimeError: a step ended before all its mini-batches were taken and passed backward; or the gradients of
                the step before would be lost, since no optimizer has used them.
        """
        self._step.in_loop = True
        try:
            self._step.seed(LOADER, 0)  # a DataLoader now draws the seeds of its workers
            iterator = iter(loader)
            while True:
                before = self.step
                self._step.seed(LOADER, 0)
                try:
                    first = next(iterator)
                except StopIteration:
                    return
                yield self._parts_of_step(first, iterator)
                if self.step != before + 1:
                    raise self._step.incomplete(before)
        finally:
            self._step.in_loop = self._step.awaited = False

    def _parts_of_step(self, first: Any, iterator: Iterator[Any]) -> Iterator[Any]:
        step, number = self._step, self._step.number
        parts = step.parts
        for i in range(len(parts)):
            if i > 0:
                if step.awaited:
                    raise step.incomplete(number)
                step.seed(LOADER, i)
            try:
                batch = first if i == 0 else next(iterator)
            except StopIteration:
                raise RuntimeError(f"the loader ended within a step of {len(parts)} mini-batches") from None
            if i == 0:
                self._pending.check(number)
            step.begin_part(i)
            self._adapter.begin_part()
            self._record.begin_part(i)
            if self._exchanges == 0:
                self._inputs.see_batch(i, batch)
            step.seed(BATCH)
            yield batch

    def seed_mini_batch(self) -> None:
        """Seed the global generators when a sampler is asked for a mini-batch."""
        self._step.seed_loading()

    def _before_forward(self, module: torch.nn.Module, arguments: Any, keywords: Any) -> None:
        """Seed the generators before a forward pass, so that dropout is the same on all ranks with this part."""
        if not torch.is_grad_enabled():
            return
        step = self._step
        self._record.see(step.index, (arguments, keywords), self._adapter.device)
        if self._exchanges == 0 and step.forwards == 0:
            check_workers_of_samplers(self.code, self._workers)
            self._inputs.see_inputs(step.index, (arguments, keywords))
        if not is_training(module):
            return
        step.check_loop()
        step.accumulated += not self._adapter.synchronises
        step.seed(step.forwards)
        step.forwards += 1

    def _take(self, bucket: Bucket) -> None:
        """Encode a bucket of a backward pass; in the last part, also exchange and decode its messages."""
        step = self._step
        step.check_loop()
        if step.in_loop and not step.awaited:
            raise RuntimeError(
                "guard.steps() takes one backward pass for each mini-batch, got another: put all but the last of a "
                "mini-batch under model.no_sync()"
            )
        if step.in_last_part and self._exchanges == 0:
            problem = self._inputs.compare(self._adapter.group, self._adapter.device, self._recorder)
            if problem := self._agreement.first(problem):
                raise ValueError(problem)
        with self._seconds.encoding():
            self._encoder.add(bucket.buffer, step.parts, step.index)
        if step.in_last_part and self._unused is not None:
            self._unused.see(bucket.buffer)
        if self._unused is not None and bucket.is_last:  # all used parameters have their gradients
            self._record.end_part()
        if step.in_last_part:
            self._exchange(bucket)
        else:
            bucket.complete()
        if bucket.is_last:
            step.awaited = False

    def _exchange(self, bucket: Bucket) -> None:
        """Start the exchange of this rank's message for a bucket; with the last bucket, complete all exchanges."""
        if bucket.is_last if self._unused is not None else bucket.index == 0:
            self._send_record()
        message = self._encoder.message(bucket.buffer)
        if self._adversary is not None and message.values.numel() > 0:
            altered = self._adversary(self.step, message.values.clone()).contiguous()
            message = replace(message, values=altered, buffer_holds_scaled_values=False)

        def complete(outcome: ExchangeOutcome) -> None:
            shards: dict[int, tuple[int, ...]] = dict.fromkeys(outcome.suspects, (self._adapter.shard,))
            self._outcomes.append(BucketOutcome(bucket.index, bucket.buffer.values.numel(), outcome, shards))
            bucket.complete()

        exchange = self._transport.exchange(message, self._exchanges)
        self._exchanges += 1
        at_once = bucket.is_last or bucket.at_once
        # Small buckets begin together: the messages with which they are checked then go together, too.
        self._waiting += bucket.buffer.values.numel() * bucket.buffer.values.element_size()
        with_next = self._waiting < self._adapter.small_buckets and not at_once
        self._waiting = self._waiting if with_next else 0
        name = f"no gradient in step {self.step}, {bucket.buffer.name}"
        self._scheduler.start(exchange, name=name, complete=complete, with_next=with_next)
        if at_once:
            self._scheduler.complete_all()
        if bucket.is_last:
            self._adapter.call_after_backward(self._finish)

    def _send_record(self) -> None:
        """Send this rank's record of the step; all ranks do this at the same point of every step."""
        with self._seconds.decoding():
            state = self._state_check.digests(self.step) if self._state_check.is_due(self.step) else None
            record = self._record.vector(self.step, state, self._adapter.device)

        def complete(gathered: tuple[Tensor, tuple[int, ...]]) -> None:
            self._claims = self._record.read(*gathered)

        name = f"no gradient in step {self.step}, record of the step"
        self._scheduler.start(self._transport.gather_record(record), name=name, complete=complete, background=True)

    def _forget_step(self) -> None:
        """Forget what a step has collected, whether it came to its end or not."""
        self._claims, self._outcomes = None, []
        self._waiting = 0
        self._step.begin(self._step.number)  # its forward passes count anew
        self._record.begin()
        if self._unused is not None:
            self._unused.forget()

    def _finish(self) -> None:
        """End a step after its last backward pass, when the gradients are in place."""
        try:
            self._end_step()
        except BaseException:
            self._adapter.drop_gradients()
            raise
        finally:
            self._forget_step()

    def _end_step(self) -> None:
        claims = self._claims
        assert claims is not None
        failure = self._agree_on_step(claims.steps)
        verdict = self._state_check.judge(claims.state)
        found = StepFindings(failure, self._outcomes, frozenset(), frozenset(verdict.with_wrong("parameters")))
        clean = failure is None and not verdict.wrong and all(each.outcome.is_clean for each in self._outcomes)
        # The same on all ranks of this worker from here on.
        said = self._agreement.numbers(not clean, bool(claims.state), self._step.number)
        if any(unclean for unclean, _, _ in said):
            found = self._agreement.merge(replace(found, other_data=frozenset(claims.with_other_data())))
        if len({number for _, _, number in said}) > 1:
            found = replace(found, failure="all ranks must be at the same step: all must call load_state_dict")
        failure = self._record_outcomes(found)
        problem = None
        if any(with_state for _, with_state, _ in said):
            with self._adapter.own_collectives():
                problem = self._state_check.repair(verdict, self.step)
        failure = failure or problem or self._policy.explain_state(self.step, found.other_parameters)
        step, accumulated = self._step.number, self._step.accumulated
        self._step.begin(step + 1)
        step_taken(self, self.code, 1 + accumulated)
        self.failed = failure is not None
        self._step.seed(LOADER)
        self._adapter.finish_step()
        if failure is not None:
            self._recorder.add_failure(step)
            self._adapter.drop_gradients()
        elif self._unused is not None:
            self._unused.settle(claims.used_parameters())
        if self._step.in_loop:  # otherwise a step does not begin without gradients
            self._pending.begin()
        self._recorder.deliver()
        self._policy.apply(failure)

    def _agree_on_step(self, steps: dict[int, int]) -> str | None:
        """Adopt the majority's step number, in case this rank has loaded another checkpoint or none.

        Returns:
            The error message if there is no majority, else None.
        """
        usual = majority(steps)
        if usual is None:
            by_rank = {self._ranks[j]: step for j, step in steps.items()}
            return f"all ranks must be at the same step, got {by_rank}: all must call load_state_dict"
        for j, step in steps.items():
            if step != usual and j not in self._elsewhere:
                self._elsewhere.add(j)
                self._recorder.log(
                    "%s says it is at step %d, others at %d: all ranks must call load_state_dict",
                    self._recorder.name(self._ranks[j]),
                    step,
                    usual,
                )
        self._step.number = usual
        return None

    def _record_outcomes(self, found: StepFindings) -> str | None:
        """Record the findings of a step's exchanges; return why the step failed, or None."""
        failure = found.failure
        for each in found.outcomes:
            outcome, bucket = each.outcome, each.bucket
            if outcome.is_clean:
                continue
            if self.code.bounded:
                undecided = sorted(set(outcome.left_out) - set(outcome.suspects))
                self._recorder.add_undecided(undecided, step=self.step, bucket=bucket, failed=outcome.failed)
            elif not outcome.failed:
                self._recorder.weigh(outcome.left_out, outcome.suspects, self.step)
            if outcome.failed and failure is None:
                failure = self._policy.explain_decoding(
                    self.step,
                    bucket,
                    suspects=outcome.suspects,
                    missing=outcome.missing,
                    other_data=found.other_data,
                    other_parameters=found.other_parameters,
                )
            for worker in (*outcome.suspects, *outcome.missing):
                differs = outcome.suspects.get(worker)
                finite = differs is not None and differs.largest < float("inf")
                kind = "data" if worker in found.other_data else "gradient"
                self._recorder.add_message(
                    worker,
                    "missing" if worker in outcome.missing else kind,
                    step=self.step,
                    bucket=bucket,
                    failed=outcome.failed,
                    elements=None if differs is None else differs.elements,
                    first=None if differs is None else differs.first,
                    largest=differs.largest if differs is not None and finite else None,
                    shards=each.shards.get(worker, ()),
                )
        return failure

    def _restart(self, step: int) -> None:
        """See `GuardBase`."""
        self._step.begin(step)
        self._pending.forget()
        self._step.seed(LOADER)

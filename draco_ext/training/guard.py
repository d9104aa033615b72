"""The guard, which puts a code between the gradients of a data-parallel model and its optimizer."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from draco_ext import _checks, ops
from draco_ext.codes import Code
from draco_ext.protocol.communicator import ProcessGroupCommunicator
from draco_ext.protocol.encoder import GradientEncoder
from draco_ext.protocol.exchange import ExchangeScheduler
from draco_ext.protocol.groups import membership
from draco_ext.protocol.messages import ExchangeOutcome
from draco_ext.protocol.transports import make_transport
from draco_ext.reporting.ledger import Finding
from draco_ext.reporting.recorder import Recorder, open_ledger
from draco_ext.reporting.report import Report
from draco_ext.training.ddp import Bucket, DDPAdapter, UnusedParameters
from draco_ext.training.failure import FailurePolicy
from draco_ext.training.handshake import exchange_setup, sha256_of
from draco_ext.training.inputs import InputCheck
from draco_ext.training.placement import place_ranks
from draco_ext.training.record import Claims, StepRecord, majority
from draco_ext.training.reproducibility import SelfTest, self_test
from draco_ext.training.sampler import announce_guard, check_workers_of_samplers, step_taken
from draco_ext.training.seeding import BATCH, LOADER
from draco_ext.training.state import StateVerdict
from draco_ext.training.state_check import StateCheck
from draco_ext.training.step import Step

# A function that returns a bad rank's message: f(step, honest message) -> message. For tests and demonstrations.
Adversary = Callable[[int, Tensor], Tensor]


class Guard:
    """A guard, which decodes the gradients of a DistributedDataParallel model; made by `protect`.

    Attributes:
        code: the code.
        worker: this rank's worker number.
        failed: whether the last step failed. With ``on_failure="skip"`` do not call a GradScaler's ``step`` and
            ``update`` then, since it raises an error without gradients.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        code: Code,
        *,
        transport: str,
        on_failure: str,
        ledger: str | Path | None,
        callback: Callable[[Finding], None] | None,
        adversary: Adversary | None,
        atol: float,
        rtol: float,
        seed: int,
        ranks_per_host: int | Sequence[int] | None,
        deadline: float,
        check_state_every: int,
    ) -> None:
        self.code = code
        self.failed = False
        self._adversary = adversary
        self._adapter = DDPAdapter(model)
        group, device = self._adapter.group, self._adapter.device
        workers = place_ranks(code, ranks_per_host)
        self._workers = workers
        self._ranks = tuple(sorted(range(code.workers), key=workers.__getitem__))
        rank = dist.get_rank(group)
        self.worker = workers[rank]
        opened, problem = open_ledger(ledger, rank)
        setup = {
            "code": repr(code),
            "transport": transport,
            "on_failure": on_failure,
            "ranks_per_host": ranks_per_host,
            "the placement of ranks (its digest)": sha256_of(workers),
            "atol": atol,
            "rtol": rtol,
            "seed": seed,
            "deadline": deadline,
            "check_state_every": check_state_every,
            "the number of process groups that a rank is in": membership(group),
            **self._adapter.setup(),
        }
        if not code.exact and transport != "server" and device.type == "cpu":
            # Every rank decodes for itself, and different types of device round differently.
            setup["instruction set (DRACO_ISA)"] = ops.build_info()["instruction_set"]
        hosts = exchange_setup(setup, socket.gethostname(), problem, group, device)

        communicator = ProcessGroupCommunicator(group, self._ranks)
        self._seconds = communicator.seconds
        self._transport = make_transport(transport, code, communicator, deadline=deadline, atol=atol, rtol=rtol)
        self._scheduler = ExchangeScheduler(self._seconds)
        self._encoder = GradientEncoder(code, self.worker, scale_into_buffer=self._transport.needs_scaled_values)
        self._recorder = Recorder(rank, self._ranks, hosts, ledger=opened, callback=callback)
        self._policy = FailurePolicy(code, self._ranks, on_failure, self._recorder.log)
        self._step = Step(code, self.worker, seed)
        self._state_check = StateCheck(model, self._transport, self._recorder, every=check_state_every, seed=seed)
        self._exchanges = 0  # the number of exchanges so far; 0 until the first step's messages are sent
        self._inputs = InputCheck(code, self._ranks)  # used in the first step
        self._outcomes: list[tuple[ExchangeOutcome, int]] = []  # the current step's, each with its bucket's number
        self._claims: Claims | None = None  # the current step's
        self._elsewhere: set[int] = set()  # workers at another step, for which that was logged

        # The server's threads communicate at any time, so the server cannot watch collectives; the other ranks do.
        is_server = self._transport.is_served and rank == 0
        self._adapter.attach(
            take=self._take, before_forward=self._before_forward, abort=self._abort, watch_collectives=not is_server
        )
        reduced = self._adapter.reduced()
        usage = self._adapter.parameters_may_be_unused
        self._record = StepRecord(code, self.worker, reduced, usage=usage)
        self._unused = UnusedParameters(reduced, self._record) if usage else None
        self._step.seed(LOADER)
        announce_guard(self, code)

    @property
    def step(self) -> int:
        """The number of the next step."""
        return self._step.number

    # ------------------------------------------------------------------------------------------------ a step

    def steps(self, loader: Iterable[Any]) -> Iterator[Iterator[Any]]:
        """Cut a loader over a `RedundantBatchSampler` into steps.

        ``for step in guard.steps(loader): for x, y in step: loss(x, y).backward()``, then the optimizer's step. Each
        step yields the mini-batches of this rank's parts. Every mini-batch needs one forward and backward pass. With
        several parts, each gradient is encoded when it is computed, into one buffer of the gradient's size.

        Raises:
            RuntimeError: a step ended before all its mini-batches were taken and passed backward.
        """
        iterator = iter(loader)
        self._step.in_loop = True
        try:
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
        if not module.training:
            return
        step.check_loop()
        step.accumulated += not module.require_backward_grad_sync
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
            self._inputs.compare(self._adapter.group, self._adapter.device, self._recorder)
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
        if self._adversary is not None:
            altered = self._adversary(self.step, message.values.clone()).contiguous()
            message = replace(message, values=altered, buffer_holds_scaled_values=False)

        def complete(outcome: ExchangeOutcome) -> None:
            self._outcomes.append((outcome, bucket.index))
            bucket.complete()

        exchange = self._transport.exchange(message, self._exchanges)
        self._exchanges += 1
        self._scheduler.start(
            exchange, name=f"no gradient in step {self.step}, {bucket.buffer.name}", complete=complete
        )
        if bucket.is_last:
            self._scheduler.complete_all()
            self._adapter.call_after_backward(self._finish)

    def _send_record(self) -> None:
        """Send this rank's record of the step; all ranks do this at the same point of every step."""
        with self._seconds.decoding():
            state = self._state_check.digests(self.step)
            record = self._record.vector(self.step, state, self._adapter.device)

        def complete(gathered: tuple[Tensor, tuple[int, ...]]) -> None:
            self._claims = self._record.read(*gathered)

        name = f"no gradient in step {self.step}, record of the step"
        self._scheduler.start(self._transport.gather_record(record), name=name, complete=complete, background=True)

    def _abort(self) -> None:
        """Give up a step in which an error was raised."""
        self._scheduler.close()
        self._transport.abort()
        self._forget_step()
        self._adapter.drop_gradients()  # both this rank's own and the decoded ones
        self._recorder.deliver()

    def _forget_step(self) -> None:
        """Forget what a step has collected, whether it came to its end or not."""
        self._claims, self._outcomes = None, []
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
        failure = self._record_outcomes(claims, verdict, failure)
        with self._adapter.own_collectives():
            problem = self._state_check.repair(verdict, self.step) if claims.state else None
        failure = failure or problem or self._policy.explain_state(self.step, verdict.with_wrong("parameters"))
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

    def _record_outcomes(self, claims: Claims, state: StateVerdict, failure: str | None) -> str | None:
        """Record the findings of a step's exchanges; return why the step failed, or None."""
        if all(outcome.is_clean for outcome, _ in self._outcomes):
            return failure
        other_data = claims.with_other_data()
        for outcome, bucket in self._outcomes:
            if not outcome.failed:
                self._recorder.weigh(outcome.left_out, outcome.suspects, self.step)
            elif failure is None:
                failure = self._policy.explain_decoding(
                    self.step,
                    bucket,
                    suspects=outcome.suspects,
                    missing=outcome.missing,
                    other_data=other_data,
                    other_parameters=state.with_wrong("parameters"),
                )
            for worker in (*outcome.suspects, *outcome.missing):
                differs = outcome.suspects.get(worker)
                finite = differs is not None and differs.largest < float("inf")
                self._recorder.add_message(
                    worker,
                    "missing" if worker in outcome.missing else "data" if worker in other_data else "gradient",
                    step=self.step,
                    bucket=bucket,
                    failed=outcome.failed,
                    elements=None if differs is None else differs.elements,
                    first=None if differs is None else differs.first,
                    largest=differs.largest if differs is not None and finite else None,
                )
        return failure

    # ------------------------------------------------------------------------------------------ between steps

    def self_test(self, batch: Any, loss: Callable[[torch.nn.Module, Any], Tensor] | None = None) -> SelfTest:
        """Test whether honest ranks compute the same bits, as the repetition code requires.

        Every rank computes the gradient of rank 0's batch twice, with the same random numbers, and all gradients are
        compared. All ranks must call it, before training or between steps. It changes neither the model nor its
        gradients.

        Args:
            batch: a batch as the loader yields it, of the same shapes and dtypes on all ranks.
            loss: f(module, batch) -> scalar. Default: the mean square of the module's output for the batch, or for its
                first element if it is a tuple or list.

        Returns:
            Whether all gradients agree; if not, the first parameter whose gradient differs, on which ranks, and which
            setting may help. This is also logged as a warning.

        Raises:
            ValueError: the batch's shapes or dtypes differ between ranks.
        """
        result = self_test(self._adapter.model.module, self._adapter.group, batch, loss)
        if not result.reproducible:
            self._recorder.log("%s", result)
        return result

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Compare and repair an optimizer's state (its tensors and numbers) together with the parameters.

        All ranks must call it. It costs two or three times as much as comparing the parameters.

        Raises:
            TypeError: it is not an optimizer, or its state is not replicated on all ranks.
        """
        if not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "consolidate_state_dict"):
            raise TypeError(
                "optimizer must be a torch.optim.Optimizer with the same state on all ranks, "
                f"got {type(optimizer).__name__}"
            )
        self._state_check.state.watch(optimizer)

    def check_state(self, timeout: float = 60.0) -> tuple[int, ...]:
        """Compare parameters, buffers and watched optimizers of all ranks now, and repair ranks that differ.

        All ranks must call it, between steps. It costs one read of these values and a small exchange.

        Args:
            timeout: seconds to wait for the other ranks to call it.

        Returns:
            The ranks that were wrong.

        Raises:
            DecodingError: there is no majority.
            RuntimeError: another rank does not call it.
        """
        _checks.check_tolerance("timeout", timeout)
        present = set(range(self.code.workers)) - self._recorder.missing_in(self.step - 1)
        with self._adapter.own_collectives():
            wrong = self._state_check.run(self.step, present, timeout)
        return tuple(sorted(self._ranks[worker] for worker in wrong))

    def state_dict(self, check: bool = True) -> dict[str, Any]:
        """Return the guard's state for a checkpoint, with which training continues exactly and known suspects are kept.

        Args:
            check: whether to call `check_state` first, so that no rank writes a wrong checkpoint. Then all ranks must
                call it, and before the model's own ``state_dict()``. Otherwise one rank alone may call it.

        Raises:
            DecodingError: see `check_state`.
            RuntimeError: another rank does not call it.
        """
        if check:
            self.check_state()
        return {"step": self.step, **self._recorder.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned; it must be the same on all ranks."""
        _checks.check_int("state['step']", state["step"], 0)
        self._step.begin(state["step"])
        self._recorder.load_state_dict(state)
        self._state_check.forget()
        self._step.seed(LOADER)

    def report(self) -> Report:
        """Return the suspects, with their steps and numbers of buckets, and the steps that failed.

        The report is the same on all ranks, except for `seconds`, `unwritten` and `undelivered`. It is a snapshot that
        does not change afterwards.
        """
        return self._recorder.report(trust=self._transport.trust, steps=self.step, seconds=self._seconds)

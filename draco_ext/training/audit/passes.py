"""The passes of an audited step: over parts of other ranks, over this rank's own, and what they send each other."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor

from draco_ext import ops
from draco_ext.protocol.communicator import Communicator
from draco_ext.protocol.exchange import run_alone
from draco_ext.protocol.transports.base import Transport
from draco_ext.training.adapter import AuditAdapter, Bucket
from draco_ext.training.audit import gradients, shipping
from draco_ext.training.audit.gradients import GradientMeasure, PartResult
from draco_ext.training.audit.measures import Measure, Measured
from draco_ext.training.ddp import UnusedParameters
from draco_ext.training.record import StepRecord
from draco_ext.training.state import ReplicatedState

OWN, AUDIT, OPINION = "own", "audit", "opinion"  # what a pass is for

# Passes: yields mini-batches, each with what its pass is for.
Passes = Generator[tuple[Any, str], None, Any]


class PassRunner:
    """A runner of passes, each of which begins from the state in which the step began.

    A pass yields the mini-batches that the loop is to pass forward and backward. All ranks make the same passes.

    Args:
        adapter: the adapter of the model.
        communicator: how ranks send each other inputs and gradients.
        transport: gathers opinions.
        record: this rank's record of the step.
        unused: the rule for unused parameters, if there may be any.
        state: the state whose buffers are compared.
        measure: compares gradients.
        batch_of: see `protect`.
        count: called after every pass with the share of the step's mini-batches that it had.

    Attributes:
        kind: what the current pass is for; None between steps.
        whole: whether others audit all mini-batches of a part, and not the first one only.
        audits: the measures of what this rank has computed of others' parts, in the order of the shifts.
        gradients: the measures of this rank's gradients.
        own_passes: how many own passes were made that added up the gradients of all ranks.
    """

    def __init__(
        self,
        *,
        adapter: AuditAdapter,
        communicator: Communicator,
        transport: Transport,
        record: StepRecord,
        unused: UnusedParameters | None,
        state: ReplicatedState,
        measure: Measure,
        batch_of: Callable[[int, int], Any] | None,
        count: Callable[[float], None],
    ) -> None:
        self._adapter = adapter
        self._communicator = communicator
        self._transport = transport
        self._record = record
        self._unused = unused
        self._state = state
        self._measure = measure
        self._batch_of = batch_of
        self._count = count
        self._worker = communicator.worker
        self._pieces = adapter.pieces()
        self.gradients = GradientMeasure(adapter, measure)
        self.own_passes = 0
        self._used = b""  # see `StepRecord.reached`: in the last pass
        self.forget()

    def forget(self) -> None:
        """Forget the data of a step, after its end."""
        self.kind: str | None = None
        self._mini_batches: list[Any] = []
        self._originals: list[Any] = []
        self._buffers: dict[str, Tensor] = {}  # the buffers with which the step began
        self.audits: list[Tensor] = []
        self.whole = True
        # The right result of this rank's part, if it cannot compute it.
        self._received: PartResult | None = None

    def begin_step(self, step: int, mini_batches: list[Any], seed: int) -> None:
        """Begin a step with this rank's mini-batches, from the current state."""
        self._step = step
        # The loop may change what it gets, so later passes get copies.
        self._mini_batches = mini_batches if self._batch_of else shipping.copy(mini_batches)
        self._originals = mini_batches
        self._generators = shipping.generator_states(self._adapter.device)
        self._buffers = self._adapter.buffers()
        self._buffers_of_this_rank = self._adapter.buffers_of_this_rank()
        self._broadcasts_buffers = self._adapter.broadcasts_buffers
        self._is_first_pass = self._is_first_own_pass = True
        known = self.own_passes > 0 and self._adapter.buckets_are_final
        self.gradients.begin_step(seed, step, by_parameter=not known and not self._adapter.buckets_in_all_passes)

    def undo(self) -> None:
        """Drop the gradients and restore the buffers, as if the step had not been."""
        self._adapter.drop_gradients()
        self._adapter.set_buffers(self._buffers)

    # ------------------------------------------------------------------------------------------------ passes

    def audit_passes(self, shifts: Sequence[int], helpers: Sequence[dict[int, int]], *, whole: bool) -> Passes:
        """Compute parts of other ranks, and hand over those that their owners cannot compute.

        Args:
            shifts: who computes what: worker j part j + shift.
            helpers: for each shift the workers that get the gradient of their part, and from whom.
            whole: whether parts have all mini-batches, or the first one only.
        """
        n, own = self._communicator.workers, self._worker
        self.whole = whole or not shifts
        self.audits = []
        self._received = None
        if not shifts:
            return
        packed = shipping.pack(self._inputs(whole=whole))
        for shift, helped in zip(shifts, helpers, strict=True):
            with self._adapter.own_collectives():
                data = shipping.shift(packed, shift, self._communicator, self._adapter.device)
            keep = own in helped.values()
            self.audits.append((yield from self._pass_of((own + shift) % n, data, AUDIT, whole=whole, keep=keep)))
            for worker, helper in sorted(helped.items()):
                self.hand_over(helper, worker)

    def opinion_pass(self, part: int) -> Passes:
        """Compute one part on all ranks; return its measures by worker."""
        device = self._adapter.device
        data = shipping.pack(self._inputs(whole=True)) if part == self._worker else None
        with self._adapter.own_collectives():
            data = shipping.broadcast(data, part, self._communicator, device)
        measure = yield from self._pass_of(part, data, OPINION, whole=True, keep=True)
        with self._adapter.own_collectives():
            rows, _ = run_alone(self._transport.gather_record(measure))
        opinions: dict[int, Measured] = {j: self._measure.read(row) for j, row in enumerate(rows)}
        return opinions

    def own_pass(self, *, measured: bool, rehearse: bool = False) -> Passes:
        """Compute this rank's own part; unless it rehearses, add up the gradients of all ranks.

        Args:
            measured: whether others' opinions are compared with this pass.
            rehearse: whether this pass is only measured.
        """
        if self._is_first_own_pass:
            mini_batches = self._originals
        else:
            mini_batches = self._from_batch_of(self._worker) if self._batch_of else shipping.copy(self._mini_batches)
        self._is_first_own_pass = False
        self._begin_pass(OWN, self._generators, {})
        if self._unused is not None:
            self._unused.forget()
        self.gradients.begin_own_pass(measured=measured)
        last = len(mini_batches) - 1
        for i, mini_batch in enumerate(mini_batches):
            self._adapter.synchronise(i == last and not rehearse)
            yield mini_batch, OWN
            if i == 0 and not self.whole:
                self.gradients.add_first_mini_batch(self._digest_of_rest(self._record.reached()))
        if rehearse:
            self.gradients.add_gradients({} if self._received is None else self._received.gradients)
            self._end_record()
        self._check_passed(self.gradients.is_complete)
        rest = self._digest_of_rest(self._used)
        contributed = rest
        if self._received is not None:
            self._adapter.set_buffers(self._received.buffers)
            contributed = self._digest_of_rest(self._received.used)
        self.gradients.end_own_pass(rest, contributed)
        self.own_passes += not rehearse
        self._count(1)

    def take(self, bucket: Bucket, *, factor: float | None) -> bool:
        """Measure a bucket of the own pass, and put what this rank contributes instead into it.

        Args:
            bucket: the bucket.
            factor: see `GradientMeasure.add`.

        Returns:
            Whether the bucket was multiplied by the factor.
        """
        if self._unused is not None:
            self._unused.see(bucket.buffer)
            if bucket.is_last:
                self._end_record()
        is_scaled = self.gradients.add(bucket, factor=None if self._received is not None else factor)
        if self._received is not None and bucket.buffer.keys:
            pieces = bucket.buffer.values.split(list(bucket.buffer.lengths))
            for piece, parameter in zip(pieces, bucket.buffer.keys, strict=True):
                piece.copy_(self._received.gradients[parameter])  # type: ignore[index]
            self.gradients.add_contributed(bucket)
        return is_scaled

    def incomplete(self) -> RuntimeError:
        """Return the error for a step that was left before its end."""
        return RuntimeError(
            f"step {self._step} is not complete: each mini-batch that it yields needs one forward and one backward "
            f"pass, until it yields no more, without {self._adapter.ways_to_accumulate}"
        )

    def see(self, bucket: Bucket) -> None:
        """Measure a bucket of a pass that is not the own one."""
        self.gradients.add_other(bucket)

    def _pass_of(self, part: int, data: Tensor, kind: str, *, whole: bool, keep: bool) -> Passes:
        """Pass a part of another rank forward and backward without communication; return the gradient's measure.

        Args:
            part: the part.
            data: its inputs.
            kind: what the pass is for.
            whole: whether to compute all mini-batches, or the first one only.
            keep: whether the gradient may be handed over.
        """
        like = self._inputs(whole=whole)
        mini_batches, generators, buffers = shipping.unpack(data, like, self._adapter.device)
        if self._batch_of is not None:
            mini_batches = self._from_batch_of(part)[: None if whole else 1]
        self._begin_pass(kind, generators, buffers)
        self.gradients.begin_other_pass(keep=keep)
        last = len(mini_batches) - 1
        for i, mini_batch in enumerate(mini_batches):
            self._adapter.synchronise(i == last and self._adapter.buckets_in_all_passes)
            yield mini_batch, kind
        self._check_passed(self.gradients.is_complete or any(p.grad is not None for p in self._pieces))
        self._count(len(mini_batches) / len(self._mini_batches))
        self._used = self._record.reached()
        rest = self._digest_of_rest(self._used)
        return self.gradients.of_other_pass(rest) if whole else self.gradients.of_gradients_by_parameter(rest)

    def _begin_pass(self, kind: str, generators: Any, buffers: Any) -> None:
        """Begin a pass from the state in which the step began."""
        self.kind = kind
        self._adapter.begin_pass(broadcast_buffers=self._broadcasts_buffers, reduces=kind == OWN)
        self._record.begin()
        if not (self._is_first_pass and kind == OWN):  # else this is the state
            self._adapter.set_buffers(self._buffers)
            self._adapter.set_buffers(buffers)
            shipping.set_generator_states(generators, self._adapter.device)
        self._is_first_pass = False

    def _check_passed(self, passed: bool) -> None:
        if not passed:
            raise self.incomplete()

    def _end_record(self) -> None:
        """Record which parameters are used at the end of an own pass."""
        self._used = self._record.reached()
        self._record.end_part(None if self._received is None else self._received.used)

    def _digest_of_rest(self, used: bytes) -> Tensor:
        """Return the digest (2,) of what a pass has left besides gradients: buffers, and which parameters are used."""
        buffers = self._state.digest("buffers", self._step)
        words = torch.frombuffer(bytearray(used + b"\0"), dtype=torch.uint8).to(buffers.device)
        return ops.digest(torch.cat([buffers.view(torch.uint8), words]), self._step)

    # ------------------------------------------------------------------------------------------------ what is sent

    def hand_over(self, helper: int, worker: int) -> None:
        """Send the result of one worker's last pass to another, which contributes it in its next own pass."""
        with self._adapter.own_collectives():
            device, communicator = self._adapter.device, self._communicator
            if self._worker == helper:
                buffers, flatten = self._adapter.buffers(), self.gradients.flatten
                gradients.hand_over(self._pieces, flatten, self._used, buffers, communicator, worker, device)
            elif self._worker == worker:
                # A gradient that is reduced module by module may be too large for this device.
                storage = torch.device("cpu") if self._adapter.buckets_in_all_passes else device
                self._received = gradients.take_over(self._pieces, communicator, helper, device, storage)

    def send_buffers(self, helper: int, workers: Sequence[int]) -> None:
        """Send one worker's buffers to others, if the model has any."""
        device = self._adapter.device
        with self._adapter.own_collectives():
            for worker in workers if self._buffers else ():
                if self._worker == helper:
                    shipping.send(shipping.pack(self._adapter.buffers()), self._communicator, worker, device)
                elif self._worker == worker:
                    data = shipping.receive(self._communicator, helper, device)
                    self._adapter.set_buffers(shipping.unpack(data, None, device))

    def _inputs(self, *, whole: bool) -> list[Any]:
        """Return what other ranks need to compute this rank's part."""
        mini_batches = self._mini_batches if whole else self._mini_batches[:1]
        buffers = {name: value for name, value in self._buffers.items() if name in self._buffers_of_this_rank}
        return [None if self._batch_of else mini_batches, self._generators, buffers]

    def _from_batch_of(self, part: int) -> list[Any]:
        """Return a part's mini-batches as the user's function gives them."""
        assert self._batch_of is not None
        given = self._batch_of(self._step, part)
        return [given] if len(self._mini_batches) == 1 else list(given)

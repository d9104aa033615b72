"""A code between the gradients of a DistributedDataParallel model and its optimizer: `protect`."""

import hashlib
import json
import logging
import socket
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from draco_ext import _checks, ops
from draco_ext.codes import Code, CyclicCode, DecodingError, RepetitionCode
from draco_ext.protocol.encoder import GradientEncoder
from draco_ext.protocol.groups import Rendezvous, gather, gather_json, membership
from draco_ext.protocol.transports.base import (
    AllGather,
    AllReduceCyclic,
    AllReduceRepetition,
    Exchange,
    Outcome,
    Peers,
    Pending,
    RecordExchange,
    Seconds,
    Transport,
    gather_alone,
)
from draco_ext.protocol.transports.server import ServerTransport
from draco_ext.reporting.evidence import Evidence
from draco_ext.reporting.ledger import Finding, Ledger
from draco_ext.training.compatibility import check_model, reduced_parameters
from draco_ext.training.inputs import UNKNOWN, compare_inputs
from draco_ext.training.placement import place_ranks
from draco_ext.training.record import Claims, StepRecord, digests_in, majority
from draco_ext.training.reproducibility import SelfTest, fingerprint, self_test
from draco_ext.training.sampler import announce_guard, check_workers_of_samplers, step_taken
from draco_ext.training.seeding import BATCH, LOADER, seed_generators
from draco_ext.training.state import PeerRepair, ReplicatedState, ServerRepair, StateVerdict, judge
from draco_ext.training.watch import Watch

logger = logging.getLogger("draco_ext")

# What a bad rank sends: f(step, honest message) -> message. For tests and demonstrations.
Adversary = Callable[[int, Tensor], Tensor]


TRANSPORTS = ("allreduce", "allgather", "server")


def _make_transport(name: str, peers: Peers, *, deadline: float, **tolerance: float) -> Transport:
    if name == "server":
        return ServerTransport(peers, deadline=deadline, **tolerance)
    if name == "allgather":
        return AllGather(peers, **tolerance)
    return (AllReduceCyclic if isinstance(peers.code, CyclicCode) else AllReduceRepetition)(peers, **tolerance)


@dataclass
class Suspect:
    """A rank that sent wrong messages, in `Report`.

    Attributes:
        worker: of the code.
        rank: in the process group.
        host: its name.
        steps: in which its messages were wrong.
        buckets: how many of its messages were.
        other_data: those of the steps in which its inputs differed from those of the ranks with which it shares a part,
            as it says itself: other mini-batches, or more or fewer forward passes.
    """

    worker: int
    rank: int
    host: str
    steps: list[int] = field(default_factory=list)
    buckets: int = 0
    other_data: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """What a guard has seen so far.

    Attributes:
        trust: who must be honest, in one sentence.
        steps: how many steps were taken or failed.
        suspects: by rank; none on account of a step that failed.
        probable: a rank that probably sends errors near the noise, which no single decode can name: the only one left
            out of so many decodes that no other explains as many. With the confidence in it, from 1/2 to 1. No proof:
            ranks that collude closely around an honest one can have that stand here.
        failed_steps: steps without an update, because the guarantee did not cover what came in.
        missing: by rank, the steps in which messages of it did not come in time.
        repaired: by rank, the steps in which its parameters, buffers or watched optimizers differed from those of the
            majority, and were given what the majority has.
        unwritten: findings that could not be written into this rank's ledger.
        undelivered: findings at which this rank's callback raised an error.
        seconds: where this rank's time went in all steps together.
    """

    trust: str
    steps: int
    suspects: dict[int, Suspect]
    failed_steps: tuple[int, ...]
    missing: dict[int, list[int]] = field(default_factory=dict)
    repaired: dict[int, list[int]] = field(default_factory=dict)
    probable: dict[int, float] = field(default_factory=dict)
    unwritten: int = field(default=0, compare=False)
    undelivered: int = field(default=0, compare=False)
    seconds: Seconds = field(default_factory=Seconds, compare=False)


@dataclass
class _Flight:
    """An exchange that is not yet at its end: what it waits for, and what its result is given to."""

    exchange: Exchange | RecordExchange
    name: str
    take: Callable[[Any], None]
    pending: Pending | None = None
    needed: bool = True  # by another exchange, or for a gradient; or only at the end

    @property
    def soon(self) -> bool:
        """Whether it is to go on when the next bucket begins."""
        return self.needed and (self.pending is None or self.pending.soon)


class Guard:
    """Decodes the gradients of a DistributedDataParallel model; made by `protect`.

    Attributes:
        code: the code.
        worker: the worker that this rank is.
        step: the step that comes next.
        failed: whether the last step failed. With ``on_failure="skip"`` and a GradScaler leave out its ``step`` and
            ``update`` then: it refuses to work without gradients.
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
        group = model.process_group
        self.code = code
        self.step = 0
        self.failed = False
        self._seed = seed
        # DDP keeps its hook where Python's collector does not look: held by the guard, the model would never be freed.
        self._model_ref = weakref.ref(model)
        self._on_failure = on_failure
        self._callback = callback
        self._adversary = adversary
        self._rank = dist.get_rank(group)
        self._workers = place_ranks(code, ranks_per_host)
        self._ranks = tuple(sorted(range(code.workers), key=self._workers.__getitem__))
        self.worker = self._workers[self._rank]
        self._parts = code.assignment(self.worker)

        self._ledger, problem = None, None
        if ledger is not None and (self._rank == 0 or "{rank}" in str(ledger)):
            # Made absolute now: a script may change its directory.
            path = Path(str(ledger).replace("{rank}", str(self._rank))).absolute()
            try:
                self._ledger = Ledger(path)
            except OSError as error:
                problem = f"{path}: {error.strerror or error}"[:1000]

        device = next(model.parameters()).device
        setup = {
            "code": repr(code),
            "transport": transport,
            "on_failure": on_failure,
            "ranks_per_host": ranks_per_host,
            "the placement of ranks (its digest)": _sha256(self._workers),
            "atol": atol,
            "rtol": rtol,
            "seed": seed,
            "deadline": deadline,
            "check_state_every": check_state_every,
            "the number of process groups that a rank is in": membership(group),
            "the names, sizes and dtypes of the model's parameters (their digest)": _digest_of_sizes(model),
            "DistributedDataParallel's options": {
                "bucket_cap_mb": model.bucket_bytes_cap / 2**20,
                "find_unused_parameters": model.find_unused_parameters,
                "static_graph": model.static_graph,
            },
        }
        if isinstance(code, CyclicCode) and transport != "server" and device.type == "cpu":
            # Every rank decides by itself; others round differently.
            setup["instruction set (DRACO_ISA)"] = ops.build_info()["instruction_set"]
        self._hosts = _meet({"setup": setup, "host": socket.gethostname(), "ledger": problem}, group, device)
        self._peers = Peers(group, code, self.worker, self._ranks)
        self._transport = _make_transport(transport, self._peers, deadline=deadline, atol=atol, rtol=rtol)

        self._exchanges = 0
        self._suspects: dict[int, Suspect] = {}
        self._evidence = Evidence()
        self._missing: dict[int, list[int]] = {}
        self._failed_steps: list[int] = []
        self._failure: str | None = None  # of the step that runs
        self._part = 0  # of this worker's, in the step that runs
        self._forwards = 0  # of that part
        self._accumulated = 0  # mini-batches before the last one, whose gradients DDP only adds up (`no_sync`)
        self._in_steps = False
        self._awaited = False  # within `steps`: whether a mini-batch is handed out that was not yet passed backward
        self._encoder = GradientEncoder(code, self.worker, ready=isinstance(self._transport, AllReduceCyclic))
        self._flights: list[_Flight] = []  # of the step that runs
        # In the first step, of each part: fingerprints of its mini-batch, if `steps` has handed it out, and inputs.
        self._inputs: dict[int, list[Tensor]] = {}
        self._findings: list[Finding] = []  # of the step that runs, for the callback
        self._callback_errors: set[type[Exception]] = set()  # that were logged
        self._undelivered = 0
        # DDP's own map of unused parameters is of a step's last pass only, and believes every rank.
        self._may_be_unused = model.find_unused_parameters or model.static_graph
        self._decoded: list[_Decoded] = []  # where some may be unused
        self._outcomes: list[tuple[Outcome, int]] = []  # of the step that runs, each with its bucket
        self._claims: Claims | None = None  # of the step that runs
        self._state = ReplicatedState(model)
        served = isinstance(self._transport, ServerTransport)
        self._repair = (ServerRepair if served else PeerRepair)(self._transport, self._state)
        self._elsewhere: set[int] = set()  # workers of which it was logged that they are at another step
        self._rendezvous = Rendezvous(group)
        self._check_state_every = check_state_every
        self._state_is_unknown = True  # not compared yet, or no majority has had the same
        self._comparisons = 0
        self._repaired: dict[int, list[int]] = {}
        # Of each worker, those who compute the same parts: they have the same buffers.
        assignments = [code.assignment(j) for j in range(code.workers)]
        groups: dict[tuple[int, ...], tuple[int, ...]] = {}
        for j, parts in enumerate(assignments):
            groups[parts] = (*groups.get(parts, ()), j)
        self._alike = {j: groups[parts] for j, parts in enumerate(assignments)}
        model.register_comm_hook(None, self._hook)  # the first: it raises where there is one already
        # The server's threads talk to the other ranks at any time; those look, too.
        is_server = transport == "server" and self._rank == 0
        self._watch = Watch(model, self._drop_gradients, collectives=not is_server)
        model.register_forward_pre_hook(torch.compiler.disable(self._seed_part), with_kwargs=True)
        in_buckets = reduced_parameters(model)
        reduced = [parameter for parameter in model.parameters() if parameter in in_buckets]
        self._numbers = {parameter: i for i, parameter in enumerate(reduced)}
        self._record = StepRecord(code, self.worker, reduced, usage=self._may_be_unused)
        self._seed_generators(self._parts[0], LOADER)
        announce_guard(self, code)

    @property
    def _model(self) -> DistributedDataParallel:
        model = self._model_ref()
        if model is None:
            raise RuntimeError("the guarded model is gone")
        return model

    # ------------------------------------------------------------------------------------------------ a step

    def steps(self, loader: Iterable[Any]) -> Iterator[Iterator[Any]]:
        """Cuts a loader over a `RedundantBatchSampler` into steps.

        ``for step in guard.steps(loader): for x, y in step: loss(x, y).backward()``, then the optimizer's step. Each
        step yields the mini-batches of this rank's parts; every one of them needs one forward and backward pass. With
        several parts gradients are encoded as they come, into one buffer of the gradient's size.

        Raises:
            RuntimeError: the mini-batches of a step were not all taken and passed backward.
        """
        iterator = iter(loader)
        self._in_steps = True
        try:
            while True:
                before = self.step
                self._seed_generators(self._parts[0], LOADER)
                try:
                    first = next(iterator)
                except StopIteration:
                    return
                yield self._parts_of_step(first, iterator)
                if self.step != before + 1:
                    raise self._incomplete(before)
        finally:
            self._in_steps = self._awaited = False

    def _parts_of_step(self, first: Any, iterator: Iterator[Any]) -> Iterator[Any]:
        step = self.step
        for i, part in enumerate(self._parts):
            if i > 0:
                if self._awaited:
                    raise self._incomplete(step)
                self._seed_generators(part, LOADER)
            try:
                batch = first if i == 0 else next(iterator)
            except StopIteration:
                raise RuntimeError(f"the loader ended within a step of {len(self._parts)} mini-batches") from None
            self._model.zero_grad(set_to_none=True)  # what backward left there is in the message, or of the step before
            self._part, self._forwards, self._awaited = i, 0, True
            self._watch.begin_part()
            self._record.begin_part(i)
            if self._exchanges == 0:
                self._inputs[i] = [fingerprint(batch), UNKNOWN]
            self._seed_generators(part, BATCH)
            yield batch

    def _incomplete(self, step: int) -> RuntimeError:
        return RuntimeError(
            f"step {step} is not complete: each of its {len(self._parts)} mini-batches needs one backward pass"
        )

    def _seed_generators(self, part: int, stage: int) -> None:
        seed_generators(self._seed, self.step, part, stage)

    def seed_mini_batch(self) -> None:
        """Seeds the global generators where a sampler is asked for a mini-batch."""
        if not self._in_steps:  # which seeds by itself, for the part that comes next
            # The forward passes count, so that accumulated mini-batches do not get the same noise.
            self._seed_generators(self._parts[self._part], LOADER - 2 * self._forwards)

    def _seed_part(self, module: torch.nn.Module, arguments: Any, keywords: Any) -> None:
        """Before every forward pass in training: dropout and the like draw the same for all ranks with this part."""
        if not torch.is_grad_enabled():
            return
        self._record.see(self._part, (arguments, keywords), self._state.device)
        if self._exchanges == 0 and self._forwards == 0:
            check_workers_of_samplers(self.code, self._workers)
            batch, _ = self._inputs.get(self._part, (UNKNOWN, UNKNOWN))
            self._inputs[self._part] = [batch, fingerprint((arguments, keywords))]
        if not module.training:
            return
        self._check_in_steps()
        self._accumulated += not module.require_backward_grad_sync
        self._seed_generators(self._parts[self._part], self._forwards)
        self._forwards += 1

    def _check_in_steps(self) -> None:
        if not self._in_steps and len(self._parts) > 1:
            raise RuntimeError(f"{self.code!r} has several parts for each rank: loop over guard.steps(loader)")

    # ------------------------------------------------------------------------------------------------ DDP's hook

    def _hook(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Called by DDP for every bucket of a backward pass, in the same order on all ranks."""
        try:
            self._watch.begin_bucket()
            with self._watch.own():
                future = self._take(bucket)
            if bucket.is_last():
                self._awaited = False
                self._watch.end_pass()
            return future
        except BaseException:
            self._drop_gradients()  # this rank's own, and decoded ones
            self._deliver()
            raise

    def _take(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        self._check_in_steps()
        if self._in_steps and not self._awaited:
            raise RuntimeError(
                "guard.steps() takes one backward pass for each mini-batch, got another: put all but the last of a "
                "mini-batch under model.no_sync()"
            )
        buffer = bucket.buffer()
        future = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else None)
        last = self._part == len(self._parts) - 1
        if last and self._exchanges == 0:
            self._compare_inputs(buffer.device)
        begin = time.perf_counter()
        self._encoder.add(bucket, self._part)
        self._peers.seconds.encode += time.perf_counter() - begin
        if last and self._may_be_unused:
            for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
                number = self._numbers[parameter]
                older = parameter.grad is not None and not self._record.is_reached(number)
                self._decoded.append(_Decoded(number, parameter, gradient, older))
        if self._may_be_unused and bucket.is_last():  # every parameter that is used has its gradient
            self._record.end_part()
        if not last:
            future.set_result(buffer)
            return future
        if bucket.index() == 0:
            self._flights = []
        if bucket.is_last() if self._may_be_unused else bucket.index() == 0:
            self._send_record(buffer.device)
        message = self._encoder.message(bucket)
        if self._adversary is not None:
            altered = self._adversary(self.step, message.values.clone()).contiguous()
            message = replace(message, values=altered, ready=False)
        exchange = self._transport.exchange(message, self._exchanges)
        self._exchanges += 1
        # What the exchanges before have begun runs meanwhile; the order is the same on all ranks.
        earlier = [flight for flight in self._flights if flight.soon]

        def take(outcome: Outcome, number: int = bucket.index()) -> None:
            self._outcomes.append((outcome, number))
            future.set_result(buffer)

        self._flights.append(_Flight(exchange, f"bucket {bucket.index()}", take))
        for flight in (self._flights[-1], *earlier):
            self._advance(flight)
        if bucket.is_last():
            self._land()
            # DDP hands the gradients over in a callback of its own, queued after this one: ours comes behind it.
            engine = torch.autograd.Variable._execution_engine
            engine.queue_callback(lambda: engine.queue_callback(self._finish))
        return future

    def _advance(self, flight: "_Flight") -> None:
        """To the next thing that an exchange must wait for, or to its end."""
        seconds = self._peers.seconds
        begin, waited = time.perf_counter(), seconds.communicate
        try:
            value = None if flight.pending is None else flight.pending.wait()
            flight.pending = flight.exchange.send(value)
        except StopIteration as stop:
            self._flights.remove(flight)
            flight.take(stop.value)
        except RuntimeError as error:
            raise RuntimeError(f"no gradient in step {self.step}, {flight.name}: {error}") from error
        seconds.decode += time.perf_counter() - begin - (seconds.communicate - waited)

    def _land(self) -> None:
        """All buckets have come: brings their exchanges to an end."""
        while self._flights:
            soon = [flight for flight in self._flights if flight.soon]
            for flight in soon or list(self._flights):
                self._advance(flight)

    def _compare_inputs(self, device: torch.device) -> None:
        """In the first step: whether ranks that share a part have the same inputs of it.

        More than s that have not are a mistake. Fewer may be one, or bad; they cannot stop the others.
        """
        own = torch.stack([torch.stack(self._inputs[i]) for i in range(len(self._parts))])
        for other in compare_inputs(gather(own, self._model.process_group, device), self.code, self._ranks):
            ranks = sorted(self._ranks[j] for j in other.workers)
            if len(ranks) > self.code.adversaries:
                raise ValueError(f"{other.cause}; got others of part {other.part} on ranks {ranks}")
            for rank in ranks:
                self._log(
                    "rank %d on %s has other inputs of part %d than others: %s",
                    rank,
                    self._hosts[rank],
                    other.part,
                    other.cause,
                )

    def _send_record(self, device: torch.device) -> None:
        """Sends what this rank says about the step; in every step at the same place on all ranks."""
        every = self._check_state_every
        with_state = self._state_is_unknown or (every > 0 and self.step % every == 0)
        begin = time.perf_counter()
        state = self._digest_state() if with_state else None
        record = self._record.vector(self.step, state, device)
        self._peers.seconds.decode += time.perf_counter() - begin

        def take(gathered: tuple[Tensor, tuple[int, ...]]) -> None:
            self._claims = self._record.read(*gathered)

        flight = _Flight(self._transport.gather_record(record), "record of the step", take, needed=False)
        self._flights.append(flight)
        self._advance(flight)

    def _finish(self) -> None:
        """After the last backward pass of a step, when the gradients are in place."""
        try:
            self._end_step()
        except BaseException:
            self._drop_gradients()
            raise

    def _end_step(self) -> None:
        claims, decoded, outcomes = self._claims, self._decoded, self._outcomes
        self._claims, self._decoded, self._outcomes = None, [], []
        self._record.begin()
        self._agree_on_step(claims.steps)
        verdict = judge(claims.state, self._alike)
        self._judge(outcomes, claims, verdict)
        with self._watch.own():
            problem = self._mend(verdict) if claims.state else None
        self._failure = self._failure or problem or self._corrupted(verdict)
        failure, self._failure = self._failure, None
        step, self.step = self.step, self.step + 1
        step_taken(self, self.code, 1 + self._accumulated)
        self._part = self._forwards = self._accumulated = 0
        self.failed = failure is not None
        self._seed_generators(self._parts[0], LOADER)
        self._watch.finish()
        if failure is not None:
            self._failed_steps.append(step)
            self._drop_gradients()
        elif decoded:
            _leave_out_unused(decoded, claims.used_parameters())
        self._deliver()
        if failure is None:
            return
        if self._on_failure == "raise":
            raise DecodingError(failure)
        self._log("%s; the step is skipped", failure)

    def _agree_on_step(self, steps: dict[int, int]) -> None:
        """Goes on at the step at which the majority is, where this rank has loaded another checkpoint, or none."""
        usual = majority(steps)
        if usual is None:
            by_rank = {self._ranks[j]: step for j, step in steps.items()}
            self._failure = f"all ranks must be at the same step, got {by_rank}: all must call load_state_dict"
            return
        for j, step in steps.items():
            if step != usual and j not in self._elsewhere:
                self._elsewhere.add(j)
                self._log(
                    "rank %d on %s says it is at step %d, others at %d: all ranks must call load_state_dict",
                    self._ranks[j],
                    self._hosts[self._ranks[j]],
                    step,
                    usual,
                )
        self.step = usual

    def _drop_gradients(self) -> None:
        for parameter in self._model.parameters():
            parameter.grad = None  # optimizers leave such parameters and their state alone

    def self_test(self, batch: Any, loss: Callable[[torch.nn.Module, Any], Tensor] | None = None) -> SelfTest:
        """Whether honest ranks compute the same bits: the repetition code convicts those that do not.

        Every rank computes the gradient of rank 0's batch twice, with the same random numbers, and all are compared.
        To be called on all ranks, before training or between steps; changes neither the model nor its gradients.

        Args:
            batch: what the loader gives, of the same shapes and dtypes on all ranks.
            loss: f(module, batch) -> scalar; default: mean squares of what the module makes of the batch, or of its
                first element where it is a tuple or list.

        Returns:
            Whether all agree; if not, the first parameter whose gradient does not, where, and what to switch on. Also
            logged as a warning.

        Raises:
            ValueError: the batch has not the same shapes and dtypes on all ranks.
        """
        result = self_test(self._model.module, self._model.process_group, batch, loss)
        if not result.reproducible:
            self._log("%s", result)
        return result

    # ------------------------------------------------------------------------------------------------ verdicts

    def _judge(self, outcomes: list[tuple[Outcome, int]], claims: Claims, state: StateVerdict) -> None:
        """Notes what the exchanges of a step have found."""
        if not any(
            outcome.left_out or outcome.suspects or outcome.missing or outcome.failed for outcome, _ in outcomes
        ):
            return
        other_data = claims.with_other_data()
        for outcome, bucket in outcomes:
            if not outcome.failed:
                self._weigh(outcome)
            elif self._failure is None:
                self._failure = self._explain(outcome, bucket, other_data, state)
            self._note(outcome, bucket, other_data)

    def _note(self, outcome: Outcome, bucket: int, other_data: set[int]) -> None:
        for worker in (*outcome.suspects, *outcome.missing):
            differs = outcome.suspects.get(worker)
            finding = self._finding(
                worker,
                "missing" if worker in outcome.missing else "data" if worker in other_data else "gradient",
                bucket=bucket,
                elements=differs and differs.elements,
                first=differs and differs.first,
                largest=differs.largest if differs and differs.largest < float("inf") else None,
                failed=outcome.failed,
            )
            if finding.missing:
                self._miss(finding)
            elif not outcome.failed:
                self._accuse(finding)
            self._add(finding)

    def _explain(self, outcome: Outcome, bucket: int, other_data: set[int], state: StateVerdict) -> str:
        """Why a bucket could not be decoded, as far as ranks' records tell."""
        other_state = {j for j, sections in state.wrong.items() if "parameters" in sections}
        explained = other_data | other_state
        suspected = set(outcome.suspects) - explained
        for group in set(self._alike.values()) if isinstance(self.code, RepetitionCode) else ():
            # Of those who are left s or fewer may be right about the others: then it could be any of them.
            rest = set(group) - explained - set(outcome.missing)
            against = rest & suspected
            if len(rest) > 1 and against and len(rest - against) <= self.code.adversaries:
                suspected |= rest
            elif rest == against and len(rest) == 1:
                suspected -= rest  # nobody is left who says so
        reasons = {
            "suspected": suspected,
            "other parameters than the majority": other_state,
            "other data (mini-batches or forward passes that differ from the others')": other_data,
            "missing": set(outcome.missing),
        }
        named = {reason: sorted(self._ranks[j] for j in workers) for reason, workers in reasons.items()}
        return (
            f"no gradient in step {self.step}, bucket {bucket}: more ranks are bad than {self.code!r} can correct; "
            + (", ".join(f"{reason}: {ranks}" for reason, ranks in named.items() if ranks) or "nobody can be named")
        )

    def _corrupted(self, verdict: StateVerdict) -> str | None:
        """What is to be said where too many ranks have wrong parameters, also if their gradients agree."""
        groups = set(self._alike.values()) if isinstance(self.code, RepetitionCode) else [range(self.code.workers)]
        for group in groups:
            wrong = sorted(self._ranks[j] for j in group if "parameters" in verdict.wrong.get(j, ()))
            if len(wrong) > self.code.adversaries:
                return (
                    f"no gradient in step {self.step}: more ranks have other parameters than the majority than "
                    f"{self.code!r} can correct: {wrong}"
                )
        return None

    def _finding(self, worker: int, kind: str, **what: Any) -> Finding:
        rank = self._ranks[worker]
        return Finding(
            time=time.time(),
            step=self.step,
            worker=worker,
            rank=rank,
            host=self._hosts[rank],
            missing=kind == "missing",
            kind=kind,
            **what,
        )

    def _add(self, finding: Finding) -> None:
        if self._ledger is not None:
            self._ledger.append(finding)
        self._findings.append(finding)

    def _deliver(self) -> None:
        """Give the step's findings to the callback, which cannot end the job."""
        findings, self._findings = self._findings, []
        for finding in findings if self._callback is not None else ():
            try:
                self._callback(finding)
            except Exception as error:
                self._undelivered += 1
                if type(error) not in self._callback_errors:
                    self._callback_errors.add(type(error))
                    logger.exception("callback raised an error; training goes on, and others of its kind are counted")

    def _log(self, message: str, *arguments: Any) -> None:
        """Log a warning once per job: by the first rank that nobody suspects. Others log for debugging only."""
        trusted = set(range(self.code.workers)) - self._suspects.keys() - self._missing.keys()
        logger.log(logging.WARNING if min(trusted, default=0) == self._rank else logging.DEBUG, message, *arguments)

    def _weigh(self, outcome: Outcome) -> None:
        if outcome.suspects.keys() >= set(outcome.left_out):
            return
        before = self._evidence.probable
        left_out, suspects = ([self._ranks[j] for j in workers] for workers in (outcome.left_out, outcome.suspects))
        self._evidence.add(left_out, suspects)
        for rank in self._evidence.probable.keys() - before.keys():
            self._log(
                "rank %d on %s probably sends errors near the noise: it was left out of many decodes by step %d",
                rank,
                self._hosts[rank],
                self.step,
            )

    def _miss(self, finding: Finding) -> None:
        steps = self._missing.setdefault(finding.rank, [])
        if not steps:
            self._log("rank %d on %s is missing in step %d", finding.rank, finding.host, finding.step)
        if finding.step not in steps[-1:]:
            steps.append(finding.step)

    def _accuse(self, finding: Finding) -> None:
        if finding.rank not in self._suspects:
            self._suspects[finding.rank] = Suspect(finding.worker, finding.rank, finding.host)
            what = "has other data than the ranks with the same part: mini-batches or forward passes differ"
            what = what if finding.kind == "data" else "sent a wrong gradient"
            self._log("rank %d on %s %s in step %d", finding.rank, finding.host, what, finding.step)
        suspect = self._suspects[finding.rank]
        suspect.buckets += 1
        if finding.kind == "data" and finding.step not in suspect.other_data[-1:]:
            suspect.other_data.append(finding.step)
        if finding.step not in suspect.steps[-1:]:
            suspect.steps.append(finding.step)

    # ------------------------------------------------------------------------------------------------ state

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Compares and repairs an optimizer's state, too, wherever the parameters are: its tensors and numbers.

        To be called on all ranks. Costs twice or three times what the parameters cost.

        Raises:
            TypeError: it is no optimizer, or one that keeps something else on every rank.
        """
        if not isinstance(optimizer, torch.optim.Optimizer) or hasattr(optimizer, "consolidate_state_dict"):
            raise TypeError(
                "optimizer must be a torch.optim.Optimizer with the same state on all ranks, "
                f"got {type(optimizer).__name__}"
            )
        self._state.watch(optimizer)

    def check_state(self, timeout: float = 60.0) -> tuple[int, ...]:
        """Compares parameters, buffers and watched optimizers of all ranks now, and repairs those that differ.

        To be called on all ranks, between steps. Costs a read of all that and a small exchange.

        Args:
            timeout: seconds to wait for the other ranks to call it.

        Returns:
            The ranks that were wrong.

        Raises:
            DecodingError: no majority of the ranks has the same.
            RuntimeError: another rank does not call it.
        """
        _checks.check_tolerance("timeout", timeout)
        with self._watch.own():
            return self._check_state(timeout)

    def _check_state(self, timeout: float) -> tuple[int, ...]:
        gone = {rank for rank, steps in self._missing.items() if steps[-1:] == [self.step - 1]}
        if absent := self._rendezvous.wait([r for r in range(self.code.workers) if r not in gone], timeout):
            raise RuntimeError(
                f"check_state and state_dict must be called on all ranks, but rank {absent[0]} has not called it "
                f"within {timeout:g} s; state_dict(check=False) may be called on one rank alone"
            )
        rows, missing = gather_alone(self._transport, self._digest_state().flatten())
        present = [j for j in range(self.code.workers) if j not in missing]
        verdict = judge({j: digests_in(rows[j]) for j in present}, self._alike)
        problem = self._mend(verdict)
        self._deliver()
        if problem:
            raise DecodingError(problem)
        return tuple(sorted(self._ranks[worker] for worker in verdict.wrong))

    def state_dict(self, check: bool = True) -> dict[str, Any]:
        """What a checkpoint needs to go on exactly, dropout included, and to remember who was bad.

        Args:
            check: calls `check_state` first, so that no rank writes a wrong checkpoint: to be called on all ranks, and
                before the model's own ``state_dict()``. False: may be called on one rank alone.

        Raises:
            DecodingError: see `check_state`.
            RuntimeError: another rank does not call it.
        """
        if check:
            self.check_state()
        return {
            "step": self.step,
            "suspects": {rank: asdict(suspect) for rank, suspect in self._suspects.items()},
            "failed_steps": list(self._failed_steps),
            "missing": {rank: list(steps) for rank, steps in self._missing.items()},
            "repaired": {rank: list(steps) for rank, steps in self._repaired.items()},
            "evidence": self._evidence.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` stood; the same on all ranks."""
        _checks.check_int("state['step']", state["step"], 0)
        self.step = state["step"]
        self._suspects = {rank: Suspect(**suspect) for rank, suspect in state["suspects"].items()}
        self._failed_steps = list(state["failed_steps"])
        self._missing = {rank: list(steps) for rank, steps in state["missing"].items()}
        self._repaired = {rank: list(steps) for rank, steps in state.get("repaired", {}).items()}
        if "evidence" in state:  # not in checkpoints of earlier versions
            self._evidence.load_state_dict(state["evidence"])
        self._state_is_unknown = True  # something was loaded
        self._seed_generators(self._parts[0], LOADER)

    def _digest_state(self) -> Tensor:
        """Digests of this rank's state, under a key that all ranks know.

        It may be known: nobody but the rank itself has made its state, unless it was sent a repair, and that was
        compared under a key drawn afterwards.
        """
        words = torch.tensor([self.step, self._comparisons], dtype=torch.int64).view(torch.uint8)
        self._comparisons += 1
        return self._state.digests(int(ops.digest(words, self._seed)[0]) % 2**63)

    def _mend(self, verdict: StateVerdict) -> str | None:
        """Repairs the ranks in the minority; returns what is to be said where that is not enough for the step."""
        self._state_is_unknown = bool(verdict.undecided)
        try:
            repaired = self._repair.run(verdict, self._alike)
        except RuntimeError as error:
            raise RuntimeError(f"no comparison of parameters in step {self.step}: {error}") from error
        for worker, sections in verdict.wrong.items():
            finding = self._finding(worker, "state", bucket=-1, elements=None, first=None, largest=None, failed=False)
            self._log(
                "rank %d on %s had other %s than the majority in step %d; %s",
                finding.rank,
                finding.host,
                " and ".join(sections),
                finding.step,
                "it was given the majority's" if repaired[worker] else "it could not be repaired",
            )
            if repaired[worker]:
                self._repaired.setdefault(finding.rank, []).append(finding.step)
            self._add(finding)
        if not verdict.undecided:
            return None
        return (
            f"no gradient in step {self.step}: no majority of the ranks has the same {' and '.join(verdict.undecided)}"
        )

    def report(self) -> Report:
        """Who was suspected, in which steps and how many buckets, and which steps failed: the same on all ranks.

        Also how many seconds were spent on it, and what its ledger and its callback lack: each rank's own. A snapshot:
        it does not change afterwards.
        """
        suspects = {
            rank: replace(suspect, steps=list(suspect.steps), other_data=list(suspect.other_data))
            for rank, suspect in self._suspects.items()
        }
        return Report(
            self._transport.trust,
            self.step,
            suspects,
            tuple(self._failed_steps),
            {rank: list(steps) for rank, steps in self._missing.items()},
            {rank: list(steps) for rank, steps in self._repaired.items()},
            self._evidence.probable,
            0 if self._ledger is None else self._ledger.unwritten,
            self._undelivered,
            replace(self._peers.seconds),
        )


def _digest_of_sizes(model: DistributedDataParallel) -> str:
    """Of what decides, with DDP's options, which buckets there will be, and which parameter is where in them."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    # torch.compile puts a name of its own into all of them.
    sizes = [(name.replace("_orig_mod.", ""), list(p.shape), str(p.dtype)) for name, p in named]
    return _sha256(sizes)


def _sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _meet(mine: dict[str, Any], group: dist.ProcessGroup, device: torch.device) -> list[str]:
    """Compares the ranks' set-ups; returns the names of their hosts.

    Raises:
        ValueError: on all ranks alike, where they do not agree, a ledger cannot be opened, or a rank sends anything
            else; it names the rank.
    """
    everybody = gather_json(mine, group, device)
    for rank, other in enumerate(everybody):
        if not (
            isinstance(other, dict)
            and other.keys() == mine.keys()
            and isinstance(other["setup"], dict)
            and isinstance(other["host"], str)
            and len(other["host"]) < 256
            and other["host"].isprintable()
        ):
            raise ValueError(f"ranks must send their set-up, got something else from rank {rank}")
    first = everybody[0]["setup"]
    for rank, other in enumerate(everybody):
        for name in {**first, **other["setup"]}:
            here, there = other["setup"].get(name), first.get(name)
            if here != there:
                raise ValueError(
                    f"{name} must be the same on all ranks, got {here!r} on rank {rank} and {there!r} on rank 0"
                )
    for rank, other in enumerate(everybody):
        if other["ledger"] is not None:
            raise ValueError(f"ledger must be a file that can be written, got on rank {rank} {other['ledger']!r}")
    return [other["host"] for other in everybody]


@dataclass(frozen=True)
class _Decoded:
    """A parameter and where its decoded gradient is, where parameters may be unused.

    older: it has a gradient of earlier passes, which this rank's part has not touched.
    """

    number: int
    parameter: Tensor
    gradient: Tensor
    older: bool


def _leave_out_unused(decoded: list[_Decoded], used: list[bool]) -> None:
    """Gives all used parameters a gradient, if it is 0, and leaves the others as they were, as DDP does."""
    for item in decoded:
        if not used[item.number]:
            if not item.older:
                item.parameter.grad = None
        elif item.parameter.grad is None:
            item.parameter.grad = item.gradient.clone()


def protect(
    model: DistributedDataParallel,
    code: Code,
    *,
    transport: str = "allreduce",
    on_failure: str = "raise",
    ledger: str | Path | None = None,
    callback: Callable[[Finding], None] | None = None,
    adversary: Adversary | None = None,
    atol: float = 0.0,
    rtol: float = 0.0,
    seed: int = 0,
    ranks_per_host: int | Sequence[int] | None = None,
    deadline: float = 60.0,
    check_state_every: int | None = 20,
) -> Guard:
    """Puts a code between a DistributedDataParallel model's gradients and its optimizer.

    Registers DDP's communication hook: instead of being averaged, gradients are exchanged and decoded, bucket by
    bucket. Up to s bad ranks change nothing; all ranks end every step with the same bits. To be called on all ranks of
    the model's process group. The mini-batches must be those of a `RedundantBatchSampler` with the same code.

    Transports, by whom they trust:

    * "allreduce": up to s ranks may compute anything wrong; what ranks send is not altered on the way. The repetition
      code votes on digests and moves about 60% of what DDP moves; the cyclic one checks projections and moves what DDP
      moves.
    * "allgather": up to s ranks may compute and send anything; a rank must send the same message to all, and nobody
      else is trusted. Moves n messages to every rank.
    * "server": rank 0 is trusted; up to s ranks may compute and send anything, and twice as many may be missing (e bad
      and f missing while 2e + f <= 2s). A rank that hangs, dies or is late is an erasure, not the end of the job, from
      the third step on (DDP itself talks to all ranks before) as long as the launcher lets the others live (torchrun
      stops all ranks when one dies, but not when one hangs) and DDP does not talk to all ranks in every step (it does
      with find_unused_parameters, and with buffers unless broadcast_buffers=False; a warning says so). Rank 0 must
      live. Moves a message per rank to the server and back.

    The global generators of torch, Python and numpy are seeded here, where the sampler is asked for a mini-batch or
    `Guard.steps` hands it out, before every forward pass in training and after every step, the same on all ranks with
    the part: what is drawn from them in the loop and in the model agrees. With find_unused_parameters or static_graph a
    parameter is unused if the majority of each part's holders say so; as under plain DDP its ``grad`` then stays what
    it was.

    In the first step, in every step whose number is a multiple of `check_state_every` and before `Guard.state_dict`
    ranks compare digests of their parameters, buffers and watched optimizers (`Guard.watch`). Those that differ from
    the majority are named, and given what the majority has before the optimizer steps. Without a majority the step
    fails.

    Args:
        model: on every rank, with a process group of ``code.workers`` ranks; torch.compile it before or afterwards.
        code: who computes which part. A code with several parts for each rank (cyclic) needs `Guard.steps`.
        transport: "allreduce", "allgather" or "server".
        on_failure: where the code's guarantee does not cover what came in, all gradients become None, on all ranks, so
            that an optimizer changes nothing; and "raise" makes ``backward()`` raise DecodingError, "skip" logs a
            warning.
        ledger: file to which every `Finding` is appended as a line of JSON, see `draco_ext.read_ledger`: by rank 0, or,
            with "{rank}" in its name, by every rank to its own. Where that fails later on, training goes on.
        callback: called with every `Finding`, on all ranks, after the step. Where it raises an error, that is logged,
            once for each kind of error, and training goes on.
        adversary: makes this rank bad, for tests and demonstrations: f(step, honest message) -> what is sent.
        atol: honest messages may differ by so much, see `draco_ext.decode`; not for the repetition code with
            "allreduce", which compares bits.
        rtol: the same, relative.
        seed: of the generators' seeds; the same on all ranks.
        ranks_per_host: see `RedundantBatchSampler`.
        deadline: seconds that the server waits for the others' messages once it has its own. A rank that was late is
            not waited for again until it has caught up.
        check_state_every: in which steps parameters are compared; 0 or None: in the first one only.

    Returns:
        The guard.

    Raises:
        TypeError: an argument has the wrong type; parameters have a dtype that the code does not take.
        ValueError: an argument has a wrong value, or not the same on all ranks; nor have the models or DDP's options;
            the ledger cannot be opened: on all ranks alike. DDP would keep a gradient from the guard: it is named. In
            the first step ``backward()`` raises one, too, where more than s holders of a part have other inputs of it.
        RuntimeError: in a step, where it cannot be protected: a collective between the beginning of a forward pass and
            the end of its backward pass, an optimizer that steps with gradients that DDP has not reduced, a parameter
            that requires a gradient only since DDP was made, ``model.join()``. All gradients become None.
    """
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(f"model must be a DistributedDataParallel, got {type(model).__name__}")
    if not isinstance(code, Code):
        raise TypeError(f"code must be a RepetitionCode or CyclicCode, got {type(code).__name__}")
    ranks = dist.get_world_size(model.process_group)
    if ranks != code.workers:
        raise ValueError(f"code must be for the {ranks} ranks of the model's process group, got {code!r}")
    if on_failure not in ("raise", "skip"):
        raise ValueError(f"on_failure must be 'raise' or 'skip', got {on_failure!r}")
    if transport not in TRANSPORTS:
        raise ValueError(f"transport must be {' or '.join(map(repr, TRANSPORTS))}, got {transport!r}")
    _checks.check_tolerance("atol", atol)
    _checks.check_tolerance("rtol", rtol)
    _checks.check_tolerance("deadline", deadline)
    _checks.check_int("seed", seed, 0, 2**63 - 1)
    check_state_every = 0 if check_state_every is None else check_state_every
    _checks.check_int("check_state_every", check_state_every, 0)
    if isinstance(code, RepetitionCode) and transport == "allreduce" and (atol > 0 or rtol > 0):
        raise ValueError("atol and rtol must be 0 for a repetition code with transport='allreduce'; take 'allgather'")
    check_model(model, code)
    if (
        dist.get_rank(model.process_group) == 0
        and transport == "server"
        and (model.find_unused_parameters or (model.broadcast_buffers and next(model.buffers(), None) is not None))
    ):
        logger.warning(
            "a rank that dies or hangs will stop all: with buffers and broadcast_buffers, or with "
            "find_unused_parameters, DistributedDataParallel itself talks to all ranks in every step"
        )
    return Guard(
        model,
        code,
        transport=transport,
        on_failure=on_failure,
        ledger=ledger,
        callback=callback,
        adversary=adversary,
        atol=atol,
        rtol=rtol,
        seed=seed,
        ranks_per_host=ranks_per_host,
        deadline=deadline,
        check_state_every=check_state_every,
    )

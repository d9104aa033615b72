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

from draco_ext import ops
from draco_ext.codes import Code, CyclicCode, DecodingError, RepetitionCode
from draco_ext.distributed.batches import announce_guard, check_workers_of_samplers, step_taken
from draco_ext.distributed.encoder import GradientEncoder
from draco_ext.distributed.evidence import Evidence
from draco_ext.distributed.groups import gather, gather_json, membership
from draco_ext.distributed.ledger import Finding, Ledger
from draco_ext.distributed.placement import place_ranks
from draco_ext.distributed.reproducibility import SelfTest, fingerprint, odd_ones_out, self_test
from draco_ext.distributed.server_transport import ServerTransport
from draco_ext.distributed.transports import (
    AllGather,
    AllReduceCyclic,
    AllReduceRepetition,
    Exchange,
    Outcome,
    Peers,
    Pending,
    Seconds,
    Transport,
)

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
    """A rank that sent wrong messages, in `Report`."""

    worker: int
    rank: int
    host: str
    steps: list[int] = field(default_factory=list)
    buckets: int = 0


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
        unwritten: findings that could not be written into this rank's ledger.
        seconds: where this rank's time went in all steps together.
    """

    trust: str
    steps: int
    suspects: dict[int, Suspect]
    failed_steps: tuple[int, ...]
    missing: dict[int, list[int]] = field(default_factory=dict)
    probable: dict[int, float] = field(default_factory=dict)
    unwritten: int = field(default=0, compare=False)
    seconds: Seconds = field(default_factory=Seconds, compare=False)


@dataclass
class _Flight:
    """An exchange that is not yet at its end: what it waits for, and whom it serves."""

    exchange: Exchange
    bucket: int
    buffer: Tensor
    future: torch.futures.Future[Tensor]
    pending: Pending | None = None

    @property
    def soon(self) -> bool:
        """Whether it is to go on when the next bucket begins."""
        return self.pending is None or self.pending.soon


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

        self._ledger, problem = None, None
        if ledger is not None and (self._rank == 0 or "{rank}" in str(ledger)):
            path = Path(str(ledger).replace("{rank}", str(self._rank)))
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
            "the placement of ranks (its digest)": hashlib.sha256(json.dumps(self._workers).encode()).hexdigest(),
            "atol": atol,
            "rtol": rtol,
            "seed": seed,
            "deadline": deadline,
            "the number of process groups that a rank is in": membership(group),
            "the sizes and dtypes of the model's parameters (their digest)": _digest_of_sizes(model),
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
        self._encoder = GradientEncoder(code, self.worker, ready=isinstance(self._transport, AllReduceCyclic))
        self._flights: list[_Flight] = []  # of the step that runs
        self._inputs: list[Tensor] = []  # fingerprints of the first step's mini-batches
        # DDP's own map of unused parameters is of a step's last pass only, and believes every rank.
        self._may_be_unused = model.find_unused_parameters or model.static_graph
        self._decoded: list[tuple[Tensor, Tensor]] = []  # parameters and gradients, where some may be unused
        model.register_forward_pre_hook(torch.compiler.disable(self._seed_part), with_kwargs=True)
        model.register_comm_hook(None, self._hook)
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
        parts = len(self.code.assignment(self.worker))
        self._in_steps = True
        try:
            for first in iterator:
                before = self.step
                yield self._parts_of_step(first, iterator, parts)
                if self.step != before + 1:
                    raise RuntimeError(
                        f"step {before} is not complete: each of its {parts} mini-batches needs one backward pass"
                    )
        finally:
            self._in_steps = False

    def _parts_of_step(self, first: Any, iterator: Iterator[Any], parts: int) -> Iterator[Any]:
        for part in range(parts):
            self._model.zero_grad(set_to_none=True)  # what backward left there is in the message, or of the step before
            self._part, self._forwards = part, 0
            try:
                yield first if part == 0 else next(iterator)
            except StopIteration:
                raise RuntimeError(f"the loader ended within a step of {parts} mini-batches") from None

    def _seed_part(self, module: torch.nn.Module, arguments: Any, keywords: Any) -> None:
        """Before every forward pass in training: dropout and the like draw the same for all ranks with this part."""
        if not torch.is_grad_enabled():
            return
        if self._exchanges == 0 and self._forwards == 0:
            check_workers_of_samplers(self.code, self._workers)
            self._inputs[self._part :] = [fingerprint((arguments, keywords))]
        if not module.training:
            return
        self._check_in_steps()
        self._accumulated += not module.require_backward_grad_sync
        part = self.code.assignment(self.worker)[self._part]
        words = torch.tensor([self.step, part, self._forwards], dtype=torch.int64).view(torch.uint8)
        seed = int(ops.digest(words, self._seed)[0])
        # torch.manual_seed would format a stack trace for every kind of device that is not in use.
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)
        self._forwards += 1

    def _check_in_steps(self) -> None:
        if not self._in_steps and len(self.code.assignment(self.worker)) > 1:
            raise RuntimeError(f"{self.code!r} has several parts for each rank: loop over guard.steps(loader)")

    # ------------------------------------------------------------------------------------------------ DDP's hook

    def _hook(self, state: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        """Called by DDP for every bucket of a backward pass, in the same order on all ranks."""
        try:
            return self._take(bucket)
        except BaseException:
            self._drop_gradients()  # this rank's own, and decoded ones
            raise

    def _take(self, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        self._check_in_steps()
        buffer = bucket.buffer()
        future = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else None)
        last = self._part == len(self.code.assignment(self.worker)) - 1
        if last and self._exchanges == 0:
            self._compare_inputs(buffer.device)
        begin = time.perf_counter()
        self._encoder.add(bucket, self._part)
        self._peers.seconds.encode += time.perf_counter() - begin
        if not last:
            future.set_result(buffer)
            return future
        if bucket.index() == 0:
            self._flights = []
        if self._may_be_unused:
            self._decoded += zip(bucket.parameters(), bucket.gradients(), strict=True)
        message = self._encoder.message(bucket)
        if self._adversary is not None:
            altered = self._adversary(self.step, message.values.clone()).contiguous()
            message = replace(message, values=altered, ready=False)
        exchange = self._transport.exchange(message, self._exchanges)
        self._exchanges += 1
        # What the exchanges before have begun runs meanwhile; the order is the same on all ranks.
        earlier = [flight for flight in self._flights if flight.soon]
        self._flights.append(_Flight(exchange, bucket.index(), buffer, future))
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
            self._note(stop.value, flight.bucket)
            flight.future.set_result(flight.buffer)
        except RuntimeError as error:
            raise RuntimeError(f"no gradient in step {self.step}, bucket {flight.bucket}: {error}") from error
        seconds.decode += time.perf_counter() - begin - (seconds.communicate - waited)

    def _land(self) -> None:
        """All buckets have come: brings their exchanges to an end."""
        while self._flights:
            soon = [flight for flight in self._flights if flight.soon]
            for flight in soon or list(self._flights):
                self._advance(flight)

    def _compare_inputs(self, device: torch.device) -> None:
        """In the first step: whether ranks that share a part have the same mini-batch of it.

        More than s that have not are a mistake. Fewer may be one, or bad; they cannot stop the others.
        """
        rows = gather(torch.stack(self._inputs), self._model.process_group, device)
        odd: dict[int, int] = {}  # worker -> first part of which it has another mini-batch
        for part in range(self.code.parts):
            holders = [j for j in range(self.code.workers) if part in self.code.assignment(j)]
            ours = [rows[self._ranks[j], self.code.assignment(j).index(part)] for j in holders]
            for i in odd_ones_out(torch.stack(ours)):
                odd.setdefault(holders[i], part)
        ranks = {self._ranks[j]: part for j, part in odd.items()}
        if len(odd) > self.code.adversaries:
            raise ValueError(
                "loader must give ranks that share a part the same mini-batches of it, those of a "
                f"RedundantBatchSampler with the same seed and data; got others on ranks {sorted(ranks)}"
            )
        for rank, part in ranks.items():
            logger.warning(
                "rank %d on %s has another mini-batch of part %d than others: sampler, seed and data must be the same",
                rank,
                self._hosts[rank],
                part,
            )

    def _finish(self) -> None:
        """After the last backward pass of a step, when the gradients are in place."""
        failure, self._failure = self._failure, None
        step, self.step = self.step, self.step + 1
        step_taken(self, self.code, 1 + self._accumulated)
        self._part = self._forwards = self._accumulated = 0
        self.failed = failure is not None
        decoded, self._decoded = self._decoded, []
        if failure is None:
            if decoded:
                _leave_out_unused(decoded)
            return
        self._failed_steps.append(step)
        self._drop_gradients()
        if self._on_failure == "raise":
            raise DecodingError(failure)
        logger.warning("%s; the step is skipped", failure)

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
            logger.warning("%s", result)
        return result

    # ------------------------------------------------------------------------------------------------ verdicts

    def _note(self, outcome: Outcome, bucket: int) -> None:
        now = time.time()
        if not outcome.failed:
            self._weigh(outcome)
        if outcome.failed and self._failure is None:
            suspected, missing = ([self._ranks[j] for j in workers] for workers in (outcome.suspects, outcome.missing))
            self._failure = (
                f"no gradient in step {self.step}, bucket {bucket}: more ranks are bad than {self.code!r} can correct; "
                f"suspected: {suspected}" + (f", missing: {missing}" if missing else "")
            )
        for worker in (*outcome.suspects, *outcome.missing):
            rank = self._ranks[worker]
            differs = outcome.suspects.get(worker)
            finding = Finding(
                time=now,
                step=self.step,
                bucket=bucket,
                worker=worker,
                rank=rank,
                host=self._hosts[rank],
                elements=differs and differs.elements,
                first=differs and differs.first,
                largest=differs.largest if differs and differs.largest < float("inf") else None,
                failed=outcome.failed,
                missing=worker in outcome.missing,
            )
            if finding.missing:
                self._miss(finding)
            elif not outcome.failed:
                self._accuse(finding)
            if self._ledger is not None:
                self._ledger.append(finding)
            if self._callback is not None:
                self._callback(finding)

    def _weigh(self, outcome: Outcome) -> None:
        if outcome.suspects.keys() >= set(outcome.left_out):
            return
        before = self._evidence.probable
        left_out, suspects = ([self._ranks[j] for j in workers] for workers in (outcome.left_out, outcome.suspects))
        self._evidence.add(left_out, suspects)
        for rank in self._evidence.probable.keys() - before.keys():
            logger.warning(
                "rank %d on %s probably sends errors near the noise: it was left out of many decodes by step %d",
                rank,
                self._hosts[rank],
                self.step,
            )

    def _miss(self, finding: Finding) -> None:
        steps = self._missing.setdefault(finding.rank, [])
        if not steps:
            logger.warning("rank %d on %s is missing in step %d", finding.rank, finding.host, finding.step)
        if finding.step not in steps[-1:]:
            steps.append(finding.step)

    def _accuse(self, finding: Finding) -> None:
        if finding.rank not in self._suspects:
            self._suspects[finding.rank] = Suspect(finding.worker, finding.rank, finding.host)
            logger.warning("rank %d on %s sent a wrong gradient in step %d", finding.rank, finding.host, finding.step)
        suspect = self._suspects[finding.rank]
        suspect.buckets += 1
        if finding.step not in suspect.steps[-1:]:
            suspect.steps.append(finding.step)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs to go on exactly, dropout included, and to remember who was bad."""
        return {
            "step": self.step,
            "suspects": {rank: asdict(suspect) for rank, suspect in self._suspects.items()},
            "failed_steps": list(self._failed_steps),
            "missing": {rank: list(steps) for rank, steps in self._missing.items()},
            "evidence": self._evidence.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on where `state_dict` stood; the same on all ranks."""
        ops.check_int("state['step']", state["step"], 0)
        self.step = state["step"]
        self._suspects = {rank: Suspect(**suspect) for rank, suspect in state["suspects"].items()}
        self._failed_steps = list(state["failed_steps"])
        self._missing = {rank: list(steps) for rank, steps in state["missing"].items()}
        if "evidence" in state:  # not in checkpoints of earlier versions
            self._evidence.load_state_dict(state["evidence"])

    def report(self) -> Report:
        """Who was suspected, in which steps and how many buckets, and which steps failed: the same on all ranks.

        Also how many seconds were spent on it, and what its ledger lacks: each rank's own.
        """
        return Report(
            self._transport.trust,
            self.step,
            dict(self._suspects),
            tuple(self._failed_steps),
            dict(self._missing),
            self._evidence.probable,
            0 if self._ledger is None else self._ledger.unwritten,
            replace(self._peers.seconds),
        )


def _digest_of_sizes(model: torch.nn.Module) -> str:
    """Of what decides, with DDP's options, which buckets there will be."""
    sizes = [(list(p.shape), str(p.dtype)) for p in model.parameters() if p.requires_grad]
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()


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


def _leave_out_unused(decoded: list[tuple[Tensor, Tensor]]) -> None:
    """Parameters whose decoded gradient is 0 get none, as DDP gives none to those that no rank has used; others one."""
    used = torch.stack([gradient.any() for _, gradient in decoded]).tolist()
    for (parameter, gradient), is_used in zip(decoded, used, strict=True):
        if not is_used:
            parameter.grad = None
        elif parameter.grad is None:
            parameter.grad = gradient.clone()


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

    Before every forward pass in training torch's global generator is seeded, the same on all ranks with the part, so
    that dropout agrees. With find_unused_parameters or static_graph a parameter whose decoded gradient is exactly 0
    counts as unused: its ``grad`` is None.

    Args:
        model: on every rank, with a process group of ``code.workers`` ranks; torch.compile it before or afterwards.
        code: who computes which part. A code with several parts for each rank (cyclic) needs `Guard.steps`.
        transport: "allreduce", "allgather" or "server".
        on_failure: where the code's guarantee does not cover what came in, all gradients become None, on all ranks, so
            that an optimizer changes nothing; and "raise" makes ``backward()`` raise DecodingError, "skip" logs a
            warning.
        ledger: file to which every `Finding` is appended as a line of JSON, see `draco_ext.read_ledger`: by rank 0, or,
            with "{rank}" in its name, by every rank to its own. Where that fails later on, training goes on.
        callback: called with every `Finding`, on all ranks.
        adversary: makes this rank bad, for tests and demonstrations: f(step, honest message) -> what is sent.
        atol: honest messages may differ by so much, see `draco_ext.decode`; not for the repetition code with
            "allreduce", which compares bits.
        rtol: the same, relative.
        seed: of the generator's seeds; the same on all ranks.
        ranks_per_host: see `RedundantBatchSampler`.
        deadline: seconds that the server waits for the others' messages once it has its own. A rank that was late is
            not waited for again until it has caught up.

    Returns:
        The guard.

    Raises:
        TypeError: an argument has the wrong type; parameters have a dtype that the code does not take.
        ValueError: an argument has a wrong value, or not the same on all ranks; nor have the models or DDP's options;
            the ledger cannot be opened: on all ranks alike. In the first step ``backward()`` raises one, too, where
            more than s ranks have other mini-batches than those with which they share a part.
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
    ops.check_tolerance("atol", atol)
    ops.check_tolerance("rtol", rtol)
    ops.check_tolerance("deadline", deadline)
    ops.check_int("seed", seed, 0, 2**63 - 1)
    if isinstance(code, RepetitionCode) and transport == "allreduce" and (atol > 0 or rtol > 0):
        raise ValueError("atol and rtol must be 0 for a repetition code with transport='allreduce'; take 'allgather'")
    accepted = ops.CYCLIC_DTYPES if isinstance(code, CyclicCode) else ops.VOTE_DTYPES
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype not in accepted:
            raise TypeError(f"parameters must have a dtype that {code!r} takes, got {parameter.dtype} for {name}")
    if transport == "server" and (
        model.find_unused_parameters or (model.broadcast_buffers and next(model.buffers(), None) is not None)
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
    )

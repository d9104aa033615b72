"""The base class of guards: their composition, and what they offer between steps."""

from __future__ import annotations

import abc
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from draco_ext import _checks, ops
from draco_ext.codes import Code
from draco_ext.protocol.communicator import ProcessGroupCommunicator
from draco_ext.protocol.exchange import ExchangeScheduler
from draco_ext.protocol.groups import membership
from draco_ext.protocol.transports import make_transport
from draco_ext.reporting.ledger import Finding
from draco_ext.reporting.recorder import Recorder, open_ledger
from draco_ext.reporting.report import Report
from draco_ext.training.adapter import Adapter, Bucket
from draco_ext.training.adapters import make_adapter
from draco_ext.training.agreement import Agreement
from draco_ext.training.ddp import UnusedParameters
from draco_ext.training.failure import FailurePolicy
from draco_ext.training.handshake import exchange_setup, sha256_of
from draco_ext.training.record import StepRecord
from draco_ext.training.reproducibility import SelfTest
from draco_ext.training.state_check import StateCheck


class GuardBase(abc.ABC):
    """A guard between the gradients of a data-parallel model and its optimizer.

    Args:
        model: the model.
        code: the code by which gradients are exchanged.
        workers: the worker number of every rank; with a code and FSDP2 of every replica.
        setup: further settings that must be the same on all ranks.
        seed: the seed of keys that need not be secret.
        other: see `protect`.

    Attributes: see `Guard`.
    """

    _is_audit: ClassVar[bool] = False
    _adapter: Adapter

    def __init__(
        self,
        model: torch.nn.Module,
        code: Code,
        *,
        workers: tuple[int, ...],
        setup: Mapping[str, Any],
        transport: str,
        on_failure: str,
        ledger: str | Path | None,
        callback: Callable[[Finding], None] | None,
        atol: float,
        rtol: float,
        seed: int,
        deadline: float,
        check_state_every: int,
        helpers: int,
    ) -> None:
        self.code = code
        self.failed = False
        adapter = self._adapter = make_adapter(model, audit=self._is_audit)
        group, device = adapter.group, adapter.device
        self._workers = workers
        self._ranks = tuple(sorted(range(code.workers), key=workers.__getitem__))
        rank = dist.get_rank(group)
        self.worker = workers[rank]
        opened, problem = open_ledger(ledger, dist.get_rank(adapter.world))
        everything = {
            **setup,
            "transport": transport,
            "on_failure": on_failure,
            "the placement of ranks (its digest)": sha256_of(workers),
            "atol": atol,
            "rtol": rtol,
            "seed": seed,
            "deadline": deadline,
            "check_state_every": check_state_every,
            "the number of process groups that a rank is in": membership(group),
            **adapter.setup(),
        }
        if not code.exact and transport != "server" and device.type == "cpu":
            # Every rank decodes for itself, and different types of device round differently.
            everything["instruction set (DRACO_ISA)"] = ops.build_info()["instruction_set"]
        hosts = exchange_setup(everything, socket.gethostname(), problem, adapter.world, device)
        self._hosts = [", ".join(sorted({hosts[rank] for rank in members})) for members in adapter.members]
        self._agreement = Agreement(adapter)

        names = [adapter.members[rank][adapter.shard] for rank in self._ranks]
        communicator = ProcessGroupCommunicator(group, self._ranks, names=names)
        self._communicator = communicator
        self._seconds = communicator.seconds
        self._transport = make_transport(
            transport,
            code,
            communicator,
            deadline=deadline,
            on_one_host=len(set(hosts)) == 1,
            atol=atol,
            rtol=rtol,
        )
        self._scheduler = ExchangeScheduler(self._seconds)
        self._recorder = Recorder(
            rank,
            self._ranks,
            self._hosts,
            ledger=opened,
            callback=callback,
            unit=adapter.unit,
            members=adapter.members if adapter.unit != "rank" else (),
            speaks=adapter.shard == 0,
        )
        self._policy = FailurePolicy(code, self._ranks, on_failure, self._recorder.log, adapter.unit)
        self._state_check = StateCheck(
            adapter,
            self._agreement,
            self._transport,
            self._recorder,
            every=check_state_every,
            seed=seed,
            helpers=helpers,
        )

    def _attach(self, *, steps_after: str = "backward()") -> None:
        """Register the hooks, when everything else is made; `steps_after`: see `Adapter.attach`."""
        # The server's threads communicate at any time, so the server cannot watch collectives; the other ranks do.
        is_server = self._transport.is_served and self.worker == self._communicator.root
        self._adapter.attach(
            take=self._take,
            before_forward=self._before_forward,
            abort=self._abort,
            watch_collectives=not is_server,
            steps_after=steps_after,
        )
        reduced = self._adapter.reduced()
        usage = self._adapter.parameters_may_be_unused
        self._record = StepRecord(self.code, self.worker, reduced, usage=usage)
        self._unused = UnusedParameters(reduced, self._record) if usage else None

    @property
    @abc.abstractmethod
    def step(self) -> int:
        """The number of the next step."""

    @property
    def data_replicas(self) -> int:
        """The number of different mini-batches in a step: what a loader calls num_replicas, or world_size.

        With an `Audit` it is the number of ranks. With a code it is ``code.parts``; under FSDP2 the ranks of a replica
        divide each part among themselves, so it is as many times larger.
        """
        return self.code.parts * self._adapter.shards

    @property
    def data_ranks(self) -> tuple[int, ...]:
        """The shares of the data that this rank loads, of `data_replicas`, in the order of a step's mini-batches.

        With the repetition code it is one, the same for all ranks of a group. With the cyclic code there are 2s+1: make
        a loader for each, and let them take turns. With an `Audit` it is this rank's number in the process group.
        """
        shards, shard = self._adapter.shards, self._adapter.shard
        return tuple(part * shards + shard for part in self.code.assignment(self.worker))

    @property
    def data_rank(self) -> int:
        """The share of the data that this rank loads, of `data_replicas`: what a loader calls rank.

        Raises:
            RuntimeError: this rank loads several shares.
        """
        if len(self.data_ranks) > 1:
            raise RuntimeError(
                f"a rank loads {len(self.data_ranks)} shares of the data with {self.code!r}, and has no single "
                "data_rank: make a loader for each of guard.data_ranks, and let them take turns"
            )
        return self.data_ranks[0]

    @abc.abstractmethod
    def steps(self, loader: Iterable[Any]) -> Iterator[Iterator[Any]]:
        """Cut a loader into steps."""

    @abc.abstractmethod
    def _take(self, bucket: Bucket) -> None:
        """Take a bucket of a backward pass."""

    @abc.abstractmethod
    def _before_forward(self, module: torch.nn.Module, arguments: Any, keywords: Any) -> None:
        """Prepare a forward pass."""

    @abc.abstractmethod
    def _forget_step(self) -> None:
        """Forget what a step has collected, whether it came to its end or not."""

    @abc.abstractmethod
    def _restart(self, step: int) -> None:
        """Go on at another step, after a state was loaded."""

    def _abort(self) -> None:
        """Give up a step in which an error was raised."""
        self._scheduler.close()
        self._transport.abort()
        self._forget_step()
        self._adapter.drop_gradients()  # both this rank's own and the decoded ones
        self._recorder.deliver()

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
        result = self._adapter.self_test(batch, loss)
        if not result.reproducible:
            self._recorder.log("%s", result)
        return result

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Compare and repair an optimizer's state (its tensors and numbers) together with the parameters.

        All ranks must call it. It costs two or three times as much as comparing the parameters.

        Raises:
            TypeError: it is not an optimizer, or its state is not replicated on all ranks.
            ValueError: no other rank has the shards that this rank has, as with an `Audit` over a mesh of shards alone.
        """
        if not self._adapter.state_is_replicated:
            raise ValueError(
                "an optimizer's state cannot be watched for a model that is sharded over all ranks: no other rank has "
                "the same shard; give fully_shard a mesh of replicas and shards"
            )
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
        self._recorder.load_state_dict(state)
        self._state_check.forget()
        self._restart(state["step"])

    def report(self) -> Report:
        """Return the suspects, with their steps and numbers of buckets, and the steps that failed.

        The report is the same on all ranks, except for `seconds`, `unwritten` and `undelivered`. It is a snapshot that
        does not change afterwards. Any thread may ask for it.
        """
        code, trust = self.code, self._transport.trust
        if code.bounded:
            trust += (
                f" {code!r}: gradients are bounded, not exact, while at most {code.corruptible} of {code.parts} parts "
                f"have more than {code.adversaries} bad {self._recorder.unit}s."
            )
        found = self._recorder.report(trust=trust, steps=self.step, seconds=self._seconds)
        return replace(found, bounded=code.bounded)

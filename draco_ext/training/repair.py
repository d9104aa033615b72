"""Repair of replicated state: a rank in the minority receives the majority's values.

One rank of the majority sends the bytes. They are accepted only if their digest, under a key that is drawn afterwards,
equals that of the majority.
"""

from __future__ import annotations

import abc
import secrets
from collections.abc import Sequence

import torch
from torch import Tensor

from draco_ext.protocol.exchange import run_alone
from draco_ext.protocol.transports.base import Transport
from draco_ext.protocol.transports.server import ServerTransport
from draco_ext.training.record import SECTIONS, majority
from draco_ext.training.state import Pools, ReplicatedState, StateVerdict

_DONE, _DIGEST, _SEND = range(3)


class Repair(abc.ABC):
    """A way to give the majority's values to ranks in the minority."""

    @abc.abstractmethod
    def run(self, verdict: StateVerdict, pools: Pools) -> dict[int, bool]:
        """Repair the workers whose state is wrong, one after another. All ranks must call it.

        Args:
            verdict: the workers whose state is wrong, and those whose state is right.
            pools: see `judge`.

        Returns:
            Whether each of them could be repaired, by worker.
        """


class PeerRepair(Repair):
    """Repair from rank to rank, for transports without a server.

    The wrong rank leads. It draws a key and asks all others for digests under it, asks one rank of the majority for the
    bytes, and asks all others for digests under a new key, which the sender of the bytes could not know. The other
    ranks only answer, and need not agree among themselves.
    """

    def __init__(self, transport: Transport, state: ReplicatedState, helpers: int) -> None:
        self._communicator = transport.communicator
        self._state = state
        self._helpers = helpers
        self._most_commands = len(SECTIONS) * (1 + 2 * self._helpers) + 1

    def run(self, verdict: StateVerdict, pools: Pools) -> dict[int, bool]:
        """See `Repair.run`; each repaired worker itself reports whether it could be repaired."""
        return {
            j: self._lead(sections, verdict, pools) if j == self._communicator.worker else self._serve(j)
            for j, sections in verdict.wrong.items()
        }

    def _lead(self, sections: Sequence[str], verdict: StateVerdict, pools: Pools) -> bool:
        own = self._communicator.worker
        others = [j for j in range(self._communicator.workers) if j != own]
        repaired = all(
            self._recover(
                section,
                [j for j in pools[section][own] if j != own],
                verdict.right[section, own],
            )
            for section in sections
        )
        for j in others:
            self._command(j, _DONE, int(repaired), 0)
        return repaired

    def _recover(self, section: str, pool: Sequence[int], helpers: Sequence[int]) -> bool:
        own = self._state.layout(section).tolist()
        wanted, _ = self._ask(section, pool)
        if wanted is None or wanted[2:] != tuple(own):
            return False  # the majority's values do not fit into this rank's tensors
        for helper in helpers[: self._helpers]:
            self._command(helper, _SEND, SECTIONS.index(section), 0)
            self._state.receive(section, self._communicator, helper)
            wanted, key = self._ask(section, pool)
            if wanted is not None and wanted[:2] == tuple(self._state.digest(section, key).tolist()):
                return True
        return False

    def _ask(self, section: str, pool: Sequence[int]) -> tuple[tuple[int, ...] | None, int]:
        """Return the answer of the majority of `pool` about a section, or None, and the key that was used."""
        key = secrets.randbits(62)
        answers = {}
        for j in pool:
            self._command(j, _DIGEST, SECTIONS.index(section), key)
        for j in pool:
            answer = torch.zeros(4, dtype=torch.int64, device=self._state.device)
            self._communicator.receive(answer, j)
            answers[j] = tuple(answer.tolist())
        return majority(answers), key

    def _command(self, worker: int, what: int, section: int, key: int) -> None:
        self._communicator.send(torch.tensor([what, section, key], device=self._state.device), worker)

    def _serve(self, worker: int) -> bool:
        """Answer the commands of a wrong rank until it is done; return whether it could be repaired."""
        for _ in range(self._most_commands):
            command = torch.zeros(3, dtype=torch.int64, device=self._state.device)
            self._communicator.receive(command, worker)
            what, number, key = command.tolist()
            if what not in (_DIGEST, _SEND) or not 0 <= number < len(SECTIONS) or not 0 <= key < 2**62:
                return bool(what == _DONE and number == 1)
            section = SECTIONS[number]
            if what == _SEND:
                self._state.send(section, self._communicator, worker)
            else:
                self._communicator.send(
                    torch.cat([self._state.digest(section, key), self._state.layout(section)]), worker
                )
        return False


class ServerRepair(Repair):
    """Repair through the server, in turn with all other messages, so that a dead or late rank delays nobody.

    The bytes that a worker sends are compared with the majority's digest under a key that the server draws afterwards.
    """

    def __init__(self, transport: ServerTransport, state: ReplicatedState, helpers: int) -> None:
        self._transport = transport
        self._state = state
        self._own = transport.communicator.worker
        self._server = transport.server
        self._helpers = helpers

    def run(self, verdict: StateVerdict, pools: Pools) -> dict[int, bool]:
        """See `Repair.run`."""
        return {
            j: all(self._recover(section, j, verdict.right[section, j]) for section in sections)
            for j, sections in verdict.wrong.items()
        }

    def _recover(self, section: str, worker: int, right: Sequence[int]) -> bool:
        rows, missing = run_alone(self._transport.gather_record(self._state.layout(section)))
        layouts = {j: tuple(row.tolist()) for j, row in enumerate(rows) if j not in missing}
        helpers = [j for j in right if layouts.get(j) == layouts.get(worker) == layouts[self._server]]
        helpers.sort(key=lambda j: j != self._server)
        for helper in helpers[: self._helpers]:
            values = self._bring(section, helper, [j for j in right if j not in missing])
            if values is None:
                continue
            if worker == self._server:
                if self._own == self._server:
                    self._state.from_bytes(section, values)
            elif len(values) and self._own in (worker, self._server):
                self._transport.send_from_server(worker, values)
                if self._own == worker:
                    self._state.from_bytes(section, values)
            return True
        return False

    def _bring(self, section: str, helper: int, right: Sequence[int]) -> Tensor | None:
        """Return a helper's section on the server (elsewhere any bytes), or None if it is not the majority's."""
        if self._own == helper:
            values = self._state.to_bytes(section)
        else:
            values = torch.zeros(self._state.size(section), dtype=torch.uint8)
        if helper == self._server:
            return values
        if len(values) and self._own in (helper, self._server):
            self._transport.send_to_server(helper, values)
        rows, _ = run_alone(self._transport.gather_record(torch.tensor([secrets.randbits(62)])))
        key = int(rows[self._server])
        if self._own == self._server:
            digest = self._state.digest_of_bytes(section, values, key)
        else:
            digest = self._state.digest(section, key)
        rows, missing = run_alone(self._transport.gather_record(digest))
        digests = {j: tuple(rows[j].tolist()) for j in right if j not in missing}
        return values if majority(digests) == tuple(rows[self._server].tolist()) else None


def make_repair(transport: Transport, state: ReplicatedState, helpers: int) -> Repair:
    """Return the repair that fits a transport; `helpers` is how many ranks are asked before it is given up."""
    if isinstance(transport, ServerTransport):
        return ServerRepair(transport, state, helpers)
    return PeerRepair(transport, state, helpers)

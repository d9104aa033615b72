"""The state that data-parallel replicas share, parameters above all: its digests, and its repair where a rank differs.

Every rank holds the same parameters, so a majority of ranks knows what a rank's own should be. Ranks compare digests;
one in the minority is sent what the majority has, and believes it only under a key that it draws afterwards.
"""

from __future__ import annotations

import abc
import secrets
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree

from draco_ext import ops
from draco_ext.protocol.transports.base import Peers, Transport, gather_alone
from draco_ext.protocol.transports.server import SERVER, ServerTransport
from draco_ext.training.record import SECTIONS, Digest, majority

CHUNK = 2**20  # bytes; smaller tensors are digested and sent together

Number = int | float | None


class ReplicatedState:
    """The parameters and buffers of a model, and the states of optimizers that are watched.

    Args:
        model: its parameters and buffers count but for those that DistributedDataParallel is told to ignore.
    """

    def __init__(self, model: DistributedDataParallel) -> None:
        self._ignored = frozenset(model.parameters_to_ignore)
        self._module = weakref.ref(model.module)  # held, it would never be freed
        parameters = model.module.named_parameters()
        self._parameters = _strided(p for name, p in parameters if name not in self._ignored)
        self.device = self._parameters[0].device
        self._optimizers: list[torch.optim.Optimizer] = []

    def watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Adds an optimizer's state and the numbers in its `param_groups`."""
        if all(optimizer is not other for other in self._optimizers):
            self._optimizers.append(optimizer)

    def digests(self, key: int) -> Tensor:
        """Return the digests (3, 2) of `SECTIONS`, on the parameters' device; reads everything once."""
        return torch.stack([self.digest(section, key) for section in SECTIONS])

    def digest(self, section: str, key: int) -> Tensor:
        """Return the digest (2,) of one section, 0 where there is nothing in it."""
        pieces = (_bytes(chunk, chunk[0].device) for chunk in _chunks(self._of(section)))
        return _join(pieces, key, self.device)

    def layout(self, section: str) -> Tensor:
        """Return a digest (2,) of what decides how a section is sent: shapes, dtypes and structure."""
        text = repr([(tuple(t.shape), t.dtype) for t in self._of(section)])
        if section == "optimizer":
            text += "".join(_structure(optimizer) for optimizer in self._optimizers)
        return ops.digest(torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8), 0).to(self.device)

    def send(self, section: str, peers: Peers, worker: int) -> None:
        """Sends a section to one worker."""
        for chunk in _chunks(self._of(section)):
            peers.send(_bytes(chunk, self.device), worker)

    def receive(self, section: str, peers: Peers, worker: int) -> None:
        """Takes a section of the same layout from one worker, in place."""
        tensors = self._of(section)
        for chunk in _chunks(tensors):
            arrived = torch.empty(sum(map(_size, chunk)), dtype=torch.uint8, device=self.device)
            peers.receive(arrived, worker)
            _fill(chunk, arrived)
        self._put_numbers(section, tensors)

    def size(self, section: str) -> int:
        """Return how many bytes a section has."""
        return sum(map(_size, self._of(section)))

    def to_bytes(self, section: str) -> Tensor:
        """Return a copy of a section as bytes on the CPU."""
        pieces = [_bytes(chunk, torch.device("cpu")) for chunk in _chunks(self._of(section))]
        return torch.cat([torch.empty(0, dtype=torch.uint8), *pieces])

    def from_bytes(self, section: str, values: Tensor) -> None:
        """Takes over what `to_bytes` has returned on a rank with the same layout."""
        tensors = self._of(section)
        chunks = list(_chunks(tensors))
        for chunk, piece in zip(chunks, values.split([sum(map(_size, chunk)) for chunk in chunks]), strict=True):
            _fill(chunk, piece)
        self._put_numbers(section, tensors)

    def digest_of_bytes(self, section: str, values: Tensor, key: int) -> Tensor:
        """Return the `digest` of a rank whose section these bytes are."""
        sizes = [sum(map(_size, chunk)) for chunk in _chunks(self._of(section))]
        return _join((piece.clone() for piece in values.split(sizes)), key, self.device)

    def _of(self, section: str) -> list[Tensor]:
        if section == "parameters":
            return self._parameters
        if section == "buffers":
            # A module may put another tensor in a buffer's place.
            buffers = () if (module := self._module()) is None else module.named_buffers()
            return _strided(buffer for name, buffer in buffers if name not in self._ignored)
        tensors, numbers = [], []
        for leaf in (leaf for optimizer in self._optimizers for leaf in _leaves(optimizer)[0]):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                tensors.append(leaf)
            elif _is_number(leaf):
                numbers.append(leaf)
        # Adam's step counts are on the CPU, between moments that are not.
        tensors.sort(key=lambda tensor: tensor.device.type != "cpu")
        return [*tensors, _encode(numbers)] if numbers else tensors

    def _put_numbers(self, section: str, tensors: list[Tensor]) -> None:
        if section != "optimizer" or not self._optimizers:
            return
        numbers = iter(_decode(tensors[-1]))
        for optimizer in self._optimizers:
            leaves, structure = _leaves(optimizer)
            leaves = [next(numbers) if _is_number(leaf) else leaf for leaf in leaves]
            groups, states = pytree.tree_unflatten(leaves, structure)
            for group, values in zip(optimizer.param_groups, groups, strict=True):
                group.update(values)
            for parameter, values in zip(_parameters(optimizer), states, strict=True):
                if values:
                    optimizer.state[parameter].update(values)


def _strided(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor.layout == torch.strided]


def _chunks(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Cuts tensors into lists of which each is on one device, and has one tensor or few bytes."""
    chunk: list[Tensor] = []
    length = 0
    for tensor in tensors:
        if chunk and (length + _size(tensor) > CHUNK or tensor.device != chunk[0].device):
            yield chunk
            chunk, length = [], 0
        chunk.append(tensor)
        length += _size(tensor)
    if length:
        yield chunk


def _join(pieces: Iterable[Tensor], key: int, device: torch.device) -> Tensor:
    digests = [ops.digest(piece, (key + 1 + i) % 2**63).to(device) for i, piece in enumerate(pieces)]
    if not digests:
        return torch.zeros(2, dtype=torch.int64, device=device)
    return ops.digest(torch.cat(digests).view(torch.uint8), key)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _bytes(chunk: list[Tensor], device: torch.device) -> Tensor:
    pieces = [tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in chunk]
    return (torch.cat(pieces) if len(pieces) > 1 else pieces[0]).to(device)


@torch.no_grad()
def _fill(chunk: list[Tensor], arrived: Tensor) -> None:
    for tensor, piece in zip(chunk, arrived.split([_size(tensor) for tensor in chunk]), strict=True):
        # Cloned, since a tensor of longer elements may not begin anywhere.
        tensor.detach().copy_(piece.clone().view(tensor.dtype).view(tensor.shape))


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _leaves(optimizer: torch.optim.Optimizer) -> tuple[list[object], pytree.TreeSpec]:
    groups = [{name: group[name] for name in sorted(group) if name != "params"} for group in optimizer.param_groups]
    states = [optimizer.state.get(parameter, {}) for parameter in _parameters(optimizer)]
    states = [{name: state[name] for name in sorted(state)} for state in states]
    return pytree.tree_flatten([groups, states])


def _structure(optimizer: torch.optim.Optimizer) -> str:
    leaves, structure = _leaves(optimizer)
    kinds = [
        leaf if isinstance(leaf, str) else "number" if _is_number(leaf) else type(leaf).__name__ for leaf in leaves
    ]
    return f"{structure} {kinds}"


def _is_number(leaf: object) -> bool:
    return leaf is None or isinstance(leaf, float) or (isinstance(leaf, int) and abs(leaf) < 2**63)


def _encode(numbers: Sequence[Number]) -> Tensor:
    """Return numbers as int64, two each: what it is, and its bits."""
    pairs = torch.zeros(len(numbers), 2, dtype=torch.int64)
    for pair, number in zip(pairs, numbers, strict=True):
        if isinstance(number, float):
            pair[0], pair[1] = 1, torch.tensor(number, dtype=torch.float64).view(torch.int64)
        elif number is not None:
            pair[0], pair[1] = 3 if isinstance(number, bool) else 2, int(number)
    return pairs


def _decode(pairs: Tensor) -> list[Number]:
    numbers: list[Number] = []
    for (kind, value), pair in zip(pairs.tolist(), pairs, strict=True):
        numbers.append({1: pair[1].view(torch.float64).item(), 2: value, 3: bool(value)}.get(kind))
    return numbers


# -------------------------------------------------------------------------------------------------- verdict


@dataclass(frozen=True)
class StateVerdict:
    """Whose state is wrong.

    Attributes:
        wrong: the sections, by worker.
        right: by section, the workers of the majority; of buffers, those of each worker's own group.
        undecided: the sections of which no majority has the same.
    """

    wrong: dict[int, tuple[str, ...]]
    right: dict[tuple[str, int], tuple[int, ...]]
    undecided: tuple[str, ...]


def judge(claims: Mapping[int, Sequence[Digest]], groups: Mapping[int, tuple[int, ...]]) -> StateVerdict:
    """Compare digests of `SECTIONS`.

    Args:
        claims: by worker, of those that are not missing.
        groups: by worker, those who compute the same parts: only they have the same buffers, and where no majority of
            them has, as where a module keeps something of a rank's own in a buffer, nobody is wrong.
    """
    wrong: dict[int, list[str]] = {}
    right: dict[tuple[str, int], tuple[int, ...]] = {}
    undecided = []
    for i, section in enumerate(SECTIONS):
        of_all = {j: digests[i] for j, digests in claims.items()}
        if section != "buffers" and claims and majority(of_all) is None:
            undecided.append(section)
        for j in claims:
            pool = {k: of_all[k] for k in groups[j] if k in of_all} if section == "buffers" else of_all
            usual = majority(pool)
            if usual is not None and of_all[j] != usual:
                wrong.setdefault(j, []).append(section)
                right[section, j] = tuple(k for k, digest in pool.items() if digest == usual)
    return StateVerdict({j: tuple(wrong[j]) for j in sorted(wrong)}, right, tuple(undecided))


# --------------------------------------------------------------------------------------------------- repair

_DONE, _DIGEST, _SEND = range(3)


class Repair(abc.ABC):
    """A way to give ranks in the minority what the majority has."""

    @abc.abstractmethod
    def run(self, verdict: StateVerdict, groups: Mapping[int, tuple[int, ...]]) -> dict[int, bool]:
        """Repair those who are wrong, one after another. To be called on all ranks.

        Args:
            verdict: who that is.
            groups: see `judge`.

        Returns:
            For each of them whether it could be repaired.
        """


class PeerRepair(Repair):
    """From rank to rank, where there is no server.

    The rank that is wrong leads: it asks everybody for digests under a key that it has just drawn, one of the majority
    for the bytes, and everybody again under a new key, which the one that sent them could not know. So nobody needs to
    agree with anybody but with that rank, and the other ranks only answer.
    """

    def __init__(self, transport: Transport, state: ReplicatedState) -> None:
        peers = self._peers = transport.peers
        self._state = state
        self._helpers = peers.code.adversaries + 1
        self._most_commands = len(SECTIONS) * (1 + 2 * self._helpers) + 1

    def run(self, verdict: StateVerdict, groups: Mapping[int, tuple[int, ...]]) -> dict[int, bool]:
        """See `Repair.run`; whether it could be repaired each says of itself."""
        return {
            j: self._lead(sections, verdict, groups) if j == self._peers.worker else self._serve(j)
            for j, sections in verdict.wrong.items()
        }

    def _lead(self, sections: Sequence[str], verdict: StateVerdict, groups: Mapping[int, tuple[int, ...]]) -> bool:
        own = self._peers.worker
        others = [j for j in range(self._peers.code.workers) if j != own]
        repaired = all(
            self._recover(
                section,
                [j for j in groups[own] if j != own] if section == "buffers" else others,
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
            return False  # there is no room for what they have
        for helper in helpers[: self._helpers]:
            self._command(helper, _SEND, SECTIONS.index(section), 0)
            self._state.receive(section, self._peers, helper)
            wanted, key = self._ask(section, pool)
            if wanted is not None and wanted[:2] == tuple(self._state.digest(section, key).tolist()):
                return True
        return False

    def _ask(self, section: str, pool: Sequence[int]) -> tuple[tuple[int, ...] | None, int]:
        """What the majority of others says of a section, and under which key."""
        key = secrets.randbits(62)
        answers = {}
        for j in pool:
            self._command(j, _DIGEST, SECTIONS.index(section), key)
        for j in pool:
            answer = torch.zeros(4, dtype=torch.int64, device=self._state.device)
            self._peers.receive(answer, j)
            answers[j] = tuple(answer.tolist())
        return majority(answers), key

    def _command(self, worker: int, what: int, section: int, key: int) -> None:
        self._peers.send(torch.tensor([what, section, key], device=self._state.device), worker)

    def _serve(self, worker: int) -> bool:
        """Answers a rank that is wrong, until it is done."""
        for _ in range(self._most_commands):
            command = torch.zeros(3, dtype=torch.int64, device=self._state.device)
            self._peers.receive(command, worker)
            what, number, key = command.tolist()
            if what not in (_DIGEST, _SEND) or not 0 <= number < len(SECTIONS) or not 0 <= key < 2**62:
                return what == _DONE and number == 1
            section = SECTIONS[number]
            if what == _SEND:
                self._state.send(section, self._peers, worker)
            else:
                self._peers.send(torch.cat([self._state.digest(section, key), self._state.layout(section)]), worker)
        return False


class ServerRepair(Repair):
    """Through the server, in turns with everything else: so a dead or late rank holds nobody up.

    What a worker sends for the server or for another is compared with the majority under a key that the server draws
    afterwards.
    """

    def __init__(self, transport: ServerTransport, state: ReplicatedState) -> None:
        self._transport = transport
        self._state = state
        self._own = transport.peers.worker
        self._server = transport.peers.ranks.index(SERVER)

    def run(self, verdict: StateVerdict, groups: Mapping[int, tuple[int, ...]]) -> dict[int, bool]:
        """See `Repair.run`."""
        return {
            j: all(self._recover(section, j, verdict.right[section, j]) for section in sections)
            for j, sections in verdict.wrong.items()
        }

    def _recover(self, section: str, worker: int, right: Sequence[int]) -> bool:
        rows, missing = gather_alone(self._transport, self._state.layout(section))
        layouts = {j: tuple(row.tolist()) for j, row in enumerate(rows) if j not in missing}
        helpers = [j for j in right if layouts.get(j) == layouts.get(worker) == layouts[self._server]]
        helpers.sort(key=lambda j: j != self._server)
        for helper in helpers[: self._transport.code.adversaries + 1]:
            values = self._bring(section, helper, [j for j in right if j not in missing])
            if values is None:
                continue
            if worker == self._server:
                if self._own == self._server:
                    self._state.from_bytes(section, values)
            elif len(values) and self._own in (worker, self._server):
                self._transport.hand(worker, values)
                if self._own == worker:
                    self._state.from_bytes(section, values)
            return True
        return False

    def _bring(self, section: str, helper: int, right: Sequence[int]) -> Tensor | None:
        """A helper's section, on the server; anything on the others; None where it is not the majority's."""
        if self._own == helper:
            values = self._state.to_bytes(section)
        else:
            values = torch.zeros(self._state.size(section), dtype=torch.uint8)
        if helper == self._server:
            return values
        if len(values) and self._own in (helper, self._server):
            self._transport.fetch(helper, values)
        rows, _ = gather_alone(self._transport, torch.tensor([secrets.randbits(62)]))
        key = int(rows[self._server])
        if self._own == self._server:
            digest = self._state.digest_of_bytes(section, values, key)
        else:
            digest = self._state.digest(section, key)
        rows, missing = gather_alone(self._transport, digest)
        digests = {j: tuple(rows[j].tolist()) for j in right if j not in missing}
        return values if majority(digests) == tuple(rows[self._server].tolist()) else None

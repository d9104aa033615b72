"""Verified delivery: every rank gets a vector from each group of ranks that have the same one, and trusts nobody."""

from __future__ import annotations

import enum
import secrets
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from draco_ext.codes import groups_by_worker
from draco_ext.protocol.communicator import Communicator, Parcels
from draco_ext.protocol.differences import Difference
from draco_ext.protocol.exchange import copy_to_host
from draco_ext.protocol.keys import LARGEST_KEY, Digest
from draco_ext.protocol.verifier import Verdict, Verifier, digests_of, read_digests


def more_than(adversaries: int, workers: Collection[int], groups: Sequence[Sequence[int]]) -> bool:
    """Return whether more than s members of one group are among these workers, so that one of them is honest."""
    return any(len(set(workers).intersection(members)) > adversaries for members in groups)


class Known(enum.IntEnum):
    """A rank's answer to whether it knows its own group's vector.

    LATE: it does, but did not when it sent its pieces.
    """

    NO = 0
    YES = 1
    LATE = 2


class Delivery:
    """The delivery of one vector of every group to this rank, and of its own group's vectors to the others.

    All members of a group have the same vector. It has as many pieces as the group has members, and each member sends
    one, if the receiver is not a member itself and has its own copy. A receiver is a verifier:

    1. When the pieces have arrived from all ranks, it reveals its share in a key; see `ChainedKeys`.
    2. With all shares, each rank has the key, and answers all with the digests of all pieces of its own copy under it.
    3. Of each piece the digest that the group's majority gives is right. The verifier tells all whether its own copy
       is. If not, it also asks a member of the majority for each wrong piece.
    4. It then verifies what has come under a key of its own, which it sends to all ranks, since the sender may have
       chosen the piece to fit the old one. Of each piece a wrong sender is known by now, so s repetitions are enough if
       no more than s members are bad.

    A verifier's share is part of the only key that it uses, and it reveals it when everything has arrived that is
    verified: so nobody knows the key before. A rank that shows different shares to different ranks makes them have
    different keys. An answer contains its key, so the verifier then does not judge who gave it; where too few answers
    have its own key, it repeats the comparison under one that it draws alone. So nothing has to be agreed on, an honest
    member is never found wrong, and in steps without bad ranks a rank takes the digest of each vector once, not once
    for each verifier. All ranks take the same steps until the first comparison; only those concerned go on, without a
    pause.

    The steps of the first comparison are methods, since those of two deliveries go together: `pieces`, `answer`,
    `prepare`, `compare`, `tell` and `hear`, and where that says so, `settle`. What `pieces`, `answer` and `tell` return
    is sent, and received, before the next one is called.

    Args:
        communicator: connects the workers.
        groups: the members of each group.
        adversaries: s.
        serve: f(worker): the vector that this rank's group has for a worker; the same tensor for the same vector.
        held: by group, the vector that is delivered to this rank. This rank's own group's is already there.
        announced: workers that were found wrong before, and are announced to the others together with these.

    Attributes:
        known: whether this rank has its group's vectors. If not, it can neither send nor vote.
        late: the workers that may say so in the first comparison; who else does is wrong.
        failed: whether a vector could not be verified, because more than s members of its group are wrong.
        failing: the other workers that say so, or that do not have their group's vector.
        announcements: how many workers each other worker has found wrong, as it says.
        verifiers: the workers that have to compare again.
    """

    def __init__(
        self,
        communicator: Communicator,
        groups: Sequence[Sequence[int]],
        adversaries: int,
        serve: Callable[[int], Tensor],
        held: Sequence[Tensor],
        *,
        announced: Collection[int] = (),
    ) -> None:
        self.known = Known.YES
        self.late: Collection[int] = ()
        self.failed = False
        self.failing: set[int] = set()
        self.announcements: dict[int, int] = {}
        self.verifiers: set[int] = set()
        self._communicator = communicator
        self._groups = groups
        self._adversaries = adversaries
        self._serve = serve
        self._announced = announced
        self._own = communicator.worker
        self._everybody = range(communicator.workers)
        self._others = [j for j in self._everybody if j != self._own]
        self._group_of = groups_by_worker(groups)
        self._members = groups[self._group_of[self._own]]  # of this rank's own group
        self._device = held[0].device
        self._held = held
        self._verifier = Verifier(self._own, groups, adversaries, held, describes=self._describes)
        # Of the comparison that is under way:
        self._keys: Mapping[int, int] = {}  # by worker that compares
        self._answers: dict[int, Tensor] = {}  # what each worker has answered to this rank
        self._words: dict[int, Tensor] = {}  # what each that compares has told it
        self._verdict = Verdict.VERIFIED
        self._wanted: dict[int, list[int]] = {}
        self._requests: dict[int, list[int]] = {}  # by worker that wants some of this rank's pieces: a flag for each

    @property
    def wrong(self) -> dict[int, list[tuple[int, Difference]]]:
        """The workers that this rank has found wrong; see `Verifier`."""
        return self._verifier.wrong

    def pieces(self) -> Parcels:
        """Return this rank's piece for each worker outside its group, and room for the pieces that it gets."""
        place = self._members.index(self._own)
        outside = [j for j in self._others if self._group_of[j] != self._group_of[self._own]]
        arriving = [
            piece_and_sender
            for vector, members in zip(self._held, self._groups, strict=True)
            if members != self._members
            for piece_and_sender in zip(vector.tensor_split(len(members)), members, strict=True)
        ]
        return [(self._pieces_for(j)[place], j) for j in outside], arriving

    def answer(self, key: int) -> Parcels:
        """Return this rank's answers under the key of all, and room for the others'."""
        return self._answer(dict.fromkeys(self._everybody, key))

    def _answer(self, keys: Mapping[int, int]) -> Parcels:
        """Return the answers to workers that compare, under their keys, and room for those to this rank if it does."""
        self._keys = keys
        own_answers = self._answers_under(keys)
        peers = self._everybody if self._own in keys else range(0)  # with whom this rank compares
        self._answers = {j: self._numbers(2 + 2 * len(self._groups[self._group_of[j]])) for j in peers}
        parcels = self._parcels(own_answers, self._answers)
        if self._own in keys:
            self._answers[self._own] = own_answers[self._own]
        return parcels

    def prepare(self) -> None:
        """Take the digests that `compare` needs, while the answers are under way."""
        if self._own in self._keys:
            self._verifier.prepare(self._keys[self._own])

    def compare(self, *, is_last: bool = False) -> None:
        """Compare what has arrived with the answers; `is_last`: there is no other comparison after this one."""
        self._verdict, self._wanted = Verdict.VERIFIED, {}
        if self._own not in self._keys:
            return
        self._verdict, self._wanted = self._judge(self._keys[self._own], _read(self._answers))
        if self._verdict == Verdict.AGAIN and is_last:
            self._verdict, self._wanted = Verdict.FAILED, {}
        self.failed = self._verdict == Verdict.FAILED

    @property
    def is_verified(self) -> bool:
        """Return whether all that has arrived was right in the last comparison."""
        return self._verdict == Verdict.VERIFIED

    def tell(self) -> Parcels:
        """Return this rank's word to all workers, if it compares, and room for the words of those that do."""
        peers = self._everybody if self._own in self._keys else range(0)
        self._words = {j: self._numbers(2 + len(self._members)) for j in self._keys}
        return self._parcels({j: self._word(j) for j in peers}, self._words)

    def hear(self) -> bool:
        """Read the words, and return whether anybody needs something of this rank, or it of others: see `settle`."""
        self.verifiers, self._requests = set(), {}
        if self._verdict == Verdict.AGAIN:
            self.verifiers.add(self._own)
        for j, (verdict, found, *flags) in _read(self._words).items():
            if j == self._own:
                continue
            if verdict == Verdict.AGAIN:
                self.verifiers.add(j)
            elif verdict == Verdict.FAILED:
                self.failing.add(j)
            self.announcements[j] = min(max(found, 0), self._communicator.workers)
            if any(flags):
                self._requests[j] = flags
        return bool(self.verifiers or self._requests or self._wanted)

    def settle(self) -> None:
        """Send the pieces that others want, get those that this rank wants, and compare again where that is necessary.

        Each verifier now has a key that it draws alone. Other exchanges do not go on meanwhile: only some ranks are
        concerned, and the order must be the same on all.
        """
        own = self._own
        self.late = ()  # what is sent from now on is right
        if self.known == Known.LATE:
            self.known = Known.YES
        self._repair()
        # The first may ask again for what came late, and each of s others find another bad member, or the last of them.
        for repetitions in reversed(range(self._adversaries + 2)):
            if not self.verifiers:
                break
            keys = {j: self._numbers(1) for j in sorted(self.verifiers)}
            if own in keys:
                keys[own][0] = secrets.randbits(64) & LARGEST_KEY
            self._exchange(self._parcels(dict.fromkeys(self._everybody, keys[own]) if own in keys else {}, keys))
            answered = self._communicator.exchange(*self._answer({j: key for j, (key,) in _read(keys).items()}))
            self.prepare()
            answered.wait()
            self.compare(is_last=repetitions == 0)
            self._exchange(self.tell())
            self.hear()
            self._repair()
        if not self.failed:
            self._verifier.finish()

    def _repair(self) -> None:
        """Send and get the pieces that are wanted."""
        leaving = []
        for j, flags in self._requests.items():
            pieces = zip(self._pieces_for(j), flags, strict=True)
            leaving.append((torch.cat([piece for piece, flag in pieces if flag]), j))
        arriving = self._verifier.make_room(self._wanted)
        if leaving or arriving:
            self._exchange((leaving, [(values, j) for j, values in arriving.items()]))
        self._verifier.take(self._wanted, arriving)

    def _exchange(self, parcels: Parcels) -> None:
        self._communicator.exchange(*parcels).wait()

    def _parcels(self, leaving: Mapping[int, Tensor], arriving: Mapping[int, Tensor]) -> Parcels:
        """Return parcels for other workers and from them; this rank's own stay as they are."""
        return (
            [(values, j) for j, values in leaving.items() if j != self._own],
            [(values, j) for j, values in arriving.items() if j != self._own],
        )

    def _answers_under(self, keys: Mapping[int, int]) -> dict[int, Tensor]:
        """Return the answers to verifiers: their key, whether this rank has its group's vector, and all its digests."""
        alike: dict[int, list[int]] = defaultdict(list)  # verifiers to which this rank delivers the same vector
        for worker in keys:
            alike[id(self._serve(worker))].append(worker)
        answers: dict[int, Tensor] = {}
        for workers in alike.values():
            seeds = sorted({keys[worker] for worker in workers})
            digests = digests_of(self._pieces_for(workers[0]), seeds)
            known = torch.tensor([[seed, self.known] for seed in seeds], device=self._device)
            rows = dict(zip(seeds, torch.cat([known, digests], 1), strict=True))
            answers.update((worker, rows[keys[worker]]) for worker in workers)
        return answers

    def _judge(self, key: int, answers: Mapping[int, list[int]]) -> tuple[Verdict, dict[int, list[int]]]:
        """Compare this rank's copies with what the majorities of the groups say; see `Verifier.compare`."""
        undecided, digests = set(), dict[int, list[Digest] | None]()
        for j, (answered, known, *numbers) in answers.items():
            is_late = known == Known.LATE and j in self.late
            is_known = known == Known.YES or is_late
            if is_late and j != self._own:
                self._verifier.excuse(j)
            if answered != key:
                undecided.add(j)
            else:
                digests[j] = read_digests(numbers) if is_known else None
                if not is_known and j != self._own:
                    self.failing.add(j)
        return self._verifier.compare(key, digests, undecided=undecided)

    def _describes(self, worker: int) -> bool:
        """Return whether it is this rank, of its group, that asks a wrong worker for its pieces and compares them."""
        describes = self._members[worker % len(self._members)]
        if describes == worker:
            describes = self._members[(worker + 1) % len(self._members)]
        return describes == self._own

    def _word(self, worker: int) -> Tensor:
        """Return what this rank says to a worker: the verdict, how many were wrong, and the pieces that it wants."""
        flags = [0] * len(self._groups[self._group_of[worker]])
        for i in self._wanted.get(worker, ()):
            flags[i] = 1
        return torch.tensor([self._verdict, len({*self._announced, *self.wrong}), *flags], device=self._device)

    def _pieces_for(self, worker: int) -> tuple[Tensor, ...]:
        """Return the pieces of the vector that this rank's group has for a worker."""
        return self._serve(worker).tensor_split(len(self._members))

    def _numbers(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int64, device=self._device)


def _read(numbers: Mapping[int, Tensor]) -> dict[int, list[int]]:
    """Return the numbers that each worker has sent, for all of which the host waits for the device once."""
    return dict(zip(numbers, (each.tolist() for each in copy_to_host(list(numbers.values()))), strict=True))

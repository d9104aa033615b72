"""Verified delivery: every rank gets a vector from each group of ranks that have the same one, and trusts nobody."""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from draco_ext.codes import groups_by_worker
from draco_ext.protocol.communicator import Communicator, Pending
from draco_ext.protocol.differences import Difference
from draco_ext.protocol.exchange import Steps, copy_to_host, run_alone
from draco_ext.protocol.keys import Digest, commitment, join_shares, to_bytes, to_tensor
from draco_ext.protocol.verifier import Verdict, Verifier, digests_of, read_digests

_LARGEST_KEY = 2**63 - 1  # and none is negative


def more_than(adversaries: int, workers: Collection[int], groups: Sequence[Sequence[int]]) -> bool:
    """Return whether more than s members of one group are among these workers, so that one of them is honest."""
    return any(len(set(workers).intersection(members)) > adversaries for members in groups)


class Delivery:
    """The delivery of one vector of every group to this rank, and of its own group's vectors to the others.

    All members of a group have the same vector. It has as many pieces as the group has members, and each member sends
    one, if the receiver is not a member itself and has its own copy. A receiver is a verifier:

    1. Together with the pieces it gets from each rank a commitment to a share in a key, unless it has them already.
       When all have arrived, it reveals its own share to all ranks.
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

    Args:
        communicator: connects the workers.
        groups: the members of each group.
        adversaries: s.
        serve: f(worker): the vector that this rank's group has for a worker; the same tensor for the same vector.
        held: by group, the vector that is delivered to this rank. This rank's own group's is already there.
        share: this rank's share in the key, which no other rank knows; see `draw_secret`.
        commitments: all workers' commitments to their shares; default: they come with the pieces.
        is_known: whether this rank has its group's vectors; otherwise it can neither send nor vote.
        announced: workers that were found wrong before, and are announced to the others together with these.

    Attributes:
        shares: all workers' shares in the key, as they have revealed them to this rank.
        failed: whether a vector could not be verified, because more than s members of its group are wrong.
        failing: the other workers that say so, or that do not have their group's vector.
        announcements: how many workers each other worker has found wrong, as it says.
    """

    def __init__(
        self,
        communicator: Communicator,
        groups: Sequence[Sequence[int]],
        adversaries: int,
        serve: Callable[[int], Tensor],
        held: Sequence[Tensor],
        *,
        share: bytes,
        commitments: Sequence[bytes] = (),
        is_known: bool = True,
        announced: Collection[int] = (),
    ) -> None:
        self.failed = False
        self.shares: list[bytes] = []
        self.failing: set[int] = set()
        self.announcements: dict[int, int] = {}
        self._communicator = communicator
        self._groups = groups
        self._adversaries = adversaries
        self._serve = serve
        self._share = share
        self._commitments = commitments
        self._is_known = is_known
        self._announced = announced
        self._own = communicator.worker
        self._everybody = range(communicator.workers)
        self._others = [j for j in self._everybody if j != self._own]
        self._group_of = groups_by_worker(groups)
        self._members = groups[self._group_of[self._own]]  # of this rank's own group
        self._device = held[0].device
        self._held = held
        self._verifier = Verifier(self._own, groups, adversaries, held, describes=self._describes)

    @property
    def wrong(self) -> dict[int, list[tuple[int, Difference]]]:
        """The workers that this rank has found wrong; see `Verifier`."""
        return self._verifier.wrong

    def run(self) -> Steps[None]:
        """Deliver and verify."""
        place = self._members.index(self._own)
        outside = [j for j in self._others if self._group_of[j] != self._group_of[self._own]]
        leaving = [(self._pieces_for(j)[place], j) for j in outside]
        arriving = [
            piece_and_sender
            for vector, members in zip(self._held, self._groups, strict=True)
            if members != self._members
            for piece_and_sender in zip(vector.tensor_split(len(members)), members, strict=True)
        ]
        if not self._commitments:
            own = to_tensor(commitment(self._own, self._share), self._device)
            shown = [own.clone() for _ in self._everybody]
            leaving += [(own, j) for j in self._others]
            arriving += [(shown[j], j) for j in self._others]
        yield self._communicator.exchange(leaving, arriving)
        if not self._commitments:
            self._commitments = list(map(to_bytes, copy_to_host(shown)))

        key = yield from self._reveal()
        verifiers = yield from self._verify(dict.fromkeys(self._everybody, key), self._adversaries + 1)
        for repetitions in reversed(range(self._adversaries + 1)):
            if not verifiers:
                break
            # Other exchanges must not go on meanwhile: only some ranks are concerned, and the order must be the same.
            verifiers = run_alone(self._verify_alone(verifiers, repetitions))
        if not self.failed:
            self._verifier.finish()

    def _reveal(self) -> Steps[int]:
        """Reveal this rank's share, when everything has arrived that is to be verified, and return the key."""
        own = to_tensor(self._share, self._device)
        shown = [own.clone() for _ in self._everybody]
        yield self._swap(dict.fromkeys(self._everybody, own), dict(enumerate(shown)))
        self.shares = list(map(to_bytes, copy_to_host(shown)))
        seed, _ = join_shares(dict(enumerate(self.shares)), dict(enumerate(self._commitments)))
        return seed & _LARGEST_KEY

    def _verify_alone(self, verifiers: Collection[int], repetitions: int) -> Steps[set[int]]:
        """Compare again, each verifier under a key that it draws now; see `_verify`."""
        own = self._own
        keys = {j: self._numbers(1) for j in verifiers}
        if own in verifiers:
            keys[own][0] = secrets.randbits(64) & _LARGEST_KEY
        yield self._communicator.exchange(
            [(keys[own], j) for j in self._others] if own in verifiers else [],
            [(values, j) for j, values in keys.items() if j != own],
        )
        return (yield from self._verify({j: key for j, (key,) in _read(keys).items()}, repetitions))

    def _verify(self, keys: Mapping[int, int], repetitions: int) -> Steps[set[int]]:
        """Compare digests, and get what is wrong from others; return the verifiers that must go on.

        Args:
            keys: of the workers that compare.
            repetitions: how often they may do it again.
        """
        own = self._own
        peers = self._everybody if own in keys else range(0)  # with whom this rank compares
        own_answers = self._answers(keys)
        answers = {j: self._numbers(2 + 2 * len(self._groups[self._group_of[j]])) for j in peers}
        answered = self._swap(own_answers, answers)
        if own in keys:
            self._verifier.prepare(keys[own])  # while the answers are under way
        yield answered

        verdict, wanted = Verdict.VERIFIED, dict[int, list[int]]()
        if own in keys:
            answers[own] = own_answers[own]
            verdict, wanted = self._compare(keys[own], _read(answers))
            if verdict == Verdict.AGAIN and repetitions == 0:
                verdict, wanted = Verdict.FAILED, {}
            self.failed = verdict == Verdict.FAILED
        words = {j: self._numbers(2 + len(self._members)) for j in keys}
        yield self._swap({j: self._word(verdict, wanted, j) for j in peers}, words)
        again = self._send_and_get({j: word for j, word in _read(words).items() if j != own}, wanted)
        return again | ({own} if verdict == Verdict.AGAIN else set())

    def _swap(self, leaving: Mapping[int, Tensor], arriving: Mapping[int, Tensor]) -> Pending:
        """Send each worker a tensor and receive one from each, in place; this rank's own is left as it is."""
        return self._communicator.exchange(
            [(values, j) for j, values in leaving.items() if j != self._own],
            [(values, j) for j, values in arriving.items() if j != self._own],
        )

    def _answers(self, keys: Mapping[int, int]) -> dict[int, Tensor]:
        """Return the answers to verifiers: their key, whether this rank has its group's vector, and all its digests."""
        alike: dict[int, list[int]] = defaultdict(list)  # verifiers to which this rank delivers the same vector
        for worker in keys:
            alike[id(self._serve(worker))].append(worker)
        answers: dict[int, Tensor] = {}
        for workers in alike.values():
            seeds = sorted({keys[worker] for worker in workers})
            digests = digests_of(self._pieces_for(workers[0]), seeds)
            known = torch.tensor([[seed, int(self._is_known)] for seed in seeds], device=self._device)
            rows = dict(zip(seeds, torch.cat([known, digests], 1), strict=True))
            answers.update((worker, rows[keys[worker]]) for worker in workers)
        return answers

    def _compare(self, key: int, answers: Mapping[int, list[int]]) -> tuple[Verdict, dict[int, list[int]]]:
        """Compare this rank's copies with what the majorities of the groups say; see `Verifier.compare`."""
        undecided, digests = set(), dict[int, list[Digest] | None]()
        for j, (answered, known, *numbers) in answers.items():
            if answered != key:
                undecided.add(j)
            else:
                digests[j] = read_digests(numbers) if known == 1 else None
                if known != 1 and j != self._own:
                    self.failing.add(j)
        return self._verifier.compare(key, digests, undecided=undecided)

    def _describes(self, worker: int) -> bool:
        """Return whether it is this rank, of its group, that asks a wrong worker for its pieces and compares them."""
        describes = self._members[worker % len(self._members)]
        if describes == worker:
            describes = self._members[(worker + 1) % len(self._members)]
        return describes == self._own

    def _word(self, verdict: int, wanted: dict[int, list[int]], worker: int) -> Tensor:
        """Return what this rank says to a worker: the verdict, how many were wrong, and the pieces that it wants."""
        word = [0] * len(self._groups[self._group_of[worker]])
        for i in wanted.get(worker, ()):
            word[i] = 1
        return torch.tensor([verdict, len({*self._announced, *self.wrong}), *word], device=self._device)

    def _send_and_get(self, words: dict[int, list[int]], wanted: dict[int, list[int]]) -> set[int]:
        """Send the pieces that verifiers want, and get those that this rank wants; return the verifiers that go on."""
        again, leaving = set(), []
        for j, word in words.items():
            verdict, found, *flags = word
            if verdict == Verdict.AGAIN:
                again.add(j)
            elif verdict == Verdict.FAILED:
                self.failing.add(j)
            self.announcements[j] = min(max(found, 0), self._communicator.workers)
            if any(flags):
                pieces = zip(self._pieces_for(j), flags, strict=True)
                leaving.append((torch.cat([piece for piece, flag in pieces if flag]), j))
        arriving = self._verifier.make_room(wanted)
        if leaving or arriving:
            self._communicator.exchange(leaving, [(values, j) for j, values in arriving.items()]).wait()
        self._verifier.take(wanted, arriving)
        return again

    def _pieces_for(self, worker: int) -> tuple[Tensor, ...]:
        """Return the pieces of the vector that this rank's group has for a worker."""
        return self._serve(worker).tensor_split(len(self._members))

    def _numbers(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int64, device=self._device)


def _read(numbers: Mapping[int, Tensor]) -> dict[int, list[int]]:
    """Return the numbers that each worker has sent, for all of which the host waits for the device once."""
    return dict(zip(numbers, (each.tolist() for each in copy_to_host(list(numbers.values()))), strict=True))

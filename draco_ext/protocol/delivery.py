"""Verified delivery: every rank gets a vector from each group of ranks that have the same one, and trusts nobody."""

from __future__ import annotations

import secrets
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from draco_ext.protocol.communicator import Communicator
from draco_ext.protocol.differences import Difference
from draco_ext.protocol.exchange import Steps, run_alone
from draco_ext.protocol.keys import Digest
from draco_ext.protocol.verifier import Verdict, Verifier, digests_of, read_digests


def more_than(adversaries: int, workers: Collection[int], groups: Sequence[Sequence[int]]) -> bool:
    """Return whether more than s members of one group are among these workers, so that one of them is honest."""
    return any(len(set(workers).intersection(members)) > adversaries for members in groups)


class Delivery:
    """The delivery of one vector of every group to this rank, and of its own group's vectors to the others.

    All members of a group have the same vector. It has as many pieces as the group has members, and each member sends
    one, if the receiver is not a member itself and has its own copy. A receiver is a verifier:

    1. When its pieces have arrived, it draws a key and sends it to all ranks.
    2. Each answers with the digests of all pieces of its own copy under that key.
    3. Of each piece the digest that the group's majority gives is right. The verifier tells all whether its own copy
       is. If not, it also asks a member of the majority for each wrong piece.
    4. It then verifies what has come under a new key, since the sender may have chosen it to fit the old one. Of each
       piece a wrong sender is known by now, so s repetitions are enough if no more than s members are bad.

    A key is known to nobody before what it verifies has arrived, and a verifier uses no other's. So nothing has to be
    agreed on, and a rank that says different things to different ranks gains nothing. An honest member is never found
    wrong. All ranks take the same steps until the first comparison; only those concerned go on, without a pause.

    Args:
        communicator: connects the workers.
        groups: the members of each group.
        adversaries: s.
        serve: f(worker): the vector that this rank's group has for a worker; the same tensor for the same vector.
        held: by group, the vector that is delivered to this rank. This rank's own group's is already there.
        is_known: whether this rank has its group's vectors; otherwise it can neither send nor vote.
        announced: workers that were found wrong before, and are announced to the others together with these.

    Attributes:
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
        is_known: bool = True,
        announced: Collection[int] = (),
    ) -> None:
        self.failed = False
        self.failing: set[int] = set()
        self.announcements: dict[int, int] = {}
        self._communicator = communicator
        self._groups = groups
        self._adversaries = adversaries
        self._serve = serve
        self._is_known = is_known
        self._announced = announced
        self._own = communicator.worker
        self._others = [j for j in range(communicator.workers) if j != self._own]
        self._group_of = {j: g for g, members in enumerate(groups) for j in members}
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
        yield self._communicator.exchange(leaving, arriving)
        verifiers = yield from self._verify(range(self._communicator.workers), self._adversaries)
        for repetitions in reversed(range(self._adversaries)):
            if not verifiers:
                break
            # Other exchanges must not go on meanwhile: only some ranks are concerned, and the order must be the same.
            verifiers = run_alone(self._verify(verifiers, repetitions))
        if not self.failed:
            self._verifier.finish()

    def _verify(self, verifiers: Collection[int], repetitions: int) -> Steps[set[int]]:
        """Compare digests, and get what is wrong from others; return the verifiers that must go on.

        Args:
            verifiers: the workers that compare.
            repetitions: how often they may do it again.
        """
        exchange, own = self._communicator.exchange, self._own
        others = [j for j in self._others if j in verifiers]
        everybody = self._others if own in verifiers else []  # with whom this rank compares

        keys = {j: self._numbers(1) for j in verifiers}
        if own in verifiers:
            keys[own][0] = secrets.randbits(63)
        yield exchange([(keys[own], j) for j in everybody], [(keys[j], j) for j in others])

        own_answers = self._answers({j: int(key) for j, key in keys.items()})
        answers = {j: self._numbers(1 + 2 * len(self._groups[self._group_of[j]])) for j in everybody}
        yield exchange([(own_answers[j], j) for j in others], [(answers[j], j) for j in everybody])

        verdict, wanted = Verdict.VERIFIED, dict[int, list[int]]()
        if own in verifiers:
            answers[own] = own_answers[own]
            verdict, wanted = self._compare(int(keys[own]), {j: _read(answer) for j, answer in answers.items()})
            if verdict == Verdict.AGAIN and repetitions == 0:
                verdict, wanted = Verdict.FAILED, {}
            self.failed = verdict == Verdict.FAILED
        words = {j: self._numbers(2 + len(self._members)) for j in others}
        yield exchange([(self._word(verdict, wanted, j), j) for j in everybody], [(words[j], j) for j in others])
        return self._send_and_get(words, wanted) | ({own} if verdict == Verdict.AGAIN else set())

    def _answers(self, keys: dict[int, int]) -> dict[int, Tensor]:
        """Return the answers to verifiers: whether this rank has its group's vector, and digests of all its pieces."""
        alike: dict[int, list[int]] = defaultdict(list)  # verifiers to which this rank delivers the same vector
        for worker in keys:
            alike[id(self._serve(worker))].append(worker)
        answers: dict[int, Tensor] = {}
        for workers in alike.values():
            seeds = [keys[worker] for worker in workers]
            digests = digests_of(self._pieces_for(workers[0]), seeds)
            known = torch.full((len(workers), 1), int(self._is_known), device=self._device)
            answers.update(zip(workers, torch.cat([known, digests], 1), strict=True))
        return answers

    def _compare(self, key: int, answers: dict[int, list[Digest] | None]) -> tuple[Verdict, dict[int, list[int]]]:
        """Compare this rank's copies with what the majorities of the groups say; see `Verifier.compare`."""
        self.failing.update(j for j, answer in answers.items() if answer is None and j != self._own)
        return self._verifier.compare(key, answers)

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

    def _send_and_get(self, words: dict[int, Tensor], wanted: dict[int, list[int]]) -> set[int]:
        """Send the pieces that verifiers want, and get those that this rank wants; return the verifiers that go on."""
        again, leaving = set(), []
        for j, word in words.items():
            verdict, found, *flags = word.tolist()
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


def _read(answer: Tensor) -> list[Digest] | None:
    """Return the digests in an answer, or None if the rank has none to give."""
    known, *numbers = answer.tolist()
    return read_digests(numbers) if known == 1 else None

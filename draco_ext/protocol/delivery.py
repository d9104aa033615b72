"""Verified delivery: every rank gets a vector from each group of ranks that have the same one, and trusts nobody."""

from __future__ import annotations

import secrets
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor

from draco_ext import ops
from draco_ext.protocol.communicator import Communicator
from draco_ext.protocol.differences import Difference, difference
from draco_ext.protocol.exchange import Steps, run_alone
from draco_ext.protocol.keys import Digest

# What a verifier says when it has compared digests.
_VERIFIED, _AGAIN, _FAILED = range(3)


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
        wrong: the workers that this rank has found wrong. Each has the known differences between what it has sent and
            what is right, with the place in its group's vector. After a failure, those against whom most others are.
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
        self.wrong: dict[int, list[tuple[int, Difference]]] = {}
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
        # By group and number: each piece, and who has sent it.
        self._pieces = [list(vector.tensor_split(len(members))) for vector, members in zip(held, groups, strict=True)]
        self._senders = [list(members) for members in groups]
        self._senders[self._group_of[self._own]] = [self._own] * len(self._members)
        self._liars: set[int] = set()  # who has sent a piece of which it knew the right digest
        self._evidence: list[tuple[int, int, int, Tensor]] = []  # sender, group and number of a wrong piece
        self._seen: set[tuple[int, int]] = set()  # senders and numbers of those, and of those that are asked for

    def run(self) -> Steps[None]:
        """Deliver and verify."""
        place = self._members.index(self._own)
        outside = [j for j in self._others if self._group_of[j] != self._group_of[self._own]]
        leaving = [(self._pieces_for(j)[place], j) for j in outside]
        arriving = [(self._pieces[self._group_of[j]][self._groups[self._group_of[j]].index(j)], j) for j in outside]
        yield self._communicator.exchange(leaving, arriving)
        verifiers = yield from self._verify(range(self._communicator.workers), self._adversaries)
        for repetitions in reversed(range(self._adversaries)):
            if not verifiers:
                break
            # Other exchanges must not go on meanwhile: only some ranks are concerned, and the order must be the same.
            verifiers = run_alone(self._verify(verifiers, repetitions))
        self._put_together()

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

        verdict, wanted = _VERIFIED, dict[int, list[int]]()
        if own in verifiers:
            answers[own] = own_answers[own]
            verdict, wanted = self._compare(int(keys[own]), {j: _read(answer) for j, answer in answers.items()})
            if verdict == _AGAIN and repetitions == 0:
                verdict, wanted = _FAILED, {}
            self.failed = verdict == _FAILED
        words = {j: self._numbers(2 + len(self._members)) for j in others}
        yield exchange([(self._word(verdict, wanted, j), j) for j in everybody], [(words[j], j) for j in others])
        return self._send_and_get(words, wanted) | ({own} if verdict == _AGAIN else set())

    def _answers(self, keys: dict[int, int]) -> dict[int, Tensor]:
        """Return the answers to verifiers: whether this rank has its group's vector, and digests of all its pieces."""
        alike: dict[int, list[int]] = defaultdict(list)  # verifiers to which this rank delivers the same vector
        for worker in keys:
            alike[id(self._serve(worker))].append(worker)
        answers: dict[int, Tensor] = {}
        for workers in alike.values():
            seeds = [keys[worker] for worker in workers]
            digests = torch.stack([ops.digest(piece, seeds) for piece in self._pieces_for(workers[0])], 1)
            known = torch.full((len(workers), 1), int(self._is_known), device=self._device)
            answers.update(zip(workers, torch.cat([known, digests.flatten(1)], 1), strict=True))
        return answers

    def _compare(self, key: int, answers: dict[int, list[Digest] | None]) -> tuple[int, dict[int, list[int]]]:
        """Compare this rank's copies with what the majorities of the groups say.

        Returns:
            The verdict, and the numbers of the pieces that are wanted from each worker.
        """
        verdict, wanted = _VERIFIED, defaultdict[int, list[int]](list)
        self.failing.update(j for j, answer in answers.items() if answer is None and j != self._own)
        for g, members in enumerate(self._groups):
            said = {j: answer for j in members if (answer := answers[j]) is not None}
            for i, piece in enumerate(self._pieces[g]):
                digests = {j: answer[i] for j, answer in said.items()}
                right, votes = Counter(digests.values()).most_common(1)[0] if digests else ((0, 0), 0)
                if votes < len(members) - self._adversaries:
                    verdict = _FAILED
                    self.wrong.update((j, []) for j in digests if digests[j] != right and j not in self.wrong)
                    continue
                sender = self._senders[g][i]
                for j, digest in digests.items():
                    if digest != right and j != self._own:
                        self.wrong.setdefault(j, [])
                        if j != sender and (j, i) not in self._seen and self._describes(j):
                            wanted[j].append(i)
                            self._seen.add((j, i))
                known = said.get(self._own) if sender == self._own else None
                if (known[i] if known else _digest(piece, key)) == right:
                    continue
                if sender != self._own:
                    self._liars.add(sender)
                    self._evidence.append((sender, g, i, piece))
                    self._seen.add((sender, i))
                    if sender in said:
                        self.wrong.setdefault(sender, [])
                helpers = [j for j, digest in digests.items() if digest == right and j not in self._liars]
                if not helpers:
                    verdict = _FAILED
                elif verdict == _VERIFIED:
                    verdict = _AGAIN
                for helper in helpers[:1]:
                    wanted[helper].append(i)
                    self._senders[g][i] = helper
        return verdict, wanted

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
        again, leaving, arriving = set(), [], []
        for j, word in words.items():
            verdict, found, *flags = word.tolist()
            if verdict == _AGAIN:
                again.add(j)
            elif verdict == _FAILED:
                self.failing.add(j)
            self.announcements[j] = min(max(found, 0), self._communicator.workers)
            if any(flags):
                pieces = zip(self._pieces_for(j), flags, strict=True)
                leaving.append((torch.cat([piece for piece, flag in pieces if flag]), j))
        for j, numbers in wanted.items():
            own = [self._pieces[self._group_of[j]][i] for i in numbers]
            arriving.append((own[0].new_empty(sum(piece.numel() for piece in own)), j))
        if leaving or arriving:
            self._communicator.exchange(leaving, arriving).wait()
        for values, j in arriving:
            g, numbers = self._group_of[j], wanted[j]
            lengths = [self._pieces[g][i].numel() for i in numbers]
            for i, piece in zip(numbers, values.split(lengths), strict=True):
                if self._senders[g][i] == j:
                    self._pieces[g][i] = piece
                else:
                    self._evidence.append((j, g, i, piece))
        return again

    def _put_together(self) -> None:
        """Compare what was wrong with what was sent again, and write that to its place."""
        if self.failed:
            return
        for j, g, i, piece in self._evidence:
            if j in self.wrong:
                begin = sum(earlier.numel() for earlier in self._pieces[g][:i])
                self.wrong[j].append((begin, difference(piece, self._pieces[g][i])))
        for vector, pieces in zip(self._held, self._pieces, strict=True):
            for place, piece in zip(vector.tensor_split(len(pieces)), pieces, strict=True):
                if piece.data_ptr() != place.data_ptr():
                    place.copy_(piece)

    def _pieces_for(self, worker: int) -> tuple[Tensor, ...]:
        """Return the pieces of the vector that this rank's group has for a worker."""
        return self._serve(worker).tensor_split(len(self._members))

    def _numbers(self, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int64, device=self._device)


def _digest(values: Tensor, seed: int) -> Digest:
    first, second = ops.digest(values, seed).tolist()
    return first, second


def _read(answer: Tensor) -> list[Digest] | None:
    """Return the digests in an answer, or None if the rank has none to give."""
    known, *numbers = answer.tolist()
    return list(zip(numbers[::2], numbers[1::2], strict=True)) if known == 1 else None

"""Verification of vectors that arrive in pieces, by digests under a key that was unknown before they arrived."""

from __future__ import annotations

import enum
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor

from draco_ext import ops
from draco_ext.codes import groups_by_worker
from draco_ext.protocol.differences import Difference, difference
from draco_ext.protocol.keys import Digest


class Verdict(enum.IntEnum):
    """The result of a comparison of digests."""

    VERIFIED = 0
    AGAIN = 1
    FAILED = 2


def votes_needed(present: int, adversaries: int) -> int:
    """Return how many members of a group must have the same vector for it to be right: all but those that may be bad.

    It is the rule of `ops.majority_vote`. Of a group of 2s+1 with f missing, e bad members are outvoted while
    2e + f <= 2s. It is always more than half of those that are present.
    """
    return present - min(adversaries, (present - 1) // 2)


class Verifier:
    """The vectors of all groups as one rank receives them, and what it knows of those who have sent them.

    All members of a group have the same vector. It has as many pieces as the group has members, and each member sends
    one. Of its own group this rank has a copy. A comparison takes the digests that members give of all pieces of their
    own copies, under a key that was drawn when the pieces had arrived. Those that enough members give are right; see
    `votes_needed`.

    A wrong or missing piece is wanted from a member that knows its digest. It must be compared under a new key, since
    its sender may have chosen it to fit the old one. Each repetition finds another bad member, or misses another.

    Args:
        own: this rank's worker number.
        groups: the members of each group.
        adversaries: s.
        held: by group, the vector as it has arrived.
        missing: workers whose pieces have not arrived.
        describes: whether this rank asks a wrong worker for the wrong pieces of its copy, to compare them.

    Attributes:
        wrong: the workers that were found wrong. Each has the known differences between what it has sent and what is
            right, with the place in its group's vector. After a failure, those against whom most others are.
    """

    def __init__(
        self,
        own: int,
        groups: Sequence[Sequence[int]],
        adversaries: int,
        held: Sequence[Tensor],
        *,
        missing: Collection[int] = (),
        describes: Callable[[int], bool] = lambda worker: True,
    ) -> None:
        self.wrong: dict[int, list[tuple[int, Difference]]] = {}
        self._own = own
        self._groups = groups
        self._group_of = groups_by_worker(groups)
        self._adversaries = adversaries
        self._describes = describes
        self._held = held
        # By group and number: each piece, and who has sent it; None: it has not arrived.
        self._pieces = [list(vector.tensor_split(len(members))) for vector, members in zip(held, groups, strict=True)]
        self._senders: list[list[int | None]] = [[None if j in missing else j for j in members] for members in groups]
        self._senders[self._group_of[own]] = [own] * len(groups[self._group_of[own]])
        self._key = -1  # of the digests; no key is negative
        self._digests: dict[tuple[int, int], Digest] = {}  # by group and number, of pieces that others have sent
        self._unverified = [set(range(len(members))) for members in groups]
        self._evidence: list[tuple[int, int, int, Tensor]] = []  # sender, group and number of a wrong piece
        self._excused: set[tuple[int, int]] = set()  # groups and numbers of pieces for which nobody is found wrong
        self._unable: set[int] = set()  # workers that have said that they do not know what is right
        self._silent: set[int] = set()  # wrong workers that have not sent what they were asked for
        self._seen: set[tuple[int, int]] = set()  # senders and numbers of those, and of those that are asked for

    @property
    def unverified(self) -> list[int]:
        """The groups whose vectors are not verified yet."""
        return [g for g, numbers in enumerate(self._unverified) if numbers]

    def prepare(self, key: int) -> None:
        """Take the digests of what has arrived, while the members' answers are under way; `compare` does it otherwise.

        Args:
            key: drawn after everything had arrived.
        """
        self._key = key
        arrived = {
            (g, i): ops.digest(self._pieces[g][i], key)
            for g in self.unverified
            for i in self._unverified[g]
            if self._senders[g][i] not in (None, self._own)
        }
        # The host waits for the device once, not once for each.
        numbers = torch.stack(list(arrived.values())).tolist() if arrived else []
        self._digests = {place: (first, second) for place, (first, second) in zip(arrived, numbers, strict=True)}

    def compare(
        self,
        key: int,
        answers: Mapping[int, Sequence[Digest] | None],
        missing: Collection[int] = (),
        undecided: Collection[int] = (),
    ) -> tuple[Verdict, dict[int, list[int]]]:
        """Compare what has arrived with what the majorities of the groups say.

        Args:
            key: see `prepare`.
            answers: the digests under it of all pieces of each worker's own copy, or None from one that has none.
            missing: the workers that count as missing.
            undecided: the workers that have answered under another key. Their answers are not judged; where too few
                others agree without them, the comparison has to be made again.

        Returns:
            The verdict, and the numbers of the pieces that are wanted from each worker.
        """
        if key != self._key:
            self.prepare(key)
        verdict, wanted = Verdict.VERIFIED, defaultdict[int, list[int]](list)
        for g in self.unverified:
            members = self._groups[g]
            said = {j: tuple(answer) for j in members if (answer := answers.get(j)) is not None}
            needed = votes_needed(sum(j not in missing for j in members), self._adversaries)
            ballots = Counter(digests for j, digests in said.items() if j not in self.wrong)
            right, votes = ballots.most_common(1)[0] if ballots else ((), 0)
            if votes < needed and any(j in undecided for j in members):
                verdict = max(verdict, Verdict.AGAIN)
                continue
            if votes < needed:
                verdict = Verdict.FAILED
                self._blame_minority(said)
                continue
            for j, digests in said.items():
                self._judge(g, j, digests, right, wanted)
            self._unable.update(j for j in members if answers.get(j, ()) is None)
            helpers = [j for j, digests in said.items() if digests == right and j not in self._unable]
            for i in sorted(self._unverified[g]):
                if self._is_right(g, i, said, undecided, right[i]):
                    self._unverified[g].remove(i)
                    continue
                helper = next((j for j in helpers if j not in self.wrong), None)
                self._senders[g][i] = helper
                if helper is None:
                    verdict = Verdict.FAILED
                    continue
                verdict = max(verdict, Verdict.AGAIN)
                wanted[helper].append(i)
        return verdict, wanted

    def excuse(self, worker: int) -> None:
        """Do not find a worker wrong for the pieces that it has sent so far."""
        for g, senders in enumerate(self._senders):
            self._excused.update((g, i) for i, sender in enumerate(senders) if sender == worker)

    def make_room(self, wanted: Mapping[int, Sequence[int]]) -> dict[int, Tensor]:
        """Return a tensor for the pieces that are wanted from each worker, joined."""
        lengths = {j: sum(self._pieces[self._group_of[j]][i].numel() for i in wanted[j]) for j in wanted}
        return {j: self._held[self._group_of[j]].new_empty(length) for j, length in lengths.items()}

    def take(self, wanted: Mapping[int, Sequence[int]], arrived: Mapping[int, Tensor]) -> None:
        """Take the wanted pieces that have arrived, joined, from each worker; others are missing."""
        for j, numbers in wanted.items():
            g = self._group_of[j]
            values = arrived.get(j)
            pieces = None if values is None else values.split([self._pieces[g][i].numel() for i in numbers])
            for at, i in enumerate(numbers):
                is_repair = self._senders[g][i] == j
                if pieces is None and is_repair:
                    self._senders[g][i] = None
                elif pieces is None:
                    self._silent.add(j)
                elif is_repair:
                    self._pieces[g][i] = pieces[at]
                else:
                    self._evidence.append((j, g, i, pieces[at]))

    def finish(self) -> None:
        """Compare what was wrong with what is right, and write what was sent again to its place."""
        for j, g, i, piece in self._evidence:
            if j in self.wrong and j not in self._silent:
                begin = sum(earlier.numel() for earlier in self._pieces[g][:i])
                self.wrong[j].append((begin, difference(piece, self._pieces[g][i])))
        for vector, pieces in zip(self._held, self._pieces, strict=True):
            for place, piece in zip(vector.tensor_split(len(pieces)), pieces, strict=True):
                if piece.data_ptr() != place.data_ptr():
                    place.copy_(piece)

    def _judge(
        self, g: int, worker: int, digests: Sequence[Digest], right: Sequence[Digest], wanted: dict[int, list[int]]
    ) -> None:
        """Find a worker wrong if its digests are, and ask for the pieces of its copy that are."""
        for i, (digest, right_one) in enumerate(zip(digests, right, strict=True)):
            if digest == right_one:
                continue
            self.wrong.setdefault(worker, [])
            if worker != self._senders[g][i] and (worker, i) not in self._seen and self._describes(worker):
                wanted[worker].append(i)
                self._seen.add((worker, i))

    def _is_right(
        self, g: int, i: int, said: Mapping[int, Sequence[Digest]], undecided: Collection[int], right: Digest
    ) -> bool:
        """Return whether a piece is right; if not, keep it as evidence against its sender."""
        sender, piece = self._senders[g][i], self._pieces[g][i]
        if sender is None:
            return False
        if sender == self._own:
            known = said.get(sender)
            digest = known[i] if known else digest_of(piece, self._key)
        else:
            digest = self._digests[g, i]
        if digest == right:
            return True
        if (g, i) in self._excused:
            self._excused.remove((g, i))  # it is asked for again
            return False
        self._evidence.append((sender, g, i, piece))
        self._seen.add((sender, i))
        if sender in said or sender in undecided:  # and not who says that it does not know what is right
            self.wrong.setdefault(sender, [])
        return False

    def _blame_minority(self, said: Mapping[int, Sequence[Digest]]) -> None:
        """Find those wrong that differ from more than half in a piece; all, where so many do not agree."""
        for digests in zip(*said.values(), strict=True):
            right, votes = Counter(digests).most_common(1)[0]
            for j, digest in zip(said, digests, strict=True):
                if digest != right or 2 * votes <= len(said):
                    self.wrong.setdefault(j, [])


def digest_of(values: Tensor, key: int) -> Digest:
    """Return the digest of one piece."""
    first, second = ops.digest(values, key).tolist()
    return first, second


def digests_of(pieces: Sequence[Tensor], keys: Sequence[int]) -> Tensor:
    """Return the digests of all pieces in one row for each key; `read_digests` reads a row."""
    return torch.stack([ops.digest(piece, keys) for piece in pieces], 1).flatten(1)


def read_digests(numbers: Sequence[int]) -> list[Digest]:
    """Return the digests in a row of numbers."""
    return list(zip(numbers[::2], numbers[1::2], strict=True))

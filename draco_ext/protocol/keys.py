"""Keys and seeds that nobody can know or choose before the messages are final, and rounds of digests under them."""

from __future__ import annotations

import hashlib
import itertools
import secrets

import torch
from torch import Tensor

from draco_ext import ops
from draco_ext.protocol.communicator import Communicator, Pending
from draco_ext.protocol.exchange import Steps, Turn

KEY_BITS = 55  # of a rank's share: the sum of 255 fits into an int64
SHARE_BYTES = 32  # of a rank's share in a seed that is drawn by commit and reveal

Digest = tuple[int, int]


def draw_share(device: torch.device) -> Tensor:
    """Draw this rank's share (1,) in a key, which is the sum of all. Not to be sent before the message is final.

    From the operating system: torch's generators are seeded, the same on many ranks.
    """
    return torch.tensor([secrets.randbits(KEY_BITS)], device=device)


def draw_key(communicator: Communicator, device: torch.device) -> Pending:
    """Draw a key (1,), which nobody knows before everybody has called this; see `draw_share`."""
    return communicator.all_reduce(draw_share(device), resume_on_next_bucket=True)


class SharedSeed:
    """A seed that is the same on all ranks and that no rank can choose, drawn by commit and reveal.

    Each rank draws a share, and commits itself to it by a hash that also names its worker, so that a copied commitment
    cannot be opened. It reveals the share when all commitments and messages are in. The seed is a hash of all shares.
    Connections of its own: a share does not queue up behind the next messages.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator.split([range(communicator.workers)])

    def commit(self, device: torch.device) -> tuple[bytes, Pending]:
        """Draw a share. Return it with everybody's commitments, which are on their way."""
        share = secrets.token_bytes(SHARE_BYTES)
        return share, self._all_gather(_commitment(self._communicator.worker, share), device)

    def reveal(self, share: bytes, commitments: Pending) -> tuple[int, list[int]]:
        """Open the commitments. To be called when all messages are in.

        Returns:
            The seed, and the workers whose share does not fit their commitment. It is left out.
        """
        rows = commitments.wait()
        committed, shares = _texts(rows), _texts(self._all_gather(share, rows.device).wait())
        fits = [_commitment(j, share) == committed[j] for j, share in enumerate(shares)]
        digest = hashlib.sha256(b"".join(itertools.compress(shares, fits))).digest()
        return int.from_bytes(digest[:8], "big", signed=True), [j for j, fit in enumerate(fits) if not fit]

    def _all_gather(self, text: bytes, device: torch.device) -> Pending:
        # What is cut off on its way ends with zeros on all ranks.
        rows = torch.zeros(self._communicator.workers, len(text), dtype=torch.uint8, device=device)
        return self._communicator.all_gather_p2p(torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device), rows)


def _commitment(worker: int, share: bytes) -> bytes:
    return hashlib.sha256(worker.to_bytes(4, "big") + share).digest()


def _texts(rows: Tensor) -> list[bytes]:
    return [bytes(row) for row in rows.tolist()]


class DigestRounds:
    """Gathers digests of all workers' messages, each under a key that nobody knew before the messages were final.

    Every collective, however small, is a round in which all ranks wait. So each buffer costs one, not two: the first of
    a step waits for the second, draws a key for both, and gathers the digests of both; with them go the shares in the
    key of the buffer that has begun meanwhile, and so on.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self.abort()

    def abort(self) -> None:
        """Forget the messages of a step that is aborted."""
        self._undigested: list[tuple[int, Tensor]] = []  # messages in order, by number
        self._key = self._with_key = 0  # and how many messages have shares in it
        self._digests: dict[int, list[Digest]] = {}

    def gather(self, values: Tensor, number: int) -> Steps[list[Digest]]:
        """Return the digests of all workers' messages.

        Args:
            values: this rank's message, final.
            number: of the exchange, the same on all ranks.
        """
        self._undigested.append((number, values))
        yield Turn.EARLIER_EXCHANGES_FIRST
        while number not in self._digests:
            if self._undigested[0][0] != number:
                yield Turn.EARLIER_EXCHANGES_FIRST  # the foremost acts for all
                continue
            if self._with_key == 0:
                covered = len(self._undigested)
                self._key = int((yield draw_key(self._communicator, values.device)))
                self._with_key = covered
            batch = self._undigested[: self._with_key]
            behind = len(self._undigested) - len(batch)  # whose shares go with this
            own = [ops.digest(message, (self._key + i) % 2**63) for i, (_, message) in enumerate(batch)]
            rows = yield self._communicator.all_gather(torch.cat([*own, draw_share(values.device)]))
            *columns, shares = rows.T.tolist()
            for i, (other, _) in enumerate(batch):
                self._digests[other] = list(zip(columns[2 * i], columns[2 * i + 1], strict=True))
            del self._undigested[: len(batch)]
            self._key, self._with_key = sum(shares) % 2**63, behind
        return self._digests.pop(number)

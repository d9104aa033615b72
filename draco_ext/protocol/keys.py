"""Keys and seeds that no rank can know or choose before the messages are final."""

from __future__ import annotations

import hashlib
import itertools
import secrets

import torch
from torch import Tensor

from draco_ext.protocol.communicator import Communicator, Pending

KEY_BITS = 55  # bits of a rank's share in a key: the sum of 255 shares fits into an int64
SHARE_BYTES = 32  # bytes of a rank's share in a seed drawn by commit and reveal

Digest = tuple[int, int]


def draw_share(device: torch.device) -> Tensor:
    """Draw this rank's share (1,) in a key; the key is the sum of all ranks' shares.

    The share must not be sent before the message is final. It comes from the operating system, since torch's
    generators have the same seed on many ranks.
    """
    return torch.tensor([secrets.randbits(KEY_BITS)], device=device)


def draw_key(communicator: Communicator, device: torch.device) -> Pending:
    """Draw a key (1,) that no rank knows before all ranks have called this; see `draw_share`."""
    return communicator.all_reduce(draw_share(device), resume_on_next_bucket=True)


class SharedSeed:
    """A seed that is the same on all ranks and that no rank can choose, drawn by commit and reveal.

    Each rank draws a share and commits to it by a hash that also contains its worker number, so that a copied
    commitment cannot be opened. It reveals the share when all commitments and messages have arrived. The seed is a hash
    of all shares. It has connections of its own, so that a share does not wait behind the next messages.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator.split([range(communicator.workers)])

    def commit(self, device: torch.device) -> tuple[bytes, Pending]:
        """Draw a share and start to gather the commitments; return both."""
        share = secrets.token_bytes(SHARE_BYTES)
        return share, self._all_gather(_commitment(self._communicator.worker, share), device)

    def reveal(self, share: bytes, commitments: Pending) -> tuple[int, list[int]]:
        """Open the commitments, after all messages have arrived.

        Returns:
            The seed, and the workers whose share does not match their commitment. The seed does not contain those
            shares.
        """
        rows = commitments.wait()
        committed, shares = _texts(rows), _texts(self._all_gather(share, rows.device).wait())
        fits = [_commitment(j, share) == committed[j] for j, share in enumerate(shares)]
        digest = hashlib.sha256(b"".join(itertools.compress(shares, fits))).digest()
        return int.from_bytes(digest[:8], "big", signed=True), [j for j, fit in enumerate(fits) if not fit]

    def _all_gather(self, text: bytes, device: torch.device) -> Pending:
        # A share that was truncated on the way ends with zeros on all ranks.
        rows = torch.zeros(self._communicator.workers, len(text), dtype=torch.uint8, device=device)
        return self._communicator.all_gather_p2p(torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device), rows)


def _commitment(worker: int, share: bytes) -> bytes:
    return hashlib.sha256(worker.to_bytes(4, "big") + share).digest()


def _texts(rows: Tensor) -> list[bytes]:
    return [bytes(row) for row in rows.tolist()]

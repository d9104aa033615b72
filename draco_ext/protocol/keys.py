"""Keys and seeds that no rank can know or choose before the messages are final."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping

import torch
from torch import Tensor

from draco_ext.protocol.communicator import Communicator, Parcels, Pending, parcels_for_all
from draco_ext.protocol.exchange import Gather, copy_to_host

KEY_BITS = 55  # bits of a rank's share in a key: the sum of 255 shares fits into an int64
LARGEST_KEY = 2**63 - 1  # of a digest, and none is negative
SHARE_BYTES = 32  # bytes of a rank's share in a seed drawn by commit and reveal

Digest = tuple[int, int]


def draw_share(device: torch.device) -> Tensor:
    """Draw this rank's share (1,) in a key; the key is the sum of all ranks' shares.

    The share must not be sent before the message is final. It comes from the operating system, since torch's
    generators have the same seed on many ranks.
    """
    return torch.tensor([secrets.randbits(KEY_BITS)], device=device)


def draw_key(communicator: Communicator, device: torch.device) -> Gather:
    """Draw a share in a key that no rank knows before all have drawn theirs; `key_of` makes the key of all shares."""
    return Gather(communicator, draw_share(device))


def key_of(shares: Tensor) -> Tensor:
    """Return the key (1,) that the shares (workers, 1) make; see `draw_share`."""
    return shares.sum(0)


def draw_secret() -> bytes:
    """Draw this rank's share in a seed drawn by commit and reveal, from the operating system.

    Each rank commits to its share by a hash that also contains its worker number, so that a copied commitment cannot be
    opened. It reveals the share when all commitments and messages have arrived. The seed is a hash of all shares, so
    no rank can choose it, or know it before all have revealed theirs.
    """
    return secrets.token_bytes(SHARE_BYTES)


def commitment(worker: int, share: bytes) -> bytes:
    """Return the commitment to a worker's share, of `SHARE_BYTES`; see `draw_secret`."""
    return hashlib.sha256(worker.to_bytes(4, "big") + share).digest()


def join_shares(shares: Mapping[int, bytes], commitments: Mapping[int, bytes]) -> tuple[int, list[int]]:
    """Return the seed that all workers' shares make, 64 bits, and the workers whose share is another than they said.

    The seed does not contain those shares. Ranks with other shares or commitments have another seed.
    """
    fits = [j for j in sorted(shares) if commitment(j, shares[j]) == commitments[j]]
    digest = hashlib.sha256(b"".join(j.to_bytes(4, "big") + shares[j] for j in fits)).digest()
    return int.from_bytes(digest[:8], "big", signed=True), [j for j in sorted(shares) if j not in fits]


def to_tensor(text: bytes, device: torch.device) -> Tensor:
    """Return a share or commitment as a tensor (SHARE_BYTES,) uint8."""
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)


def to_bytes(values: Tensor) -> bytes:
    """Return the share or commitment in a tensor."""
    return bytes(values.tolist())


class ChainedKeys:
    """Keys that no rank can choose, or know before all have revealed their shares in them; see `draw_secret`.

    A share in a key is the commitment to the share in the next one, so a reveal takes one message.

    Args:
        communicator: connects the workers.
        count: the number of keys.
        device: the device of what is sent.
    """

    def __init__(self, communicator: Communicator, count: int, device: torch.device) -> None:
        self._own = communicator.worker
        self._workers = communicator.workers
        self._device = device
        self._chain = [draw_secret()]  # the last one first
        for _ in range(count):
            self._chain.append(commitment(self._own, self._chain[-1]))
        self._shown: list[Tensor] = []
        self._commitments: list[bytes] = []

    def show(self) -> Parcels:
        """Return the commitment, and then share after share, as they are sent to all workers, and room for the others'.

        A share is sent when everything has arrived that is digested under its key.
        """
        own = to_tensor(self._chain.pop(), self._device)
        self._shown = [own.clone() for _ in range(self._workers)]
        return parcels_for_all(self._own, own, self._shown)

    def read(self) -> int:
        """Read what has arrived; return the key that the shares make. Commitments make none: 0."""
        shares = list(map(to_bytes, copy_to_host(self._shown)))
        commitments, self._commitments = self._commitments, shares
        if not commitments:
            return 0
        seed, _ = join_shares(dict(enumerate(shares)), dict(enumerate(commitments)))
        return seed & LARGEST_KEY


class SharedSeed:
    """A seed that is the same on all ranks and that no rank can choose; see `draw_secret`.

    It has connections of its own, so that a share does not wait behind the next messages.
    """

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator.split([range(communicator.workers)])

    def commit(self, device: torch.device) -> tuple[bytes, Pending]:
        """Draw a share and start to gather the commitments; return both."""
        share = draw_secret()
        return share, self._all_gather(commitment(self._communicator.worker, share), device)

    def reveal(self, share: bytes, commitments: Pending) -> tuple[int, list[int]]:
        """Open the commitments, after all messages have arrived.

        Returns:
            The seed, and the workers whose share does not match their commitment. The seed does not contain those
            shares.
        """
        rows = commitments.wait()
        shares = self._all_gather(share, rows.device).wait()
        return join_shares(_texts(shares), _texts(rows))

    def _all_gather(self, text: bytes, device: torch.device) -> Pending:
        # A share that was truncated on the way ends with zeros on all ranks.
        rows = torch.zeros(self._communicator.workers, len(text), dtype=torch.uint8, device=device)
        return self._communicator.all_gather_p2p(to_tensor(text, device), rows)


def _texts(rows: Tensor) -> dict[int, bytes]:
    return {j: to_bytes(row) for j, row in enumerate(rows)}

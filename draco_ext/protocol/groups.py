"""Functions that torch.distributed lacks: new groups within a group, and all-gather of small values without pickle."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

MOST_BYTES = 2**16  # the limit for one rank's JSON


def gather(values: Tensor, group: dist.ProcessGroup, device: torch.device) -> Tensor:
    """Return all ranks' values on the CPU, row r from rank r; `device` is the one that the group communicates on."""
    rows = [torch.empty_like(values, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, values.to(device), group=group)
    return torch.stack(rows).cpu()


def gather_json(
    value: Any, group: dist.ProcessGroup, device: torch.device, *, most_bytes: int = MOST_BYTES
) -> list[Any]:
    """Return all ranks' values, by rank, sent as JSON, which unlike pickle cannot execute what a peer sends.

    Raises:
        ValueError: a rank's value is longer than `most_bytes`, or is not JSON; the message names the rank.
    """
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = gather(torch.tensor([len(text)]), group, device).flatten().tolist()
    for rank, length in enumerate(lengths):  # before memory is allocated for them
        if not 0 < length <= most_bytes:
            raise ValueError(f"ranks must send from 1 to {most_bytes} bytes, got {length} from rank {rank}")
    padded = torch.zeros(max(lengths), dtype=torch.uint8)
    padded[: len(text)] = text
    values = []
    for rank, (row, length) in enumerate(zip(gather(padded, group, device), lengths, strict=True)):
        try:
            values.append(json.loads(bytes(row[:length].tolist())))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"ranks must send JSON, got something else from rank {rank}: {error}") from None
    return values


def is_world(group: dist.ProcessGroup) -> bool:
    """Return whether all ranks of the job are in the group."""
    return dist.get_world_size(group) == dist.get_world_size()


def membership(group: dist.ProcessGroup) -> int:
    """Return a value that must be the same on all ranks of a group before `divide`.

    New groups of all ranks are numbered by torch. New groups within a group are named after the number of groups that
    a rank is in; ranks with different numbers would wait for each other without end.
    """
    return 0 if is_world(group) else len(dist.distributed_c10d._world.pg_names)


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    """Return the group's timeout, for which torch has no public name."""
    return group._get_backend(group._device_types[0]).options._timeout


def divide(
    group: dist.ProcessGroup,
    parts: Sequence[Sequence[int]],
    *,
    backend: str | None = None,
    timeout: timedelta | None = None,
) -> dist.ProcessGroup:
    """Divide a group into new ones. All its ranks must call it.

    Args:
        group: the group.
        parts: the ranks (within the group) of each part; every rank is in exactly one.
        backend: the new groups' backend; default: the group's.
        timeout: the new groups' timeout; default: the group's.

    Returns:
        The new group that contains this rank.
    """
    world = dist.get_process_group_ranks(group)
    own = dist.get_rank()
    new: dist.ProcessGroup | None = None
    for part in parts:
        ranks = sorted(world[rank] for rank in part)
        if own in ranks or is_world(group):
            made = dist.new_group(
                ranks,
                timeout=timeout or timeout_of(group),
                backend=backend or dist.get_backend_config(group),
                use_local_synchronization=not is_world(group),
            )
            if own in ranks:
                new = made
    assert new is not None
    return new


class Rendezvous:
    """A meeting point with a timeout, where ranks wait for each other before they begin a collective.

    If one rank began the collective alone, it would be matched with the next collective of the others. With a
    rendezvous it gets an error instead. All ranks of the group must create it.
    """

    _made: ClassVar[dict[str, int]] = {}  # how many were made, by group

    def __init__(self, group: dist.ProcessGroup) -> None:
        number = Rendezvous._made[group.group_name] = Rendezvous._made.get(group.group_name, -1) + 1
        self._name = f"draco_ext/{group.group_name}/{number}"
        self._rank = dist.get_rank(group)
        self._calls = 0

    def wait(self, ranks: Sequence[int], timeout: float, topic: str = "") -> list[int]:
        """Wait for these ranks, at most `timeout` seconds.

        Args:
            ranks: the ranks.
            timeout: seconds.
            topic: what they meet for; ranks that come for another one have not arrived.

        Returns:
            The ranks that have not arrived.
        """
        store = dist.distributed_c10d._get_default_store()
        until = time.monotonic() + timeout
        while True:
            name = f"{self._name}/{self._calls}/{topic}"
            self._calls += 1
            store.set(f"{name}/{self._rank}", "here")
            absent = []
            try:
                left = max(until - time.monotonic(), 0.001)
                store.wait([f"{name}/{rank}" for rank in ranks], timedelta(seconds=left))
            except dist.DistStoreError:
                absent = [rank for rank in ranks if not store.check([f"{name}/{rank}"])]
            # A rank that arrives at the last moment and one that gives up then must get the same answer.
            if store.compare_set(f"{name}/all", "", "no" if absent else "yes") == b"yes":
                return []
            if absent:
                return absent
            # Another rank has given up this call before; it will take part in the next one.

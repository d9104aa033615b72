"""What torch.distributed has not: new groups of a group's ranks, and an exchange of small values without pickle."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

MOST_BYTES = 2**16  # of one rank's JSON


def gather(values: Tensor, group: dist.ProcessGroup, device: torch.device) -> Tensor:
    """Everybody's values, by rank, on the CPU; the group talks on that device."""
    rows = [torch.empty_like(values, device=device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(rows, values.to(device), group=group)
    return torch.stack(rows).cpu()


def gather_json(value: Any, group: dist.ProcessGroup, device: torch.device) -> list[Any]:
    """Everybody's value, by rank, sent as JSON: what comes from a peer is read, never executed as a pickle would be.

    Raises:
        ValueError: a rank's is longer than `MOST_BYTES`, or is not JSON; the message names it.
    """
    text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    lengths = gather(torch.tensor([len(text)]), group, device).flatten().tolist()
    for rank, length in enumerate(lengths):  # before there is room made for so many
        if not 0 < length <= MOST_BYTES:
            raise ValueError(f"ranks must send from 1 to {MOST_BYTES} bytes, got {length} from rank {rank}")
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
    """Whether all ranks of the job are in the group."""
    return dist.get_world_size(group) == dist.get_world_size()


def membership(group: dist.ProcessGroup) -> int:
    """What must be the same on all ranks of a group before `divide`.

    In the world torch numbers new groups. Within a group it names them after the number of groups that a rank is in,
    and ranks that disagree about it would wait for each other.
    """
    return 0 if is_world(group) else len(dist.distributed_c10d._world.pg_names)


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    """How long the group waits for a rank. Torch has no public name for it."""
    return group._get_backend(group._device_types[0]).options._timeout


def divide(
    group: dist.ProcessGroup,
    parts: Sequence[Sequence[int]],
    *,
    backend: str | None = None,
    timeout: timedelta | None = None,
) -> dist.ProcessGroup:
    """Divides a group into new ones. To be called on all its ranks.

    Args:
        group: the group.
        parts: ranks within the group, every one of them in just one part.
        backend: of the new groups; default: the group's.
        timeout: of the new groups; default: the group's.

    Returns:
        The new group that this rank is in.
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
    """Waits until all ranks of a group have come to the same call, before they begin a collective one.

    A rank that begins one alone would be answered by whatever the others begin next. Here it gets an error instead.
    Made on all ranks of the group alike.
    """

    _made: ClassVar[dict[str, int]] = {}  # by group

    def __init__(self, group: dist.ProcessGroup) -> None:
        number = Rendezvous._made[group.group_name] = Rendezvous._made.get(group.group_name, -1) + 1
        self._name = f"draco_ext/{group.group_name}/{number}"
        self._rank = dist.get_rank(group)
        self._calls = 0

    def wait(self, ranks: Sequence[int], timeout: float) -> list[int]:
        """Wait for these ranks, for so many seconds.

        Returns:
            The ranks that have not come.
        """
        store = dist.distributed_c10d._get_default_store()
        until = time.monotonic() + timeout
        while True:
            name = f"{self._name}/{self._calls}"
            self._calls += 1
            store.set(f"{name}/{self._rank}", "here")
            absent = []
            try:
                left = max(until - time.monotonic(), 0.001)
                store.wait([f"{name}/{rank}" for rank in ranks], timedelta(seconds=left))
            except dist.DistStoreError:
                absent = [rank for rank in ranks if not store.check([f"{name}/{rank}"])]
            # Who comes at the last moment and who leaves then must not part.
            if store.compare_set(f"{name}/all", "", "no" if absent else "yes") == b"yes":
                return []
            if absent:
                return absent
            # Another rank has given this call up before: it will come to the next one.

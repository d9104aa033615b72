"""New process groups of the ranks of another one."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist


def is_world(group: dist.ProcessGroup) -> bool:
    """Whether all ranks of the job are in the group."""
    return dist.get_world_size(group) == dist.get_world_size()


def membership(group: dist.ProcessGroup) -> int:
    """What must be the same on all ranks of a group before `divide`.

    In the world torch numbers new groups. Within a group it names them after the number of groups that a rank is in,
    and ranks that disagree about it would wait for each other.
    """
    return 0 if is_world(group) else len(dist.distributed_c10d._world.pg_names)


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
        timeout: of the new groups; default: torch's.

    Returns:
        The new group that this rank is in.
    """
    world = dist.get_process_group_ranks(group)
    own = dist.get_rank()
    new = None
    for part in parts:
        ranks = sorted(world[rank] for rank in part)
        if own in ranks or is_world(group):
            made = dist.new_group(
                ranks,
                timeout=timeout,
                backend=backend or dist.get_backend_config(group),
                use_local_synchronization=not is_world(group),
            )
            new = made if own in ranks else new
    return new

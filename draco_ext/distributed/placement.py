"""Which worker of a code each rank is: such that those who compute the same part stand on different hosts."""

from __future__ import annotations

import os

from draco_ext import ops
from draco_ext.codes import Code, RepetitionCode


def ranks_per_host(code: Code) -> int:
    """As torchrun says, where it started this process among ``code.workers``; otherwise all on one host.

    torchrun numbers the ranks host by host; hosts with different numbers of ranks count as one host.
    """
    try:
        world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    except (KeyError, ValueError):
        return code.workers
    return local if world == code.workers and local > 0 and world % local == 0 else code.workers


def worker_of(rank: int, code: Code, ranks_on_host: int) -> int:
    """The worker that a rank is.

    Faults on one host come together. A repetition code's groups are consecutive workers, so those are dealt to the
    hosts in turn. The holders of a part in a cyclic code stand evenly spread over all workers, so the ranks of a host,
    which are consecutive, stay so.

    Args:
        rank: from 0 to ``code.workers - 1``; rank // ranks_on_host is its host.
        code: the code.
        ranks_on_host: how many ranks every host has; divides ``code.workers``.

    Returns:
        A permutation of the ranks.
    """
    ops.check_int("rank", rank, 0, code.workers - 1)
    ops.check_int("ranks_per_host", ranks_on_host, 1, code.workers)
    if code.workers % ranks_on_host:
        raise ValueError(f"ranks_per_host must divide the {code.workers} workers, got {ranks_on_host}")
    if not isinstance(code, RepetitionCode):
        return rank
    host, local = divmod(rank, ranks_on_host)
    return local * (code.workers // ranks_on_host) + host

"""The assignment of ranks to the workers of a code; replicas of a part are placed on different hosts."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Sequence
from datetime import timedelta

import numpy as np
import torch.distributed as dist

from draco_ext import _checks
from draco_ext.codes import Code

TIMEOUT = timedelta(minutes=5)  # of the wait for other ranks' host names
LONGEST_NAME = 255
MOST_STRIDES = 1024  # arrangements on the circle that are tried
MOST_IMPROVED = 64  # arrangements of at most so many workers are then improved by swaps


def place_ranks(code: Code, ranks_per_host: int | Sequence[int] | None = None) -> tuple[int, ...]:
    """Return the worker number of each rank; the result is the same on all ranks.

    Args:
        code: the code.
        ranks_per_host: the number of ranks on every host, or a list with one number for each host; ranks are numbered
            host by host. None: find the hosts by `find_hosts`.

    Returns:
        A permutation of the ranks.

    Raises:
        TypeError, ValueError: ``ranks_per_host`` is not a division of the ranks.
        RuntimeError: a rank has not announced its host.
    """
    return arrange(code, find_hosts(code) if ranks_per_host is None else _hosts_by_size(code, ranks_per_host))


def _hosts_by_size(code: Code, ranks_per_host: int | Sequence[int]) -> tuple[str, ...]:
    n = code.workers
    if isinstance(ranks_per_host, (list, tuple)):
        for size in ranks_per_host:
            _checks.check_int("ranks_per_host", size, 1, n)
        if sum(ranks_per_host) != n:
            raise ValueError(f"ranks_per_host must add up to the {n} workers, got {list(ranks_per_host)}")
        sizes = list(ranks_per_host)
    else:
        size = _checks.check_int("ranks_per_host", ranks_per_host, 1, n)
        if n % size:
            raise ValueError(f"ranks_per_host must divide the {n} workers, got {size}; or be a list")
        sizes = [size] * (n // size)
    return tuple(str(host) for host, size in enumerate(sizes) for _ in range(size))


def find_hosts(code: Code) -> tuple[str, ...]:
    """Return the name of each rank's host.

    If torch.distributed has a process group of ``code.workers`` ranks, they exchange their hosts' names through its
    store. This is not a collective: a rank waits until the others have made their samplers or called protect.
    Otherwise, if torchrun has started ``code.workers`` processes, its environment variables give the number of ranks on
    each host; hosts with different numbers count as one. Otherwise all ranks are on one host.

    Raises:
        RuntimeError: a rank has not announced its host in time, or has sent something that is not a name.
    """
    store = announce_host(code)
    if store is not None:
        return read_names(store, code.workers)
    try:
        world, local = int(os.environ["WORLD_SIZE"]), int(os.environ["LOCAL_WORLD_SIZE"])
    except (KeyError, ValueError):
        world = local = code.workers
    if world != code.workers or local < 1 or world % local:
        local = code.workers
    return _hosts_by_size(code, local)


def announce_host(code: Code) -> dist.distributed_c10d.Store | None:
    """Write the name of this rank's host to torch.distributed's store; return the store, or None if there is none."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() == code.workers):
        return None
    store = dist.distributed_c10d._get_default_store()
    store.set(_key(dist.get_rank()), socket.gethostname()[:LONGEST_NAME])
    return store


def _key(rank: int) -> str:
    return f"draco_ext/host/{rank}"


def read_names(store: dist.distributed_c10d.Store, ranks: int, timeout: timedelta = TIMEOUT) -> tuple[str, ...]:
    """Return the host's name that each rank has written to the store."""
    keys = [_key(rank) for rank in range(ranks)]
    try:
        store.wait(keys, timeout)
        received = store.multi_get(keys) if store.has_extended_api() else [store.get(key) for key in keys]  # type: ignore[attr-defined]
    except RuntimeError as error:  # torch's DistStoreError is one
        silent = [other for other, key in enumerate(keys) if not store.check([key])]
        raise RuntimeError(
            f"ranks {silent} have not said on which host they are within {timeout.total_seconds():g} s: all ranks must "
            "make a RedundantBatchSampler or call protect; or give both ranks_per_host="
        ) from error
    names = []
    for other, name in enumerate(received):
        text = name.decode(errors="replace")
        if not 0 < len(text) <= LONGEST_NAME or not text.isprintable():
            raise RuntimeError(f"ranks must say on which host they are, got something else from rank {other}")
        names.append(text)
    return tuple(names)


@functools.lru_cache(maxsize=64)
def arrange(code: Code, hosts: tuple[str, ...]) -> tuple[int, ...]:
    """Return the worker number of each rank, so that ranks of one host, which may fail together, do least harm.

    Repetition code: the ranks of each host are assigned to the groups in turn, so that a group has as few ranks of one
    host as possible. Cyclic code: ranks of one host share as few parts as possible; among such arrangements they are
    far apart on the circle, since errors of neighbours are the hardest to separate. The arrangement is found by a
    search and is not always the best one.

    Args:
        code: the code.
        hosts: the host of each rank.

    Returns:
        A permutation of the ranks. With one host, or one rank on each host, it is the identity.
    """
    n = code.workers
    if len(set(hosts)) in (1, n):
        return tuple(range(n))
    ranks_on: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        ranks_on.setdefault(host, []).append(rank)
    by_size = sorted(ranks_on.values(), key=len, reverse=True)
    order = [rank for ranks in by_size for rank in ranks]
    if code.message_is_gradient:
        # The i-th rank in order goes to group i mod parts, which has i // parts before it.
        places = [code.replica_groups[i % code.parts][i // code.parts] for i in range(n)]
    else:
        places = _places_on_circle(code, [len(ranks) for ranks in by_size])
    workers = dict(zip(order, places, strict=True))
    return tuple(workers[rank] for rank in range(n))


def _places_on_circle(code: Code, sizes: list[int]) -> list[int]:
    """Return the worker numbers of ranks that are ordered host by host; `sizes` are the ranks on each host."""
    n = code.workers
    price = pair_prices(code)
    # Consecutive ranks are a stride apart on the circle. pairs[a]: number of pairs on one host that are a ranks apart.
    apart = np.arange(n)
    pairs = np.sum([np.maximum(size - apart, 0) for size in sizes], axis=0)
    reach = max(sizes)  # no pair on one host is further apart
    strides = [stride for stride in range(1, n) if np.gcd(stride, n) == 1][:MOST_STRIDES]
    prices = [pairs[1:reach] @ price[apart[1:reach] * stride % n] for stride in strides]
    stride = strides[int(np.argmin(prices))]
    place = apart * stride % n
    host = np.repeat(np.arange(len(sizes)), sizes)
    places = _improve(place, host, price) if n <= MOST_IMPROVED else place
    return [int(worker) for worker in places]


def pair_prices(code: Code) -> np.ndarray:
    """Return (n,): the cost of placing two workers at each distance on one host, by shared parts, then nearness."""
    n = code.workers
    holds = np.zeros(n)
    holds[list(code.assignment(0))] = 1
    shared = np.rint(np.fft.irfft(np.abs(np.fft.rfft(holds)) ** 2, n))  # its autocorrelation
    distance = np.minimum(np.arange(n), n - np.arange(n))
    distance[0] = 1
    # Nearness of all pairs together costs less than one shared part.
    return shared * n**2 + 1 / distance**2


def _improve(place: np.ndarray, host: np.ndarray, price: np.ndarray) -> np.ndarray:
    """Swap pairs of ranks while that reduces the cost, the best swap first."""
    place = place.copy()
    same = host[:, None] == host
    while True:
        between = price[(place[:, None] - place) % len(place)]
        np.fill_diagonal(between, 0)
        # [a, b]: the cost of rank a at the place of rank b, with the others of its host.
        at = same.astype(float) @ between
        own = np.diag(at)
        # The last term: after the swap neither of the two counts its old place, which the other has then.
        gain = own[:, None] + own - at - at.T + 2 * between
        gain[same] = 0
        a, b = np.unravel_index(np.argmax(gain), gain.shape)
        if gain[a, b] <= 1e-9 * (1 + abs(own).sum()):
            return place
        place[[a, b]] = place[[b, a]]

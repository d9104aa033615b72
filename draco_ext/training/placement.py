"""Which worker of a code each rank is: such that replicas of a part are placed on different hosts."""

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

TIMEOUT = timedelta(minutes=5)  # for the name of another rank's host
LONGEST_NAME = 255
MOST_STRIDES = 1024  # arrangements on the circle that are looked at
MOST_IMPROVED = 64  # workers, up to which such an arrangement is then improved by swaps


def place_ranks(code: Code, ranks_per_host: int | Sequence[int] | None = None) -> tuple[int, ...]:
    """The worker that each rank is, the same on all ranks.

    Args:
        code: the code.
        ranks_per_host: how many ranks every host has, or a list with the number of each host; ranks are numbered host
            by host. None: what ranks say of themselves, see `find_hosts`.

    Returns:
        A permutation of the ranks.

    Raises:
        TypeError, ValueError: ``ranks_per_host`` is not a division of the ranks.
        RuntimeError: a rank has not said on which host it is.
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
    """The name of each rank's host.

    Where torch.distributed has a process group of ``code.workers`` ranks, they exchange their names through its store:
    no collective, a rank waits until the others have made their samplers or called protect. Otherwise as torchrun
    says, where it started this process among ``code.workers``: it numbers the ranks host by host, and hosts with
    different numbers of ranks count as one. Otherwise all are on one host.

    Raises:
        RuntimeError: a rank has not said its name in time, or something that is no name.
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
    """Says in torch.distributed's store, if there is one for so many ranks, on which host this rank is; returns it."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() == code.workers):
        return None
    store = dist.distributed_c10d._get_default_store()
    store.set(_key(dist.get_rank()), socket.gethostname()[:LONGEST_NAME])
    return store


def _key(rank: int) -> str:
    return f"draco_ext/host/{rank}"


def read_names(store: dist.distributed_c10d.Store, ranks: int, timeout: timedelta = TIMEOUT) -> tuple[str, ...]:
    """The name of each rank's host, as it says itself."""
    keys = [_key(rank) for rank in range(ranks)]
    try:
        store.wait(keys, timeout)
        told = store.multi_get(keys) if store.has_extended_api() else [store.get(key) for key in keys]  # type: ignore[attr-defined]
    except RuntimeError as error:  # torch's DistStoreError is one
        silent = [other for other, key in enumerate(keys) if not store.check([key])]
        raise RuntimeError(
            f"ranks {silent} have not said on which host they are within {timeout.total_seconds():g} s: all ranks must "
            "make a RedundantBatchSampler or call protect; or give both ranks_per_host="
        ) from error
    names = []
    for other, name in enumerate(told):
        text = name.decode(errors="replace")
        if not 0 < len(text) <= LONGEST_NAME or not text.isprintable():
            raise RuntimeError(f"ranks must say on which host they are, got something else from rank {other}")
        names.append(text)
    return tuple(names)


@functools.lru_cache(maxsize=64)
def arrange(code: Code, hosts: tuple[str, ...]) -> tuple[int, ...]:
    """The worker that each rank is, where faults on one host come together.

    Repetition: each host's ranks are dealt to the groups in turn, so that groups have as few of one host as can be.
    Cyclic: first, ranks of one host share as few parts as can be, pair by pair; then they stand apart on the circle,
    as errors of neighbours are the hardest to tell from each other. A search, not always the best arrangement.

    Args:
        code: the code.
        hosts: of each rank, its host.

    Returns:
        A permutation of the ranks: the ranks' own order where there is one host, or one for each rank.
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
    """Workers for ranks that come host by host, so many of each."""
    n = code.workers
    price = pair_prices(code)
    # Consecutive ranks a stride apart. How many pairs of one host are so many ranks apart:
    apart = np.arange(n)
    pairs = np.sum([np.maximum(size - apart, 0) for size in sizes], axis=0)
    reach = max(sizes)  # further apart there are none
    strides = [stride for stride in range(1, n) if np.gcd(stride, n) == 1][:MOST_STRIDES]
    prices = [pairs[1:reach] @ price[apart[1:reach] * stride % n] for stride in strides]
    stride = strides[int(np.argmin(prices))]
    place = apart * stride % n
    host = np.repeat(np.arange(len(sizes)), sizes)
    return (_improve(place, host, price) if n <= MOST_IMPROVED else place).tolist()


def pair_prices(code: Code) -> np.ndarray:
    """(n,): what it costs that two workers so far apart are on one host: the parts they share; then, nearness."""
    n = code.workers
    holds = np.zeros(n)
    holds[list(code.assignment(0))] = 1
    shared = np.rint(np.fft.irfft(np.abs(np.fft.rfft(holds)) ** 2, n))  # its autocorrelation
    distance = np.minimum(np.arange(n), n - np.arange(n))
    distance[0] = 1
    # All pairs together are worth less than one part.
    return shared * n**2 + 1 / distance**2


def _improve(place: np.ndarray, host: np.ndarray, price: np.ndarray) -> np.ndarray:
    """Swaps two ranks for as long as that makes it cheaper, the best swap first."""
    place = place.copy()
    same = host[:, None] == host
    while True:
        between = price[(place[:, None] - place) % len(place)]
        np.fill_diagonal(between, 0)
        # [a, b]: what rank a pays at the place of rank b, to the others of its host.
        at = same.astype(float) @ between
        own = np.diag(at)
        gain = own[:, None] + own - at - at.T + 2 * between  # neither pays to where it was itself
        gain[same] = 0
        a, b = np.unravel_index(np.argmax(gain), gain.shape)
        if gain[a, b] <= 1e-9 * (1 + abs(own).sum()):
            return place
        place[[a, b]] = place[[b, a]]

"""The harness of all benchmarks, which times calls together with a yardstick."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import re
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROUNDS = 7
PATIENCE = 15.0  # seconds for all rounds of one call; a slower call is made once


@dataclass(frozen=True)
class Timing:
    """The medians of a timed call.

    Attributes:
        seconds: the seconds of the call.
        ratio: the ratio to the yardstick just before and after the call.
        rounds: the number of rounds.
    """

    seconds: float
    ratio: float
    rounds: int

    @classmethod
    def of(cls, calls: Sequence[float], yardsticks: Sequence[float]) -> Timing:
        """Return the medians, given the seconds of the calls and of the yardsticks before the first and after each."""
        around = [(before + after) / 2 for before, after in itertools.pairwise(yardsticks)]
        ratios = [own / other for own, other in zip(calls, around, strict=True)]
        return cls(statistics.median(calls), statistics.median(ratios), len(calls))


class Clock:
    """A clock that times calls on a device: on a GPU with CUDA events, after other data have filled the cache."""

    def __init__(self, device: str) -> None:
        self._unrelated = torch.ones(2**28, device=device) if device == "cuda" else None

    def __call__(self, call: Callable[[], object]) -> float:
        """Run the call and return its seconds."""
        if self._unrelated is None:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._unrelated.sum()  # evicts the cache, and lets the host launch ahead
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


def compare(
    clock: Clock,
    call: Callable[[], object],
    yardstick: Callable[[], object],
    rounds: int = ROUNDS,
    patience: float = PATIENCE,
) -> Timing:
    """Time the call, and the yardstick before and after each round, since the load of a shared machine may change."""
    clock(yardstick)
    yardsticks, begin = [clock(yardstick)], time.perf_counter()
    calls: list[float] = []
    while len(calls) < rounds + 1:  # the first warms up, unless it is the only one
        calls.append(clock(call))
        yardsticks.append(clock(yardstick))
        if time.perf_counter() - begin > patience:
            break
    warmup = min(1, len(calls) - 1)
    return Timing.of(calls[warmup:], yardsticks[warmup:])


def repeat(call: Callable[[], object], seconds: float = 2e-3) -> tuple[Callable[[], None], int]:
    """Return a function that repeats a short call for about this many seconds, and the number of repetitions."""
    call()
    start = time.perf_counter()
    call()
    times = max(1, int(seconds / max(time.perf_counter() - start, 1e-7)))

    def run() -> None:
        for _ in itertools.repeat(None, times):
            call()

    return run, times


def keep_memory() -> None:
    """Make the C library keep freed memory, as torch's CUDA allocator does.

    Otherwise every result above 32 MB gets new memory from the operating system, which clears it page by page. That
    cost depends on the system (in a virtual machine, on its host) and not on the rule.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # glibc
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            library.mallopt(parameter, 2**31 - 1)


def available_memory() -> int:
    """Return the number of bytes that this machine has available."""
    with contextlib.suppress(OSError):
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        if found:
            return 1024 * int(found[1])
    return 2**32


@contextlib.contextmanager
def memory_limit() -> Iterator[None]:
    """Make calls that need more memory than there is fail with an exception, so that the process is not killed."""
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
    if pages:
        most = pages * resource.getpagesize() + int(0.9 * available_memory())
        resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)

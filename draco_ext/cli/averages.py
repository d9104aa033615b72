"""The rules people use instead of a code, as DistributedDataParallel's communication hook."""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket

from draco_ext.baselines import AGGREGATORS
from draco_ext.reporting.report import Seconds


class Averaging:
    """Every rank gathers all gradients and takes a robust average of them; the plain mean is DDP's own all-reduce.

    Args:
        rule: One of `AGGREGATORS`.
        adversaries: What the rule is told.
        corrupt: What this rank really sends: f(step, gradient).

    Attributes:
        seconds: Where its time went.
    """

    def __init__(self, rule: str, adversaries: int, corrupt: Callable[[int, Tensor], Tensor]) -> None:
        self.seconds = Seconds()
        self._rule = rule
        self._adversaries = adversaries
        self._corrupt = corrupt
        self._step = 0

    def hook(self, state: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """What DDP calls for every bucket of gradients."""
        buffer = bucket.buffer()
        sent = self._corrupt(self._step, buffer)
        self._step += bucket.is_last()
        begin = time.perf_counter()
        if self._rule == "mean":
            buffer.copy_(sent).div_(dist.get_world_size())
            dist.all_reduce(buffer)
            gathered = time.perf_counter()
        else:
            rows = list(buffer.new_empty(dist.get_world_size(), buffer.numel()))
            dist.all_gather(rows, sent)
            gathered = time.perf_counter()
            buffer.copy_(AGGREGATORS[self._rule](torch.stack(rows), self._adversaries))
        self.seconds.communicate += gathered - begin
        self.seconds.decode += time.perf_counter() - gathered
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else None)
        future.set_result(buffer)
        return future

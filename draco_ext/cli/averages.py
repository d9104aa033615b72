"""Baselines as communication hooks of DistributedDataParallel."""

import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket

from draco_ext.baselines import AGGREGATORS
from draco_ext.reporting.report import Seconds


class Averaging:
    """A hook with which every rank gathers all gradients and averages them robustly; the mean is DDP's all-reduce.

    Args:
        rule: one of `AGGREGATORS`.
        adversaries: the number of bad workers for which the rule is set up.
        corrupt: returns the message that this rank sends: f(step, gradient).

    Attributes:
        seconds: the time that this rank has spent.
    """

    def __init__(self, rule: str, adversaries: int, corrupt: Callable[[int, Tensor], Tensor]) -> None:
        self.seconds = Seconds()
        self._rule = rule
        self._adversaries = adversaries
        self._corrupt = corrupt
        self._step = 0

    def hook(self, state: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Handle a bucket of gradients; DDP calls it for every bucket."""
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

"""Weights of neighbours' models by their accumulated loss, for learning without a server."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from draco_ext import _checks
from draco_ext.baselines.averages import DTYPES, weighted_sum


class AccumulatedLoss:
    """The weights that one agent gives to the models of its neighbours and to its own.

    Agent k steps along the gradient of its own loss, sends its model theta_k to its neighbours, and measures the loss
    of each model it has, its own among them, on a mini-batch of its own data xi_k::

        phi_kl = (1 - forgetting) phi_kl + forgetting * loss(theta_l, xi_k)     for each neighbour l, and l = k
        c_kl   = (1 / phi_kl) / sum of 1 / phi_km over the m with phi_km <= phi_kk    if phi_kl <= phi_kk, else 0
        theta_k = sum of c_kl theta_l

    Neighbours whose accumulated loss is larger than the agent's own get no weight, however many they are. So for convex
    losses the paper proves that the expected regret is no worse than that of an agent alone. Agents keep different
    models; nothing makes them agree. The program measures losses on the mini-batch along whose gradient the agent has
    just stepped, which favours its own model: near the optimum an agent is left with its own.

    A neighbour whose loss is not finite once has no weight any more.

    Source: Li, Abbas and Koutsoukos, "Byzantine Resilient Distributed Multi-Task Learning", 2020 (arXiv 2010.13032).
    Read were its abstract and introduction and the authors' program, from which the recursion, the filter and the
    constants come (forgetting 0.05 and the first value 1 for its digits); the numbers of the equations could not be.

    Args:
        agents: the number of models: the neighbours' and the agent's own.
        own: the row of the agent's own model, from 0.
        forgetting: the weight of the newest loss, above 0 and at most 1.
        start: the accumulated loss of each model before the first step, above 0.

    Attributes:
        accumulated: (agents,) float64, the accumulated losses phi_kl.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is out of range.
    """

    def __init__(self, agents: int, own: int, *, forgetting: float = 0.05, start: float = 1.0) -> None:
        _checks.check_int("agents", agents, 1)
        _checks.check_int("own", own, 0, agents - 1)
        _checks.check_tolerance("forgetting", forgetting)
        _checks.check_tolerance("start", start)
        if not 0 < forgetting <= 1:
            raise ValueError(f"forgetting must be above 0 and at most 1, got {forgetting}")
        if start == 0:
            raise ValueError(f"start must be above 0, got {start}")
        self.accumulated = torch.full((agents,), float(start), dtype=torch.float64)
        self._own = own
        self._forgetting = forgetting

    def weigh(self, losses: Tensor) -> Tensor:
        """Add the losses of a step, and return the weights of the models.

        Args:
            losses: (agents,) float32 or float64 on the CPU, the loss of each model on the agent's own data, at least 0.

        Returns:
            (agents,) float64, at least 0 and adding up to 1; all on the agent's own model if its loss is not finite.

        Raises:
            TypeError: the losses have the wrong type or dtype.
            ValueError: there is not one loss for each model, or one is negative.
        """
        _checks.check_tensor("losses", losses, 1, DTYPES)
        if losses.shape != self.accumulated.shape:
            raise ValueError(f"losses must have {self.accumulated.numel()} entries, got {losses.numel()}")
        if (losses < 0).any():
            raise ValueError(f"losses must be at least 0, got {losses.min().item()}")
        new = losses.double().nan_to_num(nan=math.inf, posinf=math.inf)
        self.accumulated = (1 - self._forgetting) * self.accumulated.nan_to_num(
            nan=math.inf, posinf=math.inf
        ) + self._forgetting * new
        own = self.accumulated[self._own]
        if not own.isfinite():
            return torch.eye(losses.numel(), dtype=torch.float64)[self._own]
        usable = self.accumulated <= own
        inverse = torch.where(usable, 1 / self.accumulated.clamp_min(_TINY), 0.0)
        return inverse / inverse.sum()

    def combine(self, models: Tensor, losses: Tensor) -> Tensor:
        """Add the losses of a step, and return the agent's next model, the weighted mean of all.

        Args:
            models: (agents, d) float32 or float64, a model in each row.
            losses: see `weigh`.

        Returns:
            (d,).
        """
        _checks.check_messages(models, DTYPES)
        if models.size(0) != self.accumulated.numel():
            raise ValueError(f"models must have {self.accumulated.numel()} rows, got shape {tuple(models.shape)}")
        return weighted_sum(models, self.weigh(losses).to(models.device))


# The smallest accumulated loss to count with, so that the sum of inverses is finite.
_TINY = 1e-150

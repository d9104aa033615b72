"""Momentum at the workers."""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor

from draco_ext import _checks


class WorkerMomentum:
    """The momentum of one worker's gradients, which it sends instead of them.

    With g_t the gradient of step t, the worker sends m_t = momentum * m_(t-1) + g_t, where m_(-1) = 0, and the server
    steps along the rule's result without momentum of its own: theta_(t+1) = theta_t - rate * rule(m_t of all workers).
    The paper proves that this lowers the ratio of the messages' standard deviation to the norm of their mean, on which
    the guarantees of robust averages rest. Where gradients are one vector plus independent noise, the ratio falls by
    sqrt((1 - momentum) / (1 + momentum)): by 4.4 at 0.9.

    A linear rule, such as the mean, gives the same up to rounding whether workers or server have the momentum. Codes
    return the mean of the parts, so they do not need it. With a code a worker has a momentum for each of its parts.

    Source: El-Mhamdi, Guerraoui and Rouault, "Distributed Momentum for Byzantine-resilient Learning", 2020
    (arXiv 2003.00010). Its abstract could be read, and the authors' program, which has this recursion ("momentum at
    worker", without dampening); the numbers of the paper's equations could not.

    Args:
        momentum: the factor of the recursion, from 0 to below 1. With 0 gradients are sent as they are.

    Raises:
        TypeError: momentum is not a number.
        ValueError: momentum is out of range.
    """

    def __init__(self, momentum: float) -> None:
        _checks.check_tolerance("momentum", momentum)
        if momentum >= 1:
            raise ValueError(f"momentum must be from 0 to below 1, got {momentum}")
        self._momentum = momentum
        self._buffers: dict[Hashable, Tensor] = {}

    def __call__(self, gradient: Tensor, key: Hashable = None) -> Tensor:
        """Add a step's gradient to the momentum, and return what the worker sends.

        Args:
            gradient: a floating-point tensor of any shape.
            key: distinguishes gradients that have a momentum each, such as those of parameters or of a batch's parts.

        Returns:
            A new tensor of the gradient's shape.

        Raises:
            TypeError: the gradient is not a floating-point tensor.
            ValueError: the gradient's shape is not that of the step before.
        """
        if not isinstance(gradient, Tensor):
            raise TypeError(f"gradient must be a Tensor, got {type(gradient).__name__}")
        if not gradient.is_floating_point():
            raise TypeError(f"gradient must be of a floating-point dtype, got {gradient.dtype}")
        buffer = self._buffers.get(key)
        if buffer is None:
            self._buffers[key] = gradient.detach().clone()
            return self._buffers[key].clone()
        if buffer.shape != gradient.shape:
            raise ValueError(
                f"gradient must have the shape {tuple(buffer.shape)} of the step before, got {tuple(gradient.shape)}"
            )
        return buffer.mul_(self._momentum).add_(gradient.detach()).clone()

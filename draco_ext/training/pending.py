"""The gradients of a step until an update uses them, so that a loop that loses them is refused."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim.optimizer import Optimizer

from draco_ext.training.optimizer_steps import before_optimizer_steps


class PendingGradients:
    """The gradients of the last step, as long as nothing has used them.

    A step begins without gradients. So a loop that accumulates over several steps by itself would lose all but the last
    one's. Gradients count as used if an optimizer steps with one of the parameters, if a parameter or gradient is
    changed in place (by hand or by clipping), or if a gradient is dropped. If they are not finite, a loss scaler has
    left the update out.

    Args:
        parameters: the parameters.
        advice: how a loop accumulates instead, for the error.
    """

    def __init__(self, parameters: Sequence[Tensor], advice: str) -> None:
        self._advice = advice
        self._parameters = frozenset(parameters)
        self._versions: list[tuple[Tensor, int, int]] = []  # of parameters and their gradients
        before_optimizer_steps(self, lambda pending, optimizer, _: pending.see(optimizer))

    def begin(self) -> None:
        """Note the gradients with which a step has ended."""
        self._versions = [(p, p._version, p.grad._version) for p in self._parameters if p.grad is not None]

    def forget(self) -> None:
        """Forget them, since they are used or were dropped."""
        self._versions = []

    def check(self, step: int) -> None:
        """Refuse to begin a step if nothing has used the gradients of the one before.

        Raises:
            RuntimeError: they are as the step has left them.
        """
        versions, self._versions = self._versions, []
        if (
            versions
            and all(
                p._version == version and p.grad is not None and p.grad._version == of_gradient
                for p, version, of_gradient in versions
            )
            and all(bool(p.grad.isfinite().all()) for p, *_ in versions if p.grad is not None)
        ):
            raise RuntimeError(
                f"step {step} would lose the gradients of step {step - 1}, which no optimizer has used: "
                f"{self._advice}; or call zero_grad() if an update is left out on purpose"
            )

    def see(self, optimizer: Optimizer) -> None:
        """Note that an optimizer steps."""
        if self._versions and any(p in self._parameters for group in optimizer.param_groups for p in group["params"]):
            self.forget()

"""The primal-dual method of multipliers (PDMM) between clients and a server."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from draco_ext import _checks
from draco_ext.baselines.averages import DTYPES


class PDMMClient:
    """A client of PDMM, which minimises the sum of all clients' losses f_i under the constraint that all agree.

    In each round, with c > 0 the penalty, client i with the vector y_(s|i) from the server sends y_(i|s)::

        w_i     = argmin over w of f_i(w) + c/2 |w - y_(s|i)|^2
        y_(i|s) = 2 w_i - y_(s|i)
        w_s     = mean over i of y_(i|s)                            (`pdmm_server`)
        y_(s|i) = 2 w_s - y_(i|s)                                   (`pdmm_server`)

    This is Peaceman-Rachford splitting. For losses that are mu-strongly convex and L-smooth the distance of the vectors
    y_(s|i) from their limits w* + grad f_i(w*) / c shrinks in each round by at least the factor
    max(|c - mu| / (c + mu), |c - L| / (c + L)), which is least at c = sqrt(mu L).

    A bad client can send anything, and w_s is a plain mean: nothing is proved about bad clients, and one can move w_s
    anywhere. The paper reports measurements in which PDMM keeps more accuracy than averaging of models under bit flips
    and Gaussian noise.

    Source: Xia, Yu and Li, "Byzantine-Resilient Federated Learning via Distributed Optimization", 2025
    (arXiv 2503.10792), the variant with a server; the same iteration is FedSplit, as Zhang, Niwa and Kleijn note
    (arXiv 2107.08809). Read were the abstracts, and of the first the updates of w_i and w_s in a summary. The two
    updates of y between them are those of PDMM that fit these. The numbers of the paper's equations, its losses'
    approximate minimisation and the strength of its attacks could not be read.

    Args:
        start: (d,), the vector y_(s|i) of the first round, the same for all clients: the first model.
        solve: returns w_i given y_(s|i): exactly, or nearly, as by `gradient_steps`.

    Attributes:
        received: (d,), y_(s|i), which the client has from the server.
        model: (d,), w_i of the last round; before the first one `start`.

    Raises:
        TypeError: an argument has the wrong type.
    """

    def __init__(self, start: Tensor, solve: Callable[[Tensor], Tensor]) -> None:
        if not isinstance(start, Tensor):
            raise TypeError(f"start must be a Tensor, got {type(start).__name__}")
        if not callable(solve):
            raise TypeError(f"solve must be callable, got {type(solve).__name__}")
        self.received = start
        self.model = start
        self._solve = solve

    def send(self) -> Tensor:
        """Minimise, and return y_(i|s), which the client sends to the server."""
        self.model = self._solve(self.received)
        return 2 * self.model - self.received

    def receive(self, vector: Tensor) -> None:
        """Take y_(s|i) from the server."""
        if vector.shape != self.received.shape:
            raise ValueError(f"vector must have shape {tuple(self.received.shape)}, got {tuple(vector.shape)}")
        self.received = vector


def pdmm_server(messages: Tensor) -> tuple[Tensor, Tensor]:
    """Return the server's model w_s, the mean of the messages, and what it sends back to the clients.

    Source: see `PDMMClient`.

    Args:
        messages: (n, d), y_(i|s) of each client.

    Returns:
        w_s, (d,); and (n, d), y_(s|i) = 2 w_s - y_(i|s) for each client.
    """
    _checks.check_messages(messages, DTYPES)
    model = messages.mean(dim=0)
    return model, 2 * model - messages


def gradient_steps(
    gradient: Callable[[Tensor], Tensor],
    received: Tensor,
    start: Tensor,
    *,
    penalty: float,
    learning_rate: float,
    steps: int = 1,
) -> Tensor:
    """Return a client's model after some steps of gradient descent on f_i(w) + penalty/2 |w - received|^2.

    Where a client cannot minimise exactly, this takes the place of the argmin. Descent begins at the client's model of
    the round before, and not at what it has received: Zhang, Niwa and Kleijn (arXiv 2107.08809) trace the poor results
    of inexact FedSplit to where its steps begin.

    Args:
        gradient: returns the gradient of f_i, or an estimate from a mini-batch, at a point.
        received: (d,), y_(s|i).
        start: (d,), where descent begins.
        penalty: c, above 0.
        learning_rate: above 0.
        steps: the number of steps.

    Returns:
        (d,).

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: penalty or learning rate is not above 0 and finite, or there is no step.
    """
    for name, value in (("penalty", penalty), ("learning_rate", learning_rate)):
        _checks.check_tolerance(name, value)
        if value == 0:
            raise ValueError(f"{name} must be above 0, got {value}")
    _checks.check_int("steps", steps, 1)
    point = start
    for _ in range(steps):
        point = point - learning_rate * (gradient(point) + penalty * (point - received))
    return point

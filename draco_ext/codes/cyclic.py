"""The cyclic code: every worker computes 2s+1 of n parts and sends one linear combination."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from draco_ext import _checks, ops
from draco_ext._extension import _C
from draco_ext.codes.base import Code


@dataclass(frozen=True)
class CyclicCode(Code):
    """Any n >= 2s+1: part k is computed by the workers (k + o_t) mod n with evenly spread offsets o_t.

    Pairs of gradient elements are taken as complex numbers, so that a message has exactly as many bytes as a gradient.
    The weights are Lagrange's for the n-th roots of unity: the plain sum of honest messages is the sum of the
    gradients, and 2s checks on the messages locate up to s bad workers. The same code space as the cyclic code of
    DRACO, arXiv 1803.09877, section 4.2, with better conditioned supports.
    """

    @property
    def parts(self) -> int:
        """How many parts a batch is cut into: n."""
        return self.workers

    @property
    def nodes(self) -> np.ndarray:
        """(n,) complex128: x_j = exp(2 pi i j / n)."""
        return _C.cyclic_nodes(self.workers)

    @property
    def supports(self) -> np.ndarray:
        """(n, 2s+1) int64: row k names the workers that compute part k."""
        return _C.cyclic_supports(self.workers, self.adversaries)

    @property
    def weights(self) -> np.ndarray:
        """(n, n) complex128: entry (j, k) is the weight of part k in worker j's message."""
        return _C.cyclic_weights(self.workers, self.adversaries)

    def assignment(self, worker: int) -> tuple[int, ...]:
        """The 2s+1 parts that this worker computes, in ascending order."""
        self._check_worker(worker)
        n, r = self.workers, self.redundancy
        # Part k's t-th worker is k + t n / r, rounded: no table of all parts.
        return tuple(sorted((worker - (2 * t * n + r) // (2 * r)) % n for t in range(r)))

    def message_length(self, d: int) -> int:
        """D, made even."""
        _checks.check_int("d", d, 0)
        return d + d % 2

    def encode(self, worker: int, gradients: Tensor) -> Tensor:
        """The weighted sum of the worker's gradients; see `Code.encode`."""
        return ops.cyclic_encode(gradients, self.workers, self.adversaries, worker)

    def error_bound(self, dtype: torch.dtype, *, length: int | None = None, probability: float = 1e-6) -> float:
        """What rounding, and errors that hide below the noise floor, can do; see `Code.error_bound`."""
        self._check_bound(dtype, ops.CYCLIC_DTYPES, length, probability)
        n, s = self.workers, self.adversaries
        unit = torch.finfo(dtype).eps / 2

        def amplification(erased: int) -> float:
            """The norm of the decoding weights, over sqrt(n)."""
            return math.sqrt(math.comb(2 * erased, erased))

        weights = np.abs(self.weights[:, 0])
        added, strongest = weights.sum(), np.linalg.norm(weights)
        honest = added * (amplification(2 * s) * 2 + amplification(s) * (n + 4))
        # The largest error that passes below the noise floor, for a check of norm 1.
        _, projections = ops.projections_shape(self.message_length(length) if length is not None else 2**62)
        floor = _C.cyclic_tolerance(n, s, dtype == torch.float64) * math.sqrt(2 * s) * _C.PROJECTION_SCALE * strongest
        hidden = floor * 2 / probability ** (1 / projections)
        # The same in one worker's message, and what adding such messages up rounds.
        apart = math.prod(2 * math.sin(math.pi * (i // 2 + 1) / n) for i in range(2 * s - 1))
        message = hidden * amplification(max(0, 2 * s - 1)) / apart
        adding = 2**s * math.sqrt(s) * (n + 4) * message
        return math.sqrt(n) * (
            math.sqrt(2) * unit * (honest + adding) + (amplification(s) + amplification(2 * s)) * hidden
        )

    def _decode(self, messages, *, missing, expected, mean, atol, rtol, length, seed=None):
        return ops.cyclic_decode(
            messages,
            self.adversaries,
            missing=missing,
            expected=expected,
            length=length,
            atol=atol,
            rtol=rtol,
            mean=mean,
            seed=seed,
        )

"""The cyclic code: every worker computes 2s+1 of n parts and sends one linear combination."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from draco_ext import _checks, ops
from draco_ext._extension import _C
from draco_ext.codes.base import Code, Decoded


@dataclass(frozen=True)
class CyclicCode(Code):
    """Any n >= 2s+1: part k is computed by the workers (k + o_t) mod n with evenly spread offsets o_t.

    Pairs of gradient elements are taken as complex numbers, so that a message has exactly as many bytes as a gradient.
    The weights are Lagrange's for the n-th roots of unity: the plain sum of honest messages is the sum of the
    gradients, and 2s checks on the messages locate up to s bad workers. The same code space as the cyclic code of
    DRACO, arXiv 1803.09877, section 4.2, with better conditioned supports.
    """

    dtypes: ClassVar[tuple[torch.dtype, ...]] = ops.CYCLIC_DTYPES
    uses_projections: ClassVar[bool] = True

    @property
    def parts(self) -> int:
        """The number of parts of a batch: n."""
        return self.workers

    @property
    def nodes(self) -> np.ndarray:
        """(n,) complex128: x_j = exp(2 pi i j / n)."""
        return _C.cyclic_nodes(self.workers)

    @property
    def supports(self) -> np.ndarray:
        """(n, redundancy) int64: row k names the workers that compute part k."""
        return _C.cyclic_supports(self.workers, self.adversaries, self.blocks)

    @property
    def weights(self) -> np.ndarray:
        """(n, n) complex128: entry (j, k) is the weight of part k in worker j's message."""
        return _C.cyclic_weights(self.workers, self.adversaries)[..., 0]

    def assignment(self, worker: int) -> tuple[int, ...]:
        """Return the parts of this worker, in ascending order."""
        self._check_worker(worker)
        return tuple(sorted((worker - offset) % self.workers for offset in self._offsets()))

    def holders(self, part: int) -> tuple[int, ...]:
        """Return the workers that compute a part, in ascending order."""
        self._check_part(part)
        return tuple(sorted((part + offset) % self.workers for offset in self._offsets()))

    def _offsets(self) -> list[int]:
        # Part k's t-th worker is k + t n / r, rounded: no table of all parts.
        n, r = self.workers, self.redundancy
        return [(2 * t * n + r) // (2 * r) for t in range(r)]

    def message_length(self, d: int) -> int:
        """Return `d` rounded up to an even number."""
        _checks.check_int("d", d, 0)
        return ops.message_length(d, self.blocks)

    def encode(self, worker: int, gradients: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the weighted sum of the worker's gradients; see `Code.encode`."""
        return ops.cyclic_encode(gradients, self.workers, self.adversaries, worker, compression=self.blocks, out=out)

    def encode_add_(
        self, message: Tensor, carry: Tensor, gradient: Tensor, worker: int, part: int, *, first: bool = False
    ) -> Tensor:
        """Add one part's weighted gradient to a message; see `Code.encode_add_` and `ops.cyclic_encode_add_`."""
        n, s = self.workers, self.adversaries
        return ops.cyclic_encode_add_(
            message, carry, gradient, n, s, worker, part, first=first, compression=self.blocks
        )

    def decode(
        self,
        messages: Tensor,
        *,
        missing: Tensor | None = None,
        expected: Tensor | None = None,
        reduction: str = "mean",
        atol: float = 0.0,
        rtol: float = 0.0,
        length: int | None = None,
        out: Tensor | None = None,
        seed: int | None = None,
    ) -> Decoded:
        """Find the bad workers by random projections and add up the other messages; see `Code.decode`."""
        self._check_decode(messages, reduction)
        result = ops.cyclic_decode(
            messages,
            self.adversaries,
            missing=missing,
            expected=expected,
            length=length,
            atol=atol,
            rtol=rtol,
            mean=reduction == "mean",
            seed=seed,
            compression=self.blocks,
            out=out,
        )
        return Decoded(*result, self)

    def project(self, messages: Tensor, seed: int | Tensor) -> tuple[Tensor, Tensor]:
        """Return random projections of messages and their norms; see `Code.project`."""
        return ops.cyclic_project(messages, seed)

    def locate(
        self,
        projections: Tensor,
        norms: Tensor,
        length: int,
        *,
        dtype: torch.dtype,
        atol: float = 0.0,
        rtol: float = 0.0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Find the bad workers from the projections of all messages; see `Code.locate`."""
        return ops.cyclic_locate(
            projections,
            norms,
            self.adversaries,
            length,
            dtype=dtype,
            atol=atol,
            rtol=rtol,
            compression=self.blocks,
        )

    def combine(self, messages: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
        """Return the weighted sum of messages, pairs of elements as complex numbers; see `Code.combine`."""
        return ops.cyclic_combine(messages, weights, out=out)

    def error_bound(self, dtype: torch.dtype, *, length: int | None = None, probability: float = 1e-6) -> float:
        """Return a bound on rounding and on errors below the noise floor; see `Code.error_bound`."""
        self._check_bound(dtype, length, probability)
        n, s, blocks = self.workers, self.adversaries, self.blocks
        unit = torch.finfo(dtype).eps / 2
        # Of part 0: all parts' are alike but for a phase.
        weights = np.abs(_C.cyclic_weights(n, s, blocks)[:, 0])
        added, strongest = np.linalg.norm(weights.sum(axis=0)), np.linalg.norm(weights)
        # The largest error that passes below the noise floor, for a check of norm 1.
        _, projections = ops.projections_shape(length if length is not None else 2**62)
        floor = _C.cyclic_tolerance(n, s, dtype == torch.float64) * math.sqrt(2 * s) * _C.PROJECTION_SCALE * strongest
        hidden = floor * 2 / (probability / blocks) ** (1 / projections)
        # The same in one worker's message, and what adding such messages up rounds.
        apart = math.prod(2 * math.sin(math.pi * (i // 2 + 1) / n) for i in range(2 * s - 1))
        message = hidden * np.linalg.norm(_coefficients(max(0, 2 * s - 1), 0)) / apart
        squares = 0.0
        for block in range(blocks):
            gap = block if block < (blocks + 1) // 2 else block - (blocks + 1) // 2
            few, many = _coefficients(s, gap), _coefficients(2 * s, gap)
            amplified = float(np.linalg.norm(few)), float(np.linalg.norm(many))
            honest = added * (amplified[1] * 2 + amplified[0] * (n + 4))
            adding = sum(few) * math.sqrt(s) * (n + 4) * message
            squares += (math.sqrt(2) * unit * (honest + adding) + sum(amplified) * hidden) ** 2
        return float(math.sqrt(n * squares))

    def noise_amplification(self) -> float:
        """Return how much rounding noise grows with s adjacent workers left out; see `Code.noise_amplification`.

        The gradient, or the worst of its blocks, is sum_j b_j z_j with b_j = x_j^a + sum_m q_m x_j^m, where a is 0 for
        a gradient of one block. The polynomial q has the least norm such that b vanishes on the workers left out.
        Message j carries noise in proportion to its weights W_j. So compared with plain averaging the noise grows by
        ||b|| max_j ||W_j|| / sqrt(n). Builds tables of n x n.
        """
        return self._amplification(self.adversaries)

    def _amplification(self, erased: int) -> float:
        n, s = self.workers, self.adversaries
        strongest = np.linalg.norm(_C.cyclic_weights(n, s, self.blocks)[:, 0])  # of all workers' alike
        powers = self.nodes[:, None] ** np.arange(1, 2 * s + 1)
        # The nodes are a cycle: all sets of adjacent workers are alike.
        left_out = powers[:erased]
        # Least norm by QR of the adjoint; the normal equations would square the condition number.
        basis, triangle = np.linalg.qr(left_out.conj().T)
        worst = 0.0
        for moment in _C.cyclic_answers(s, self.blocks):
            answer = self.nodes**moment
            q = -basis @ np.linalg.solve(triangle.conj().T, answer[:erased])
            worst = max(worst, float(np.linalg.norm(answer + powers @ q)))
        return float(worst * strongest / math.sqrt(n))


def _coefficients(erased: int, gap: int) -> list[float]:
    """Return bounds on the coefficients of decoding weights that vanish on some workers; see docs/guarantee.md.

    Args:
        erased: how many workers they vanish on.
        gap: how many moments lie between the block's and the checks.
    """
    return [1.0] + [float(math.comb(erased + gap, gap + j) * math.comb(gap + j - 1, gap)) for j in range(1, erased + 1)]

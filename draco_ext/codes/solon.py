"""Solon's code: messages that are k times shorter than a gradient, at a redundancy of 2s+k."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from draco_ext import _checks
from draco_ext._extension import _C
from draco_ext.codes.cyclic import CyclicCode


@dataclass(frozen=True)
class SolonCode(CyclicCode):
    """A cyclic code with messages of d / k elements, for which each part is computed by 2s+k of n workers.

    It pays where messages are expensive, and the server cannot ask for anything after it has received them: one round
    of short messages has the whole guarantee. Otherwise a repetition code does better: through ``"server"`` and
    ``"verified"`` its workers send d / (2s+1) elements of their messages at a redundancy of 2s+1.

    A gradient is cut into k blocks. With weights for each of them a part enters the messages, of which k moments are
    the blocks of the sum of the gradients, and 2s others are the checks of the cyclic code. With k = 1 it is that
    code, to the last bit. The trade between bytes and redundancy is that of Solon, arXiv 2110.01595; this construction
    differs (docs/concepts/codes.md).

    Args:
        workers: n.
        adversaries: s, how many workers may be bad.
        compression: k, from 1 to n - 2 * s.

    Raises:
        TypeError: an argument is not an int.
        ValueError: s < 0, k < 1 or n < 2 * s + k.
    """

    compression: int

    def __post_init__(self) -> None:
        _checks.check_workers(self.workers, self.adversaries, compression=self.compression)

    @property
    def blocks(self) -> int:
        """The number of blocks that a gradient is cut into: k."""
        return self.compression

    @property
    def redundancy(self) -> int:
        """The number of workers that compute each part: 2s+k."""
        return 2 * self.adversaries + self.compression

    @property
    def weights(self) -> np.ndarray:
        """(n, n, k) complex128: entry (j, p, b) is the weight of block b of part p in worker j's message."""
        return _C.cyclic_weights(self.workers, self.adversaries, self.compression)

    @property
    def moments(self) -> np.ndarray:
        """(k,) int64: block b of the sum of the gradients is the sum of x_j^m z_j with m = moments[b]."""
        return _C.cyclic_answers(self.adversaries, self.compression)

    def message_length(self, d: int) -> int:
        """Return `d / k` rounded up to an even number."""
        return super().message_length(d)

"""Typed, checked and documented functions over ``torch.ops.draco_ext``, with their fake kernels.

Every function works on CPU tensors and, in a build with CUDA, on those of a GPU: there on the current stream of their
device, without waiting for it. None makes a hidden copy: message matrices may have any row stride but need contiguous
rows. The same call on the same kind of device gives the same bits, whatever the number of threads. The child of a fork
computes on one thread, since torch's do not survive it: torch's own ops wait there for ever unless it begins with
`torch.set_num_threads(1)`, as a DataLoader's workers do. A plain-torch version of each stands in `draco_ext.reference`.

`out=` gives the vector that a result is written into, and that is returned in its place: a contiguous one of the
result's length, of the inputs' dtype and device, that shares no memory with them. The bits are those without it.

All raise TypeError for an argument of the wrong type or dtype and ValueError for a wrong value, naming the argument,
what came and what was expected, before anything is computed. A tensor that is being differentiated is refused, also
in `torch.func.grad` and `jvp`; `torch.ops.draco_ext`, where these functions are not called, cannot see tangents.
"""

from __future__ import annotations

from draco_ext._extension import _C
from draco_ext.ops.cyclic import (
    CYCLIC_DTYPES,
    TILE,
    cyclic_combine,
    cyclic_decode,
    cyclic_encode,
    cyclic_encode_add_,
    cyclic_locate,
    cyclic_project,
    message_length,
    projections_shape,
)
from draco_ext.ops.digest import DIGEST_DTYPES, digest, digest_and_stats, digest_stats_and_scale_
from draco_ext.ops.vote import MOST_GROUP_MEMBERS, VOTE_DTYPES, majority_vote, vector_mean

__all__ = [
    "CYCLIC_DTYPES",
    "DIGEST_DTYPES",
    "MOST_GROUP_MEMBERS",
    "TILE",
    "VOTE_DTYPES",
    "build_info",
    "cyclic_combine",
    "cyclic_decode",
    "cyclic_encode",
    "cyclic_encode_add_",
    "cyclic_locate",
    "cyclic_project",
    "digest",
    "digest_and_stats",
    "digest_stats_and_scale_",
    "majority_vote",
    "message_length",
    "projections_shape",
    "vector_mean",
]


def build_info() -> dict[str, str | bool]:
    """Return how the extension was built and what it uses on this machine.

    Returns:
        A dict with the keys `compiler`, `instruction_set` (of the CPU kernels in use; the environment variable
        `DRACO_ISA` forces one), `cuda` (bool), `cuda_architectures` and `torch` (the version it was built against).
    """
    return _C.build_info()

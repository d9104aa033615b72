"""Seeds of the global generators, with which ranks that compute the same part draw the same random numbers."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator

import torch

from draco_ext import ops

# Stages of a part: before its mini-batch is loaded (2 lower for each forward pass so far), and when it is yielded.
# Forward passes are numbered from 0.
LOADER, BATCH = -2, -1


def seed_generators(seed: int, step: int, part: int, stage: int) -> None:
    """Seed the global generators of torch, of Python's `random` and, if it is loaded, of numpy.

    Args:
        seed: the guard's seed.
        step: the guard's step.
        part: the number of the part.
        stage: the number of the forward pass, or one of this module's constants.
    """
    words = torch.tensor([step, part, stage], dtype=torch.int64).view(torch.uint8)
    seed = int(ops.digest(words, seed)[0])
    # torch.manual_seed is slow: it formats a stack trace for every type of device that is not in use.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)


@contextlib.contextmanager
def kept_generators(device: torch.device) -> Iterator[None]:
    """Restore the states of the global generators at the end of this context; of GPUs, only that of `device`."""
    numpy, python = sys.modules.get("numpy"), random.getstate()
    state = None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(state)

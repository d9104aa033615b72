"""Seeds of the global generators: ranks that compute the same part draw the same random numbers."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator

import torch

from draco_ext import ops

# Stages of a part: before its mini-batch is loaded (2 lower for each forward pass so far), and when it is handed out.
# Forward passes are numbered from 0.
LOADER, BATCH = -2, -1


def seed_generators(seed: int, step: int, part: int, stage: int) -> None:
    """Seed the global generators of torch, of Python's `random` and, where it is loaded, of numpy.

    Args:
        seed: of the guard.
        step: of the guard.
        part: of the code, the same on all ranks that compute it.
        stage: the number of the forward pass, or one of this module's constants.
    """
    words = torch.tensor([step, part, stage], dtype=torch.int64).view(torch.uint8)
    seed = int(ops.digest(words, seed)[0])
    # torch.manual_seed would format a stack trace for every kind of device that is not in use.
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)


@contextlib.contextmanager
def kept_generators(device: torch.device) -> Iterator[None]:
    """Give the global generators back the states that they had, those of a GPU for the given one only."""
    numpy, python = sys.modules.get("numpy"), random.getstate()
    state = None if numpy is None else numpy.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(state)

"""The compiled module `_C`, loaded in one place, which says what to do where it cannot be."""

from pathlib import Path

import torch

try:
    from draco_ext import _C
except ImportError as error:  # say what to do instead of a bare symbol name
    raise ImportError(
        f"draco_ext's compiled module could not be loaded from {Path(__file__).parent} ({error}). In a source tree, "
        "install with 'pip install -e .' or run from another folder; otherwise reinstall draco_ext with the torch in "
        f"use, {torch.__version__}"
    ) from error

__all__ = ["_C"]

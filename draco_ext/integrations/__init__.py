"""Helpers for training frameworks and monitoring. Each module needs its framework, and is imported on demand."""

from __future__ import annotations

from draco_ext.codes import Audit, Code


def missing(extra: str, error: ImportError) -> ImportError:
    """Return the error that names the extra which a module needs."""
    return ImportError(f'draco_ext.integrations.{extra} needs pip install "draco_ext[{extra}]": {error}')


def check_code(framework: str, code: Code | Audit) -> Code:
    """Return the code, if it works in a framework that owns the loop: each rank makes one pass in a step.

    Raises:
        TypeError: it is not a code.
        ValueError: it needs the loop of ``guard.steps``.
    """
    if not isinstance(code, Code | Audit):
        raise TypeError(f"code must be a RepetitionCode, got {type(code).__name__}")
    if isinstance(code, Audit) or len(code.assignment(0)) > 1:
        needs = "several passes in audited steps" if isinstance(code, Audit) else "several mini-batches in each step"
        raise ValueError(
            f"code must need one pass for each rank and step with {framework}, which owns the training loop, got "
            f"{code!r}, which needs {needs}, by a loop over guard.steps(loader): take a RepetitionCode, or own the loop"
        )
    return code

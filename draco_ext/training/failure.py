"""The failure policy, for steps in which too many messages are wrong or missing for the code's guarantee."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence

from draco_ext.codes import Code, DecodingError

ON_FAILURE = ("raise", "skip")


class FailurePolicy:
    """A policy that explains failures in terms of ranks, and raises an error or skips the step.

    Args:
        code: the code.
        ranks: the rank of every worker.
        on_failure: "raise" or "skip".
        log: called to log a warning.
        unit: what a rank is called in messages.
    """

    def __init__(
        self, code: Code, ranks: Sequence[int], on_failure: str, log: Callable[..., None], unit: str = "rank"
    ) -> None:
        self._unit = unit
        self._code = code
        self._ranks = ranks
        self._on_failure = on_failure
        self._log = log

    def apply(self, failure: str | None) -> None:
        """End a failed step.

        Raises:
            DecodingError: `on_failure` is "raise".
        """
        if failure is None:
            return
        if self._on_failure == "raise":
            raise DecodingError(failure)
        self._log("%s; the step is skipped", failure)

    def explain_decoding(
        self,
        step: int,
        bucket: int,
        *,
        suspects: Iterable[int],
        missing: Collection[int],
        other_data: Collection[int],
        other_parameters: Collection[int],
    ) -> str:
        """Return why a bucket could not be decoded, as far as the ranks' records show it; arguments name workers."""
        explained = {*other_data, *other_parameters}
        suspected = set(suspects) - explained
        for group in self._code.decoding_groups if self._code.message_is_gradient else ():
            # Of those who are left s or fewer may be right about the others: then it could be any of them.
            rest = set(group) - explained - set(missing)
            against = rest & suspected
            if len(rest) > 1 and against and len(rest - against) <= self._code.adversaries:
                suspected |= rest
            elif rest == against and len(rest) == 1:
                suspected -= rest  # nobody is left who says so
        reasons: dict[str, Collection[int]] = {
            "suspected": suspected,
            "other parameters than the majority": other_parameters,
            "other data (mini-batches or forward passes that differ from the others')": other_data,
            "missing": missing,
        }
        named = {reason: sorted({self._ranks[j] for j in workers}) for reason, workers in reasons.items()}
        who = ", ".join(f"{reason}: {ranks}" for reason, ranks in named.items() if ranks) or "nobody can be named"
        return (
            f"no gradient in step {step}, bucket {bucket}: more {self._unit}s are bad than {self._code!r} can correct; "
            f"{who}"
        )

    def explain_state(self, step: int, other_parameters: Collection[int]) -> str | None:
        """Return an error message if too many workers have wrong parameters, else None.

        It is an error even if the workers' gradients agree.
        """
        for group in self._code.decoding_groups:
            wrong = sorted(self._ranks[j] for j in group if j in other_parameters)
            if len(wrong) > self._code.adversaries:
                return (
                    f"no gradient in step {step}: more {self._unit}s have other parameters than the majority than "
                    f"{self._code!r} can correct: {wrong}"
                )
        return None

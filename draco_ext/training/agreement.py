"""The agreement among the ranks of one worker, each of which decodes another shard of the gradients.

A wrong message may be seen in one shard alone. What follows from it, a finding or a failed step, concerns all shards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from draco_ext.protocol.differences import Difference, join
from draco_ext.protocol.groups import gather, gather_json
from draco_ext.protocol.messages import ExchangeOutcome
from draco_ext.training.adapter import Adapter

MOST_BYTES = 2**24  # the limit for what a rank has found out in one step


@dataclass(frozen=True)
class BucketOutcome:
    """The outcome of the exchange of one bucket.

    Attributes:
        bucket: the bucket's number.
        elements: the number of its elements on one rank.
        outcome: the outcome.
        shards: by suspect, the shards in which its message was wrong.
    """

    bucket: int
    elements: int
    outcome: ExchangeOutcome
    shards: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class StepFindings:
    """The findings of a rank about a step, or those of all ranks of a worker together.

    Attributes:
        failure: why the step failed before its messages were looked at, or None.
        outcomes: the outcomes of all buckets.
        other_data: the workers that say themselves that their inputs are not those of others with the same part.
        other_parameters: the workers with other parameters than the majority.
    """

    failure: str | None
    outcomes: Sequence[BucketOutcome]
    other_data: frozenset[int]
    other_parameters: frozenset[int]


class Agreement:
    """An exchange between the ranks of one worker; without effect if the worker is a single rank.

    All of them must call the same methods in the same order.

    Args:
        adapter: says which ranks these are.
    """

    def __init__(self, adapter: Adapter) -> None:
        self._adapter = adapter
        self._group = adapter.shard_group

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks of the worker, by shard; they must be JSON."""
        if self._group is None:
            return [value]
        with self._adapter.own_collectives():
            return gather_json(value, self._group, self._adapter.device, most_bytes=MOST_BYTES)

    def numbers(self, *values: int) -> list[list[int]]:
        """Return the numbers of all ranks of the worker, by shard; cheaper than `gather`."""
        if self._group is None:
            return [list(values)]
        with self._adapter.own_collectives():
            rows: list[list[int]] = gather(torch.tensor(values), self._group, self._adapter.device).tolist()
        return rows

    def any(self, value: object) -> bool:
        """Return whether the value is true on any rank of the worker."""
        return any(row[0] for row in self.numbers(bool(value)))

    def first(self, problem: str | None) -> str | None:
        """Return the problem of the first rank of the worker that has one."""
        if not self.any(problem is not None):
            return None
        found: str = next(found for found in self.gather(problem) if found is not None)
        return found

    def merge(self, own: StepFindings) -> StepFindings:
        """Return the findings of all ranks of the worker together."""
        if self._group is None:
            return own
        everybody = [_from_json(shard, value) for shard, value in enumerate(self.gather(_to_json(own)))]
        by_bucket: dict[int, list[BucketOutcome]] = {}
        for found in everybody:
            for each in found.outcomes:
                by_bucket.setdefault(each.bucket, []).append(each)
        return StepFindings(
            next((found.failure for found in everybody if found.failure is not None), None),
            [_merge_bucket(by_bucket[bucket]) for bucket in sorted(by_bucket)],
            frozenset().union(*(found.other_data for found in everybody)),
            frozenset().union(*(found.other_parameters for found in everybody)),
        )


def _merge_bucket(outcomes: Sequence[BucketOutcome]) -> BucketOutcome:
    """Merge the outcomes of a bucket's shards, which are given in order."""

    def union(pick: Callable[[ExchangeOutcome], Iterable[int]]) -> tuple[int, ...]:
        return tuple(sorted({j for each in outcomes for j in pick(each.outcome)}))

    suspects, shards = {}, {}
    for j in union(lambda outcome: outcome.suspects):
        seen = [each for each in outcomes if j in each.outcome.suspects]
        shards[j] = tuple(shard for each in seen for shard in each.shards[j])
        suspects[j] = join([(each.shards[j][0] * each.elements, each.outcome.suspects[j]) for each in seen])
    merged = ExchangeOutcome(
        suspects,
        any(each.outcome.failed for each in outcomes),
        union(lambda outcome: outcome.missing),
        union(lambda outcome: outcome.left_out),
    )
    return BucketOutcome(outcomes[0].bucket, outcomes[0].elements, merged, shards)


def _to_json(found: StepFindings) -> list[Any]:
    outcomes = [
        [
            each.bucket,
            each.elements,
            each.outcome.failed,
            [
                [j, None if differs is None else [differs.elements, differs.first, differs.largest]]
                for j, differs in each.outcome.suspects.items()
            ],
            list(each.outcome.missing),
            list(each.outcome.left_out),
        ]
        for each in found.outcomes
    ]
    return [found.failure, outcomes, sorted(found.other_data), sorted(found.other_parameters)]


def _from_json(shard: int, value: list[Any]) -> StepFindings:
    failure, outcomes, other_data, other_parameters = value
    return StepFindings(
        failure,
        [
            BucketOutcome(
                bucket,
                elements,
                ExchangeOutcome(
                    {j: None if differs is None else Difference(*differs) for j, differs in suspects},
                    failed,
                    tuple(missing),
                    tuple(left_out),
                ),
                {j: (shard,) for j, _ in suspects},
            )
            for bucket, elements, failed, suspects, missing, left_out in outcomes
        ],
        frozenset(other_data),
        frozenset(other_parameters),
    )

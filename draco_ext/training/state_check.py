"""The check of replicated state: it compares state in some steps and repairs ranks that differ."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from draco_ext import ops
from draco_ext.codes import DecodingError
from draco_ext.protocol.exchange import run_alone
from draco_ext.protocol.groups import Rendezvous
from draco_ext.protocol.transports.base import Transport
from draco_ext.reporting.recorder import Recorder
from draco_ext.training.adapter import Adapter
from draco_ext.training.agreement import Agreement
from draco_ext.training.record import SECTIONS, Digest, digests_in
from draco_ext.training.repair import make_repair
from draco_ext.training.state import ReplicatedState, StateVerdict, judge


class StateCheck:
    """A check that compares replicated state in some steps and repairs it.

    Args:
        adapter: gives the parameters and buffers that are compared.
        agreement: the agreement with the other ranks of this worker.
        transport: the transport that repairs use.
        recorder: records the findings.
        every: state is compared in steps whose number is a multiple of this; 0: in the first step only.
        seed: the seed of the digests' keys.
        helpers: how many ranks are asked for the majority's values before a repair is given up.

    Attributes:
        state: the state that is compared.
    """

    def __init__(
        self,
        adapter: Adapter,
        agreement: Agreement,
        transport: Transport,
        recorder: Recorder,
        *,
        every: int,
        seed: int,
        helpers: int,
    ) -> None:
        self.state = ReplicatedState(adapter)
        self._adapter = adapter
        self._agreement = agreement
        self._transport = transport
        self._recorder = recorder
        self._repair = make_repair(transport, self.state, helpers)
        self._rendezvous = Rendezvous(adapter.world)
        self._every = every
        self._seed = seed
        self._unknown = True  # not compared yet, or without a majority in the last comparison
        self._comparisons = 0
        self._wrong: list[int] = []  # the workers that were wrong in the last comparison
        code = transport.code
        same_parameters = [tuple(range(code.workers))] if adapter.alike is None else adapter.alike
        # Only workers that compute the same parts have the same buffers.
        same = {"parameters": same_parameters, "optimizer": same_parameters, "buffers": code.replica_groups}
        self._pools = {section: {j: pool for pool in pools for j in pool} for section, pools in same.items()}

    def forget(self) -> None:
        """Compare in the next step whatever its number, since a state was loaded."""
        self._unknown = True

    def is_due(self, step: int) -> bool:
        """Return whether state is compared in this step."""
        return self._unknown or (self._every > 0 and step % self._every == 0)

    def gather(self, step: int) -> dict[int, tuple[Digest, ...]]:
        """Return the digests of all ranks' state now, by worker, without those that are missing."""
        rows, missing = run_alone(self._transport.gather_record(self.digests(step).flatten()))
        return {j: digests_in(row) for j, row in enumerate(rows) if j not in missing}

    def judge(self, claims: dict[int, tuple[tuple[int, int], ...]]) -> StateVerdict:
        """Return whose state is wrong, according to the digests that ranks have sent."""
        return judge(claims, self._pools)

    def repair(self, verdict: StateVerdict, step: int) -> str | None:
        """Repair the ranks in the minority; return an error message if there is no majority, else None."""
        self._unknown = bool(verdict.undecided)
        try:
            repaired = self._repair.run(verdict, self._pools)
        except RuntimeError as error:
            raise RuntimeError(f"no comparison of parameters in step {step}: {error}") from error
        wrong = {worker: (sections, repaired[worker]) for worker, sections in verdict.wrong.items()}
        undecided = verdict.undecided
        if self._agreement.any(wrong or undecided):
            wrong, undecided = self._merge(wrong, undecided)
        for worker, (sections, whole) in wrong.items():
            self._recorder.add_state(worker, sections, step=step, repaired=whole)
        if wrong:
            self._adapter.parameters_changed()
        self._wrong = list(wrong)
        if not undecided:
            return None
        return f"no gradient in step {step}: no majority of the ranks has the same {' and '.join(undecided)}"

    def _merge(
        self, wrong: Mapping[int, tuple[tuple[str, ...], bool]], undecided: tuple[str, ...]
    ) -> tuple[dict[int, tuple[tuple[str, ...], bool]], tuple[str, ...]]:
        """Return the wrong sections of each worker in any shard, whether all were repaired, and those undecided."""
        found = self._agreement.gather([list(wrong.items()), undecided])
        merged: dict[int, tuple[tuple[str, ...], bool]] = {}
        for of_shard, _ in found:
            for worker, (sections, whole) in of_shard:
                others, all_whole = merged.get(worker, ((), True))
                both = tuple(section for section in SECTIONS if section in (*others, *sections))
                merged[worker] = (both, all_whole and whole)
        without_majority = {section for _, of_shard in found for section in of_shard}
        return dict(sorted(merged.items())), tuple(section for section in SECTIONS if section in without_majority)

    def run(self, step: int, present: Collection[int], timeout: float) -> list[int]:
        """Compare and repair now, between steps, on all ranks; return the workers that were wrong.

        Args:
            step: the next step.
            present: the ranks to wait for.
            timeout: seconds to wait for them.

        Raises:
            DecodingError: there is no majority.
            RuntimeError: another rank does not call it.
        """
        members = sorted(rank for worker in present for rank in self._adapter.members[worker])
        if absent := self._rendezvous.wait(members, timeout):
            raise RuntimeError(
                f"check_state and state_dict must be called on all ranks, but rank {absent[0]} has not called it "
                f"within {timeout:g} s; state_dict(check=False) may be called on one rank alone"
            )
        verdict = self.judge(self.gather(step))
        problem = self.repair(verdict, step)
        self._recorder.deliver()
        if problem:
            raise DecodingError(problem)
        return self._wrong

    def digests(self, step: int) -> Tensor:
        """Return the digests (3, 2) of this rank's state under a key that all ranks know.

        The key need not be secret. A rank's state was made by that rank alone, or by a repair, which was compared
        under a secret key.
        """
        words = torch.tensor([step, self._comparisons], dtype=torch.int64).view(torch.uint8)
        self._comparisons += 1
        return self.state.digests(int(ops.digest(words, self._seed)[0]) % 2**63)

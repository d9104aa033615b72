"""The ledger: a file with a line of JSON for everything that a guard has found."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

logger = logging.getLogger("draco_ext")


@dataclass(frozen=True)
class Finding:
    """One worker's wrong or missing message in one bucket of one step, or its wrong state; a line of the ledger.

    Attributes:
        time: seconds since the epoch.
        step: of the guard, from 0.
        bucket: DDP's number of it; DDP makes new buckets after the first step.
        worker: of the code.
        rank: in the process group.
        host: its name.
        elements: how many elements differ from the right message; None where that is not known.
        first: the first of them.
        largest: the largest absolute deviation; None also where it is not finite.
        failed: whether the bucket could not be decoded: then the suspicion is not certain, and stands here only.
        missing: whether the message did not come in time, which is no suspicion.
        kind: "gradient": a wrong message; "data": the same of a rank that says itself that its inputs differ from those
            of the others with its part; "missing"; "state": other parameters, buffers or optimizer state than the
            majority's, with bucket -1.
    """

    time: float
    step: int
    bucket: int
    worker: int
    rank: int
    host: str
    elements: int | None
    first: int | None
    largest: float | None
    failed: bool
    missing: bool = False
    kind: str = "gradient"


class Ledger:
    """Appends findings to a file. Training never ends on account of it.

    Every line is handed to the system at once: a process that is killed leaves whole lines, but for the last.

    Args:
        path: of the file; its folder is made.

    Attributes:
        unwritten: findings that could not be written.

    Raises:
        OSError: it cannot be opened for writing.
    """

    def __init__(self, path: Path) -> None:
        self.unwritten = 0
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
        self._torn = self._ends_in_a_line()

    def append(self, finding: Finding) -> None:
        """Writes a finding down; where that fails, counts it, and the first time says why."""
        line = json.dumps(asdict(finding)).encode() + b"\n"
        try:
            with self._path.open("ab") as file:
                # A line that a killed process or a full disk has cut off stays alone.
                file.write(b"\n" + line if self._torn else line)
            self._torn = False
        except OSError as error:
            if self.unwritten == 0:
                logger.error(
                    "ledger %s cannot be written: %s; training goes on, findings are counted",
                    self._path,
                    error.strerror or error,
                )
            self.unwritten += 1
            self._torn = self._ends_in_a_line()

    def _ends_in_a_line(self) -> bool:
        try:
            if not self._path.is_file() or self._path.stat().st_size == 0:
                return False
            with self._path.open("rb") as file:
                file.seek(-1, 2)
                return file.read() != b"\n"
        except OSError:  # may be written, but not read
            return True


def read_ledger(path: str | Path) -> list[Finding]:
    """What stands in a ledger, also of a job that was killed, or that still runs.

    A line that was cut off, by a kill in the middle of a write or by a full disk, is left out, and a warning names it.

    Args:
        path: of the file, as given to `protect`.

    Returns:
        The findings, in the order in which they were written.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is whole, but no finding.
    """
    findings = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        try:
            fields = json.loads(line)
        except ValueError:
            if line:
                logger.warning("ledger %s: line %d was cut off, and is left out", path, number)
            continue
        try:
            findings.append(Finding(**fields))
        except TypeError:
            raise ValueError(f"path must be a ledger, got {path} with line {number}: {line[:100]!r}") from None
    return findings

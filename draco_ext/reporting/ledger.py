"""The ledger: a file with a line of JSON for everything that a guard has found."""

from __future__ import annotations

import glob
import itertools
import json
import logging
import os
import re
import weakref
from collections.abc import Iterator
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

    The file stays open. Every line is handed to the system at once: a process that is killed leaves whole lines, but
    for the last. Where the file is removed or renamed, as by a rotation of logs, a new one is begun.

    Args:
        path: of the file, taken from the folder that is the current one now; its folder is made.

    Attributes:
        unwritten: findings that could not be written.

    Raises:
        OSError: it cannot be opened for writing.
    """

    def __init__(self, path: Path) -> None:
        self.unwritten = 0
        self._torn = False  # whether the last line has no end
        self._path = path.absolute()
        self._close: weakref.finalize[[int], Ledger] | None = None
        self._open()

    def append(self, finding: Finding) -> None:
        """Writes a finding down; where that fails, counts it, and the first time says why."""
        line = json.dumps(asdict(finding)).encode() + b"\n"
        try:
            if not self._is_there():
                self._open()
            # A line that a killed process or a full disk has cut off stays alone.
            rest = b"\n" + line if self._torn else line
            while rest:
                self._torn = True
                rest = rest[os.write(self._file, rest) :]
            self._torn = False
        except OSError as error:
            if self.unwritten == 0:
                logger.error(
                    "ledger %s cannot be written: %s; training goes on, findings are counted",
                    self._path,
                    error.strerror or error,
                )
            self.unwritten += 1

    def _open(self) -> None:
        if self._close is not None:
            self._close()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        self._close = weakref.finalize(self, os.close, self._file)
        self._torn = self._has_torn_tail()

    def _is_there(self) -> bool:
        """Whether the open file is still the one that the path names."""
        try:
            return os.path.samestat(os.stat(self._path), os.fstat(self._file))
        except OSError:
            return False

    def _has_torn_tail(self) -> bool:
        try:
            if not self._path.is_file() or self._path.stat().st_size == 0:
                return False
            with self._path.open("rb") as file:
                file.seek(-1, 2)
                return file.read() != b"\n"
        except OSError:  # may be written, but not read
            return True


def read_ledger(path: str | Path) -> list[Finding]:
    """What stands in a ledger, as a list; see `iter_ledger`, which needs no memory for all of it."""
    return list(iter_ledger(path))


def iter_ledger(path: str | Path) -> Iterator[Finding]:
    """What stands in a ledger, one after the other, also of a job that was killed, or that still runs.

    A line that was cut off, by a kill in the middle of a write or by a full disk, is left out, and a warning names it.
    What a newer version has written beside the fields of `Finding` is left out, too.

    Args:
        path: of the file, as given to `protect`. With "{rank}" in its name, the files of all ranks, rank by rank: each
            has the findings of the whole job.

    Yields:
        The findings, in the order in which they were written.

    Raises:
        OSError: a file cannot be read, or no rank has one.
        ValueError: a line is whole, but no finding.
    """
    return itertools.chain.from_iterable(map(_findings, ledger_files(path)))


def ledger_files(path: str | Path) -> list[Path]:
    """Return the files that a path stands for, as given to `protect`: those of all ranks where it has "{rank}".

    Raises:
        FileNotFoundError: no rank has a file.
    """
    path = str(path)
    if "{rank}" not in path:
        return [Path(path)]
    # Only a number in the place of every "{rank}", the same one.
    first, *others = map(re.escape, path.split("{rank}"))
    name = re.compile(f"{first}([0-9]+)" + r"\1".join(others))
    candidates = glob.glob("*".join(map(glob.escape, path.split("{rank}"))))
    found = {match[1]: Path(match[0]) for match in map(name.fullmatch, candidates) if match}
    if not found:
        raise FileNotFoundError(f"path must be a ledger, got {path}, for which no rank has a file")
    return [found[rank] for rank in sorted(found, key=int)]


_FIELDS = Finding.__dataclass_fields__.keys()


def _findings(path: Path) -> Iterator[Finding]:
    decode = json.JSONDecoder().decode
    names: dict[str, str] = {}  # of hosts: each is kept once
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                fields = decode(line.decode("ascii"))
            except ValueError:
                if line.strip():
                    logger.warning("ledger %s: line %d was cut off, and is left out", path, number)
                continue
            try:
                if not fields.keys() <= _FIELDS:
                    fields = {name: value for name, value in fields.items() if name in _FIELDS}
                fields["host"] = names.setdefault(fields["host"], fields["host"])
                yield Finding(**fields)
            except (AttributeError, KeyError, TypeError):
                raise ValueError(f"path must be a ledger, got {path} with line {number}: {line[:100]!r}") from None

"""The ledger: a file with one line of JSON for each finding of a guard."""

from __future__ import annotations

import glob
import itertools
import json
import logging
import os
import re
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

logger = logging.getLogger("draco_ext")


@dataclass(frozen=True)
class Finding:
    """One worker's wrong or missing message in one bucket of one step, or its wrong state; a line of the ledger.

    Attributes:
        time: seconds since the epoch.
        step: the guard's step, from 0.
        bucket: DDP's number of the bucket; DDP makes new buckets after the first step. Under FSDP2, the number of the
            module's reduction in the backward pass.
        worker: the worker's number in the code.
        rank: the worker's rank in the process group; under FSDP2 the number of the replica.
        host: the name of the rank's host, or of the replica's hosts.
        elements: the number of elements that differ from the right message; None if it is unknown.
        first: the index of the first of them.
        largest: the largest absolute deviation; None also if it is not finite.
        failed: whether the bucket could not be decoded. Then the suspicion is not certain, and only the ledger has it.
        missing: whether the message did not arrive in time; this is not a suspicion.
        kind: "gradient" (a wrong message), "data" (a wrong message from a rank that itself reports other inputs than
            the ranks with the same part), "missing", "undecided" (a code's second stage did without the worker's part,
            since more than s workers with it are wrong and nobody can say which; this is not a suspicion), "state"
            (other parameters, buffers or optimizer state than the majority; the bucket is -1), or, found by an audit,
            "persistent" or "transient" (a wrong gradient that was wrong again when it was computed again, or was not;
            the bucket is -1).
        ranks: under FSDP2, where `rank` is a replica: the ranks of the job whose shards of the message were wrong. One
            bad rank can spoil all shards of its replica, or one alone.
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
    ranks: list[int] = field(default_factory=list)


class Ledger:
    """A file to which findings are appended. Errors in writing never end the training.

    The file stays open. Every line is written immediately, so a killed process leaves complete lines, except for the
    last one. If the file is removed or renamed, for instance by log rotation, a new one is created.

    Args:
        path: the file, relative to the current folder at the time of this call. Its folder is created.

    Attributes:
        unwritten: the number of findings that could not be written.

    Raises:
        OSError: the file cannot be opened for writing.
    """

    def __init__(self, path: Path) -> None:
        self.unwritten = 0
        self._torn = False  # whether the last line has no end
        self._path = path.absolute()
        self._close: weakref.finalize[[int], Ledger] | None = None
        self._open()

    def append(self, finding: Finding) -> None:
        """Append a finding. If that fails, count it and log the first error."""
        line = json.dumps(asdict(finding)).encode() + b"\n"
        try:
            if not self._is_there():
                self._open()
            # After a truncated line (of a killed process, or because of a full disk) begin a new one.
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
        """Return whether the open file is still the one at the path."""
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
        except OSError:  # writable, but not readable
            return True


def read_ledger(path: str | Path) -> list[Finding]:
    """Return the findings in a ledger as a list; see `iter_ledger`, which needs less memory."""
    return list(iter_ledger(path))


def iter_ledger(path: str | Path) -> Iterator[Finding]:
    """Iterate over the findings in a ledger, also in that of a job that was killed or that still runs.

    Truncated lines, from a process killed during a write or from a full disk, are left out; a warning names them.
    Fields that newer versions have added to `Finding` are left out, too.

    Args:
        path: the file, as given to `protect`. With "{rank}" in its name, the files of all ranks are read in order; each
            has the findings of the whole job.

    Yields:
        The findings, in the order in which they were written.

    Raises:
        OSError: a file cannot be read, or no rank has one.
        ValueError: a complete line is not a finding.
    """
    return itertools.chain.from_iterable(map(_findings, ledger_files(path)))


def ledger_files(path: str | Path) -> list[Path]:
    """Return the files of a ledger's path as given to `protect`; with "{rank}" in it, the files of all ranks.

    Raises:
        FileNotFoundError: no rank has a file.
    """
    path = str(path)
    if "{rank}" not in path:
        return [Path(path)]
    # The same number in place of every "{rank}".
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
    names: dict[str, str] = {}  # of hosts, so that each name is in memory only once
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

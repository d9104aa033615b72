"""The set-up handshake, in which ranks compare their settings before they train together."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from draco_ext.protocol.groups import gather_json


def exchange_setup(
    setup: Mapping[str, Any], host: str, ledger_problem: str | None, group: dist.ProcessGroup, device: torch.device
) -> list[str]:
    """Compare the ranks' set-ups and return the names of their hosts.

    Args:
        setup: the settings that must be the same on all ranks, by the name that errors give them.
        host: the name of this rank's host.
        ledger_problem: why this rank's ledger cannot be opened, or None.
        group: the process group of all ranks.
        device: the device on which the group communicates.

    Raises:
        ValueError: settings differ, a ledger cannot be opened, or a rank sends something else. All ranks raise it
            together; the message names the rank.
    """
    mine = {"setup": setup, "host": host, "ledger": ledger_problem}
    everybody = gather_json(mine, group, device)
    for rank, other in enumerate(everybody):
        if not (
            isinstance(other, dict)
            and other.keys() == mine.keys()
            and isinstance(other["setup"], dict)
            and isinstance(other["host"], str)
            and len(other["host"]) < 256
            and other["host"].isprintable()
        ):
            raise ValueError(f"ranks must send their set-up, got something else from rank {rank}")
    first = everybody[0]["setup"]
    for rank, other in enumerate(everybody):
        for name in {**first, **other["setup"]}:
            here, there = other["setup"].get(name), first.get(name)
            if here != there:
                raise ValueError(
                    f"{name} must be the same on all ranks, got {here!r} on rank {rank} and {there!r} on rank 0"
                )
    for rank, other in enumerate(everybody):
        if other["ledger"] is not None:
            raise ValueError(f"ledger must be a file that can be written, got on rank {rank} {other['ledger']!r}")
    return [other["host"] for other in everybody]


def digest_of_layout(named_parameters: Iterable[tuple[str, Tensor]]) -> str:
    """Return a digest of everything that determines DDP's buckets: the names, shapes and dtypes of the parameters."""
    named = [(name, p) for name, p in named_parameters if p.requires_grad]
    # torch.compile adds a prefix of its own to all names.
    return sha256_of([(name.replace("_orig_mod.", ""), list(p.shape), str(p.dtype)) for name, p in named])


def sha256_of(value: Any) -> str:
    """Return the SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()

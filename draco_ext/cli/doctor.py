"""``draco doctor``, which tests whether ranks compute the same bits."""

from __future__ import annotations

import platform
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch.nn.functional import cross_entropy

from draco_ext._version import __version__
from draco_ext.cli.digits import Digits, make_net
from draco_ext.cli.train_report import processor
from draco_ext.ops import build_info
from draco_ext.protocol.groups import gather_json
from draco_ext.testing.local import all_ranks, own_device, run_ranks
from draco_ext.training.reproducibility import SelfTest, self_test


@dataclass(frozen=True)
class Facts:
    """The properties of a rank that influence the last bits of a gradient."""

    host: str
    processor: str
    instruction_set: str
    torch: str
    threads: int
    python: str


@dataclass(frozen=True)
class Diagnosis:
    """The common result of the ranks."""

    facts: list[Facts]
    result: SelfTest


def diagnose(workers: int) -> Diagnosis:
    """Run the test on local ranks, or on torchrun's ranks, which all get the result."""
    found: list[Diagnosis] = []
    run_ranks(_rank, workers, found.append)
    return found[0]


def _rank(rank: int, report: Callable[[Any], None]) -> None:
    device = own_device()
    name = processor() if device.type == "cpu" else torch.cuda.get_device_name(device)
    facts = Facts(
        socket.gethostname(),
        name,
        str(build_info()["instruction_set"]),
        torch.__version__,
        torch.get_num_threads(),
        platform.python_version(),
    )
    everybody = [Facts(**other) for other in gather_json(asdict(facts), all_ranks(), device)]
    batch = Digits(seed=0, device=device).train[:256]
    net = make_net(seed=0).to(device)
    result = self_test(net, all_ranks(), batch, lambda net, batch: cross_entropy(net(batch[0]), batch[1]))
    report(Diagnosis(everybody, result))


def as_json(diagnosis: Diagnosis) -> dict[str, Any]:
    """Return the diagnosis with the versions and the build of this process, for programs and for issues."""
    return {
        "draco_ext": __version__,
        "system": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "build": build_info(),
        "ranks": [asdict(fact) for fact in diagnosis.facts],
        "result": asdict(diagnosis.result) | {"text": str(diagnosis.result)},
    }


def make_table(facts: list[Facts]) -> Table:
    """Return a table of the ranks, in which differences between ranks are marked."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("rank", justify="right")
    names = list(Facts.__dataclass_fields__)
    for name in names:
        table.add_column(name.replace("_", " "))
    usual = {name: max(values := [getattr(f, name) for f in facts], key=values.count) for name in names}
    for rank, fact in enumerate(facts):
        cells = []
        for name in names:
            value = getattr(fact, name)
            differs = name != "host" and value != usual[name]
            cells.append(f"[red]{value}[/red]" if differs else str(value))
        table.add_row(str(rank), *cells)
    return table

"""The tables of docs/guarantee.md about naming: the faults that the cyclic code leaves out, and those that it names.

``python bench/naming.py`` prints them, with machine and date, in less than a minute; ``--write`` also updates the page.
"""

from __future__ import annotations

import argparse
import datetime
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import draco_ext
from draco_ext import CyclicCode
from draco_ext.cli.train_report import processor
from draco_ext.reporting.evidence import LEAST_DECODES, Evidence

TESTS = Path(__file__).resolve().parent.parent / "python_tests"
sys.path[:0] = [str(TESTS), str(TESTS / "kernels")]

CODES = [(7, 2), (15, 3), (64, 3), (64, 5), (255, 1), (255, 8)]
SIZES = [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0]
LENGTH = 1000
PAGE = Path(__file__).resolve().parent.parent / "docs" / "guarantee.md"

# f(honest message, another honest message, random numbers) -> message to send
Fault = Callable[[Tensor, Tensor, torch.Generator], Tensor]


def one_bit(message: Tensor, other: Tensor, generator: torch.Generator) -> Tensor:
    """Flip a random bit of a random element."""
    sent = message.clone()
    place, bit = (int(torch.randint(high, (), generator=generator)) for high in (message.numel(), 32))
    sent.view(torch.int32)[place] ^= 2**bit - 2**32 * (bit == 31)
    return sent


def zeroed_run(message: Tensor, other: Tensor, generator: torch.Generator) -> Tensor:
    """Set 16 consecutive elements, as many as fit in a cache line, to 0."""
    sent = message.clone()
    place = int(torch.randint(message.numel() - 16, (), generator=generator))
    sent[place : place + 16] = 0
    return sent


NATURAL: dict[str, Fault] = {
    "one bit flipped": one_bit,
    "16 elements zeroed": zeroed_run,
    "rounded to bfloat16": lambda message, other, generator: message.bfloat16().float(),
    "of the step before": lambda message, other, generator: other,
    "scaled by 2": lambda message, other, generator: 2 * message,
}


def wrong_element(size: float) -> Fault:
    """Return a fault that adds an error to one element; its size is relative to the message's norm."""

    def fault(message: Tensor, other: Tensor, generator: torch.Generator) -> Tensor:
        sent = message.clone()
        sent[int(torch.randint(message.numel(), (), generator=generator))] += size * message.norm()
        return sent

    return fault


def wrong_everywhere(size: float) -> Fault:
    """Return a fault that adds random errors to all elements; their norm is relative to the message's norm."""

    def fault(message: Tensor, other: Tensor, generator: torch.Generator) -> Tensor:
        error = torch.randn(message.shape, generator=generator)
        return message + size * message.norm() / error.norm() * error

    return fault


@dataclass
class Counts:
    """The counts of the results of decodes with the same kind of fault."""

    decodes: int = 0
    left_out: int = 0
    named: int = 0
    honest_named: int = 0
    failed: int = 0
    worst: float = 0.0
    evidence: Evidence = field(default_factory=Evidence)

    def add(self, out: draco_ext.Decoded, bad: list[int], mean: Tensor) -> None:
        """Count a decode; it counts as left out or named if all bad workers are."""
        self.decodes += 1
        self.failed += bool(out.failed)
        if out.failed:
            return
        suspects, left_out = (set(mask.nonzero().flatten().tolist()) for mask in (out.suspects, out.left_out))
        self.left_out += left_out >= set(bad)
        self.named += suspects >= set(bad)
        self.honest_named += not suspects <= set(bad)
        self.worst = max(self.worst, ((out.gradient.double() - mean).norm() / mean.norm()).item())
        self.evidence.add(left_out, suspects)


class Scene:
    """A code with honest messages of random gradients, and those of the step before."""

    def __init__(self, n: int, s: int, generator: torch.Generator) -> None:
        self.code = CyclicCode(n, s)
        self.generator = generator
        gradients = torch.randn(n, LENGTH, generator=generator)
        before = 0.5 * gradients + torch.randn(n, LENGTH, generator=generator)
        self.mean = gradients.double().mean(0)
        self.honest, self.before = (
            torch.stack([self.code.encode(j, parts[list(self.code.assignment(j))]) for j in range(n)])
            for parts in (gradients, before)
        )

    def decode(self, counts: Counts, fault: Fault, bad: list[int]) -> None:
        """Decode with faults in some workers, drawn for each of them."""
        sent = self.honest.clone()
        for j in bad:
            sent[j] = fault(self.honest[j], self.before[j], self.generator)
        counts.add(draco_ext.decode(sent, self.code), bad, self.mean)


def natural(trials: int, generator: torch.Generator, total: Counts) -> Iterator[list[str]]:
    """Yield rows for one bad worker, another one after every eighth of the trials; also count all decodes in total."""
    faults = NATURAL
    faults |= {f"one element, {size:.0e}": wrong_element(size) for size in SIZES}
    faults |= {f"all elements, {size:.0e}": wrong_everywhere(size) for size in SIZES}
    scenes = [Scene(n, s, generator) for n, s in CODES]
    yield ["fault of one worker", *(f"{n}, {s}" for n, s in CODES)]
    for name, fault in faults.items():
        row = [name]
        for scene in scenes:
            counts = Counts()
            for trial in range(trials):
                if trial % math.ceil(trials / 8) == 0:
                    bad = int(torch.randint(scene.code.workers, (), generator=generator))
                scene.decode(counts, fault, [bad])
            row.append(cell(counts))
            total.honest_named += counts.honest_named
            total.failed += counts.failed
            total.decodes += counts.decodes
        yield row


def evidence(generator: torch.Generator) -> Iterator[list[str]]:
    """Yield rows with the number of decodes until a worker with one wrong element in each is probable or named."""
    yield ["one element, size", *(f"{n}, {s}" for n, s in CODES)]
    scenes = [Scene(n, s, generator) for n, s in CODES]
    for size in SIZES:
        row = [f"{size:.0e}"]
        for scene in scenes:
            counts, bad, said = Counts(), int(torch.randint(scene.code.workers, (), generator=generator)), "-"
            for decode in range(1, 10 * LEAST_DECODES):
                scene.decode(counts, wrong_element(size), [bad])
                assert counts.evidence.probable.keys() <= {bad}, "an honest worker is probable"
                if counts.named or counts.evidence.probable:
                    said = f"{decode} ({'named' if counts.named else 'probable'})"
                    break
            row.append(said)
        yield row


def colluders(trials: int, generator: torch.Generator) -> Iterator[list[str]]:
    """Yield rows for s colluding workers, adjacent or spread, with errors in directions that checks see least."""
    from test_guarantee import misplace, weak_direction

    codes = [(15, 3), (64, 3), (64, 5)]
    rng = np.random.default_rng(generator.initial_seed())
    yield ["error of each", *(f"{n}, {s} {how}" for n, s in codes for how in ("adjacent", "spread"))]
    scenes = [Scene(n, s, generator) for n, s in codes]
    for size in SIZES:
        row = [f"{size:.0e}"]
        for scene in scenes:
            n, s = scene.code.workers, scene.code.adversaries
            norm = scene.honest[0].norm().item()
            for apart in (1, n // s):
                counts = Counts()
                for trial in range(trials):
                    first = int(rng.integers(n))
                    bad = [(first + i * apart) % n for i in range(s)]
                    kind = ("most damage", "near-codeword", "weak")[trial % 3]
                    error = weak_direction(scene.code, bad, kind, rng)
                    error /= np.abs(error).max()
                    sent = misplace(scene.honest, bad, error, {int(rng.integers(LENGTH // 2)): 1.0}, size * norm)
                    counts.add(draco_ext.decode(sent, scene.code), bad, scene.mean)
                row.append(cell(counts))
        yield row


def cell(counts: Counts) -> str:
    """Return a cell: per cent left out / named, the worst error, and results that must not occur."""
    said = f"{percent(counts.left_out, counts.decodes)} / {percent(counts.named, counts.decodes)}, {counts.worst:.0e}"
    if counts.honest_named:
        said += f", honest named {counts.honest_named}"
    return said + (f", failed {counts.failed}" if counts.failed else "")


def percent(count: int, of: int) -> str:
    """Return a percentage that is never rounded to 0 or 100."""
    return f"{min(max(round(100 * count / of), int(count > 0)), 100 - (count < of))}"


def table(rows: Iterator[list[str]]) -> str:
    """Return the rows as Markdown; each row is also printed immediately."""
    lines = []
    for row in rows:
        lines.append(f"| {' | '.join(row)} |")
        if len(lines) == 1:
            lines.append(f"| --- | {' | '.join(['---:'] * (len(row) - 1))} |")
        print("\n".join(lines[-2 if len(lines) == 2 else -1 :]), flush=True)
    print()
    return "\n".join(lines) + "\n"


def write(tables: list[str], sentences: list[tuple[str, str]]) -> None:
    """Write tables and sentences into docs/guarantee.md; a table replaces the one with the same first cell."""
    text = PAGE.read_text()
    for new in tables:
        sentences = [*sentences, (rf"{re.escape(new.split(' |')[0])} \|.*\n(\|.*\n)+", new)]
    for pattern, new in sentences:
        text, count = re.subn(pattern, new.replace("\\", r"\\"), text)
        if count != 1:
            raise SystemExit(f"{PAGE} must have one place for {pattern}, got {count}")
    PAGE.write_text(text)


def main() -> None:
    """Print the tables, or write them into docs/guarantee.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=200, help="decodes for each number")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="into docs/guarantee.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(options.seed)
    begin = time.time()
    total = Counts()
    tables = [
        table(natural(options.trials, generator, total)),
        table(evidence(generator)),
        table(colluders(options.trials, generator)),
    ]
    summary = (
        f"In {total.decodes} decodes an honest worker was named {total.honest_named} times, and {total.failed} failed."
    )
    command = f"`python bench/naming.py --write --trials {options.trials} --seed {options.seed}`"
    made = (
        f"(All three tables: {processor()}, torch {torch.__version__}, {datetime.date.today()}, {command}, "
        f"{time.time() - begin:.0f} s.)"
    )
    print(summary, made, sep="\n")
    if options.write:
        write(tables, [(r"In \d+ decodes an honest .* failed\.", summary), (r"\(All three tables: .*\)", made)])


if __name__ == "__main__":
    main()

"""Messages of workers, and rules that compute one gradient from them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import draco_ext
from draco_ext import baselines
from draco_ext.cli.bench import peers
from draco_ext.testing.attacks import ATTACKS

ERROR_D = 10**5
EXACT = 1e-6  # the largest relative error of a decoded float32 gradient


@dataclass(frozen=True)
class Workload:
    """The float32 messages of n workers for a gradient of d elements, with a code or without."""

    device: str
    n: int
    d: int
    code: draco_ext.Code | None

    @property
    def parts(self) -> int:
        """The number of gradients."""
        return self.n if self.code is None else self.code.parts

    def build(self, series: int = 0) -> Tensor:
        """Return the honest messages, built part by part, so that no more than one gradient is in memory beside them.

        Every series has other gradients.
        """
        n, code = self.n, self.code
        assigned = [(j,) if code is None else code.assignment(j) for j in range(n)]
        messages = torch.zeros(n, self.d, device=self.device)
        carry = torch.zeros(self.d, device=self.device)
        for part in range(self.parts):
            gradient = part_gradient(self.device, part + self.n * series, self.d)
            for worker in (j for j in range(n) if part in assigned[j]):
                if code is None:
                    messages[worker] = gradient
                else:
                    # One vector of rounding errors is enough, since these parts do not cancel.
                    first = part == min(assigned[worker])
                    code.encode_add_(messages[worker], carry.zero_(), gradient, worker, part, first=first)
        return messages

    @property
    def size(self) -> str:
        """The numbers of messages and elements in a short form."""
        return f"{self.n}x{self.d:.3g}".replace("e+0", "e")

    def honest_mean(self) -> Tensor:
        """Return the honest mean of series 0."""
        total = torch.zeros(self.d, dtype=torch.float64, device=self.device)
        for part in range(self.parts):
            total += part_gradient(self.device, part, self.d)
        return total / self.parts


def _randn(device: str, d: int, seed: int) -> Tensor:
    return torch.randn(d, device=device, generator=torch.Generator(device).manual_seed(seed))


@functools.lru_cache(maxsize=1)
def common_gradient(device: str, d: int) -> Tensor:
    """Return the gradient that all parts of the batch have in common."""
    return _randn(device, d, 2**31)


def part_gradient(device: str, part: int, d: int) -> Tensor:
    """Return a part's gradient: the common one, and noise of the same size."""
    return _randn(device, d, part).add_(common_gradient(device, d))


def reverse(messages: Tensor, workers: Iterable[int], late: bool = False) -> None:
    """Reverse the messages of some workers, in place; only the last element if `late`."""
    for worker in workers:
        bad = messages[worker, -1:] if late else messages[worker]
        bad.copy_(ATTACKS["reversed"](bad, generator=torch.Generator()))


@contextlib.contextmanager
def reversed_workers(messages: Tensor, workers: Sequence[int], late: bool = False) -> Iterator[None]:
    """Reverse the messages of some workers within this context."""
    honest = messages[list(workers)]
    reverse(messages, workers, late)
    try:
        yield
    finally:
        messages[list(workers)] = honest


Apply = Callable[[Tensor, Any], Tensor]  # the rule says which class of code, or None


@dataclass(frozen=True)
class Rule:
    """A rule, which has one line in the table for every size.

    Attributes:
        name: its name in the table.
        apply: (messages, code) -> gradient.
        code: the class of code that makes the messages, or None.
        adversaries: the number of bad workers for which the code is made.
        reversed: the workers that send a reversed message while the rule is timed. The error is always measured with
            reversed messages; if this is empty, with those of the first workers, as many as the rule allows.
        late: whether only the last element of their messages is reversed.
        slow: whether it is timed less often.
        decodes: whether its result is a gradient, whose error can be measured.
        peer: the rule of another library that it calls, or None.
        bounded: whether its gradient need not be the honest mean although the messages are those of a code.
    """

    name: str
    apply: Apply
    code: type[draco_ext.Code] | None = None
    adversaries: int = 1
    reversed: Sequence[int] = ()
    late: bool = False
    slow: bool = False
    decodes: bool = True
    peer: peers.Peer | None = None
    bounded: bool = False

    @property
    def own(self) -> bool:
        """Return whether it is a rule of this library."""
        return self.apply in (decode, decode_expecting, decode_into, decode_beyond, encode)

    @property
    def slug(self) -> str:
        """The name in a form that pytest -k accepts."""
        return "-".join(re.findall(r"\w+", self.name.replace("=", "")))


@functools.cache
def workload(device: str, n: int, d: int, code: type[draco_ext.Code] | None, adversaries: int) -> Workload:
    """Return the workload; rules with the same messages share one, so that it is built once."""
    return Workload(device, n, d, None if code is None else code(n, adversaries))


def decode(messages: Tensor, code: draco_ext.Code) -> Tensor:
    """Decode as in a step in which bad workers, if any, are new."""
    return draco_ext.decode(messages, code).gradient


def decode_expecting(messages: Tensor, code: draco_ext.Code) -> Tensor:
    """Decode as in a step in which the bad workers are those of the step before."""
    expected = torch.arange(code.workers, device=messages.device) < code.adversaries
    return draco_ext.decode(messages, code, expected=expected).gradient


@functools.lru_cache(maxsize=1)
def _result(device: torch.device, dtype: torch.dtype, d: int) -> Tensor:
    return torch.empty(d, dtype=dtype, device=device)


def decode_into(messages: Tensor, code: draco_ext.Code) -> Tensor:
    """Decode into a gradient that is there already, as a bucket is; see `decode`."""
    out = _result(messages.device, messages.dtype, messages.size(1))
    return draco_ext.decode(messages, code, out=out).gradient


def decode_beyond(messages: Tensor, code: draco_ext.Code) -> Tensor:
    """Decode the repetition code's messages with a second stage."""
    return draco_ext.decode(messages, REPETITION(code.workers, code.adversaries, beyond="median")).gradient


def encode(messages: Tensor, code: draco_ext.Code) -> Tensor:
    """Encode a worker's message; the messages serve as the gradients of its parts."""
    return code.encode(0, messages[: code.redundancy])


def baseline(name: str) -> Apply:
    """Return one of `baselines.AGGREGATORS` as a rule, for one bad worker."""
    return lambda messages, code: baselines.AGGREGATORS[name](messages, 1)


REPETITION, CYCLIC = draco_ext.RepetitionCode, draco_ext.CyclicCode
ONE_READ = Rule("one read", lambda messages, code: messages.sum(), decodes=False)


def vote_torch(messages: Tensor, code: draco_ext.Code) -> Tensor:
    """Apply the majority vote in plain torch."""
    return baselines.vote_torch(messages, code.redundancy)[0]


def others(n: int, with_peers: bool) -> list[Rule]:
    """Return the rules to compare with: plain torch and, if wanted, other libraries."""
    sorting = ("coordinate-median", "trimmed-mean")
    medians = ("geometric-median", "geometric-median-gram")
    rules = [
        Rule(name, baseline(name), slow=name in sorting or name == "geometric-median") for name in baselines.AGGREGATORS
    ]
    # Timed with reversed messages, since its number of iterations depends on the messages.
    rules += [Rule(f"{name}, 1 reversed", baseline(name), reversed=(0,), slow=True) for name in medians]
    if with_peers:
        for peer in peers.PEERS:
            rules.append(Rule(peer.name, peer.apply, slow=True, peer=peer))
            if peer.iterates:
                rules.append(Rule(f"{peer.name}, 1 reversed", peer.apply, reversed=(0,), slow=True, peer=peer))
    return rules


def votes(n: int) -> list[Rule]:
    """Return the majority vote, and the same in plain torch, which is slower if workers are bad."""
    sizes = draco_ext.RepetitionCode(n, 1).group_sizes
    liars = tuple(itertools.accumulate(sizes[:-1], initial=0))  # one bad worker in every group
    kinds: dict[str, dict[str, Any]] = {
        "": {},
        f", {len(liars)} reversed": {"reversed": liars},
        f", {len(liars)} in their last element": {"reversed": liars, "late": True},
    }
    rules = [Rule(f"vote s=1{kind}", decode, REPETITION, **how) for kind, how in kinds.items()]
    rules.insert(1, Rule("vote s=1, out=", decode_into, REPETITION))
    if len(sizes) > 2:
        rules.append(Rule("vote s=1, then median", decode_beyond, REPETITION, bounded=True, slow=True))
    if n % 3 == 0:
        name = "vote s=1 in plain torch"
        rules += [Rule(f"{name}{kind}", vote_torch, REPETITION, slow=True, **how) for kind, how in kinds.items()]
    return rules


def cyclic_rules(n: int) -> list[Rule]:
    """Return the cyclic decode without bad workers, with new ones, and with those of the step before."""
    return [
        rule
        for s in ((1, 5) if n == 45 else (1,))
        for rule in (
            Rule(f"cyclic s={s}", decode, CYCLIC, s),
            Rule(f"cyclic s={s}, out=", decode_into, CYCLIC, s),
            Rule(f"cyclic s={s}, {s} reversed", decode, CYCLIC, s, reversed=range(s)),
            Rule(f"cyclic s={s}, {s} reversed, expected", decode_expecting, CYCLIC, s, reversed=range(s)),
        )
    ]


def relative_error(rule: Rule, device: str, n: int) -> float | None:
    """Return a rule's error on reversed messages, relative to the honest mean; None if it computes no gradient."""
    if not rule.decodes:
        return None
    load = workload(device, n, ERROR_D, rule.code, rule.adversaries)
    messages = load.build()
    reverse(messages, rule.reversed or range(rule.adversaries), rule.late)
    honest = load.honest_mean()
    error = float((rule.apply(messages, load.code).double() - honest).norm() / honest.norm())
    assert rule.code is None or rule.bounded or error <= EXACT
    return error


def cases(device: str, sizes: list[tuple[int, int]], rules: Callable[[int], list[Rule]]) -> dict[str, object]:
    """Return cases for metafunc.parametrize: all sizes and rules, those with the same messages next to each other."""
    pairs = [(workload(device, n, d, rule.code, rule.adversaries), rule) for n, d in sizes for rule in rules(n)]
    ids = [f"{load.size}-{rule.slug}" for load, rule in pairs]
    return {"argnames": ("messages", "rule"), "argvalues": pairs, "ids": ids, "indirect": ["messages"]}

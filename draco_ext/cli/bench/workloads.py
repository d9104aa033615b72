"""Messages as workers send them, and rules that make one gradient of them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

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
    """float32 messages of n workers for a gradient of d elements, made by a code or by none."""

    device: str
    n: int
    d: int
    code: draco_ext.Code | None

    @property
    def parts(self) -> int:
        """How many gradients there are."""
        return self.n if self.code is None else self.code.parts

    def build(self, series: int = 0) -> Tensor:
        """The honest messages, part by part: beside them exists no more than one gradient.

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
                    # One room for what rounding leaves: these parts do not cancel.
                    first = part == min(assigned[worker])
                    code.encode_add_(messages[worker], carry.zero_(), gradient, worker, part, first=first)
        return messages

    @property
    def size(self) -> str:
        """Messages and elements, short."""
        return f"{self.n}x{self.d:.3g}".replace("e+0", "e")

    def honest_mean(self) -> Tensor:
        """Of the series 0."""
        total = torch.zeros(self.d, dtype=torch.float64, device=self.device)
        for part in range(self.parts):
            total += part_gradient(self.device, part, self.d)
        return total / self.parts


def _randn(device: str, d: int, seed: int) -> Tensor:
    return torch.randn(d, device=device, generator=torch.Generator(device).manual_seed(seed))


@functools.lru_cache(maxsize=1)
def common_gradient(device: str, d: int) -> Tensor:
    """What all parts of the batch have in common."""
    return _randn(device, d, 2**31)


def part_gradient(device: str, part: int, d: int) -> Tensor:
    """What all parts of the batch have in common, and as much noise."""
    return _randn(device, d, part).add_(common_gradient(device, d))


def reverse(messages: Tensor, workers: Iterable[int], late: bool = False) -> None:
    """Makes workers bad, in place; in the last element alone if late."""
    for worker in workers:
        bad = messages[worker, -1:] if late else messages[worker]
        bad.copy_(ATTACKS["reversed"](bad, generator=torch.Generator()))


@contextlib.contextmanager
def reversed_workers(messages: Tensor, workers: Sequence[int], late: bool = False) -> Iterator[None]:
    """Makes workers bad for a while."""
    honest = messages[list(workers)]
    reverse(messages, workers, late)
    try:
        yield
    finally:
        messages[list(workers)] = honest


Apply = Callable[[Tensor, draco_ext.Code | None], Tensor]


@dataclass(frozen=True)
class Rule:
    """One line of the table for every size.

    Attributes:
        name: as in the table.
        apply: (messages, code) -> gradient.
        code: the class of code that makes the messages, or None.
        adversaries: how many bad workers the code is made for.
        reversed: who sends a reversed message while the rule is timed. For the error somebody always does: the first
            workers, as many as the rule is told of, where nobody is named here.
        late: whether only the last element of their messages is reversed.
        slow: to be timed less often.
        decodes: whether what it gives is a gradient, whose error can be looked at.
        peer: whose code it is, where it is another library's.
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

    @property
    def own(self) -> bool:
        """Whether it is this library's."""
        return self.apply in (decode, decode_expecting, decode_into, encode)

    @property
    def slug(self) -> str:
        """The name in a form that pytest -k understands."""
        return "-".join(re.findall(r"\w+", self.name.replace("=", "")))


@functools.cache
def workload(device: str, n: int, d: int, code: type[draco_ext.Code] | None, adversaries: int) -> Workload:
    """One object for all rules with the same messages: they are built once."""
    return Workload(device, n, d, code and code(n, adversaries))


def decode(messages: Tensor, code: draco_ext.Code) -> Tensor:
    """As in a step in which bad workers, if any, are new."""
    return draco_ext.decode(messages, code).gradient


def decode_expecting(messages: Tensor, code: draco_ext.Code) -> Tensor:
    """As in every step of a run but the first in which a worker is bad."""
    expected = torch.arange(code.workers, device=messages.device) < code.adversaries
    return draco_ext.decode(messages, code, expected=expected).gradient


@functools.lru_cache(maxsize=1)
def _result(device: torch.device, dtype: torch.dtype, d: int) -> Tensor:
    return torch.empty(d, dtype=dtype, device=device)


def decode_into(messages: Tensor, code: draco_ext.Code) -> Tensor:
    """Decode into a gradient that is there already, as a bucket is; see `decode`."""
    out = _result(messages.device, messages.dtype, messages.size(1))
    return draco_ext.decode(messages, code, out=out).gradient


def encode(messages: Tensor, code: draco_ext.Code) -> Tensor:
    """A worker's message; any rows will do as the gradients of its parts."""
    return code.encode(0, messages[: code.redundancy])


def baseline(name: str) -> Apply:
    """One of `baselines.AGGREGATORS`, told that one worker is bad."""
    return lambda messages, code: baselines.AGGREGATORS[name](messages, 1)


REPETITION, CYCLIC = draco_ext.RepetitionCode, draco_ext.CyclicCode
ONE_READ = Rule("one read", lambda messages, code: messages.sum(), decodes=False)


def vote_torch(messages: Tensor, code: draco_ext.Code) -> Tensor:
    """The majority vote in plain torch."""
    return baselines.vote_torch(messages, code.redundancy)[0]


def others(n: int, with_peers: bool) -> list[Rule]:
    """What people use instead: plain torch and, where wanted, the libraries that they install."""
    sorting = ("coordinate-median", "trimmed-mean")
    medians = ("geometric-median", "geometric-median-gram")
    rules = [
        Rule(name, baseline(name), slow=name in sorting or name == "geometric-median") for name in baselines.AGGREGATORS
    ]
    # The number of iterations depends on the messages.
    rules += [Rule(f"{name}, 1 reversed", baseline(name), reversed=(0,), slow=True) for name in medians]
    if with_peers:
        for peer in peers.PEERS:
            rules.append(Rule(peer.name, peer.apply, slow=True, peer=peer))
            if peer.iterates:
                rules.append(Rule(f"{peer.name}, 1 reversed", peer.apply, reversed=(0,), slow=True, peer=peer))
    return rules


def votes(n: int) -> list[Rule]:
    """The majority vote, and the same in plain torch, which has to look further where somebody lies."""
    sizes = draco_ext.RepetitionCode(n, 1).group_sizes
    liars = tuple(itertools.accumulate(sizes[:-1], initial=0))  # one in every group
    kinds = {
        "": {},
        f", {len(liars)} reversed": {"reversed": liars},
        f", {len(liars)} in their last element": {"reversed": liars, "late": True},
    }
    rules = [Rule(f"vote s=1{kind}", decode, REPETITION, **how) for kind, how in kinds.items()]
    rules.insert(1, Rule("vote s=1, out=", decode_into, REPETITION))
    if n % 3 == 0:
        name = "vote s=1 in plain torch"
        rules += [Rule(f"{name}{kind}", vote_torch, REPETITION, slow=True, **how) for kind, how in kinds.items()]
    return rules


def cyclic_rules(n: int) -> list[Rule]:
    """The cyclic decode when nobody is bad, when bad workers are new, and when they are those of the step before."""
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
    """Of the rule on reversed messages, against the mean of the honest gradients; None for what makes none."""
    if not rule.decodes:
        return None
    load = workload(device, n, ERROR_D, rule.code, rule.adversaries)
    messages = load.build()
    reverse(messages, rule.reversed or range(rule.adversaries), rule.late)
    honest = load.honest_mean()
    error = ((rule.apply(messages, load.code).double() - honest).norm() / honest.norm()).item()
    assert rule.code is None or error <= EXACT
    return error


def cases(device: str, sizes: list[tuple[int, int]], rules: Callable[[int], list[Rule]]) -> dict[str, object]:
    """For metafunc.parametrize: every size with every rule, those with the same messages as neighbours."""
    pairs = [(workload(device, n, d, rule.code, rule.adversaries), rule) for n, d in sizes for rule in rules(n)]
    ids = [f"{load.size}-{rule.slug}" for load, rule in pairs]
    return {"argnames": ("messages", "rule"), "argvalues": pairs, "ids": ids, "indirect": ["messages"]}

"""Attacks: the messages that bad workers send instead of honest ones.

An attack is an immutable, callable object with settings. `ATTACKS` holds one of each kind with
default settings, by the name used on the command line; `make_attack` changes settings::

    attack = make_attack("reversed", scale=10.0)
    sent = attack(message, generator=torch.Generator().manual_seed(0))
"""

from __future__ import annotations

import abc
import dataclasses
import math
from dataclasses import dataclass
from statistics import NormalDist
from typing import ClassVar

import torch
from torch import Tensor

from draco_ext import _checks, ops

# The integer type as which the bits of a float are accessed.
_BITS = {
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


@dataclass(frozen=True)
class Attack(abc.ABC):
    """The base class of attacks. Calling an attack returns the corrupted message.

    Attributes:
        omniscient: whether the attack uses the honest messages.
    """

    omniscient: ClassVar[bool] = False

    def __call__(self, message: Tensor, *, generator: torch.Generator, honest: Tensor | None = None) -> Tensor:
        """Return the message that a bad worker sends.

        Args:
            message: (d,), this worker's honest message; float16, bfloat16, float32 or float64.
            generator: the source of all random numbers; the same state gives the same message.
            honest: (m, d), the messages of the honest workers or estimates of them, for omniscient
                attacks. Without it, they estimate from this worker's own message.

        Returns:
            A new tensor of the same shape, dtype and device; for an empty message, an empty one.

        Raises:
            TypeError: an argument has the wrong type or dtype.
            ValueError: an argument has the wrong shape or device.
        """
        _checks.check_tensor("message", message, 1, ops.VOTE_DTYPES)
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator must be a torch.Generator, got {type(generator).__name__}")
        if honest is not None:
            _checks.check_tensor("honest", honest, 2, ops.VOTE_DTYPES, like=message)
            if honest.size(0) == 0 or honest.size(1) != message.size(0):
                raise ValueError(
                    f"honest must be of shape (m, {message.size(0)}) with m >= 1, got {tuple(honest.shape)}"
                )
        sent = message.clone(memory_format=torch.contiguous_format)
        return self._corrupt(sent, generator, honest) if sent.numel() else sent

    @abc.abstractmethod
    def _corrupt(self, message: Tensor, generator: torch.Generator, honest: Tensor | None) -> Tensor:
        """Return the corrupted message; `message` is a non-empty contiguous copy that may be changed."""


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype to compute in: float32 for 16-bit types."""
    return torch.promote_types(dtype, torch.float32)


def _draw(high: int, count: int, generator: torch.Generator) -> list[int]:
    """Return random integers from 0 to high - 1."""
    drawn = torch.randint(high, (count,), generator=generator, device=generator.device)
    return drawn.tolist()


def _flip_bits(elements: Tensor, bits: list[int]) -> None:
    """Flip these bits (0 is the lowest) of every element, in place."""
    integers = elements.view(_BITS[elements.dtype])
    width = 8 * elements.element_size()
    mask = sum(1 << bit for bit in bits)
    # The mask as a signed integer of that width, whose top bit is negative.
    mask -= (mask >> (width - 1)) << width
    integers.bitwise_xor_(mask)


@dataclass(frozen=True)
class Reversed(Attack):
    """The reversed and scaled gradient: -scale * message.

    With scale 1 it is the sign flip of Li et al., "RSA", 2019 (arXiv 1811.03761).

    Source: the "reversed gradient" adversary of DRACO (arXiv 1803.09877), with its scale.
    """

    scale: float = 100.0

    def _corrupt(self, message: Tensor, generator: torch.Generator, honest: Tensor | None) -> Tensor:
        return message.mul_(-self.scale)


@dataclass(frozen=True)
class Constant(Attack):
    """A constant: every element is the same value, which may be NaN or infinity.

    Source: the "constant" adversary of DRACO (arXiv 1803.09877), with its value.
    """

    value: float = -100.0

    def _corrupt(self, message: Tensor, generator: torch.Generator, honest: Tensor | None) -> Tensor:
        return message.fill_(self.value)


@dataclass(frozen=True)
class Gaussian(Attack):
    """Large Gaussian noise in place of the message.

    Source: Blanchard et al., "Machine Learning with Adversaries", 2017 (arXiv 1703.02757),
    with its standard deviation.
    """

    std: float = 200.0

    def _corrupt(self, message: Tensor, generator: torch.Generator, honest: Tensor | None) -> Tensor:
        noise = torch.randn(
            message.shape,
            generator=generator,
            device=generator.device,
            dtype=_wide(message.dtype),
        )
        return message.copy_(noise.mul_(self.std))


@dataclass(frozen=True)
class LittleIsEnough(Attack):
    """A little is enough: mean - z * std over the honest messages, coordinate by coordinate.

    The shift hides within the variation of the honest messages. If z is None and workers and
    adversaries are given, z is the paper's largest shift for which the bad workers and those honest
    ones that lie farther out are a majority: Phi(z) = (n - m - s) / (n - m) for n workers, m of them
    bad, and s = floor(n / 2 + 1) - m. It is at least 0, which is its value if few workers are bad.
    If none of them is given, z is 1.5, as in the paper's experiments.

    With fewer than two honest messages, mean is the worker's own message, and std the standard
    deviation over that message's elements.

    Source: Baruch et al., "A Little Is Enough", 2019 (arXiv 1902.06156).
    """

    z: float | None = None
    workers: int | None = None
    adversaries: int | None = None

    omniscient: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if (self.workers is None) != (self.adversaries is None):
            raise ValueError(
                "workers and adversaries must be given together, got "
                f"workers={self.workers}, adversaries={self.adversaries}"
            )
        if self.workers is not None:
            _checks.check_workers(self.workers, self.adversaries)
            _checks.check_int("adversaries", self.adversaries, 1)

    def largest_shift(self) -> float:
        """The shift z that is used."""
        if self.z is not None:
            return self.z
        if self.workers is None or self.adversaries is None:  # of which both are given, or none
            return 1.5
        honest = self.workers - self.adversaries
        supporters = self.workers // 2 + 1 - self.adversaries
        return max(0.0, NormalDist().inv_cdf((honest - supporters) / honest))

    def _corrupt(self, message: Tensor, generator: torch.Generator, honest: Tensor | None) -> Tensor:
        wide = _wide(message.dtype)
        if honest is None or honest.size(0) < 2:
            mean = message.to(wide)
            std = mean.std(correction=0)
        else:
            std, mean = torch.std_mean(honest.to(wide), dim=0, correction=0)
        return message.copy_(mean - self.largest_shift() * std)


@dataclass(frozen=True)
class InnerProduct(Attack):
    """Inner product manipulation: -epsilon times the mean of the honest messages.

    The sum over all workers then points away from the true gradient, while a small epsilon keeps
    the message close to the honest ones. Without honest messages, the worker's own message
    estimates their mean.

    Source: Xie et al., "Fall of Empires", 2019 (arXiv 1903.03936).
    """

    epsilon: float = 0.5

    omniscient: ClassVar[bool] = True

    def _corrupt(self, message: Tensor, generator: torch.Generator, honest: Tensor | None) -> Tensor:
        wide = _wide(message.dtype)
        mean = message.to(wide) if honest is None else honest.mean(dim=0, dtype=wide)
        return message.copy_(mean.mul(-self.epsilon))


@dataclass(frozen=True)
class BitFlip(Attack):
    """One flipped bit in one random element: the smallest fault there is.

    Attributes:
        bit: the number of the bit; 0 is the lowest of the mantissa. None is the highest of the
            exponent, which makes an element below 2 in magnitude huge.

    Source: the single event upset of fault injection; see Hochschild et al., "Cores that don't
    count", 2021.
    """

    bit: int | None = None

    def _corrupt(self, message: Tensor, generator: torch.Generator, honest: Tensor | None) -> Tensor:
        width = 8 * message.element_size()
        bit = width - 2 if self.bit is None else self.bit
        _checks.check_int("bit", bit, 0, width - 1)
        (element,) = _draw(message.size(0), 1, generator)
        _flip_bits(message[element : element + 1], [bit])
        return message


@dataclass(frozen=True)
class ZeroedRun(Attack):
    """Runs of consecutive zeros, like results that were lost or never written.

    Attributes:
        runs: the number of runs, each at a random place.
        length: the number of elements of a run (the whole message if it is shorter).

    Source: a corruption type of silent data corruption; see Dixit et al., "Silent Data Corruptions
    at Scale", 2021 (arXiv 2102.11245), and arXiv 2605.04213.
    """

    runs: int = 4
    length: int = 256

    def __post_init__(self) -> None:
        _checks.check_int("runs", self.runs, 1)
        _checks.check_int("length", self.length, 1)

    def _corrupt(self, message: Tensor, generator: torch.Generator, honest: Tensor | None) -> Tensor:
        places = max(1, message.size(0) - self.length + 1)
        for start in _draw(places, self.runs, generator):
            message[start : start + self.length] = 0
        return message


@dataclass(frozen=True)
class MultiBitFlip(Attack):
    """The same random flipped bits in every 32nd element, as a bad lane of a GPU's warp causes them.

    Attributes:
        bits: the number of distinct bits that flip.
        period: the distance between the elements; the first of them is random.

    Source: "The Anatomy of Silent Data Corruption", 2026 (arXiv 2605.04213): most bit-flip events
    flip several bits, and the addresses are periodic with the warp.
    """

    bits: int = 3
    period: int = 32

    def __post_init__(self) -> None:
        _checks.check_int("bits", self.bits, 1, 16)
        _checks.check_int("period", self.period, 1)

    def _corrupt(self, message: Tensor, generator: torch.Generator, honest: Tensor | None) -> Tensor:
        width = 8 * message.element_size()
        order = torch.randperm(width, generator=generator, device=generator.device)
        (start,) = _draw(min(self.period, message.size(0)), 1, generator)
        _flip_bits(message[start :: self.period], order[: self.bits].tolist())
        return message


@dataclass(frozen=True)
class SmallBias(Attack):
    """A relative bias below 1e-3: (1 + bias) * message, too small to show in a norm or a loss.

    It is computed in float32 or wider and then rounded. So it does not change bfloat16, whose
    spacing is 4e-3 or more, and changes float16 only in some elements.

    Source: the small deviations of silent data corruption in training; see Ma et al.,
    "Understanding Silent Data Corruption in LLM Training", 2025 (arXiv 2502.12340).
    """

    bias: float = 5e-4

    def __post_init__(self) -> None:
        if not 0 < abs(self.bias) < 1e-3:
            raise ValueError(f"bias must be below 1e-3 in magnitude and not 0, got {self.bias}")

    def _corrupt(self, message: Tensor, generator: torch.Generator, honest: Tensor | None) -> Tensor:
        return message.copy_(message.to(_wide(message.dtype)) * (1 + self.bias))


ATTACKS: dict[str, Attack] = {
    "reversed": Reversed(),
    "constant": Constant(),
    "gaussian": Gaussian(),
    "sign-flip": Reversed(scale=1.0),
    "little-is-enough": LittleIsEnough(),
    "inner-product": InnerProduct(),
    "bit-flip": BitFlip(),
    "nan": Constant(value=math.nan),
    "inf": Constant(value=math.inf),
    "zeroed-run": ZeroedRun(),
    "multi-bit-flip": MultiBitFlip(),
    "small-bias": SmallBias(),
}
"""One attack of each kind with its default settings, by name."""


def make_attack(name: str, **settings: float | int | None) -> Attack:
    """Return the attack of this name with settings other than the defaults.

    Args:
        name: a key of `ATTACKS`.
        **settings: fields of the attack, for instance ``scale`` of "reversed".

    Returns:
        The attack.

    Raises:
        ValueError: there is no such attack, or a setting is out of range.
        TypeError: the attack has no such setting.
    """
    if name not in ATTACKS:
        raise ValueError(f"name must be one of {', '.join(ATTACKS)}, got {name!r}")
    attack = ATTACKS[name]
    known = [field.name for field in dataclasses.fields(attack)]
    for setting in settings:
        if setting not in known:
            raise TypeError(f"{name} has the settings {', '.join(known)}, got {setting!r}")
    return dataclasses.replace(attack, **settings)

"""What hypothesis draws: codes, gradients of every scale and layout, and what bad and missing workers do."""

import dataclasses
import math

import torch
from conftest import ATTACKS, attacked, honest_messages
from hypothesis import strategies as st

from draco_ext import CyclicCode, RepetitionCode, SolonCode, ops

MOST_WORKERS = 11
# Decimal exponents of a layer's scale: from denormal to as large as every attack leaves room for. A float64 cyclic
# message counts as zero below 1e-60, where a float32 one does not yet.
EXPONENTS = {
    torch.float16: (-7, 2),
    torch.bfloat16: (-40, 30),
    torch.float32: (-44, 30),
    torch.float64: (-50, 250),
}
# Around the widths of vectors, blocks and chunks; odd ones; and just beyond a tile.
LENGTHS = st.one_of(
    st.integers(1, 70),
    st.sampled_from([255, 256, 257, 1023, 1024, 1025, 1026, 2047, 3001]),
    st.sampled_from([255, 257, 1025, ops.TILE - 1, ops.TILE + 1, ops.TILE + 2]),
)
seeds = st.integers(0, 2**32 - 1)
FAINT = "faint"  # an attack beside conftest's: see faint()
KINDS = (*ATTACKS, FAINT)


@st.composite
def codes(draw, kinds=(RepetitionCode, CyclicCode), least_adversaries=0):
    """A code of one of these kinds with few workers."""
    s = draw(st.integers(least_adversaries, 4))
    kind = draw(st.sampled_from(kinds))
    more = (draw(st.integers(1, min(4, MOST_WORKERS - 2 * s))),) if kind is SolonCode else ()
    return kind(draw(st.integers(2 * s + sum(more or (1,)), MOST_WORKERS)), s, *more)


def dtypes(code):
    """A dtype of messages that the code takes."""
    return st.sampled_from(ops.VOTE_DTYPES if isinstance(code, RepetitionCode) else ops.CYCLIC_DTYPES)


@st.composite
def gradients(draw, code, dtype=None):
    """(parts, d): one to four layers, each of a scale of its own or zero; -0 stands here and there."""
    dtype = draw(dtypes(code)) if dtype is None else dtype
    d = draw(LENGTHS)
    drawn = torch.randn(code.parts, d, generator=torch.Generator().manual_seed(draw(seeds)), dtype=torch.float64)
    layers = draw(st.lists(st.none() | st.integers(*EXPONENTS[dtype]), min_size=1, max_size=4))
    for layer, exponent in zip(drawn.tensor_split(len(layers), dim=1), layers, strict=True):
        layer *= 0 if exponent is None else 10.0**exponent
    drawn[:, 3::11] = -0.0
    return drawn.to(dtype)


def faint(message, generator):
    """The message too large by one part in 2^4, or by as little as its last bits: some of it near the cyclic noise."""
    last = round(-math.log2(torch.finfo(message.dtype).eps))
    return message * (1 + 2.0 ** -int(torch.randint(4, last + 1, (), generator=generator)))


@dataclasses.dataclass(frozen=True)
class Adversary:
    """Who is bad in which way, and who is missing."""

    attacks: dict[int, str]  # worker -> name in KINDS
    missing: tuple[int, ...]
    seed: int

    @property
    def bad(self):
        return set(self.attacks)

    def mask(self, workers):
        """The mask of the missing, or None where nobody is."""
        if not self.missing:
            return None
        mask = torch.zeros(workers, dtype=torch.bool)
        mask[list(self.missing)] = True
        return mask

    def apply(self, messages):
        """The messages as they come in; missing rows hold NaN, which must not be looked at."""
        sent = messages.clone()
        for kind in sorted(set(self.attacks.values())):
            who = [j for j, own in self.attacks.items() if own == kind]
            colluders = torch.Generator().manual_seed(self.seed)  # across kinds too they agree on one message
            if kind == FAINT:
                sent[who] = torch.stack([faint(message, colluders) for message in messages[who]])
            else:
                sent[who] = attacked(messages, who, kind, colluders)[who]
        sent[list(self.missing)] = torch.nan
        return sent


@st.composite
def adversaries(draw, code, within=True, kinds=KINDS):
    """An adversary that the code corrects, 2 * bad + missing <= 2s; otherwise one with more than s bad workers."""
    n, s = code.workers, code.adversaries
    count = draw(st.integers(0, s) if within else st.integers(s + 1, n))
    absent = draw(st.integers(0, 2 * (s - count))) if within else 0
    who = draw(st.permutations(range(n)))
    attacks = {j: draw(st.sampled_from(kinds)) for j in sorted(who[:count])}
    return Adversary(attacks, tuple(sorted(who[count : count + absent])), draw(seeds))


@dataclasses.dataclass(frozen=True)
class Round:
    """A code, its gradients, the honest messages for them, an adversary, and what comes in."""

    code: RepetitionCode | CyclicCode  # or a SolonCode, which is one
    gradients: torch.Tensor
    honest: torch.Tensor
    adversary: Adversary
    sent: torch.Tensor

    @property
    def d(self):
        return self.gradients.size(1)

    @property
    def mask(self):
        return self.adversary.mask(self.code.workers)

    def columns(self, which):
        """The same step of some columns of its messages alone, as a bucket carries it, or of all in another order."""
        padded = torch.nn.functional.pad(self.gradients, (0, self.sent.size(1) - self.d))
        return dataclasses.replace(
            self, gradients=padded[:, which], honest=self.honest[:, which], sent=self.sent[:, which]
        )

    def __repr__(self):
        layers = f"{tuple(self.gradients.shape)} {self.gradients.dtype}"
        return f"Round({self.code}, gradients {layers}, {self.adversary})"


@st.composite
def rounds(draw, kinds=(RepetitionCode, CyclicCode), within=True, least_adversaries=0, attacks=KINDS):
    """One step of training, with an adversary that the code corrects or one that is too many."""
    code = draw(codes(kinds, least_adversaries))
    own = draw(gradients(code))
    honest = honest_messages(code, own)
    adversary = draw(adversaries(code, within, attacks))
    return Round(code, own, honest, adversary, adversary.apply(honest))


@st.composite
def views(draw, matrix):
    """The same matrix as part of a larger one: rows further apart, at an offset, with NaN around them."""
    before, after = draw(st.integers(0, 70)), draw(st.integers(0, 70))
    every = draw(st.integers(1, 3))  # rows of the larger matrix for each of this one
    n, d = matrix.shape
    larger = torch.full((n * every, before + d + after), torch.nan, dtype=matrix.dtype)
    view = larger[::every, before : before + d]
    view.copy_(matrix)
    return view

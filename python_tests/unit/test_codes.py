"""What every code says of itself: `Code`'s public interface, on both codes and on one that a third party adds."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from conftest import attacked, honest_messages, named

import draco_ext
from draco_ext import ByzShieldCode, Code, CyclicCode, Decoded, RepetitionCode

CODES = [RepetitionCode(3, 1), RepetitionCode(11, 2), CyclicCode(3, 1), CyclicCode(7, 2), CyclicCode(10, 0)]
# Those whose messages are longer than a gradient, or whose gradient is not the mean.
CODES += [RepetitionCode(15, 1, beyond="median"), RepetitionCode(11, 1, beyond="trimmed-mean"), ByzShieldCode(9, 1)]


@pytest.mark.parametrize("code", CODES, ids=repr)
def test_who_computes_what(code):
    """Everything follows from the assignment, however it is asked."""
    assigned = {j: code.assignment(j) for j in range(code.workers)}
    for part in range(code.parts):
        assert code.holders(part) == tuple(j for j in assigned if part in assigned[j]) == Code.holders(code, part)
        assert len(code.holders(part)) >= code.redundancy
    assert all(code.parts_in_step(step, j) == assigned[j] for j in assigned for step in (0, 1, 10**6))
    assert sorted(j for group in code.replica_groups for j in group) == sorted(assigned)
    for group in code.replica_groups:
        assert {j for j in assigned if assigned[j] == assigned[group[0]]} == set(group)
    assert sorted(j for group in code.decoding_groups for j in group) == sorted(assigned)
    for argument in (-1, code.parts):
        with pytest.raises(ValueError, match=rf"part must be from 0 to {code.parts - 1}, got {argument}"):
            code.holders(argument)
    with pytest.raises(ValueError, match="step must be at least 0, got -1"):
        code.parts_in_step(-1, 0)
    with pytest.raises(ValueError, match="worker must be from"):
        code.parts_in_step(0, code.workers)


@pytest.mark.parametrize("code", CODES, ids=repr)
def test_as_many_bad_workers_as_adversaries_in_each_decoding_group(code, generator):
    messages = honest_messages(code, torch.randn(code.parts, 50, generator=generator))
    bad = [j for group in code.decoding_groups for j in group[: code.adversaries]]
    out = code.decode(attacked(messages, bad, "gaussian", generator), seed=1)
    assert not out.failed
    assert named(out.suspects) == set(bad)
    torch.testing.assert_close(out.gradient, code.decode(messages, seed=1).gradient)


@pytest.mark.parametrize("code", CODES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_dtypes_and_incremental_encoding(code, dtype, generator):
    assert (dtype in code.dtypes) == (dtype != torch.bfloat16 or code.exact)
    if dtype not in code.dtypes:
        return
    for d in (50, 51):
        length = code.message_length(d)
        gradients = torch.randn(code.parts, d, generator=generator).to(dtype)
        for worker in range(code.workers):
            message, carry = (torch.full((length,), torch.nan, dtype=dtype) for _ in range(2))
            for i, part in enumerate(code.assignment(worker)):
                added = code.encode_add_(message, carry, gradients[part], worker, part, first=i == 0)
                assert added is message
            whole = code.encode(worker, gradients[list(code.assignment(worker))])
            torch.testing.assert_close(message, whole, rtol=2 * torch.finfo(dtype).eps, atol=0)
            assert not code.message_is_gradient or torch.equal(message, gradients[code.assignment(worker)[0]])


def test_incremental_encoding_of_one_part():
    code, x = RepetitionCode(6, 1), torch.ones(4)
    with pytest.raises(ValueError, match="first must be True, got False: worker 5 computes one part"):
        code.encode_add_(x, x, torch.ones(4), 5, 1)
    with pytest.raises(ValueError, match="part must be from 1 to 1, got 0"):
        code.encode_add_(x, x, torch.ones(4), 5, 0, first=True)
    with pytest.raises(ValueError, match="gradient must have 4 elements, got 3"):
        code.encode_add_(x, x, torch.ones(3), 5, 1, first=True)


@pytest.mark.parametrize("code", CODES, ids=repr)
def test_projections_in_steps(code, generator):
    """Ranks that have one message each find together what a decode of all messages finds."""
    messages = torch.randn(code.workers, 100, generator=generator)
    if not code.uses_projections:
        for call in (
            lambda: code.project(messages, 1),
            lambda: code.locate(messages, messages, 100, dtype=torch.float32),
            lambda: code.combine(messages, messages[:, 0]),
        ):
            with pytest.raises(NotImplementedError, match="Code does not use projections"):
                call()
        return
    messages = honest_messages(code, torch.randn(code.parts, 100, generator=generator))
    bad = list(range(code.adversaries))
    sent = attacked(messages, bad, "reversed", generator)
    rows = [code.project(row[None], 7) for row in sent]
    projections, norms = (torch.cat(values) for values in zip(*rows, strict=True))
    weights, suspects, failed = code.locate(projections, norms, 100, dtype=sent.dtype)
    out = code.decode(sent, seed=7)
    assert not failed
    assert named(suspects) == named(out.suspects) == set(bad) == named(weights == 0)
    total = sum(code.combine(sent[j, None], weights[j, None]) for j in range(code.workers) if weights[j] != 0)
    torch.testing.assert_close(total, out.gradient)


@dataclass(frozen=True)
class Median(Code):
    """A third party's code: everybody computes everything, and the median of all messages counts."""

    dtypes: ClassVar = (torch.float32,)
    parts: ClassVar = 1

    def assignment(self, worker):
        self._check_worker(worker)
        return (0,)

    def message_length(self, d):
        return d

    def encode(self, worker, gradients, out=None):
        return gradients[0] if out is None else out.copy_(gradients[0])

    def encode_add_(self, message, carry, gradient, worker, part, *, first=False):
        return message.copy_(gradient)

    def decode(self, messages, *, missing=None, reduction="mean", seed=None, **options):
        self._check_decode(messages, reduction)
        gradient = messages.median(0).values
        suspects = (messages != gradient).any(1)
        failed = suspects.sum() > self.adversaries
        return Decoded(gradient, suspects, failed, suspects, self)

    def error_bound(self, dtype, *, length=None, probability=1e-6):
        return 0.0


def test_a_code_of_a_third_party(generator):
    code = Median(5, 2)
    messages = honest_messages(code, torch.randn(1, 30, generator=generator))
    out = draco_ext.decode(attacked(messages, (1, 3), "reversed", generator), code)
    assert torch.equal(out.gradient, messages[0])
    assert named(out.suspects) == {1, 3}
    assert code.replica_groups == code.decoding_groups == (code.holders(0),) == ((0, 1, 2, 3, 4),)
    assert code.noise_amplification() is None
    assert not any((code.exact, code.message_is_gradient, code.uses_projections))
    draco_ext.RedundantBatchSampler(10, code, batch_size=2, rank=0, seed=0)
    with pytest.raises(ValueError, match="messages must have a row for each of the 5 workers"):
        draco_ext.decode(messages[:4], code)

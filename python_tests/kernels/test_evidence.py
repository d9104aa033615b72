"""Evidence over steps: a rank whose errors are too small for one decode to name it is named by many; no honest one."""

import numpy as np
import pytest
import torch
from conftest import honest_messages, named
from test_guarantee import misplace, random_gradients, sets_of_bad, weak_direction

import draco_ext
from draco_ext import CyclicCode, RepetitionCode
from draco_ext.reporting.evidence import LEAST_DECODES, MOST_DECODES, Evidence, wilson

CODES = [CyclicCode(7, 2), CyclicCode(15, 3), CyclicCode(64, 3), CyclicCode(64, 5), CyclicCode(255, 1)]


def gather(code, messages, decodes=2 * LEAST_DECODES):
    """The evidence of so many decodes, of messages(trial)."""
    evidence = Evidence()
    for trial in range(decodes):
        out = draco_ext.decode(messages(trial), code)
        if not out.failed:
            assert named(out.suspects) <= named(out.left_out)
            evidence.add(named(out.left_out), named(out.suspects))
    return evidence


@pytest.mark.parametrize("code", CODES, ids=repr)
def test_one_wrong_element_near_the_noise(code, generator):
    """Of any size: a rank is named by decodes or by the evidence, or not left out; others never are."""
    honest = honest_messages(code, random_gradients(code, 1000, torch.float32, generator))
    bad = int(torch.randint(code.workers, (), generator=generator))
    probable = 0
    for size in (1e-6, 3e-6, 1e-5, 1e-4, 1e-3, 1e-2):

        def wrong(trial, size=size):
            sent = honest.clone()
            sent[bad, int(torch.randint(1000, (), generator=generator))] += size * honest[bad].norm()
            return sent

        evidence = gather(code, wrong)
        assert evidence.probable.keys() <= {bad}, size
        probable += bad in evidence.probable
    assert probable >= 1


@pytest.mark.parametrize("code", [CyclicCode(9, 1), *CODES[1:4]], ids=repr)
def test_no_honest_rank_is_probable_under_attack(code, generator):
    """Whoever colludes in the directions that checks see least, in all steps alike."""
    rng = np.random.default_rng(generator.initial_seed())
    honest = honest_messages(code, random_gradients(code, 100, torch.float32, generator))
    norm = honest[0].norm().item()
    for bad in sets_of_bad(code.workers, code.adversaries, rng):
        for kind in ("most damage", "near-codeword", "weak"):
            error = weak_direction(code, bad, kind, rng)
            for size in (1e-6, 1e-5, 1e-4):
                columns = {int(rng.integers(50)): 1.0}
                sent = misplace(honest, bad, error, columns, size * norm)
                evidence = gather(code, lambda trial, sent=sent: sent, LEAST_DECODES)
                assert evidence.probable.keys() <= set(bad), f"{bad} {kind} {size}"


def test_rules():
    evidence = Evidence()
    for _ in range(LEAST_DECODES - 1):
        evidence.add({3, 5}, {5})
        evidence.add({5}, {5})
    assert evidence.probable == {}
    evidence.add({3}, set())
    assert evidence.probable == {3: pytest.approx(wilson(LEAST_DECODES, LEAST_DECODES))}
    assert wilson(1, 1) < 0.5 < wilson(20, 20) < wilson(200, 200) < 1
    fresh = Evidence()
    fresh.load_state_dict(evidence.state_dict())
    assert fresh.probable == evidence.probable
    for _ in range(LEAST_DECODES):  # others are left out as well
        evidence.add({2, 3}, set())
    assert evidence.probable == {}
    for _ in range(4 * MOST_DECODES):  # what is long ago is forgotten
        evidence.add({4}, set())
    assert evidence.probable.keys() == {4}
    assert evidence.probable[4] > 0.95


def test_left_out_of_a_vote_are_the_suspects(generator):
    code = RepetitionCode(6, 1)
    messages = honest_messages(code, random_gradients(code, 10, torch.float32, generator))
    messages[4] += 1
    out = draco_ext.decode(messages, code)
    assert named(out.left_out) == named(out.suspects) == {4}


def test_erasures_are_not_left_out(generator):
    code = CyclicCode(7, 2)
    messages = honest_messages(code, random_gradients(code, 10, torch.float32, generator))
    messages[1] += 1
    missing = torch.tensor([j == 5 for j in range(7)])
    assert named(draco_ext.decode(messages, code, missing=missing).left_out) == {1}
    messages += torch.randn(messages.shape, generator=generator)
    out = draco_ext.decode(messages, code)
    assert out.failed
    assert not out.left_out.any()

"""The server's result in shards: relays that pass on something wrong or nothing, lie about others, are late, or die."""

import itertools
import random
import threading
from collections import Counter

import pytest
import torch
from test_server_pieces import (
    CODES,
    LENGTH,
    MISSING,
    PIECE,
    WRONG,
    Stage,
    check,
    gradients_of,
    run,
    sets_of_bad,
    truth,
)

from draco_ext import CyclicCode, RepetitionCode
from draco_ext.protocol import shards
from draco_ext.protocol.exchange import run_alone
from draco_ext.protocol.messages import GradientBuffer, Message
from draco_ext.protocol.shards import Relays, ShardExchange
from draco_ext.protocol.transports import server, verified
from draco_ext.protocol.transports.server import ServerTransport
from draco_ext.testing.communicator import FakeCommunicator, run_workers

pytestmark = pytest.mark.usefixtures("one_core")


@pytest.fixture(autouse=True)
def _small_results_in_shards(monkeypatch):
    monkeypatch.setattr(verified, "SMALL", 0)


@pytest.fixture
def lose_patience(monkeypatch):
    """A function by which all workers but themselves wait for these workers' shards as if the time had passed."""
    silent, inner = set(), ShardExchange._await

    def wait(self, awaited):
        lost = {j: place for j, place in awaited.items() if j in silent}
        return lost | inner(self, {j: place for j, place in awaited.items() if j not in silent})

    def lose(workers):
        silent.clear()
        silent.update(workers)

    monkeypatch.setattr(ShardExchange, "_await", wait)
    return lose


@pytest.fixture
def leaving(monkeypatch):
    """The numbers of elements of gradients that leave each worker."""
    counted, lock, inner = Counter(), threading.Lock(), FakeCommunicator.post

    def post(self, values, worker):
        if values.dtype == torch.float32 and self.worker != worker and 0 in (self.worker, worker):
            with lock:
                counted[self.worker] += values.numel()
        inner(self, values, worker)

    monkeypatch.setattr(FakeCommunicator, "post", post)
    return counted


def barred(stage):
    return set(stage.server._relays._barred_until)


def check_values(code, results, bad=()):
    """All honest workers have the right bits, and the same outcomes; return the outcomes."""
    for j, worker_results in enumerate(results):
        for number, (outcome, values) in enumerate(worker_results or ()):
            assert j in bad or torch.equal(values.view(torch.int32), truth(code, number).view(torch.int32))
            assert outcome == results[0][number][0]
    return [outcome for outcome, _ in results[0]]


def relays_of(code):
    return set(range(1, code.workers))


def is_exposed(code, worker, accusers):
    """More than s members of one group are among the accusers."""
    return any(len(set(members) & set(accusers) - {worker, 0}) > code.adversaries for members in code.decoding_groups)


# ----------------------------------------------------------------------------------------------------- elements


@pytest.mark.parametrize("code", [*CODES, RepetitionCode(9, 1), RepetitionCode(15, 2)], ids=repr)
def test_one_result_leaves_the_server(code, leaving):
    check(code, ())
    assert leaving[0] == LENGTH


def test_a_worker_alone_gets_the_result_whole(leaving):
    check(RepetitionCode(2, 0), ())
    assert leaving[0] == LENGTH


def test_a_late_worker_gets_the_result_whole_and_the_others_its_shard_from_each_other(leaving):
    _, second = check(RepetitionCode(6, 1), (), missing={4}, late={4: (PIECE,)}, exchanges=2)
    assert second.missing == ()
    assert leaving[0] == 3 * LENGTH


def test_results_go_whole_on_one_host(leaving):
    code = RepetitionCode(6, 1)
    messages = gradients_of(code, 0).repeat_interleave(torch.tensor(code.group_sizes), dim=0)
    results = run_workers(exchange_once, 6, code, messages, {"deadline": 30.0, "on_one_host": True})
    assert all(outcome.is_clean and torch.equal(values, truth(code)) for outcome, values in results)
    assert leaving[0] == 5 * LENGTH


def test_short_results_go_whole(leaving, monkeypatch):
    monkeypatch.setattr(verified, "SMALL", 4 * LENGTH)
    check(RepetitionCode(6, 1), ())
    assert leaving[0] == 5 * LENGTH


def exchange_once(communicator, code, messages, options):
    transport = ServerTransport(code, communicator, **options)
    buffer = GradientBuffer(torch.zeros(LENGTH), (LENGTH,), (0,), "bucket")
    outcome = run_alone(transport.exchange(Message(messages[communicator.worker].clone(), buffer), 0))
    return outcome, buffer.values


@pytest.mark.parametrize("is_cyclic", [True, False])
def test_messages_that_differ_by_nature_come_whole_and_go_in_shards(is_cyclic, leaving):
    code = CyclicCode(7, 2) if is_cyclic else RepetitionCode(7, 1)
    gradients = gradients_of(code, 0)
    if is_cyclic:
        length = code.message_length(LENGTH)
        messages = torch.stack([code.encode(j, gradients[list(code.assignment(j))]) for j in range(7)])
        options = {"deadline": 30.0}
    else:
        length = LENGTH
        messages = gradients.repeat_interleave(torch.tensor(code.group_sizes), dim=0)
        messages += 1e-6 * torch.randn(messages.shape)
        options = {"deadline": 30.0, "atol": 1e-4}
    results = run_workers(exchange_once, 7, code, messages, options)
    for outcome, values in results:
        assert outcome.is_clean
        assert torch.equal(values, results[0][1])
        assert torch.allclose(values, gradients.mean(0) if is_cyclic else truth(code), atol=1e-3)
    assert leaving[0] == length
    assert {leaving[j] for j in range(1, 7)} == {length}


# ----------------------------------------------------------------------------------------------------- wrong shards


def wrong_to_all(values, to):
    return values + 1


@pytest.mark.parametrize("code", CODES, ids=repr)
def test_every_set_of_workers_that_pass_on_wrong_shards(code):
    """They are suspects of the next bucket where more than s members of a group have told the server."""
    for bad in sets_of_bad(code):
        senders = bad - {0}
        stage = Stage()
        results = run(code, stage, passes=dict.fromkeys(senders, wrong_to_all), exchanges=3)
        first, second, third = check_values(code, results)
        assert first.suspects == third.suspects == {}
        exposed = {j for j in senders if is_exposed(code, j, relays_of(code))}
        assert second.suspects == dict.fromkeys(exposed)
        assert not any(outcome.failed or outcome.missing for outcome in (first, second, third))
        assert len(barred(stage) - senders) <= len(senders - exposed)


@pytest.mark.parametrize("code", [RepetitionCode(4, 1), RepetitionCode(6, 1)], ids=repr)
def test_wrong_shards_for_every_set_of_receivers(code):
    bad = code.workers - 1
    others = sorted(relays_of(code) - {bad})
    for count in range(1, len(others) + 1):
        for receivers in itertools.combinations(others, count):

            def pass_on(values, to, receivers=receivers):
                return values * 2 if to in receivers else values

            stage = Stage()
            _, second = check_values(code, run(code, stage, passes={bad: pass_on}, exchanges=2))
            exposed = is_exposed(code, bad, receivers)
            assert second.suspects.keys() == ({bad} if exposed else set())
            assert bad in barred(stage)
            assert len(barred(stage)) == (1 if exposed else 2)


def test_wrong_bits_that_only_a_digest_finds():
    def last_bit(values, to):
        values.view(torch.int32)[-1] ^= 1
        return values

    _, second = check_values(RepetitionCode(6, 1), run(RepetitionCode(6, 1), passes={5: last_bit}, exchanges=2))
    assert second.suspects == {5: None}


def test_shards_of_the_result_before():
    before = {}

    def replay(values, to):
        before.setdefault(to, []).append(values)
        return before[to][max(len(before[to]) - 2, 0)]

    code = RepetitionCode(6, 1)
    first, second, third = check_values(code, run(code, passes={5: replay}, exchanges=3))
    assert (first.suspects, second.suspects, third.suspects) == ({}, {}, {5: None})


# ------------------------------------------------------------------------------------------- claims about others


def say_all(*kinds):
    return lambda kind, values: torch.ones_like(values) if kind in kinds else values


@pytest.mark.parametrize("kinds", [(MISSING,), (WRONG,), (MISSING, WRONG)])
@pytest.mark.parametrize("code", CODES, ids=repr)
def test_false_claims_of_every_set_frame_nobody(code, kinds):
    for bad in sets_of_bad(code):
        liars, stage = bad - {0}, Stage()
        results = run(code, stage, tells=dict.fromkeys(liars, say_all(*kinds)), exchanges=2)
        outcomes = check_values(code, results)
        assert all(outcome.is_clean for outcome in outcomes)
        assert len(barred(stage) - liars) <= len(liars)


def test_a_claim_bars_both_and_they_get_results_whole(leaving):
    stage, code = Stage(), RepetitionCode(7, 1)

    def accuse(kind, values):
        if kind == WRONG:
            values[2] = 1  # of relays 1 to 6
        return values

    check_values(code, run(code, stage, tells={5: accuse}, exchanges=2))
    assert barred(stage) == {3, 5}
    assert leaving[0] == LENGTH + len(torch.empty(LENGTH).tensor_split(6)[2]) + 3 * LENGTH


@pytest.mark.parametrize("seed", range(4))
def test_relays_that_lie_at_random(seed, long):
    rng = random.Random(seed)

    def liar(own):
        def tell(kind, values):
            if kind in (MISSING, WRONG) and own.random() < 0.5:
                values[own.randrange(values.numel())] = own.randrange(256)
            return values

        def pass_on(values, to):
            if values.numel() and own.random() < 0.5:
                values[own.randrange(values.numel())] = own.choice((0.0, torch.nan, 1e-45))
            return values

        return tell, pass_on

    for _ in range(15 if long else 8):
        code = rng.choice([*CODES, RepetitionCode(10, 2)])
        bad = rng.choice(sets_of_bad(code)) - {0}
        lies = {j: liar(random.Random(rng.random())) for j in bad}
        stage = Stage()
        results = run(
            code,
            stage,
            tells={j: tell for j, (tell, _) in lies.items()},
            passes={j: pass_on for j, (_, pass_on) in lies.items()},
            exchanges=3,
        )
        for outcome in check_values(code, results, bad):
            assert not outcome.failed
            assert outcome.suspects.keys() <= bad
        assert len(barred(stage) - bad) <= len(bad)


# ------------------------------------------------------------------------------------------- silent, late and dead


def silence(values, to):
    return None


@pytest.mark.parametrize("code", CODES, ids=repr)
def test_every_set_of_silent_relays(code, lose_patience):
    """The others wait for them once, and get their shards from the server. Nobody is a suspect."""
    for bad in sets_of_bad(code):
        silent, stage = bad - {0}, Stage()
        lose_patience(silent)
        results = run(code, stage, passes=dict.fromkeys(silent, silence), exchanges=2)
        outcomes = check_values(code, results)
        assert all(outcome.is_clean for outcome in outcomes)
        assert len(barred(stage) - silent) <= len(silent)
        assert silent <= barred(stage) or silent == relays_of(code)


def test_what_comes_late_is_not_written_into_the_result(lose_patience):
    """A wrong shard that arrives when the server has got all pieces for the next exchange."""
    code, stage, seen = RepetitionCode(6, 1), Stage(), []
    lose_patience({5})

    def pass_on(values, to):
        def late():
            stage.wait_for(lambda: stage.rounds >= 4)  # after those of the first exchange: pieces, digests, shards
            seen.append(to)
            return values.fill_(7)

        return late

    check_values(code, run(code, stage, passes={5: pass_on}, exchanges=4))
    assert sorted(seen) == [1, 2, 3, 4]


@pytest.mark.parametrize("code", CODES, ids=repr)
def test_a_relay_that_is_late_with_its_report_gets_the_result_whole_and_catches_up(code, leaving):
    for worker in range(1, code.workers):
        leaving.clear()
        outcomes = check_values(code, run(code, late={worker: (MISSING,)}, exchanges=3))
        assert all(outcome.is_clean for outcome in outcomes)
        assert leaving[0] == 4 * LENGTH


@pytest.mark.parametrize("when", [MISSING, WRONG])
@pytest.mark.parametrize("passes_on", [True, False])
@pytest.mark.parametrize("code", [RepetitionCode(9, 1), RepetitionCode(10, 2)], ids=repr)
def test_relays_that_die(code, when, passes_on, lose_patience):
    """After or before they pass on their shard, up to 2s of a group; they are erasures from then on."""
    victims = code.replica_groups[1][: 2 * code.adversaries]
    passes = {}
    if not passes_on:
        lose_patience(victims)
        passes = dict.fromkeys(victims, silence)
    results = run(code, passes=passes, late=dict.fromkeys(victims, (when, "death")), exchanges=2)
    assert [j for j, result in enumerate(results) if result is None] == list(victims)
    first, second = check_values(code, results)
    assert first.is_clean
    assert second.missing == victims
    assert second.suspects == {}
    assert not second.failed


def test_the_key_leaves_when_all_relays_have_reported(monkeypatch):
    """And never to one that is late."""
    events, lock, inner = [], threading.Lock(), FakeCommunicator.post

    def post(self, values, worker):
        if self.worker == 0 and values.dtype == torch.int64 and values.numel() == 2:
            with lock:
                events.append((int(values[0]), worker))
        elif worker == 0 and values.dtype == torch.uint8:
            with lock:
                events.append(("report", self.worker))
        inner(self, values, worker)

    monkeypatch.setattr(FakeCommunicator, "post", post)
    code = RepetitionCode(7, 1)
    check_values(code, run(code, late={4: (MISSING,)}))
    keys = [i for i, (status, _) in enumerate(events) if status == server._CHECKED]
    reported = [worker for status, worker in events[: min(keys)] if status == "report"]
    assert {1, 2, 3, 5, 6} <= set(reported)  # and perhaps the late one, for which nobody waits
    assert sorted(events[i][1] for i in keys) == [1, 2, 3, 5, 6]


# ------------------------------------------------------------------------------------------------------- relays


GROUPS = ((0, 1, 2), (3, 4, 5, 6))


def claim(relays, by, about, *, is_wrong=True):
    members = tuple(range(1, 7))
    flags = torch.tensor([j in about for j in members], dtype=torch.uint8)
    handed_out = relays.hand_out(members, torch.zeros(6).tensor_split(6))
    return handed_out.shards_for(by, flags, is_wrong=is_wrong)


def test_shards_that_are_asked_for_are_returned_joined():
    relays = Relays(1, GROUPS)
    handed_out = relays.hand_out((1, 2, 3), torch.arange(7.0).tensor_split(3))
    flags = torch.tensor([1, 0, 7], dtype=torch.uint8)
    assert torch.equal(handed_out.shards_for(2, flags, is_wrong=True)[0], torch.tensor([0.0, 1, 2, 5, 6]))
    assert handed_out.shards_for(2, torch.zeros(3, dtype=torch.uint8), is_wrong=True) == ()


def test_both_are_barred_and_come_back(monkeypatch):
    monkeypatch.setattr(shards, "BARRED_FOR", 3)
    relays = Relays(1, GROUPS)
    assert relays.choose(range(1, 7)) == (1, 2, 3, 4, 5, 6)
    claim(relays, 1, {5})
    assert relays.judge() == []
    assert [relays.choose(range(1, 7)) for _ in range(2)] == [(2, 3, 4, 6)] * 2
    assert relays.choose(range(1, 7)) == (1, 2, 3, 4, 5, 6)


def test_more_than_s_of_one_group_bar_one_alone_and_name_it_once():
    relays = Relays(1, GROUPS)
    claim(relays, 1, {5})
    claim(relays, 3, {5})
    assert relays.judge() == []
    claim(relays, 2, {5})
    assert relays.judge() == [5]
    assert relays.judge() == []
    claim(relays, 3, {6})
    claim(relays, 4, {6})
    claim(relays, 2, {6}, is_wrong=False)
    assert relays.judge() == [6]


def test_missing_shards_name_nobody_and_those_of_late_workers_bar_nobody():
    relays = Relays(1, GROUPS)
    for by in (1, 2, 3, 4):
        claim(relays, by, {5}, is_wrong=False)
    assert relays.judge(late={5}) == []
    assert relays.choose(range(1, 7)) == (1, 2, 3, 4, 5, 6)
    for by in (1, 2, 3, 4):
        claim(relays, by, {5}, is_wrong=False)
    assert relays.judge() == []
    assert relays.choose(range(1, 7)) == (1, 2, 3, 4, 6)


def test_who_accuses_itself_is_not_heard():
    relays = Relays(1, GROUPS)
    claim(relays, 3, {3})
    assert relays.judge() == []
    assert relays.choose(range(1, 7)) == (1, 2, 3, 4, 5, 6)


@pytest.mark.parametrize("seed", range(5))
def test_liars_bar_no_more_others_than_they_are(seed):
    rng = random.Random(seed)
    for _ in range(200):
        bad = set(rng.sample(range(1, 3), 1) + rng.sample(range(3, 7), 1))
        relays = Relays(1, GROUPS)
        for _ in range(rng.randrange(1, 4)):
            spoiled = {(by, about) for by in range(1, 7) for about in bad if by not in bad and rng.random() < 0.5}
            for by in rng.sample(range(1, 7), 6):
                about = {a for a in range(1, 7) if rng.random() < 0.4} if by in bad else set()
                about |= {a for b, a in spoiled if b == by}
                claim(relays, by, about, is_wrong=rng.random() < 0.5)
            assert set(relays.judge()) <= bad
        relays.choose(())
        assert len(relays._barred_until.keys() - bad) <= len(bad)

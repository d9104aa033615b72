"""The model of `draco plan` against a count of what every transport sends, and its arithmetic."""

import threading

import pytest
import torch

from draco_ext import CyclicCode, RepetitionCode, ops
from draco_ext.cli import network_model
from draco_ext.cli.network_model import Network, Traffic, buckets, plain, traffic
from draco_ext.protocol.communicator import SHORT
from draco_ext.protocol.exchange import ExchangeScheduler, run_alone
from draco_ext.protocol.messages import GradientBuffer, Message
from draco_ext.protocol.transports import TRANSPORTS, make_transport, verified
from draco_ext.reporting.report import Seconds
from draco_ext.testing.communicator import FakeCommunicator, run_workers

pytestmark = pytest.mark.usefixtures("one_core")

REPETITION = [RepetitionCode(*arguments) for arguments in [(3, 1), (4, 1), (6, 1), (7, 1), (8, 1), (11, 2), (5, 0)]]
CYCLIC = [CyclicCode(*arguments) for arguments in [(3, 1), (7, 2)]]
CASES = [pytest.param(code, name, id=f"{code!r} {name}") for code in REPETITION + CYCLIC for name in TRANSPORTS]


@pytest.fixture
def sent(monkeypatch):
    """What all workers send, by the number of bytes in a message; sums count as a ring sends them."""
    counted, lock = [], threading.Lock()

    def size(values):
        return values.numel() * values.element_size()

    def counting(name, bytes_of):
        inner = getattr(FakeCommunicator, name)

        def call(self, values, *arguments, **keywords):
            with lock:
                counted.append(bytes_of(self, values))
            return inner(self, values, *arguments, **keywords)

        monkeypatch.setattr(FakeCommunicator, name, call)

    counting("post", lambda communicator, values: size(values))
    counting("all_gather", lambda communicator, values: (communicator.workers - 1) * size(values))
    counting("all_gather_p2p", lambda communicator, values: (communicator.workers - 1) * size(values))

    counting(
        "all_reduce", lambda communicator, values: (communicator.workers - 1) * 2 * size(values) / communicator.workers
    )
    counting("broadcast", lambda communicator, values: (communicator.workers - 1) * size(values) / communicator.workers)
    return counted


def exchange_all(communicator, code, name, lengths, dtype=torch.float32):
    """Exchange a bucket of each length, as in a backward pass, and the record of the step."""
    transport = make_transport(name, code, communicator)
    scheduler = ExchangeScheduler(Seconds())
    for number, length in enumerate(lengths):
        buffer = GradientBuffer(torch.zeros(length, dtype=dtype), (length,), (number,), "bucket")
        values = buffer.values if code.message_is_gradient else torch.zeros(code.message_length(length), dtype=dtype)
        scheduler.start(
            transport.exchange(Message(values, buffer), number), name="bucket", complete=lambda outcome: None
        )
    scheduler.complete_all()
    numbers = torch.zeros(8 + 2 * len(code.assignment(0)), dtype=torch.int64)
    run_alone(transport.gather_record(numbers))


LENGTHS = [[20_011], [16_385, 40_001, 100], [16_384, 1_100_003, 20_000, 20_000], [2**21 + 16_384, 2**21 + 16_385]]


@pytest.mark.parametrize(("code", "name"), CASES)
@pytest.mark.parametrize("lengths", LENGTHS, ids=repr)
def test_bytes_are_those_that_a_transport_sends(code, name, lengths, sent):
    run_workers(exchange_all, code.workers, code, name, lengths)
    modelled = traffic(code, name, lengths, 4) + network_model.record(code, name)
    assert sum(sent) == pytest.approx(modelled.sent, rel=1e-12)


@pytest.mark.parametrize("length", range(11))
@pytest.mark.parametrize("code", REPETITION, ids=repr)
def test_bytes_of_pieces_that_differ_in_length_or_are_empty(code, length, sent, monkeypatch):
    monkeypatch.setattr(verified, "SMALL", 0)
    monkeypatch.setattr(network_model, "SMALL", 0)
    for name in ("verified", "server"):
        run_workers(exchange_all, code.workers, code, name, [length], torch.bfloat16)
        modelled = traffic(code, name, [length], 2) + network_model.record(code, name)
        assert sum(sent) == pytest.approx(modelled.sent, rel=1e-12)
        sent.clear()


class Counting(FakeCommunicator):
    """Counts what one worker sends and receives straight, and how often it waits."""

    def __init__(self, inner):
        super().__init__(inner._network, inner.worker)
        self.leaving, self.arriving, self.messages, self.waits = [], [], 0, 0

    def exchange(self, leaving, arriving):
        short = {worker for values, worker in leaving if values.nbytes <= SHORT}  # of which each gets one message
        self.messages += len(short) + sum(values.nbytes > SHORT for values, _ in leaving)
        self.leaving += [values.numel() * values.element_size() for values, _ in leaving]
        self.arriving += [values.numel() * values.element_size() for values, _ in arriving]
        self.waits += bool(leaving or arriving)
        return super().exchange(leaving, arriving)


@pytest.mark.parametrize(
    "code", [RepetitionCode(*sizes) for sizes in [(3, 1), (6, 1), (7, 1), (9, 1), (15, 2), (16, 2)]], ids=repr
)
@pytest.mark.parametrize("length", [30_011, 900_011])
def test_messages_waits_and_the_busiest_link_of_the_verified_all_reduce(code, length):
    def work(communicator):
        counting = Counting(communicator)
        buffer = GradientBuffer(torch.zeros(length), (length,), (0,), "bucket")
        run_alone(make_transport("verified", code, counting).exchange(Message(buffer.values, buffer), 0))
        return counting

    counted = run_workers(work, code.workers)
    modelled = traffic(code, "verified", [length], 4)
    assert {each.waits for each in counted} == {modelled.waits} == {4 if code.parts == 1 else 6}
    assert max(each.messages for each in counted) == modelled.messages
    busiest = max(max(sum(each.leaving), sum(each.arriving)) for each in counted)
    assert modelled.link == pytest.approx(
        busiest, rel=0.01
    )  # where groups are uneven, checks and payload may peak apart
    assert modelled.link >= busiest


@pytest.mark.parametrize("code", [RepetitionCode(*sizes) for sizes in [(3, 1), (6, 1), (7, 1), (15, 2)]], ids=repr)
def test_digest_reads_of_the_verified_all_reduce(code, monkeypatch):
    """Bytes that one rank digests, the most of all ranks; the model also has one read for adding up."""
    length, digested = 30_011, [0] * code.workers
    inner, own = ops.digest, threading.local()

    def digest(values, seed):
        seeds = 1 if isinstance(seed, int) else len(seed)
        digested[own.worker] += values.numel() * values.element_size() * seeds
        return inner(values, seed)

    def work(communicator):
        own.worker = communicator.worker
        buffer = GradientBuffer(torch.zeros(length), (length,), (0,), "bucket")
        run_alone(make_transport("verified", code, communicator).exchange(Message(buffer.values, buffer), 0))

    monkeypatch.setattr(ops, "digest", digest)
    run_workers(work, code.workers)
    adding_up = 0 if code.parts == 1 else code.parts * -(-length // code.parts) * 4
    assert max(digested) + adding_up == traffic(code, "verified", [length], 4).reads


# ------------------------------------------------------------------------------------------ arithmetic


@pytest.mark.parametrize(
    ("sizes", "share"), [((3, 1), 0), ((6, 1), 0.6), ((9, 1), 0.75), ((15, 2), 5 / 7), ((64, 10), 0.677)]
)
def test_bytes_of_the_verified_all_reduce_relative_to_a_ring(sizes, share):
    code, lengths = RepetitionCode(*sizes), [25 * 10**6]
    ring = plain(code.workers, lengths, 4).sent
    assert traffic(code, "verified", lengths, 4).payload / ring == pytest.approx(share, abs=1e-3)


def test_ring_and_tree_of_plain_data_parallelism():
    assert plain(4, [100, 50], 4) == Traffic(3600, 0, 900.0, 12, 12, 0)
    assert plain(1024, [100], 4, tree=True).waits == 20
    assert plain(1024, [100], 4, tree=True).sent == plain(1024, [100], 4).sent


def test_time_is_the_sum_of_what_was_waited_sent_and_read():
    network = Network(latency=1.0, bandwidth=10.0, overhead=0.1, memory=100.0)
    assert Traffic(0, 0, 20.0, 5, 3, 400.0).seconds(network) == pytest.approx(3 + 2 + 0.5 + 4)


@pytest.mark.parametrize(("parameters", "item"), [(1, 4), (2**18, 4), (2**18 + 1, 4), (25 * 10**6, 2), (10**9, 8)])
def test_buckets_hold_all_parameters(parameters, item):
    lengths = buckets(parameters, item)
    assert sum(lengths) == parameters
    assert 0 < lengths[0] * item <= 2**20
    assert all(0 < length * item <= 25 * 2**20 for length in lengths[1:])


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    "code", [RepetitionCode(10_000, 1), RepetitionCode(10_000, 100), CyclicCode(10_000, 1)], ids=repr
)
def test_ten_thousand_workers(code, transport):
    lengths = buckets(10**9, 2)
    modelled = traffic(code, transport, lengths, 2)
    assert modelled.sent > 0
    assert 0 < modelled.seconds(Network()) < 10**6
    assert modelled.link >= modelled.sent / code.workers * (1 - 1e-9)

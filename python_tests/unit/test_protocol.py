"""The protocol between threads of this process: transports, keys, slices, the encoder and the scheduler."""

import itertools
import time

import pytest
import torch

from draco_ext import ByzShieldCode, CyclicCode, RepetitionCode, SolonCode, ops
from draco_ext.protocol import keys, messages
from draco_ext.protocol.communicator import Pending
from draco_ext.protocol.encoder import CHUNK, GradientEncoder
from draco_ext.protocol.exchange import (
    ExchangeScheduler,
    Gather,
    Swap,
    Turn,
    copy_to_host,
    join_bytes,
    run_alone,
    split_bytes,
)
from draco_ext.protocol.messages import GradientBuffer, Message
from draco_ext.protocol.transports import TRANSPORTS, allgather, make_transport, verified
from draco_ext.reporting.report import Seconds
from draco_ext.testing.communicator import run_workers

pytestmark = pytest.mark.usefixtures("one_core")

LENGTHS = (3, 60, 41)  # of the parameters in a bucket


def buffer_of(values, lengths=None):
    lengths = (values.numel(),) if lengths is None else tuple(lengths)
    return GradientBuffer(values, lengths, tuple(range(len(lengths))), "bucket")


def message_of(code, worker, seed, alter=None):
    """A message for a bucket, and the gradient that it is to become."""
    gradients = torch.randn(code.parts, sum(LENGTHS), generator=torch.Generator().manual_seed(seed))
    mine = gradients[list(code.assignment(worker))].split(LENGTHS, dim=1)
    values = torch.cat([code.encode(worker, piece.contiguous()) for piece in mine])
    if alter is not None:
        alter(values)
    return Message(values, buffer_of(torch.empty(sum(LENGTHS)), LENGTHS), blocks=code.blocks), gradients.mean(0)


def run_overlapped(transport, exchanges):
    """Return what exchanges return, overlapped as in a backward pass."""
    scheduler, returned = ExchangeScheduler(Seconds()), {}
    for i, exchange in enumerate(exchanges):
        scheduler.start(exchange, name=f"exchange {i}", complete=lambda result, i=i: returned.__setitem__(i, result))
    scheduler.complete_all()
    return [returned[i] for i in range(len(returned))]


# -------------------------------------------------------------------------------------------- transports


# What "verified" is for the cyclic code, and for the repetition code with a tolerance or a small message, by itself.
NAMES = (*TRANSPORTS, "allgather")


@pytest.fixture(autouse=True)
def _small_messages_in_pieces(monkeypatch):
    monkeypatch.setattr(verified, "SMALL", 0)


def transport_of(name, code, communicator, **options):
    if name == "allgather":
        return allgather.AllGather(code, communicator)
    return make_transport(name, code, communicator, **options)


CODES = [RepetitionCode(3, 1), RepetitionCode(7, 1), RepetitionCode(6, 0), CyclicCode(4, 1), CyclicCode(5, 2)]


def _add_one(values):
    values += 1


def _one_wrong_message(communicator, name, code, bad):
    transport = transport_of(name, code, communicator)
    own = [message_of(code, communicator.worker, i, _add_one if communicator.worker in bad else None) for i in range(3)]
    outcomes = run_overlapped(transport, [transport.exchange(message, i) for i, (message, _) in enumerate(own)])
    decoded = torch.stack([message.buffer.values for message, _ in own])
    apart = (decoded - torch.stack([truth for _, truth in own])).abs().max().item()
    return [outcome.suspects.keys() for outcome in outcomes], [outcome.failed for outcome in outcomes], decoded, apart


SHORT = [SolonCode(4, 1, 2), SolonCode(5, 1, 3), SolonCode(6, 2, 2), SolonCode(3, 0, 3)]  # messages


@pytest.mark.parametrize(
    ("code", "name"), [*itertools.product(CODES, NAMES), *((code, "server") for code in SHORT)], ids=repr
)
def test_every_set_of_bad_workers_changes_nothing(code, name):
    """Buckets that overlap; with the server, worker 0 is trusted, but its message is not."""
    for count in range(code.adversaries + 1):
        for bad in map(set, itertools.combinations(range(code.workers), count)):
            results = run_workers(_one_wrong_message, code.workers, name, code, bad)
            for suspects, failed, decoded, apart in results:
                assert suspects == [bad] * 3
                assert failed == [False] * 3
                assert torch.equal(decoded, results[0][2])
                assert apart < (1e-6 if code.exact else 1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_too_many_bad_workers_are_a_failure(name):
    def work(communicator):
        transport = transport_of(name, RepetitionCode(3, 1), communicator)

        def alter(values):
            values += communicator.worker

        message, _ = message_of(transport.code, communicator.worker, 1, alter)
        outcome = run_alone(transport.exchange(message, 0))
        return outcome.failed, message.buffer.values.isnan().all().item()

    assert run_workers(work, 3) == [(True, True)] * 3


def test_a_buffer_that_is_scaled_already_is_added_up_as_it_is():
    """The sum of messages that somebody else has scaled has the bits of that of messages that the transport scales."""

    def work(communicator):
        transport = transport_of("allreduce", RepetitionCode(3, 0), communicator)
        values = torch.randn(1001, generator=torch.Generator().manual_seed(communicator.worker))
        plain, scaled = buffer_of(values.clone()), buffer_of(values.mul(1 / 3))
        run_alone(transport.exchange(Message(plain.values, plain), 0))
        run_alone(transport.exchange(Message(scaled.values, scaled, buffer_holds_scaled_values=True), 1))
        return torch.equal(plain.values, scaled.values) and not torch.equal(plain.values, values)

    assert run_workers(work, 3) == [True] * 3


def _records(communicator, name):
    transport = transport_of(name, RepetitionCode(3, 1), communicator)
    gathered = []
    for step in range(3):  # in turns with buckets
        values = torch.full((5,), float(step))
        outcome = run_alone(transport.exchange(Message(values, buffer_of(values.clone())), step))
        record = torch.tensor([2**62 + communicator.worker, -step])
        rows, missing = run_alone(transport.gather_record(record))
        gathered.append((outcome.failed, rows.tolist(), missing))
    return gathered


@pytest.mark.parametrize("name", NAMES)
def test_every_rank_gets_the_same_records(name):
    expected = [(False, [[2**62 + j, -step] for j in range(3)], ()) for step in range(3)]
    assert run_workers(_records, 3, name) == [expected] * 3


def test_a_late_record_is_missing_and_its_worker_catches_up():
    def work(communicator):
        transport = transport_of("server", RepetitionCode(3, 1), communicator, deadline=0.5)
        gathered = []
        for step in range(2):
            if (communicator.worker, step) == (2, 0):
                time.sleep(1.5)
            rows, missing = run_alone(transport.gather_record(torch.tensor([7, communicator.worker])))
            gathered.append((rows.tolist(), missing))
            for connection in transport._connections.values():
                while connection._acknowledged < connection._sent:
                    time.sleep(0.01)
            communicator.all_gather(torch.zeros(1)).wait()
        return gathered

    assert run_workers(work, 3) == [[([[7, 0], [7, 1], [0, 0]], (2,)), ([[7, 0], [7, 1], [7, 2]], ())]] * 3


# ------------------------------------------------------------------------------------------------ slices


def _two_elements(values):
    values[20] += 1
    values[-14] = -3


def _sliced(communicator, name, code):
    def other(values):
        values[50] = communicator.worker

    transport = transport_of(name, code, communicator)
    alterations = [_two_elements if communicator.worker == 1 else None, None, other if communicator.worker else None]
    own = [message_of(code, communicator.worker, i, alter) for i, alter in enumerate(alterations, 1)]
    outcomes = run_overlapped(transport, [transport.exchange(message, i) for i, (message, _) in enumerate(own, 1)])
    decoded = torch.stack([message.buffer.values for message, _ in own])
    apart = [(message.buffer.values - truth).abs().max().nan_to_num(-1.0).item() for message, truth in own]
    if name == "allgather":
        assert transport._under_way == len(transport._unsent) == 0
    return outcomes, decoded.view(torch.int32).tolist(), apart


@pytest.mark.parametrize(
    ("code", "name"),
    [
        *itertools.product([RepetitionCode(3, 1), CyclicCode(4, 1)], ["allgather", "server"]),
        (SolonCode(4, 1, 2), "server"),
    ],
    ids=repr,
)
def test_slices_make_no_difference(code, name, monkeypatch):
    exact, results = isinstance(code, RepetitionCode), []
    for size in (2**22, 64):
        monkeypatch.setattr(messages, "SLICE", size)
        monkeypatch.setattr(allgather, "WINDOW", 3 * size)
        everybody = run_workers(_sliced, code.workers, name, code)
        assert all(of_worker == everybody[0] for of_worker in everybody)
        results.append(everybody[0])
        (bad, good, failed), _, apart = everybody[0]
        assert max(apart[:2]) < (1e-30 if exact else 1e-5)
        assert apart[2] == -1  # not a number
        assert list(bad.suspects) == [1]
        assert (bad.suspects[1] is None) != exact
        assert not exact or (bad.suspects[1].elements, bad.suspects[1].first) == (2, 20)
        assert (good.suspects, good.failed, bad.failed, failed.failed) == ({}, False, False, True)
    assert not exact or results[0] == results[1]


# -------------------------------------------------------------------------------------------------- keys


class _Dishonest(keys.SharedSeed):
    """What worker 1 commits itself to and reveals. Worker 0's share is known: zeros."""

    how = "wrong"

    def commit(self, device):
        share = bytes(keys.SHARE_BYTES)
        if self._communicator.worker == 0:
            return share, self._all_gather(keys.commitment(0, share), device)
        if self._communicator.worker == 1 and self.how == "copied":
            return share, self._all_gather(keys.commitment(0, share), device)
        return super().commit(device)

    def reveal(self, share, commitments):
        if self._communicator.worker != 1 or self.how == "copied":
            return super().reveal(share, commitments)
        return (0, []) if self.how == "silent" else super().reveal(share[::-1], commitments)


def _dishonest(communicator):
    code = CyclicCode(4, 1)
    transport = transport_of("verified", code, communicator)
    seeds, decode_rows = [], transport._decode_rows

    def note_and_decode(rows, out, missing, seed):
        seeds.append(seed)
        return decode_rows(rows, out, missing, seed)

    transport._decode_rows = note_and_decode
    message, truth = message_of(code, communicator.worker, 3)
    error, outcome = None, None
    try:
        outcome = run_alone(transport.exchange(message, 0))
    except RuntimeError as caught:
        error = str(caught)
    right = torch.allclose(message.buffer.values, truth, atol=1e-5)
    return error, seeds, outcome and (outcome.suspects, outcome.left_out), right, message.buffer.values.tolist()


@pytest.mark.parametrize("how", ["wrong", "copied", "silent"])
def test_a_share_that_is_not_the_one_committed_to(how, monkeypatch):
    monkeypatch.setattr(_Dishonest, "how", how)
    monkeypatch.setattr(allgather, "SharedSeed", _Dishonest)
    everybody = run_workers(_dishonest, 4, timeout=1.0 if how == "silent" else 30.0)
    honest = [everybody[worker] for worker in (0, 2, 3)]
    if how == "silent":
        assert all(error.startswith("rank 1 has died, hangs") for error, *_ in honest)
        return
    assert all(of_worker == honest[0] for of_worker in honest)
    error, seeds, found, right, _ = honest[0]
    assert (error, found, right) == (None, ({1: None}, (1,)), True)
    assert len(seeds) == 1
    assert -(2**63) <= seeds[0] < 2**63


def _host_copies(communicator, code, bad):
    """Return how often the host waits for the device in a step with four buckets and its record."""
    transport = make_transport("allreduce", code, communicator)
    scheduler, outcomes, truths = ExchangeScheduler(Seconds()), [], []
    scheduler.start(
        transport.gather_record(torch.tensor([communicator.worker])),
        name="record",
        complete=lambda gathered: None,
        background=True,
    )
    for i in range(4):
        message, truth = message_of(code, communicator.worker, i, _add_one if communicator.worker in bad else None)
        truths.append((message.buffer.values, truth))
        scheduler.start(transport.exchange(message, i), name=f"{i}", complete=outcomes.append)
    scheduler.complete_all()
    right = all(torch.allclose(decoded, truth, atol=1e-5) for decoded, truth in truths)
    return scheduler.host_copies, [set(outcome.suspects) for outcome in outcomes], right


@pytest.mark.parametrize("code", [RepetitionCode(3, 1), RepetitionCode(7, 1), CyclicCode(5, 1)], ids=repr)
def test_the_host_waits_for_the_device_once_in_a_step(code):
    assert run_workers(_host_copies, code.workers, code, set()) == [(1, [set()] * 4, True)] * code.workers
    # And a step in which somebody is outvoted waits no more often for its verdicts.
    assert run_workers(_host_copies, code.workers, code, {1}) == [(1, [{1}] * 4, True)] * code.workers


def test_copies_to_the_host_are_the_values():
    tensors = [torch.arange(3), torch.tensor([[1.5, -0.0]]), torch.tensor([True]), torch.empty(0, 4)]
    assert copy_to_host(tensors) == tensors
    for there, back in zip(tensors, split_bytes(join_bytes(tensors), tensors), strict=True):
        assert there.dtype == back.dtype
        assert torch.equal(there, back)


def test_a_message_is_kept_while_its_buffer_is_overwritten():
    values = torch.arange(4.0)
    for restore in (None, lambda: values.copy_(torch.arange(4.0))):
        message_again = Message(values, GradientBuffer(values, (4,), (0,), "bucket", restore)).keep()
        values.fill_(7)
        assert message_again().tolist() == [0, 1, 2, 3]
        values.copy_(torch.arange(4.0))
    other = torch.ones(4)
    assert Message(other, buffer_of(values)).keep()() is other


# ------------------------------------------------------------------------------------------------ encoder


@pytest.mark.parametrize(
    ("code", "scale"), [(CyclicCode(5, 1), False), (CyclicCode(5, 1), True), (SolonCode(5, 1, 3), False)], ids=repr
)
def test_messages_grow_with_the_gradients(code, scale, generator):
    """Also of parameters that are added in several chunks."""
    sizes = (3, 2 * CHUNK + 5, 2, 1)
    buffer = buffer_of(torch.empty(sum(sizes)), sizes)
    for worker in range(code.workers):
        encoder = GradientEncoder(code, worker, scale_into_buffer=scale)
        for _ in range(2):  # steps: the second begins anew
            gradients = torch.randn(code.redundancy, sum(sizes), generator=generator)
            for index, gradient in enumerate(gradients):
                buffer.values.copy_(gradient)
                encoder.add(buffer, code.assignment(worker), index)
            pieces = [code.encode(worker, piece.contiguous()) for piece in gradients.split(sizes, dim=1)]
            message = encoder.message(buffer)
            assert message.buffer_holds_scaled_values == scale
            torch.testing.assert_close(message.values, torch.cat(pieces))
            if not scale:
                assert torch.equal(buffer.values, gradients[-1])
                continue
            mean = torch.cat([piece[:size] for piece, size in zip(pieces, sizes, strict=True)]) / code.workers
            torch.testing.assert_close(buffer.values, mean)


def test_blocks_of_each_parameter_are_put_together(generator):
    """What is decoded of several parameters, by blocks, becomes their gradients, also where some have no padding."""
    sizes = (3, 18, 7, 0, 1, 12)
    gradients = torch.randn(sum(sizes), generator=generator)
    padded = [ops.message_length(size, 3) for size in sizes]
    blocks = torch.zeros(3, sum(padded))
    for at, own, gradient in zip(itertools.accumulate(padded, initial=0), padded, gradients.split(sizes), strict=False):
        blocks[:, at : at + own] = torch.nn.functional.pad(gradient, (0, 3 * own - len(gradient))).view(3, own)
    buffer = buffer_of(torch.full_like(gradients, torch.nan), sizes)
    message = Message(torch.empty(sum(padded)), buffer, blocks=3)
    assert torch.equal(message.write(blocks), gradients)
    torch.testing.assert_close(message.write(blocks, 0.5), gradients / 2)


# ---------------------------------------------------------------------------------------------- scheduler


def _steps(log, name, *waits):
    """An exchange that waits for such things and logs what it does."""
    try:
        for wait in waits:
            log.append(f"{name} begins {wait}")
            value = yield wait if isinstance(wait, Turn) else Pending(lambda: 1, resume_on_next_bucket=wait == "soon")
            assert value == (None if isinstance(wait, Turn) else 1)
        log.append(f"{name} ends")
        return name
    finally:
        log.append(f"{name} closed")


def test_the_order_of_exchanges_depends_on_nothing_but_themselves():
    log, done = [], []
    scheduler = ExchangeScheduler(Seconds())
    for name, waits in (("a", ["soon", "late", "soon"]), ("b", [Turn.EARLIER_EXCHANGES_FIRST, "soon"])):
        scheduler.start(_steps(log, name, *waits), name=name, complete=done.append)
    scheduler.start(_steps(log, "c", "soon", "soon"), name="c", complete=done.append, background=True)
    scheduler.start(_steps(log, "d", "soon"), name="d", complete=done.append, with_next=True)
    assert log == ["a begins soon", f"b begins {Turn.EARLIER_EXCHANGES_FIRST}", "a begins late"]
    del log[:]
    scheduler.complete_all()
    assert [line for line in log if "closed" not in line] == [
        "b begins soon", "c begins soon", "d begins soon", "b ends", "d ends",
        "a begins soon", "c begins soon", "a ends", "c ends",
    ]  # fmt: skip
    assert done == ["b", "d", "a", "c"]


def test_what_exchanges_gather_or_swap_at_the_same_time_goes_in_one_collective():
    def work(communicator):
        own, n = communicator.worker, communicator.workers
        collectives, results = [], []

        def counting(name):
            inner = getattr(communicator, name)
            setattr(communicator, name, lambda *arguments: collectives.append(name) or inner(*arguments))

        for name in ("all_gather", "exchange"):
            counting(name)

        def gathers(values):
            rows = yield (yield Gather(communicator, values))
            results.append(rows)

        def swaps(values):
            arriving = torch.empty_like(values)
            pending = yield Swap(communicator, [(values, (own + 1) % n)], [(arriving, (own - 1) % n)])
            yield pending
            results.append(arriving)

        scheduler = ExchangeScheduler(Seconds())

        def start(steps, **options):
            scheduler.start(steps, name="exchange", complete=lambda outcome: None, **options)

        start(gathers(torch.tensor([own, 7])), background=True)
        start(gathers(torch.full((2, 3), own, dtype=torch.bfloat16)), with_next=True)
        start(swaps(torch.tensor([float(own)])), with_next=True)
        start(gathers(torch.tensor([own], dtype=torch.uint8)), with_next=True)
        assert collectives == []
        start(swaps(torch.tensor([own, -own])))
        assert collectives == ["exchange", "all_gather"]
        scheduler.complete_all()
        assert collectives == ["exchange", "all_gather"]
        return own, results

    for own, (matrix, single, number, pair, record) in run_workers(work, 3):
        before = (own - 1) % 3
        assert torch.equal(record, torch.tensor([[0, 7], [1, 7], [2, 7]]))
        assert torch.equal(matrix, torch.arange(3, dtype=torch.bfloat16)[:, None, None].expand(3, 2, 3))
        assert torch.equal(number, torch.arange(3, dtype=torch.uint8)[:, None])
        assert torch.equal(single, torch.tensor([float(before)]))
        assert torch.equal(pair, torch.tensor([before, -before]))


def test_an_aborted_step_leaves_nothing_behind():
    log, done = [], []

    def breaks():
        yield Turn.EARLIER_EXCHANGES_FIRST
        raise RuntimeError("rank 3 hangs")

    scheduler = ExchangeScheduler(Seconds())
    scheduler.start(_steps(log, "a", "late"), name="a", complete=done.append)
    scheduler.start(breaks(), name="bucket 1", complete=done.append)
    with pytest.raises(RuntimeError, match="bucket 1: rank 3 hangs"):
        scheduler.complete_all()
    scheduler.close()
    assert log[-1] == "a closed"
    scheduler.complete_all()
    assert done == []


@pytest.mark.parametrize("name", ["allreduce", "verified", "allgather"])
def test_a_transport_works_again_after_an_aborted_step(name):
    def work(communicator):
        transport = transport_of(name, RepetitionCode(3, 1), communicator)
        scheduler = ExchangeScheduler(Seconds())
        for i in range(2):
            message, _ = message_of(transport.code, communicator.worker, i)
            scheduler.start(transport.exchange(message, i), name="aborted", complete=lambda outcome: None)
        scheduler.close()
        transport.abort()
        message, truth = message_of(transport.code, communicator.worker, 7)
        outcome = run_alone(transport.exchange(message, 2))
        return outcome.is_clean, torch.equal(message.buffer.values, truth)

    assert run_workers(work, 3) == [(True, True)] * 3


# ------------------------------------------------------------------------------------- fake communicator


def test_an_error_of_one_worker_is_raised_and_ends_the_others():
    def work(communicator):
        if communicator.worker == 1:
            raise KeyError("broken")
        communicator.all_gather(torch.zeros(1)).wait()

    with pytest.raises(KeyError, match="broken"):
        run_workers(work, 3)


def test_splits_number_their_workers_in_the_order_of_the_part():
    def work(communicator):
        part = communicator.split([[3, 1], [0, 2]])
        values = torch.tensor([communicator.worker])
        part.broadcast(values, 0).wait()
        total = part.all_reduce(torch.tensor([communicator.worker])).wait()
        return part.worker, part.workers, values.item(), total.item()

    assert run_workers(work, 4) == [(0, 2, 0, 2), (1, 2, 3, 4), (1, 2, 0, 2), (0, 2, 3, 4)]


# --------------------------------------------------------------------------------------- a second stage


def _beyond(communicator, name, code, bad):
    transport = make_transport(name, code, communicator)

    def alter(values):
        values += communicator.worker + 1 if bad[communicator.worker] == "apart" else 1e6

    values = [message_of(code, communicator.worker, i, alter if communicator.worker in bad else None) for i in range(2)]
    outcomes = run_overlapped(transport, [transport.exchange(message, i) for i, (message, _) in enumerate(values)])
    return outcomes, torch.stack([message.buffer.values for message, _ in values])


@pytest.mark.parametrize("name", ["verified", "server"])
def test_a_second_stage_bounds_what_more_than_s_bad_workers_do(name):
    """One group has no majority, another is won by colluders: all ranks have the median of the decoder."""
    code = RepetitionCode(15, 1, beyond="median")
    for bad, lost, suspects, failed in (
        ({}, set(), set(), False),
        ({0: "apart", 4: "apart"}, set(), {0, 4}, False),
        ({1: "apart", 2: "apart", 3: "colludes", 4: "colludes"}, {0, 1, 2}, {5}, False),
        (dict.fromkeys([0, 1, 3, 4, 6, 7], "apart"), set(range(9)), set(), True),
    ):
        results = run_workers(_beyond, 15, name, code, bad)
        gradients = torch.stack(
            [torch.randn(5, sum(LENGTHS), generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
        )
        honest = gradients[:, [part for part in range(5) if len({3 * part, 3 * part + 1, 3 * part + 2} & set(bad)) < 2]]
        for outcomes, decoded in results:
            assert torch.equal(decoded.view(torch.int32), results[0][1].view(torch.int32))
            for outcome in outcomes:
                assert outcome.failed == failed
                assert outcome.suspects.keys() == suspects
                assert set(outcome.left_out) - suspects == lost
            if failed:
                assert decoded.isnan().all()
            else:
                assert (decoded >= honest.min(1).values).all()
                assert (decoded <= honest.max(1).values).all()


def test_codes_that_transports_refuse():
    def work(communicator):
        for name in TRANSPORTS:
            with pytest.raises(ValueError, match="code must be decoded column by column to have a transport"):
                make_transport(name, ByzShieldCode(3, 0), communicator)
        with pytest.raises(ValueError, match="code must have no second stage for 'allreduce', which adds up blindly"):
            make_transport("allreduce", RepetitionCode(3, 0, beyond="median"), communicator)

    run_workers(work, 3)

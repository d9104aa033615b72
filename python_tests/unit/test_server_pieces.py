"""The server transport in pieces: wrong, late and dead workers in every round, and what enters the server."""

import itertools
import random
import threading
import time

import pytest
import torch

from draco_ext import RepetitionCode, ops
from draco_ext.protocol.communicator import Communicator, Connection
from draco_ext.protocol.exchange import run_alone
from draco_ext.protocol.messages import GradientBuffer, Message
from draco_ext.protocol.transports import server, verified
from draco_ext.protocol.transports.server import ServerTransport
from draco_ext.protocol.verifier import votes_needed
from draco_ext.testing.communicator import FakeCommunicator, run_workers

pytestmark = pytest.mark.usefixtures("one_core")

CODES = [RepetitionCode(*arguments) for arguments in [(3, 1), (4, 1), (5, 2), (6, 1), (7, 1)]]
LENGTH = 211  # of a message; its pieces have different lengths
# What a worker sends: to the server, to others ("shard"), and to the server again: which shards are missing, and wrong.
PIECE, DIGESTS, AGAIN, SHARD, MISSING, WRONG = "piece", "digests", "again", "shard", "missing", "wrong"


@pytest.fixture(autouse=True)
def _small_messages_in_pieces(monkeypatch):
    monkeypatch.setattr(verified, "SMALL", 0)


class Stage:
    """What the workers of one test share: how far the server is, so that nothing depends on the clock."""

    def __init__(self):
        self.changed = threading.Condition()
        self.rounds = 0  # in which the server has waited
        self.is_over = False
        self.server = None

    def note(self, **values):
        with self.changed:
            vars(self).update(values)
            self.changed.notify_all()

    def wait_for(self, predicate):
        with self.changed:
            assert self.changed.wait_for(predicate, 30)

    def give_up(self, worker):
        """Let the server's deadline pass for one worker in the round that it is waiting in or begins next."""
        self.wait_for(lambda: self.server is not None)
        self.server._arrived.put((worker, None))


class StagedServer(ServerTransport):
    def _await(self, current):
        arrived = super()._await(current)
        self.stage.note(rounds=self.stage.rounds + 1)
        return arrived


class Dead(Exception):
    pass


class Sender(Communicator):
    """A worker's communicator, which sends something else, or too late, or nothing any more.

    Args:
        inner: the communicator.
        stage: see `Stage`.
        tell: `tell(kind, values)` returns what it sends instead.
        pass_on: `pass_on(values, to)` returns what it passes on to another worker instead: None for nothing, or a
            function that waits, and returns it then.
        late: the kind of what is late, once; or of what it dies before.
        until: what it waits for then: "round", the end of the server's waiting; "end", that of all exchanges; "death".
    """

    def __init__(self, inner, stage, tell, pass_on, late=None, until="round"):
        self.worker, self.workers, self.root, self.seconds = inner.worker, inner.workers, inner.root, inner.seconds
        self._arguments = stage, tell, pass_on, late, until
        self._inner, self._stage, self._tell, self._pass_on, self._late, self._until = inner, *self._arguments
        self._sent = []  # kinds, in this exchange

    def _kind(self, values):
        if values.dtype == torch.uint8:
            return WRONG if MISSING in self._sent else MISSING
        return DIGESTS if values.dtype == torch.int64 else AGAIN if self._sent else PIECE

    def send(self, values, worker):
        kind = self._kind(values)
        self._sent.append(kind)
        if kind == self._late:
            self._late = None
            rounds = self._stage.rounds
            self._stage.give_up(self.worker)
            if self._until == "death":
                raise Dead
            is_over = self._until == "end"
            self._stage.wait_for(lambda: self._stage.is_over if is_over else self._stage.rounds > rounds)
        said = self._tell(kind, values.clone())
        if kind in (MISSING, WRONG):
            values.copy_(said)  # it receives what it asks for
        self._inner.send(said, worker)
        if kind == WRONG:
            self._sent.clear()  # the exchange is over

    def receive(self, values, worker):
        self._inner.receive(values, worker)
        if values.numel() == LENGTH:
            self._sent.clear()  # the result, whole

    def connect(self, worker):
        return ToRelay(self._inner.connect(worker), worker, self._pass_on)

    def split(self, parts, **keywords):
        return Sender(self._inner.split(parts, **keywords), *self._arguments)

    def _unused(self, *arguments, **keywords):
        raise NotImplementedError

    all_gather = all_gather_p2p = all_reduce = broadcast = exchange = _unused


class ToRelay(Connection):
    """A worker's connection to another one, on which it passes on something else."""

    def __init__(self, inner, worker, pass_on):
        self._inner, self._worker, self._pass_on = inner, worker, pass_on

    def start_send(self, values):
        passed_on = self._pass_on(values.clone(), self._worker)
        if callable(passed_on):
            threading.Thread(target=lambda: self._inner.start_send(passed_on()), daemon=True).start()
            return lambda: None
        return self._inner.start_send(passed_on) if passed_on is not None else lambda: None

    def receive(self, values):
        self._inner.receive(values)


def gradients_of(code, number):
    return torch.randn(code.parts, LENGTH, generator=torch.Generator().manual_seed(number))


def exchange(
    communicator, code, stage, *, tells=(), passes=(), late=(), alters=(), exchanges=1, catch_up=True, **options
):
    """Exchange messages; return the outcomes and the decoded gradients.

    Args:
        communicator: a worker's.
        code: the code.
        stage: see `Stage`.
        tells: by worker, what it sends instead of what it should; see `Sender`.
        passes: by worker, what it passes on to others instead of its shard; see `Sender`.
        late: by worker, what is late, and until when; see `Sender`.
        alters: by worker, what it computes instead of what it should: `alter(values)` changes them in place.
        exchanges: the number of exchanges.
        catch_up: whether the server waits between them until all workers have their results.
        options: of the transport.
    """
    worker, tells, passes, late, alters = communicator.worker, dict(tells), dict(passes), dict(late), dict(alters)
    if worker in tells or worker in passes or worker in late:
        tell = tells.get(worker, lambda kind, values: values)
        pass_on = passes.get(worker, lambda values, to: tell(SHARD, values))
        communicator = Sender(communicator, stage, tell, pass_on, *late.get(worker, ()))
    if worker:
        transport = ServerTransport(code, communicator, deadline=30.0, **options)
    else:
        transport = StagedServer(code, communicator, deadline=30.0, **options)
        transport.stage = stage
        stage.note(server=transport)
    results = []
    for number in range(exchanges):
        messages = gradients_of(code, number).repeat_interleave(torch.tensor(code.group_sizes), dim=0)
        for j, alter in alters.items():
            alter(messages[j])
        values = messages[worker].clone()
        message = Message(values, GradientBuffer(values, (LENGTH,), (0,), "bucket"))
        results.append((run_alone(transport.exchange(message, number)), values))
        for connection in transport._connections.values() if catch_up else ():
            while connection._acknowledged < connection._sent and not ends_with_death(late):
                time.sleep(0.001)
    if worker == 0:
        stage.note(is_over=True)
    return results


def ends_with_death(late):
    return any("death" in how for how in late.values())


def run(code, stage=None, **options):
    """What every worker's `exchange` returns; None of one that has died, and the message of a RuntimeError."""
    stage = stage or Stage()

    def work(communicator):
        try:
            return exchange(communicator, code, stage, **options)
        except Dead:
            return None
        except RuntimeError as error:
            return str(error)

    return run_workers(work, code.workers)


def truth(code, number=0):
    return code.decode(gradients_of(code, number).repeat_interleave(torch.tensor(code.group_sizes), dim=0)).gradient


def check(code, bad, *, missing=(), **options):
    """All workers have the right bits, and the same outcome, which names these workers; return the outcomes."""
    results = run(code, **options)
    for worker_results in results:
        for number, (outcome, values) in enumerate(worker_results):
            assert torch.equal(values.view(torch.int32), truth(code, number).view(torch.int32))
            assert not outcome.failed
            assert outcome == results[0][number][0]
    outcome = results[0][0][0]
    assert outcome.suspects.keys() == set(bad)
    assert outcome.missing == tuple(sorted(missing))
    return [outcome for outcome, _ in results[0]]


def sets_of_bad(code):
    """All sets with up to s members of each group."""
    choices = [
        [chosen for count in range(code.adversaries + 1) for chosen in itertools.combinations(members, count)]
        for members in code.replica_groups
    ]
    return [frozenset(itertools.chain(*chosen)) for chosen in itertools.product(*choices)]


# ------------------------------------------------------------------------------------------- the rule of the vote


@pytest.mark.parametrize(("members", "adversaries"), [(3, 1), (4, 1), (5, 2), (6, 2)])
def test_as_many_equal_digests_are_needed_as_equal_messages(members, adversaries):
    """For every number of missing members and every way in which the others agree."""
    for present in range(1, members + 1):
        for choice in itertools.product(range(3), repeat=present):
            rows = torch.zeros(members, 4)
            rows[:present] += torch.tensor(choice, dtype=torch.float32)[:, None]
            missing = torch.arange(members) >= present
            _, _, failed = ops.majority_vote(rows, (members,), adversaries, missing=missing)
            most = max(choice.count(one) for one in choice)
            assert bool(failed) == (most < votes_needed(present, adversaries))


# ------------------------------------------------------------------------------------------------- wrong values


def wrong_piece(kind, values):
    return values + 1 if kind == PIECE else values


def wrong_digests(kind, values):
    return values ^ 1 if kind == DIGESTS else values


def wrong_values(kind, values):
    return values if kind == DIGESTS else values - 7


def wrong_everything(kind, values):
    return values.fill_(3)


def own_group(code):
    return set(code.replica_groups[0])  # the server's; the others of it send only what the server asks for


@pytest.mark.parametrize("code", CODES, ids=repr)
def test_every_set_of_wrong_messages_changes_nothing(code):
    """What is wrong is counted, the server's own message included."""

    def alter(values):
        values[3] += 1
        values[-1] = torch.nan

    for bad in sets_of_bad(code):
        (outcome,) = check(code, bad, alters=dict.fromkeys(bad, alter))
        assert outcome.left_out == tuple(sorted(bad))
        for found in outcome.suspects.values():
            assert (found.elements, found.first, found.largest) == (2, 3, torch.inf)


@pytest.mark.parametrize("tell", [wrong_piece, wrong_digests, wrong_values, wrong_everything])
@pytest.mark.parametrize("code", CODES, ids=repr)
def test_every_set_of_workers_that_send_what_they_have_not(code, tell):
    """Wrong pieces with right digests, and the reverse, also on repair."""
    for bad in sets_of_bad(code):
        senders = bad - {0}
        is_seen = tell in (wrong_digests, wrong_everything)
        check(code, senders if is_seen else senders - own_group(code), tells=dict.fromkeys(senders, tell))


def test_wrong_again_on_repair():
    """Digests are right, pieces wrong, of one worker at first and of the other when it is asked for them."""
    code = RepetitionCode(10, 2)  # two groups of five

    def again(kind, values):
        return values * 2 if kind == AGAIN else values

    check(code, {5, 6}, tells={5: again, 6: wrong_values})
    check(code, {5, 9}, tells={5: again, 9: wrong_piece})


def test_digests_of_the_exchange_before_are_worth_nothing():
    code, before = RepetitionCode(6, 1), []

    def replay(kind, values):
        if kind != DIGESTS:
            return values
        before.append(values)
        return before[max(len(before) - 2, 0)]

    outcomes = check(code, (), tells={4: replay}, exchanges=2)
    assert outcomes[1].suspects.keys() == {4}


def test_a_repair_is_compared_under_a_new_key():
    """Who replays the digests that were right for the first key is found wrong by the second."""
    code = RepetitionCode(10, 2)
    first = []

    def replay(kind, values):
        if kind == AGAIN:
            return values + 1
        if kind == DIGESTS:
            first.append(values)
            return first[0]
        return values

    check(code, {5, 6}, tells={5: replay, 6: wrong_piece})


@pytest.mark.parametrize("seed", range(4))
def test_random_liars(seed, long):
    """Everything that a bad worker sends is changed at random, or not. Nobody honest is named."""
    rng = random.Random(seed)

    def liar(own):
        def tell(kind, values):
            if own.random() < 0.4:
                return values
            if kind == DIGESTS:
                values[0, own.randrange(values.size(1))] += own.choice((1, -1, 2**40))
            elif kind in (MISSING, WRONG):
                values[own.randrange(values.numel())] ^= 1
            elif values.numel():
                values[own.randrange(values.numel())] = own.choice((0.0, torch.nan, torch.inf, 1e-45))
            return values

        return tell

    for _ in range(25 if long else 10):
        code = rng.choice([*CODES, RepetitionCode(10, 2)])
        bad = rng.choice(sets_of_bad(code)) - {0}
        results = run(code, tells={j: liar(random.Random(rng.random())) for j in bad})
        for j, ((outcome, values),) in enumerate(results):
            # A rank that says that a wrong shard is right keeps it.
            assert j in bad or torch.equal(values, truth(code))
            assert not outcome.failed
            assert outcome.suspects.keys() <= bad


def test_every_key_is_drawn_after_what_it_verifies_has_arrived(monkeypatch):
    events, keys, draw, wait = [], [], server.secrets.randbits, StagedServer._await

    def spy_draw(bits):
        events.append("key")
        keys.append(draw(bits))
        return keys[-1]

    def spy_wait(self, current):
        late = wait(self, current)
        events.append("arrived")
        return late

    monkeypatch.setattr(server.secrets, "randbits", spy_draw)
    monkeypatch.setattr(StagedServer, "_await", spy_wait)
    check(RepetitionCode(6, 1), {5}, tells={5: wrong_piece})
    # Pieces, digests, the repair, digests again, and which shards are missing: that key is sent when these are known.
    assert events == ["arrived", "key", "arrived", "arrived", "key", "arrived", "key", "arrived"]
    assert len(set(keys)) == 3


@pytest.mark.parametrize("code", CODES, ids=repr)
def test_too_many_wrong_messages_fail_everywhere(code):
    def alter(number):
        return lambda values: values.add_(number)

    for members in code.replica_groups:
        bad = {j: alter(1 + j) for j in members[: code.adversaries + 1]}
        results = run(code, alters=bad)
        for ((outcome, values),) in results:
            assert outcome.failed
            assert outcome.suspects.keys() >= set(bad)
            assert values.isnan().all()


# ------------------------------------------------------------------------------------------------- late and dead


@pytest.mark.parametrize("when", [PIECE, DIGESTS])
@pytest.mark.parametrize("code", CODES, ids=repr)
def test_a_late_worker_is_an_erasure_and_catches_up(code, when):
    for worker in range(1, code.workers):
        _, *others = check(code, (), missing={worker}, late={worker: (when,)}, exchanges=3)
        assert [outcome.missing for outcome in others] == [(), ()]


@pytest.mark.parametrize("when", [PIECE, DIGESTS, AGAIN])
def test_a_worker_that_is_late_with_a_repair_is_an_erasure(when):
    """Worker 5's piece is wrong, and worker 6 is late with something, perhaps with that piece."""
    code = RepetitionCode(10, 2)
    check(code, {5}, missing={6}, tells={5: wrong_piece}, late={6: (when,)})


def test_a_suspect_that_is_late_with_its_message_is_named():
    def alter(values):
        values += 1

    (outcome,) = check(RepetitionCode(6, 1), {4}, missing={4}, alters={4: alter}, late={4: (AGAIN,)})
    assert outcome.suspects == {4: None}


def test_what_comes_late_is_not_written_into_what_was_verified(monkeypatch):
    """A wrong piece that arrives when the right one is in its place."""
    code, stage, inner = RepetitionCode(6, 1), Stage(), ops.majority_vote

    def vote(rows, *arguments, **options):
        if len(rows) == 2 and not stage.is_over:
            stage.note(is_over=True)
            while (3, 0) not in stage.server._arrived.queue:  # worker 3's values in round 0
                time.sleep(0.001)
        return inner(rows, *arguments, **options)

    monkeypatch.setattr(ops, "majority_vote", vote)
    options = {"tells": {3: wrong_everything}, "late": {3: (PIECE, "end")}}
    results = run_workers(lambda communicator: exchange(communicator, code, stage, **options), 6)
    for ((outcome, values),) in results:
        assert torch.equal(values, truth(code))
        assert (outcome.suspects, outcome.missing) == ({}, (3,))


@pytest.mark.parametrize("when", [PIECE, DIGESTS])
@pytest.mark.parametrize("code", [RepetitionCode(9, 1), RepetitionCode(10, 2)], ids=repr)
def test_dead_workers_are_erasures_until_they_are_too_many(code, when):
    """All die in the same round: up to 2s of a group, and then one more."""
    group = code.replica_groups[1]
    for count in range(1, len(group) + 1):
        victims = group[:count]
        results = run(code, late=dict.fromkeys(victims, (when, "death")), exchanges=2)
        assert [j for j, result in enumerate(results) if result is None] == list(victims)
        for result in filter(None, results):
            for number, (outcome, values) in enumerate(result):
                assert outcome.missing == victims
                assert outcome.suspects == {}
                assert outcome.failed == (count > 2 * code.adversaries)
                assert outcome.failed or torch.equal(values, truth(code, number))


@pytest.mark.parametrize("when", [PIECE, DIGESTS])
def test_wrong_and_missing_members_count_together(when):
    """2e + f <= 2s in every group."""
    code = RepetitionCode(10, 2)

    def alter(number):
        return lambda values: values.add_(number)

    for wrong, missing in itertools.product(range(3), range(4)):
        bad, late = (5, 6)[:wrong], (9, 8, 7)[:missing]
        results = run(code, alters={j: alter(j) for j in bad}, late=dict.fromkeys(late, (when,)))
        for ((outcome, values),) in results:
            assert outcome.failed == (2 * wrong + missing > 4)
            assert outcome.missing == tuple(sorted(late))
            if not outcome.failed:
                assert outcome.suspects.keys() == set(bad)
                assert torch.equal(values, truth(code))


def test_one_wrong_and_a_helper_that_dies_are_too_many_of_three():
    """Worker 3's piece is wrong, and worker 4 dies when it is asked for it."""
    code = RepetitionCode(6, 1)
    results = run(code, tells={3: wrong_piece}, late={4: (AGAIN, "death")})
    assert results.pop(4) is None
    for ((outcome, values),) in results:
        assert (outcome.failed, outcome.missing, outcome.suspects.keys()) == (True, (4,), {3})
        assert values.isnan().all()


@pytest.mark.parametrize("when", [PIECE, DIGESTS, AGAIN, MISSING])
def test_a_worker_that_is_too_far_behind_is_given_up_in_every_round(when, monkeypatch):
    monkeypatch.setattr(server, "MOST_UNCLAIMED", 2)
    tells = {5: wrong_piece} if when == AGAIN else {}
    results = run(
        RepetitionCode(10, 2), tells=tells, late={6 if when == AGAIN else 7: (when, "end")}, exchanges=5, catch_up=False
    )
    late = [result for result in results if isinstance(result, str)]
    assert late == ["this rank was 2 buckets behind the others, and was given up"]
    assert not any(outcome.failed for outcome, _ in results[0])


# ------------------------------------------------------------------------------------------- elements and memory


@pytest.fixture
def entering(monkeypatch):
    """The numbers of elements of gradients that enter the server."""
    counted, lock, inner = [], threading.Lock(), FakeCommunicator.post

    def post(self, values, worker):
        if worker == 0 and values.is_floating_point():
            with lock:
                counted.append(values.numel())
        inner(self, values, worker)

    monkeypatch.setattr(FakeCommunicator, "post", post)
    return counted


@pytest.mark.parametrize("code", [*CODES, RepetitionCode(9, 1), RepetitionCode(15, 2)], ids=repr)
def test_one_message_of_each_other_group_enters_the_server(code, entering):
    check(code, ())
    assert sum(entering) == (code.parts - 1) * LENGTH


def test_a_repair_enters_the_server_piece_by_piece(entering):
    code = RepetitionCode(6, 1)
    check(code, {5}, tells={5: wrong_piece})
    pieces = [len(piece) for piece in torch.empty(LENGTH).tensor_split(3)]
    assert sum(entering) == LENGTH + pieces[2]


@pytest.mark.parametrize("is_late", [False, True])
def test_rows_of_the_server(is_late, monkeypatch):
    """One for each group."""
    code, rows = RepetitionCode(9, 1), []
    inner = server.Verifier

    def spy(own, groups, adversaries, held, **options):
        rows.append(held[0].untyped_storage().nbytes())
        return inner(own, groups, adversaries, held, **options)

    monkeypatch.setattr(server, "Verifier", spy)
    check(code, (), missing={5} if is_late else (), late={5: (PIECE,)} if is_late else {})
    assert rows == [3 * LENGTH * 4]

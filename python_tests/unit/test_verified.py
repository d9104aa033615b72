"""The verified all-reduce against ranks that compute and send anything, to every rank something else."""

import collections
import itertools
import random

import pytest
import torch

from draco_ext import RepetitionCode
from draco_ext.protocol import keys
from draco_ext.protocol.communicator import Communicator
from draco_ext.protocol.exchange import ExchangeScheduler, run_alone
from draco_ext.protocol.messages import GradientBuffer, Message
from draco_ext.protocol.transports import verified
from draco_ext.protocol.transports.verified import VerifiedAllReduce
from draco_ext.protocol.verifier import Verifier
from draco_ext.reporting.report import Seconds
from draco_ext.testing.communicator import run_workers

pytestmark = pytest.mark.usefixtures("one_core")

CODES = [RepetitionCode(*arguments) for arguments in [(3, 1), (4, 1), (5, 2), (6, 1), (7, 1), (8, 1), (9, 1), (7, 3)]]
LENGTH = 211  # of a message; its pieces have different lengths
COMMITMENT, VALUES, SHARE, KEY, ANSWER, WORD, CLAIMS = range(7)  # kinds of what is sent


@pytest.fixture(autouse=True)
def _small_messages_in_pieces(monkeypatch):
    monkeypatch.setattr(verified, "SMALL", 0)


class Liar(Communicator):
    """A communicator that sends something else: `lie(kind, to, values)` returns it, or None to send nothing."""

    def __init__(self, inner, members, lie):
        self.worker, self.workers, self.root, self.seconds = inner.worker, inner.workers, inner.root, inner.seconds
        self._inner = inner
        self._members = members  # the number of members of this worker's group
        self._lie = lie
        deliveries = 1 if members == inner.workers else 2
        self._shown = itertools.cycle([COMMITMENT] + deliveries * [SHARE])

    def exchange(self, leaving, arriving):
        shown = next(self._shown) if any(self._kind(values) is None for values, _ in leaving) else None
        lies = [
            (self._lie(shown if (kind := self._kind(values)) is None else kind, to, values.clone()), to)
            for values, to in leaving
        ]
        return self._inner.exchange([(values, to) for values, to in lies if values is not None], arriving)

    def _kind(self, values):
        if values.dtype == torch.float64:
            return CLAIMS
        if values.dtype == torch.uint8:
            return None  # a commitment, and then a share for each delivery
        if values.dtype != torch.int64:
            return VALUES
        return {1: KEY, 2 + 2 * self._members: ANSWER}.get(values.numel(), WORD)

    def _unused(self, *arguments, **keywords):
        raise NotImplementedError

    all_gather = all_reduce = broadcast = send = receive = connect = _unused

    def all_gather_p2p(self, values, rows):
        return self._inner.all_gather_p2p(values, rows)

    def split(self, parts, **keywords):
        return self._inner.split(parts, **keywords)


def gradients_of(code, seed, length=LENGTH, dtype=torch.float32):
    return torch.randn(code.parts, length, generator=torch.Generator().manual_seed(seed)).to(dtype)


def one_exchange(communicator, code, bad, attack, *, seed=0, exchanges=1, **options):
    """Exchange messages, and return the outcomes and whether the bits are right."""
    if communicator.worker in bad:
        (group,) = code.assignment(communicator.worker)
        communicator = attack(communicator, code, bad, len(code.holders(group)))
    transport = getattr(communicator, "transport", VerifiedAllReduce)(code, communicator)
    results = []
    for number in range(exchanges):
        gradients = gradients_of(code, seed + number, **options)
        values = gradients[code.assignment(communicator.worker)[0]].clone()
        alter = getattr(communicator, "compute", None)
        values = values if alter is None else alter(values)
        message = Message(values, GradientBuffer(values, (values.numel(),), (0,), "bucket"))
        outcome = run_alone(transport.exchange(message, number))
        rows = gradients.repeat_interleave(torch.tensor(code.group_sizes), dim=0)
        expected = code.decode(rows).gradient
        right = torch.equal(values.view(torch.uint8), expected.view(torch.uint8))
        results.append((outcome, right))
    return results


@pytest.fixture
def most(pytestconfig):
    """The number of sets of bad workers that are tried: with --long all of up to nine workers."""
    return 64 if pytestconfig.getoption("long") else 4


def sets_of_bad(code, most):
    """All sets with up to s members of each group, or some of them."""
    choices = [
        [chosen for count in range(code.adversaries + 1) for chosen in itertools.combinations(members, count)]
        for members in code.replica_groups
    ]
    everything = [frozenset(itertools.chain(*chosen)) for chosen in itertools.product(*choices)]
    return everything if len(everything) <= most else random.Random(0).sample(everything, most)


def check(code, bad, attack, *, named=None, **options):
    """Every honest rank has the right bits, does not fail and suspects nobody honest; `named`: and these for sure."""
    results = run_workers(lambda communicator: one_exchange(communicator, code, bad, attack, **options), code.workers)
    honest = [results[j] for j in range(code.workers) if j not in bad]
    for exchanges in honest:
        for outcome, right in exchanges:
            assert right
            assert not outcome.failed
            assert outcome.suspects.keys() <= bad
            assert named is None or outcome.suspects.keys() == named
    return honest


# ------------------------------------------------------------------------------------------------ attacks


def lying(lie):
    """An attack: `lie(communicator, bad, kind, to, values)` changes values in place, or returns others."""

    def attack(communicator, code, bad, members):
        def tell(kind, to, values):
            told = lie(communicator, bad, kind, to, values)
            return values if told is None else told

        return Liar(communicator, members, tell)

    return attack


def computing(alter):
    """An attack that computes another message, and follows the protocol."""

    def attack(communicator, code, bad, members):
        liar = Liar(communicator, members, lambda kind, to, values: values)
        liar.compute = lambda values: alter(communicator.worker, values.clone())
        return liar

    return attack


def _to_some(to, worker):
    return (to + worker) % 2 == 0


def _wrong_values(communicator, bad, kind, to, values):
    if kind == VALUES:
        values += 1


def _wrong_values_to_some(communicator, bad, kind, to, values):
    if kind == VALUES and _to_some(to, communicator.worker):
        values.neg_()


def _one_bit(communicator, bad, kind, to, values):
    if kind == VALUES:
        values.view(torch.int32)[-1] ^= 1


def _not_a_number(communicator, bad, kind, to, values):
    if kind == VALUES:
        values.fill_(torch.nan)


def _wrong_answers(communicator, bad, kind, to, values):
    if kind == ANSWER:
        values[2:] ^= 1


def _wrong_answers_to_some(communicator, bad, kind, to, values):
    if kind == ANSWER and _to_some(to, communicator.worker):
        values[2:4] += 1


def _no_vector(communicator, bad, kind, to, values):
    if kind == ANSWER:
        values[1] = 0


def _late(communicator, bad, kind, to, values):
    if kind == ANSWER:
        values[1] = 2
    _wrong_values(communicator, bad, kind, to, values)


def _fails(communicator, bad, kind, to, values):
    if kind == WORD:
        values[0] = 2


def _no_verdict(communicator, bad, kind, to, values):
    if kind == WORD and values[0] != 1:  # else it would go on alone
        values[0] = -(2**62)


def _other_keys(communicator, bad, kind, to, values):
    if kind == KEY:
        values.fill_(to)


def _other_keys_in_answers(communicator, bad, kind, to, values):
    if kind == ANSWER:
        values[0] ^= 1


def _other_shares(communicator, bad, kind, to, values):
    """They do not fit what was committed to."""
    if kind == SHARE:
        values[0] += to


def _other_commitments(communicator, bad, kind, to, values):
    if kind == COMMITMENT and _to_some(to, communicator.worker):
        values.zero_()


EVERYWHERE = {
    "values": _wrong_values,
    "values to some": _wrong_values_to_some,
    "one bit": _one_bit,
    "not a number": _not_a_number,
    "answers": _wrong_answers,
    "answers to some": _wrong_answers_to_some,
    "no vector": _no_vector,
    "late": _late,
    "failure": _fails,
    "no verdict": _no_verdict,
    "other keys": _other_keys,
    "other keys in answers": _other_keys_in_answers,
    "other shares": _other_shares,
    "other commitments": _other_commitments,
}
HARMLESS = ("no verdict", "other keys", "other keys in answers", "other shares", "other commitments")  # seen by nobody


@pytest.mark.parametrize("name", EVERYWHERE)
@pytest.mark.parametrize("code", CODES, ids=repr)
def test_every_set_of_liars_changes_nothing(code, name, most):
    """Up to s of every group in all groups at once."""
    for bad in sets_of_bad(code, most):
        seen = name not in HARMLESS and "some" not in name
        if len(code.replica_groups) == 1 and EVERYWHERE[name] in (_wrong_values, _one_bit, _not_a_number):
            seen = False  # members of one group send no values unless they are asked
        check(code, bad, lying(EVERYWHERE[name]), named=bad if seen else None)


@pytest.mark.parametrize("code", CODES, ids=repr)
def test_wrong_messages_are_counted(code, most):
    """All ranks, the wrong ones too, get the right bits, name the same ranks and count the same elements."""

    def alter(worker, values):
        values[worker] += 1
        values[-1 - 2 * worker] = torch.nan
        return values

    for bad in sets_of_bad(code, most):
        for ((outcome, right),) in run_workers(one_exchange, code.workers, code, bad, computing(alter)):
            assert right
            assert outcome.suspects.keys() == bad
            for worker, found in outcome.suspects.items():
                assert (found.elements, found.first, found.largest) == (2, worker, torch.inf)


def test_liars_of_one_group_agree(most):
    """s of a group send the same wrong message, and the digests of it."""

    def alter(worker, values):
        return values + 1

    for code in CODES:
        for bad in sets_of_bad(code, most):
            check(code, bad, computing(alter), named=bad)


@pytest.mark.parametrize("code", [RepetitionCode(6, 1), RepetitionCode(5, 2), RepetitionCode(10, 2)], ids=repr)
@pytest.mark.parametrize("first", range(4))
def test_wrong_again_when_asked_for_a_repair(code, first, most):
    """Digests are right, and values wrong from the `first`-th message with values on, which may be a repair."""

    def attack(communicator, code, bad, members):
        sent = itertools.count()

        def lie(kind, to, values):
            return values + 1 if kind == VALUES and next(sent) >= first else values

        return Liar(communicator, members, lie)

    for bad in sets_of_bad(code, most):
        check(code, bad, attack)


@pytest.mark.parametrize("code", CODES, ids=repr)
@pytest.mark.parametrize("wrong", [False, True])
def test_who_shows_every_rank_another_share_gains_nothing(code, wrong, most, monkeypatch):
    """Honest ranks then have different keys in the first comparison, and draw their own.

    Since they compare shards again, they are late with sums. But what was right all the same is not sent again.
    """
    asked = []
    make_room = Verifier.make_room

    def spy(verifier, wanted):
        asked.extend(wanted)
        return make_room(verifier, wanted)

    monkeypatch.setattr(Verifier, "make_room", spy)

    def attack(communicator, code, bad, members):
        own = communicator.worker
        shown = collections.Counter()

        def lie(kind, to, values):
            if kind in (COMMITMENT, SHARE):  # each fits the one before
                chain = [bytes([to]) * keys.SHARE_BYTES]
                while len(chain) < (2 if members == code.workers else 3):
                    chain.insert(0, keys.commitment(own, chain[0]))
                text = chain[shown[to] % len(chain)]
                shown[to] += 1
                return keys.to_tensor(text, values.device)
            return values + 1 if wrong and kind == VALUES else values

        return Liar(communicator, members, lie)

    for bad in sets_of_bad(code, most):
        check(code, bad, attack, named=bad if wrong and len(code.replica_groups) > 1 else set())
    assert bool(asked) == (wrong and len(code.replica_groups) > 1)


def test_who_is_lied_to_names_the_liar():
    """Whoever gets a wrong piece names its sender, others do not; if more than s of a group are lied to, all do."""
    code, liar = RepetitionCode(6, 1), 4

    for count in range(4):
        for victims in itertools.combinations((0, 1, 2), count):

            def lie(communicator, bad, kind, to, values, victims=victims):
                if kind == VALUES and to in victims:
                    values += 1

            honest = check(code, {liar}, lying(lie))
            for j, ((outcome, _),) in zip((0, 1, 2, 3, 5), honest, strict=True):
                assert (liar in outcome.suspects) == (j in victims or count > 1)


@pytest.mark.parametrize("known", [0, 2])
def test_who_does_not_answer_for_what_it_has_sent_is_named(known, most):
    """It sends wrong values, and says in one of both deliveries that it does not know its vector, or did not."""
    for deliveries in ((0,), (1,)):

        def attack(communicator, code, bad, members, deliveries=deliveries):
            answered = collections.Counter()

            def lie(kind, to, values):
                if kind == ANSWER and answered.update([to]) is None and answered[to] - 1 in deliveries:
                    values[1] = known
                return values + 1 if kind == VALUES else values

            return Liar(communicator, members, lie)

        for code in (RepetitionCode(7, 1), RepetitionCode(10, 2)):
            for bad in sets_of_bad(code, most):
                check(code, bad, attack, named=bad)


def test_who_says_that_it_is_late_can_only_cause_a_repetition(most):
    """It asks for another comparison of the shards, and says that its sum, which is wrong, was made before."""

    class Late(VerifiedAllReduce):
        def _delivery(self, *arguments, **keywords):
            delivery = super()._delivery(*arguments, **keywords)
            if "announced" not in keywords:  # the first of the two
                judge, count = delivery._judge, itertools.count()
                delivery._judge = lambda key, answers: judge(key, answers) if next(count) else (1, {})
            return delivery

    def attack(communicator, code, bad, members):
        sent = itertools.count()
        pieces = code.workers - members  # in each delivery

        def lie(kind, to, values):
            return values + 1 if kind == VALUES and pieces <= next(sent) < 2 * pieces else values

        liar = Liar(communicator, members, lie)
        liar.transport = Late
        return liar

    for code in (RepetitionCode(6, 1), RepetitionCode(7, 1), RepetitionCode(10, 2)):
        for bad in sets_of_bad(code, most):
            check(code, bad, attack, named=set())


def test_digests_of_the_step_before_are_worth_nothing(most):
    def attack(communicator, code, bad, members):
        before = {}

        def lie(kind, to, values):
            if kind != ANSWER:
                return values
            told = torch.cat([values[:2], before.get(to, values)[2:]])  # under the key of now
            before[to] = values
            return told

        return Liar(communicator, members, lie)

    code = RepetitionCode(6, 1)
    for bad in sets_of_bad(code, most):
        results = check(code, bad, attack, exchanges=3)
        for exchanges in results:
            assert exchanges[1][0].suspects.keys() == bad


def test_liars_that_know_the_key_of_the_first_comparison_gain_nothing(most):
    """A repair is compared under a key that was not known when it was sent: replaying all answers does not help."""

    def attack(communicator, code, bad, members):
        first = {}

        def lie(kind, to, values):
            if kind == VALUES:
                return values + 1
            return first.setdefault(to, values) if kind == ANSWER else values

        return Liar(communicator, members, lie)

    for code in (RepetitionCode(5, 2), RepetitionCode(10, 2)):
        for bad in sets_of_bad(code, most):
            check(code, bad, attack)


def test_nobody_honest_can_be_framed(most):
    """s of each group say that all others are wrong."""

    def lie(communicator, bad, kind, to, values):
        if kind == WORD:
            values[1] = communicator.workers

    class Accuser(Liar):
        def exchange(self, leaving, arriving):
            if any(values.dtype == torch.float64 for values, _ in (*leaving, *arriving)):
                rows = torch.zeros(self.workers, 4, dtype=torch.float64)
                rows[:, 0] = torch.arange(self.workers)
                rows[:, 1] = 7
                leaving = [(rows, j) for j in range(self.workers) if j != self.worker]
            return super().exchange(leaving, arriving)

    def attack(communicator, code, bad, members):
        def tell(kind, to, values):
            lie(communicator, bad, kind, to, values)
            return values

        accuser = Accuser(communicator, members, tell)
        accuser.compute = lambda values: values + 1  # so that claims are exchanged
        return accuser

    for code in (RepetitionCode(6, 1), RepetitionCode(7, 1), RepetitionCode(5, 2)):
        for bad in sets_of_bad(code, most):
            if bad:
                check(code, bad, attack, named=bad)


class Tireless(VerifiedAllReduce):
    """A bad rank that wants all pieces of everybody again and again."""

    def _delivery(self, *arguments, **keywords):
        delivery = super()._delivery(*arguments, **keywords)
        everything = {j: list(range(len(self._groups[self._group_of[j]]))) for j in delivery._others}
        delivery._judge = lambda key, answers: (1, everything)
        return delivery


def test_who_never_ends_is_left_alone(most):
    def attack(communicator, code, bad, members):
        liar = Liar(communicator, members, lambda kind, to, values: values)
        liar.transport = Tireless
        return liar

    for code in CODES:
        for bad in sets_of_bad(code, most):
            check(code, bad, attack)


@pytest.mark.parametrize("kind", [VALUES, COMMITMENT, SHARE, ANSWER, WORD])
def test_silence_is_an_error_that_names_the_silent(kind):
    def attack(communicator, code, bad, members):
        silent = []

        def lie(what, to, values):
            if what == kind:
                silent.append(what)
            return None if silent else values

        return Liar(communicator, members, lie)

    def work(communicator):
        try:
            one_exchange(communicator, RepetitionCode(6, 1), {4}, attack)
        except RuntimeError as error:
            return str(error)
        return None

    results = run_workers(work, 6, timeout=0.5)
    assert any(error is not None and error.startswith("rank 4 has died, hangs") for error in results[:4])
    assert all(error is not None for error in results[:4])


@pytest.mark.parametrize("seed", range(8))
def test_random_liars(seed, pytestconfig):
    """Every message of every bad rank is changed at random, or not."""
    rng = random.Random(seed)
    runs = 30 if pytestconfig.getoption("long") else 8

    def attack(communicator, code, bad, members):
        own = random.Random(rng.random())
        often = own.choice((0.02, 0.2, 0.7, 1.0))

        def lie(kind, to, values):
            if own.random() > often:
                return values
            if kind == VALUES:
                how = own.randrange(4)
                if how == 0 and values.numel():
                    values[own.randrange(values.numel())] = own.choice((0.0, -0.0, torch.nan, torch.inf, 1e-45))
                elif how == 1:
                    values += 1
                elif how == 2:
                    values = values.flip(0)
                else:
                    values.zero_()
            elif kind == KEY:
                values[0] = own.choice((0, -1, 2**63 - 1))
            elif kind in (COMMITMENT, SHARE):
                values += 1
            elif kind == ANSWER:
                values[own.randrange(values.numel())] += own.choice((1, -1, 2**40))
            elif kind == WORD and values[0] != 1:  # one that goes on, or does not, unlike what it says, is silent then
                values[0] = own.choice((0, 2, 3, -1))
            elif kind == CLAIMS:
                values[:, own.randrange(4)] = own.choice((0.0, -1.0, 1.0, 2.0, torch.nan, torch.inf, 1e300))
            return values

        return Liar(communicator, members, lie)

    for _ in range(runs):
        code = rng.choice([*CODES, RepetitionCode(10, 2)])
        bad = rng.choice(sets_of_bad(code, 10**9))
        check(code, bad, attack, seed=rng.randrange(2**31))


# ------------------------------------------------------------------------------------- beyond the guarantee


@pytest.mark.parametrize("code", CODES, ids=repr)
def test_too_many_wrong_messages_fail_everywhere(code):
    """s + 1 different messages in one group: no update on any rank."""
    for members in code.replica_groups:
        bad = set(members[: code.adversaries + 1])
        attack = computing(lambda worker, values: values + 1 + worker)
        for ((outcome, right),) in run_workers(one_exchange, code.workers, code, bad, attack):
            assert outcome.failed
            assert not right


def test_a_failure_of_some_shards_fails_everywhere():
    """More than s wrong in elements that only one committee sees."""
    for element in (0, LENGTH - 1):

        def alter(worker, values, element=element):
            values[element] = worker
            return values

        for ((outcome, _),) in run_workers(one_exchange, 6, RepetitionCode(6, 1), {0, 1}, computing(alter)):
            assert outcome.failed


# --------------------------------------------------------------------------------------------------- shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_dtype(dtype):
    for bad in (set(), {1}):
        check(RepetitionCode(7, 1), bad, computing(lambda worker, values: values + 1), named=bad, dtype=dtype)


@pytest.mark.parametrize("length", [0, 1, 5, 6, 7, 40])
def test_messages_shorter_than_pieces(length):
    """Some pieces are empty."""
    for bad in (set(), {4}):
        named = bad if length else set()
        check(RepetitionCode(7, 1), bad, computing(lambda worker, values: values + 1), named=named, length=length)


def test_small_messages_go_whole(monkeypatch):
    monkeypatch.setattr(verified, "SMALL", 4 * LENGTH)

    def refuse(*arguments):
        raise AssertionError("in pieces")

    monkeypatch.setattr(verified, "Delivery", refuse)
    check(RepetitionCode(6, 1), {2}, computing(lambda worker, values: values + 1), named={2})


def test_buckets_in_flight_do_not_mix():
    """Several exchanges overlap, some of them with repairs, which only some ranks make."""
    code, bad = RepetitionCode(6, 1), {1, 5}

    def work(communicator):
        transport = VerifiedAllReduce(code, communicator)
        scheduler, done = ExchangeScheduler(Seconds()), {}
        messages = []
        for number in range(5):
            gradients = gradients_of(code, number, length=600)
            values = gradients[code.assignment(communicator.worker)[0]].clone()
            if communicator.worker in bad and number % 2:
                values[number * 100] = 9
            messages.append((values, gradients.mean(0)))
            message = Message(values, GradientBuffer(values, (600,), (0,), "bucket"))
            scheduler.start(
                transport.exchange(message, number),
                name=f"{number}",
                complete=lambda outcome, number=number: done.__setitem__(number, outcome),
            )
        scheduler.complete_all()
        return [done[i].suspects.keys() for i in range(5)], [torch.equal(*pair) for pair in messages]

    for suspects, right in run_workers(work, 6):
        assert suspects == [set(), bad, set(), bad, set()]
        assert right == [True] * 5

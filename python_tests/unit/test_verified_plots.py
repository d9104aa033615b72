"""The verified all-reduce against bad ranks that plot: each speaks the protocol from a script of its own.

`test_verified.py` has bad ranks that run the program and alter what it sends. These say what they like, another thing
to each rank, also where the program would say nothing, and know all that any of them could know.
"""

import functools
import itertools
import random
from dataclasses import dataclass, field

import pytest
import torch

from draco_ext import RepetitionCode, ops
from draco_ext.codes import groups_by_worker
from draco_ext.protocol import communicator as communicators
from draco_ext.protocol.communicator import Pending
from draco_ext.protocol.exchange import ExchangeScheduler, Swap
from draco_ext.protocol.keys import LARGEST_KEY, commitment, join_shares, to_bytes, to_tensor
from draco_ext.protocol.messages import GradientBuffer, Message
from draco_ext.protocol.transports import verified
from draco_ext.protocol.transports.verified import VerifiedAllReduce
from draco_ext.reporting.report import Seconds
from draco_ext.testing.communicator import FakeCommunicator, run_workers

pytestmark = pytest.mark.usefixtures("one_core")

SIZES = [(3, 1), (5, 2), (6, 1), (7, 1), (9, 1), (10, 1), (10, 2), (11, 2)]
LIES = (
    *("shard", "sum", "repair", "commitment", "share", "own share for each", "digest", "answer under another key"),
    *("known", "late", "again", "verdict", "request", "announcement", "claims", "key"),
)
NO, YES, LATE = range(3)
VERIFIED, AGAIN, FAILED = range(3)


class Packing(FakeCommunicator):
    """A communicator that packs what goes to one worker, as that of a process group does."""

    def exchange(self, leaving, arriving):
        sent, _ = communicators._pack(leaving)
        received, joint = communicators._pack(arriving)
        pending = super().exchange(sent, received)

        def wait():
            result = pending.wait()
            for values, parts in joint:
                for part, piece in zip(parts, values.split([part.numel() for part in parts]), strict=True):
                    part.copy_(piece)
            return result

        return Pending(wait)


@dataclass
class Plot:
    """What all bad ranks of a run know and do together.

    A wrong piece that is made with the knowledge of a key has the right digest under that key: as if digests did not
    resist at all. So such a piece is found out only if it is compared under a key that was not known before.

    Attributes:
        often: how often each lie is told.
        agree: whether the bad ranks of a group tell a rank the same.
        rushing: whether they send only when they have got what the others send in the same round.
        too_many: whether there are more than s in a group.
        keys: all keys that they know by now.
        forged: by the bytes of a wrong piece, the right one, and the keys that were known when it was made.
        liars: by bucket and honest rank, who must be named there.
    """

    code: RepetitionCode
    bad: frozenset
    gradients: list
    seed: int
    often: dict
    agree: bool
    rushing: bool
    too_many: bool = False
    keys: set = field(default_factory=set)
    forged: dict = field(default_factory=dict)
    liars: dict = field(default_factory=dict)

    def __post_init__(self):
        self.groups = self.code.decoding_groups
        self.group_of = groups_by_worker(self.groups)
        self.honest = [j for j in range(self.code.workers) if j not in self.bad]

    def draw(self, worker, *what):
        """Random numbers, the same whenever they are asked for."""
        teller = f"group {self.group_of[worker]}" if self.agree else worker
        return random.Random(f"{self.seed} {teller} {what}")

    def lies(self, lie, worker, *what):
        return self.draw(worker, lie, *what).random() < self.often[lie]

    def wrong(self, piece, worker, *what):
        """A wrong piece in place of a right one."""
        made, rng = piece.clone(), self.draw(worker, "wrong", *what)
        if made.numel() == 0:
            return made
        how, i = 3 if self.too_many else rng.randrange(4), rng.randrange(made.numel())
        if how == 0:
            made += 1 + rng.randrange(2)
        elif how == 1:
            made.view(torch.uint8)[-1] ^= 1 + rng.randrange(2)
        elif how == 2:
            made[i] = torch.nan
        else:
            made.zero_()
            made[i] = rng.random()
        # A short one may be the same as a right one elsewhere.
        if made.nbytes >= 8 and not torch.equal(made.view(torch.uint8), piece.view(torch.uint8)):
            # Made twice, it is as good as the first time: whoever got it then must not find it right now.
            self.forged.setdefault(bytes(made.view(torch.uint8).tolist()), (piece.clone(), frozenset(self.keys)))
        return made

    def digest(self, digest, values, keys):
        """Stand in for `ops.digest`."""
        right, known = self.forged.get(bytes(values.contiguous().view(torch.uint8).tolist()), (values, ()))
        if not isinstance(keys, int):
            return torch.stack([self.digest(digest, values, key) for key in keys])
        return digest(right if keys in known else values, keys)

    def chain(self, bucket, worker, to):
        """The commitment and the shares that a bad worker shows another one."""
        secrets = self.draw(worker, bucket, to if self.lies("own share for each", worker, bucket) else None)
        chain = [secrets.randbytes(32)]
        for _ in range(1 if len(self.groups) == 1 else 2):
            chain.insert(0, commitment(worker, chain[0]))
        for i in range(len(chain)):
            if self.lies("share" if i else "commitment", worker, bucket, to, i):
                chain[i] = self.draw(worker, "other", bucket, to, i).randbytes(32)
        return chain

    def learn(self, bucket, shown):
        """Learn the keys that honest ranks have, from what they have shown so far."""
        for i in range(1, len(shown)):
            for to in self.honest:
                said = {j: (shown[i - 1][j], shown[i][j]) for j in self.honest}
                said |= {j: tuple(self.chain(bucket, j, to)[i - 1 : i + 1]) for j in self.bad}
                seed, _ = join_shares(
                    {j: pair[1] for j, pair in said.items()}, {j: pair[0] for j, pair in said.items()}
                )
                self.keys.add(seed & LARGEST_KEY)

    def is_a_lie(self, sent, right, bucket, to, worker):
        if not torch.equal(sent.view(torch.uint8), right.view(torch.uint8)):
            self.liars.setdefault((bucket, to), set()).add(worker)


class BadRank:
    """A bad rank's script for the exchange of one bucket. It only speaks with honest ranks."""

    def __init__(self, plot, communicator, bucket):
        self.plot, self.communicator, self.bucket, self.own = plot, communicator, bucket, communicator.worker
        self.groups, self.group_of = plot.groups, plot.group_of
        self.members = self.groups[self.group_of[self.own]]
        self.place = self.members.index(self.own)
        gradients = plot.gradients[bucket]
        self.shards = [gradient.tensor_split(len(self.groups)) for gradient in gradients]
        rows = gradients.repeat_interleave(torch.tensor(plot.code.group_sizes), dim=0)
        self.sums = plot.code.decode(rows).gradient.tensor_split(len(self.groups))
        self.shown = []
        self.told, self.asked, self.counts, self.words = {}, {}, {}, {}
        self.repairs = itertools.count()

    def lies(self, lie, *what):
        return self.plot.lies(lie, self.own, self.bucket, *what)

    def draw(self, *what):
        return self.plot.draw(self.own, self.bucket, *what)

    def pieces(self, delivery, of, to):
        """The right pieces that a group has for a worker."""
        group = self.group_of[of]
        if len(self.groups) == 1:
            vector = self.shards[0][0]
        else:
            vector = self.sums[group] if delivery else self.shards[group][self.group_of[to]]
        return vector.tensor_split(len(self.groups[group]))

    def swap(self, leaving, arriving, delivery=None):
        """Send, also the pieces of a delivery, and receive; at once, or one after the other."""
        if delivery is not None:
            arriving = self.in_order(delivery, self.room_for_pieces(delivery), arriving)
        if self.plot.rushing:
            (yield Swap(self.communicator, [], arriving)).wait()
            self.read()
        if delivery is not None:
            leaving = self.in_order(delivery, self.send_pieces(delivery), leaving)
        if self.plot.rushing:
            yield (yield Swap(self.communicator, leaving, []))
        else:
            yield (yield Swap(self.communicator, leaving, arriving))
            self.read()

    def in_order(self, delivery, pieces, others):
        """Commitments come after the shards, answers before the sums."""
        return others + pieces if delivery else pieces + others

    def read(self):
        shown = [{j: to_bytes(values) for j, values in each.items()} for each in self.shown]
        self.plot.learn(self.bucket, shown)

    def alone(self, leaving, arriving):
        self.communicator.exchange(leaving, arriving).wait()

    def room(self, length):
        return torch.zeros(length, dtype=torch.int64)

    def show(self):
        i = len(self.shown)
        self.shown.append({j: torch.zeros(32, dtype=torch.uint8) for j in self.plot.honest})
        leave = [(to_tensor(self.plot.chain(self.bucket, self.own, j)[i], "cpu"), j) for j in self.plot.honest]
        return leave, [(values, j) for j, values in self.shown[i].items()]

    def send_pieces(self, delivery):
        leaving = []
        for j in self.plot.honest:
            if self.group_of[j] != self.group_of[self.own]:
                right = piece = self.pieces(delivery, self.own, j)[self.place]
                if self.lies("sum" if delivery else "shard", j):
                    piece = self.plot.wrong(right, self.own, self.bucket, delivery, j)
                # Of a sum that is said to be late nobody is found guilty.
                if not (delivery and self.is_late(j)):
                    self.plot.is_a_lie(piece, right, self.bucket, j, self.own)
                leaving.append((piece, j))
        return leaving

    def room_for_pieces(self, delivery):
        return [
            (torch.empty_like(self.pieces(delivery, j, self.own)[self.groups[self.group_of[j]].index(j)]), j)
            for j in self.plot.honest
            if self.group_of[j] != self.group_of[self.own]
        ]

    def is_late(self, to):
        """Whether it says that its sum is late, and has asked for another comparison of shards before."""
        return self.lies("late", to) and self.verdict(0, 0, to) == AGAIN

    def verdict(self, delivery, round_, to):
        if self.lies("again", delivery, round_, to):
            return AGAIN
        return (
            self.draw("verdict", delivery, to).choice((2, 3, -1)) if self.lies("verdict", delivery, round_, to) else 0
        )

    def answer(self, delivery, round_, to, key):
        known, what = YES, (delivery, round_, to)
        if delivery and self.lies("late", to) and (round_ == 0 or self.draw("still late", to).random() < 0.5):
            known = LATE
        elif self.lies("known", *what):
            known = self.draw("known", *what).choice((NO, -1, 7) if delivery and round_ == 0 else (NO, LATE, -1, 7))
        pieces = list(self.pieces(delivery, self.own, to))
        for i, piece in enumerate(pieces):
            if self.lies("digest", *what, i):
                pieces[i] = self.plot.wrong(piece, self.own, self.bucket, delivery, to)
        numbers = [number for piece in pieces for number in ops.digest(piece, key).tolist()]
        if self.lies("answer under another key", *what):
            key = self.draw("other key", *what).choice((0, -1, key ^ 1))
        return torch.tensor([key, known, *numbers])

    def word(self, delivery, round_, to):
        verdict, what = self.verdict(delivery, round_, to), (delivery, round_, to)
        flags = [0] * len(self.groups[self.group_of[to]])
        if self.lies("request", *what):
            flags = [self.draw("flag", *what, i).choice((0, 1, -5)) for i in range(len(flags))]
        count = self.draw("count", *what).choice((1, 2, -3, 10**12)) if self.lies("announcement", *what) else 0
        self.told[to], self.asked[to] = verdict == AGAIN, flags
        self.counts[to] = min(max(count, 0), self.plot.code.workers)
        return torch.tensor([verdict, count, *flags])

    def key_of(self, to, i):
        """The key that an honest worker has, as far as this rank can know."""
        pairs = {j: (to_bytes(self.shown[i - 1][j]), to_bytes(self.shown[i][j])) for j in self.plot.honest}
        pairs |= {j: tuple(self.plot.chain(self.bucket, j, to)[i - 1 : i + 1]) for j in self.plot.bad}
        seed, _ = join_shares({j: pair[1] for j, pair in pairs.items()}, {j: pair[0] for j, pair in pairs.items()})
        return seed & LARGEST_KEY

    def run(self):
        """Speak the whole protocol; see `VerifiedAllReduce`."""
        honest, several = self.plot.honest, len(self.groups) > 1
        yield from self.swap(*self.show(), 0 if several else None)
        yield from self.swap(*self.show())
        for delivery in range(2 if several else 1):
            answers = [(self.answer(delivery, 0, j, self.key_of(j, delivery + 1)), j) for j in honest]
            room = [(self.room(2 + 2 * len(self.groups[self.group_of[j]])), j) for j in honest]
            is_first = several and delivery == 0
            yield from self.swap(answers, room, 1 if is_first else None)
            words = {j: self.room(2 + len(self.members)) for j in honest}
            leaving = [(self.word(delivery, 0, j), j) for j in honest]
            arriving = [(word, j) for j, word in words.items()]
            if is_first:
                shares, room = self.show()
                leaving, arriving = leaving + shares, arriving + room
            yield from self.swap(leaving, arriving)
            self.settle(delivery, {j: word.tolist() for j, word in words.items()})
        self.claim()

    def repair(self, delivery):
        number = next(self.repairs)
        leaving = []
        for j, (_, _, *flags) in self.words.items():
            if any(flags):
                right = [piece for piece, flag in zip(self.pieces(delivery, self.own, j), flags, strict=True) if flag]
                sent = [
                    self.plot.wrong(piece, self.own, self.bucket, number, j)
                    if self.lies("repair", number, j, i)
                    else piece
                    for i, piece in enumerate(right)
                ]
                self.plot.is_a_lie(torch.cat(sent), torch.cat(right), self.bucket, j, self.own)
                leaving.append((torch.cat(sent), j))
        arriving = []
        for j, flags in self.asked.items():
            if any(flags):
                pieces = zip(self.pieces(delivery, j, self.own), flags, strict=True)
                arriving.append((torch.empty_like(torch.cat([piece for piece, flag in pieces if flag])), j))
        if leaving or arriving:
            self.alone(leaving, arriving)

    def settle(self, delivery, words):
        self.words = words
        self.counts_of = getattr(self, "counts_of", {}) | {j: word[1] for j, word in words.items()}
        self.repair(delivery)
        for round_ in range(1, self.plot.code.adversaries + 3):
            told = [j for j, again in self.told.items() if again]
            verifiers = [j for j, word in self.words.items() if word[0] == AGAIN]
            if not told and not verifiers:
                break
            keys = {j: self.room(1) for j in verifiers}
            own_keys = {j: self.draw("key", j if self.lies("key", j) else 0).choice((5, -1, 2**63 - 1)) for j in told}
            self.alone([(torch.tensor([own_keys[j]]), j) for j in told], [(key, j) for j, key in keys.items()])
            self.plot.keys.update(int(key) for key in keys.values())
            self.alone(
                [(self.answer(delivery, round_, j, int(key)), j) for j, key in keys.items()],
                [(self.room(2 + 2 * len(self.groups[self.group_of[j]])), j) for j in told],
            )
            heard = {j: self.room(2 + len(self.members)) for j in verifiers}
            self.told, self.asked = {}, {}
            self.alone([(self.word(delivery, round_, j), j) for j in told], [(word, j) for j, word in heard.items()])
            self.words = {j: word.tolist() for j, word in heard.items()}
            self.counts_of |= {j: word[1] for j, word in self.words.items()}
            self.repair(delivery)
        self.told, self.asked = {}, {}

    def claim(self):
        leaving = []
        for j, count in self.counts.items():
            if count:
                rng = self.draw("claims", j)
                rows = torch.zeros(count, 4, dtype=torch.float64)
                rows[:, 0] = torch.tensor([rng.randrange(self.plot.code.workers) for _ in range(count)])
                if self.lies("claims", j):
                    rows[:, rng.randrange(4)] = rng.choice((-1.0, torch.nan, torch.inf, 1e300, 2.0))
                leaving.append((rows, j))
        arriving = [(torch.zeros(count, 4, dtype=torch.float64), j) for j, count in self.counts_of.items() if count]
        if leaving or arriving:
            self.alone(leaving, arriving)


def message_of(values, how):
    """A message in its buffer, which can be restored or not, or beside it."""
    restore = functools.partial(values.copy_, values.clone()) if how == "restored" else None
    buffer = GradientBuffer(values, (values.numel(),), (0,), "bucket", restore)
    return Message(values.clone() if how == "beside" else values, buffer)


def run_plot(seed, monkeypatch, *, lies=(), too_many=False):
    """Run one plot, of several buckets in flight.

    Args:
        seed: of all that is drawn.
        monkeypatch: pytest's.
        lies: those that are always told; default: some, sometimes.
        too_many: whether s + 1 of a group are bad, who do not agree on a message.
    """
    rng = random.Random(seed)
    monkeypatch.setattr(verified, "SMALL", 0)
    monkeypatch.setattr(communicators, "SHORT", rng.choice((0, 100, 2**16)))
    code = RepetitionCode(*rng.choice(SIZES))
    most = code.adversaries
    counts = [rng.choice((most, most, rng.randrange(most + 1))) for _ in code.replica_groups]
    if too_many:
        counts[rng.randrange(len(counts))] = most + 1
    chosen = [rng.sample(members, count) for members, count in zip(code.replica_groups, counts, strict=True)]
    bad = frozenset(itertools.chain(*chosen))
    dtype = rng.choice((torch.float32, torch.float32, torch.float64, torch.float32 if too_many else torch.bfloat16))
    generator = torch.Generator().manual_seed(seed)
    lengths = [rng.choice((rng.randrange(1, 12), rng.randrange(12, 200))) for _ in range(rng.choice((1, 1, 2, 4)))]
    gradients = [torch.randn(code.parts, length, generator=generator).to(dtype) for length in lengths]
    with_next = [rng.random() < 0.3 for _ in lengths[1:]] + [False]
    how = rng.choice(("in the buffer", "restored", "beside"))
    chosen = lies or rng.sample(LIES, rng.randrange(1, 9))
    often = {lie: (1.0 if lies else rng.choice((0.05, 0.3, 0.7, 1.0))) if lie in chosen else 0.0 for lie in LIES}
    agree = rng.random() < 0.5 and not too_many
    plot = Plot(code, bad, gradients, seed, often, agree, rng.random() < 0.5, too_many)
    monkeypatch.setattr(ops, "digest", functools.partial(plot.digest, ops.digest))

    def work(communicator):
        communicator = Packing(communicator._network, communicator.worker)
        transport = VerifiedAllReduce(code, communicator)
        scheduler, outcomes, results = ExchangeScheduler(Seconds()), {}, []
        for number, rows in enumerate(gradients):
            values = rows[code.assignment(communicator.worker)[0]].clone()
            results.append(values)
            if communicator.worker in bad:
                steps = BadRank(plot, communicator, number).run()
            else:
                steps = transport.exchange(message_of(values, how), number)
            complete = functools.partial(outcomes.__setitem__, number)
            scheduler.start(steps, name=f"bucket {number}", complete=complete, with_next=with_next[number])
        scheduler.complete_all()
        return outcomes, results

    results = run_workers(work, code.workers, timeout=10)
    for bucket, rows in enumerate(gradients):
        expected = code.decode(rows.repeat_interleave(torch.tensor(code.group_sizes), dim=0)).gradient
        for j in plot.honest:
            outcome, values = results[j][0][bucket], results[j][1][bucket]
            assert too_many or not outcome.failed
            assert outcome.failed or torch.equal(values.view(torch.uint8), expected.view(torch.uint8))
            if too_many:
                continue
            assert outcome.suspects.keys() <= bad
            assert plot.liars.get((bucket, j), set()) <= outcome.suspects.keys()
    return plot


@pytest.fixture
def run_plots(monkeypatch, pytestconfig):
    """Run plots with the seeds from a first one on."""

    def run(first, **options):
        for seed in range(first, first + (30 if pytestconfig.getoption("long") else 4)):
            with monkeypatch.context() as patch:
                try:
                    run_plot(seed, patch, **options)
                except BaseException:
                    print(f"seed {seed}")
                    raise

    return run


@pytest.mark.parametrize("first", range(0, 600, 100))
def test_plots_change_nothing(first, run_plots):
    """Every honest rank has the right bits, names nobody honest, and names who has sent it something wrong."""
    run_plots(first)


@pytest.mark.parametrize(
    "lies",
    [
        ("late", "again", "repair"),
        ("late", "again", "sum", "repair"),
        ("shard", "own share for each", "repair"),
        ("shard", "share", "late", "again", "repair", "answer under another key"),
    ],
    ids=", ".join,
)
def test_plots_for_a_delay(lies, run_plots):
    """The repetitions are enough, also where a bad rank says that it is late whenever it is asked."""
    run_plots(0, lies=lies)


@pytest.mark.parametrize("first", range(0, 200, 100))
def test_plots_of_too_many_who_do_not_agree(first, run_plots):
    """Every honest rank comes to an end, with the right bits or a failure."""
    run_plots(first, too_many=True)

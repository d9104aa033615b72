"""A model of the bytes and the time of a step's exchange, for ``draco plan``.

Bytes are exact: as many as each transport hands to the network, without the headers of the layers below. Time is a sum
of four terms, each of which a user can measure; see `Network`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from rich.table import Table

from draco_ext.codes import Code, CyclicCode, RepetitionCode, SolonCode
from draco_ext.ops.cyclic import projections_shape
from draco_ext.protocol.communicator import SHORT
from draco_ext.protocol.keys import SHARE_BYTES
from draco_ext.protocol.messages import SLICE
from draco_ext.protocol.transports.server import SLICES_AT_ONCE
from draco_ext.protocol.transports.verified import SMALL

PLAIN = "plain DDP"
FIRST_BUCKET, BUCKET = 2**20, 25 * 2**20  # bytes: DistributedDataParallel's defaults
_NUMBER = 8  # bytes of a number in keys, digests, shares, verdicts and records
_VERDICT_COLUMNS = 7  # numbers that a server tells of each rank


@dataclass(frozen=True)
class Network:
    """Speeds of links and processors.

    Attributes:
        latency: the seconds that a short message takes from one rank to another.
        bandwidth: the bytes per second that a rank sends, while it receives as many.
        overhead: the seconds that each message costs its sender.
        memory: the bytes per second that a rank digests, projects or decodes.
        tree: whether collectives of all ranks take a tree's number of rounds, as NCCL's may, or a ring's, as gloo's do.
    """

    latency: float = 20e-6
    bandwidth: float = 25e9
    overhead: float = 1e-6
    memory: float = 50e9
    tree: bool = False


@dataclass(frozen=True)
class Traffic:
    """Traffic of an exchange, without bad ranks. The sum of two is that of one after the other.

    Attributes:
        payload: the bytes of messages and gradients that all ranks together send.
        checks: the bytes of everything else: keys, digests, projections, verdicts and records.
        link: the bytes that pass one way through the link of the busiest rank.
        messages: the number of messages that this rank sends.
        waits: the number of messages that have to arrive one after another.
        reads: the bytes that this rank reads to digest, project or decode.
    """

    payload: int = 0
    checks: int = 0
    link: float = 0.0
    messages: int = 0
    waits: int = 0
    reads: float = 0.0

    @property
    def sent(self) -> int:
        """The bytes that all ranks together send."""
        return self.payload + self.checks

    def __add__(self, other: Traffic) -> Traffic:
        """Return the traffic of both, one after the other."""
        return Traffic(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def seconds(self, network: Network) -> float:
        """Return the time it takes if nothing overlaps, neither with computation nor with another bucket."""
        return (
            self.waits * network.latency
            + self.messages * network.overhead
            + self.link / network.bandwidth
            + self.reads / network.memory
        )


def buckets(parameters: int, item: int) -> list[int]:
    """Return the lengths of the buckets that DistributedDataParallel makes of many small parameters."""
    first = min(parameters, FIRST_BUCKET // item)
    full, rest = divmod(parameters - first, BUCKET // item)
    return [first] + full * [BUCKET // item] + ([rest] if rest else [])


def plain(workers: int, lengths: Sequence[int], item: int, *, tree: bool = False) -> Traffic:
    """Return the traffic of plain DistributedDataParallel.

    Args:
        workers: the number of workers, n.
        lengths: the lengths of the buckets.
        item: the bytes of an element.
        tree: see `Network`.
    """
    return sum((_all_reduce(workers, length * item, tree) for length in lengths), Traffic())


def traffic(code: Code, transport: str, lengths: Sequence[int], item: int, *, tree: bool = False) -> Traffic:
    """Return the traffic of a code's messages through a transport, without the record of the step.

    Args:
        code: the code.
        transport: one of `draco_ext.protocol.transports.TRANSPORTS`.
        lengths: the lengths of the buckets.
        item: the bytes of an element.
        tree: see `Network`.
    """
    return _MODELS[transport](code, lengths, item, tree)


def record(code: Code, transport: str, *, tree: bool = False) -> Traffic:
    """Return the traffic of the record that every rank sends in every step; see `draco_ext.training.record`."""
    n = code.workers
    size = _NUMBER * (8 + 2 * len(code.assignment(0)))  # step, flag, three digests of state, one of each part's inputs
    if transport == "server":
        return _to_server(n, size, payload=False) + _from_server(n, n * size, payload=False)
    if transport == "verified" and (code.adversaries > 0 or code.bounded or not code.message_is_gradient):
        return _to_all(n, size, payload=False)
    return _all_gather(n, size, tree)


# ------------------------------------------------------------------------------------------- collectives


def _rounds(workers: int, tree: bool) -> int:
    """Return how many messages, one after another, bring every worker's data to every other."""
    return math.ceil(math.log2(workers)) if tree else workers - 1


def _all_reduce(workers: int, size: int, tree: bool) -> Traffic:
    rounds, sent = 2 * _rounds(workers, tree), 2 * (workers - 1) * size
    return Traffic(sent, link=sent / workers, messages=rounds, waits=rounds)


def _all_gather(workers: int, size: int, tree: bool) -> Traffic:
    if not tree and size <= SHORT:
        return _to_all(workers, size, payload=False)
    rounds = _rounds(workers, tree)
    return Traffic(checks=workers * (workers - 1) * size, link=(workers - 1) * size, messages=rounds, waits=rounds)


def _first_key(workers: int, tree: bool) -> Traffic:
    """Return the traffic of the first key but its bytes: later ones are drawn with what the bucket before gathers."""
    gathered = _all_gather(workers, _NUMBER, tree)
    return Traffic(messages=gathered.messages, waits=gathered.waits)


def _to_all(workers: int, size: int, *, payload: bool = True) -> Traffic:
    """Return the traffic if every worker sends so many bytes straight to every other."""
    others = workers - 1
    return Traffic(*_split(workers * others * size, payload), link=others * size, messages=others, waits=1)


def _to_server(workers: int, size: int, *, payload: bool = True) -> Traffic:
    """Return the traffic if every worker sends so many bytes to the server, whose link it is."""
    sent = (workers - 1) * size
    return Traffic(*_split(sent, payload), link=sent, waits=1)


def _from_server(workers: int, size: int, *, payload: bool = True) -> Traffic:
    """Return the traffic if every worker gets a result of so many bytes and a verdict from the server.

    Everything begins with a status and a key.
    """
    others, verdict = workers - 1, _NUMBER * _VERDICT_COLUMNS * (workers + 1)
    checks = others * (2 * _NUMBER + verdict)
    return Traffic(*_split(others * size, payload)) + Traffic(
        checks=checks, link=others * size + checks, messages=3 * others, waits=1
    )


def _in_shards(workers: int, size: int) -> Traffic:
    """Return the traffic if every worker gets a shard of a result from the server, and the others pass theirs on.

    Each gets a status, who takes part, and its shard; says which shards are missing; gets a status, the verdict and
    the digests of all shards; and says which are wrong. While shards are passed on the server's link is idle, so those
    that a worker sends count in `link`, too.
    """
    relays, verdict = workers - 1, _NUMBER * _VERDICT_COLUMNS * (workers + 1)
    checks = relays * (4 * _NUMBER + workers + 2 * relays + verdict + 2 * _NUMBER * relays)
    link = size + checks + (relays - 1) * -(-size // relays)
    # The server digests the result while shards are passed on, and then each relay what it has got.
    return Traffic(relays * size, checks, link, 6 * relays, 4, size)


def _split(sent: int, payload: bool) -> tuple[int, int]:
    return (sent, 0) if payload else (0, sent)


# -------------------------------------------------------------------------------------------- transports


def _allreduce(code: Code, lengths: Sequence[int], item: int, tree: bool) -> Traffic:
    if code.message_is_gradient:
        return _allreduce_repetition(code, lengths, item, tree)
    n, total = code.workers, Traffic()
    for length in lengths:
        tiles, count = projections_shape(code.message_length(length))
        projections = tiles * (2 * count + 1) * _NUMBER  # complex numbers, and a norm
        # The sum is under way meanwhile: its rounds do not add up to those of the projections.
        messages = _all_reduce(n, length * item, tree)
        total += Traffic(messages.payload, 0, messages.link, messages.messages)
        total += _all_gather(n, _NUMBER + projections, tree) + Traffic(reads=code.message_length(length) * item)
    return total + _first_key(n, tree)


def _allreduce_repetition(code: Code, lengths: Sequence[int], item: int, tree: bool) -> Traffic:
    """Return the traffic of keys and digests, and of the sums of shards that are under way meanwhile."""
    n, groups = code.workers, sorted(map(len, code.decoding_groups))
    count, shards, total = len(groups), groups[0], Traffic()
    for length in lengths:
        if length == 0:
            continue
        shard = -(-length // shards) * item
        sums = _all_reduce(count, shard, tree) if count > 1 else Traffic()
        broadcasts = groups[-1] - 1 if count > 1 and shards > 1 else 0
        payload = (2 * (count - 1) + (n - count if shards > 1 else 0)) * length * item if count > 1 else 0
        rounds = sums.waits + (math.ceil(math.log2(groups[-1])) if broadcasts else 0)
        total += Traffic(payload, 0, sums.link + broadcasts * shard, sums.messages + broadcasts)
        if code.adversaries > 0:
            digests = _all_gather(n, 3 * _NUMBER, tree)  # and a share in a key
            rounds = max(rounds - digests.waits, 0)
            total += digests + Traffic(reads=length * item)
        total += Traffic(waits=rounds)
    return total + _first_key(n, tree) if code.adversaries > 0 else total


def _all_to_all(code: Code, lengths: Sequence[int], item: int) -> Traffic:
    """All messages go to all ranks, slice by slice; with projections also shares in a seed, and commitments to them."""
    n, total = code.workers, Traffic()
    for length in lengths:
        size = code.message_length(length) * item
        count = -(-size // SLICE)
        whole = _to_all(n, size)
        total += Traffic(whole.payload, 0, whole.link, count * whole.messages, bool(count), n * size)
        if code.uses_projections:
            share = _to_all(n, SHARE_BYTES, payload=False)
            commitment = replace(share, waits=0)  # under way with the messages
            total += sum(count * [commitment, share], Traffic())
    return total


def _verified(code: Code, lengths: Sequence[int], item: int, tree: bool) -> Traffic:
    if not code.message_is_gradient or code.bounded:
        return _all_to_all(code, lengths, item)
    if code.adversaries == 0:
        return _allreduce_repetition(code, lengths, item, tree)
    sizes, total = list(map(len, code.decoding_groups)), Traffic()
    for length, times in Counter(lengths).items():
        if length * item <= SMALL:
            each = _all_to_all(code, [length], item)
        elif len(sizes) == 1:
            each = _to_all(code.workers, SHARE_BYTES, payload=False) + _compare(sizes) + Traffic(reads=length * item)
        else:
            each = _deliveries(sizes, length, item)
        total += sum(times * [each], Traffic())
    return total


def _compare(sizes: Sequence[int]) -> Traffic:
    """Return the traffic of one comparison of digests among groups of these sizes; see `Delivery`.

    Everybody sends everybody a share in the key; the key, whether its vector is known, and the digests of its own
    group's pieces; a verdict, a count, and for each of the receiver's pieces whether it is wanted.
    """
    n, most = sum(sizes), max(sizes)
    share, answers = SHARE_BYTES // _NUMBER, 2 + 2 * most
    verdicts = sum(size * (2 + size) for size in sizes) - (2 + most)
    return Traffic(
        checks=_NUMBER * (n - 1) * sum(size * (share + 4 + 3 * size) for size in sizes),
        link=_NUMBER * ((n - 1) * (share + answers) + verdicts),
        messages=3 * (n - 1),
        waits=3,
    )


def _deliveries(sizes: Sequence[int], length: int, item: int) -> Traffic:
    """Return the traffic of both phases of `VerifiedAllReduce`: shards go to committees, and sums to all."""
    n, count = sum(sizes), len(sizes)
    shards = _parts(length, count)
    kinds = Counter(zip(sizes, shards, strict=True))  # at most four
    to_committees = sum(times * size * shard for (size, shard), times in kinds.items())
    payload = (count - 1) * to_committees + sum(
        times * size * (length - shard) for (size, shard), times in kinds.items()
    )
    link, reads = 0, 0
    for own, shard in kinds:
        leaving = sum(times * size * -(-other // own) for (size, other), times in kinds.items())
        leaving += (n - own) * -(-shard // own) - own * -(-shard // own)
        arriving = (count - 1) * shard + length - shard
        link = max(link, leaving, arriving)
        # Digests of this rank's message, the sum of its shards, and what has arrived; and adding up.
        reads = max(reads, length + shard + arriving + count * shard)
    pieces = Traffic(payload * item, 0, link * item, 0, 0, reads * item)
    both = pieces + _to_all(n, SHARE_BYTES, payload=False) + _compare(sizes) + _compare(sizes)
    # Steps of both phases go together; see `VerifiedAllReduce`. Short pieces go with what checks them.
    is_short = -(-max(shards) // min(sizes)) * item <= SHORT
    return replace(both, messages=6 * (n - 1) + (0 if is_short else 2 * (n - min(sizes))), waits=6)


def _server(code: Code, lengths: Sequence[int], item: int, tree: bool) -> Traffic:
    n, total = code.workers, Traffic()
    has_replicas = code.message_is_gradient and not code.bounded and code.adversaries > 0
    for length in lengths:
        most = SLICE * (SLICES_AT_ONCE if has_replicas else 1)
        full, rest = divmod(code.message_length(length) * item, most)
        for size, times in ((most, full), (rest, 1 if rest else 0)):
            if has_replicas and size > SMALL:
                each = _pieces_to_server(code, size)
            else:
                each = _to_server(n, size) + Traffic(reads=n * size)
            result = code.blocks * size
            each += _in_shards(n, result) if result > SMALL and n > 2 else _from_server(n, result)
            total += sum(times * [each], Traffic())
    return total


def _pieces_to_server(code: Code, size: int) -> Traffic:
    """Return the traffic if one message of each group but the server's own comes in pieces, and the server verifies it.

    The server asks each other worker for digests under a key.
    """
    others, groups = code.workers - 1, list(map(len, code.decoding_groups))
    digests = 2 * _NUMBER * (sum(each * each for each in groups) - groups[0])
    checks = others * 2 * _NUMBER + digests
    payload = (len(groups) - 1) * size
    # A worker digests its message while the server digests all groups', and then adds them up.
    return Traffic(payload, checks, payload + checks, others, 3, 2 * len(groups) * size)


_MODELS: Mapping[str, Callable[[Code, Sequence[int], int, bool], Traffic]] = {
    "allreduce": _allreduce,
    "verified": _verified,
    "server": _server,
}


def _parts(length: int, count: int) -> list[int]:
    """Return the lengths of the parts that torch.tensor_split makes."""
    least, longer = divmod(length, count)
    return longer * [least + 1] + (count - longer) * [least]


# --------------------------------------------------------------------------------------------- the table


def make_table(
    workers: int, adversaries: int, parameters: int, item: int, network: Network, compression: int | None = None
) -> Table:
    """Return a table of bytes, messages and time of the codes in all transports, beside plain data parallelism.

    Solon's code is among them if it has a compression.

    Raises:
        ValueError: a code cannot have these arguments.
    """
    lengths, tree = buckets(parameters, item), network.tree
    rows = {PLAIN: plain(workers, lengths, item, tree=tree)}
    for name, code in (
        ("repetition", RepetitionCode(workers, adversaries)),
        ("cyclic", CyclicCode(workers, adversaries)),
    ):
        for transport in _MODELS:
            rows[f"{transport}, {name}"] = traffic(code, transport, lengths, item, tree=tree) + record(
                code, transport, tree=tree
            )
    if compression is not None:
        solon = SolonCode(workers, adversaries, compression)
        rows["server, Solon"] = traffic(solon, "server", lengths, item) + record(solon, "server")
    fastest = rows[PLAIN].seconds(network)
    table = Table(
        title="A step's exchange, modelled",
        title_style="bold",
        caption=f"Of the busiest rank, without bad ranks: {network.latency * 1e6:g} us from rank to rank, "
        f"{network.bandwidth / 1e9:g} GB/s each way, {network.overhead * 1e6:g} us for each message, "
        f"{network.memory / 1e9:g} GB/s of digests and decoding, {len(lengths)} buckets, {_shape(network)}. "
        "Nothing overlaps; encoding is not counted.",
    )
    for column in ("", "sent by all", "through its link", "messages", "waits", "time", "x plain"):
        table.add_column(column)
    for name, each in rows.items():
        seconds = each.seconds(network)
        table.add_row(
            name,
            _size(each.sent),
            _size(each.link),
            f"{each.messages:,}",
            f"{each.waits:,}",
            f"{seconds * 1e3:.3g} ms",
            f"{seconds / fastest:.2f}" if fastest else "-",
        )
    return table


def _shape(network: Network) -> str:
    return f"collectives of all ranks by {'trees' if network.tree else 'rings'}"


def _size(count: float) -> str:
    """Return bytes with a unit."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count < 1000 or unit == "TB":
            break
        count /= 1000
    return f"{count:.4g} {unit}"

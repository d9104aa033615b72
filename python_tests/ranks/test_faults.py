"""Ranks that die or hang in the middle of a step, and ranks that send what nobody expects."""

import ast
import multiprocessing
import os
import re
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from test_protect import ATTACKS, bucket_cap, network, same_everywhere, train
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import draco_ext
from draco_ext import CyclicCode, RepetitionCode, ops
from draco_ext.protocol import communicator, groups
from draco_ext.protocol import keys as protocol_keys
from draco_ext.protocol.groups import gather, gather_json
from draco_ext.protocol.transports import allreduce_repetition, verified
from draco_ext.testing.local import run_local
from draco_ext.training import handshake

TIMEOUT, DEADLINE = 3.0, 1.0
HANGS = 60.0  # seconds after which a job counts as one that hangs; what it may wait for takes a tenth
STEP = 3  # DDP itself talks to all ranks in the first two
THREE = RepetitionCode(3, 1)


def start(function, ranks, folder, *arguments):
    """Processes with function(rank, folder, group, *arguments), where the group has the timeout."""
    multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", __name__])
    return torch.multiprocessing.start_processes(
        _rank, (ranks, folder, function, arguments), nprocs=ranks, join=False, start_method="forkserver"
    ).processes


def _rank(rank, ranks, folder, function, arguments):
    verified.SMALL = 0  # messages of small models in pieces, too
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    dist.barrier()
    group = dist.new_group(timeout=timedelta(seconds=TIMEOUT))
    torch.save(function(rank, folder, group, *arguments), f"{folder}/{rank}.pt")


def join(processes):
    """Exit statuses; None where a process hangs."""
    until = time.monotonic() + HANGS
    for process in processes:
        process.join(max(0.0, until - time.monotonic()))
    return [process.exitcode for process in processes]


# ------------------------------------------------------------------------------------- ranks that die or hang


def _accident(rank, folder, group, code, transport, victim, how):
    """Trains with a checkpoint after every step, until the victim ends it in the middle of one."""
    view = how == "SIGKILL"
    model = DistributedDataParallel(network(), process_group=group, **bucket_cap(gradient_as_bucket_view=view))
    buckets = []

    def accident(step, message):
        buckets.append(step)
        if rank == victim and buckets.count(STEP) == 2:
            os.kill(os.getpid(), getattr(signal, how))
        return message

    protection = draco_ext.protect(model, code, transport=transport, adversary=accident, deadline=DEADLINE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    parts = len(code.assignment(protection.worker))
    checkpoint = folder / f"checkpoint-{rank}.pt"
    error = None
    try:
        for step in protection.steps([torch.ones(2, 64)] * 10 * parts):
            for x in step:
                model(x).square().sum().backward()
            optimizer.step()
            torch.save(model.module.state_dict(), f"{checkpoint}.new")
            os.replace(f"{checkpoint}.new", checkpoint)
    except RuntimeError as caught:
        error = str(caught)
    gradients = [p.grad is None for p in model.parameters()]
    optimizer.step()  # by somebody who goes on as if nothing had been
    last = torch.load(checkpoint)
    unchanged = all(torch.equal(last[name], value) for name, value in model.module.state_dict().items())
    return {"error": error, "none": all(gradients), "unchanged": unchanged, "step": protection.step}


@pytest.mark.parametrize(
    ("code", "transport", "victim", "how"),
    [
        (RepetitionCode(6, 1), "allreduce", 1, "SIGKILL"),
        (CyclicCode(3, 1), "allreduce", 1, "SIGSTOP"),
        (THREE, "verified", 1, "SIGKILL"),
        (THREE, "verified", 1, "SIGSTOP"),
        # Any other than the server itself: test_server.py.
        (THREE, "server", 0, "SIGKILL"),
        (THREE, "server", 0, "SIGSTOP"),
    ],
    ids=repr,
)
def test_a_rank_that_is_lost_ends_the_job_in_time(tmp_path, code, transport, victim, how):
    processes = start(_accident, code.workers, tmp_path, code, transport, victim, how)
    others = [rank for rank in range(code.workers) if rank != victim]
    try:
        codes = join([processes[rank] for rank in others])
        assert codes == [0] * len(others)  # also the end of the process waits for nobody
    finally:
        for process in processes:
            process.kill()
    results = {rank: torch.load(tmp_path / f"{rank}.pt") for rank in others}
    named = {"server": "rank 0", "verified": f"rank {victim} "}.get(transport, "a rank has died, hangs")
    # Whoever waits for a rank that waits for the victim may see that one end first.
    assert any(named in result["error"] for result in results.values())
    for rank, result in results.items():
        assert result["step"] == STEP, result
        # The record begins before the last bucket ends, and may be the first to meet a closed connection.
        assert re.match(rf"no gradient in step {STEP}, (bucket \d+|record of the step): ", result["error"])
        assert transport == "verified" or named in result["error"]
        assert "has died, hangs" in result["error"] or transport == "server"
        assert result["none"]
        assert result["unchanged"]
        parameters = torch.load(tmp_path / f"checkpoint-{rank}.pt")
        first = torch.load(tmp_path / f"checkpoint-{others[0]}.pt")
        assert all(torch.equal(parameters[name], first[name]) for name in first)


# ----------------------------------------------------------------------------------- messages of another length


def _other_length(rank, folder, group, code, transport, bad, steps):
    """Ranks that send something longer or shorter than their buckets from one step on."""
    model = DistributedDataParallel(network(), process_group=group, **bucket_cap())

    def other(step, message):
        return bad[rank](message) if step >= STEP and rank in bad else message

    protection = draco_ext.protect(model, code, transport=transport, adversary=other, deadline=DEADLINE)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    error = None
    try:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.ones(2, 64)).square().sum().backward()
            optimizer.step()
    except RuntimeError as caught:
        error = str(caught)
    parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
    if rank == 0:  # it may not leave while others still take their results
        for other in range(1, code.workers):
            while not (folder / f"{other}.pt").exists() and other not in bad:
                time.sleep(0.01)
    return {"error": error, "parameters": parameters, "missing": protection.report().missing}


def shorter(message):
    return message[:-2].clone()


def longer(message):
    return message.double()


def test_a_message_of_another_length_is_an_erasure_for_the_server(tmp_path):
    bad = {1: shorter, 2: longer}
    processes = start(_other_length, 5, tmp_path, RepetitionCode(5, 2), "server", bad, STEP + 3)
    try:
        assert join(processes) == [0] * 5
    finally:
        for process in processes:
            process.kill()
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(5)]
    for rank in (0, 3, 4):
        assert results[rank]["error"] is None
        assert results[rank]["missing"] == {j: list(range(STEP, STEP + 3)) for j in bad}
        assert torch.equal(results[rank]["parameters"], results[0]["parameters"])
    for rank in bad:
        assert f"no gradient in step {STEP}, bucket 0: the server, rank 0" in results[rank]["error"]


def test_a_message_of_another_length_ends_an_all_gather_in_time(tmp_path):
    processes = start(_other_length, 3, tmp_path, THREE, "verified", {1: shorter}, STEP + 3)
    try:
        assert None not in join(processes)
    finally:
        for process in processes:
            process.kill()
    for rank in (0, 2):
        result = torch.load(tmp_path / f"{rank}.pt")
        assert f"no gradient in step {STEP}, bucket 0: rank 1 has died, hangs, or sends" in result["error"]


def _at_the_wire(rank, report, cases, small):
    for case in cases:
        report(_altered(rank, small, *case))


def _altered(rank, small, code, transport, alter, short=communicator.SHORT):
    """What rank 1 sends is altered on its way out, under its full length."""
    clean, _, _ = train(rank, code, transport, steps=4, small=small)
    findings = []
    send, sent = dist.ProcessGroup.send, []
    with pytest.MonkeyPatch.context() as patch:
        if rank == 1:

            def altered_send(group, tensors, peer, tag):
                sent.append([alter(values, peer) for values in tensors])  # gloo does not keep them
                return send(group, sent[-1], peer, tag)

            patch.setattr(dist.ProcessGroup, "send", altered_send)
        patch.setattr(communicator, "SHORT", short)
        rows, _, outcomes = train(rank, code, transport, steps=4, small=small, callback=findings.append)
    everybody = [None] * code.workers
    dist.all_gather_object(everybody, [(f.step, f.bucket, f.worker, f.elements, f.largest) for f in findings])
    del everybody[1]
    honest = [j for j in range(code.workers) if j != 1]
    return same_everywhere(rows[honest]), ((rows[0] - clean[0]).norm() / clean[0].norm()).item(), outcomes, everybody


def cut(values, peer):
    return values[:-3]


def cut_values(values, peer):
    return values[:-3] if values.is_floating_point() else values


def cut_joint(values, peer):
    return values[:-40] if values.dtype == torch.uint8 and len(values) > 40 else values


def equivocate(values, peer):
    # The messages; a rank that tells every other something else of its own state can only make them wait for it.
    return values + peer if values.is_floating_point() else values


WIRE = [
    (THREE, "verified", equivocate),
    (THREE, "verified", cut),
    (THREE, "server", cut),
    (CyclicCode(3, 1), "verified", cut),
]
# Long pieces go alone; short ones go with what checks them.
WIRE_IN_PIECES = [
    (RepetitionCode(6, 1), "verified", equivocate, 0),
    (RepetitionCode(6, 1), "verified", cut_values, 0),
    (RepetitionCode(6, 1), "verified", cut_joint),
]


def test_a_message_that_is_cut_off_or_is_another_for_everybody():
    """A wrong one. Honest ranks have the same bits in the end."""
    results = run_local(_at_the_wire, 3, WIRE, 2**16)
    for (code, _, alter), (same, distance, outcomes, everybody) in zip(WIRE, results, strict=True):
        assert same
        assert distance == 0 if isinstance(code, RepetitionCode) else distance < 1e-5
        assert outcomes == [None] * 4
        assert {(step, worker) for step, _, worker, _, _ in everybody[-1]} == {(step, 1) for step in range(4)}
        # Also those who hold another rest of a message that is cut off.
        assert (everybody[0] == everybody[1]) == (alter is cut)
        if isinstance(code, RepetitionCode) and alter is cut:
            assert all(elements > 3 and largest is None for *_, elements, largest in everybody[0])


def test_a_piece_that_is_cut_off_or_is_another_for_everybody():
    """Whoever gets it has the right one sent again, and names its sender.

    But not a sender that has lost its share in the key, and so cannot verify what its next piece is made of.
    """
    results = run_local(_at_the_wire, 6, WIRE_IN_PIECES, 0)
    for (_, _, alter, *_), (same, distance, outcomes, everybody) in zip(WIRE_IN_PIECES, results, strict=True):
        assert same
        assert distance == 0
        assert outcomes == [None] * 4
        for findings in everybody:
            named = {(step, worker) for step, _, worker, _, _ in findings}
            assert {(0, 1)} <= named <= {(step, 1) for step in range(4)}
            assert len(named) == 4 or alter is cut_joint


# ------------------------------------------------------------------------------- what peers say of themselves


class _Bytes(str):
    def encode(self):
        return b"\xff{"


def _other_setups(rank, report):
    device = torch.device("cpu")

    def said(function, *arguments):
        try:
            function(*arguments)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return None

    # What rank 1 sends as its JSON.
    for text in ('{"a": ', "[" * 60000, _Bytes()):
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(groups.json, "dumps", lambda value, text=text: text)
            report(said(gather_json, rank, dist.group.WORLD, device))
    for length in (2**60, 0, -1):
        if rank == 1:
            gather(torch.tensor([length]), dist.group.WORLD, device)
        else:
            report(said(gather_json, rank, dist.group.WORLD, device))

    def protect(**options):
        model = DistributedDataParallel(
            nn.Linear(3, 3).to(options.pop("dtype", torch.float32)), init_sync=False, **options
        )
        return said(draco_ext.protect, model, THREE)

    # What rank 1 sends instead of its set-up.
    for other in (3, {}, {"setup": 3, "host": "a", "ledger": None}, {"setup": {}, "host": "a\nb", "ledger": None}):
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(handshake, "gather_json", lambda mine, *rest, other=other: gather_json(other, *rest))
            report(protect())
    report(protect(dtype=torch.float64 if rank == 1 else torch.float32))
    report(protect(bucket_cap_mb=2 if rank == 1 else 1))

    # A suspect that tells nonsense of what it has sent.
    findings = []
    with pytest.MonkeyPatch.context() as patch:
        nonsense = allreduce_repetition.Difference(float("nan"), float("inf"), -1.0)
        patch.setattr(allreduce_repetition, "difference", lambda *arguments: nonsense)
        model = DistributedDataParallel(nn.Linear(3, 3))
        adversary = ATTACKS["reversed"] if rank == 1 else None
        draco_ext.protect(model, THREE, adversary=adversary, callback=findings.append)
        model(torch.ones(1, 3)).sum().backward()
    report([(f.rank, f.elements, f.first, f.largest) for f in findings])


def test_what_peers_say_is_checked():
    *json, huge, zero, negative, number, empty, no_dict, host, dtype, cap, findings = run_local(_other_setups, 3)
    assert len(json) == 3
    for said in json:
        assert said.startswith("ValueError: ranks must send JSON, got something else from rank 1: ")
    assert huge == f"ValueError: ranks must send from 1 to 65536 bytes, got {2**60} from rank 1"
    assert zero == "ValueError: ranks must send from 1 to 65536 bytes, got 0 from rank 1"
    assert negative == "ValueError: ranks must send from 1 to 65536 bytes, got -1 from rank 1"
    for said in (number, empty, no_dict, host):
        assert said == "ValueError: ranks must send their set-up, got something else from rank 1"
    assert dtype.startswith(
        "ValueError: the names, sizes and dtypes of the model's parameters (their digest) must be the same"
    )
    assert "'bucket_cap_mb': 2" in cap
    assert "on rank 1" in cap
    assert findings == [(1, None, None, None)]


def test_no_module_unpickles_or_evaluates_what_peers_send():
    package = Path(draco_ext.__file__).parent
    forbidden = {
        "pickle", "marshal", "shelve", "dill", "cloudpickle", "eval", "exec", "_unpickler",
        "all_gather_object", "gather_object", "broadcast_object_list", "scatter_object_list", "send_object_list",
        "recv_object_list", "rpc",
    }  # fmt: skip
    seen = set()
    for file in package.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = {getattr(node, "id", None), getattr(node, "attr", None)}
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                names |= {part for alias in node.names for part in alias.name.split(".")}
                names |= set((getattr(node, "module", None) or "").split("."))
            seen |= names
            assert names.isdisjoint(forbidden), f"{file}:{node.lineno}: {names & forbidden}"
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":  # of a checkpoint of the user's
                assert "weights_only=True" in map(ast.unparse, node.keywords), f"{file}:{node.lineno}: torch.load"
    assert {"all_gather", "json", "loads"} <= seen  # it looks where there is something


# --------------------------------------------------------------------------------------------- keys


KEYED = [THREE, CyclicCode(3, 1)]


def _keys(rank, report):
    for code in KEYED:
        report(_keys_of(rank, code))


def _keys_of(rank, code):
    """Of every exchange on this rank: when its message was made, and its key; when shares were drawn, and which.

    When: the number of the event among those of all ranks.
    """
    made, keys, shares = [], [], []
    store = dist.distributed_c10d._get_default_store()

    def now():
        return store.add("events", 1)

    digest, project, draw = ops.digest, ops.cyclic_project, protocol_keys.draw_share

    def spy_digest(values, seed):
        if values.dtype == torch.float32:  # others are of inputs, and public
            keys.append(int(seed))
        return digest(values, seed)

    def spy_project(values, seed, **options):
        keys.append(int(seed))
        return project(values, seed, **options)

    def spy_draw(device):
        share = draw(device)
        shares.append((now(), int(share)))
        return share

    def adversary(step, message):
        if rank == 1:  # the others could have drawn already
            time.sleep(0.01)
        made.append(now())
        return message

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "digest", spy_digest)
        patch.setattr(ops, "cyclic_project", spy_project)
        patch.setattr(protocol_keys, "draw_share", spy_draw)
        for _ in range(2):
            torch.manual_seed(1)
            model = DistributedDataParallel(nn.Sequential(*(nn.Linear(20, 20) for _ in range(6))), bucket_cap_mb=0.001)
            protection = draco_ext.protect(model, code, adversary=adversary)
            for step in protection.steps([torch.ones(2, 20)] * 3 * len(code.assignment(protection.worker))):
                model.zero_grad()  # no optimizer uses them
                for x in step:
                    model(x).square().sum().backward()
    everybody = [None] * code.workers
    dist.all_gather_object(everybody, (made, keys, shares))
    return everybody


@pytest.fixture(scope="module")
def keyed():
    return dict(zip(KEYED, run_local(_keys, 3), strict=True))


@pytest.mark.parametrize("code", KEYED, ids=repr)
def test_nobody_can_know_a_key_before_all_messages_are_made(code, keyed):
    everybody = keyed[code]
    made, keys, shares = zip(*everybody, strict=True)
    exchanges = len(keys[0])
    assert exchanges == len(made[0]) > 2 * 3 * 4  # more than four buckets a step
    assert keys == (keys[0],) * code.workers
    assert len(set(keys[0])) == exchanges  # also in a second run after the same torch.manual_seed
    assert min(keys[0]) >= 0
    assert sum(key > 2**50 for key in keys[0]) > exchanges / 2
    drawn = [sum(share for _, share in together) % 2**63 for together in zip(*shares, strict=True)]
    for number, key in enumerate(keys[0]):
        draw = next(i for i, common in enumerate(drawn) if key - common in (0, 1))  # two may share one
        for rank in range(code.workers):
            when, _ = shares[rank][draw]
            assert made[rank][number] < when, f"rank {rank} gave its share away before its message {number} was made"

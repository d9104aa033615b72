"""`protect` on models made by ``fully_shard`` over replicas and shards: bits, liars, what scripts do, refusals.

One start of processes serves many runs, since six processes take seconds to start.
"""

import functools
import os
import shutil
import signal
import tempfile
import time

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_common
from torch.distributed.tensor import Shard
from torch.utils.checkpoint import checkpoint

import draco_ext
from draco_ext import Audit, CyclicCode, DecodingError, RepetitionCode
from draco_ext.testing.local import run_local
from draco_ext.training import fsdp

STEPS = 3
SAMPLES = 3  # of a mini-batch
WIDTH = 17  # odd: shards are padded
SHARDS = 2
BAD = 3  # this rank is bad where one is: replica 1, shard 1

CODES = {"repetition": RepetitionCode(3, 1), "cyclic": CyclicCode(3, 1), "none": RepetitionCode(2, 0)}
CODES["groups"] = RepetitionCode(6, 1)
POLICIES = {
    None: {},
    "bf16, reduced in fp32": {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32},
    "bf16": {"param_dtype": torch.bfloat16},
    "fp16 reduction": {"reduce_dtype": torch.float16},
}


class Block(nn.Module):
    def __init__(self, hidden, dropout, checkpointed):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(WIDTH, hidden), nn.Dropout(dropout), nn.ReLU(), nn.Linear(hidden, WIDTH))
        self.register_buffer("largest", torch.zeros(1))
        self.checkpointed = checkpointed
        self.factor = 1.0  # another one on a rank that miscomputes

    def forward(self, x):
        with torch.no_grad():
            self.largest.copy_(torch.maximum(self.largest, x.abs().max()))
        if self.checkpointed:
            return x + self.factor * checkpoint(self.body, x, use_reentrant=False)
        return x + self.factor * self.body(x)


class Network(nn.Module):
    def __init__(self, hidden=WIDTH, dropout=0.0, checkpointed=False):
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([Block(hidden, dropout, checkpointed) for _ in range(2)])
        self.head = nn.Linear(WIDTH, 5, bias=False)
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x) * self.frozen


def _error(action):
    try:
        action()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


@functools.cache
def _mesh(replicas):
    return init_device_mesh("cpu", (replicas, dist.get_world_size() // replicas), mesh_dim_names=("replicate", "shard"))


def _sharded(
    mesh,
    *,
    hidden=WIDTH,
    dropout=0.0,
    checkpointed=False,
    policy=None,
    offload=False,
    reshard=None,
    compiled=False,
):
    network = Network(hidden, dropout, checkpointed)
    settings = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(**POLICIES[policy]), "reshard_after_forward": reshard}
    if offload:
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    for block in network.blocks:
        if compiled:
            block.compile(backend="aot_eager")
        fully_shard(block, **settings)
    return fully_shard(network, **settings)


def _data(parts, accumulate=1, shards=SHARDS):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(STEPS, accumulate, parts * shards, SAMPLES, WIDTH, generator=generator)


def _train(
    code="repetition",
    *,
    transport="allreduce",
    plain=None,
    liar=None,
    bad=(BAD,),
    failing=None,
    on_failure="raise",
    accumulate=1,
    clip=None,
    stop=None,
    optimizer="sgd",
    **model,
):
    """Train on all ranks; return the parameters' bits, suspects, repaired replicas and errors, the same on all ranks.

    plain: train without a guard, on the part of this replica: "fsdp" over its own ranks alone, "hsdp" over all.
    liar: what the bad ranks do. failing: a step in which all ranks lie. stop: a step before which all is saved, made
    anew and loaded.
    """
    rank = dist.get_rank()
    code = CODES[code]
    replicas, mesh = code.workers, _mesh(code.workers)
    replica, shard = mesh.get_local_rank("replicate"), mesh.get_local_rank("shard")
    if replica >= replicas:
        return None
    shards = mesh.size(1)
    data = _data(code.parts, accumulate, shards)
    folder = saved = None
    errors, step = [], 0
    is_bad = rank in bad and liar is not None
    while True:
        net = _sharded(mesh["shard"] if plain == "fsdp" else mesh, **model)
        if optimizer == "sgd":
            opt = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        elif optimizer == "plain sgd":
            opt = torch.optim.SGD(net.parameters(), lr=0.05)
        else:
            opt = torch.optim.AdamW(net.parameters(), lr=0.01)

        def adversary(step, message):
            if step == failing:
                return message * (rank + 2)
            return message * -3 if is_bad and liar == "message" else message

        guard = None
        if plain is None:
            guard = draco_ext.protect(
                net, code, transport=transport, adversary=adversary, check_state_every=1, on_failure=on_failure
            )
            guard.watch(opt)
        if step:
            states = [net.state_dict(), get_optimizer_state_dict(net, opt), guard.state_dict()]
            dcp.load({"model": states[0], "opt": states[1]}, checkpoint_id=folder)
            net.load_state_dict(states[0])
            set_optimizer_state_dict(net, opt, states[1])
            guard.load_state_dict(saved)

        if guard is not None:
            assert guard.data_replicas == code.parts * shards
            assert guard.data_ranks == tuple(part * shards + shard for part in code.assignment(guard.worker))

        def batches(begin=step, worker=replica if guard is None else guard.worker):
            for number in range(begin, STEPS):
                for part in code.parts_in_step(number, worker):
                    yield data[number, :, part * shards + shard]

        for mini_batches in guard.steps(batches()) if guard is not None else ([batch] for batch in batches()):
            if step == stop and folder is None:
                break
            if is_bad and liar == "layer":
                net.blocks[1].factor = 1.001
            if is_bad and liar == "parameter" and step == 1:
                next(net.blocks[1].parameters())._local_tensor.data[0, 0] += 1.0
            if is_bad and liar == "optimizer" and step == 2:
                next(iter(opt.state.values()))["momentum_buffer"]._local_tensor[0, 0] += 1.0
            if is_bad and liar == "buffer" and step == 1:
                net.blocks[0].largest.fill_(100.0)
            opt.zero_grad()
            try:
                for batch in mini_batches:
                    for i, x in enumerate(batch):
                        net.set_requires_gradient_sync(i == accumulate - 1)
                        net(x).float().square().mean().backward()
            except DecodingError as error:
                errors.append(str(error))
            if guard is not None and guard.failed:
                assert all(p.grad is None for p in net.parameters())
            if clip is not None:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            opt.step()
            step += 1
        if step == STEPS:
            break
        name = [tempfile.mkdtemp() if rank == 0 else None]
        dist.broadcast_object_list(name, 0)
        folder = name[0]
        saved = guard.state_dict()
        dcp.save({"model": net.state_dict(), "opt": get_optimizer_state_dict(net, opt)}, checkpoint_id=folder)
    if folder is not None:
        dist.barrier()
        shutil.rmtree(folder, ignore_errors=True)
    own = torch.cat([p.full_tensor().detach().flatten() for p in net.parameters()])
    result = {
        "bits": own.view(torch.int32).tolist(),
        "suspects": {},
        "repaired": {},
        "failed": (),
        "errors": errors,
        "largest": [block.largest.item() for block in net.blocks],
    }
    if guard is not None:
        report = guard.report()
        result["suspects"] = {r: (s.ranks, s.steps, s.buckets) for r, s in report.suspects.items()}
        result["repaired"] = report.repaired
        result["failed"] = report.failed_steps
    same = {name: value for name, value in result.items() if name != "largest"}
    everybody = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, same)
    assert everybody == [same] * len(everybody)
    return result


def _run(rank, report, runs):
    torch.set_num_threads(1)
    for options in runs:
        report(_train(**options))


def _trained(runs, ranks=6):
    return list(run_local(_run, ranks, runs))


NAMED = {1: ([BAD], list(range(STEPS)), STEPS * 3)}  # the three modules that are sharded, in every step


def _check(honest, liar, *, exact=True, named=NAMED):
    if exact:
        assert liar["bits"] == honest["bits"]
    else:  # a cyclic code adds up other messages without the liar's
        one, other = (torch.tensor(each["bits"], dtype=torch.int32).view(torch.float32) for each in (honest, liar))
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
    assert honest["suspects"] == honest["repaired"] == {}
    assert liar["suspects"] == named
    assert honest["errors"] == liar["errors"] == []


SETTINGS = {
    "plain": {},
    "verified": {"transport": "verified", "dropout": 0.2, "policy": "bf16, reduced in fp32", "clip": 0.1},
    "cyclic": {"code": "cyclic", "dropout": 0.2, "accumulate": 2},
}
OTHER = [
    {"transport": "server"},
    {"transport": "verified", "hidden": 1100},  # large enough to be divided
    {"policy": "bf16", "checkpointed": True, "dropout": 0.2, "reshard": True, "accumulate": 2},
    {"code": "cyclic", "transport": "verified", "checkpointed": True, "dropout": 0.2},
    {"code": "cyclic", "transport": "server", "policy": "bf16, reduced in fp32"},
    {"reshard": False, "clip": 0.1, "optimizer": "adamw"},
    {"offload": True, "clip": 0.1},
    {"policy": "fp16 reduction"},
    {"compiled": True},
    {"code": "cyclic", "compiled": True, "reshard": True},
]
KINDS = ("layer", "parameter", "optimizer", "buffer")
QUICK = {
    **SETTINGS,
    **{f"{name}, liar": {**options, "liar": "message"} for name, options in SETTINGS.items()},
    **{kind: {"liar": kind} for kind in KINDS},
    "fsdp": {"plain": "fsdp"},
    "sgd": {"optimizer": "plain sgd"},
    "apart": {"liar": "message", "bad": (0, 3)},  # in two replicas, but of other shards
    "raised": {"failing": 1},
    "skipped": {"failing": 1, "on_failure": "skip"},
}


@pytest.fixture(scope="module")
def quick():
    return dict(zip(QUICK, _trained(list(QUICK.values())), strict=True))


@pytest.mark.parametrize("name", SETTINGS)
def test_a_liar_changes_no_bit(name, quick):
    _check(quick[name], quick[f"{name}, liar"], exact=name != "cyclic")


def test_honest_bits_are_those_of_plain_fsdp(quick):
    # All replicas compute the same part: what plain FSDP makes of it on the ranks of one replica.
    assert quick["plain"]["bits"] == quick["fsdp"]["bits"]


@pytest.mark.long
def test_a_liar_changes_no_bit_in_other_settings():
    results = _trained([each for options in OTHER for each in (options, {**options, "liar": "message"})])
    for options, honest, liar in zip(OTHER, results[::2], results[1::2], strict=True):
        _check(honest, liar, exact=options.get("code") != "cyclic")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_fault_is_put_right(kind, quick):
    honest, found = quick["plain"], quick[kind]
    assert found["bits"] == honest["bits"]
    assert found["errors"] == []
    assert found["largest"] == honest["largest"]
    suspects = {replica: steps for replica, (_, steps, _) in found["suspects"].items()}
    if kind == "layer":  # it spoils the gradients of other modules, too, in all shards of the replica
        assert suspects == {1: list(range(STEPS))}
        assert found["suspects"][1][0] == [2, 3]
    assert found["repaired"] == {"layer": {}, "optimizer": {1: [2]}}.get(kind, {1: [1]})
    assert suspects == {"layer": {1: [0, 1, 2]}, "parameter": {1: [1]}}.get(kind, {})


def test_shards_are_decoded_each_for_itself(quick):
    every_step = list(range(STEPS))
    _check(quick["plain"], quick["apart"], named={0: ([0], every_step, 9), 1: ([3], every_step, 9)})


def test_two_bad_replicas_change_nothing(quick):
    honest, raised, skipped = (quick[name] for name in ("plain", "raised", "skipped"))
    assert raised["bits"] == skipped["bits"] != honest["bits"]
    assert raised["failed"] == skipped["failed"] == (1,)
    assert len(raised["errors"]) == 1
    assert "no gradient in step 1" in raised["errors"][0]
    assert "more replicas are bad than RepetitionCode(workers=3, adversaries=1) can correct" in raised["errors"][0]
    assert skipped["errors"] == []


def _fail_in_one_shard(rank, report, folder):
    """Ranks 2 and 4, which have shard 0 of two replicas, lie in step 1: shard 1 could be decoded."""
    torch.set_num_threads(1)
    net = _sharded(_mesh(3))
    factor = rank if rank in (2, 4) else 1
    guard = draco_ext.protect(
        net,
        CODES["repetition"],
        adversary=lambda step, message: message * (factor if step == 1 else 1),
        ledger=f"{folder}/{{rank}}.jsonl",
    )
    opt = torch.optim.SGD(net.parameters(), lr=0.05)
    seen = []
    for x in _data(1)[:, 0, rank % SHARDS]:
        opt.zero_grad()
        try:
            net(x).square().mean().backward()
        except DecodingError as error:
            seen.append(str(error))
        opt.step()
    everybody = [None] * 6
    dist.all_gather_object(everybody, (seen, guard.report().failed_steps, guard.check_state()))
    report((everybody, guard.step))


def test_a_step_that_fails_in_one_shard_fails_in_all(tmp_path):
    ((everybody, steps),) = run_local(_fail_in_one_shard, 6, str(tmp_path))
    assert steps == STEPS
    assert everybody == [everybody[0]] * 6
    seen, failed, wrong = everybody[0]
    assert (failed, wrong) == ((1,), ())
    assert len(seen) == 1
    assert "suspected: [0, 1, 2]" in seen[0]
    for rank in range(6):
        found = draco_ext.read_ledger(tmp_path / f"{rank}.jsonl")
        assert {(each.step, each.failed) for each in found} == {(1, True)}
        # Three messages, of which no two are alike, in the shard that ranks 0, 2 and 4 have.
        assert {(each.rank, tuple(each.ranks)) for each in found} <= {(0, (0,)), (1, (2,)), (2, (4,))}
        assert {each.bucket for each in found} == {0, 1, 2}


@pytest.mark.long
@pytest.mark.parametrize("shards", [1, 2])
def test_two_groups_of_replicas(shards):
    honest, liar = _trained([{"code": "groups"}, {"code": "groups", "liar": "message"}], ranks=6 * shards)
    _check(honest, liar, named={BAD // shards: NAMED[1]})


@pytest.mark.long
def test_checkpoints_go_on_with_the_same_bits():
    options = {"dropout": 0.2, "optimizer": "adamw"}
    whole, stopped, liar = _trained([options, {**options, "stop": 2}, {**options, "stop": 2, "liar": "message"}])
    assert whole["bits"] == stopped["bits"] == liar["bits"]
    assert liar["suspects"] == NAMED


@pytest.mark.long
def test_without_redundancy_the_bits_are_those_of_hsdp():
    guarded, native = _trained([{"code": "none"}, {"code": "none", "plain": "hsdp"}], ranks=4)
    assert guarded["bits"] == native["bits"]


# ---------------------------------------------------------------------------------------------- after an error


def _errors(rank, report):
    """Errors in backward passes, in the same place on all ranks and not; other inputs in one shard; a self-test."""
    torch.set_num_threads(1)
    net = _sharded(_mesh(3))
    guard = draco_ext.protect(net, CODES["repetition"])
    opt = torch.optim.SGD(net.parameters(), lr=0.05)
    data = _data(1)[:, 0, rank % SHARDS]

    def everywhere(value):
        everybody = [None] * 6
        dist.all_gather_object(everybody, value)
        return everybody

    def step(x):
        opt.zero_grad()
        net(x).square().mean().backward()
        opt.step()

    # Shard 1 has other inputs on every replica, shard 0 has not.
    report(everywhere(_error(lambda: step(data[0] + (rank if rank % SHARDS else 0)))))
    report(everywhere(guard.step))

    def stop(module, inputs, output):
        if output.requires_grad:
            output.register_hook(_raise)

    step(data[0])
    pending = []

    def count(module, inputs, output):
        output.register_hook(lambda grad: pending.append(len(guard._scheduler._in_flight)))

    handle = net.blocks[0].register_forward_hook(count)
    step(data[1])
    handle.remove()
    report(everywhere(pending))
    # Behind the hooks of what is after the first block.
    handle = net.blocks[0].register_forward_hook(stop)
    report(everywhere(_error(lambda: step(data[2]))))
    handle.remove()
    with torch.no_grad():
        net(data[2])  # an evaluation between
    step(data[2])
    bits = torch.cat([p.full_tensor().detach().flatten() for p in net.parameters()]).view(torch.int32).tolist()
    report(everywhere((guard.step, guard.report().suspects, bits)))

    report(everywhere(str(guard.self_test(data[0]))))
    report(everywhere(guard.step))
    net.blocks[1].factor = 1.5 if rank == BAD else 1.0
    report(everywhere(str(guard.self_test(data[0]))))
    net.blocks[1].factor = 1.0

    handle = net.blocks[0].register_forward_hook(stop)
    _error(lambda: step(data[0]))
    handle.remove()
    guard._adapter._taken += rank == BAD  # as if it had ended elsewhere there
    fsdp.ABORT_TIMEOUT = 2.0
    report(everywhere(_error(lambda: step(data[0]))))


def _raise(grad):
    raise RuntimeError("in the middle of a backward pass")


@pytest.mark.skipif(
    not hasattr(FSDPModule, "reset_iter_state"), reason="FSDP2 cannot go on after an error before torch 2.13"
)
def test_errors_in_backward_passes(quick):
    inputs, steps, pending, message, after, *tests, apart = run_local(_errors, 6)
    reproducible, same_steps, not_reproducible = tests
    assert inputs == [inputs[0]] * 6
    assert inputs[0].startswith("ValueError: loader must give ranks that share a part the same mini-batches of it")
    assert inputs[0].endswith("got others of part 0 on replicas [1, 2]")
    assert steps == [0] * 6
    assert pending == [[2]] * 6  # the second block's exchange and the record, while the first block computes
    assert message == ["RuntimeError: in the middle of a backward pass"] * 6
    assert after == [after[0]] * 6
    number, suspects, bits = after[0]
    assert (number, suspects) == (3, {})
    assert bits == quick["sgd"]["bits"]
    assert reproducible == ["gradients are bit-reproducible, on each rank and across ranks"] * 6
    assert same_steps == [3] * 6
    assert not_reproducible == [not_reproducible[0]] * 6
    assert "is not bit-reproducible on ranks [2, 3]" in not_reproducible[0]
    begin = (
        "RuntimeError: training cannot go on after an error in a backward pass, since the pass has not ended in the "
    )
    for rank, said in enumerate(apart):
        assert said.startswith(begin)
        assert f"on ranks {[0, 1, 2, 4, 5] if rank == BAD else [BAD]}" in said


# ------------------------------------------------------------------- transport="server", dead and late replicas

SERVED = 16  # steps
STOP, DIE = 4, 6
STOPPED, DEAD = 2, 5  # ranks: the first of replica 1, the second of replica 2


def _serve(rank, folder, accidents):
    """Train, while a rank of one replica is stopped for a while, and one of another replica is killed."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 6)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=6)
    waited = []

    def accident(step, message):
        if accidents and (rank, step) == (STOPPED, STOP) and not (folder / "stopped").exists():
            (folder / "stopped").touch()
            os.kill(os.getpid(), signal.SIGSTOP)
        if accidents and (rank, step) == (DEAD, DIE):
            os.kill(os.getpid(), signal.SIGKILL)
        if accidents and rank < SHARDS and step > DIE:
            if not waited:
                store.wait(["continued"])
            waited.append(time.sleep(0.02))  # so that the replica that was stopped can catch up
        return message

    net = _sharded(_mesh(3))
    guard = draco_ext.protect(
        net, CODES["repetition"], transport="server", deadline=5.0, adversary=accident, check_state_every=3
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    data = torch.randn(SERVED, SHARDS, SAMPLES, WIDTH, generator=torch.Generator().manual_seed(7))
    for x in data[:, rank % SHARDS]:
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    own = torch.cat([p.detach().to_local().flatten() for p in net.parameters()])
    report = guard.report()
    torch.save({"own": own, "missing": report.missing, "suspects": sorted(report.suspects)}, f"{folder}/{rank}.pt")
    store.set(f"done {rank}", "")
    if rank < SHARDS:  # a server may not hang up while another rank still takes its results
        store.wait([f"done {other}" for other in range(4 if accidents else 6)])


def _served(folder, accidents):
    """Return the exit statuses of the ranks."""
    folder.mkdir()
    processes = torch.multiprocessing.start_processes(
        _serve, (folder, accidents), nprocs=6, join=False, start_method="forkserver"
    ).processes
    store = dist.FileStore(f"{folder}/store", 6)
    try:
        if accidents:
            processes[DEAD].join(120)
            os.kill(processes[STOPPED].pid, signal.SIGCONT)
            store.set("continued", "")
        for process in processes:
            process.join(60)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.long
def test_the_server_goes_on_without_dead_and_late_replicas(tmp_path):
    assert _served(tmp_path / "clean", False) == [0] * 6
    *statuses, partner, dead = _served(tmp_path / "accidents", True)
    assert statuses == [0] * 4
    assert partner > 0  # it cannot gather the parameters, and FSDP raises an error
    assert dead == -signal.SIGKILL
    for rank in range(4):
        clean, result = (torch.load(tmp_path / run / f"{rank}.pt") for run in ("clean", "accidents"))
        assert torch.equal(clean["own"].view(torch.int32), result["own"].view(torch.int32))
        assert clean["missing"] == {}
        assert result["missing"].keys() == {1, 2}
        assert result["missing"][2] == list(range(DIE, SERVED))
        assert result["missing"][1][0] == STOP
        assert result["missing"][1][-1] < SERVED - 1  # it has caught up
        assert clean["suspects"] == result["suspects"] == []


# ------------------------------------------------------------------------------------------------- refusals

# Whether one parameter may have a mesh of its own, as in newer torch.
PLACES_PARAMETERS = hasattr(_fsdp_common, "ShardPlacementResult")


def _refusals(rank, report):
    torch.set_num_threads(1)
    code, mesh = CODES["repetition"], _mesh(3)
    protect = functools.partial(draco_ext.protect, code=code)
    x = torch.ones(2, WIDTH)

    def said(action):
        message = _error(action)
        everybody = [None] * 6
        dist.all_gather_object(everybody, message)
        assert everybody == [message] * 6, everybody
        report(message)

    said(lambda: protect(_sharded(mesh["shard"])))
    said(lambda: protect(_sharded(mesh), code=RepetitionCode(6, 1)))
    said(lambda: protect(_sharded(mesh), code=Audit(3, 1, rate=0.5)))
    said(lambda: protect(replicate(Network(), mesh=init_device_mesh("cpu", (6,), mesh_dim_names=("all",)))))
    said(lambda: protect(_sharded(mesh, policy="fp16 reduction"), code=CODES["cyclic"]))
    network = Network()
    said(lambda: protect(fully_shard(network, mesh=mesh, ignored_params={network.head.weight})))

    if PLACES_PARAMETERS:
        network = Network()
        apart = _fsdp_common.ShardPlacementResult(Shard(0), _fsdp_common.FSDPMeshInfo(mesh["shard"], 0))
        placed = {"mesh": mesh, "shard_placement_fn": lambda p: apart if p is network.head.weight else None}
        said(lambda: protect(fully_shard(network, **placed)))

    other = _sharded(mesh)
    if rank >= 4:
        with torch.no_grad():
            other.head.weight.to_local().mul_(2)
    said(lambda: protect(other))
    twice = _sharded(mesh)
    protect(twice)
    said(lambda: protect(twice))

    def switched(switch, inputs=x):
        model = _sharded(mesh)
        guard = protect(model)
        switch(model)
        said(lambda: model(inputs).sum().backward())
        assert all(p.grad is None for p in model.parameters())
        assert guard.step == 0

    switched(lambda model: model.set_requires_all_reduce(False))
    switched(lambda model: model.set_requires_gradient_sync(False, recurse=False))
    switched(lambda model: model.set_gradient_divide_factor(3.0))
    switched(lambda model: model.head.weight.register_post_accumulate_grad_hook(lambda p: None))
    switched(lambda model: model.head.register_forward_hook(lambda *_: dist.barrier()))
    switched(lambda model: setattr(model, "forward", lambda x: model.blocks[0](x)))

    model = _sharded(mesh)
    guard = protect(model, code=CODES["cyclic"])
    opt = torch.optim.SGD(model.parameters(), lr=0.1)

    def too_early():
        for step in guard.steps([x, x]):
            for batch in step:
                model(batch).sum().backward()
                opt.step()

    said(too_early)

    model = _sharded(mesh)

    def over_two_steps():
        for step in protect(model).steps([x, x]):
            for batch in step:
                model(batch).sum().backward()

    said(over_two_steps)


def test_what_cannot_be_protected_is_refused():
    messages = list(run_local(_refusals, 6))
    expected = [
        "ValueError: the model must be sharded over a mesh of replicas and shards, got a mesh of shards alone",
        "ValueError: code must be for the 3 replicas of the model's mesh, got RepetitionCode(workers=6",
        "ValueError: code must be for the 6 ranks of the model's mesh, got Audit(workers=3",
        "ValueError: the model must be sharded by fully_shard, got replicate(), which calls no hook",
        "TypeError: gradients must have a dtype that CyclicCode(workers=3, adversaries=1) takes, got torch.float16",
        "ValueError: head.weight must not be among ignored_params",
        *(["ValueError: the model must have one group of parameters, got 2"] if PLACES_PARAMETERS else []),
        "ValueError: model must have the same parameters on all replicas, got others on ranks [4, 5]",
        "ValueError: model must not be guarded already",
        "RuntimeError: set_requires_all_reduce(False) cannot be protected, got it for the model",
        "RuntimeError: set_requires_gradient_sync must be called on the whole model",
        "RuntimeError: set_gradient_divide_factor must not be called, got it for the model",
        "RuntimeError: weight of the model must not have a hook",
        "RuntimeError: a collective in the forward pass cannot be protected",
        "RuntimeError: all parameters that require a gradient must get one in every backward pass, got none for some "
        "of the model, blocks.1",
        "RuntimeError: a gradient is not decoded yet",
        "RuntimeError: step 1 would lose the gradients of step 0, which no optimizer has used: cut a mini-batch into "
        "pieces, and pass all but the last one with set_requires_gradient_sync(False); or call zero_grad()",
    ]
    assert len(messages) == len(expected)
    for message, begin in zip(messages, expected, strict=True):
        assert (message or "").startswith(begin), (message, begin)

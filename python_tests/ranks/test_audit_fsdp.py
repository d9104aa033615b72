"""`Audit` on models made by ``fully_shard``: with every kind of fault the bits are those of plain FSDP2 without any.

One start of processes serves many runs.
"""

import functools
import logging

import numpy
import pytest
import torch
import torch.distributed as dist
from conftest import SEED
from test_audit import Fault, same_bits
from torch import nn
from torch.distributed._composable.replicate_with_fsdp import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import draco_ext
from draco_ext import Audit, DecodingError
from draco_ext.testing.local import run_local

RANKS = 4
STEPS = 5
WIDTH = 13  # shards are padded
POLICIES = {
    None: {},
    "bf16, reduced in fp32": {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32},
    "bf16": {"param_dtype": torch.bfloat16},
    "fp16 reduction": {"reduce_dtype": torch.float16},
}
ALWAYS = tuple(range(STEPS))


class Block(nn.Module):
    def __init__(self, checkpointed, norm):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), norm(2 * WIDTH), nn.Dropout(0.2), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH)
        )
        self.checkpointed = checkpointed

    def forward(self, x):
        return x + (checkpoint(self.body, x, use_reentrant=False) if self.checkpointed else self.body(x))


class Network(nn.Module):
    def __init__(self, checkpointed=False, norm=nn.BatchNorm1d):
        super().__init__()
        torch.manual_seed(5)
        self.blocks = nn.ModuleList([Block(checkpointed, norm) for _ in range(2)])
        self.head = nn.Linear(WIDTH, 5, bias=False)
        self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
        self.extra = nn.Parameter(torch.ones(7), requires_grad=False)  # not in the graph

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x) * self.frozen


@functools.cache
def _mesh(replicas):
    if replicas == 1:
        return init_device_mesh("cpu", (RANKS,), mesh_dim_names=("shard",))
    return init_device_mesh("cpu", (replicas, RANKS // replicas), mesh_dim_names=("replicate", "shard"))


def _sharded(
    *,
    replicas=1,
    checkpointed=False,
    policy=None,
    offload=False,
    reshard=None,
    compiled=False,
    unused=False,
    factor=None,
):
    network = Network(checkpointed, nn.BatchNorm1d if policy is None else nn.LayerNorm)
    settings = {
        "mesh": _mesh(replicas),
        "mp_policy": MixedPrecisionPolicy(**POLICIES[policy]),
        "reshard_after_forward": reshard,
    }
    if offload:
        settings["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    for block in network.blocks:
        if compiled:
            block.compile(backend="aot_eager")
        fully_shard(block, **settings)
    network = fully_shard(network, **settings)
    if unused and hasattr(network, "set_reduce_scatter_unused_params"):  # new in torch 2.13
        network.extra.requires_grad_(True)
        network.set_reduce_scatter_unused_params(True)
    if factor is not None:
        network.set_force_sum_reduction_for_comms(True)  # gloo has no other way
        network.set_gradient_divide_factor(factor)
    return network


def _mini_batches(rank, count):
    """Other data on every rank, made with noise from the global generators as augmentation is."""
    generator = torch.Generator().manual_seed(SEED + rank)
    for _ in range(count):
        yield torch.randn(6, WIDTH, generator=generator) + 0.1 * torch.randn(6, WIDTH)


def _whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def _train(fault=None, rate=1.0, *, steps=STEPS, s=1, accumulate=1, clip=None, doubts=(), options=None, **model):
    """Parameters and optimizer state after some steps on all ranks, what was raised, and the guard's report."""
    rank = dist.get_rank()
    net = _sharded(**model)
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    torch.manual_seed(1000 + rank)
    raised = report = None

    def update():
        if clip is not None:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()

    if fault is None:
        batches = _mini_batches(rank, steps * accumulate)
        for _ in range(steps):
            optimizer.zero_grad()
            for i, x in enumerate([next(batches) for _ in range(accumulate)]):
                net.set_requires_gradient_sync(i == accumulate - 1)
                net(x).float().square().mean().backward()
            update()
    else:
        guard = draco_ext.protect(net, Audit(RANKS, s, rate), adversary=fault.adversary(rank), **(options or {}))
        assert (guard.data_rank, guard.data_replicas) == (rank, RANKS)
        try:
            for step in guard.steps(_mini_batches(rank, steps * accumulate), accumulate=accumulate):
                if guard.step in doubts and rank == 2:
                    guard.doubt("a test")
                for x in step:
                    net(x).float().square().mean().backward()
                update()
        except DecodingError as error:
            raised = str(error)
        report = guard.report()
    state = [_whole(p.detach()) for p in net.parameters()]
    state += [_whole(v) for p in net.parameters() if p.requires_grad for v in optimizer.state[p].values()]
    state += list(net.buffers())
    flat = torch.cat([v.flatten().double() for v in state])
    everybody = [torch.empty_like(flat) for _ in range(RANKS)]
    dist.all_gather(everybody, flat)
    return torch.stack(everybody).numpy(), raised, report


def _run(rank, report, scenarios):
    torch.set_num_threads(1)
    logging.getLogger("draco_ext").setLevel(logging.ERROR)
    for name, settings in scenarios.items():
        report((name, *_train(**settings)))


def _run_all(scenarios):
    return {name: rest for name, *rest in run_local(_run, RANKS, scenarios)}


# ------------------------------------------------------------------------------------------------ faults

KINDS = {
    "none": Fault(),
    "persistent": Fault((2,)),
    "persistent, begins later": Fault((0,), steps=tuple(range(2, STEPS))),
    "nan": Fault((3,), "nan"),
    "one bit": Fault((1,), "one bit"),
    "transient": Fault((3,), steps=(3,), kinds=("own",), times=1),
    "transient in step 0": Fault((3,), steps=(0,), kinds=("own",), times=1),
    "wrong auditor": Fault((2,), kinds=("audit",), steps=(3, 4)),
    "wrong in opinions": Fault((2,), kinds=("opinion",)),
    "zero": Fault((2,), "zero", steps=(2,)),
}
PERSISTENT = {"persistent", "persistent, begins later", "nan", "one bit", "zero"}


def _check_kind(name, result, plain):
    state, raised, report = result
    assert raised is None, name
    assert same_bits(state, plain), name
    found = report.audit
    assert found.audited == STEPS
    if name == "none":
        assert found.passes == STEPS * (1 + Audit(RANKS, 1, 1.0).cost(0, STEPS, rehearsal=False))
    who = set() if name in ("none", "wrong in opinions") else set(KINDS[name].ranks)
    assert {dispute.rank for dispute in found.disputes} == who == set(report.suspects), name
    assert {d.persistent for d in found.disputes[:1]} == ({name in PERSISTENT} if who else set()), name
    assert set(found.convicted) == (who if name in PERSISTENT else set()), name
    assert report.failed_steps == ()


# Ranks 1 and 3 might audit each other, and agree.
TWO = Fault((0, 1), steps=(4,))
LESS_OFTEN = (
    "persistent, begins later",
    "nan",
    "transient in step 0",
    "wrong in opinions",
    "zero",
)  # in the long layer

# Of those that are not tried over replicas without --long.
OVER_REPLICAS = ("one bit", "transient", "wrong auditor", "wrong in opinions", "zero")


@pytest.fixture(scope="module")
def quick():
    """Results of all quick runs, by name, and by mesh and name."""
    runs = {
        ("shards", "plain"): {},
        **{("shards", name): {"fault": fault} for name, fault in KINDS.items() if name not in LESS_OFTEN},
        ("replicas", "plain"): {"replicas": 2},
        **{("replicas", name): {"replicas": 2, "fault": KINDS[name]} for name in ("none", "persistent")},
        "plain of 4": {"steps": 4},
        "plain, accumulated": {"accumulate": 2},
        "accumulated": {"accumulate": 2, "fault": KINDS["persistent, begins later"]},
        "both": {"fault": TWO},
    }
    return _run_all(runs)


@pytest.fixture(scope="module")
def thorough():
    """Results of further runs."""
    return _run_all(
        {
            ("replicas", "plain"): {"replicas": 2},
            **{("shards", name): {"fault": KINDS[name]} for name in LESS_OFTEN},
            **{("replicas", name): {"replicas": 2, "fault": KINDS[name]} for name in OVER_REPLICAS},
            "skipped": {"fault": TWO, "steps": 5, "options": {"on_failure": "skip"}},
            "noise": {"fault": Fault((0,), "1e-4"), "options": {"rtol": 3e-2}},
            "tolerant": {"fault": KINDS["persistent"], "options": {"rtol": 3e-2}},
            "raise": {"fault": Fault((2,), steps=(4,)), "options": {"on_conviction": "raise"}},
            "drop": {"fault": Fault((2,), steps=(4,)), "options": {"on_conviction": "drop"}},
            "drop, zero": {"fault": Fault((2,), "zero", steps=(4,)), "options": {"on_conviction": "drop"}},
        }
    )


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in LESS_OFTEN else ()) for name in KINDS]
)
def test_every_kind_of_fault_changes_nothing(name, request, quick):
    state, raised, report = request.getfixturevalue("thorough" if name in LESS_OFTEN else "quick")["shards", name]
    _check_kind(name, (state, raised, report), quick["shards", "plain"][0])
    if name == "none":  # one audit and the own pass
        assert report.audit.passes == pytest.approx(2 * STEPS)
    if name == "persistent":  # opinions on two parts, and the own pass again
        assert report.audit.passes == pytest.approx(2 * STEPS + 3)


@pytest.mark.parametrize("name", ["none", "persistent"])
def test_every_rank_is_audited_over_replicas_and_shards(name, quick):
    _check_kind(name, quick["replicas", name], quick["replicas", "plain"][0])


@pytest.mark.long
def test_every_kind_of_fault_changes_nothing_over_replicas_and_shards(thorough):
    for name in OVER_REPLICAS:
        _check_kind(name, thorough["replicas", name], thorough["replicas", "plain"][0])


def test_accumulated_gradients_are_put_right(quick):
    state, raised, report = quick["accumulated"]
    assert raised is None
    assert same_bits(state, quick["plain, accumulated"][0])
    assert report.audit.convicted == {0: 2}


def test_more_wrong_ranks_than_the_audit_corrects(quick):
    plain = quick["plain of 4"][0]
    state, raised, report = quick["both"]
    assert "no gradient in step 4" in raised
    assert same_bits(state, plain)  # no update since
    assert report.failed_steps == (4,)


@pytest.mark.long
def test_a_failed_step_is_left_out(quick, thorough):
    state, raised, report = thorough["skipped"]
    assert raised is None
    assert report.failed_steps == (4,)
    assert same_bits(state, quick["plain of 4"][0])


@pytest.mark.long
def test_what_happens_on_conviction(quick, thorough):
    state, raised, _ = thorough["raise"]
    assert "rank 2 on " in raised
    assert "convicted" in raised
    assert same_bits(state, quick["plain of 4"][0])
    # What a dropped rank computes has no influence: another fault of it leads to the same bits.
    dropped, other = thorough["drop"], thorough["drop, zero"]
    assert same_bits(dropped[0], other[0])
    assert dropped[1] is None
    assert dropped[2].audit.convicted == {2: 4}
    assert not same_bits(dropped[0], quick["shards", "plain"][0])


@pytest.mark.long
def test_ranks_that_are_not_equal_in_bits(quick, thorough):
    _, raised, report = thorough["noise"]
    assert raised is None
    assert report.audit.disputes == []
    assert report.audit.sees > 0
    state, raised, report = thorough["tolerant"]
    assert raised is None
    assert report.audit.convicted == {2: 0}
    assert same_bits(state, quick["shards", "plain"][0])  # what a rank without noise has sent is added up


SETTINGS = [
    {"policy": "bf16, reduced in fp32", "checkpointed": True},
    {"policy": "bf16", "accumulate": 2, "clip": 0.1},
    {"policy": "fp16 reduction"},
    {"offload": True, "clip": 0.1},
    {"reshard": True, "compiled": True},
    {"reshard": False, "s": 1, "accumulate": 3},
    {"replicas": 2, "policy": "bf16, reduced in fp32", "accumulate": 2, "clip": 0.1},
    {"replicas": 2, "offload": True, "reshard": 2},
    {"unused": True, "factor": 3.0},
]


@pytest.mark.long
def test_faults_change_nothing_in_other_settings():
    """Each setting without a fault and with two of four; the next setting has the other two."""
    faults = {
        i: ("none", *(("persistent", "transient"), ("wrong auditor", "zero"))[i % 2]) for i in range(len(SETTINGS))
    }
    runs = {}
    for i, settings in enumerate(SETTINGS):
        runs[i, "plain"] = settings
        runs |= {(i, name): {**settings, "fault": KINDS[name]} for name in faults[i]}
    results = _run_all(runs)
    for i in range(len(SETTINGS)):
        for name in faults[i]:
            _check_kind(name, results[i, name], results[i, "plain"][0])


@pytest.mark.long
def test_only_audited_steps_are_put_right_below_a_rate_of_1():
    steps, rate = 12, 0.25
    audit = Audit(RANKS, 1, rate)
    audited = [step for step in range(steps) if audit.is_audited(0, step)]
    begin = next(step for step in range(2, steps) if step not in audited)
    found_in = next(step for step in audited if step > begin)
    common = {"steps": steps, "accumulate": 2}
    results = _run_all(
        {
            "plain": common,
            "none": {**common, "rate": rate, "fault": Fault()},
            "transient": {
                **common,
                "rate": rate,
                "fault": Fault((1,), steps=(found_in,), kinds=("own",), times=1),
            },
            "persistent": {**common, "rate": rate, "fault": Fault((1,), "one bit", steps=tuple(range(begin, steps)))},
            "doubt": {
                **common,
                "rate": 1e-9,
                "fault": Fault((1,), steps=(4,), kinds=("own",), times=1),
                "doubts": (4,),
            },
            "nan": {**common, "rate": 1e-9, "fault": Fault((1,), "nan", steps=(7,), kinds=("own",), times=1)},
        }
    )
    plain = results["plain"][0]
    for name in ("none", "transient", "doubt", "nan"):
        state, raised, report = results[name]
        assert raised is None
        assert same_bits(state, plain), name
        # Accumulation does not make audits more frequent: they cover all mini-batches of a step.
        expected = {"doubt": [0, 1, 4], "nan": [0, 1, 7]}.get(name, audited)
        assert report.audit.audited == len(expected)
    found = results["persistent"][2].audit
    assert found.convicted == {1: found_in}
    assert not same_bits(results["persistent"][0], plain)  # the updates before were wrong


# ------------------------------------------------------------------------------------------------ between steps


def _between_steps(rank, report):
    """A self-test, an error in a backward pass, a checkpoint: training goes on with the bits of plain FSDP2."""
    torch.set_num_threads(1)
    logging.getLogger("draco_ext").setLevel(logging.ERROR)
    network = _sharded()
    optimizer = torch.optim.SGD(network.parameters(), 0.05)
    guard = draco_ext.protect(network, Audit(RANKS, 1, 1.0))
    reproducible = guard.self_test(torch.ones(6, WIDTH))
    torch.manual_seed(1000 + rank)
    batches = list(_mini_batches(rank, STEPS))
    generator = torch.get_rng_state()
    buffers = [buffer.clone() for buffer in network.buffers()]
    errors = []
    # Before any module is reduced, and when one is; new in torch 2.13.
    for module in (network.head, network.blocks[0].body) if hasattr(network, "reset_iter_state") else ():
        handle = module.register_forward_hook(lambda module, inputs, output: output.register_hook(_raise) and None)
        try:
            for step in guard.steps(batches):
                for x in step:
                    network(x).square().mean().backward()
        except RuntimeError as caught:
            errors.append(str(caught))
        handle.remove()
    torch.set_rng_state(generator)
    with torch.no_grad():
        for buffer, before in zip(network.buffers(), buffers, strict=True):
            buffer.copy_(before)
    saved = None
    for begin, end in ((0, 2), (2, STEPS)):
        if saved is not None:
            guard.load_state_dict(saved)
        for step in guard.steps(batches[begin:end]):
            for x in step:
                network(x).square().mean().backward()
            optimizer.step()
        saved = guard.state_dict()
    plain = _sharded()
    optimizer = torch.optim.SGD(plain.parameters(), 0.05)
    torch.set_rng_state(generator)
    for x in batches:
        optimizer.zero_grad()
        plain(x).square().mean().backward()
        optimizer.step()
    same = all(torch.equal(_whole(a), _whole(b)) for a, b in zip(network.parameters(), plain.parameters(), strict=True))
    everybody = [None] * RANKS
    dist.all_gather_object(everybody, (str(reproducible), errors, same, guard.step, saved["step"]))
    report((everybody, guard.report().audit.disputes))


def _raise(gradient):
    raise RuntimeError("in the middle of a backward pass")


def test_training_goes_on_after_an_error_and_from_a_checkpoint():
    ((everybody, disputes),) = run_local(_between_steps, RANKS)
    expected = (
        "gradients are bit-reproducible, on each rank and across ranks",
        ["in the middle of a backward pass"] * (2 if hasattr(FSDPModule, "reset_iter_state") else 0),
        True,
        STEPS,
        STEPS,
    )
    assert everybody == [expected] * RANKS
    assert disputes == []


def _traffic(rank, report):
    """Count what is reduced in two audited steps, each an audit and an own pass, over two replicas of two shards."""
    torch.set_num_threads(1)
    network = _sharded(replicas=2)
    guard = draco_ext.protect(network, Audit(RANKS, 1, 1.0))
    optimizer = torch.optim.SGD(network.parameters(), 0.05)
    scattered = []
    for module in (*network.blocks, network):
        comm = module._get_fsdp_state()._fsdp_param_group._reduce_scatter_comm
        comm._replaced = functools.partial(
            lambda replaced, *args: scattered.append(1) or replaced(*args), comm._replaced
        )
    replicas = _mesh(2).get_group("replicate")._get_backend(torch.device("cpu"))
    reduced = -replicas._get_sequence_number_for_group()
    for step in guard.steps(_mini_batches(rank, 2)):
        for x in step:
            network(x).square().mean().backward()
        kept = guard._passes.gradients._kept
        optimizer.step()
    reduced += replicas._get_sequence_number_for_group()
    report((guard.report().audit.passes, len(scattered), reduced, len(kept)))


def test_a_pass_that_audits_reduces_nothing():
    # Three modules, in two own passes.
    assert list(run_local(_traffic, RANKS)) == [(4, 6, 6, 0)]


def _state(rank, report, replicas):
    torch.set_num_threads(1)
    logging.getLogger("draco_ext").setLevel(logging.ERROR)
    mesh = init_device_mesh("cpu", (replicas, 2), mesh_dim_names=("replicate", "shard"))

    def train(bad):
        network = fully_shard(Network(norm=nn.LayerNorm), mesh=mesh)
        optimizer = torch.optim.AdamW(network.parameters(), 1e-2)
        guard = draco_ext.protect(network, Audit(2 * replicas, 1, 1.0), check_state_every=1)
        guard.watch(optimizer)
        torch.manual_seed(1000 + rank)
        raised = None
        try:
            for i, step in enumerate(guard.steps(_mini_batches(rank, STEPS))):
                if rank == 2 and bad == "parameter" and i == 2:
                    network.head.weight.to_local().data[0, 0] += 1.0
                if rank == 3 and bad == "optimizer" and i == 3:
                    optimizer.state[network.head.weight]["exp_avg"].to_local()[0, 0] += 1.0
                for x in step:
                    network(x).square().mean().backward()
                optimizer.step()
        except DecodingError as error:
            raised = str(error)
        bits = torch.cat([_whole(p).detach().flatten() for p in network.parameters()])
        return bits, raised, guard.report()

    for bad in ("nothing", "parameter", "optimizer"):
        bits, raised, found = train(bad)
        report((bits.numpy(), raised, found.repaired, found.audit.disputes))


@pytest.mark.long
def test_shards_are_compared_and_repaired_among_three_replicas():
    honest, parameter, optimizer = run_local(_state, 6, 3)
    for found, repaired in ((honest, {}), (parameter, {2: [2]}), (optimizer, {3: [3]})):
        assert numpy.array_equal(found[0], honest[0])
        assert found[1:] == (None, repaired, [])


@pytest.mark.long
def test_two_replicas_that_differ_fail():
    honest, parameter, _ = run_local(_state, 4, 2)
    assert honest[1] is None
    assert parameter[1].startswith("no gradient in step 2: no majority of the ranks has the same parameters")


# ------------------------------------------------------------------------------------------------ refusals


def _refusals(rank, report):
    torch.set_num_threads(1)
    protect = functools.partial(draco_ext.protect, code=Audit(RANKS, 1, 1.0))
    x = torch.ones(6, WIDTH)

    def said(action):
        message = None
        try:
            action()
        except (TypeError, ValueError, RuntimeError) as error:
            message = f"{type(error).__name__}: {error}"
        everybody = [None] * RANKS
        dist.all_gather_object(everybody, message)
        assert everybody == [message] * RANKS, everybody
        report(message)

    said(lambda: protect(_sharded(), code=Audit(5, 1, 1.0)))
    said(lambda: protect(replicate(Network(), mesh=_mesh(1))))
    said(lambda: protect(_sharded(replicas=RANKS)))
    own = _sharded()
    own.set_custom_reduce_scatter(OwnReduceScatter())
    said(lambda: protect(own))
    accumulating = _sharded()
    accumulating.set_requires_gradient_sync(False)
    said(lambda: protect(accumulating))
    hooked = _sharded()
    hooked.set_all_reduce_hook(lambda values: None)
    said(lambda: protect(hooked))
    other = _sharded(replicas=2)
    if rank >= 2:
        with torch.no_grad():
            other.head.weight.to_local().mul_(2)
    said(lambda: protect(other))
    twice = _sharded()
    guard = protect(twice)
    said(lambda: protect(twice))
    said(lambda: draco_ext.protect(twice, draco_ext.RepetitionCode(RANKS, 0)))
    said(lambda: guard.watch(torch.optim.SGD(twice.parameters(), 0.1)))
    said(lambda: twice(x))

    def in_a_step(change, backward=lambda model, x: model(x).sum().backward()):
        model = _sharded()
        guard = protect(model)

        def run():
            for step in guard.steps([x]):
                for batch in step:
                    change(model)
                    backward(model, batch)

        said(run)
        assert all(p.grad is None for p in model.parameters())

    def backward_twice(model, x):
        for _ in range(2):
            model(x).sum().backward()

    in_a_step(lambda model: model.set_requires_gradient_sync(False))
    in_a_step(lambda model: model.set_requires_all_reduce(False))
    in_a_step(lambda model: model.set_custom_reduce_scatter(OwnReduceScatter()))
    in_a_step(lambda model: model.head.weight.requires_grad_(False))
    in_a_step(lambda model: None, backward_twice)
    in_a_step(lambda model: None, lambda model, x: model(x))
    in_a_step(lambda model: model.head.register_forward_hook(lambda *_: dist.barrier()))
    in_a_step(lambda model: setattr(model, "forward", lambda x: model.blocks[0](x)))


class OwnReduceScatter:
    """A reduce-scatter that a script brings along."""


REFUSED = [
    "ValueError: code must be for the 4 ranks of the model's mesh, got Audit(workers=5",
    "ValueError: the model must be sharded by fully_shard, got replicate(), which calls no hook",
    "ValueError: the model must be sharded over two ranks or more, got a mesh with one shard",
    "ValueError: the model must not have a reduce-scatter of your own, got OwnReduceScatter",
    "ValueError: set_requires_gradient_sync and set_requires_all_reduce must be left to the guard, got False",
    "ValueError: the model must not have an all-reduce hook already",
    "ValueError: model must have the same parameters on all replicas, got others on ranks [",
    "ValueError: model must not be guarded already",
    "ValueError: model must not be guarded already",
    "ValueError: an optimizer's state cannot be watched for a model that is sharded over all ranks",
    "RuntimeError: an Audit needs the loop",
    "RuntimeError: set_requires_gradient_sync and set_requires_all_reduce must be left to the guard, got a change",
    "RuntimeError: set_requires_gradient_sync and set_requires_all_reduce must be left to the guard, got a change",
    "RuntimeError: the model has another reduce-scatter or all-reduce hook than the guard has set",
    "RuntimeError: the model must have the same parameters that require a gradient as when protect was called",
    "RuntimeError: each mini-batch of a step must be passed backward once, got another backward pass",
    "RuntimeError: step 0 is not complete: each mini-batch that it yields needs one forward and one backward pass, "
    "until it yields no more, without set_requires_gradient_sync",
    "RuntimeError: a collective in the forward pass cannot be protected",
    "RuntimeError: all parameters that require a gradient must get one in every backward pass",
]


def test_what_cannot_be_audited_is_refused():
    messages = list(run_local(_refusals, RANKS))
    assert len(messages) == len(REFUSED)
    for message, begin in zip(messages, REFUSED, strict=True):
        assert (message or "").startswith(begin), (message, begin)

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
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

import draco_ext
from draco_ext import Audit, DecodingError
from draco_ext.testing.local import run_local

RANKS = 4
STEPS = 6
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

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x) * self.frozen


@functools.cache
def _mesh(replicas):
    if replicas == 1:
        return init_device_mesh("cpu", (RANKS,), mesh_dim_names=("shard",))
    return init_device_mesh("cpu", (replicas, RANKS // replicas), mesh_dim_names=("replicate", "shard"))


def _sharded(*, replicas=1, checkpointed=False, policy=None, offload=False, reshard=None, compiled=False):
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
    return fully_shard(network, **settings)


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


if __name__ == "__main__":
    KINDS = {
        "none": Fault(),
        "persistent": Fault((2,)),
        "one bit": Fault((1,), "one bit"),
        "nan": Fault((3,), "nan"),
        "transient": Fault((3,), steps=(3,), kinds=("own",), times=1),
        "wrong auditor": Fault((2,), kinds=("audit",), steps=(3, 4)),
    }
    for common in ({}, {"accumulate": 3}, {"replicas": 2}, {"policy":"bf16, reduced in fp32", "checkpointed": True}, {"offload": True}, {"policy": "fp16 reduction"}, {"reshard": True, "compiled": True}):
        results = _run_all({"plain": common, **{name: {**common, "fault": f} for name, f in KINDS.items()}})
        plain = results["plain"][0]
        for name in KINDS:
            state, raised, report = results[name]
            print(common, name, raised, same_bits(state, plain), report.audit.disputes[:3], report.audit.convicted, report.audit.passes)

"""Gradients and activations that would go round the guard: protected exactly, or refused by name."""

import contextlib
import copy
import io
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import _apply_optimizer_in_backward
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _MixedPrecision

import draco_ext
from draco_ext import CyclicCode, RepetitionCode
from draco_ext.distributed.local import run_local

RANKS = 3
CODE = RepetitionCode(RANKS, 1)


def error_of(function, *arguments):
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def make_net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


# --------------------------------------------------------------------------------------------- refused by `protect`


def _plain(**options):
    return DistributedDataParallel(make_net(), **options)


def _ignored():
    net = make_net()
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, ["0.bias"])
    return DistributedDataParallel(net)


def _delayed(*names):
    net = make_net()
    if not names:  # then it builds no reducer at all
        net[1].requires_grad_(False)
        names = ("0.weight", "0.bias")
    named = [(name, parameter) for name, parameter in net.named_parameters() if name in names]
    return DistributedDataParallel(net, delay_all_reduce_named_params=named, param_to_hook_all_reduce=net[0].weight)


def _python_reducer():
    before = torch._dynamo.config.optimize_ddp
    torch._dynamo.config.optimize_ddp = "python_reducer"
    try:
        return _plain()
    finally:
        torch._dynamo.config.optimize_ddp = before


def _with_embedding(embedding):
    return DistributedDataParallel(nn.Sequential(embedding, nn.Linear(2, 1)))


def _complex():
    net = make_net()
    net.phase = nn.Parameter(torch.ones(2, dtype=torch.complex64))
    return DistributedDataParallel(net)


def _unfrozen():
    net = make_net()
    net[0].requires_grad_(False)
    model = DistributedDataParallel(net)
    net[0].bias.requires_grad_(True)
    return model


def _new_parameter():
    model = _plain()
    model.module.late = nn.Parameter(torch.ones(2))
    return model


def _nested():
    return DistributedDataParallel(nn.Sequential(DistributedDataParallel(nn.Linear(2, 2)), nn.Linear(2, 2)))


def _sync_batch_norm():
    model = _plain()  # made on a CPU, where DistributedDataParallel itself takes none
    model.module.add_module("norm", nn.SyncBatchNorm(2))
    return model


def _stepping_in_backward():
    net = make_net()
    _apply_optimizer_in_backward(torch.optim.SGD, net[1].parameters(), {"lr": 0.1})
    return DistributedDataParallel(net)


def _hooked(hook):
    model = _plain()
    hook(model)
    return model


def _average(state, bucket):
    return dist.all_reduce(bucket.buffer(), async_op=True).get_future().then(lambda future: future.value()[0])


def _guarded():
    model = _plain()
    draco_ext.protect(model, CODE)
    return model


# How a model is made, the code, and what `protect` says.
REFUSED = {
    "ignored": (_ignored, CODE, "ValueError: module.0.bias must not be ignored by DistributedDataParallel"),
    "delayed": (lambda: _delayed("1.weight"), CODE, "ValueError: delay_all_reduce_named_params .* module.1.weight"),
    "all delayed": (_delayed, CODE, "ValueError: delay_all_reduce_named_params must be left out"),
    "mixed precision": (
        lambda: _plain(mixed_precision=_MixedPrecision(param_dtype=torch.bfloat16)),
        CODE,
        "ValueError: mixed_precision of DistributedDataParallel must be None",
    ),
    "python reducer": (_python_reducer, CODE, "ValueError: .* must not be 'python_reducer'"),
    "unused skipped": (
        lambda: _plain(skip_all_reduce_unused_params=True, find_unused_parameters=True),
        CODE,
        "ValueError: skip_all_reduce_unused_params must be False",
    ),
    "sparse embedding": (
        lambda: _with_embedding(nn.Embedding(5, 2, sparse=True)),
        CODE,
        "ValueError: module.0 must not be an Embedding with sparse=True",
    ),
    "sparse bag": (
        lambda: _with_embedding(nn.EmbeddingBag(5, 2, sparse=True)),
        CODE,
        "ValueError: module.0 must not be an EmbeddingBag with sparse=True",
    ),
    "max_norm": (
        lambda: _with_embedding(nn.Embedding(5, 2, max_norm=1.0)),
        CyclicCode(RANKS, 1),
        "ValueError: module.0 must not have max_norm",
    ),
    "complex": (_complex, CODE, "TypeError: parameters must have a dtype .* got torch.complex64 for module.phase"),
    "unfrozen": (_unfrozen, CODE, "ValueError: module.0.bias requires a gradient that DistributedDataParallel does no"),
    "new": (_new_parameter, CODE, "ValueError: module.late requires a gradient that DistributedDataParallel does not"),
    "nested": (_nested, CODE, "ValueError: module.0 must not be a DistributedDataParallel within the model"),
    "SyncBatchNorm": (_sync_batch_norm, CODE, "ValueError: module.norm must not be a SyncBatchNorm"),
    "optimizer in backward": (_stepping_in_backward, CODE, "ValueError: module.1.weight must not have an optimizer"),
    "fused optimizer": (
        lambda: _hooked(lambda model: model._register_fused_optim(torch.optim.SGD, lr=0.1)),
        CODE,
        "ValueError: model must not have a communication hook already, got ",
    ),
    "hook": (
        lambda: _hooked(lambda model: model.register_comm_hook(None, _average)),
        CODE,
        "ValueError: model must not have a communication hook already, got _average",
    ),
    "builtin hook": (
        lambda: _hooked(lambda model: model._register_builtin_comm_hook(dist.BuiltinCommHookType.ALLREDUCE)),
        CODE,
        "ValueError: model must not have a communication hook already, got BuiltinCommHookType.ALLREDUCE",
    ),
    "guarded": (_guarded, CODE, "ValueError: model must not be guarded already"),
}


def _refused(rank, report):
    for make, code, _ in REFUSED.values():
        model = make()
        parameters = list(model.parameters())

        def registered(model=model, parameters=parameters):
            hooks = [*model._forward_pre_hooks, *model._forward_hooks]
            return hooks, [p._post_accumulate_grad_hooks for p in parameters], vars(model).get("_run_ddp_forward")

        before = registered()
        report((error_of(draco_ext.protect, model, code), registered() == before))


@pytest.fixture(scope="module")
def refused():
    return dict(zip(REFUSED, run_local(_refused, RANKS), strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_protect_refuses(refused, name):
    error, untouched = refused[name]
    assert error is not None
    assert re.match(REFUSED[name][2], error), error
    assert untouched

"""Gradients and activations that would go round the guard: protected exactly, or refused by name."""

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
from draco_ext.testing.local import run_local

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


# ------------------------------------------------------------------------------------------ refused while it trains

X = torch.arange(8.0).view(2, 4)


class Head(nn.Module):
    """With a branch that may be left out, and anything that is done in its forward pass."""

    def __init__(self, during=None):
        super().__init__()
        torch.manual_seed(4)
        self.body, self.branch, self.during = nn.Linear(4, 3), nn.Linear(3, 3), during

    def forward(self, x, branch=True):
        x = self.body(x)
        if self.during is not None:
            x = self.during(x)
        return self.branch(x) if branch else x


class GatherInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        dist.all_reduce(gradient.clone())
        return gradient


def gathered(x):
    rows = [torch.empty_like(x) for _ in range(RANKS)]
    dist.all_gather(rows, x.detach())
    return torch.stack(rows)


def _in_forward(model, optimizer):
    model.module.during = lambda x: x + gathered(x).mean()
    model(X).sum().backward()


def _in_evaluated_forward(model, optimizer):
    model.eval()  # as for frozen statistics
    _in_forward(model, optimizer)


def _functional_in_forward(model, optimizer):
    import torch.distributed._functional_collectives as functional

    model.module.during = lambda x: x + functional.all_reduce(x.detach(), "sum", dist.group.WORLD)
    model(X).sum().backward()


def _in_loss(model, optimizer):
    out = model(X)
    (out * gathered(out).mean()).sum().backward()


def _between_two_forwards(model, optimizer):
    first = model(X)
    (first * gathered(first).mean() + model(X + 1)).sum().backward()


def _in_backward(model, optimizer):
    model.module.during = GatherInBackward.apply
    model(X).sum().backward()


def _in_accumulation(model, optimizer):
    with model.no_sync():
        out = model(X)
        (out * gathered(out).mean()).sum().backward()
    model(X).sum().backward()


def _twice_backward(model, optimizer):
    loss = model(X).sum()
    loss.backward(retain_graph=True)
    loss.backward()
    optimizer.step()


def _two_forwards_two_backwards(model, optimizer):
    first, second = model(X).sum(), model(X + 1).sum()
    first.backward()
    second.backward()
    optimizer.step()


def _never_reduced(model, optimizer):
    with model.no_sync():
        model(X).sum().backward()
    optimizer.step()


def _never_reduced_in_a_closure(model, optimizer):
    def closure():
        with model.no_sync():
            loss = model(X).sum()
            loss.backward()
        return loss

    optimizer.step(closure)


def _around_the_model(model, optimizer):
    model(X).sum().backward()
    model.module(X).sum().backward()
    optimizer.step()


def _unused(model, optimizer):
    model(X, branch=False).sum().backward()
    optimizer.step()


def _step_in_backward(model, optimizer):
    model.module.body.weight.register_post_accumulate_grad_hook(lambda parameter: optimizer.step())
    model(X).sum().backward()


def _unfrozen_later(model, optimizer):
    model.module.frozen.requires_grad_(True)
    model(X).sum().backward()


def _added_later(model, optimizer):
    model.module.late = nn.Parameter(torch.ones(3))
    model(X).sum().backward()


def _joined(model, optimizer):
    with model.join():
        for _ in range(2 + dist.get_rank()):
            model(X).sum().backward()


COLLECTIVE = "a collective in {} cannot be protected: one rank's wrong activations would change"
UNREDUCED = r"module\.\S+ has a gradient that DistributedDataParallel has not reduced: an optimizer must step after"
STOPPED = {
    _in_forward: COLLECTIVE.format("the forward pass"),
    _in_evaluated_forward: COLLECTIVE.format("the forward pass"),
    _functional_in_forward: COLLECTIVE.format("the forward pass"),
    _in_loss: COLLECTIVE.format("the loss, between forward and backward pass"),
    _between_two_forwards: COLLECTIVE.format("the forward passes of a step"),
    _in_backward: COLLECTIVE.format("the backward pass"),
    _in_accumulation: COLLECTIVE.format("the loss, between forward and backward pass"),
    _twice_backward: UNREDUCED,
    _two_forwards_two_backwards: UNREDUCED,
    _never_reduced: UNREDUCED,
    _never_reduced_in_a_closure: UNREDUCED,
    _around_the_model: UNREDUCED,
    _unused: UNREDUCED,
    _step_in_backward: UNREDUCED,
    _unfrozen_later: "module.frozen requires a gradient that DistributedDataParallel does not reduce",
    _added_later: "module.late requires a gradient that DistributedDataParallel does not reduce",
    _joined: r"model.join\(\) cannot be protected",
}


def _stopped(rank, report):
    for case in STOPPED:
        net = Head()
        net.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        model = DistributedDataParallel(net)
        guard = draco_ext.protect(model, CODE)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
        error = error_of(case, model, optimizer)
        after = dict(net.named_parameters())
        dropped = all(after[name].grad is None for name in before)
        unchanged = all(torch.equal(after[name], value) for name, value in before.items())
        report((error, dropped, unchanged, sorted(guard.report().suspects)))


@pytest.fixture(scope="module")
def stopped():
    return dict(zip(STOPPED, run_local(_stopped, RANKS), strict=True))


@pytest.mark.parametrize("case", STOPPED)
def test_a_step_refuses(stopped, case):
    error, dropped, unchanged, suspects = stopped[case]
    assert error is not None
    assert re.match("RuntimeError: " + STOPPED[case], error), error
    assert dropped
    assert unchanged
    assert suspects == []


# ---------------------------------------------------------------------------------------------- protected exactly


def _accumulate_in_a_part(model, guard, code, rank):
    """Two micro-batches for each mini-batch."""
    for step in guard.steps([X + part for part in code.assignment(guard.worker)]):
        for x in step:
            with model.no_sync():
                model(x[:1]).sum().backward()
            model(x[1:]).sum().backward()
    return sum(gradient_by_hand(X + part) for part in range(code.parts)) / code.parts


def gradient_by_hand(x, loss=torch.sum):
    net = Head()
    loss(net(x)).backward()
    return torch.cat([parameter.grad.flatten() for parameter in net.parameters()])


def _second_pass_in_a_part(model, guard, code, rank):
    for step in guard.steps([X] * len(code.assignment(guard.worker))):
        for x in step:
            model(x).sum().backward()
            model(x).sum().backward()


def _no_pass_for_a_part(model, guard, code, rank):
    for step in guard.steps([X] * len(code.assignment(guard.worker))):
        for x in step:
            with model.no_sync():
                model(x).sum().backward()


def _accumulate_over_steps(model, guard, code, rank):
    """Each step begins without gradients, so those of the one before must have been used."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    for step in guard.steps([X] * (5 * len(code.assignment(guard.worker)))):
        for x in step:
            model(x).sum().backward()
        if guard.step == 1:
            optimizer.step()
        elif guard.step == 2:
            optimizer.zero_grad()  # an update that is left out on purpose
        elif guard.step == 3:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.sub_(parameter.grad, alpha=0.0)


def _accumulate_with_a_closure(model, guard, code, rank):
    """An optimizer that makes the last backward pass itself, as in Lightning."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)

    def closure():
        model(X).sum().backward()

    for arguments, keywords in ([(closure,), {}], [(), {"closure": closure}]):
        optimizer.zero_grad()
        with model.no_sync():
            model(X).sum().backward()
        optimizer.step(*arguments, **keywords)
    decoded = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    return decoded, 2 * gradient_by_hand(X)


def _harmless(model, guard, code, rank):
    """What scripts do, and is none of the guard's business."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    copied = copy.deepcopy(model.module)
    torch.save(model.module, io.BytesIO())
    for step in range(3):
        with torch.no_grad():
            gathered(model(X))  # evaluation
        model.module(X).sum().backward()  # as of a discriminator, in the generator's step
        copied(X).sum().backward()
        gathered(X)
        optimizer.zero_grad(set_to_none=step == 1)
        x = X.clone().requires_grad_(True)
        out = model(x).sum()
        [gradient] = torch.autograd.grad(out, x, create_graph=True)  # a gradient penalty
        (out + gradient.square().sum()).backward()
        gathered(out)  # a metric
        optimizer.step()
        torch.optim.SGD(copied.parameters(), lr=0.1).step()
        with model.no_sync():
            model(X).sum().backward()
        gathered(X)
        if step < 2:
            optimizer.zero_grad()
    model(X).sum().backward()  # with what was accumulated
    decoded = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    before, penalty = gradient_by_hand(X), None
    x, net = X.clone().requires_grad_(True), Head()
    out = net(x).sum()
    [gradient] = torch.autograd.grad(out, x, create_graph=True)
    (out + gradient.square().sum()).backward()
    penalty = torch.cat([parameter.grad.flatten() for parameter in net.parameters()])
    return decoded, 2 * before + penalty


def _two_models(rank, report):
    """A generator and a discriminator, with buffers that DistributedDataParallel sends, in one backward pass."""
    gradients = []
    for guarded in (False, True):
        torch.manual_seed(6)
        nets = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(2)]
        first, second = (DistributedDataParallel(net, find_unused_parameters=True) for net in nets)
        if guarded:
            draco_ext.protect(first, CODE)
            draco_ext.protect(second, CODE)
        for _ in range(3):
            second(X).sum()
            second(first(X)).square().sum().backward()
        gradients.append([parameter.grad.clone() for net in nets for parameter in net.parameters()])
    report(all(torch.allclose(a, b) for a, b in zip(*gradients, strict=True)))


def _exact(rank, report):
    torch.set_num_threads(1)
    for code in (CODE, CyclicCode(RANKS, 1)):
        for case in (
            _accumulate_in_a_part,
            _second_pass_in_a_part,
            _no_pass_for_a_part,
            _accumulate_over_steps,
        ):
            model = DistributedDataParallel(Head())
            guard = draco_ext.protect(model, code, adversary=(lambda step, z: -z) if rank == 1 else None)
            expected = None

            def run(case=case, model=model, guard=guard, code=code):
                nonlocal expected
                expected = case(model, guard, code, rank)

            error = error_of(run)
            decoded = error is None and torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
            report(
                (error, error is None and torch.allclose(decoded, expected, rtol=1e-5), sorted(guard.report().suspects))
            )
    for case in (_accumulate_with_a_closure, _harmless):
        model = DistributedDataParallel(Head())
        guard = draco_ext.protect(model, CODE)
        decoded, expected = case(model, guard, CODE, rank)
        report(torch.allclose(decoded, expected))
    _two_models(rank, report)


def test_what_is_protected_exactly():
    *parts, closure, harmless, two_models = run_local(_exact, RANKS)
    for accumulated, second, none, over_steps in (parts[:4], parts[4:]):
        assert accumulated == (None, True, [1])
        assert re.match(
            "RuntimeError: guard.steps.. takes one backward pass for each mini-batch, got another", second[0]
        )
        assert re.match("RuntimeError: step 0 is not complete: each of its . mini-batches needs one backward", none[0])
        assert over_steps[0].startswith(
            "RuntimeError: step 4 would lose the gradients of step 3, which no optimizer has used: cut a mini-batch "
            "into pieces, and pass all but the last one under model.no_sync(); or call zero_grad()"
        )
    assert closure
    assert harmless
    assert two_models

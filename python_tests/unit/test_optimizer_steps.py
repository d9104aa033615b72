"""What guards see of the steps of optimizers."""

import gc

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from draco_ext.training.optimizer_steps import before_optimizer_steps


class Observer:
    def __init__(self, seen):
        self.seen = seen
        self.itself = self  # so that only the garbage collector frees it
        before_optimizer_steps(self, lambda observer, optimizer, call: observer.seen.append(optimizer))


def optimizer():
    parameter = torch.nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    return torch.optim.SGD([parameter], lr=0.1)


def collect(*step):
    gc.collect()


def test_observers_may_be_freed_while_torch_goes_through_its_hooks():
    """A hook of its own that is removed then makes torch raise an error."""
    seen, steps = [], [optimizer(), optimizer()]
    gc.disable()  # but for the hook
    try:
        Observer(seen)  # garbage at once
        handle = register_optimizer_step_pre_hook(collect)
        for each in steps:
            each.step()
        handle.remove()
    finally:
        gc.enable()
    assert seen == steps[:1]


def test_observers_may_change_the_call():
    class Doubles:
        pass

    def double(observer, optimizer, call):
        arguments, keywords = call
        return arguments, {**keywords, "closure": lambda: 2 * keywords["closure"]()}

    observers = [Doubles(), Doubles()]
    for observer in observers:
        before_optimizer_steps(observer, double)
    assert optimizer().step(closure=lambda: 1.5) == 6.0

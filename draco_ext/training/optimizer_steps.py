"""The one hook by which guards see the steps of all optimizers."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

Call = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments and keywords of an optimizer's step

_observers: weakref.WeakKeyDictionary[Any, Callable[[Any, Optimizer, Call], Call | None]] = weakref.WeakKeyDictionary()


def before_optimizer_steps(observer: Any, see: Callable[[Any, Optimizer, Call], Call | None]) -> None:
    """Call a function before every step of every optimizer, as long as an object lives.

    Args:
        observer: the object, which this does not keep alive.
        see: f(observer, optimizer, call), which must not refer to the observer; it may return another call.
    """
    _observers[observer] = see
    _hook()


@functools.cache
def _hook() -> RemovableHandle:
    # It stays: the garbage collector, which may run at any time, must not remove hooks while torch goes through them.
    return register_optimizer_step_pre_hook(_before_step)


def _before_step(optimizer: Optimizer, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Call | None:
    if torch.compiler.is_compiling():  # a compiled step cannot run what observers do
        return None
    changed = None
    for observer, see in list(_observers.items()):
        changed = see(observer, optimizer, changed or (arguments, keywords)) or changed
    return changed

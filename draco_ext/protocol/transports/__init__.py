"""The transports and their registry: a new transport is a new file and a line in `TRANSPORTS`."""

from collections.abc import Callable, Mapping

from draco_ext.codes import Code
from draco_ext.protocol.communicator import Communicator
from draco_ext.protocol.transports.allgather import AllGather
from draco_ext.protocol.transports.allreduce_cyclic import AllReduceCyclic
from draco_ext.protocol.transports.allreduce_repetition import AllReduceRepetition
from draco_ext.protocol.transports.base import Transport
from draco_ext.protocol.transports.server import ServerTransport

__all__ = ["TRANSPORTS", "Transport", "make_transport"]


def _all_reduce(code: Code, communicator: Communicator, *, deadline: float, **tolerance: float) -> Transport:
    if code.message_is_gradient:
        return AllReduceRepetition(code, communicator, **tolerance)
    if code.uses_projections:
        return AllReduceCyclic(code, communicator, **tolerance)
    raise ValueError(f"code must have messages that are gradients, or projections, for 'allreduce'; got {code!r}")


def _all_gather(code: Code, communicator: Communicator, *, deadline: float, **tolerance: float) -> Transport:
    return AllGather(code, communicator, **tolerance)


TRANSPORTS: Mapping[str, Callable[..., Transport]] = {
    "allreduce": _all_reduce,
    "allgather": _all_gather,
    "server": ServerTransport,
}


def make_transport(
    name: str, code: Code, communicator: Communicator, *, deadline: float = 60.0, atol: float = 0.0, rtol: float = 0.0
) -> Transport:
    """Return the transport of this name. All ranks must call it.

    Args:
        name: one of `TRANSPORTS`.
        code: the code.
        communicator: connects the code's workers.
        deadline: seconds that a server waits for the others' messages once it has its own.
        atol: the absolute tolerance between honest messages; see `draco_ext.decode`.
        rtol: the relative one.
    """
    return TRANSPORTS[name](code, communicator, deadline=deadline, atol=atol, rtol=rtol)

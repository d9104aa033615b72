"""The transports and their registry: a new transport is a new file and a line in `TRANSPORTS`."""

import inspect
from collections.abc import Callable, Mapping

from draco_ext.codes import Code
from draco_ext.protocol.communicator import Communicator
from draco_ext.protocol.transports.allgather import AllGather
from draco_ext.protocol.transports.allreduce_cyclic import AllReduceCyclic
from draco_ext.protocol.transports.allreduce_repetition import AllReduceRepetition
from draco_ext.protocol.transports.base import Transport
from draco_ext.protocol.transports.server import ServerTransport
from draco_ext.protocol.transports.verified import VerifiedAllReduce

__all__ = ["FORMER_NAMES", "TRANSPORTS", "Transport", "make_transport"]


def _all_reduce(code: Code, communicator: Communicator, *, atol: float = 0.0, rtol: float = 0.0) -> Transport:
    if code.bounded:
        raise ValueError(f"code must have no second stage for 'allreduce', which adds up blindly; got {code!r}")
    if code.message_is_gradient:
        return AllReduceRepetition(code, communicator, atol=atol, rtol=rtol)
    if code.uses_projections and code.blocks == 1:
        return AllReduceCyclic(code, communicator, atol=atol, rtol=rtol)
    raise ValueError(
        f"code must have messages that are gradients, or as long and with projections, for 'allreduce'; got {code!r}"
    )


def _verified(code: Code, communicator: Communicator, *, atol: float = 0.0, rtol: float = 0.0) -> Transport:
    if code.blocks > 1:
        raise ValueError(f"code must have messages as long as a gradient for 'verified'; got {code!r}")
    # Messages differ by nature, or a second stage needs the winners of all votes: so all go to all.
    if not code.message_is_gradient or code.bounded or atol > 0 or rtol > 0:
        return AllGather(code, communicator, atol=atol, rtol=rtol)
    if code.adversaries == 0:
        return AllReduceRepetition(code, communicator)
    return VerifiedAllReduce(code, communicator)


TRANSPORTS: Mapping[str, Callable[..., Transport]] = {
    "allreduce": _all_reduce,
    "verified": _verified,
    "server": ServerTransport,
}
FORMER_NAMES = {"allgather": "verified"}


def make_transport(
    name: str,
    code: Code,
    communicator: Communicator,
    *,
    deadline: float = 60.0,
    on_one_host: bool = False,
    atol: float = 0.0,
    rtol: float = 0.0,
) -> Transport:
    """Return the transport of this name, made with those of the settings that it takes. All ranks must call it.

    Args:
        name: one of `TRANSPORTS`, or the former name of one.
        code: the code.
        communicator: connects the code's workers.
        deadline: seconds that a server waits for the others' messages once it has its own.
        on_one_host: whether all workers are on the same host, as far as is known.
        atol: the absolute tolerance between honest messages; see `draco_ext.decode`.
        rtol: the relative one.
    """
    if not code.sliceable:
        raise ValueError(f"code must be decoded column by column to have a transport, got {code!r}: use decode")
    make = TRANSPORTS[FORMER_NAMES.get(name, name)]
    settings = {"deadline": deadline, "on_one_host": on_one_host, "atol": atol, "rtol": rtol}
    taken = settings.keys() & inspect.signature(make).parameters
    return make(code, communicator, **{setting: settings[setting] for setting in taken})

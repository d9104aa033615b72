"""Ranks: torchrun's, or on this machine, where torch.multiprocessing starts them and gloo connects them."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing
from torch._C._distributed_c10d import TCPStore
from torch.multiprocessing.spawn import start_processes

# A rank that hears nothing for this long gives up: longer than any pause of a busy machine.
SILENCE = timedelta(minutes=5)


def under_torchrun() -> bool:
    """Whether torchrun, or a launcher like it, has started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def all_ranks() -> dist.ProcessGroup:
    """Return the group of all ranks, of which this one is a member.

    Raises:
        RuntimeError: torch.distributed is not set up.
    """
    group = dist.group.WORLD
    if group is None:
        raise RuntimeError("torch.distributed must be set up, got no process group")
    return group


def own_device() -> torch.device:
    """The GPU of this rank, made the current one; the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", dist.get_rank())) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def run_ranks(function: Callable[..., None], ranks: int, report: Callable[[Any], None], *args: Any) -> None:
    """Run ``function(rank, report, *args)`` on the ranks that torchrun has started, each with its own report.

    Without torchrun, on so many local ranks: then ``report`` gets what rank 0 reports, see `run_local`.

    Raises:
        ConnectionError: this rank cannot join those that torchrun has started.
    """
    if not under_torchrun():
        for value in run_local(function, ranks, *args):
            report(value)
        return
    try:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=SILENCE)
    except (RuntimeError, ValueError) as error:  # MASTER_PORT is taken, or nobody answers there; a variable is not set
        raise ConnectionError(f"rank {os.environ['RANK']} cannot join the others: {error}".splitlines()[0]) from error
    try:
        function(dist.get_rank(), report, *args)
        # Nobody hangs up while another rank still reads.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run_local(function: Callable[..., None], ranks: int, *args: Any) -> Iterator[Any]:
    """Run ``function(rank, report, *args)`` in ``ranks`` connected processes.

    The ranks form torch.distributed's default group over gloo on the loopback interface. Rank 0's
    ``report(value)`` hands a value to the caller; the other ranks' does nothing.

    Args:
        function: A module-level function, the same for all ranks.
        ranks: Number of processes.
        args: Passed on; must be picklable.

    Yields:
        What rank 0 reported, in order.

    Raises:
        torch.multiprocessing.ProcessRaisedException: A rank raised; the others are stopped.
        torch.multiprocessing.ProcessExitedException: A rank died; the others are stopped.
    """
    # Forked from one server that has imported torch once, instead of importing it in every rank; torch.optim's first
    # optimizer imports torch._dynamo.
    multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", function.__module__])
    # The store lives here and on a port that the system picks, so that two runs never collide.
    address = loopback_address()
    store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
    receiver, sender = multiprocessing.Pipe(duplex=False)
    context = start_processes(
        _rank,
        args=(ranks, address, store.port, sender, function, args),
        nprocs=ranks,
        join=False,
        start_method="forkserver",
    )
    sender.close()
    try:
        while True:
            if receiver.poll(0.1):
                try:
                    value = receiver.recv()
                except EOFError:  # every rank has closed its end
                    break
                yield value
            else:
                context.join(timeout=0)  # raises where a rank has failed
        while not context.join():
            pass
    finally:
        for process in context.processes:
            process.terminate()
        for process in context.processes:
            process.join()
        receiver.close()


def loopback_address() -> str:
    """The address under which this machine reaches itself: of IPv4, or of IPv6 where there is only that.

    Raises:
        ConnectionError: there is neither.
    """
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with contextlib.suppress(OSError), socket.socket(family) as probe:
            probe.bind((address, 0))
            return address
    raise ConnectionError("ranks on this machine need a loopback address, got neither 127.0.0.1 nor ::1")


def _rank(
    rank: int,
    ranks: int,
    address: str,
    port: int,
    sender: Connection,
    function: Callable[..., None],
    args: tuple[Any, ...],
) -> None:
    """One process: joins the group, runs the function, leaves."""
    # Gloo would otherwise look the host's own name up, which not every machine can.
    loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    store = TCPStore(address, port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=SILENCE)
    try:
        function(rank, sender.send if rank == 0 else _ignore, *args)
        # Nobody hangs up while another rank still reads.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _ignore(value: Any) -> None:
    """What ranks other than 0 report goes nowhere."""

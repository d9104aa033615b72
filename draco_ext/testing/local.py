"""Ranks that torchrun has started, or local ones, which torch.multiprocessing starts and gloo connects."""

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

# The timeout of collectives, longer than any pause on a busy machine.
SILENCE = timedelta(minutes=5)


def under_torchrun() -> bool:
    """Return whether torchrun, or a similar launcher, has started this process."""
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
    """Return this rank's GPU, after making it the current one; the CPU if there is no GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", dist.get_rank())) % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def run_ranks(function: Callable[..., None], ranks: int, report: Callable[[Any], None], *args: Any) -> None:
    """Run ``function(rank, report, *args)`` on the ranks that torchrun has started, each with its own report.

    Without torchrun, run it on ``ranks`` local ranks; ``report`` then receives the reports of rank 0, see `run_local`.

    Raises:
        ConnectionError: this rank cannot join the ranks that torchrun has started.
    """
    if not under_torchrun():
        for value in run_local(function, ranks, *args):
            report(value)
        return
    try:
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=SILENCE)
    except (RuntimeError, ValueError) as error:  # MASTER_PORT is in use or does not answer; a variable is not set
        raise ConnectionError(f"rank {os.environ['RANK']} cannot join the others: {error}".splitlines()[0]) from error
    try:
        function(dist.get_rank(), report, *args)
        # No rank disconnects while another one still reads.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run_local(function: Callable[..., None], ranks: int, *args: Any) -> Iterator[Any]:
    """Run ``function(rank, report, *args)`` in ``ranks`` connected processes.

    The ranks form torch.distributed's default group over gloo on the loopback interface. On rank 0
    ``report(value)`` sends a value to the caller; on other ranks it does nothing.

    Args:
        function: a module-level function, the same for all ranks.
        ranks: the number of processes.
        args: the further arguments; they must be picklable.

    Yields:
        The values that rank 0 reported, in order.

    Raises:
        torch.multiprocessing.ProcessRaisedException: a rank raised an error; the others are stopped.
        torch.multiprocessing.ProcessExitedException: a rank died; the others are stopped.
    """
    # Processes are forked from one server that has imported torch, so that not every rank imports it. The first
    # optimizer of torch.optim imports torch._dynamo.
    multiprocessing.set_forkserver_preload(["torch", "torch.distributed", "torch._dynamo", function.__module__])
    # The store is in this process, on a port that the system chooses, so that two runs never use the same one.
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
    """Return the loopback address of this machine: that of IPv4, or of IPv6 if there is no IPv4.

    Raises:
        ConnectionError: the machine has neither.
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
    """Run one process: join the group, run the function and leave the group."""
    # Otherwise gloo looks up the host's own name, which fails on some machines.
    loopback = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback[0])
    store = TCPStore(address, port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=SILENCE)
    try:
        function(rank, sender.send if rank == 0 else _ignore, *args)
        # No rank disconnects while another one still reads.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _ignore(value: Any) -> None:
    """Ignore the reports of ranks other than 0."""

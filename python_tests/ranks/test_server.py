"""`protect(transport="server")` with ranks that die and hang: erasures, not the end of the job."""

import os
import signal
import socket
import time

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from test_protect import train

from draco_ext import RepetitionCode
from draco_ext.protocol import shards
from draco_ext.protocol.transports import server as server_transport

CODE = RepetitionCode(6, 1)  # ranks 3, 4, 5 share a part: any one of them suffices
STEPS, STOP, DIE = 20, 4, 6  # less than an epoch
STOPPED, DEAD = 4, 5


def _rank(rank, folder, accidents):
    if "passed on" in accidents:
        socket.gethostname = lambda: f"host {rank}"  # on one host results go whole
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(f"{folder}/store", CODE.workers)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=CODE.workers)
    lost = {
        "none": [],
        "stopped and killed": [DEAD],
        "stopped and killed while shards are passed on": [DEAD],
        "stopped for too long": [STOPPED],
    }[accidents]
    waited, signals = [], []
    wait_for_shards = shards.ShardExchange._await

    def accident_while_waiting(*arguments):
        if signals:
            os.kill(os.getpid(), signals.pop())
        return wait_for_shards(*arguments)

    shards.ShardExchange._await = accident_while_waiting
    if STOPPED in lost:
        server_transport.MOST_UNCLAIMED = 8

    def accident(step, message):
        if (rank, step) == (STOPPED, STOP) and accidents != "none" and not (folder / "stopped").exists():
            (folder / "stopped").touch()
            signals.append(signal.SIGSTOP)
        if (rank, step) == (DEAD, DIE) and DEAD in lost:
            signals.append(signal.SIGKILL)
        if signals and "passed on" not in accidents:
            os.kill(os.getpid(), signals.pop())
        if rank == 0 and step > DIE and DEAD in lost:
            if not waited:
                store.wait(["continued"])
            waited.append(time.sleep(0.01))  # so that the one that was stopped can catch up
        return message

    def finish(model, guard):
        parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
        torch.save({"parameters": parameters, "missing": guard.report().missing}, f"{folder}/{rank}.pt")

    train(rank, CODE, "server", steps=STEPS, deadline=5.0, custom=accident, finish=finish, check_state_every=3)
    # Rank 0 may not hang up while another still takes its results; one that is lost would never come to a barrier.
    store.set(f"done {rank}", "")
    if rank == 0:
        store.wait([f"done {other}" for other in range(CODE.workers) if other not in lost])
        if STOPPED in lost:
            os.kill(int(store.get("pid")), signal.SIGCONT)
            store.wait(["given up"])


def _run(folder, accidents):
    """Exit statuses of the ranks."""
    folder.mkdir()
    processes = torch.multiprocessing.start_processes(
        _rank, (folder, accidents), nprocs=CODE.workers, join=False, start_method="forkserver"
    ).processes
    store = dist.FileStore(f"{folder}/store", CODE.workers)
    store.set("pid", str(processes[STOPPED].pid))
    try:
        if accidents.startswith("stopped and killed"):
            processes[DEAD].join(120)
            os.kill(processes[STOPPED].pid, signal.SIGCONT)
            store.set("continued", "")
        elif accidents == "stopped for too long":
            processes[STOPPED].join(120)
            store.set("given up", "")
        for process in processes:
            process.join(60)
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()


@pytest.mark.long
def test_a_rank_killed_and_a_rank_stopped(tmp_path):
    assert _run(tmp_path / "clean", "none") == [0] * 6
    clean = [torch.load(tmp_path / "clean" / f"{rank}.pt") for rank in range(6)]
    assert all(result["missing"] == {} for result in clean)
    assert _run(tmp_path / "accidents", "stopped and killed") == [0] * 5 + [-signal.SIGKILL]
    for rank in range(5):
        result = torch.load(tmp_path / "accidents" / f"{rank}.pt")
        # Also the rank that was stopped: it was given what it missed.
        assert torch.equal(result["parameters"].view(torch.int32), clean[0]["parameters"].view(torch.int32))
        assert set(result["missing"]) == {STOPPED, DEAD}
        assert result["missing"][DEAD] == list(range(DIE, STEPS))
        assert result["missing"][STOPPED][0] == STOP
        assert result["missing"][STOPPED][-1] < STEPS - 1  # it has caught up


def test_a_rank_killed_and_a_rank_stopped_while_shards_are_passed_on(tmp_path):
    """Both have sent their messages before."""
    assert _run(tmp_path / "clean", "none") == [0] * 6
    clean = torch.load(tmp_path / "clean" / "0.pt")
    accidents = "stopped and killed while shards are passed on"
    assert _run(tmp_path / "accidents", accidents) == [0] * 5 + [-signal.SIGKILL]
    for rank in range(5):
        result = torch.load(tmp_path / "accidents" / f"{rank}.pt")
        assert torch.equal(result["parameters"].view(torch.int32), clean["parameters"].view(torch.int32))
        assert set(result["missing"]) == {STOPPED, DEAD}
        assert result["missing"][DEAD][-1] == STEPS - 1
        assert result["missing"][STOPPED][-1] < STEPS - 1  # it has caught up


@pytest.mark.long
def test_a_rank_stopped_for_too_long_is_given_up(tmp_path):
    assert _run(tmp_path / "late", "stopped for too long") == [0] * 4 + [1, 0]
    assert torch.load(tmp_path / "late" / "0.pt")["missing"] == {STOPPED: list(range(STOP, STEPS))}

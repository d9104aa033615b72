"""Two hosts, which are network namespaces with addresses of their own, of five and three ranks, under torchrun.

Run as a script by torchrun, this file is what the ranks do.
"""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from contextlib import ExitStack, contextmanager

import pytest
import torch
import torch.distributed as dist
from test_protect import TRANSPORTS, Injector, same_everywhere, train

from draco_ext import CyclicCode, RepetitionCode
from draco_ext.protocol.transports import verified

HOSTS = {"alpha": "10.77.0.1", "beta": "10.77.0.2"}
RANKS = {"alpha": 5, "beta": 3}
LINK = "draco"  # the network device of each
PORT = 29411
STEPS = 5
# With bad workers on both hosts.
CASES = [(RepetitionCode(8, 1), (3, 4)), (CyclicCode(8, 2), (2, 5))]


def _ranks(file):
    dist.init_process_group("gloo")
    results = []
    for code, bad in CASES:
        for transport in TRANSPORTS:
            options = {"batch_size": 80, "steps": STEPS}
            clean, guard, _ = train(dist.get_rank(), code, transport, **options)
            rows, guard, outcomes = train(
                dist.get_rank(), code, transport, injector=Injector("reversed", bad), **options
            )
            everybody = [None] * code.workers
            dist.all_gather_object(everybody, (socket.gethostname(), guard.worker))
            suspects = guard.report().suspects.values()
            results.append(
                {
                    "same": same_everywhere(rows),
                    "distance": ((rows[0] - clean[0]).norm() / clean[0].norm()).item(),
                    "bits": torch.equal(rows[0].view(torch.int32), clean[0].view(torch.int32)),
                    "failed": [outcome for outcome in outcomes if outcome],
                    "hosts": {worker: host for host, worker in everybody},
                    "suspects": {suspect.worker: suspect.host for suspect in suspects},
                    "steps": [len(suspect.steps) for suspect in suspects],
                }
            )
    if dist.get_rank() == 0:
        with open(file, "w") as out:
            json.dump(results, out)
    dist.barrier()
    dist.destroy_process_group()


def _ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def namespaces(hosts):
    """New network namespaces for these hosts: their names, by name of the host."""
    names = {host: f"draco-{host}-{os.getpid()}" for host in hosts}
    with ExitStack() as stack:
        try:
            for name in names.values():
                _ip("netns", "add", name)
                stack.callback(_ip, "netns", "del", name)
                _ip("-n", name, "link", "set", "lo", "up")
        except (OSError, subprocess.CalledProcessError) as error:
            reason = f"needs network namespaces: {getattr(error, 'stderr', error)}"
            if os.environ.get("FAIL_WITHOUT_NAMESPACES") == "1":
                pytest.fail(reason)
            pytest.skip(reason)
        yield names


@pytest.fixture
def hosts():
    """Names of the namespaces of two hosts that are linked."""
    with namespaces(HOSTS) as names:
        one, other = names.values()
        _ip("-n", one, "link", "add", LINK, "type", "veth", "peer", "name", LINK, "netns", other)
        for host, name in names.items():
            _ip("-n", name, "address", "add", f"{HOSTS[host]}/24", "dev", LINK)
            _ip("-n", name, "link", "set", LINK, "up")
        yield names


@pytest.mark.long
def test_doctor_where_there_is_only_ipv6():
    with namespaces(["six"]) as names:
        _ip("-n", names["six"], "address", "del", "127.0.0.1/8", "dev", "lo")
        command = [
            "ip",
            "netns",
            "exec",
            names["six"],
            sys.executable,
            "-m",
            "draco_ext.cli",
            "doctor",
            "--workers",
            "2",
        ]
        done = subprocess.run(command, cwd="/", capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "gradients are bit-reproducible" in done.stdout


@pytest.mark.long
def test_two_hosts(hosts, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": LINK}
    names = tmp_path / "hosts"
    names.write_text("127.0.0.1 localhost\n" + "".join(f"{address} {host}\n" for host, address in HOSTS.items()))
    with ExitStack() as stack:
        jobs = []
        for host, name in hosts.items():
            # A host of its own also by name.
            command = ["ip", "netns", "exec", name, shutil.which("unshare"), "--uts", "--mount", "sh", "-c"]
            command += [
                f'hostname {host} && mount --bind {names} /etc/hosts && exec "$@"',
                "sh",
                sys.executable,
                "-m",
                "torch.distributed.run",
            ]
            command += [
                "--nnodes",
                "2",
                "--nproc-per-node",
                str(RANKS[host]),
                "--rdzv-backend",
                "c10d",
                "--rdzv-id",
                "draco",
            ]
            command += ["--rdzv-endpoint", f"{HOSTS['alpha']}:{PORT}", "--local-addr", HOSTS[host]]
            command += [__file__, str(tmp_path / "results.json")]
            job = subprocess.Popen(command, cwd="/", env=environment, stderr=subprocess.PIPE, text=True)
            jobs.append(stack.enter_context(job))
            stack.callback(job.kill)
        errors = [job.communicate(timeout=280)[1] for job in jobs]
        assert [job.returncode for job in jobs] == [0, 0], "\n".join(errors)
    results = json.loads((tmp_path / "results.json").read_text())
    cases = [(code, bad, transport) for code, bad in CASES for transport in TRANSPORTS]
    for (code, bad, transport), result in zip(cases, results, strict=True):
        name = f"{code}, {transport}"
        assert result["same"], name
        assert result["failed"] == [], name
        assert result["bits"] if isinstance(code, RepetitionCode) else result["distance"] < 1e-5, name
        where = {int(worker): host for worker, host in result["hosts"].items()}
        assert sorted(where.values()) == ["alpha"] * 5 + ["beta"] * 3
        # Faults on one host come together: whoever holds a part is on both.
        for part in range(code.parts):
            holders = [where[worker] for worker in where if part in code.assignment(worker)]
            assert holders.count("alpha") <= math.ceil(len(holders) * 5 / 8), name
        assert {int(worker): host for worker, host in result["suspects"].items()} == {j: where[j] for j in bad}, name
        assert result["steps"] == [STEPS, STEPS], name
        assert {where[j] for j in bad} == set(HOSTS)


if __name__ == "__main__":
    verified.SMALL = 0  # messages of small models in pieces, too
    _ranks(*sys.argv[1:])

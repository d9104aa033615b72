"""`protect` in real processes over gloo: DistributedDataParallel on the digits, with bad ranks and without."""

import contextlib
import difflib
import gc
import json
import logging
import os
import re
import runpy
import socket
import subprocess
import sys
import weakref
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import draco_ext
from draco_ext import CyclicCode, DecodingError, RedundantBatchSampler, RepetitionCode, ops
from draco_ext.protocol.groups import divide, gather_json, timeout_of
from draco_ext.protocol.transports import verified
from draco_ext.reporting.evidence import Evidence
from draco_ext.testing.local import run_local

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
STEPS = 20
BATCH = 84  # a multiple of every code's parts


def _digits():
    # Computed by numpy: where torch has made threads, forked ranks that ask for them wait for ever.
    images, labels = load_digits(return_X_y=True)
    return TensorDataset(torch.from_numpy((images / 16).astype("float32")), torch.from_numpy(labels))


DIGITS = _digits()  # once, before ranks are forked


def network(dtype=torch.float32):
    """With an odd number of elements in some parameters, dropout, and several of DDP's buckets."""
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Linear(64, 61), nn.ReLU(), nn.Dropout(0.2), nn.Linear(61, 33), nn.ReLU(), nn.Linear(33, 10)
    ).to(dtype)


def bucket_cap(**options):
    return {"bucket_cap_mb": 0.005, **options}


def _flip(step, message):
    flipped = message.clone()
    flipped.view(torch.uint8)[4 * (step * 37 % message.numel())] ^= 1
    return flipped


# name -> f(step, message) -> message
ATTACKS = {
    "reversed": lambda step, z: -100 * z,
    "constant": lambda step, z: torch.full_like(z, -100.0),
    "nan": lambda step, z: torch.full_like(z, torch.nan),
    "one bit": _flip,
    "plus one": lambda step, z: z + 1,
}


@dataclass(frozen=True)
class Injector:
    """Who is bad when, by workers and steps, and what they send.

    moves: in every step those so many workers further on. every: in one of so many steps.
    """

    attack: str = "reversed"
    workers: tuple[int, ...] = ()
    moves: int = 0
    every: int = 1

    def at(self, worker, step, workers):
        """Whether a worker, of so many, is bad in a step."""
        return step % self.every == 0 and worker in [(j + self.moves * step) % workers for j in self.workers]

    def adversary(self, worker, workers):
        return lambda step, z: ATTACKS[self.attack](step, z) if self.at(worker, step, workers) else z


HONEST = Injector()


def train(
    rank,
    code,
    transport,
    *,
    injector=HONEST,
    steps=STEPS,
    batch_size=BATCH,
    plain=False,
    dropout=True,
    optimizer="sgd",
    without=(),
    small=0,
    custom=None,
    finish=None,
    **options,
):
    """Parameters of all ranks after some steps, this rank's guard, and what every step raised.

    plain: without a guard. without: steps whose update is left out. small: the largest message that is not sent in
    pieces. custom: another adversary. finish: called with model and guard instead of gathering the parameters.
    """
    verified.SMALL = small
    torch.set_num_threads(1)
    model = DistributedDataParallel(network(), **bucket_cap())
    kinds = {"sgd": (torch.optim.SGD, {"momentum": 0.9}), "adamw": (torch.optim.AdamW, {"weight_decay": 0.1})}
    kind, settings = kinds[optimizer]
    opt = kind(model.parameters(), lr=0.01, **settings)
    ranks_per_host = options.get("ranks_per_host")
    batches = RedundantBatchSampler(1797, code, batch_size=batch_size, rank=rank, seed=3, ranks_per_host=ranks_per_host)
    adversary = custom or injector.adversary(batches.worker, code.workers)
    guard = None if plain else draco_ext.protect(model, code, transport=transport, adversary=adversary, **options)
    loader = DataLoader(DIGITS, batch_sampler=batches)
    if plain or not dropout:
        model.module[2].p = 0.0  # nobody would seed it
    outcomes = []

    def take(x, y):
        nn.functional.cross_entropy(model(x), y).backward()

    if guard is None or isinstance(code, RepetitionCode):
        for x, y in loader:
            opt.zero_grad()
            outcomes.append(attempt(take, x, y))
            if len(outcomes) - 1 not in without:
                opt.step()
            if len(outcomes) == steps:
                break
    else:
        for step in guard.steps(loader):
            outcomes.append(attempt(lambda step=step: [take(x, y) for x, y in step]))
            if len(outcomes) - 1 not in without:
                opt.step()
            opt.zero_grad()
            if len(outcomes) == steps:
                break
    if finish is not None:
        return finish(model, guard)
    own = torch.cat([p.detach().flatten() for p in model.parameters()])
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, own)
    return torch.stack(rows), guard, outcomes


def attempt(function, *arguments):
    try:
        function(*arguments)
    except DecodingError as error:
        return str(error)
    return None


def same_everywhere(rows):
    return all(torch.equal(row.view(torch.int32), rows[0].view(torch.int32)) for row in rows)


# ------------------------------------------------------------------------------------- what runs on the ranks


TRANSPORTS = ("allreduce", "verified", "server")


def tried(injectors, long):
    """Every transport, with all injectors or one of them; the next transport then with the next."""
    for i, transport in enumerate(TRANSPORTS):
        yield transport, injectors if long else [injectors[i % len(injectors)]]


def _against_clean(rank, report, code, injectors, steps, long):
    """For transports and injectors: whether all ranks agree, how far from the clean run, who was found."""
    for transport, bad in tried(injectors, long):
        for injector in (HONEST, *bad):
            rows, guard, outcomes = train(rank, code, transport, injector=injector, steps=steps)
            report((same_everywhere(rows), rows[0].tolist(), guard.report(), set(outcomes)))


# code, who is bad, steps
CASES = [
    (RepetitionCode(7, 1), [Injector("one bit", (3, 6)), Injector("nan", (2, 4))], 3),  # groups of four and three
    (RepetitionCode(5, 2), [Injector("constant", (0, 1), moves=1)], 3),  # one group
    (CyclicCode(6, 2), [Injector("reversed", (0, 1), moves=3), Injector("plus one", (3,), every=2)], 3),
]
LONG_CASES = [
    (
        RepetitionCode(9, 1),  # three groups of three
        [Injector("reversed", (2,), moves=4), Injector("one bit", (1, 3, 8)), Injector("plus one", (0, 4, 7), every=2)],
        8,
    ),
    (RepetitionCode(6, 2), [Injector("constant", (0, 1)), Injector("one bit", (0, 5), moves=1)], 8),
    (
        CyclicCode(7, 2),
        [Injector("reversed", (0, 1), moves=3), Injector("nan", (2, 5)), Injector("plus one", (3,), every=2)],
        8,
    ),
]


@pytest.mark.parametrize(
    ("code", "injectors", "steps"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.long) for case in LONG_CASES)],
    ids=lambda value: repr(value) if not isinstance(value, list) else f"{len(value)} attacks",
)
def test_bad_ranks_change_nothing(code, injectors, steps, long):
    results = run_local(_against_clean, code.workers, code, injectors, steps, long)
    runs = [(transport, injector) for transport, bad in tried(injectors, long) for injector in (HONEST, *bad)]
    clean = None
    for (transport, injector), (same, parameters, report, outcomes) in zip(runs, results, strict=True):
        name, parameters = f"{transport}, {injector}", torch.tensor(parameters)
        clean = parameters if injector is HONEST else clean
        assert clean.isfinite().all()
        assert report.steps == steps
        assert same, name
        assert outcomes == {None}, name
        if isinstance(code, RepetitionCode):
            assert torch.equal(parameters.view(torch.int32), clean.view(torch.int32)), name
        else:
            assert (parameters - clean).norm() / clean.norm() < 1e-5, name
        found = {suspect.worker: suspect.steps for suspect in report.suspects.values()}
        bad = {j: [step for step in range(steps) if injector.at(j, step, code.workers)] for j in range(code.workers)}
        assert found == {j: wrong for j, wrong in bad.items() if wrong}, name
        assert report.failed_steps == ()
        assert report.missing == {}
        assert report.trust.startswith(transport)


def _one_element(rank, report):
    """A bucket that is smaller than a group."""
    for code in (RepetitionCode(6, 1), RepetitionCode(6, 0), RepetitionCode(6, 2), CyclicCode(6, 1)):
        for transport in TRANSPORTS:
            model = DistributedDataParallel(nn.Linear(1, 1, bias=False))
            adversary = (lambda step, z: z + 5) if rank == 4 and code.adversaries else None
            guard = draco_ext.protect(model, code, transport=transport, adversary=adversary)
            for step in guard.steps([torch.full((1, 1), float(part)) for part in code.assignment(rank)]):
                for x in step:
                    model(x).sum().backward()
            report((code, transport, model.module.weight.grad.item(), sorted(guard.report().suspects)))


def test_a_bucket_of_one_element():
    for code, transport, gradient, suspects in run_local(_one_element, 6):
        assert gradient == pytest.approx((code.parts - 1) / 2, rel=1e-6), (code, transport)
        assert suspects == ([4] if code.adversaries else [])


def _plain(rank, report):
    """The same batches with DDP alone and with a code for no bad rank."""
    for code in (RepetitionCode(3, 0), CyclicCode(3, 0)):
        plain, _, _ = train(rank, code, None, plain=True, steps=6)
        for transport in TRANSPORTS:
            coded, _, _ = train(rank, code, transport, dropout=False, steps=6)
            report((transport, plain[0].tolist(), coded[0].tolist(), same_everywhere(coded)))


def test_without_adversaries_it_is_plain_ddp():
    for transport, plain, coded, same in run_local(_plain, 3):
        assert same
        plain, coded = torch.tensor(plain), torch.tensor(coded)
        if transport == "allreduce":
            assert torch.equal(plain.view(torch.int32), coded.view(torch.int32))
        assert (plain - coded).norm() / plain.norm() < 1e-6


TOO_MANY_IN = (2, 3)  # steps


def _too_many(rank, report, code, bad, steps):
    """More bad ranks than can be corrected, in two steps."""

    def adversary(step, message):
        return torch.full_like(message, float(rank + step)) if rank in bad and step in TOO_MANY_IN else message

    for transport in TRANSPORTS:
        # The same run without the steps that failed: batches are taken from the loader all the same.
        rows, _, _ = train(rank, code, transport, optimizer="adamw", without=TOO_MANY_IN, steps=steps)
        without = rows[0].tolist()
        for on_failure in ("raise", "skip"):
            rows, guard, outcomes = train(
                rank, code, transport, custom=adversary, on_failure=on_failure, optimizer="adamw", steps=steps
            )
            everybody = [None] * code.workers
            dist.all_gather_object(everybody, outcomes)
            report((on_failure, same_everywhere(rows), rows[0].tolist() == without, everybody, guard.report()))


@pytest.mark.parametrize(("code", "bad"), [(RepetitionCode(3, 1), (1, 2)), (CyclicCode(4, 1), (0, 2, 3))], ids=repr)
def test_too_many_bad_ranks_stop_all(code, bad):
    steps = 5
    results = list(run_local(_too_many, code.workers, code, bad, steps))
    assert len(results) == 2 * len(TRANSPORTS)
    for on_failure, same, untouched, outcomes, report in results:
        assert same
        assert all(of_rank == outcomes[0] for of_rank in outcomes)
        failed = [step for step, error in enumerate(outcomes[0]) if error is not None]
        assert failed == ([*TOO_MANY_IN] if on_failure == "raise" else [])
        assert all(f"no gradient in step {step}, bucket 0: more ranks are bad" in outcomes[0][step] for step in failed)
        assert all("[]" not in outcomes[0][step] for step in failed)  # no list of nobody
        assert report.failed_steps == TOO_MANY_IN
        assert report.suspects == {}  # who was bad is not certain
        assert report.steps == steps
        # No update: neither parameters nor the optimizer's state have seen the failed steps.
        assert untouched


def _bookkeeping(rank, report, folder):
    code = RepetitionCode(6, 1)
    findings, lines = [], []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("draco_ext").addHandler(handler)
    options = {"callback": findings.append, "ledger": f"{folder}/ledger-{{rank}}.jsonl", "ranks_per_host": 3}
    _, guard, _ = train(rank, code, "allreduce", injector=Injector("one bit", (2, 3)), steps=3, **options)
    everybody = [None] * 6
    dist.all_gather_object(everybody, ([vars(finding) for finding in findings], lines, guard.report()))
    report(everybody)


def test_bad_ranks_are_named(tmp_path):
    """In the report, the ledger, the log and the callback; by rank and host, with what differed."""
    [everybody] = run_local(_bookkeeping, 6, tmp_path)
    # The ranks of a host are dealt to the two groups: worker 2 is the second rank of the second host, worker 3 that of
    # the first.
    ranks = {2: 4, 3: 1}
    for rank, (findings, lines, report) in enumerate(everybody):
        ledger = [json.loads(line) for line in (tmp_path / f"ledger-{rank}.jsonl").read_text().splitlines()]
        assert ledger == findings
        assert len(findings) >= 2 * 3
        for finding in findings:
            assert finding["rank"] == ranks[finding["worker"]]
            assert finding["elements"] == 1
            assert not finding["failed"]
            assert 0 < finding["largest"] < 1
            assert finding["host"]
        assert {finding["step"] for finding in findings} == {0, 1, 2}
        assert len({(finding["step"], finding["bucket"], finding["worker"]) for finding in findings}) == len(findings)
        assert {(finding["step"], finding["first"]) for finding in findings} == {(0, 0), (1, 37), (2, 74)}
        said = [f"rank {r} on {findings[0]['host']} sent a wrong gradient in step 0" for r in (4, 1)]
        assert lines == (said if rank == 0 else [])  # once in a job
        assert sorted(report.suspects) == [1, 4]
        assert report.suspects[4].steps == [0, 1, 2]
        assert report.suspects[4].worker == 2
        assert "allreduce: up to s ranks may compute anything wrong" in report.trust
        assert min(report.seconds.communicate, report.seconds.decode) > 0


def _callbacks(rank, report, folder):
    """A callback that raises, and a change of directory."""
    calls, lines = [], []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append((record.getMessage().split(";")[0], record.exc_info[0].__name__))

    def callback(finding):
        calls.append((finding.step, finding.bucket, guard.step, all(p.grad is not None for p in model.parameters())))
        raise (KeyError if finding.step == 2 else ValueError)("what a user's code does")

    os.chdir(folder)
    model = DistributedDataParallel(network(), **bucket_cap())
    options = {"callback": callback, "ledger": "ledger.jsonl", "on_failure": "skip"}
    first_bad = (2, 2, 2, 1)
    guard = draco_ext.protect(
        model, RepetitionCode(3, 1), adversary=lambda step, z: z + rank if rank >= first_bad[step] else z, **options
    )
    logging.getLogger("draco_ext").addHandler(handler)
    logging.getLogger("draco_ext").setLevel(logging.ERROR)
    os.chdir("/")
    snapshots = []
    for _ in range(4):  # in the last of which too many are bad
        model.zero_grad()
        model(torch.ones(2, 64)).sum().backward()
        snapshots.append((guard.report(), str(guard.report())))
    report((calls, lines, [str(kept) == said for kept, said in snapshots], snapshots[-1][0]))


def test_a_callback_cannot_end_the_job(tmp_path):
    [(calls, lines, unchanged, report)] = run_local(_callbacks, 3, tmp_path)
    assert [step for step, *_ in calls] == sorted(step for step, *_ in calls)
    for step in range(4):
        buckets = [bucket for of_step, bucket, _, _ in calls if of_step == step]
        assert buckets == sorted(buckets)
        assert buckets
    assert all(guard_step == step + 1 for step, _, guard_step, _ in calls)  # the step is over
    assert all(there == (step < 3) for step, _, _, there in calls)
    assert lines == [("callback raised an error", "ValueError"), ("callback raised an error", "KeyError")]
    assert report.undelivered == len(calls)
    assert report.suspects[2].steps == [0, 1, 2]
    assert report.failed_steps == (3,)
    assert all(unchanged)
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == len(calls)


def _accumulation(rank, report):
    """Two micro-batches with no_sync, dropout in both, a rank that is bad."""
    code = RepetitionCode(3, 1)
    results = []
    for bad in ((), (1,)):
        torch.set_num_threads(1)
        model = DistributedDataParallel(network(), **bucket_cap())
        adversary = ATTACKS["reversed"] if rank in bad else None
        draco_ext.protect(model, code, adversary=adversary)
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        images, labels = DIGITS.tensors
        for step in range(3):
            opt.zero_grad()
            for micro in range(2):
                begin = 60 * step + 30 * micro
                with model.no_sync() if micro == 0 else contextlib.nullcontext():
                    nn.functional.cross_entropy(model(images[begin:][:30]), labels[begin:][:30]).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]).tolist())
    report(results)


def test_gradient_accumulation():
    [[clean, attacked]] = run_local(_accumulation, 3)
    assert clean == attacked


def _freed(rank, report):
    for code in (RepetitionCode(3, 1), CyclicCode(3, 1)):
        model = DistributedDataParallel(network(), **bucket_cap())
        guard = draco_ext.protect(model, code)
        for step in guard.steps([torch.ones(2, 64)] * len(code.assignment(rank))):
            for x in step:
                model(x).sum().backward()
        things = (model, guard, model.module, next(model.parameters()))
        references = [weakref.ref(thing) for thing in things]
        del model, guard, step, x, things
        gc.collect()
        report([reference() for reference in references])


def test_a_guarded_model_is_freed():
    assert list(run_local(_freed, 3)) == [[None] * 4] * 2


def _part_of_a_job(rank, report):
    """The model is on ranks 1 to 6 of 7, which are in as many process groups, and then are not."""
    group = dist.new_group(range(1, 7), timeout=timedelta(seconds=77))
    if rank:
        assert timeout_of(divide(group, [range(6)])) == timedelta(seconds=77)
    for transport in TRANSPORTS:
        suspects = None
        if rank:
            model = DistributedDataParallel(nn.Linear(3, 3), process_group=group)
            adversary = (lambda step, z: z + 5) if rank == 4 else None
            guard = draco_ext.protect(model, RepetitionCode(6, 1), transport=transport, adversary=adversary)
            model(torch.ones(1, 3)).sum().backward()
            suspects = sorted(guard.report().suspects)
        everybody = [None] * 7
        dist.all_gather_object(everybody, suspects)
        report(everybody)
    dist.new_group([1, 2])
    error = None
    if rank:
        try:
            draco_ext.protect(DistributedDataParallel(nn.Linear(3, 3), process_group=group), RepetitionCode(6, 1))
        except ValueError as caught:
            error = str(caught)
    everybody = [None] * 7
    dist.all_gather_object(everybody, error)
    report(everybody)


def test_a_group_within_a_larger_job():
    *suspects, errors = run_local(_part_of_a_job, 7)
    assert suspects == [[None] + [[3]] * 6] * len(TRANSPORTS)  # its rank in the group
    assert errors[0] is None
    said = (
        "the number of process groups that a rank is in must be the same on all ranks, got . on rank 2 and . on rank 0"
    )
    assert all(re.fullmatch(said, error) for error in errors[1:])


def _without_pickle(rank, report):
    def refuse(*arguments):
        raise AssertionError("something from a peer was unpickled")

    dist.distributed_c10d._unpickler = refuse
    with contextlib.suppress(AssertionError):
        dist.all_gather_object([None] * 3, "noticed")
        report("not noticed")
    for transport in TRANSPORTS:
        model = DistributedDataParallel(nn.Linear(3, 3))
        guard = draco_ext.protect(model, RepetitionCode(3, 1), transport=transport)
        model(torch.ones(1, 3)).sum().backward()
        report((guard.step, guard.self_test(torch.ones(1, 3)).reproducible))
    device = torch.device("cpu")
    report(gather_json({"ä": rank}, dist.group.WORLD, device))
    try:
        gather_json("x" * 2**16 * (rank == 1), dist.group.WORLD, device)
    except ValueError as error:
        report(str(error))


def test_nothing_from_a_peer_is_unpickled():
    *transports, everybody, error = run_local(_without_pickle, 3)
    assert transports == [(1, True)] * len(TRANSPORTS)
    assert everybody == [{"ä": rank} for rank in range(3)]
    assert error == "ranks must send from 1 to 65536 bytes, got 65538 from rank 1"


def _mistakes(rank, report):
    code = RepetitionCode(3, 1)

    def error(function):
        try:
            function()
        except Exception as caught:
            return f"{type(caught).__name__}: {caught}"
        return None

    def model(dtype=torch.float32):
        return DistributedDataParallel(network(dtype), **bucket_cap())

    def protect(*arguments, **options):
        return error(lambda: draco_ext.protect(*arguments, **options))

    report(protect(network(), code))
    report(protect(model(), 3))
    report(protect(model(), RepetitionCode(4, 1)))
    report(protect(model(), code, transport="pigeons"))
    report(protect(model(), code, on_failure="hope"))
    report(protect(model(), code, atol=0.1))
    report(protect(model(torch.float16), CyclicCode(3, 1)))
    report(protect(model(), code, seed=rank))
    report(protect(model(), code if rank else CyclicCode(3, 1)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "build_info", lambda: {"instruction_set": "baseline" if rank == 1 else "avx2"})
        report(protect(model(), CyclicCode(3, 1)))
    unguarded = model()
    draco_ext.protect(unguarded, CyclicCode(3, 1))
    report(error(lambda: unguarded(torch.zeros(1, 64))))
    guarded = model()
    guard = draco_ext.protect(guarded, CyclicCode(3, 1))

    def incomplete():
        for step in guard.steps([torch.zeros(1, 64)] * 6):
            guarded(next(step)).sum().backward()

    report(error(incomplete))

    def short():
        for step in guard.steps([torch.zeros(1, 64)] * 2):
            for x in step:
                guarded(x).sum().backward()

    report(error(short))


def test_mistakes_are_named():
    assert list(run_local(_mistakes, 3)) == [
        "TypeError: model must be a DistributedDataParallel or made by fully_shard, got Sequential",
        "TypeError: code must be a RepetitionCode, a CyclicCode or an Audit, got int",
        "ValueError: code must be for the 3 ranks of the model's process group, got "
        "RepetitionCode(workers=4, adversaries=1)",
        "ValueError: transport must be 'allreduce' or 'verified' or 'server', got 'pigeons'",
        "ValueError: on_failure must be 'raise' or 'skip', got 'hope'",
        "ValueError: atol and rtol must be 0 for a repetition code with transport='allreduce'; take 'verified'",
        "TypeError: parameters must have a dtype that CyclicCode(workers=3, adversaries=1) takes, "
        "got torch.float16 for module.0.weight",
        "ValueError: seed must be the same on all ranks, got 1 on rank 1 and 0 on rank 0",
        "ValueError: code must be the same on all ranks, got 'RepetitionCode(workers=3, adversaries=1)' on rank 1 and "
        "'CyclicCode(workers=3, adversaries=1)' on rank 0",
        "ValueError: instruction set (DRACO_ISA) must be the same on all ranks, got 'baseline' on rank 1 and 'avx2' on "
        "rank 0",
        "RuntimeError: CyclicCode(workers=3, adversaries=1) has several parts for each rank: loop over "
        "guard.steps(loader)",
        "RuntimeError: step 0 is not complete: each of its 3 mini-batches needs one backward pass",
        "RuntimeError: the loader ended within a step of 3 mini-batches",
    ]


EXAMPLE_RANKS = 6


def _example(rank, ranks, runs):
    """What torchrun starts, in a process that has imported torch already: scripts, one after the other."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {name: str(number) for name, number in numbers.items()}
    torch.set_num_threads(1)
    sys.path.insert(0, str(EXAMPLES))
    for script, arguments, port, output in runs:
        os.environ["MASTER_PORT"] = str(port)
        sys.argv = [script, *arguments]
        with open(output, "a") as file, contextlib.redirect_stdout(file):
            runpy.run_path(script, run_name="__main__")


def run_examples(folder, ranks, *commands):
    """Run scripts with their arguments; return what each has said."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in commands]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        ports = [probe.getsockname()[1] for probe in probes]
    outputs = [folder / f"said {i}" for i in range(len(commands))]
    runs = []
    for command, port, output in zip(commands, ports, outputs, strict=True):
        name, *arguments = command.split()
        runs.append((str(EXAMPLES / f"{name}.py"), arguments, port, str(output)))
    torch.multiprocessing.start_processes(_example, (ranks, runs), nprocs=ranks, start_method="forkserver")
    return [output.read_text() for output in outputs]


@pytest.mark.parametrize("name", [pytest.param("ddp_digits", marks=pytest.mark.long), "ddp_digits_protected"])
def test_examples(name, tmp_path):
    """The script as it stands."""
    [said] = run_examples(tmp_path, EXAMPLE_RANKS, name)
    assert float(said.split()[-1]) > 0.95


@pytest.mark.parametrize("framework", ["ddp", "fsdp"])
def test_examples_of_gpt(framework, tmp_path, long):
    """The second tutorial, with fewer steps: an audit changes no bit, and puts right what ruins the plain script."""
    plain, audited, short, fault = f"gpt_{framework}", f"gpt_{framework}_audited", "--steps 5", "--fault 3"
    commands = [f"{plain} {short}", f"{plain} {short} {fault}", f"{audited} {short} {fault}"]
    if long and framework == "ddp":  # others find it too late in so few steps
        commands += [f"{audited} {short} {fault} --rate 0.001"]
    said = run_examples(tmp_path, 4, *commands)
    clean, ruined, corrected, *late = (text.splitlines()[-1] for text in said)
    assert clean.startswith("validation loss ")
    assert corrected == clean != ruined
    assert late in ([], [ruined])
    assert "step 3: rank 1 was wrong, and again\nconvicted: {1: 3}, " in said[2]


@pytest.mark.long
@pytest.mark.parametrize("command", ["ddp_digits_protected", "gpt_fsdp_audited --steps 5 --fault 3"])
def test_examples_under_torchrun(command):
    name, *arguments = command.split()
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={EXAMPLE_RANKS}"]
    command += [EXAMPLES / f"{name}.py", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    options = {"cwd": "/", "env": environment, "capture_output": True, "text": True, "timeout": 300}
    for _ in range(2):
        run = subprocess.run(command, **options, check=False)
        # Torch leaves gloo's threads running into the interpreter's end, where one that lets go of a tensor late ends
        # the process (pytorch/pytorch#179291): rare, and in the script without draco_ext as well.
        if "terminate called without an active exception" not in run.stderr:
            break
    assert run.returncode == 0, run.stderr
    if arguments:
        assert "convicted: {1: 3}" in run.stdout
    else:
        assert float(run.stdout.split()[-1]) > 0.95


def test_protection_takes_three_lines():
    plain, protected = ((EXAMPLES / f"ddp_digits{suffix}.py").read_text().splitlines() for suffix in ("", "_protected"))
    added = [line[1:] for line in difflib.unified_diff(plain, protected, n=0) if line[0] == "+" and line[1:2] != "+"]
    changed = [line for line in added if line and not line.startswith("from torch")]
    assert [line.split("(")[0] for line in changed] == [
        "import draco_ext",
        "guard = draco_ext.protect",
        "batches = draco_ext.RedundantBatchSampler",
    ]


def _near_the_noise(rank, report):
    for transport in TRANSPORTS:

        def adversary(step, message):
            altered = message.clone()
            if rank == 2:
                altered[step % len(message)] += 1.8e-6 * message.norm()
            return altered

        rows, guard, outcomes = train(rank, CyclicCode(5, 2), transport, batch_size=85, steps=14, custom=adversary)
        everybody = [None] * 5
        dist.all_gather_object(everybody, guard.report().probable)
        state = guard.state_dict()
        guard._recorder.evidence = Evidence()
        assert guard.report().probable == {}
        guard.load_state_dict(state)
        report((same_everywhere(rows), set(outcomes), guard.report().probable, everybody))


def test_all_ranks_name_it():
    for transport, (same, outcomes, probable, everybody) in zip(TRANSPORTS, run_local(_near_the_noise, 5), strict=True):
        assert same, transport
        assert outcomes == {None}, transport
        assert probable.keys() == {2}, transport
        assert probable[2] > 0.5
        assert [told.keys() for told in everybody] == [{2}] * 5, transport

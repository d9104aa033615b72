"""Digests of replicated state, the repair of a rank whose own differs, and what the record of a step tells."""

import itertools
import logging

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import draco_ext
from draco_ext import CyclicCode, DecodingError, RepetitionCode
from draco_ext.protocol.transports import verified
from draco_ext.testing.local import run_local
from draco_ext.training.record import Claims, StepRecord, _pack, _unpack, majority
from draco_ext.training.state import SECTIONS, ReplicatedState, chunks, judge

STEPS, FAULT = 5, 2
TRANSPORTS = ("allreduce", "verified", "server")


def network():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))


def data(code):
    return torch.randn(STEPS, code.parts, 5, 6, generator=torch.Generator().manual_seed(0))


def gathered(value):
    everybody = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, value)
    return everybody


def bits(tensors):
    return b"".join(tensor.detach().contiguous().numpy().tobytes() for tensor in tensors)


def train(
    rank,
    code,
    transport,
    *,
    before=None,
    during=None,
    watch=True,
    broadcast=True,
    inputs=None,
    **options,
):
    """What every rank has at the end: parameters, buffers, optimizer's state, report, kinds of findings, errors.

    before: f(step, model, optimizer), called before a step. during: f(step, message), see `adversary`.
    """
    verified.SMALL = 0  # messages of small models in pieces, too
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    model = DistributedDataParallel(network(), bucket_cap_mb=0.0002, broadcast_buffers=broadcast)
    findings, errors = [], []
    options = {"check_state_every": 1, "callback": findings.append} | options
    guard = draco_ext.protect(model, code, transport=transport, adversary=during, **options)
    opt = torch.optim.AdamW(model.parameters(), lr=0.01)
    if watch:
        guard.watch(opt)
    inputs = data(code) if inputs is None else inputs
    mine = [inputs[step, part] for step in range(STEPS) for part in code.assignment(guard.worker)]
    for number, step in enumerate(guard.steps(mine)):
        opt.zero_grad()
        if before is not None:
            before(number, model, opt, guard)
        try:
            for x in step:
                model(x).square().sum().backward()
        except DecodingError as error:
            errors.append(str(error))
        opt.step()
    kinds = [(finding.kind, finding.rank, finding.step) for finding in findings if finding.kind == "state"]
    state = [tensor for parameter in model.parameters() for tensor in opt.state[parameter].values()]
    own = bits(model.parameters()), bits(model.module[1].buffers()), bits(state), opt.param_groups[0]["lr"]
    return gathered((own, guard.report(), kinds, errors)), guard, model


def flip(tensor, rank):
    tensor.detach().view(torch.int32).view(-1)[3 + rank] ^= 1 << 20


def corrupt(rank, what, ranks):
    """A flipped bit, before one step, on some ranks; another one on each."""

    def before(step, model, opt, guard):
        if step != FAULT or rank not in ranks:
            return
        first = next(model.parameters())
        if what == "parameters":
            flip(first, rank)
        elif what == "optimizer":
            flip(opt.state[first]["exp_avg"], rank)
        elif what == "number":
            opt.param_groups[0]["lr"] *= 2
        elif what == "buffers":
            flip(model.module[1].running_mean, rank)

    return before


# code -> what is corrupt, on which ranks
CASES = {
    RepetitionCode(3, 1): [
        ("parameters", [1]),
        ("parameters", [0]),
        ("optimizer", [2]),
        ("number", [0]),
        ("buffers", [1]),
    ],
    CyclicCode(3, 1): [("parameters", [2]), ("parameters", [0]), ("optimizer", [1])],
    # One in each group; two in one, which fails; and the step after that is right.
    RepetitionCode(6, 1): [("parameters", [0, 4]), ("parameters", [1, 2]), ("optimizer", [3, 5])],
}


def tried(code, long):
    """Transports, and what is corrupt with each: all, or of a case one transport and the next one with the next."""
    for i, transport in enumerate(TRANSPORTS):
        yield transport, [case for number, case in enumerate(CASES[code]) if long or number % len(TRANSPORTS) == i]


def _corrupt(rank, report, code, long):
    logging.disable(logging.CRITICAL)
    for transport, cases in tried(code, long):
        # Buffers that DDP does not send round show what becomes of them.
        clean, *_ = train(rank, code, transport, broadcast=False)
        report(clean)
        for what, ranks in cases:
            ends, guard, _ = train(rank, code, transport, before=corrupt(rank, what, ranks), broadcast=False)
            report((ends, gathered(guard.check_state())))


@pytest.mark.parametrize("code", CASES, ids=repr)
def test_a_corrupt_rank_is_named_and_repaired(code, long):
    results = iter(run_local(_corrupt, code.workers, code, long))
    for transport, cases in tried(code, long):
        clean = next(results)
        for what, ranks in cases:
            ends, wrong_now = next(results)
            case = (transport, what, ranks)
            fails = isinstance(code, RepetitionCode) and code.workers == 6 and ranks == [1, 2]
            assert wrong_now == [()] * code.workers, case
            for rank, ((parameters, buffers, state, lr), report, kinds, errors) in enumerate(ends):
                assert report.repaired == {bad: [FAULT] for bad in ranks}, case
                assert kinds == [("state", bad, FAULT) for bad in ranks], case
                assert parameters == ends[0][0][0], case
                assert state == ends[0][0][2], case
                assert lr == 0.01, case
                assert report.failed_steps == ((FAULT,) if fails else ()), case
                assert len(errors) == fails, case
                assert all(f"other parameters than the majority: {ranks}" in error for error in errors), case
                if not fails and (isinstance(code, RepetitionCode) or what != "parameters"):  # to the last bit
                    assert (parameters, state) == clean[rank][0][:3:2], case
                    # Those of the cyclic code nobody else has.
                    assert buffers == clean[rank][0][1], case
                if what == "parameters" and not fails:
                    assert set(report.suspects) == set(ranks), case
                elif what != "parameters":
                    assert report.suspects == {}, case


def _other_weights(rank, report):
    """At the beginning, on one rank; then on all, another on each."""
    logging.disable(logging.CRITICAL)
    code = RepetitionCode(3, 1)
    for transport in TRANSPORTS:

        def one(step, model, opt, guard):
            if step == 0 and rank == 1:
                flip(next(model.parameters()), rank)

        def every(step, model, opt, guard, saved=[]):  # noqa: B006 kept from step to step
            if step == 0:
                saved[:] = [p.detach().clone() for p in model.parameters()]
                flip(next(model.parameters()), rank)
            elif step == 3:
                for parameter, right in zip(model.parameters(), saved, strict=True):
                    parameter.data.copy_(right)

        # No check is due after the first step.
        for before, failure in ((one, "raise"), (every, "raise"), (every, "skip")):
            ends, *_ = train(rank, code, transport, before=before, on_failure=failure, check_state_every=0)
            report([(own[0], report.failed_steps, report.repaired, errors) for own, report, _, errors in ends])


def test_without_a_majority_no_step_is_taken():
    results = iter(run_local(_other_weights, 3))
    for transport in TRANSPORTS:
        for case in ("one", "raise", "skip"):
            ends = next(results)
            assert all(end == ends[0] for end in ends)
            _, failed, repaired, errors = ends[0]
            assert failed == (() if case == "one" else (0, 1, 2)), transport
            assert repaired == ({1: [0]} if case == "one" else {})
            assert len(errors) == (3 if case == "raise" else 0)


def _liars(rank, report):
    """A rank that helps with other bytes than it says it has, and one that answers with other digests."""
    logging.disable(logging.CRITICAL)
    code = RepetitionCode(5, 2)
    for transport in TRANSPORTS:
        for lie in ("bytes", "digests"):

            def before(step, model, opt, guard, lie=lie):
                corrupt(rank, "parameters", [0])(step, model, opt, guard)
                if step != FAULT or rank != 1:
                    return
                state = guard._state_check.state
                if lie == "digests":
                    state.digest = lambda section, key: torch.full((2,), key)
                    return
                to_bytes, of = state.to_bytes, state._of

                def send(section, peers, worker):
                    state._of = lambda section: [tensor + 1 for tensor in of(section)]
                    ReplicatedState.send(state, section, peers, worker)
                    state._of = of

                state.send, state.to_bytes = send, lambda section: to_bytes(section) + 1

            ends, *_ = train(rank, code, transport, before=before, watch=False, broadcast=False, check_state_every=2)
            report([(own[0], report.repaired) for own, report, _, _ in ends])


def test_a_helper_that_lies_is_not_believed():
    for ends in run_local(_liars, 5):
        assert ends == [ends[0]] * 5
        assert ends[0][1][0] == [FAULT]


def _other_steps(rank, report):
    """One rank does not load the guard's checkpoint; then every rank another one."""
    lines = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("draco_ext").addHandler(handler)
    code = RepetitionCode(3, 1)
    verified.SMALL = 0
    for transport in TRANSPORTS:
        torch.manual_seed(1)
        model = DistributedDataParallel(nn.Linear(4, 1))
        guard = draco_ext.protect(model, code, transport=transport, check_state_every=2)
        later = {**guard.state_dict(), "step": 7}
        if rank != 1:
            guard.load_state_dict(later)
        vector = guard._record.vector
        for _ in range(4):
            model(torch.ones(2, 4)).sum().backward()
            if rank == 2:  # lies from now on
                guard._record.vector = lambda step, *rest, vector=vector: vector(step + 5, *rest)
        guard._record.vector = vector
        guard.load_state_dict({**later, "step": 20 + rank})
        with pytest.raises(DecodingError, match=r"all ranks must be at the same step, got \{0: 20, 1: 21, 2: 22\}"):
            model(torch.ones(2, 4)).sum().backward()
        report((gathered(guard.step)[:2], guard.report().failed_steps, list(lines)))
        lines.clear()


def test_ranks_at_other_steps_go_on_with_the_majority():
    for steps, failed, lines in run_local(_other_steps, 3):
        assert steps == [21, 22]
        assert failed == (20,)
        assert len([line for line in lines if "says it is at step" in line]) == 2  # not once a step
        assert "rank 1 on" in lines[0]
        assert "says it is at step 0, others at 7: all ranks must call load_state_dict" in lines[0]


class Silent:
    def run(self, verdict, groups):
        raise RuntimeError("rank 2 hangs")


def _checkpoint(rank, report):
    logging.disable(logging.CRITICAL)
    for transport in TRANSPORTS:
        _, guard, model = train(rank, RepetitionCode(3, 1), transport)
        flip(next(model.parameters()), 1) if rank == 1 else None
        said = None
        if rank == 1:
            try:
                guard.check_state(timeout=0.2)
            except RuntimeError as error:
                said = str(error)
            assert "step" in guard.state_dict(check=False)
        dist.barrier()
        state = guard.state_dict()
        report((gathered(said)[1], state["repaired"], gathered(bits(model.parameters()))))
        guard._state_check._repair = Silent()
        with pytest.raises(RuntimeError, match=f"no comparison of parameters in step {STEPS}: rank 2 hangs"):
            guard.check_state()


def test_a_checkpoint_is_compared_first():
    """And where one rank alone asks for it, it is told so, and nobody hangs."""
    for said, repaired, parameters in run_local(_checkpoint, 3):
        assert said == (
            "check_state and state_dict must be called on all ranks, but rank 0 has not called it within 0.2 s; "
            "state_dict(check=False) may be called on one rank alone"
        )
        assert repaired == {1: [STEPS]}
        assert parameters == [parameters[0]] * 3


def _names(rank, report):
    """Equal shapes in another order."""
    names = ["a", "b"] if rank else ["b", "a"]
    model = DistributedDataParallel(nn.ModuleDict({name: nn.Linear(3, 3) for name in names}))
    try:
        draco_ext.protect(model, RepetitionCode(3, 1))
        report(None)
    except ValueError as error:
        report(str(error))


def test_parameters_in_another_order_are_found():
    [said] = run_local(_names, 3)
    assert said.startswith("the names, sizes and dtypes of the model's parameters (their digest) must be the same")


def _watch(rank, report):
    model = DistributedDataParallel(network())
    guard = draco_ext.protect(model, RepetitionCode(3, 1))
    for wrong in (3, model):
        with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer"):
            guard.watch(wrong)
    for wrong in (-1, 1.5):
        with pytest.raises((ValueError, TypeError), match="check_state_every must be"):
            draco_ext.protect(model, RepetitionCode(3, 1), check_state_every=wrong)
    report(True)


def test_wrong_arguments():
    assert list(run_local(_watch, 3)) == [True]


# -------------------------------------------------------------------------------------------- unused parameters


class LowRank(nn.Module):
    """A low-rank adapter: at first the gradient of `down` is exactly 0; and a branch that is used in some steps."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.base = nn.Linear(6, 6)
        self.base.requires_grad_(False)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 6, bias=False)
        nn.init.zeros_(self.up.weight)
        self.branch = nn.Linear(6, 6)

    def forward(self, x, branch):
        y = self.base(x) + self.up(self.down(x))
        return y + self.branch(x) if branch else y


def _low_rank(rank, report, codes, setups, lied_to):
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)

    def run(code, options, transport="allreduce", claims=None, compiled=False, accumulate=False):
        """Of parameters the bits, and which have a gradient, in every step."""
        module = LowRank()
        if compiled:
            torch._dynamo.reset()
            module = torch.compile(module, backend="aot_eager")
        model = DistributedDataParallel(module, **options)
        guard = None if code is None else draco_ext.protect(model, code, transport=transport)
        if claims is not None and rank == 1:
            record = guard._record
            record.end_part = lambda: record._used.append(bytes([claims]) * record._parameters)
        opt = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        parts = (rank,) if code is None else code.assignment(guard.worker)
        inputs = torch.randn(STEPS, 3, 4, 6, generator=torch.Generator().manual_seed(0))
        mine = [(step, inputs[step, part % 3]) for step in range(STEPS) for part in parts]
        seen = []
        for taken in [[pair] for pair in mine] if guard is None else guard.steps(mine):
            opt.zero_grad()
            for step, x in taken:
                branch = "static_graph" not in options and step in (1, 3)
                if accumulate:
                    with model.no_sync():
                        model(x, branch).square().sum().backward()
                    branch = False
                model(x, branch).square().sum().backward()
            seen.append([parameter.grad is not None for parameter in model.parameters()])
            opt.step()
        return bits(model.parameters()), seen

    for setup in setups:
        report((run(None, **setup), [run(code, **setup) for code in codes]))
    # With a liar, against the same code without.
    options = {"find_unused_parameters": True}
    for code, transport in lied_to:
        honest = run(code, options, transport)
        report((honest, [run(code, options, transport, claims=claims) for claims in (0, 1)]))


def test_a_gradient_of_zero_is_not_unused(long):
    """Low-rank adapters end where plain DistributedDataParallel ends, whatever a liar says of what it used."""
    codes = (RepetitionCode(3, 0), CyclicCode(3, 0))
    unused = {"find_unused_parameters": True}
    setups = [
        {"options": {**options, "gradient_as_bucket_view": view}}
        for options in (unused, {"static_graph": True})
        for view in (False, True)
    ]
    setups += [{"options": unused, "accumulate": True}]
    setups += [{"options": unused, "compiled": True}] * long
    lied_to = list(itertools.product((RepetitionCode(3, 1), CyclicCode(3, 1)), TRANSPORTS))
    results = list(run_local(_low_rank, 3, codes, setups, lied_to if long else lied_to[::2]))
    (_, with_gradient), _ = results[0]
    used = [False, False, True, True]  # the base, frozen; the adapter
    assert with_gradient == [used + [step in (1, 3)] * 2 for step in range(STEPS)]
    for plain, others in results[: len(setups)]:
        for _, seen in others:
            assert seen == plain[1]
        assert others[0][0] == plain[0]
    for honest, lied in results[len(setups) :]:
        assert lied == [honest, honest]


# ------------------------------------------------------------------------------------------------------- other data


def _other_data(rank, report, code):
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("draco_ext").addHandler(handler)
    for transport in TRANSPORTS:
        for liar in (None, 1):

            def before(step, model, opt, guard):
                if step >= FAULT and rank == 2:
                    model(torch.ones(2, 6))  # an extra forward pass, and so other statistics and random numbers

            def during(step, message, liar=liar):
                return message * 2 if rank == liar and step == STEPS - 1 else message

            inputs = data(code)
            inputs[FAULT:] += rank == 2
            lines.clear()
            options = {"before": before, "during": during, "inputs": inputs, "check_state_every": 0, "watch": False}
            ends, *_ = train(rank, code, transport, broadcast=False, **options)
            suspects = ends[0][1].suspects
            said = {r: (suspect.steps, suspect.other_data) for r, suspect in suspects.items()}
            report((said, ends[0][3], [line for some in gathered(list(lines)) for line in some]))


@pytest.mark.parametrize("code", [RepetitionCode(3, 1), RepetitionCode(5, 1)], ids=repr)
def test_other_data_are_told_from_wrong_gradients(code):
    for said, errors, lines in run_local(_other_data, code.workers, code):
        failed = len(errors)
        steps = list(range(FAULT, STEPS - failed))
        assert said == {2: (steps, steps)}
        assert len([line for line in lines if "rank 2" in line and "has other data than" in line]) == 1
        if failed:
            # Of three ranks one with other data and one that lies leave nobody who could tell who that is.
            suspected = [0, 1] if code.workers == 3 else [1]
            assert f"suspected: {suspected}, other data (mini-batches or forward passes that differ" in errors[0]
            assert errors[0].endswith(": [2]")
    assert failed == 1


# ------------------------------------------------------------------------------------------------ without processes


def test_majorities():
    assert majority({}) is None
    assert majority({0: 1, 1: 1, 2: 5}) == 1
    assert majority({0: 1, 1: 1, 2: 5, 3: 5}) is None


def test_flags_are_packed(generator):
    for count in (1, 63, 64, 65, 1000):
        flags = torch.randint(2, (count,), generator=generator, dtype=torch.uint8)
        words = _pack(bytes(flags.tolist()))
        assert len(words) == -(-count // 64)
        assert _unpack(words, count) == [bool(flag) for flag in flags]


def test_claims_are_judged_by_majority():
    code = RepetitionCode(7, 1)  # 0 to 3 and 4 to 6
    same, other = (1, 2), (3, 4)
    inputs = {j: (other if j in (1, 6) else same,) for j in range(7) if j != 3}
    # Of the first group 0, 1 and 2 are there.
    used = {j: [[j in (0, 1), j == 0, False, False]] if j < 3 else [[False, False, j != 4, j == 5]] for j in range(7)}
    del used[3]
    claims = Claims(code, inputs, {}, used, {})
    assert claims.with_other_data() == {1, 6}
    assert claims.used_parameters() == [True, False, True, False]


def test_records_are_read_as_they_were_written():
    code = CyclicCode(4, 1)
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(70)]
    record = StepRecord(code, 1, parameters, usage=True)
    for part in range(3):
        record.begin_part(part)
        for _ in range(part):
            record.see(part, torch.tensor([part]), torch.device("cpu"))
        parameters[part].square().sum().backward()
        assert record.is_reached(part)
        record.end_part()
    state = torch.arange(6).view(3, 2)
    row = record.vector(7, state, torch.device("cpu"))
    without = record.vector(7, None, torch.device("cpu"))
    assert len(row) == len(without)
    assert record.read(torch.stack([row, without, without]).repeat(2, 1)[:4], [0]).state == {}
    claims = record.read(row.repeat(4, 1), [0, 2])
    assert claims.steps == {1: 7, 3: 7}
    assert set(claims.inputs) == set(claims.state) == set(claims.used) == {1, 3}
    assert claims.state[1] == ((0, 1), (2, 3), (4, 5))
    assert claims.inputs[1][0] == (0, 0)
    assert len(set(claims.inputs[1])) == 3
    assert claims.used[3] == [[i == part for i in range(70)] for part in range(3)]


def test_buffers_are_compared_within_a_group():
    a, b, c = (1, 1), (2, 2), (3, 3)
    groups = {j: (0, 1, 2) if j < 3 else (3, 4, 5) for j in range(6)}
    pools = {**dict.fromkeys(("parameters", "optimizer"), dict.fromkeys(range(6), tuple(range(6)))), "buffers": groups}
    claims = {j: (a, b if j < 3 else c, a) for j in range(6)}
    assert judge(claims, pools).wrong == {}
    claims[4] = (b, a, a)
    verdict = judge(claims, pools)
    assert verdict.wrong == {4: ("parameters", "buffers")}
    assert verdict.right == {("parameters", 4): (0, 1, 2, 3, 5), ("buffers", 4): (3, 5)}
    assert verdict.undecided == ()
    for j in range(3):
        claims[j] = (c, (j, j), a)
    assert judge(claims, pools).undecided == ("parameters",)
    assert judge({}, pools).undecided == ()


def test_shards_are_compared_among_the_workers_that_have_the_same():
    a, b, c = (1, 1), (2, 2), (3, 3)
    columns = {j: tuple(range(j % 2, 6, 2)) for j in range(6)}
    pools = dict.fromkeys(("parameters", "optimizer", "buffers"), columns)
    claims = {j: (b if j % 2 else a, c, c) for j in range(6)}
    assert judge(claims, pools).wrong == {}
    claims[2] = (b, c, c)
    verdict = judge(claims, pools)
    assert (verdict.wrong, verdict.right, verdict.undecided) == ({2: ("parameters",)}, {("parameters", 2): (0, 4)}, ())
    claims[4] = (c, c, c)
    assert judge(claims, pools).undecided == ("parameters",)


class Stub(nn.Module):
    """What ReplicatedState asks of an adapter."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.module = nn.Module()
        self.module.big = nn.Parameter(torch.randn(300_000))
        self.module.strided = nn.Parameter(torch.randn(5, 7).t())
        self.module.empty = nn.Parameter(torch.empty(0))
        self.module.halves = nn.Parameter(torch.randn(3).half())
        self.module.doubles = nn.Parameter(torch.randn(2).double())
        self.module.frozen = nn.Parameter(torch.tensor(5), requires_grad=False)
        self.module.ignored = nn.Parameter(torch.randn(3))
        self.module.register_buffer("flags", torch.tensor([True, False, True]))
        self.module.register_buffer("complex", torch.tensor([1 + 2j]))

    def replicated_parameters(self):
        return [p for name, p in self.module.named_parameters() if name != "ignored"]

    def replicated_buffers(self):
        return self.module.buffers()


def test_chunks_have_every_tensor():
    sizes = (0, 3, 4, 5, 0, 100, 1, 0)
    tensors = [torch.empty(size, dtype=torch.uint8) for size in sizes]
    assert [[t.nbytes for t in chunk] for chunk in chunks(tensors, 10)] == [[0, 3, 4], [5, 0], [100], [1, 0]]
    tensors[1] = torch.empty(0, dtype=torch.bfloat16)
    assert [len(chunk) for chunk in chunks(tensors, 10**6, lambda t: t.dtype)] == [1, 1, 6]
    assert [len(chunk) for chunk in chunks(tensors[:2], 10**6, lambda t: t.dtype)] == [1, 1]  # nothing but empty ones
    assert list(chunks([], 10)) == []


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=torch.tensor(0.1), betas=(0.8, 0.9), amsgrad=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters),
    "lbfgs": lambda parameters: torch.optim.LBFGS(parameters[:1], history_size=2),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_is_copied_bit_by_bit(name):
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        stub = Stub()
        used = [stub.module.big, stub.module.strided]
        opt = OPTIMIZERS[name](used)
        opt.param_groups[0]["lr"] *= seed

        def loss(used=used):
            return sum(p.square().sum() for p in used)

        loss().backward()
        opt.step(loss)
        state = ReplicatedState(stub)
        state.watch(opt)
        state.watch(opt)  # counts once
        states.append((state, opt, stub))
    (one, opt, stub), (two, other, _) = states
    with torch.no_grad():
        next(stub.module.parameters())[1] = torch.tensor([-1], dtype=torch.int32).view(torch.float32)  # a NaN
    assert not torch.equal(one.digests(7), two.digests(7))
    assert not torch.equal(one.digests(7), one.digests(8))
    for section in SECTIONS:
        assert torch.equal(one.layout(section), two.layout(section))
        values = one.to_bytes(section)
        assert values.numel() == one.size(section)
        assert torch.equal(two.digest_of_bytes(section, values, 7), one.digest(section, 7))
        two.from_bytes(section, values)
    assert torch.equal(one.digests(7), two.digests(7))
    assert repr(opt.param_groups[0] | {"params": None}) == repr(other.param_groups[0] | {"params": None})
    assert not torch.equal(states[0][2].module.ignored, states[1][2].module.ignored)
    stub.module.flags = ~stub.module.flags  # another tensor
    assert not torch.equal(one.digest("buffers", 7), two.digest("buffers", 7))
    opt.param_groups[0]["weight_decay" if name != "lbfgs" else "tolerance_grad"] = 0.5
    assert not torch.equal(one.digest("optimizer", 7), two.digest("optimizer", 7))

"""`protect` together with what training scripts do: autocast, scalers, options of DDP, torch.compile, checkpoints."""

import io

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import draco_ext
from draco_ext import CyclicCode, DecodingError, RedundantBatchSampler, RepetitionCode
from draco_ext.testing.local import run_local
from draco_ext.training.sampler import GlobalBatches

STEPS = 5
BATCH = 84
BAD = 1
OVERFLOW = 2  # the step that overflows, where one does
RUNS = ((), (BAD,))
CODES = [RepetitionCode(3, 1), CyclicCode(3, 1)]


class Network(nn.Module):
    """With odd numbers of elements and a branch that may be left out."""

    def __init__(self, dropout):
        super().__init__()
        torch.manual_seed(5)
        self.body = nn.Sequential(nn.Linear(64, 61), nn.ReLU(), nn.Dropout(dropout), nn.Linear(61, 33), nn.ReLU())
        self.branch = nn.Linear(33, 33)
        self.head = nn.Linear(33, 10)

    def forward(self, x, branch=True):
        x = self.body(x)
        return self.head(x + self.branch(x) if branch else x)


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
}


def train(
    rank,
    data,
    code,
    bad=(),
    *,
    reference=False,
    stops=(STEPS,),
    dropout=0.0,
    dtype=torch.float32,
    autocast=None,
    scaled=False,
    overflow=False,
    failing=None,
    branch=lambda step, part: True,
    stray=False,
    optimizer="sgd",
    clip=None,
    compiled=None,
    transport="allreduce",
    ddp=(),
):
    """Parameters of all ranks, this rank's report and the scales; by hand in one process if `reference`.

    stops: steps before which everything is saved, made anew and loaded; the last is the end. failing: step in which all
    ranks are bad. branch: whether it is used, by step and part. stray: a bad rank always uses it.
    """
    torch.set_num_threads(1)
    saved, report, scales = None, None, []
    images, labels = data
    data = TensorDataset(images.to(dtype), labels)
    for stop in stops:
        module = Network(dropout).to(dtype)
        opt = OPTIMIZERS[optimizer](module.parameters())
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, backoff_factor=2.0**-24, enabled=scaled)
        batches = RedundantBatchSampler(len(data), code, batch_size=BATCH, rank=rank, seed=3)
        if reference:
            model = module
            steps = by_hand(data, code)
        else:
            inner = torch.compile(module, backend="aot_eager") if compiled == "inside" else module
            model = DistributedDataParallel(inner, **dict(ddp))
            factors = [-100.0 if rank in bad else 1.0] * STEPS
            if failing is not None:
                factors[failing] = rank + 1.0

            def adversary(step, message, factors=factors):
                return factors[step] * message

            guard = draco_ext.protect(model, code, transport=transport, adversary=adversary)
            if compiled == "outside":
                model = torch.compile(model, backend="aot_eager")
            steps = guard.steps(DataLoader(data, batch_sampler=batches))
        things = {"module": module, "opt": opt, "scaler": scaler, "batches": batches}
        if not reference:
            things["guard"] = guard
        if saved is not None:
            saved.seek(0)
            state = torch.load(saved)
            for name, thing in things.items():
                thing.load_state_dict(state[name])
        for number, step in enumerate(steps, batches.step):
            opt.zero_grad()
            if scaled and overflow and number == OVERFLOW:
                scaler.update(2.0**34)
            try:
                for part, (x, y) in enumerate(step):
                    with torch.autocast("cpu", autocast, enabled=autocast is not None):
                        out = model(x, branch(number, part) or (stray and rank in bad))
                        loss = nn.functional.cross_entropy(out, y)
                    if overflow and not scaled and number == OVERFLOW:
                        loss = loss * torch.inf
                    scaler.scale(loss / code.parts if reference else loss).backward()
                if reference and number == failing:
                    continue
            except DecodingError:
                continue
            scales.append(scaler.get_scale())
            if clip is not None:
                scaler.unscale_(opt)
                nn.utils.clip_grad_norm_(module.parameters(), clip)
            if scaled or all(p.grad is None or p.grad.isfinite().all() for p in module.parameters()):
                scaler.step(opt)
                scaler.update()
            if number + 1 == stop:
                break
        if not reference:
            report = guard.report()
            saved = io.BytesIO()
            torch.save({name: thing.state_dict() for name, thing in things.items()}, saved)
    own = torch.cat([p.detach().flatten() for p in module.parameters()])
    rows = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, own)
    return torch.stack(rows).float().numpy(), report, scales


def by_hand(data, code):
    """The parts of every step."""
    batches = GlobalBatches(len(data), BATCH, 3)
    for step in range(STEPS):
        yield [data[batches.part(step, part, code.parts)] for part in range(code.parts)]


def distance(rows, other):
    return np.linalg.norm(rows[0] - other[0]) / np.linalg.norm(other[0])


# name -> options of `train`, tolerance of the comparison with the run by hand
UNUSED = {"find_unused_parameters": True}
BUCKETS = {"bucket_cap_mb": 0.005}
VIEWS = {"gradient_as_bucket_view": True}
SCALER = {"autocast": torch.float16, "scaled": True}
SETUPS = {
    "bfloat16 autocast": ({"autocast": torch.bfloat16}, 1e-2),
    "bfloat16 parameters, AdamW": ({"dtype": torch.bfloat16, "optimizer": "adamw"}, 1e-2),
    "float16 parameters, overflow": ({"dtype": torch.float16, "overflow": True}, 1e-2),
    "GradScaler, overflow": ({**SCALER, "overflow": True}, 1e-2),
    "GradScaler, overflow, AdamW, clipping": ({**SCALER, "overflow": True, "optimizer": "adamw", "clip": 0.5}, 1e-2),
    "GradScaler, a step fails": ({**SCALER, "failing": 3}, 1e-2),
    "unused in some steps": ({"branch": lambda step, part: step % 2 == 0, "ddp": UNUSED}, 1e-5),
    "unused in some parts": ({"branch": lambda step, part: part == step % 3, "ddp": UNUSED}, 1e-5),
    "unused at first, AdamW, buckets, views": (
        {"branch": lambda step, part: step > 1, "optimizer": "adamw", "ddp": UNUSED | BUCKETS | VIEWS},
        1e-5,
    ),
    "unused but by the bad rank": (
        {"branch": lambda step, part: False, "stray": True, "optimizer": "adamw", "ddp": UNUSED | BUCKETS},
        1e-5,
    ),
    "static graph": ({"ddp": {"static_graph": True}}, 1e-5),
    "static graph, unused": ({"branch": lambda step, part: False, "ddp": {"static_graph": True}}, 1e-5),
    "static graph, buckets, views": ({"ddp": {"static_graph": True} | BUCKETS | VIEWS}, 1e-5),
    "buckets, views, all-gather": ({"transport": "verified", "ddp": BUCKETS | VIEWS}, 1e-5),
    "buckets, AdamW, clipping": ({"optimizer": "adamw", "clip": 0.5, "ddp": BUCKETS}, 1e-5),
}
# The cyclic code takes no 16 bits.
CASES = [
    (code, name)
    for code in CODES
    for name in SETUPS
    if isinstance(code, RepetitionCode) or "dtype" not in SETUPS[name][0]
]
# What runs without --long as well.
QUICK = {
    "float16 parameters, overflow",
    "GradScaler, overflow, AdamW, clipping",
    "GradScaler, a step fails",
    "unused at first, AdamW, buckets, views",
    "unused but by the bad rank",
    "static graph, buckets, views",
    "buckets, views, all-gather",
}
COMPILED = [(code, how) for code in CODES for how in ("inside", "outside")]
QUICK_COMPILED = COMPILED[1:3]  # each code, each way
RESUMED = {**SCALER, "dropout": 0.2, "optimizer": "adamw", "ddp": BUCKETS}


def _compose(rank, report, data, cases, compilations):
    for code, name in cases:
        options, _ = SETUPS[name]
        expected = train(rank, data, code, reference=True, **options)
        report((expected, *(train(rank, data, code, bad, **options) for bad in RUNS)))
    for code in CODES:
        report([train(rank, data, code, bad, stops=at, **RESUMED) for at in ((STEPS,), (3, STEPS)) for bad in RUNS])
    for code, compiled in compilations:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        runs = [train(rank, data, code, bad, dropout=0.2, compiled=compiled) for bad in RUNS]
        report((*runs, torch._dynamo.utils.counters["stats"]["unique_graphs"]))


@pytest.fixture(scope="module")
def composed(request):
    """All that the tests look at, from one start of the processes."""
    long = request.config.getoption("--long")
    cases = [(code, name) for code, name in CASES if long or name in QUICK]
    compilations = [(code, None) for code in CODES] + (COMPILED if long else QUICK_COMPILED)
    from sklearn.datasets import load_digits  # not in every rank

    images, labels = load_digits(return_X_y=True)
    data = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
    others = [(code, "resumed") for code in CODES]
    results = run_local(_compose, 3, data, cases, compilations)
    return dict(zip([*cases, *others, *compilations], results, strict=True))


def long_unless(quick, case):
    """The case as a parameter, marked where it is not among the quick ones."""
    return pytest.param(*case, marks=[] if quick else pytest.mark.long)


def check(code, clean, attacked, *, overflow=False, failing=None):
    """The bad rank is named and changes nothing."""
    for rows, report, scales in (clean, attacked):
        assert np.isfinite(rows).all()
        assert all(row.tobytes() == rows[0].tobytes() for row in rows)
        assert scales == clean[2]
        assert report.steps == STEPS
        assert report.failed_steps == (() if failing is None else (failing,))
    assert clean[1].suspects == {}
    assert list(attacked[1].suspects) == [BAD]
    steps = [step for step in attacked[1].suspects[BAD].steps if not (overflow and step == OVERFLOW)]
    # Where an honest message is all NaN, -100 times it may have the same bits.
    assert steps == [step for step in range(STEPS) if step != failing and not (overflow and step == OVERFLOW)]
    if isinstance(code, RepetitionCode):
        assert clean[0].tobytes() == attacked[0].tobytes()
    else:
        assert distance(attacked[0], clean[0]) < 1e-5


@pytest.mark.parametrize(("code", "name"), [long_unless(case[1] in QUICK, case) for case in CASES], ids=str)
def test_composes(composed, code, name):
    options, tolerance = SETUPS[name]
    by_hand, clean, attacked = composed[code, name]
    check(code, clean, attacked, overflow=options.get("overflow", False), failing=options.get("failing"))
    assert distance(clean[0], by_hand[0]) < tolerance
    assert clean[2] == by_hand[2]
    if options.get("overflow") and options.get("scaled"):
        assert clean[2] == [2.0**34 if step == OVERFLOW else 2.0**10 for step in range(STEPS)]  # it was noticed
    if "bucket_cap_mb" in options.get("ddp", {}):
        assert attacked[1].suspects[BAD].buckets > STEPS


@pytest.mark.parametrize("code", CODES, ids=str)
def test_resumes(composed, code):
    """With dropout, whose seed is of the guard's step."""
    clean, attacked, *resumed = composed[code, "resumed"]
    check(code, clean, attacked)
    for rows, report, _ in resumed:
        if isinstance(code, RepetitionCode):
            assert rows.tobytes() == clean[0].tobytes()
        else:
            assert distance(rows, clean[0]) < 1e-5
        assert report.steps == STEPS
    assert resumed[0][1].suspects == {}
    assert resumed[1][1].suspects[BAD].steps == attacked[1].suspects[BAD].steps


@pytest.mark.parametrize(
    ("code", "compiled"), [long_unless(case in QUICK_COMPILED, case) for case in COMPILED], ids=str
)
def test_compiled(composed, code, compiled):
    """Before it is wrapped, and wrapped; with dropout, which in every step is what it is without compilation."""
    clean, attacked, graphs = composed[code, compiled]
    eager, _, no_graphs = composed[code, None]
    check(code, clean, attacked)
    assert distance(clean[0], eager[0]) < 1e-5
    assert graphs == 1  # the guard is not traced
    assert no_graphs == 0

"""The helpers for frameworks: with a liar present, each run has the bits of the run without.

A framework that is not installed is left out; `.ci/run integrations` installs them all.
"""

import hashlib
import importlib
import importlib.util
import os
import re
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, TensorDataset

import draco_ext
from draco_ext import Audit, CyclicCode, RedundantBatchSampler, RedundantSampler, RepetitionCode
from draco_ext.testing.local import run_local

RANKS, BAD = 6, 4  # two groups
FRAMEWORKS = ("accelerate", "lightning", "transformers")
MODULES = (
    "accelerate",
    "lightning.pytorch",
    "transformers.trainer",
    "prometheus_client",
    "torchdata.stateful_dataloader",
)
INSTALLED = {name.split(".")[0] for name in MODULES if importlib.util.find_spec(name.split(".")[0]) is not None}
# Imported here, and so by the server that ranks are forked from: a framework takes seconds.
for name in MODULES:
    if name.split(".")[0] in INSTALLED:
        importlib.import_module(name)


def needs(*frameworks):
    absent = [name for name in frameworks if name not in INSTALLED]
    return pytest.mark.skipif(bool(absent), reason=f"not installed: {', '.join(absent)}; see .ci/run integrations")


class Samples(Dataset):
    """Samples of which each rank notes those that it has loaded."""

    def __init__(self, samples=26):
        self.x = torch.randn(samples, 4, generator=torch.Generator().manual_seed(1))
        self.seen = []

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.seen.append(index)
        return {"x": self.x[index], "labels": self.x[index].sum()}


def make_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 1))


def times_minus_two(step, value, kind=None):
    return -2 * value


def of_all_ranks(value):
    values = [None] * RANKS
    dist.all_gather_object(values, value)
    return values


def digest(module):
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in module.parameters()]
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in whole)).hexdigest()


def pretend_torchrun(rank):
    """What torchrun tells frameworks; the ranks are connected already."""
    torch.set_num_threads(1)
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS, "GROUP_RANK": 0}
    os.environ.update({name: str(number) for name, number in numbers.items()})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500", ACCELERATE_USE_CPU="true")
    os.environ.update(TORCHELASTIC_RUN_ID="test", TQDM_DISABLE="1", HF_HUB_OFFLINE="1")


PAGE = Path(__file__).resolve().parents[2] / "docs/howto/frameworks.md"


def run_examples(framework, make_space):
    """Run the page's blocks of a framework, each after what the reader's script has; return the guards' reports."""
    pattern = re.compile(rf"^```text {{\.{framework}}}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    guards = []
    for block in pattern.findall(PAGE.read_text()):
        space = make_space()
        exec(compile(block, str(PAGE), "exec"), space)
        owner = space.get("trainer") if framework == "transformers" else space.get("strategy")
        guards.append(space["guard"] if owner is None else owner.guard)
    return [guard.report() for guard in guards]


def adversary_of(rank, lies):
    return times_minus_two if lies and rank == BAD else None


# ---------------------------------------------------------------------------------------------------- Accelerate


def pretend_gpus(state):
    """On CPUs Accelerate takes DistributedDataParallel whatever it is told, so it is told that these are GPUs."""
    from accelerate.utils import DistributedType

    state._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def use_fsdp(mesh):
    """Return what an Accelerator needs for FSDP2, over replicas and shards or shards alone."""
    from accelerate import PartialState
    from accelerate.parallelism_config import ParallelismConfig
    from accelerate.state import AcceleratorState
    from accelerate.utils import FullyShardedDataParallelPlugin

    AcceleratorState._reset_state(True)
    pretend_gpus(PartialState(cpu=True))
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=10, cpu_ram_efficient_loading=False
    )
    if mesh is None:
        return {"fsdp_plugin": plugin}
    config = ParallelismConfig(dp_replicate_size=mesh[0], dp_shard_size=mesh[1])
    return {"fsdp_plugin": plugin, "parallelism_config": config}


def _accelerated(rank, code, lies, *, batch_sampler=False, accumulate=1, fsdp=False, mesh=None, **settings):
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    from draco_ext.integrations.accelerate import prepare

    accelerator = Accelerator(
        cpu=True,
        gradient_accumulation_steps=accumulate,
        dataloader_config=DataLoaderConfiguration(**settings),
        **(use_fsdp(mesh) if fsdp else {}),
    )
    net, data = make_net(), Samples()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    if batch_sampler:
        loader = DataLoader(data, batch_sampler=RedundantBatchSampler(len(data), code, batch_size=6, rank=rank))
    else:
        loader = DataLoader(data, 4, shuffle=True)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    made = prepare(accelerator, code, net, optimizer, loader, scheduler, adversary=adversary_of(rank, lies))
    model, optimizer, loader, scheduler, guard = made
    loss = lambda batch: ((model(batch["x"]).squeeze() - batch["labels"]) ** 2).mean()  # noqa: E731
    for _ in range(2):
        if isinstance(code, RepetitionCode):
            for batch in loader:
                with accelerator.accumulate(model):
                    accelerator.backward(loss(batch))
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
        else:
            arguments = {"accumulate": accumulate} if isinstance(code, Audit) else {}
            for step in guard.steps(loader, **arguments):
                for batch in step:
                    accelerator.backward(loss(batch))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
    return Result(net, guard, data, scheduler.scheduler.last_epoch)


class Result:
    """The end of a training, on all ranks."""

    def __init__(self, net, guard, data, schedule=None):
        self.bits = of_all_ranks(digest(net))
        self.seen = of_all_ranks(data.seen)
        self.report = guard.report()
        self.schedule = schedule


ACCELERATED = {
    "repetition": (RepetitionCode(RANKS, 1), {}),
    "accumulating": (RepetitionCode(RANKS, 1), {"accumulate": 2}),
    "seedable": (RepetitionCode(RANKS, 1), {"use_seedable_sampler": True}),
    "divided": (RepetitionCode(RANKS, 1), {"batch_sampler": True}),
    "cyclic": (CyclicCode(RANKS, 1), {"batch_sampler": True}),
    "audit": (Audit(RANKS, 1, rate=1.0), {}),
}


def _accelerate(rank, report):
    pretend_torchrun(rank)
    for name, (code, options) in ACCELERATED.items():
        report((name, [_accelerated(rank, code, lies, **options) for lies in (False, True)]))

    def make_space():
        from accelerate import Accelerator

        model = make_net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        return {
            "accelerator": Accelerator(cpu=True),
            "model": model,
            "optimizer": optimizer,
            "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer),
            "loader": DataLoader(TensorDataset(torch.randn(24, 4), torch.randn(24, 1)), 4),
            "loss_fn": nn.MSELoss(),
        }

    report(("examples", run_examples("accelerate", make_space)))


@pytest.fixture(scope="module")
def accelerated():
    return dict(run_local(_accelerate, RANKS))


def check(honest, lied_to, exact=True, bad=BAD):
    assert honest.report.suspects == {}
    assert lied_to.report.suspects.keys() == {bad}
    assert honest.report.failed_steps == lied_to.report.failed_steps == ()
    assert honest.report.steps == lied_to.report.steps > 1
    assert len(set(honest.bits)) == len(set(lied_to.bits)) == 1
    if exact:
        assert honest.bits == lied_to.bits


def check_shares(result, loaded=26):
    """Ranks of a group load the same, and both groups together the samples of an epoch."""
    first, second = result.seen[0], result.seen[3]
    assert result.seen == [first] * 3 + [second] * 3
    epoch = len(first) // 2
    assert len({*first[:epoch], *second[:epoch]}) == loaded
    assert 2 * epoch < loaded + 8  # as many as make all mini-batches full


@needs("accelerate")
@pytest.mark.parametrize("name", ACCELERATED)
def test_accelerate(accelerated, name):
    honest, lied_to = accelerated[name]
    check(honest, lied_to, exact=name != "cyclic")
    # 26 samples make 7 mini-batches, and these 4 steps of two groups or 2 of six ranks; or 4 steps of 6 samples.
    steps, schedule = {
        "accumulating": (4, 8),
        "divided": (8, 8),
        "cyclic": (8, 8),
        "audit": (4, 24),
    }.get(name, (8, 16))
    assert honest.report.steps == steps
    assert honest.schedule == schedule  # a step of it is one of a mini-batch, as it is planned before `prepare`
    if name not in ("cyclic", "audit"):
        check_shares(honest, 24 if name == "divided" else 26)


@needs("accelerate")
def test_examples_of_accelerate(accelerated):
    repetition, audit = accelerated["examples"]
    assert repetition.steps == 3
    assert audit.steps == 1
    assert repetition.suspects == audit.suspects == {}


SHARDED = {
    "repetition": (RepetitionCode(3, 1), {"mesh": (3, 2)}),
    "accumulating": (RepetitionCode(3, 1), {"mesh": (3, 2), "accumulate": 2}),
    "audit": (Audit(RANKS, 1, rate=1.0), {}),
}


def _accelerate_sharded(rank, report):
    pretend_torchrun(rank)
    for name, (code, options) in SHARDED.items():
        report((name, [_accelerated(rank, code, lies, fsdp=True, **options) for lies in (False, True)]))

    from accelerate import Accelerator

    from draco_ext.integrations.accelerate import prepare

    accelerator, net = Accelerator(cpu=True, **use_fsdp((3, 2))), make_net()
    with pytest.raises(ValueError, match="code must need one loader for each rank with FSDP2") as caught:
        prepare(accelerator, CyclicCode(3, 1), net, torch.optim.SGD(net.parameters()), DataLoader(Samples(), 4))
    report(("cyclic", str(caught.value)))


@needs("accelerate")
def test_accelerate_with_fsdp2():
    runs = dict(run_local(_accelerate_sharded, RANKS))
    for name in SHARDED:
        honest, lied_to = runs[name]
        # Rank 4 is in replica 2 of three.
        check(honest, lied_to, bad=BAD if name == "audit" else 2)
        # 26 samples make 7 mini-batches, and these 4 steps of two shares or 2 of six.
        steps, schedule = {"repetition": (8, 16), "accumulating": (4, 8), "audit": (4, 24)}[name]
        assert (honest.report.steps, honest.schedule) == (steps, schedule)
        if name != "audit":
            first, second = honest.seen[:2]
            assert honest.seen == [first, second] * 3  # the two ranks of a replica divide the mini-batches
            assert {*first} != {*second}
    assert "make a DataLoader for each of guard.data_ranks" in runs["cyclic"]


def _refused_by_accelerate(rank, report):
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    from draco_ext.integrations.accelerate import prepare

    pretend_torchrun(rank)
    accelerator = Accelerator(cpu=True)
    repetition, cyclic, audit = RepetitionCode(RANKS, 1), CyclicCode(RANKS, 1), Audit(RANKS, 1, 0.5)
    data = Samples()
    plain = DataLoader(data, 4)
    divided = DataLoader(data, batch_sampler=RedundantBatchSampler(26, cyclic, batch_size=6, rank=rank))

    def refuse(*arguments):
        net = make_net()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        accelerator, code, loader = arguments
        with pytest.raises((TypeError, ValueError)) as caught:
            prepare(accelerator, code, net, optimizer, loader)
        return str(caught.value)

    found = [
        refuse(None, repetition, plain),
        refuse(accelerator, 3, plain),
        refuse(accelerator, repetition, [1, 2]),
        refuse(accelerator, cyclic, plain),
        refuse(accelerator, audit, divided),
        refuse(accelerator, repetition, accelerator.prepare(plain)),
        refuse(
            Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=True)), repetition, plain
        ),
    ]
    report(found)


@needs("accelerate")
def test_accelerate_refuses():
    [found] = run_local(_refused_by_accelerate, RANKS)
    for message, part in zip(
        found,
        [
            "accelerator must be an Accelerator, got NoneType",
            "code must be a RepetitionCode, a CyclicCode or an Audit, got int",
            "loader must be a DataLoader, got list",
            "loader must have a RedundantBatchSampler as its batch_sampler for a code with several parts",
            "loader must have a sampler as for plain DDP with an Audit",
            "loader must not be prepared before",
            "dispatch_batches must be False",
        ],
        strict=True,
    ):
        assert message.startswith(part)


# ---------------------------------------------------------------------------------------- Transformers' Trainer


class WithLoss(nn.Module):
    """A model as the Trainer expects it."""

    def __init__(self):
        super().__init__()
        self.net = make_net()

    def forward(self, x, labels):
        output = self.net(x).squeeze(1)
        return {"loss": ((output - labels) ** 2).mean(), "logits": output}


def _trainer(rank, folder, lies, **settings):
    from transformers import Trainer, TrainingArguments

    from draco_ext.integrations.transformers import ProtectedTrainerMixin

    class ProtectedTrainer(ProtectedTrainerMixin, Trainer):
        pass

    code = settings.pop("code", RepetitionCode(RANKS, 1))
    arguments = {
        "output_dir": folder,
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "use_cpu": True,
        "ddp_backend": "gloo",
        "average_tokens_across_devices": False,
        "learning_rate": 0.01,
        "save_steps": 3,
        "logging_steps": 4,
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        **settings,
    }
    arguments = TrainingArguments(**arguments)
    if arguments.fsdp:
        pretend_gpus(arguments.distributed_state)
    return ProtectedTrainer(
        model=WithLoss(),
        args=arguments,
        train_dataset=Samples(),
        code=code,
        protect_options={"adversary": adversary_of(rank, lies)},
    )


def _transformers(rank, report, folder):
    pretend_torchrun(rank)
    for lies in (False, True):
        trainer = _trainer(rank, f"{folder}/{lies}", lies)
        trainer.train()
        logged = [entry for entry in trainer.state.log_history if "loss" in entry]
        report((lies, Result(trainer.model, trainer.guard, trainer.train_dataset), logged))
    # Another process goes on where the one before has saved.
    trainer = _trainer(rank, f"{folder}/True", True)
    trainer.train(resume_from_checkpoint=f"{folder}/True/checkpoint-3")
    report(("resumed", Result(trainer.model, trainer.guard, trainer.train_dataset), []))
    accumulated = [_trainer(rank, f"{folder}/a{lies}", lies, gradient_accumulation_steps=2) for lies in (False, True)]
    for trainer in accumulated:
        trainer.train()
    report(("accumulated", [Result(t.model, t.guard, t.train_dataset) for t in accumulated], []))
    refused = []
    for settings in (
        {"average_tokens_across_devices": True},
        {"accelerator_config": {"dispatch_batches": True}},
        {"code": CyclicCode(RANKS, 1)},
        {"code": Audit(RANKS, 1, 0.5)},
        {"code": 3},
    ):
        with pytest.raises((TypeError, ValueError)) as caught:
            _trainer(rank, folder, False, **settings)
        refused.append(str(caught.value))
    report(("refused", refused, []))

    from accelerate.parallelism_config import ParallelismConfig

    sharded = {"fsdp": "full_shard", "parallelism_config": ParallelismConfig(dp_replicate_size=3, dp_shard_size=2)}
    policy = {"auto_wrap_policy": "SIZE_BASED_WRAP", "min_num_params": 10, "cpu_ram_efficient_loading": False}
    sharded |= {"fsdp_config": {"version": 2, **policy}, "code": RepetitionCode(3, 1)}
    for name, resume in (("sharded", None), ("sharded and resumed", f"{folder}/sTrue/checkpoint-3")):
        results = []
        for lies in (True,) if resume else (False, True):
            trainer = _trainer(rank, f"{folder}/s{lies}", lies, **sharded)
            trainer.train(resume_from_checkpoint=resume)
            results.append(Result(trainer.model, trainer.guard, trainer.train_dataset))
        report((name, results, []))
    trainer = _trainer(rank, folder, False, **{**sharded, "code": RepetitionCode(RANKS, 1)})
    with pytest.raises(ValueError, match="parallelism_config in TrainingArguments must have dp_rep") as caught:
        trainer.train()
    report(("replicas", str(caught.value), []))

    def make_space():
        from transformers import Trainer, TrainingArguments

        settings = {"use_cpu": True, "ddp_backend": "gloo", "report_to": [], "remove_unused_columns": False}
        return {
            "Trainer": Trainer,
            "TrainingArguments": TrainingArguments,
            "model": WithLoss(),
            "data": Samples(),
            "folder": f"{folder}/example",
            "other": {**settings, "max_steps": 2, "disable_tqdm": True},
        }

    os.chdir(folder)  # in which the ledger is
    report(("examples", run_examples("transformers", make_space), []))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    runs = run_local(_transformers, RANKS, str(tmp_path_factory.mktemp("trainer")))
    return {name: (result, logged) for name, result, logged in runs}


@needs("transformers", "accelerate")
def test_trainer(trained):
    (honest, logged), (lied_to, logged_too) = trained[False], trained[True]
    check(honest, lied_to)
    check_shares(honest)
    assert honest.report.steps == 8
    assert logged[-1]["draco/suspects"] == 0
    assert logged_too[-1]["draco/suspects"] == 1
    assert logged_too[-1][f"draco/wrong_steps/rank{BAD}"] == logged_too[-1]["draco/steps"] == 8


@needs("transformers", "accelerate")
def test_trainer_resumes(trained):
    """Dropout included, and with the suspects of before."""
    (lied_to, _), (resumed, _) = trained[True], trained["resumed"]
    assert resumed.bits == lied_to.bits
    assert resumed.report.suspects[BAD].steps == lied_to.report.suspects[BAD].steps == list(range(8))


@needs("transformers", "accelerate")
def test_trainer_accumulates(trained):
    honest, lied_to = trained["accumulated"][0]
    check(honest, lied_to)
    assert honest.report.steps == 4


@needs("transformers", "accelerate")
def test_trainer_with_fsdp2(trained):
    """With three replicas of two ranks: rank 4 is in replica 2. It resumes, dropout included."""
    honest, lied_to = trained["sharded"][0]
    check(honest, lied_to, bad=2)
    assert honest.report.steps == 8
    first, second = honest.seen[:2]
    assert honest.seen == [first, second] * 3
    assert {*first} != {*second}
    [resumed] = trained["sharded and resumed"][0]
    assert resumed.bits == lied_to.bits
    assert resumed.report.suspects[2].steps == list(range(8))
    assert "must have dp_replicate_size=6 with FSDP2" in trained["replicas"][0]
    assert trained["replicas"][0].endswith("got 3 replicas")


@needs("transformers", "accelerate")
def test_trainer_refuses(trained):
    average, dispatch, cyclic, audit, number = trained["refused"][0]
    assert average.startswith("average_tokens_across_devices must be False in TrainingArguments, got True")
    assert dispatch.startswith("dispatch_batches must be False in accelerator_config, got True")
    assert "Transformers' Trainer, which owns the training loop, got CyclicCode(" in cyclic
    assert "needs several passes in audited steps, by a loop over guard.steps(loader)" in audit
    assert number == "code must be a RepetitionCode, got int"


@needs("transformers", "accelerate")
def test_example_of_trainer(trained):
    [report] = trained["examples"][0]
    assert (report.steps, report.suspects) == (2, {})


# ----------------------------------------------------------------------------------------------------- Lightning


if "lightning" in INSTALLED:
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = make_net()

        def training_step(self, batch, index):
            return ((self.net(batch["x"]).squeeze(1) - batch["labels"]) ** 2).mean()

        def validation_step(self, batch, index):
            pass

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 0.01)

    class Miscomputing(Module):
        def training_step(self, batch, index):
            loss = super().training_step(batch, index)
            loss.register_hook(lambda gradient: -2 * gradient)
            return loss


def _fit(rank, folder, lies, epochs=2, resume=None, **settings):
    from draco_ext.integrations.lightning import ProtectedDDPStrategy

    code = settings.pop("code", RepetitionCode(RANKS, 1))
    data, validation = Samples(), Samples()
    strategy = ProtectedDDPStrategy(code, protect_options={"adversary": adversary_of(rank, lies)})
    trainer = pl.Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=RANKS,
        max_epochs=epochs,
        callbacks=[ModelCheckpoint(folder, save_top_k=-1, filename="{epoch}")],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        **settings,
    )
    module = Module()
    trainer.fit(module, DataLoader(data, 4, shuffle=True), DataLoader(validation, 4), ckpt_path=resume)
    module.validated = of_all_ranks(validation.seen)
    return Result(module, strategy.guard, data), module.validated


def _lightning(rank, report, folder):
    pretend_torchrun(rank)
    for lies in (False, True):
        report((lies, _fit(rank, f"{folder}/{lies}", lies)))
    report(("resumed", _fit(rank, f"{folder}/again", True, resume=f"{folder}/True/epoch=0.ckpt")))
    report(("accumulated", [_fit(rank, f"{folder}/a", lies, accumulate_grad_batches=2) for lies in (False, True)]))
    refused = []
    for code in (CyclicCode(RANKS, 1), Audit(RANKS, 1, 0.5), 3):
        with pytest.raises((TypeError, ValueError)) as caught:
            _fit(rank, folder, False, code=code)
        refused.append(str(caught.value))

    def make_space():
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        return {
            "Trainer": pl.Trainer,
            "module": Module(),
            "loader": DataLoader(Samples(), 4),
            "other": {**quiet, "accelerator": "cpu", "max_steps": 2, "enable_checkpointing": False},
        }

    os.chdir(folder)
    report(("examples", run_examples("lightning", make_space)))
    [block] = re.findall(r"^```text {\.lightning-fsdp2}\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)

    class Resuming(pl.Trainer):
        def fit(self, module):
            super().fit(module, ckpt_path=f"{folder}/sharded/epoch=0.ckpt")

    results = []
    for lies, trainer in ((False, pl.Trainer), (True, pl.Trainer), (True, Resuming)):
        module = Miscomputing if lies and rank == BAD else Module
        space = {**make_space(), "data": Samples(), "Module": module, "Trainer": trainer}
        space["other"] |= {"max_steps": -1, "max_epochs": 2, "enable_checkpointing": lies}
        if lies and trainer is pl.Trainer:
            space["other"] |= {"callbacks": [ModelCheckpoint(f"{folder}/sharded", save_top_k=-1, filename="{epoch}")]}
        exec(compile(block, str(PAGE), "exec"), space)
        results.append(Result(space["module"], space["module"].guard, space["data"]))
    report(("fsdp2", results))
    os.environ["PL_SEED_WORKERS"] = "1"
    with pytest.raises(ValueError, match="workers=False") as caught:
        _fit(rank, folder, False)
    report(("refused", [*refused, str(caught.value)]))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    return dict(run_local(_lightning, RANKS, str(tmp_path_factory.mktemp("lightning"))))


@needs("lightning")
def test_lightning(fitted):
    (honest, validated), (lied_to, _) = fitted[False], fitted[True]
    check(honest, lied_to)
    check_shares(honest)
    assert honest.report.steps == 8
    assert len({str(seen) for seen in validated}) == RANKS  # validation is divided among all ranks


@needs("lightning")
def test_lightning_resumes(fitted):
    """Dropout included, and with the suspects of before."""
    (lied_to, _), (resumed, _) = fitted[True], fitted["resumed"]
    assert resumed.bits == lied_to.bits
    assert resumed.report.suspects[BAD].steps == lied_to.report.suspects[BAD].steps == list(range(8))


@needs("lightning")
def test_lightning_accumulates(fitted):
    (honest, _), (lied_to, _) = fitted["accumulated"]
    check(honest, lied_to)
    assert honest.report.steps == 4


@needs("lightning")
def test_example_of_lightning(fitted):
    [report] = fitted["examples"]
    assert (report.steps, report.suspects) == (2, {})


@needs("lightning")
def test_lightning_with_fsdp2(fitted):
    """Protected in configure_model: rank 4 is in replica 2 of three."""
    honest, lied_to, resumed = fitted["fsdp2"]
    check(honest, lied_to, bad=2)
    assert honest.report.steps == 8
    assert honest.seen == honest.seen[:2] * 3
    assert resumed.bits == lied_to.bits  # dropout included
    assert resumed.report.suspects[2].steps == lied_to.report.suspects[2].steps == list(range(8))


@needs("lightning")
def test_lightning_refuses(fitted):
    cyclic, audit, number, workers = fitted["refused"]
    assert "Lightning, which owns the training loop, got CyclicCode(" in cyclic
    assert "needs several passes in audited steps" in audit
    assert number == "code must be a RepetitionCode, got int"
    assert workers.startswith("seed_everything must be called with workers=False, got True")


# ---------------------------------------------------------------------------------------------------- Prometheus


def _prometheus(rank, report):
    from prometheus_client import CollectorRegistry, generate_latest

    from draco_ext.integrations.prometheus import GuardCollector

    torch.set_num_threads(1)
    model = DistributedDataParallel(make_net())
    guard = draco_ext.protect(model, RepetitionCode(RANKS, 1), adversary=adversary_of(rank, True))
    registry = CollectorRegistry()
    registry.register(GuardCollector(guard, {"job": "test"}))
    scrapes, done = [], threading.Event()

    def scrape():
        while not done.is_set():
            scrapes.append(generate_latest(registry).decode())

    thread = threading.Thread(target=scrape)
    thread.start()
    for _ in range(3):
        model(torch.ones(2, 4)).sum().backward()
    done.set()
    thread.join()
    with pytest.raises(TypeError, match="guard must be a Guard or AuditGuard, got int"):
        GuardCollector(3)
    report((generate_latest(registry).decode(), len(scrapes), guard.report().metrics()))


@needs("prometheus_client")
def test_prometheus():
    [(text, scrapes, metrics)] = run_local(_prometheus, RANKS)
    assert scrapes >= 1
    lines = text.splitlines()
    assert "# TYPE draco_steps_total counter" in lines
    assert "# HELP draco_suspects Ranks whose messages were wrong." in lines
    assert 'draco_steps_total{job="test"} 3.0' in lines
    assert 'draco_suspects{job="test"} 1.0' in lines
    assert f'draco_wrong_steps_total{{job="test",rank="{BAD}"}} 3.0' in lines
    shown = [line for line in lines if not line.startswith("#")]
    without_values = {"draco/missing_steps", "draco/repaired_steps"}  # by rank, and there was none
    assert len(shown) == len(metrics)
    assert not any(name.startswith(tuple(without_values)) for name in metrics)


# ---------------------------------------------------------------------------------------------------- torchdata


@needs("torchdata")
@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_loader_resumes_within_an_epoch(workers):
    """It counts what the loop has got, not what its workers have read ahead."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    data = list(range(50))

    def make():
        sampler = RedundantSampler(data, RepetitionCode(7, 1), rank=4, seed=5)
        context = "fork" if workers else None
        return sampler, StatefulDataLoader(
            data, 4, sampler=sampler, num_workers=workers, multiprocessing_context=context
        )

    sampler, loader = make()
    sampler.set_epoch(1)
    batches = iter(loader)
    for _ in range(3):
        next(batches)
    state = loader.state_dict()
    rest = [batch.tolist() for batch in batches]
    assert len(rest) == 4
    sampler, loader = make()
    loader.load_state_dict(state)
    sampler.set_epoch(1)
    assert [batch.tolist() for batch in loader] == rest
    sampler.set_epoch(2)
    assert len(list(loader)) == 7


# --------------------------------------------------------------------------------------------- without a framework


@pytest.mark.parametrize("extra", [*FRAMEWORKS, "prometheus"])
def test_a_framework_that_is_not_installed_is_named(extra, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("draco_ext.integrations.")]:
        monkeypatch.delitem(sys.modules, name)
    for name in (*FRAMEWORKS, "prometheus_client"):
        for loaded in [loaded for loaded in sys.modules if loaded.split(".")[0] == name]:
            monkeypatch.setitem(sys.modules, loaded, None)
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=rf'integrations.{extra} needs pip install "draco_ext\[{extra}\]"'):
        importlib.import_module(f"draco_ext.integrations.{extra}")

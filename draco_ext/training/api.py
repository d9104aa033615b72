"""`protect`, which puts a code between a model's gradients and its optimizer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from draco_ext import _checks
from draco_ext.codes import Audit, Code, RepetitionCode
from draco_ext.protocol.transports import FORMER_NAMES, TRANSPORTS
from draco_ext.reporting.ledger import Finding
from draco_ext.training.adapters import is_fsdp
from draco_ext.training.audit.guard import ON_CONVICTION, AuditAdversary, AuditGuard
from draco_ext.training.compatibility import check_model
from draco_ext.training.failure import ON_FAILURE
from draco_ext.training.guard import Adversary, Guard

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

logger = logging.getLogger("draco_ext")


def protect(
    model: DistributedDataParallel | FSDPModule,
    code: Code | Audit,
    *,
    transport: str = "allreduce",
    on_failure: str = "raise",
    ledger: str | Path | None = None,
    callback: Callable[[Finding], None] | None = None,
    adversary: Adversary | AuditAdversary | None = None,
    atol: float = 0.0,
    rtol: float = 0.0,
    seed: int = 0,
    ranks_per_host: int | Sequence[int] | None = None,
    deadline: float = 60.0,
    check_state_every: int | None = 20,
    on_conviction: str = "substitute",
    batch_of: Callable[[int, int], Any] | None = None,
) -> Guard | AuditGuard:
    """Put a code or an audit between a data-parallel model's gradients and its optimizer.

    It registers DDP's communication hook, or that of each module of FSDP2. Gradients are then exchanged and decoded,
    bucket by bucket, instead of being averaged. Up to s bad ranks change nothing, and all ranks end every step with the
    same bits. All ranks of the model's process group must call it. The mini-batches come from a `RedundantBatchSampler`
    or `RedundantSampler` with the same code, or from any loader that is given `GuardBase.data_rank` of
    `GuardBase.data_replicas`.

    The transports differ in whom they trust:

    * "allreduce": up to s ranks may compute anything, but messages must not be altered on the way. The repetition code
      votes on digests and sends about 60% of DDP's traffic. The cyclic code checks projections and sends as much as
      DDP.
    * "verified": no rank is trusted. Up to s ranks of each group of the repetition code may compute and send anything,
      to every rank something else. It sends less than DDP. With the cyclic code, or with atol or rtol, every rank
      receives n messages, and a rank must send the same message to all. "allgather" is its former name.
    * "server": rank 0 is trusted and must live. Up to s ranks may compute and send anything, or twice as many may be
      missing (e bad and f missing while 2e + f <= 2s). One message per group (repetition code, s > 0, no tolerance) or
      per rank goes to the server, and one back to each rank. From the third step on, a rank that hangs, dies or is late
      is an erasure and does not end the job. In the first two steps DDP itself communicates with all ranks. This needs
      a launcher that lets the other ranks live: torchrun stops all ranks when one dies, but not when one hangs. It also
      needs a DDP that does not communicate with all ranks in every step, as it does with find_unused_parameters, and
      with buffers unless broadcast_buffers=False; a warning is logged then.

    The global generators of torch, Python and numpy are seeded so that all ranks with the same part draw the same
    numbers, in the loop and in the model. This happens in this call, when the sampler is asked for a mini-batch or
    `Guard.steps` yields one, before every forward pass in training, and after every step. An `Audit` seeds nothing:
    ranks draw what they would draw in plain DDP, and auditors get the states of the owner's generators.

    With find_unused_parameters or static_graph, a parameter is unused if the majority of each part's holders say so.
    Its ``grad`` then stays unchanged, as under plain DDP.

    A copy of the model (`copy.deepcopy`, as for a moving average) is a plain DistributedDataParallel without a guard.

    Ranks compare digests of their parameters, buffers and watched optimizers (`Guard.watch`) in the first step, in
    every step whose number is a multiple of `check_state_every`, and before `Guard.state_dict`. Ranks that differ from
    the majority are named, and receive the majority's values before the optimizer steps. Without a majority the step
    fails.

    Args:
        model: the model, on every rank, with a process group of ``code.workers`` ranks. It may be compiled with
            torch.compile before or afterwards. It may also be made by ``fully_shard``: with a code over a mesh of
            ``code.workers`` replicas and any number of shards, where a replica is what is called a rank here; with an
            `Audit` over any mesh of ``code.workers`` ranks and two shards or more.
        code: the assignment of parts to ranks. A code with several parts for each rank (cyclic) needs `Guard.steps`,
            and an `Audit` needs `AuditGuard.steps`, which takes any loader. A `SolonCode` also needs "server" and a
            DistributedDataParallel.
        transport: "allreduce", "verified" or "server".
        on_failure: what happens if too many messages are wrong for the code's guarantee. All gradients become None on
            all ranks, so that an optimizer changes nothing. Then "raise" makes ``backward()`` raise DecodingError, and
            "skip" logs a warning.
        ledger: the file to which every `Finding` is appended as a line of JSON; see `draco_ext.read_ledger`. Rank 0
            writes it, or, with "{rank}" in its name, every rank writes its own. If writing fails later on, training
            goes on.
        callback: called with every `Finding`, on all ranks, after the step. If it raises an error, training goes on;
            the first error of each type is logged.
        adversary: makes this rank bad, for tests and demonstrations: f(step, honest message) -> message to send; with
            an `Audit` f(step, gradient of a parameter, kind of pass) -> gradient, with "own", "audit" or "opinion".
        atol: the absolute tolerance between honest messages; see `draco_ext.decode`. It must be 0 for the repetition
            code with "allreduce", which compares bits.
        rtol: the relative tolerance.
        seed: the seed of the generators; the same on all ranks.
        ranks_per_host: see `RedundantBatchSampler`.
        deadline: seconds that the server waits for the others' messages once it has its own. It does not wait for a
            late rank again until that rank has caught up.
        check_state_every: the interval, in steps, of comparing parameters; 0 or None: in the first step only.
        on_conviction: only for an `Audit`: what happens with a rank that computed a wrong gradient and did so again.
            With "substitute" another rank computes its part until its own gradients, which are still compared, were
            right 100 times, one after another. Every step then takes a second pass, and loses nothing. With "drop" its
            part is left out of the mean until then. With "raise" the step ends with DecodingError on all ranks.
        batch_of: only for an `Audit`: f(step, part), which returns the mini-batch that rank `part` has in this step (a
            list of them with ``guard.steps(loader, accumulate=...)``). Default: ranks send each other their
            mini-batches, which must be tensors, arrays, numbers and strings in containers.

    Returns:
        The guard; with an `Audit` an `AuditGuard`.

    Raises:
        TypeError: an argument has the wrong type, or a parameter has a dtype that the code does not take.
        ValueError: an argument has a wrong value; an argument, the models or DDP's options differ between ranks; or the
            ledger cannot be opened. All ranks raise it together. Also if DDP would not give a gradient to the guard;
            the message names the parameter. In the first step ``backward()`` raises it if more than s holders of a part
            have different inputs of that part.
        RuntimeError: raised in a step that cannot be protected; all gradients become None. The causes are a collective
            between the beginning of a forward pass and the end of its backward pass, an optimizer that steps with
            gradients that DDP has not reduced, a parameter that requires a gradient only since DDP was made, and
            ``model.join()``.
    """
    if not isinstance(model, DistributedDataParallel) and not is_fsdp(model):
        raise TypeError(f"model must be a DistributedDataParallel or made by fully_shard, got {type(model).__name__}")
    if not isinstance(code, Code | Audit):
        raise TypeError(f"code must be a RepetitionCode, a CyclicCode or an Audit, got {type(code).__name__}")
    if isinstance(model, DistributedDataParallel):
        workers, whose = dist.get_world_size(model.process_group), "ranks of the model's process group"
    elif isinstance(code, Audit):
        from draco_ext.training.fsdp_audit import check_audited_model

        workers, whose = check_audited_model(model, RepetitionCode(code.workers, 0)), "ranks of the model's mesh"
    else:
        from draco_ext.training.fsdp import check_sharded_model

        workers, whose = check_sharded_model(model, code), "replicas of the model's mesh"
    if workers != code.workers:
        raise ValueError(f"code must be for the {workers} {whose}, got {code!r}")
    if on_failure not in ON_FAILURE:
        raise ValueError(f"on_failure must be {' or '.join(map(repr, ON_FAILURE))}, got {on_failure!r}")
    transport = FORMER_NAMES.get(transport, transport)
    if transport not in TRANSPORTS:
        raise ValueError(f"transport must be {' or '.join(map(repr, TRANSPORTS))}, got {transport!r}")
    _checks.check_tolerance("atol", atol)
    _checks.check_tolerance("rtol", rtol)
    _checks.check_tolerance("deadline", deadline)
    _checks.check_int("seed", seed, 0, 2**63 - 1)
    check_state_every = 0 if check_state_every is None else check_state_every
    _checks.check_int("check_state_every", check_state_every, 0)
    settings: dict[str, Any] = {
        "transport": transport,
        "on_failure": on_failure,
        "ledger": ledger,
        "callback": callback,
        "atol": atol,
        "rtol": rtol,
        "seed": seed,
        "deadline": deadline,
        "check_state_every": check_state_every,
    }
    if isinstance(code, Audit):
        return _protect_by_audit(model, code, ranks_per_host, adversary, on_conviction, batch_of, settings)
    if on_conviction != "substitute" or batch_of is not None:
        raise ValueError("on_conviction and batch_of must be left out for a code: only an Audit takes them")
    if not code.sliceable:
        raise ValueError(f"code must be decoded column by column, got {code!r}: use draco_ext.decode in your own loop")
    if code.bounded and transport == "allreduce":
        raise ValueError(
            f"transport must be 'verified' or 'server' for a code with a second stage, got 'allreduce' for {code!r}: "
            "an all-reduce adds up what ranks send"
        )
    if code.message_is_gradient and transport == "allreduce" and (atol > 0 or rtol > 0):
        raise ValueError("atol and rtol must be 0 for a repetition code with transport='allreduce'; take 'verified'")
    if code.blocks > 1:
        _check_short_messages(model, code, transport)
    if isinstance(model, DistributedDataParallel):
        check_model(model, code)
        _warn_of_collectives(model, transport)
    module = cast(torch.nn.Module, model)
    return Guard(module, code, adversary=cast("Adversary | None", adversary), ranks_per_host=ranks_per_host, **settings)


def _check_short_messages(model: object, code: Code, transport: str) -> None:
    """Raise unless messages that are shorter than the gradient can be used."""
    if transport != "server":
        reason = {
            "allreduce": "the sum of its messages is only one block of the gradient",
            "verified": "all messages would go to all ranks, while a RepetitionCode's are sent in shards",
        }[transport]
        raise ValueError(f"transport must be 'server' for {code!r}, got {transport!r}: {reason}")
    if not isinstance(model, DistributedDataParallel):
        raise ValueError(f"model must be a DistributedDataParallel for {code!r}, got one made by fully_shard")


def _warn_of_collectives(model: DistributedDataParallel, transport: str) -> None:
    if (
        dist.get_rank(model.process_group) == 0
        and transport == "server"
        and (model.find_unused_parameters or (model.broadcast_buffers and next(model.buffers(), None) is not None))
    ):
        logger.warning(
            "a rank that dies or hangs will stop all: with buffers and broadcast_buffers, or with "
            "find_unused_parameters, DistributedDataParallel itself talks to all ranks in every step"
        )


def _protect_by_audit(
    model: DistributedDataParallel | FSDPModule,
    audit: Audit,
    ranks_per_host: int | Sequence[int] | None,
    adversary: Any,
    on_conviction: str,
    batch_of: Callable[[int, int], Any] | None,
    settings: dict[str, Any],
) -> AuditGuard:
    if settings["transport"] != "allreduce":
        raise ValueError(f"transport must be 'allreduce' with an Audit, got {settings['transport']!r}")
    if ranks_per_host is not None:
        raise ValueError("ranks_per_host must be left out with an Audit: each rank has a part of its own")
    if on_conviction not in ON_CONVICTION:
        raise ValueError(f"on_conviction must be {' or '.join(map(repr, ON_CONVICTION))}, got {on_conviction!r}")
    if batch_of is not None and not callable(batch_of):
        raise TypeError(f"batch_of must be a function f(step, part), got {type(batch_of).__name__}")
    if isinstance(model, DistributedDataParallel):
        if model.static_graph:
            raise ValueError(
                "static_graph must be False with an Audit: DistributedDataParallel records the graph in its first "
                "backward pass, and fails if that does not synchronise, as an audit's first one"
            )
        check_model(model, RepetitionCode(audit.workers, 0))
    module = cast(torch.nn.Module, model)
    return AuditGuard(module, audit, adversary=adversary, on_conviction=on_conviction, batch_of=batch_of, **settings)

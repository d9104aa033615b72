"""`protect`: puts a code between a model's gradients and its optimizer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from draco_ext import _checks
from draco_ext.codes import Code
from draco_ext.protocol.transports import TRANSPORTS
from draco_ext.reporting.ledger import Finding
from draco_ext.training.compatibility import check_model
from draco_ext.training.failure import ON_FAILURE
from draco_ext.training.guard import Adversary, Guard

logger = logging.getLogger("draco_ext")


def protect(
    model: DistributedDataParallel,
    code: Code,
    *,
    transport: str = "allreduce",
    on_failure: str = "raise",
    ledger: str | Path | None = None,
    callback: Callable[[Finding], None] | None = None,
    adversary: Adversary | None = None,
    atol: float = 0.0,
    rtol: float = 0.0,
    seed: int = 0,
    ranks_per_host: int | Sequence[int] | None = None,
    deadline: float = 60.0,
    check_state_every: int | None = 20,
) -> Guard:
    """Put a code between a DistributedDataParallel model's gradients and its optimizer.

    Registers DDP's communication hook: instead of being averaged, gradients are exchanged and decoded, bucket by
    bucket. Up to s bad ranks change nothing; all ranks end every step with the same bits. To be called on all ranks of
    the model's process group. The mini-batches must be those of a `RedundantBatchSampler` with the same code.

    Transports, by whom they trust:

    * "allreduce": up to s ranks may compute anything wrong; what ranks send is not altered on the way. The repetition
      code votes on digests and moves about 60% of what DDP moves; the cyclic one checks projections and moves what DDP
      moves.
    * "allgather": up to s ranks may compute and send anything; a rank must send the same message to all, and nobody
      else is trusted. Moves n messages to every rank.
    * "server": rank 0 is trusted; up to s ranks may compute and send anything, and twice as many may be missing (e bad
      and f missing while 2e + f <= 2s). A rank that hangs, dies or is late is an erasure, not the end of the job, from
      the third step on (DDP itself talks to all ranks before) as long as the launcher lets the others live (torchrun
      stops all ranks when one dies, but not when one hangs) and DDP does not talk to all ranks in every step (it does
      with find_unused_parameters, and with buffers unless broadcast_buffers=False; a warning says so). Rank 0 must
      live. Moves a message per rank to the server and back.

    The global generators of torch, Python and numpy are seeded here, where the sampler is asked for a mini-batch or
    `Guard.steps` hands it out, before every forward pass in training and after every step, the same on all ranks with
    the part: what is drawn from them in the loop and in the model agrees. With find_unused_parameters or static_graph a
    parameter is unused if the majority of each part's holders say so; as under plain DDP its ``grad`` then stays what
    it was.

    In the first step, in every step whose number is a multiple of `check_state_every` and before `Guard.state_dict`
    ranks compare digests of their parameters, buffers and watched optimizers (`Guard.watch`). Those that differ from
    the majority are named, and given what the majority has before the optimizer steps. Without a majority the step
    fails.

    Args:
        model: on every rank, with a process group of ``code.workers`` ranks; torch.compile it before or afterwards.
        code: who computes which part. A code with several parts for each rank (cyclic) needs `Guard.steps`.
        transport: "allreduce", "allgather" or "server".
        on_failure: where the code's guarantee does not cover what came in, all gradients become None, on all ranks, so
            that an optimizer changes nothing; and "raise" makes ``backward()`` raise DecodingError, "skip" logs a
            warning.
        ledger: file to which every `Finding` is appended as a line of JSON, see `draco_ext.read_ledger`: by rank 0, or,
            with "{rank}" in its name, by every rank to its own. Where that fails later on, training goes on.
        callback: called with every `Finding`, on all ranks, after the step. Where it raises an error, that is logged,
            once for each kind of error, and training goes on.
        adversary: makes this rank bad, for tests and demonstrations: f(step, honest message) -> what is sent.
        atol: honest messages may differ by so much, see `draco_ext.decode`; not for the repetition code with
            "allreduce", which compares bits.
        rtol: the same, relative.
        seed: of the generators' seeds; the same on all ranks.
        ranks_per_host: see `RedundantBatchSampler`.
        deadline: seconds that the server waits for the others' messages once it has its own. A rank that was late is
            not waited for again until it has caught up.
        check_state_every: in which steps parameters are compared; 0 or None: in the first one only.

    Returns:
        The guard.

    Raises:
        TypeError: an argument has the wrong type; parameters have a dtype that the code does not take.
        ValueError: an argument has a wrong value, or not the same on all ranks; nor have the models or DDP's options;
            the ledger cannot be opened: on all ranks alike. DDP would keep a gradient from the guard: it is named. In
            the first step ``backward()`` raises one, too, where more than s holders of a part have other inputs of it.
        RuntimeError: in a step, where it cannot be protected: a collective between the beginning of a forward pass and
            the end of its backward pass, an optimizer that steps with gradients that DDP has not reduced, a parameter
            that requires a gradient only since DDP was made, ``model.join()``. All gradients become None.
    """
    if not isinstance(model, DistributedDataParallel):
        raise TypeError(f"model must be a DistributedDataParallel, got {type(model).__name__}")
    if not isinstance(code, Code):
        raise TypeError(f"code must be a RepetitionCode or CyclicCode, got {type(code).__name__}")
    ranks = dist.get_world_size(model.process_group)
    if ranks != code.workers:
        raise ValueError(f"code must be for the {ranks} ranks of the model's process group, got {code!r}")
    if on_failure not in ON_FAILURE:
        raise ValueError(f"on_failure must be {' or '.join(map(repr, ON_FAILURE))}, got {on_failure!r}")
    if transport not in TRANSPORTS:
        raise ValueError(f"transport must be {' or '.join(map(repr, TRANSPORTS))}, got {transport!r}")
    _checks.check_tolerance("atol", atol)
    _checks.check_tolerance("rtol", rtol)
    _checks.check_tolerance("deadline", deadline)
    _checks.check_int("seed", seed, 0, 2**63 - 1)
    check_state_every = 0 if check_state_every is None else check_state_every
    _checks.check_int("check_state_every", check_state_every, 0)
    if code.message_is_gradient and transport == "allreduce" and (atol > 0 or rtol > 0):
        raise ValueError("atol and rtol must be 0 for a repetition code with transport='allreduce'; take 'allgather'")
    check_model(model, code)
    if (
        dist.get_rank(model.process_group) == 0
        and transport == "server"
        and (model.find_unused_parameters or (model.broadcast_buffers and next(model.buffers(), None) is not None))
    ):
        logger.warning(
            "a rank that dies or hangs will stop all: with buffers and broadcast_buffers, or with "
            "find_unused_parameters, DistributedDataParallel itself talks to all ranks in every step"
        )
    return Guard(
        model,
        code,
        transport=transport,
        on_failure=on_failure,
        ledger=ledger,
        callback=callback,
        adversary=adversary,
        atol=atol,
        rtol=rtol,
        seed=seed,
        ranks_per_host=ranks_per_host,
        deadline=deadline,
        check_state_every=check_state_every,
    )

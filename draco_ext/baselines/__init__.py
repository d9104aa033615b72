"""Baselines: what people use instead of a code, to compare with.

Robust averages take the workers' messages of one step, one gradient per worker in the rows of an (n, d) float32 or
float64 matrix, and return one vector of d elements. If a worker is bad, none of them recovers the honest mean exactly,
and none names the worker. `AGGREGATORS` holds them by the name used on the command line, all with the signature
``rule(messages, adversaries)``. `WorkerMomentum` changes what workers send to such a rule.

`PDMMClient` and `pdmm_server` are a federated method, and `AccumulatedLoss` weights the models of neighbours without
any server. Both send models instead of gradients.

All raise TypeError for an argument of the wrong type or dtype and ValueError for a wrong value.
"""

from draco_ext.baselines.averages import (
    AGGREGATORS,
    coordinate_median,
    geometric_median,
    geometric_median_gram,
    krum,
    mean,
    multi_krum,
    trimmed_mean,
    vote_torch,
)
from draco_ext.baselines.momentum import WorkerMomentum
from draco_ext.baselines.multitask import AccumulatedLoss
from draco_ext.baselines.pdmm import PDMMClient, gradient_steps, pdmm_server

__all__ = [
    "AGGREGATORS",
    "AccumulatedLoss",
    "PDMMClient",
    "WorkerMomentum",
    "coordinate_median",
    "geometric_median",
    "geometric_median_gram",
    "gradient_steps",
    "krum",
    "mean",
    "multi_krum",
    "pdmm_server",
    "trimmed_mean",
    "vote_torch",
]

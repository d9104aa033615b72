"""Exact gradients from workers of which some lie or miscompute (DRACO, arXiv 1803.09877)."""

from draco_ext._version import __version__
from draco_ext.codes import (
    Audit,
    ByzShieldCode,
    Code,
    CyclicCode,
    Decoded,
    DecodingError,
    RepetitionCode,
    SolonCode,
    decode,
)
from draco_ext.ops import build_info
from draco_ext.reporting.ledger import Finding, iter_ledger, read_ledger
from draco_ext.reporting.report import AuditReport, Dispute, Report, Suspect, Trigger
from draco_ext.training.api import protect
from draco_ext.training.audit.guard import AuditGuard, AuditStep
from draco_ext.training.guard import Guard
from draco_ext.training.reproducibility import SelfTest
from draco_ext.training.sampler import RedundantBatchSampler, RedundantSampler

__all__ = [
    "Audit",
    "AuditGuard",
    "AuditReport",
    "AuditStep",
    "ByzShieldCode",
    "Code",
    "CyclicCode",
    "Decoded",
    "DecodingError",
    "Dispute",
    "Finding",
    "Guard",
    "RedundantBatchSampler",
    "RedundantSampler",
    "RepetitionCode",
    "Report",
    "SelfTest",
    "SolonCode",
    "Suspect",
    "Trigger",
    "__version__",
    "build_info",
    "decode",
    "iter_ledger",
    "protect",
    "read_ledger",
]

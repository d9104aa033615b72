"""The codes: who computes which part, what a worker sends, how messages are decoded."""

from draco_ext.codes.audit import Audit
from draco_ext.codes.base import Code, Decoded, DecodingError, decode, groups_by_worker
from draco_ext.codes.byzshield import ByzShieldCode
from draco_ext.codes.cyclic import CyclicCode
from draco_ext.codes.repetition import RepetitionCode
from draco_ext.codes.solon import SolonCode

__all__ = [
    "Audit",
    "ByzShieldCode",
    "Code",
    "CyclicCode",
    "Decoded",
    "DecodingError",
    "RepetitionCode",
    "SolonCode",
    "decode",
    "groups_by_worker",
]

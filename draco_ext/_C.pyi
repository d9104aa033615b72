from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

class _BuildInfo(TypedDict):
    compiler: str
    instruction_set: str
    cuda: bool
    cuda_architectures: str
    torch: str

TILE: int
MOST_WORKERS: int
MOST_GROUP_MEMBERS: int
FEW_TILES: int
MOST_PROJECTIONS: int
FEWEST_PROJECTIONS: int
PROJECTION_SCALE: float
MOST_WORKERS: int
MOST_GROUP_MEMBERS: int

def build_info() -> _BuildInfo: ...
def cyclic_nodes(workers: int) -> NDArray[np.complex128]: ...
def cyclic_supports(workers: int, adversaries: int) -> NDArray[np.int64]: ...
def cyclic_tolerance(workers: int, adversaries: int, float64: bool) -> float: ...
def cyclic_weights(workers: int, adversaries: int) -> NDArray[np.complex128]: ...

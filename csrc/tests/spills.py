"""A test of the compiler's report: no kernel that reads messages may spill registers or use local memory.

NVCC_APPEND_FLAGS=-Xptxas=-v pip wheel --verbose --no-deps . 2>&1 | tee build.log
python csrc/tests/spills.py build.log
"""

import collections
import re
import sys
from pathlib import Path

# Kernel -> how many instantiations of it every architecture has.
HOT = {
    "vote_kernel": 8,
    "vote_finish": 4,
    "mean_kernel": 4,
    "sweep_kernel": 8,
    "gather_kernel": 1,
    "digest_kernel": 1,
    "digest_stats_kernel": 8,
    "weighted_sum": 8,
    "encode_kernel": 2,
}


def main(log: Path) -> str | None:
    registers = collections.defaultdict(list)  # (architecture, kernel) -> of each instantiation
    wrong = []
    for part in log.read_text().split("Compiling entry function ")[1:]:
        symbol, architecture = re.match(r"'(\S+)' for '(\S+)'", part).groups()
        kernel = next((name for name in HOT if f"{len(name)}{name}" in symbol), None)
        if kernel is None:
            continue
        memory = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers[architecture, kernel].append(int(re.search(r"Used (\d+) registers", part)[1]))
        if any(map(int, memory.groups())):
            wrong.append(f"{architecture} {symbol}: {memory[0]}")

    architectures = sorted({architecture for architecture, _ in registers})
    for architecture in architectures:
        for kernel, expected in HOT.items():
            found = registers[architecture, kernel]
            print(f"{architecture} {kernel}: {', '.join(map(str, sorted(found)))} registers")
            if len(found) != expected:
                wrong.append(f"{architecture} {kernel}: expected {expected} instantiations, found {len(found)}")
    if not architectures:
        wrong.append(f"{log} has no report of ptxas")
    return "\n".join(wrong) or None


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))

"""Mutation tests: `python tools/mutants.py --count 40 --only csrc`.

A mutant is the code with one comparison, sign, connective, `not` or whole number changed. Mutants are built and tested
in a copy of the tree in a temporary folder, with a CMake build of its own. A mutant that no test notices survives: a
test is missing, or no test can notice the change (EQUIVALENT). A timeout counts as noticed.
"""

from __future__ import annotations

import ast
import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import pybind11

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "csrc" / "pep517"))
import torch_at  # noqa: E402

KILLED, SURVIVED, BROKEN = "killed", "SURVIVED", "does not compile"

# Prefix of a source -> the tests that should notice its mutants, the most likely ones first. The longest prefix counts.
VOTE = "test_repetition.py test_arguments.py test_kernels.py"
CYCLIC = "test_cyclic.py test_kernels.py test_arguments.py test_guarantee.py"
PROTECT = "test_protect.py::test_a_bucket_of_one_element test_protect.py::test_bad_ranks_are_named"
TESTS = {
    "draco_ext/codes/": "test_arguments.py test_repetition.py test_cyclic.py test_guarantee.py test_properties.py",
    "draco_ext/codes/repetition.py": "test_arguments.py test_repetition.py test_guarantee.py test_properties.py",
    "draco_ext/ops/": "test_arguments.py test_out.py test_ops.py test_kernels.py test_cyclic.py test_fuzz.py",
    "draco_ext/protocol/encoder.py": "test_protect.py::test_messages_grow_with_the_gradients "
    + PROTECT
    + " test_protect.py::test_without_adversaries_it_is_plain_ddp test_protect.py::test_bytes_on_the_wire",
    "draco_ext/protocol/transports/base.py": PROTECT
    + " test_protect.py::test_bytes_on_the_wire test_protect.py::test_too_many_bad_ranks_stop_all"
    + " test_protect.py::test_bad_ranks_change_nothing",
    "draco_ext/training/sampler.py": "test_batches.py",
    "csrc/core/": CYCLIC,
    "csrc/core/half.h": VOTE,
    "csrc/core/majority.h": VOTE,
    "csrc/core/stats.h": "test_kernels.py test_ops.py",
    "csrc/core/digest.h": "test_kernels.py::test_digest_tells_all_bits_places_and_lengths test_kernels.py",
    "csrc/cpu/": CYCLIC + " test_repetition.py test_properties.py",
    "csrc/cpu/digest.h": "test_kernels.py test_arguments.py test_concurrency.py",
    "csrc/cpu/digest_and_stats.cpp": "test_kernels.py test_arguments.py test_concurrency.py",
    "csrc/cpu/majority_vote.cpp": VOTE + " test_properties.py",
    "csrc/cpu/dispatch.cpp": "test_ops.py test_kernels.py::test_every_kernel_once",
    "csrc/cpu/kernels/": "test_kernels.py test_cyclic.py test_repetition.py test_ops.py",
}
SOURCES = (
    "draco_ext/codes/*.py",
    "draco_ext/ops/*.py",
    *(name for name in TESTS if name.startswith("draco_ext") and name.endswith(".py")),
    "csrc/core/**/*.h",
    "csrc/cpu/**/*.cpp",
    "csrc/cpu/**/*.h",
)

# Equivalent mutants: (file, the changed line) -> why no test can notice.
EQUIVALENT: dict[tuple[str, str], str] = {
    (
        "draco_ext/protocol/encoder.py",
        "PORTION = 3**17  # elements; even",
    ): "only the time; no test has 1e8 elements",
    ("draco_ext/protocol/encoder.py", "PORTION = 2**18  # elements; even"): "only the time",
    (
        "draco_ext/protocol/transports/base.py",
        "if key not in self._rooms or self._rooms[key].numel() <= size:",
    ): "makes a room of the same size again: only the time",
    (
        "csrc/cpu/cyclic_decode.cpp",
        "if (absent > 3 * s) {",
    ): "find_suspects asks again; the sum is then overwritten by NaN",
}


@dataclass(frozen=True)
class Mutant:
    """A file with the bytes from start to end replaced."""

    file: str
    start: int
    end: int
    new: str

    def line(self) -> int:
        return (ROOT / self.file).read_bytes().count(b"\n", 0, self.start) + 1

    def source(self) -> bytes:
        old = (ROOT / self.file).read_bytes()
        return old[: self.start] + self.new.encode() + old[self.end :]

    def lines(self) -> tuple[str, str]:
        """Return the line before and after the change."""
        before, after = ((ROOT / self.file).read_bytes(), self.source())
        return tuple(text.decode().split("\n")[self.line() - 1].strip() for text in (before, after))

    def tests(self) -> str:
        return TESTS[max((prefix for prefix in TESTS if self.file.startswith(prefix)), key=len)]

    def equivalent(self) -> str | None:
        return EQUIVALENT.get((self.file, self.lines()[1]))


# ----------------------------------------------------------------------------------------------------- mutants

FLIPS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "&&": "||", "||": "&&"}
FLIPS |= {"+": "-", "-": "+", "+=": "-=", "-=": "+=", "and": "or", "or": "and"}
FLIPS |= {"is not": "is", "is": "is not", "not in": "in", "in": "not in"}

# In C++ as clang-format writes it, with a space around binary operators; < and > of templates have none.
CXX = [
    (re.compile(r"(?<= )(<=?|>=?|[=!]=|&&|\|\||[+-]=?)(?= )"), lambda found: FLIPS[found[0]]),
    (re.compile(r"!(?=[\w(])"), lambda found: ""),
    (re.compile(r"(?<![\w.'])\d+(?![\w.'])"), lambda found: str(int(found[0]) + 1)),
]
# Text that is not mutated: comments, strings and directives, and declarations, whose mutants would not compile.
NO_CXX = re.compile(r'//.*|"(\\.|[^"])*"|^\s*(#|template|using|static_assert|case ).*')


def of_cxx(file: str) -> Iterator[Mutant]:
    at = 0
    for line in (ROOT / file).read_text().splitlines(keepends=True):
        code = NO_CXX.sub(lambda found: " " * len(found[0].encode()), line)
        for pattern, changed in CXX:
            for found in pattern.finditer(code):
                yield Mutant(file, at + found.start(), at + found.end(), changed(found))
        at += len(line.encode())


def of_python(file: str) -> Iterator[Mutant]:
    source = (ROOT / file).read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def begin(node: ast.AST) -> int:
        return starts[node.lineno - 1] + node.col_offset

    def end(node: ast.AST) -> int:
        return starts[node.end_lineno - 1] + node.end_col_offset

    def between(left: ast.AST, right: ast.AST) -> Iterator[Mutant]:
        """Yield the mutant of the operator between two operands, which may have parentheses around them."""
        gap = source[end(left) : begin(right)].decode()
        found = re.search(r"is not|not in|is|in|and|or|[<>=!]=|[<>+-]", gap)
        if found:
            yield Mutant(file, end(left) + found.start(), end(left) + found.end(), FLIPS[found[0]])

    def walk(node: ast.AST) -> Iterator[Mutant]:
        if isinstance(node, (ast.JoinedStr, ast.Raise, ast.arg)):  # messages and annotations
            return
        if isinstance(node, ast.Compare):
            for left, right in zip([node.left, *node.comparators], node.comparators, strict=False):
                yield from between(left, right)
        elif isinstance(node, ast.BoolOp):
            yield from between(*node.values[:2])
        elif isinstance(node, ast.BinOp):
            yield from between(node.left, node.right)
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, (ast.Not, ast.USub)):
            yield Mutant(file, begin(node), begin(node.operand), "")
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            yield Mutant(file, begin(node), end(node), str(node.value + 1))
        for field, child in ast.iter_fields(node):
            if field not in ("annotation", "returns"):
                for each in child if isinstance(child, list) else [child]:
                    if isinstance(each, ast.AST):
                        yield from walk(each)

    yield from walk(ast.parse(source))


# --------------------------------------------------------------------------------------------------- one mutant


class Scratch:
    """A built copy of the tree, in which one file at a time is replaced by a mutant."""

    def __init__(self, folder: str, patience: float) -> None:
        self.tree = Path(folder) / "tree"
        self.patience = patience
        self.environment = os.environ | {
            "PYTHONPATH": str(self.tree),
            "PYTHONDONTWRITEBYTECODE": "1",  # a mutant may have the size and, to the second, the time of the last one
            "OMP_NUM_THREADS": "1",
        }
        # All files that git tracks or would add: neither builds nor caches.
        listed = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
        for name in subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split("\0"):
            if name and (ROOT / name).is_file():
                (self.tree / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, self.tree / name)
        torch = torch_at.find()
        configure = ["cmake", "-S", str(self.tree), "-B", str(self.tree / "build"), "-G", "Ninja"]
        # Compiling takes longer than testing, so use -O1, and a unity build that compiles torch's headers only once.
        configure += ["-DCMAKE_UNITY_BUILD=ON", "-DCMAKE_UNITY_BUILD_BATCH_SIZE=0"]
        configure += ["-DCMAKE_BUILD_TYPE=Mutant", "-DCMAKE_CXX_FLAGS_MUTANT=-O1 -DNDEBUG", "-DDRACO_CUDA=OFF"]
        configure += [f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        configure += [f"-DDRACO_TORCH_DIR={torch.folder}", f"-DDRACO_TORCH_VERSION={torch.version}"]
        configure += [f"-DDRACO_OUTPUT={self.tree / 'draco_ext' / '_C.so'}"]
        subprocess.run(configure, check=True, stdout=subprocess.DEVNULL)
        if not self.build():
            sys.exit("the C++ build failed without a mutant")

    def build(self) -> bool:
        command = ["cmake", "--build", str(self.tree / "build"), "-j1"]
        return subprocess.run(command, capture_output=True, env=self.environment).returncode == 0

    def tests(self, names: str, patience: float | None) -> tuple[bool, str]:
        """Return whether these tests pass before the timeout, and the first failure or the last line."""
        command = [sys.executable, "-m", "pytest", "-qx", "-p", "no:cacheprovider", "-m", "not gpu"]
        for name in names.split():
            module, *rest = name.partition("::")
            (path,) = self.tree.glob(f"python_tests/*/{module}")
            command.append("".join([str(path), *rest]))
        process = subprocess.Popen(
            command,
            cwd=self.tree,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            return False, f"not done after {patience:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # also ranks that the tests have left running
            process.wait()
        failures = re.findall(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
        last = f"exit status {process.returncode}" if process.returncode < 0 else said.strip().split("\n")[-1]
        return process.returncode == 0, failures[0] if failures else last

    def judge(self, mutant: Mutant) -> tuple[str, str]:
        """Return the result of a mutant, and the reason."""
        path = self.tree / mutant.file
        path.write_bytes(mutant.source())
        if mutant.file.startswith("csrc/") and not self.build():
            return BROKEN, ""
        passed, said = self.tests(mutant.tests(), self.patience)
        return (SURVIVED if passed else KILLED), said

    def restore(self, file: str) -> None:
        shutil.copyfile(ROOT / file, self.tree / file)


@click.command()
@click.option("--count", default=40, show_default=True, help="How many mutants to make.")
@click.option("--seed", default=20180327, show_default=True, help="What they are drawn from.")
@click.option("--only", multiple=True, help="Only files whose path begins so, such as csrc/core/locator.h.")
@click.option("--at", "line", type=int, help="Only mutants of this line: see whether a new test notices.")
@click.option("--patience", default=600.0, show_default=True, help="Seconds until tests count as endless.")
def main(count, seed, only, line, patience):
    """Test mutants of the code; the exit status is 1 if an unknown one survives."""
    files = sorted({str(path.relative_to(ROOT)) for pattern in SOURCES for path in ROOT.glob(pattern)})
    every = [
        mutant
        for file in files
        if not only or file.startswith(only)
        for mutant in (of_python if file.endswith(".py") else of_cxx)(file)
        if line is None or mutant.line() == line
    ]
    drawn = random.Random(seed).sample(every, min(count, len(every)))
    # File by file, since everything that includes a header is compiled again when the header is restored.
    drawn.sort(key=lambda mutant: (mutant.file, mutant.start))
    results: Counter[str] = Counter()
    unexplained = []
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="draco-mutants-") as folder:
        scratch = Scratch(folder, patience)
        passed, said = scratch.tests(
            " ".join(dict.fromkeys(" ".join(mutant.tests() for mutant in drawn).split())), None
        )
        if not passed:
            sys.exit(f"the tests fail without a mutant: {said}")
        for i, mutant in enumerate(drawn):
            start = time.monotonic()
            result, said = scratch.judge(mutant)
            if i + 1 == len(drawn) or drawn[i + 1].file != mutant.file:
                scratch.restore(mutant.file)
            before, after = mutant.lines()
            results[result] += 1
            if result == SURVIVED and mutant.equivalent() is None:
                unexplained.append(mutant)
            why = mutant.equivalent() if result == SURVIVED else said
            click.echo(f"{mutant.file}:{mutant.line()}: {result} in {time.monotonic() - start:.0f} s ({why or said})")
            click.echo(f"  - {before}\n  + {after}")
    summary = ", ".join(f"{results[result]} {result}" for result in (KILLED, SURVIVED, BROKEN))
    click.echo(f"{len(drawn)} of {len(every)} mutants in {time.monotonic() - begin:.0f} s: {summary}; seed {seed}")
    for mutant in unexplained:
        click.echo(f"not known to be equivalent: {mutant.file}:{mutant.line()}: {mutant.lines()[1]}")
    sys.exit(bool(unexplained))


if __name__ == "__main__":
    main()

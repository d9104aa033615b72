"""README and docs: every Python block runs, every command exists, every link and name leads somewhere.

The Python blocks of a page run in order, in one namespace. The pages in `RANKS` run on connected ranks, all of them in
the same processes, after the code that stands here for what the reader's script has. Of a block of ``diff`` the new
side runs. The fence of a block may have attributes behind its language::

    ```python {.no-test}    the block is shown and not run
    ```python {.new-run}    a new script begins: the page's first code runs again, with a new model
    ```diff {.from-a .makes-b}   not run: applied to examples/a.py it makes examples/b.py, which a test of its own runs
"""

import importlib
import os
import re
import shlex
import textwrap
import traceback
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from draco_ext.testing.local import run_local

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
WORKERS = 6

# What a script that trains on ranks has before the lines that a page shows.
NET = """
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, TensorDataset
import draco_ext

rank, workers = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
data = TensorDataset(torch.randn(180, 64), torch.arange(180) % 10)
net = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
loss_fn = nn.CrossEntropyLoss()
optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
"""
MODEL = """
model = DistributedDataParallel(net)
code = draco_ext.RepetitionCode(workers, adversaries=1)
batches = draco_ext.RedundantBatchSampler(len(data), code, batch_size=90, rank=rank, seed=0)
loader = DataLoader(data, batch_sampler=batches)
"""
STEPS = """
guard = draco_ext.protect(model, code)
for x, y in loader:
    optimizer.zero_grad()
    loss_fn(model(x), y).backward()
    optimizer.step()
"""
# What nanoGPT's loop has in "Adopt".
LOOPS = """
from contextlib import nullcontext

DDP = DistributedDataParallel
gradient_accumulation_steps, max_iters, iter_num = 2, 3, 0
ctx, scaler = nullcontext(), torch.amp.GradScaler("cpu", enabled=False)


class Loss(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net

    def forward(self, x, y):
        logits = self.net(x)
        return logits, loss_fn(logits, y)


def get_batch(split):
    chosen = torch.randint(len(data), (8,))
    return data[chosen]


model = Loss()
loader = DataLoader(data, 15)
"""
RANKS = {
    "README.md": NET,
    "docs/tutorial.md": NET,
    "docs/howto/adopt.md": NET + LOOPS,
    "docs/howto/fsdp.md": NET,
    "docs/howto/failures.md": NET + MODEL,
    "docs/howto/metrics.md": NET + MODEL + STEPS,
    "docs/howto/checkpoints.md": NET + MODEL + STEPS,
}
# The same for pages that need no ranks.
ALONE = {
    "docs/howto/own-loop.md": """
import torch
steps, apply = 2, lambda gradient: None
gradients = lambda step, parts: torch.stack([torch.full((8,), 1.0 + part + step) for part in parts])
""",
}

FENCE = re.compile(
    r"^(?P<indent> *)```(?P<language>[\w-]*) *(?:\{(?P<attributes>[^}]*)\})?\n(?P<text>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass
class Block:
    """A fenced block of a page: where its text begins, its language, its attributes."""

    page: str
    line: int
    language: str
    attributes: list[str]
    text: str

    @property
    def makes(self):
        """The script that a diff makes of another one, with that one's name."""
        named = dict(attribute[1:].split("-", 1) for attribute in self.attributes if "-" in attribute)
        return (named["from"], named["makes"]) if "makes" in named else None

    def code(self):
        """Return what is to run, with the page's line numbers in tracebacks; of a diff the new side."""
        text = self.text
        if self.language == "diff":
            text = "".join(new for _, new in hunks(text))
        return compile("\n" * (self.line - 1) + text, str(ROOT / self.page), "exec")


def blocks(page):
    text = (ROOT / page).read_text()
    for match in FENCE.finditer(text):
        yield Block(
            page,
            text[: match.start("text")].count("\n") + 1,
            match["language"],
            (match["attributes"] or "").split(),
            textwrap.dedent(match["text"]),
        )


def hunks(text):
    """Return the old and the new side of each hunk of a diff; a line with @@ parts them."""
    for hunk in re.split(r"^@@.*\n", text, flags=re.MULTILINE):
        lines = hunk.splitlines(keepends=True)
        sides = (" -\n", " +\n")
        yield tuple(textwrap.dedent("".join(x[1:] or "\n" for x in lines if x[:1] in kept)) for kept in sides)


def runnable(page):
    kept = [b for b in blocks(page) if b.language in ("python", "diff") and ".no-test" not in b.attributes]
    return [b for b in kept if not b.makes]


def run_page(page, first):
    """Run a page's blocks, after the code that comes first."""
    space = {"__name__": "__main__"}
    exec(first, space)
    for block in runnable(page):
        if ".new-run" in block.attributes:
            exec(first, space)
        exec(block.code(), space)


def run_pages_on_rank(rank, report, folder):
    """Run the pages of `RANKS` one after the other, and report each that is done, or what went wrong."""
    torch.set_num_threads(1)  # of every rank: they share the machine
    for page, first in RANKS.items():
        place = Path(folder, page.replace("/", "-"))
        place.mkdir(exist_ok=True)
        os.chdir(place)
        try:
            run_page(page, first)
        except Exception:
            report((page, traceback.format_exc()))
            raise
        report((page, None))


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory):
    """What became of each page of `RANKS`; those behind one that fails are not run."""
    results = {}
    try:
        for page, problem in run_local(run_pages_on_rank, WORKERS, str(tmp_path_factory.mktemp("pages"))):
            results[page] = problem
    except Exception as error:
        page = next(page for page in RANKS if results.get(page, "") is not None)
        results.setdefault(page, str(error))
    return results


@pytest.mark.parametrize("page", RANKS)
def test_blocks_on_ranks(page, on_ranks):
    if page not in on_ranks:
        pytest.fail("not run, since a page before it has failed")
    assert on_ranks[page] is None, on_ranks[page]


@pytest.mark.parametrize("page", [name for name in NAMES if name not in RANKS and runnable(name)])
def test_blocks(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page(page, ALONE.get(page, ""))


def test_blocks_that_are_not_run_are_files():
    """Each block that is not run includes a file of the repository, which a test of its own runs."""
    hidden = [b for name in NAMES for b in blocks(name) if ".no-test" in b.attributes]
    for block in hidden:
        # In this form, since `ruff format` takes the one with a quoted name for Python.
        included = re.fullmatch(r"--8<--\n(examples/\w+\.py)\n--8<--\n", block.text)
        assert included, f"{block.page}:{block.line}"
        assert (ROOT / included[1]).is_file()


def test_every_fence_has_a_known_language():
    """A block without one would be neither run nor checked."""
    known = {"python", "diff", "bash", "text"}
    other = [f"{b.page}:{b.line}" for name in NAMES for b in blocks(name) if b.language not in known]
    assert not other
    for name in NAMES:
        fences = re.findall(r"^ *```", (ROOT / name).read_text(), re.MULTILINE)
        assert len(fences) == 2 * len(list(blocks(name))), name


def apply(diff, script):
    for hunk in re.split(r"^@@.*\n", diff.text, flags=re.MULTILINE):
        lines = hunk.splitlines(keepends=True)
        old, new = ("".join(line[1:] or "\n" for line in lines if line[:1] in kept) for kept in (" -\n", " +\n"))
        assert script.count(old) == 1, f"{diff.page}:{diff.line} does not apply:\n{old}"
        script = script.replace(old, new)
    return script


def test_diffs_make_the_examples():
    """All but the first line, which says what a script is."""
    diffs = [block for name in NAMES for block in blocks(name) if block.makes]
    assert len(diffs) == 3
    for diff in diffs:
        before, after = ((ROOT / f"examples/{name}.py").read_text() for name in diff.makes)
        assert apply(diff, before).splitlines()[1:] == after.splitlines()[1:]


def test_tutorial_makes_the_protected_example():
    """The tutorial's first diff, applied to the plain script, is the protected one but for imports no longer needed."""
    script = (ROOT / "examples/ddp_digits.py").read_text()
    diffs = [block for block in blocks("docs/tutorial.md") if block.language == "diff"]
    assert len(diffs) == 3
    made = []
    for diff in diffs:
        if diff is diffs[-1]:  # begins with the plain script again
            script = (ROOT / "examples/ddp_digits.py").read_text()
        script = apply(diff, script)
        made.append(script)
    body = [re.sub(r"^(import|from) .*\n|^\n", "", text, flags=re.MULTILINE) for text in made]
    protected = (ROOT / "examples/ddp_digits_protected.py").read_text()
    assert body[0] == re.sub(r"^(import|from) .*\n|^\n", "", protected, flags=re.MULTILINE)
    for text in made[1:]:
        assert "for step in guard.steps(loader):" in text
        compile(text, "made", "exec")


# ------------------------------------------------------------------------------------------------ commands


def commands():
    """The commands of the pages' shell blocks, and those of `draco` within their text, each with its place."""
    for name in NAMES:
        text = (ROOT / name).read_text()
        for block in blocks(name):
            if block.language == "bash":
                for number, line in enumerate(block.text.splitlines()):
                    for command in re.split(r"&&|;", line.split(" #")[0]):
                        yield f"{name}:{block.line + number}", command.strip()
        for match in re.finditer(r"`(?P<command>(?:draco|torchrun|pytest|bash|python) [^`\n]+)`", text):
            for command in match["command"].split("&&"):
                yield f"{name}:{text[: match.start()].count(chr(10)) + 1}", command.strip()


COMMANDS = [(place, command) for place, command in commands() if command]


def test_commands_are_found():
    assert len(COMMANDS) > 30
    assert {command.split()[0] for _, command in COMMANDS} > {"draco", "pip", "pytest", "torchrun", "bash"}


@pytest.mark.parametrize("command", sorted({command for _, command in COMMANDS}))
def test_commands(command):
    """The program, its options and the files named exist."""
    place = next(place for place, other in COMMANDS if other == command)
    words = shlex.split(command)
    while words and (words[0] == "export" or "=" in words[0]):
        words.pop(0)
    if not words:
        return
    program, *arguments = words
    if program == "torchrun" and "-m" in arguments:
        module = arguments.index("-m") + 1
        assert arguments[module] == "draco_ext.cli", place
        program, arguments = "draco", arguments[module + 1 :]
    if program == "draco":
        check_draco(arguments, place)
    elif program == "pip":
        extras = re.findall(r"\.\[(\w+)\]", command)
        declared = (ROOT / "pyproject.toml").read_text()
        assert all(re.search(rf"^{extra} = \[", declared, re.MULTILINE) for extra in extras), place
    elif program == "cd":
        assert (ROOT / arguments[0]).is_dir(), place
    elif program in ("pytest", "bash", "python"):
        files = [word for word in arguments if re.search(r"/|\.py$|\.sh$", word)] or arguments[:1]
        assert all((ROOT / file.split("::")[0]).exists() for file in files if not file.startswith("-")), place
    elif program == "torchrun":
        [script] = [word for word in arguments if word.endswith(".py")]
        if script != "digits.py":  # the file that the tutorial has its reader make
            text = (ROOT / "examples" / script).read_text()
            assert all(f'"{word}"' in text for word in arguments[arguments.index(script) :] if word[:2] == "--"), place
    else:
        assert program == "mkdocs", f"{place}: nobody checks {program}"


def check_draco(arguments, place):
    """Parse the arguments as the command does, without running it."""
    from draco_ext.cli.commands import draco

    if arguments[0].isupper() or arguments == ["--version"]:  # COMMAND stands for any
        return
    name, *options = arguments
    assert name in draco.commands, f"{place}: draco has no command {name}"
    if options and "--help" not in options:
        draco.commands[name].make_context(name, options)


def test_every_command_has_a_section():
    from draco_ext.cli.commands import draco

    sections = re.findall(r"^## draco (\w+)$", (ROOT / "docs/api/command-line.md").read_text(), re.MULTILINE)
    assert sorted(sections) == sorted(draco.commands)


# ------------------------------------------------------------------------------------------------ links and names


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def slug(heading):
    return re.sub(r"[\s_]+", "-", re.sub(r"[^\w\s-]", "", heading.strip().lower())).strip("-")


def test_links_of_readme():
    """mkdocs checks those between pages."""
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", (ROOT / "README.md").read_text())
    assert len(links) > 15
    for path, anchor in links:
        target = ROOT / path
        assert target.exists() or path == "CONTRIBUTING.md", path
        if anchor and target.exists():
            assert anchor in map(slug, re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)), (path, anchor)


def test_every_public_name_has_an_entry():
    import draco_ext

    entries = set()
    for page in (ROOT / "docs/api").glob("*.md"):
        entries |= set(re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE))
    assert {f"draco_ext.{name}" for name in draco_ext.__all__ if name != "__version__"} <= entries
    for entry in entries:
        if entry.startswith("draco_ext.integrations."):  # imports a framework
            module, _, name = entry.rpartition(".")
            text = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text()
            assert re.search(rf"^(?:def|class) {name}\b", text, re.MULTILINE), entry
            continue
        try:
            importlib.import_module(entry)
        except ModuleNotFoundError:
            module, _, name = entry.rpartition(".")
            assert hasattr(importlib.import_module(module), name), entry


def test_names_in_architecture():
    """What the page says lies in a file lies there."""
    text = (ROOT / "docs/architecture.md").read_text()
    places = re.findall(r"`((?:draco_ext|csrc)/[\w/.]+\.\w+)(?::(\w+))?`", text)
    assert len([name for _, name in places if name]) >= 10
    for path, name in places:
        assert (ROOT / path).is_file(), path
        if name:
            assert re.search(rf"^\s*(?:def|class) {name}\b", (ROOT / path).read_text(), re.MULTILINE), (path, name)
    for folder in re.findall(r"`((?:draco_ext|csrc|bench|tools|python_tests|examples|docs)/(?:\w+/)*)`", text):
        assert (ROOT / folder).is_dir(), folder

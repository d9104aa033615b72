"""The style of docstrings: the first line is an imperative or a noun phrase, see CONTRIBUTING.md."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
FILES = sorted(
    path
    for folder in ("draco_ext", "bench", "tools", "csrc", "setup.py")
    for path in ([ROOT / folder] if folder.endswith(".py") else (ROOT / folder).rglob("*.py"))
)
# A docstring that begins with one of these is a fragment, or hides its subject.
NOT_FIRST = (
    *("What", "Whether", "How", "Of", "To", "Where", "When", "Which", "Who", "Whom", "Whose", "By", "From", "In"),
    *("For", "Those", "If", "On", "At", "Before", "After", "With", "Without", "That", "Everybody", "Everybody's"),
)
# Functions begin with the imperative of these.
THIRD_PERSON = (
    *("Adds", "Applies", "Begins", "Builds", "Calls", "Checks", "Collects", "Combines", "Compares", "Computes"),
    *("Copies", "Counts", "Cuts", "Decodes", "Divides", "Draws", "Encodes", "Ends", "Fails", "Finds", "Flips"),
    *("Forgets", "Gathers", "Gives", "Goes", "Has", "Joins", "Looks", "Makes", "Measures", "Moves", "Prints", "Puts"),
    *("Raises", "Reads", "Records", "Registers", "Replaces", "Returns", "Runs", "Says", "Seeds", "Sends", "Sets"),
    *("Starts", "Swaps", "Takes", "Tells", "Tests", "Times", "Votes", "Waits", "Writes", "Yields"),
)


def complaints(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if docstring := ast.get_docstring(node):
            word = docstring.split()[0].rstrip(",.:;")
            is_function = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
            if word in NOT_FIRST or (is_function and word in THIRD_PERSON):
                found.append(f"{getattr(node, 'lineno', 1)}: {docstring.splitlines()[0]}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_first_words(path):
    assert complaints(path.read_text()) == []


def test_bad_first_words_are_found():
    source = '"""What it is."""\n\n\nclass A:\n    """Votes."""\n\n    def f(self):\n        """Returns x."""\n'
    assert complaints(source) == ["1: What it is.", "7: Returns x."]
    assert complaints('def f():\n    """Return whether x."""\n\n\ndef g():\n    pass\n') == []

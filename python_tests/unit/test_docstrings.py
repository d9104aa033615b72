"""The style of sources: first words of docstrings, see CONTRIBUTING.md, and names that have one meaning."""

import ast
from collections import Counter
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


def bound_twice(source: str) -> list[str]:
    """Names that a module binds again, so that what was written for the first meaning silently uses the second."""
    names = Counter()
    for node in ast.parse(source).body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if not any("register_" in ast.unparse(each) for each in node.decorator_list):
                names[node.name] += 1
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names.update(
                each.id
                for target in targets
                for each in ast.walk(target)
                if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store)
            )
    return sorted(name for name, count in names.items() if count > 1)


@pytest.mark.parametrize("folder", ["draco_ext", "python_tests", "bench", "examples", "tools", "csrc"])
def test_names_of_modules_have_one_meaning(folder):
    found = {str(path.relative_to(ROOT)): bound_twice(path.read_text()) for path in (ROOT / folder).rglob("*.py")}
    assert not {path: names for path, names in found.items() if names}


def test_names_with_two_meanings_are_found():
    assert bound_twice("A = 1\n\n\ndef f():\n    A = 2\n\n\nA, b = 3, 4\n\n\ndef b():\n    pass\n") == ["A", "b"]

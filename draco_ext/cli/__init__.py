"""The ``draco`` command: train, plan, doctor, report, bench."""

from __future__ import annotations

import importlib.util
import sys

# Modules of the extra "demo", which the library itself does not need.
_NEEDED = ("click", "matplotlib", "rich", "sklearn")


def main() -> None:
    """Run the command line, or print in one line which extra it needs."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f'draco needs {", ".join(missing)}: install with pip install "draco_ext[demo]"')
    from draco_ext.cli.commands import draco

    draco(prog_name="draco")

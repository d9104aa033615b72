"""A search for torch's folder and version that does not import torch."""

import argparse
import importlib.util
import os
import re
import site
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

OLDEST = (2, 11)
STREAMS = (2, 13)  # from here on the stable ABI tells CUDA's current stream, and CUDA builds use it (CMakeLists.txt)
DEFAULT = "torch==2.13.*"  # what is installed where there is no torch yet


class Torch(NamedTuple):
    folder: Path
    version: str
    cuda: str | None  # CUDA version that torch was built with

    @property
    def release(self) -> tuple[int, ...]:
        return tuple(int(part) for part in re.findall(r"\d+", self.version)[:2])


def oldest_to_run_on(torch: Torch, cuda: bool) -> tuple[int, int]:
    """Return the oldest torch that runs what was built with this one."""
    return STREAMS if cuda and torch.release >= STREAMS else OLDEST


def _read(folder: Path) -> Torch | None:
    try:
        text = (folder / "version.py").read_text()
    except OSError:
        return None
    version = re.search(r"__version__\s*=\s*['\"]([^'\"]+)", text)
    cuda = re.search(r"^cuda\b[^=]*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
    return Torch(folder, version[1], cuda and cuda[1]) if version else None


def installed() -> Torch | None:
    """Return the torch of the environment that will use the wheel, which build isolation does not hide.

    pip builds with the Python of that environment. uv builds with one of its own, and runs this file by that
    environment's Python, so that it looks there.
    """
    own = _installed_here()
    if own is None and (python := uv_target()):
        said = subprocess.run([python, "-I", __file__], stdout=subprocess.PIPE, text=True, check=False).stdout.strip()
        return _read(Path(said)) if said else None
    return own


def uv_target() -> str | None:
    """Return the Python for which uv builds, or None where it is not uv that builds.

    uv sets VIRTUAL_ENV to the build's own environment, but UV names its program, which tells what Python it takes where
    it was called: the active environment, `.venv`, or what its arguments say.
    """
    parent = Path("/proc") / str(os.getppid())
    try:
        uv = os.environ["UV"]
        if not (parent / "exe").samefile(uv):
            return None
        arguments = _split(parent / "cmdline")
        environment = dict(pair.split("=", 1) for pair in _split(parent / "environ"))
        where = (parent / "cwd").resolve()
    except (KeyError, OSError):
        return None
    find = [uv, "python", "find", "--no-python-downloads", *_arguments_about_python(arguments)]
    found = subprocess.run(find, cwd=where, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    return found.stdout.strip() or None


def _split(file: Path) -> list[str]:
    return [os.fsdecode(part) for part in file.read_bytes().split(b"\0") if part]


def _arguments_about_python(arguments: list[str]) -> list[str]:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("-p", "--python")
    parser.add_argument("--system", action="store_true")
    known, _ = parser.parse_known_args(arguments[1:])
    return ["--system"] * known.system + [known.python] * (known.python is not None)


def _installed_here() -> Torch | None:
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if site.ENABLE_USER_SITE is not False:
        folders.append(site.getusersitepackages())
    config = Path(sys.prefix) / "pyvenv.cfg"
    if config.exists() and re.search(r"system-site-packages\s*=\s*true", config.read_text()):
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        folders += [sysconfig.get_path(name, vars=base) for name in ("purelib", "platlib")]
    torches = (_read(Path(folder) / "torch") for folder in folders)
    return next(filter(None, torches), None)


def find() -> Torch | None:
    """Return the torch to build against: the installed one, else the one in the build environment."""
    if torch := installed():
        return torch
    spec = importlib.util.find_spec("torch")
    return _read(Path(spec.origin).parent) if spec and spec.origin else None


if __name__ == "__main__" and (_torch := _installed_here()):
    print(_torch.folder)

"""Finds torch's folder and version without importing it."""

import importlib.util
import re
import site
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
    """The oldest torch that runs what was built with this one."""
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
    """The torch of the environment that will use the wheel; build isolation does not hide it."""
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    if site.ENABLE_USER_SITE is not False:
        folders.append(site.getusersitepackages())
    config = Path(sys.prefix) / "pyvenv.cfg"
    if config.exists() and re.search(r"system-site-packages\s*=\s*true", config.read_text()):
        base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
        folders += [sysconfig.get_path(name, vars=base) for name in ("purelib", "platlib")]
    return next((torch for folder in folders if (torch := _read(Path(folder) / "torch"))), None)


def find() -> Torch | None:
    """The torch to build against: the installed one, else the one in the build environment."""
    if torch := installed():
        return torch
    spec = importlib.util.find_spec("torch")
    return _read(Path(spec.origin).parent) if spec and spec.origin else None

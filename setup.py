"""The build, which calls CMake; CMakeLists.txt has the sources and flags."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc" / "pep517"))
import torch_at  # noqa: E402


def stop(sentence: str) -> None:
    sys.exit(f"draco_ext: {sentence}")


def find_torch() -> torch_at.Torch:
    torch = torch_at.find()
    oldest = ".".join(map(str, torch_at.OLDEST))
    if torch is None:
        stop(f"no torch was found to build against; install torch {oldest} or newer first.")
    if torch.release < torch_at.OLDEST:
        stop(f"torch {torch.version} in {torch.folder} is too old; {oldest} or newer is needed.")
    return torch


def cuda_compiler(torch: torch_at.Torch) -> str | None:
    """Return the nvcc to use, or None for a CPU-only build; DRACO_CUDA=auto|on|off decides."""
    wish = os.environ.get("DRACO_CUDA", "auto").lower()
    if wish not in ("auto", "on", "off"):
        stop(f"DRACO_CUDA must be auto, on or off, got {wish!r}.")
    if wish == "off" or (wish == "auto" and torch.cuda is None):
        return None
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc", path=f"{home}/bin") or shutil.which("nvcc")
    if nvcc is None and wish == "on":
        stop("DRACO_CUDA=on needs nvcc, which was not found; put it on PATH or set CUDA_HOME.")
    if nvcc is not None and torch.cuda is None and torch.release < torch_at.STREAMS:
        newest = ".".join(map(str, torch_at.STREAMS))
        stop(f"DRACO_CUDA=on needs a torch built with CUDA, or torch {newest} or newer; got {torch.version}.")
    return nvcc


def check_compiler() -> None:
    wanted = os.environ.get("CXX")
    names = [wanted.split()[0]] if wanted else ["c++", "g++", "clang++"]
    if not any(map(shutil.which, names)):
        looked = " or ".join(names)
        stop(f"no C++ compiler was found (looked for {looked}); install one, e.g. Debian's g++.")


class CMakeBuild(build_ext):
    """A command that builds draco_ext._C with CMake and Ninja."""

    def build_extension(self, ext: Extension) -> None:
        torch = find_torch()
        check_compiler()
        nvcc = cuda_compiler(torch)
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        # They name programs of an earlier build's environment, which may be gone. --fresh would remove objects, too.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        for found in build.glob("CMakeFiles/[0-9]*"):
            shutil.rmtree(found)
        configure = [
            "cmake", "-S", ROOT, "-B", build, "-G", "Ninja",
            f"-DCMAKE_BUILD_TYPE={'Debug' if self.debug else 'Release'}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DDRACO_TORCH_DIR={torch.folder}",
            f"-DDRACO_TORCH_VERSION={torch.version}",
            f"-DDRACO_OUTPUT={target}",
            f"-DDRACO_CUDA={'ON' if nvcc else 'OFF'}",
            f"-DDRACO_SANITIZE={os.environ.get('DRACO_SANITIZE', '')}",
            *([f"-DCMAKE_CUDA_COMPILER={nvcc}"] if nvcc else []),
        ]  # fmt: skip
        try:
            subprocess.run([*map(str, configure)], check=True)
            subprocess.run(["cmake", "--build", str(build)], check=True)
        except subprocess.CalledProcessError:
            stop("the C++ build failed; the compiler's own messages stand above.")


def dependencies() -> list[str]:
    # A wheel built against one torch runs on every later one (stable ABI). Where there is none yet,
    # ask for the tested series rather than for whatever is newest.
    torch = torch_at.installed()
    wanted = torch_at.DEFAULT
    if torch is not None:
        oldest = torch_at.oldest_to_run_on(torch, cuda=cuda_compiler(torch) is not None)
        wanted = f"torch>={'.'.join(map(str, oldest))}"
    return [wanted, "numpy>=1.24"]


setup(
    ext_modules=[Extension("draco_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    install_requires=dependencies(),
)

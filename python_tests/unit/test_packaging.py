"""The build's own decisions: which torch, which compiler, CUDA or not; each stop is one clear sentence."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Runs setup.py with another idea of where packages are installed.
PRELUDE = """
import runpy, site, sys, sysconfig
sysconfig_get_path = sysconfig.get_path
if {site!r}:
    sysconfig.get_path = lambda name, *a, **k: (
        {site!r} if name in ("purelib", "platlib") else sysconfig_get_path(name, *a, **k))
    site.ENABLE_USER_SITE = False
sys.argv = ["setup.py", "build_ext", "--build-temp", {out!r}, "--build-lib", {out!r}]
runpy.run_path("setup.py", run_name="__main__")
"""


def build(tmp_path, site="", **env):
    pytest.importorskip("setuptools")
    code = PRELUDE.format(site=str(site), out=str(tmp_path / "build"))
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "CUDA_HOME", "CUDACXX")}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**environment, **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def fake_torch(folder, version, cuda="None"):
    (folder / "torch").mkdir(parents=True)
    (folder / "torch" / "version.py").write_text(f"__version__ = '{version}'\ncuda: str | None = {cuda}\n")
    return folder


def sentence(run):
    assert run.returncode != 0
    lines = [line for line in run.stderr.splitlines() if line.startswith("draco_ext: ")]
    assert len(lines) == 1, run.stderr
    assert "Traceback" not in run.stderr
    return lines[0]


def test_too_old_torch(tmp_path):
    run = build(tmp_path, fake_torch(tmp_path / "site", "2.10.1+cpu"))
    assert "torch 2.10.1+cpu" in sentence(run)
    assert "is too old; 2.11 or newer is needed" in sentence(run)


def test_missing_compiler(tmp_path):
    run = build(tmp_path, PATH=str(tmp_path))
    assert "no C++ compiler was found (looked for c++ or g++ or clang++)" in sentence(run)
    assert "looked for no-such-cxx" in sentence(build(tmp_path, CXX="no-such-cxx -O2"))


def test_cuda_without_nvcc(tmp_path):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "c++").symlink_to(shutil.which("c++"))
    run = build(tmp_path, DRACO_CUDA="on", PATH=str(tools), CUDA_HOME=str(tmp_path))
    assert "DRACO_CUDA=on needs nvcc, which was not found" in sentence(run)


def test_cuda_for_an_old_torch_without_it(tmp_path):
    (tmp_path / "nvcc").touch(mode=0o755)
    torch = fake_torch(tmp_path / "site", "2.12.0+cpu")
    run = build(tmp_path, torch, DRACO_CUDA="on", CUDACXX=str(tmp_path / "nvcc"))
    assert "needs a torch built with CUDA, or torch 2.13 or newer; got 2.12.0+cpu" in sentence(run)


def test_unknown_cuda_wish(tmp_path):
    assert "DRACO_CUDA must be auto, on or off, got 'yes'" in sentence(build(tmp_path, DRACO_CUDA="yes"))


def test_unknown_architectures(tmp_path):
    pytest.importorskip("setuptools")
    if shutil.which("nvcc", path="/usr/local/cuda/bin") is None and shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    run = build(tmp_path, DRACO_CUDA="on", TORCH_CUDA_ARCH_LIST="9.0 hopper")
    assert run.returncode != 0
    assert "TORCH_CUDA_ARCH_LIST: got 'hopper', expected numbers such as '8.0 9.0+PTX'" in " ".join(run.stderr.split())


def test_cuda_wheels_ask_for_the_torch_whose_interface_they_use(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "csrc" / "pep517"))
    import torch_at

    def oldest(version, cuda):
        return torch_at.oldest_to_run_on(torch_at.Torch(Path("torch"), version, None), cuda)

    assert oldest("2.15.1+cpu", False) == (2, 11)
    assert oldest("2.12.0+cu130", True) == (2, 11)
    assert oldest("2.13.0+cu130", True) == (2, 13)
    assert oldest("2.15.0+cpu", True) == (2, 13)


def test_finds_torch_without_importing_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "csrc" / "pep517"))
    import torch_at

    def installed_in(folder):
        monkeypatch.setattr(torch_at.sysconfig, "get_path", lambda *args, **kwargs: str(folder))
        monkeypatch.setattr(torch_at.site, "ENABLE_USER_SITE", False)
        return torch_at.installed()

    assert installed_in(tmp_path) is None
    found = installed_in(fake_torch(tmp_path / "gpu", "2.13.0+cu130", "'13.0'"))
    assert found.release == (2, 13)
    assert found.cuda == "13.0"
    assert installed_in(fake_torch(tmp_path / "cpu", "2.15.0a0+git1")).cuda is None
    assert torch_at.find().version == "2.15.0a0+git1"


def test_asks_for_torch_only_where_there_is_none(monkeypatch):
    pytest.importorskip("setuptools")
    monkeypatch.syspath_prepend(str(ROOT / "csrc" / "pep517"))
    import backend
    import torch_at

    monkeypatch.setattr(torch_at, "installed", lambda: None)
    assert backend.get_requires_for_build_wheel() == [torch_at.DEFAULT]
    monkeypatch.setattr(torch_at, "installed", lambda: torch_at.Torch(Path("torch"), "2.12.0", None))
    assert backend.get_requires_for_build_wheel() == []
    assert backend.get_requires_for_build_editable() == []

"""The build's own decisions: which torch, which compiler, CUDA or not; each stop is one clear sentence."""

import ast
import os
import re
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


# A backend that writes down what it finds, and builds nothing: so that uv needs no package index.
UV_BACKEND = """
import torch_at
from pathlib import Path

def get_requires_for_build_wheel(config_settings=None):
    torch = torch_at.installed()
    Path(__file__).with_name("found").write_text(torch.version if torch else "none")
    raise SystemExit("enough")
"""


@pytest.fixture(scope="module")
def uv():
    path = shutil.which("uv")
    if path is None:
        pytest.skip("no uv")
    return path


@pytest.fixture
def uv_project(uv, tmp_path):
    """A project, beside it an environment with a torch in it, `env`, and one without, `bare`."""
    project = tmp_path / "project"
    project.mkdir()
    shutil.copy(ROOT / "csrc" / "pep517" / "torch_at.py", project)
    (project / "probe.py").write_text(UV_BACKEND)
    (project / "pyproject.toml").write_text(
        '[build-system]\nrequires = []\nbuild-backend = "probe"\nbackend-path = ["."]\n'
        '[project]\nname = "probe"\nversion = "1"\n'
    )
    for name in ("env", "bare"):
        subprocess.run([uv, "venv", "--quiet", "--offline", "--python", sys.executable, tmp_path / name], check=True)
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    fake_torch(site, "2.13.0+cpu")
    return project


@pytest.mark.parametrize(
    ("active", "where", "arguments", "found"),
    [
        ("env", ".", [], "2.13.0+cpu"),
        ("bare", ".", [], "none"),
        (None, ".", ["--python", "env"], "2.13.0+cpu"),
        ("bare", ".", ["-p", "env/bin/python"], "2.13.0+cpu"),
        ("env", ".", ["--python=bare"], "none"),
        (None, "below", [], "2.13.0+cpu"),
    ],
)
def test_uv_builds_against_the_torch_of_the_environment_it_installs_into(
    uv, uv_project, tmp_path, active, where, arguments, found
):
    (tmp_path / ".venv").symlink_to("env")  # as uv makes it: found from this folder and those below
    (tmp_path / "below").mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in ("VIRTUAL_ENV", "CONDA_PREFIX", "PYTHONPATH")}
    if active:
        environment["VIRTUAL_ENV"] = str(tmp_path / active)
    run = subprocess.run(
        [uv, "pip", "install", "--offline", *arguments, str(uv_project)],
        cwd=tmp_path / where,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "enough" in run.stderr, run.stderr
    assert (uv_project / "found").read_text() == found


def test_another_program_below_uv_does_not_build_for_its_environment(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "csrc" / "pep517"))
    import torch_at

    monkeypatch.setenv("UV", shutil.which("true"))  # inherited: the parent of this process is another program
    assert torch_at.uv_target() is None
    monkeypatch.delenv("UV")
    assert torch_at.uv_target() is None


def test_stub_names_what_the_compiled_module_has():
    from draco_ext._extension import _C

    stub = ast.parse((ROOT / "draco_ext" / "_C.pyi").read_text()).body
    typed = {node.target.id: node.annotation.id for node in stub if isinstance(node, ast.AnnAssign)}
    functions = {node.name: len(node.args.args) for node in stub if isinstance(node, ast.FunctionDef)}
    names = {name for name in dir(_C) if not name.startswith("_")}
    assert names == typed.keys() | functions.keys()
    for name, expected in typed.items():
        assert type(getattr(_C, name)).__name__ == expected
    for name, arguments in functions.items():
        assert getattr(_C, name).__doc__.splitlines()[0].count(": ") == arguments


@pytest.mark.parametrize("stage", re.findall(r"^stage_(\w+)\(\)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE))
def test_every_stage_of_ci_is_a_session_and_is_explained(stage):
    if stage == "tests":  # the three layers together
        return
    assert f'"{stage}"' in (ROOT / "noxfile.py").read_text()
    assert f"`{stage}`" in (ROOT / "CONTRIBUTING.md").read_text()

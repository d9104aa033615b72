"""The stages of `.ci/run` as nox sessions: `nox -s lint` is `bash .ci/run lint`. Each stage installs what it needs."""

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "types", "unit"]

STAGES = (
    "lint",
    "types",
    "unit",
    "ranks",
    "kernels",
    "integrations",
    "sanitize",
    "bench",
    "cuda",
    "sdist",
    "docs",
    "oldest",
)


def _add(stage: str) -> None:
    @nox.session(name=stage)
    def run(session: nox.Session) -> None:
        session.run("bash", ".ci/run", stage, *session.posargs, external=True)


for _stage in STAGES:
    _add(_stage)

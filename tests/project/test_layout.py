"""The layers of the packages hold, and the contract that checks them can fail."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LINTER = Path(sys.executable).parent / "lint-imports"


def linted(source):
    """Run the contracts over a folder that holds the package."""
    return subprocess.run(
        [str(LINTER), "--config", str(ROOT / "pyproject.toml"), "--no-cache", "--no-logo"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(source)},
        cwd=source,
        timeout=120,
    )


@pytest.fixture
def copied(tmp_path):
    shutil.copytree(ROOT / "src" / "qft", tmp_path / "qft", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_no_package_imports_one_above_it(copied):
    done = linted(copied)
    assert done.returncode == 0, done.stdout
    assert "2 kept, 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("file", "line", "contract"),
    [
        ("core/version.py", "from qft.saving.save import save", "A package imports only packages below it"),
        ("ops/bits.py", "def late():\n    import qft.core.version", "A package imports only packages below it"),
        ("core/version.py", "from qft.core.record import Record", "No import cycles within a package"),
    ],
)
def test_the_contracts_fail_when_such_an_import_is_added(copied, file, line, contract):
    if "cycles" in contract:
        record = copied / "qft" / "core" / "record.py"
        record.write_text(record.read_text() + "\nfrom qft.core.version import __version__\n")
    target = copied / "qft" / file
    target.write_text(target.read_text() + f"\n{line}\n")
    done = linted(copied)
    assert done.returncode != 0 and f"{contract} BROKEN" in done.stdout


def test_the_package_is_one_floor_of_rooms():
    entries = [p.name for p in (ROOT / "src" / "qft").iterdir() if p.name != "__pycache__"]
    assert len(entries) <= 18, sorted(entries)
    loose = sorted(n for n in entries if n.endswith(".py"))
    assert loose == ["__init__.py", "errors.py"]


def test_every_package_says_what_it_is_for():
    for file in (ROOT / "src" / "qft").rglob("__init__.py"):
        assert file.read_text(encoding="utf-8").startswith('"""'), file

"""PEFT's own tests of methods over quantized models, with models that `qft.quantize` made; on a CPU.

    python benchmarks/peft_quantization.py --out benchmarks/results/peft_quantization-cpu.json
    python benchmarks/peft_quantization.py --source peft-0.21.2.tar.gz --quantizers nf4 hqq

It takes `tests/test_quantization.py` from the source package of the installed PEFT, which pip downloads where `--source` does
not name it, and runs it once for each quantizer, with the loaders of `peft_quantization_plugin.py`. The assertions and the
options of PEFT's `pyproject.toml` stay as they are, but for coverage and for the warning in `IGNORED`.

Two controls with a fault in them follow: a model whose weights are others than the float model's, and merges that store no
update. Tests that fail there can fail.

The exit status is 1 where a test fails that is not in `EXCLUDED`, and where a control finds no failed test.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import smollm

HERE = Path(__file__).parent
QUANTIZERS = ("nf4", "int8", "hqq", "torchao", "quanto", "reference")
CONTROLS = ("other-weights", "no-update")
TEST = "tests/test_quantization.py"
EXCLUDED = {
    "test_quantization_backend_is_set_and_repr": (
        "it counts layers with an object of PEFT's internal QuantizationBackend; qft's layers dequantize and requantize "
        "through qft.Quantizer"
    )
}
"""Tests about PEFT's internals, by name, with reasons. They run, too: one that passes need not be excluded."""
IGNORED = "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
"""PEFT reads this property of transformers' in `get_peft_model`, and its own options turn the warning into an error."""
LIMIT = 900
"""Seconds for one run of the file."""


class NoSource(RuntimeError):
    """The source package of the installed PEFT cannot be had."""


def find_source(given: Path | None, folder: Path) -> Path:
    """Unpack the source package of the installed PEFT.

    Args:
        given: a folder or a tarball; None downloads it.
        folder: an empty one, for the download and the unpacked files.

    Returns:
        The folder with `tests` and `src`.

    Raises:
        NoSource: pip fails, there is no such test, or the version is not that of the installed PEFT.
    """
    source = _download(folder) if given is None else given
    if not source.is_dir():
        try:
            with tarfile.open(source) as archive:
                archive.extractall(folder / "unpacked", filter="data")
        except (OSError, tarfile.TarError) as error:
            raise NoSource(f"{source} is not a source package: {error}") from error
        source = next((folder / "unpacked").iterdir())
    code = source / "src" / "peft" / "__init__.py"
    if not (source / TEST).is_file() or not code.is_file():
        raise NoSource(f"{source} is not PEFT's source: it needs {TEST} and src/peft/__init__.py")
    found = re.search(r'^__version__ = "(.*)"', code.read_text(encoding="utf-8"), re.MULTILINE)
    if found is None or found[1] != version("peft"):
        raise NoSource(f"{source} is of PEFT {found and found[1]}, and {version('peft')} is installed")
    return source


def _download(folder: Path) -> Path:
    command = [
        sys.executable, "-m", "pip", "download", "--no-binary", ":all:", "--no-deps", "--no-build-isolation",
        "--dest", str(folder), f"peft=={version('peft')}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NoSource(
            f"pip cannot download PEFT's source; name it with --source. {(done.stdout + done.stderr)[-2000:]}"
        )
    return next(folder.glob("peft-*.tar.gz"))


def stage(source: Path, folder: Path) -> Path:
    """Copy PEFT's tests and their options into an empty folder, as a package, which the source package leaves out."""
    shutil.copytree(source / "tests", folder / "tests")
    (folder / "tests" / "__init__.py").touch()
    if (source / "pyproject.toml").is_file():
        shutil.copy(source / "pyproject.toml", folder)
    return folder


def run(staged: Path, quantizer: str, control: str | None = None) -> dict[str, dict[str, str]]:
    """Run PEFT's file over one quantizer.

    Args:
        staged: what `stage` made.
        quantizer: a specification.
        control: a fault that the tests must find.

    Returns:
        Test name without the class and the quantizer → its outcome, and the reason if it did not pass.

    Raises:
        RuntimeError: pytest did not run the tests, or they ran over other models.
    """
    outcomes = staged / "outcomes.json"
    outcomes.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-W", IGNORED, "-p", "no:cacheprovider",
        "-p", "peft_quantization_plugin", "--quantizer", quantizer, "--outcomes", str(outcomes), TEST,
    ]  # fmt: skip
    command += ["--control", control] if control else []
    paths = [str(HERE), str(HERE.parent / "src"), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTEST_ADDOPTS", None)
    done = subprocess.run(command, cwd=staged, env=environment, capture_output=True, text=True, timeout=LIMIT)
    if done.returncode not in (0, 1) or not outcomes.exists():
        raise RuntimeError(f"pytest ended with {done.returncode}: {(done.stdout + done.stderr)[-3000:]}")
    found = json.loads(outcomes.read_text(encoding="utf-8"))
    strangers = [name for name in found if not name.endswith(f"-{quantizer}]")]
    if strangers or not found:
        raise RuntimeError(f"{quantizer}: {len(found)} tests ran, and {len(strangers)} of them over other models")
    return {_short(name, quantizer): outcome for name, outcome in found.items()}


def _short(name: str, quantizer: str) -> str:
    return name.rpartition("::")[2].removesuffix(f"-{quantizer}]") + "]"


def is_excluded(test: str) -> bool:
    """Return whether `EXCLUDED` names this test."""
    return test.partition("[")[0] in EXCLUDED


def summary(quantizer: str, found: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Count outcomes, excluded tests apart, and keep those that did not pass with their reasons."""
    counted = {test: outcome for test, outcome in found.items() if not is_excluded(test)}
    counts = Counter(outcome["outcome"] for outcome in counted.values())
    return {
        "quantizer": quantizer,
        **{kind: counts[kind] for kind in ("passed", "failed", "skipped")},
        "excluded": len(found) - len(counted),
        "tests": found,
    }


def faults(result: dict[str, Any]) -> list[str]:
    """What makes a result unfit, a line each: failed tests, excluded ones that pass, controls in which nothing fails."""
    found = []
    for one in result["runs"]:
        for test, outcome in one["tests"].items():
            if is_excluded(test) != (outcome["outcome"] == "failed"):
                said = "is excluded without need" if is_excluded(test) else outcome["reason"]
                found.append(f"{one['quantizer']}: {test}: {said}")
    for one in result["controls"]:
        if not one["failed"]:
            found.append(f"control {one['control']}: no test fails")
    return found


def measure(source: Path | None, quantizers: Sequence[str], controls: Sequence[str]) -> dict[str, Any]:
    """Run everything, and say what it came to.

    Returns:
        Device, versions and date; the file that was run, and the excluded tests; outcomes by quantizer and control.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / name for name in ("source", "staged")]
        for folder in folders:
            folder.mkdir()
        staged = stage(find_source(source, folders[0]), folders[1])
        result = {
            **smollm.about(),
            "file": TEST,
            "sha256": hashlib.sha256((staged / TEST).read_bytes()).hexdigest(),
            "excluded": EXCLUDED,
            "runs": [],
            "controls": [],
        }
        for quantizer in quantizers:
            result["runs"].append(_told(summary(quantizer, run(staged, quantizer))))
        for control in controls:
            found = summary(quantizers[0], run(staged, quantizers[0], control))
            result["controls"].append(_told({"control": control, **found}))
    return result


def _told(found: dict[str, Any]) -> dict[str, Any]:
    counts = ", ".join(f"{found[kind]} {kind}" for kind in ("passed", "failed", "skipped", "excluded"))
    print(f"{found.get('control', found['quantizer']):16s} {counts}", flush=True)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tests, write the file of results, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--source", type=Path, help="PEFT's source package, as a folder or a tarball; default: download it"
    )
    parser.add_argument("--quantizers", nargs="+", default=QUANTIZERS)
    parser.add_argument("--controls", nargs="*", default=CONTROLS, choices=CONTROLS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(arguments)
    try:
        result = measure(args.source, args.quantizers, args.controls)
    except NoSource as error:
        parser.error(str(error))
    if args.out:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    wrong = faults(result)
    for line in wrong:
        print(line, file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

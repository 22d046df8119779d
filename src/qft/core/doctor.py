"""What works on this machine, what does not, and what to do about it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import io
import json
import os
import platform
import shutil
import sys
import tempfile
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qft.core import devices
from qft.core.console import one_line
from qft.errors import QftError

GIB = 2**30
LITTLE_DISK, LITTLE_MEMORY = 5 * GIB, 2 * GIB
"""Free bytes below which models will hardly be downloaded, or loaded."""
PACKAGES = ("torch", "transformers", "peft", "accelerate", "safetensors", "tokenizers", "huggingface_hub", "triton", "trl",
            "datasets", "bitsandbytes", "flash_attn", "sentencepiece", "tiktoken")  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """Something that does not work, and what to do about it."""

    what: str
    do: str

    def __str__(self) -> str:
        return f"{self.what}: {self.do}"


@dataclass
class Doctor:
    """A machine, as qft sees it; `str()` is a page, problems first, and a notebook shows a card.

    Attributes:
        problems: what keeps something from working that should; empty where all is well.
        versions: package → version, or None where it is not installed.
        device: what qft takes where no device is named.
        devices: an entry a device: "name", "memory" and "free" in bytes where they are known.
        memory: "total" and "free" host memory, bytes.
        quantizers: name → "state" ("works", "ready" where it could not be tried, "missing", "unusable", "fails"), "why", and
            "devices".
        kernels: "triton", "compiler", "cuda" of torch's build → what there is, or None.
        tokenizers: kind → whether transformers can read it.
        disk: "cache" and "temporary" → "path", and "free" in bytes.
        environment: variables that change what qft does → value.
    """

    problems: list[Problem] = field(default_factory=list)
    versions: dict[str, str | None] = field(default_factory=dict)
    device: str = "cpu"
    devices: list[dict[str, Any]] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    quantizers: dict[str, dict[str, Any]] = field(default_factory=dict)
    kernels: dict[str, str | None] = field(default_factory=dict)
    tokenizers: dict[str, bool] = field(default_factory=dict)
    disk: dict[str, dict[str, Any]] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"ok": self.ok, **asdict(self)}

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        lines = [f"{len(self.problems)} problem{'s' * (len(self.problems) != 1)}" if self.problems else "no problems"]
        lines += [f"  {problem.what}\n    → {problem.do}" for problem in self.problems]
        for title, rows in self._sections():
            lines += ["", title]
            width = max((len(name) for name, _ in rows), default=0)
            lines += [f"  {name:<{width}}  {text}".rstrip() for name, text in rows]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        from qft.core.html import html_card

        works = sum(q["state"] in ("works", "ready") for q in self.quantizers.values())
        tiles = [(str(len(self.problems)), "problems"), (self.device, "device"), (str(works), "quantizers ready")]
        return html_card("qft.doctor", tiles, warnings=[f"{p.what} → {p.do}" for p in self.problems], details=str(self))

    def _sections(self) -> list[tuple[str, list[tuple[str, str]]]]:
        found = [(d["name"], _memory(d)) for d in self.devices]
        sections = [
            (f"devices (qft takes {self.device})", found),
            ("host memory", [(k, f"{v / GIB:.1f} GiB") for k, v in self.memory.items()]),
            ("disk", [(k, f"{d['free'] / GIB:.1f} GiB free, {d['path']}") for k, d in self.disk.items()]),
            ("quantizers", [(n, f"{q['state']:<8}  {q['why']}") for n, q in self.quantizers.items()]),
            ("kernels", [(k, v or "none") for k, v in self.kernels.items()]),
            ("tokenizers", [(k, "can be read" if v else "cannot be read") for k, v in self.tokenizers.items()]),
            ("versions", [(k, v or "not installed") for k, v in self.versions.items()]),
            ("environment", list(self.environment.items())),
        ]
        return [(title, rows) for title, rows in sections if rows]


def _memory(device: dict[str, Any]) -> str:
    if "memory" not in device:
        return ""
    free = f", {device['free'] / GIB:.1f} free" if "free" in device else ""
    return f"{device['memory'] / GIB:.1f} GiB{free}"


def doctor() -> Doctor:
    """Look at this machine: devices, memory, packages, and each quantizer by quantizing a small layer with it.

    Takes seconds, since backends' packages are imported. It raises nothing: what cannot be looked at is a problem, too.
    """
    found = Doctor()
    for what, check in (
        ("the versions of packages", _versions),
        ("devices", _devices),
        ("host memory", _host),
        ("disk space", _disk),
        ("kernels and compilers", _kernels),
        ("tokenizers", _tokenizers),
        ("the environment", _environment),
        ("quantizers", _quantizers),
    ):
        try:
            check(found)
        except Exception as error:  # a broken package may raise anything, and the rest is worth knowing
            found.problems.append(Problem(f"{what} cannot be looked at", f"{type(error).__name__}: {one_line(error)}"))
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _versions(found: Doctor) -> None:
    from qft.core.version import __version__

    found.versions = {"qft": __version__, "python": platform.python_version()}
    found.versions |= {name: _version(name) for name in PACKAGES}
    from packaging.requirements import Requirement

    for text in importlib.metadata.requires("qft") or ():
        need = Requirement(text)
        if need.marker is not None and not need.marker.evaluate({"extra": ""}):
            continue
        have = _version(need.name)
        if have is None or not need.specifier.contains(have, prereleases=True):
            state = "is not installed" if have is None else f"is {have}"
            found.problems.append(
                Problem(f"{need.name} {state}, and qft needs {need}", f"pip install '{need.name}{need.specifier}'")
            )


def _devices(found: Doctor) -> None:
    for kind, count in devices.present().items():
        for index in range(count):
            found.devices.append({"device": f"{kind}:{index}", **_device(kind, index)})
    found.devices.append({"device": "cpu", "name": f"{os.cpu_count()} CPU cores ({platform.machine()})"})
    found.device = str(devices.default_device())
    if "cuda" not in devices.present() and _has_nvidia_card():
        if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
            what, do = "a CUDA device is hidden", "unset CUDA_VISIBLE_DEVICES"
        elif torch.version.cuda is None:
            what, do = "an NVIDIA card is here, and torch is a CPU build", "install torch's CUDA build, see pytorch.org"
        else:
            what = f"an NVIDIA card is here, and torch {torch.__version__} cannot use it"
            do = f"update the driver for CUDA {torch.version.cuda}; nvidia-smi says what it has"
        found.problems.append(Problem(what, do))


def _has_nvidia_card() -> bool:
    return any(Path("/dev").glob("nvidia[0-9]*"))


def _device(kind: str, index: int) -> dict[str, Any]:
    if kind == "mps":
        return {"name": "Apple MPS", "memory": torch.mps.recommended_max_memory()}
    backend = getattr(torch, kind)
    properties = backend.get_device_properties(index)
    free = {"free": torch.cuda.mem_get_info(index)[0]} if kind == "cuda" else {}
    return {"name": properties.name, "memory": properties.total_memory, **free}


def _host(found: Doctor) -> None:
    import psutil

    memory = psutil.virtual_memory()
    found.memory = {"total": memory.total, "free": memory.available}
    if memory.available < LITTLE_MEMORY:
        found.problems.append(
            Problem(f"only {memory.available / GIB:.1f} GiB of host memory are free", "close what else runs here")
        )


def _disk(found: Doctor) -> None:
    from huggingface_hub import constants

    for name, path in (("cache", constants.HF_HUB_CACHE), ("temporary", tempfile.gettempdir())):
        there = next(p for p in (Path(path).absolute(), *Path(path).absolute().parents) if p.exists())
        free = shutil.disk_usage(there).free
        found.disk[name] = {"path": str(path), "free": free}
        if not os.access(there, os.W_OK):
            found.problems.append(Problem(f"{path} cannot be written", "change its permissions, or set HF_HOME"))
        if name == "cache" and free < LITTLE_DISK:
            found.problems.append(
                Problem(
                    f"only {free / GIB:.1f} GiB are free for downloads in {path}",
                    "free some, or set HF_HOME to a larger disk",
                )
            )


def _kernels(found: Doctor) -> None:
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    compiler = os.environ.get("CC") or compiler
    found.kernels = {"triton": _version("triton"), "compiler": compiler, "cuda": torch.version.cuda}
    if "cuda" not in devices.present():
        return
    if found.kernels["triton"] is None:
        found.problems.append(Problem("triton is not installed: qft's kernels are slow twins", "pip install triton"))
    elif compiler is None:
        found.problems.append(
            Problem("there is no C compiler, which triton needs to launch kernels", "install gcc, or set CC")
        )


def _tokenizers(found: Doctor) -> None:
    found.tokenizers = {
        name: importlib.util.find_spec(package) is not None
        for name, package in (("fast", "tokenizers"), ("sentencepiece", "sentencepiece"), ("tiktoken", "tiktoken"))
    }
    if not found.tokenizers["fast"]:
        found.problems.append(Problem("tokenizers is not installed: texts cannot be read", "pip install tokenizers"))


def _environment(found: Doctor) -> None:
    names = (
        devices.DISABLE,
        devices.ENABLE,
        "CUDA_VISIBLE_DEVICES",
        "HF_HUB_OFFLINE",
        "HF_HOME",
        "QFT_QUIET",
        "TRITON_INTERPRET",
    )
    found.environment = {name: os.environ[name] for name in names if name in os.environ}
    if os.environ.get("TRITON_INTERPRET") == "1":
        found.problems.append(Problem("TRITON_INTERPRET=1 runs kernels in Python, very slowly", "unset it"))


def _quantizers(found: Doctor) -> None:
    from qft.core.registry import available_quantizers

    for name, info in available_quantizers().items():
        entry = found.quantizers[name] = {"state": info.state, "why": info.hint, "devices": []}
        if info.state == "missing":
            continue
        try:
            with _silence():
                _try(name, entry)
        except QftError as error:
            entry.update(state="unusable", why=one_line(error))
        except Exception as error:
            entry.update(state="fails", why=f"{type(error).__name__}: {one_line(error)}")
            found.problems.append(
                Problem(
                    f"the quantizer {name} fails: {one_line(error)}", "update or remove its package, or use another"
                )
            )


def _try(name: str, entry: dict[str, Any]) -> None:
    """Quantize a layer on the default device, where the quantizer runs there, else on the CPU; and read it back."""
    from qft.core.registry import get_quantizer

    q = get_quantizer(name)
    entry["devices"] = sorted(q.capabilities.devices)
    device = devices.place([q])
    if device.type not in q.capabilities.devices and "cpu" in q.capabilities.devices and device.type != "mps":
        device = torch.device("cpu")
    if not q.capabilities.quantizes:
        entry["why"] = entry["why"] or "reads checkpoints that were quantized elsewhere"
        return
    if q.capabilities.needs_calibration:
        entry["why"] = entry["why"] or "needs calibration data, and was not tried"
        return
    q = q.on_device(device).resolve([("layer", (128, 128))])
    layer = nn.Linear(128, 128, bias=False, device=device)
    weight = layer.weight.detach().clone()
    new = q.quantize_layer(layer)
    error = (q.dequantize(q.weights(new)[0], dtype=torch.float32) - weight).norm() / weight.norm()
    if not error < 1:
        raise RuntimeError(f"a weight came back with a relative error of {float(error):.2f}")
    entry["state"] = "works"
    entry["why"] = entry["why"] or f"on {device.type}"


@contextlib.contextmanager
def _silence() -> Any:
    """Packages talk while they are imported, some to the file descriptor: a doctor's page is not the place for it."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)

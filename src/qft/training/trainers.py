"""TRL's and transformers' trainers, with checkpoints that are whole or not there, and our own bar."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    EvalPrediction,
    IntervalStrategy,
    PrinterCallback,
    ProgressCallback,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from qft.core.console import first_sentence
from qft.core.finite import check_trained
from qft.errors import BadFolder, BadOption, MissingDependency, NonFiniteWeights, QftError
from qft.training.checks import check_padding
from qft.training.folder import PARTIAL, RunFolder
from qft.training.models import autocast_dtype
from qft.training.setup import Prepared, has_tensorboard, optimizer_name
from qft.training.termination import Interrupted, Termination

log = logging.getLogger("qft.training")


class Whole:
    """A trainer's checkpoints: written under another name, and renamed when they are whole. Before `Trainer` in a class."""

    run: RunFolder
    keep: int = 2
    time_limit: TimeLimit | None = None
    termination: Termination | None = None
    _partial: Path | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._partial) if self._partial is not None else super()._get_output_dir(trial)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        name = f"checkpoint-{self.state.global_step}"  # type: ignore[attr-defined]
        check_trained(self.model, self.state.global_step)  # type: ignore[attr-defined]
        self._partial = self.run.path / f"{PARTIAL}{os.getpid()}"
        self.run.check_there()
        try:
            shutil.rmtree(self._partial, ignore_errors=True)
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
            self.run.adopt(self._partial / name, self.keep)
        except QftError:
            raise
        except Exception as error:  # safetensors and torch have errors of their own for a disk that is full
            if not isinstance(error, OSError) and not _cannot_write(error):
                raise
            last = self.run.last
            left = f"; {last.name} before it is whole, and the same call goes on from there" if last is not None else ""
            reason = getattr(error, "strerror", None) or f"the disk takes no more ({str(error).splitlines()[0]})"
            raise BadFolder(f"cannot write {name} into {self.run.path}: {reason}{left}") from error
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)
            self._partial = None

    def _evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate between steps, without a change of the random numbers that the next steps draw."""
        device = self.args.device  # type: ignore[attr-defined]
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                return super()._evaluate(*args, **kwargs)  # type: ignore[misc]
        except Interrupted:
            assert self.termination is not None
            self.termination.interrupted(self.control)  # type: ignore[attr-defined]
            return {}

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing: qft writes its own card where it exports."""


def _cannot_write(error: Exception) -> bool:
    text = str(error).lower()
    return any(
        w in text
        for w in (
            "no space left",
            "file too large",
            "os error",
            "writing file",
            "file write failed",
            "quota",
            "inline_container",
        )
    )


class Watch(TrainerCallback):
    """A bar, log lines, a log at each checkpoint so that a run goes on with whole averages, and an eye on the loss."""

    def __init__(self, progress: bool):
        self.progress, self.bar = progress, None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.progress:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(1)
        control.should_log |= control.should_save

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        logs = logs or {}
        for name in ("loss", "grad_norm", "eval_loss"):
            value = logs.get(name)
            if value is not None and not math.isfinite(value):
                raise NonFiniteWeights(
                    f"{name} is {value} at step {state.global_step}: lower lr, warm up longer, or look at mixed_precision; the "
                    "checkpoints before it are as they were"
                )
        shown = {k: f"{v:.4g}" for k, v in logs.items() if k in ("loss", "eval_loss", "eval_accuracy", "learning_rate")}
        if self.bar is not None:
            self.bar.set_postfix({k: v for k, v in shown.items() if k != "learning_rate"})
        if shown:
            log.info("step %d: %s", state.global_step, ", ".join(f"{k} {v}" for k, v in shown.items()))

    def close(self) -> None:
        """Leave the screen to what is said next, also where training failed."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


class TimeLimit(TrainerCallback):
    """Ends training, as its last step does, after the first step that ends when the time is up. Before `Watch`, which logs it.

    Attributes:
        deadline: of `time.perf_counter()`.
        cut_from: the steps that there would have been; None where nothing was cut.
    """

    def __init__(self, deadline: float):
        self.deadline = deadline
        self.cut_from: int | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step < state.max_steps and time.perf_counter() >= self.deadline:
            self.cut_from = state.max_steps
            control.should_training_stop = control.should_save = True
            control.should_evaluate |= args.eval_strategy != IntervalStrategy.NO


def arguments(prepared: Prepared, run: RunFolder) -> dict[str, Any]:
    """The options that all trainers take."""
    config, device, mixed = prepared.config, prepared.device, autocast_dtype(prepared)
    tensorboard = config.log != "none" and has_tensorboard()
    save_steps = config.save_steps if config.save_steps < 1 else int(config.save_steps)
    return {
        "output_dir": str(run.path),
        "per_device_train_batch_size": config.batch_size,
        "per_device_eval_batch_size": config.batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation,
        "learning_rate": config.lr,
        "lr_scheduler_type": config.scheduler,
        "warmup_steps": config.warmup_ratio,
        "optim": optimizer_name(config),
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "num_train_epochs": config.epochs,
        "max_steps": config.max_steps or -1,
        "logging_steps": config.logging_steps,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": save_steps,
        "eval_strategy": "no" if prepared.evaluation is None else "steps",
        "eval_steps": save_steps,
        "seed": config.seed,
        "data_seed": config.seed,
        "bf16": mixed == "bf16",
        "fp16": mixed == "fp16",
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type == "cuda",
        "accelerator_config": {"non_blocking": device.type == "cuda"},
        "disable_tqdm": True,
        "report_to": ["tensorboard"] if tensorboard else [],
        **_checkpointing(config.gradient_checkpointing),
        "remove_unused_columns": False,
        "label_names": ["labels"],
    }


def _checkpointing(enabled: bool) -> dict[str, Any]:
    """Name the options for recomputing activations as the installed transformers does, which renamed them."""
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    return {name: enabled, f"{name}_kwargs": {"use_reentrant": False}}


def build_trainer(model: nn.Module, prepared: Prepared, run: RunFolder, deadline: float | None = None) -> Any:
    """The task's trainer, ready for `train()`.

    Args:
        deadline: of `time.perf_counter()`; training ends after the first step that ends later.

    Raises:
        BadOption, UnsupportedOperation: a batch would learn padding; packed sequences would read each other.
        MissingDependency: TRL or datasets.
    """
    options = {
        "model": model,
        "processing_class": prepared.processor,
        "train_dataset": _dataset(prepared.train.rows),
        "eval_dataset": None if prepared.evaluation is None else _dataset(prepared.evaluation.rows),
    }
    try:
        trainer = _MAKERS[prepared.task](arguments(prepared, run), options, prepared)
    except QftError:
        raise
    except ValueError as error:  # such as of adapters on a head whose weight TRL reads directly
        raise BadOption(f"the trainer refuses this run: {first_sentence(error)}") from error
    trainer.run, trainer.keep = run, prepared.config.save_total_limit
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.time_limit = None if deadline is None else TimeLimit(deadline)
    if trainer.time_limit is not None:
        trainer.add_callback(trainer.time_limit)
    trainer.watch = Watch(prepared.config.progress)
    trainer.add_callback(trainer.watch)
    if prepared.task in ("causal-lm", "seq2seq"):
        check_padding(trainer.data_collator, prepared.train.rows, prepared.tokenizer.pad_token_id)
    return trainer


def _causal_lm(common: dict[str, Any], options: dict[str, Any], prepared: Prepared) -> Any:
    try:
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        raise MissingDependency("training of language models needs TRL: pip install 'qft[train]'") from error

    class Sft(Whole, SFTTrainer):
        pass

    if prepared.config.packing:
        from qft.data.packing import PackingCollator

        options["data_collator"] = PackingCollator(options["model"], pad_token_id=prepared.tokenizer.pad_token_id)
    trainer = Sft(args=SFTConfig(**common, max_length=None), **options)
    trainer.add_callback(_Tokens(trainer))
    return trainer


class _Tokens(TrainerCallback):
    """TRL counts tokens from the start of a process; a run that goes on goes on counting."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        seen = [entry["num_tokens"] for entry in state.log_history if "num_tokens" in entry]
        if state.global_step and seen:
            self.trainer._total_train_tokens = seen[-1]


def _seq2seq(common: dict[str, Any], options: dict[str, Any], prepared: Prepared) -> Any:
    class Seq2Seq(Whole, Seq2SeqTrainer):
        pass

    collator = DataCollatorForSeq2Seq(prepared.tokenizer, model=options["model"])
    return Seq2Seq(args=Seq2SeqTrainingArguments(**common), data_collator=collator, **options)


def _classification(common: dict[str, Any], options: dict[str, Any], prepared: Prepared) -> Any:
    class Classify(Whole, Trainer):
        pass

    return Classify(
        args=TrainingArguments(**common),
        data_collator=DataCollatorWithPadding(prepared.tokenizer),
        compute_metrics=_accuracy,
        **options,
    )


def _accuracy(predicted: EvalPrediction) -> dict[str, float]:
    logits = predicted.predictions[0] if isinstance(predicted.predictions, tuple) else predicted.predictions
    return {"accuracy": float((logits.argmax(-1) == predicted.label_ids).mean())}


def _vision_language(common: dict[str, Any], options: dict[str, Any], prepared: Prepared) -> Any:
    from qft.training.vision import VisionCollator

    class Vision(Whole, Trainer):
        pass

    collator = VisionCollator(prepared.processor, prepared.config.loss_on, prepared.limit)
    common["prediction_loss_only"] = True
    return Vision(args=TrainingArguments(**common), data_collator=collator, **options)


_MAKERS = {
    "causal-lm": _causal_lm,
    "seq2seq": _seq2seq,
    "classification": _classification,
    "vision-language": _vision_language,
}


def _dataset(rows: list[dict[str, Any]]) -> Any:
    if "messages" in rows[0]:
        return _List(rows)  # images stay as they are
    try:
        from datasets import Dataset
    except ImportError as error:
        raise MissingDependency("training needs the package datasets: pip install 'qft[train]'") from error
    return Dataset.from_dict({name: [row[name] for row in rows] for name in rows[0]})


class _List(torch.utils.data.Dataset):
    def __init__(self, rows: list[dict[str, Any]]):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and notes of transformers, datasets and TRL, which drown ours."""
    from transformers.utils import logging as transformers_logging

    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    others = [logging.getLogger(name) for name in ("trl", "accelerate", "datasets")]
    levels = [other.level for other in others]
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    for other in others:
        other.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*use_reentrant.*")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        for other, level in zip(others, levels):
            other.setLevel(level)

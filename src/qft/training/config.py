"""`TrainConfig`: everything that a training run needs to know, checked when it is made."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qft.errors import BadFolder, BadOption

TASKS = ("auto", "causal-lm", "seq2seq", "classification", "vision-language")
CHOICES: dict[str, tuple[str, ...]] = {
    "task": TASKS,
    "loss_on": ("answers", "last_answer", "all"),
    "too_long": ("truncate", "skip", "refuse"),
    "mixed_precision": ("auto", "bf16", "fp16", "no"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "attention": ("auto", "flash_attention_2", "sdpa", "eager"),
    "optimize": ("auto", "yes", "no"),
    "log": ("auto", "tensorboard", "none"),
    "resume": ("auto", "restart"),
}
LEAST: dict[str, float] = {
    "lora_r": 1,
    "max_length": 2,
    "batch_size": 1,
    "gradient_accumulation": 1,
    "max_steps": 1,
    "logging_steps": 1,
    "save_total_limit": 1,
    "calibration_samples": 1,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "seed": 0,
}
MOST: dict[str, float] = {
    "seed": 2**32 - 1,
    "max_steps": 10**9,
    "max_length": 2**24,
    "batch_size": 2**20,
    "gradient_accumulation": 2**20,
    "lora_r": 2**16,
    "epochs": 10**6,
    "logging_steps": 10**9,
    "save_steps": 10**9,
    "save_total_limit": 10**6,
    "calibration_samples": 10**7,
    "max_seconds": 10**9,
    "lr": 1e30,
    "lora_alpha": 1e30,
    "weight_decay": 1e30,
}
"""Upper bounds: what numpy takes as a seed, what a run can do in a human time, and what float32 can calculate with."""
SHARES = ("lora_dropout", "warmup_ratio", "eval_share")
ABOVE_ZERO = ("lr", "epochs", "lora_alpha", "save_steps", "max_seconds")
OTHER_NAMES = {
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "train_batch_size": "batch_size",
    "gradient_accumulation_steps": "gradient_accumulation",
    "lr_scheduler_type": "scheduler",
    "optim": "optimizer",
    "output_dir": "project_name",
    "model_name_or_path": "model",
    "block_size": "max_length",
    "model_max_length": "max_length",
    "sequence_length": "max_length",
    "quantizer": "quantization",
    "r": "lora_r",
    "rank": "lora_r",
    "dataset": "data_path",
    "data": "data_path",
    "prompt_text_column": "prompt_column",
}
"""What other tools call these fields, offered where one of them is given."""
QUANTIZERS = {"int4": "nf4", "none": None, "None": None}
"""autotrain's words; int4 means NF4 here."""


@dataclass(frozen=True)
class TrainConfig:
    """What to train, on what, and how. Names are autotrain's where it has one.

    Attributes:
        model: a folder, or a hub id.
        data_path: a .jsonl, .json, .csv or .parquet file, a folder with train and valid files, or a `datasets` folder.
        project_name: the folder that is written: checkpoints, `adapter/` (or `model/`), `merged/`, `training.json`.
        task: "causal-lm", "seq2seq", "classification", "vision-language"; "auto" goes by the data's columns and the model.
        train_split, valid_split: names of files in a folder (train.jsonl), or of splits of a `datasets` folder. Without
            `valid_split`, a file or split called valid, validation, val, dev, test or eval is the evaluation's. A path
            of a file also does.
        eval_share: the share of the training rows that is held out for the evaluation where there is no such split.
        text_column, messages_column, prompt_column, completion_column, label_column, images_column: of the data.
        chat_template: None: the tokenizer's own. "chatml", a file with a Jinja template, or the template itself.
        loss_on: of chats: "answers" of the assistant, the "last_answer", or "all" tokens; of prompts: "all" learns them, too.
        skip_bad_rows: skip and count rows that cannot be read or used, or that the tokenizer refuses, instead of refusing.
        max_length: tokens of a sequence. too_long: what to do with longer rows; those cut or skipped are counted.
        packing: lay the sequences of a batch end to end instead of padding them; the numbers stay the same.
        peft: train LoRA adapters. False trains all weights, in 16 or 32 bit: `quantization` does not apply.
        quantization: what `qft.quantize` takes, as text or a mapping by module; also "int4" (nf4) and "int8". None: LoRA
            over the float model, or over a folder that is quantized already.
        lora_r, lora_alpha, lora_dropout, target_modules, init: the adapter; `init` as `qft.wrap` takes it, by name.
        calibration_samples: training rows for quantizers and inits that need data.
        dtype: of the float weights; "auto": bfloat16 on accelerators that have it, else float32.
        mixed_precision: "auto": bf16 autocast on accelerators that have it.
        attention: "auto": flash attention where installed and on CUDA, else SDPA.
        use_flash_attention_2: the same as attention="flash_attention_2", with a warning and SDPA where not installed.
        gradient_checkpointing: recompute activations in the backward pass.
        optimize: `qft.optimize_training`; "auto": on CUDA. memory: as that takes it.
        lr, scheduler, warmup_ratio, optimizer, weight_decay, max_grad_norm: optimizer and scheduler by transformers'
            names, such as "paged_adamw_8bit" and "cosine".
        epochs, max_steps: how long; `max_steps` wins.
        max_seconds: stop after the first optimizer step that ends so many seconds after the call began, loading and
            quantizing included; what was trained until then is saved and merged as usual.
        batch_size, gradient_accumulation: rows in a step are their product.
        logging_steps, save_steps, save_total_limit: checkpoints are made every `save_steps` optimizer steps, or every
            such share of the run where it is below 1. The evaluation runs where checkpoints are made.
        merge_adapter: write the merged float model into `merged/`, too.
        log: "tensorboard" writes events; "auto": where it is installed.
        resume: "auto" goes on where an interrupted run of the same configuration stopped; "restart" begins anew.
        device: "auto", "cpu", "cuda", "mps".
        progress: bars and notes. False is silence but for warnings.
    """

    model: str
    data_path: str
    project_name: str = "qft-run"
    task: str = "auto"
    train_split: str = "train"
    valid_split: str | None = None
    eval_share: float = 0.0
    text_column: str = "text"
    messages_column: str = "messages"
    prompt_column: str = "prompt"
    completion_column: str = "completion"
    label_column: str = "label"
    images_column: str = "images"
    chat_template: str | None = None
    loss_on: str = "answers"
    skip_bad_rows: bool = False
    max_length: int = 1024
    too_long: str = "truncate"
    packing: bool = False
    peft: bool = True
    quantization: str | dict[str, Any] | None = "nf4"
    lora_r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.05
    target_modules: str | list[str] = "all-linear"
    init: str | None = None
    calibration_samples: int = 128
    dtype: str = "auto"
    mixed_precision: str = "auto"
    attention: str = "auto"
    use_flash_attention_2: bool = False
    gradient_checkpointing: bool = True
    optimize: str = "auto"
    memory: str | float = "auto"
    lr: float = 2e-4
    scheduler: str = "cosine"
    warmup_ratio: float = 0.03
    optimizer: str = "adamw_torch"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    epochs: float = 1.0
    max_steps: int | None = None
    max_seconds: float | None = None
    batch_size: int = 2
    gradient_accumulation: int = 4
    logging_steps: int = 10
    save_steps: float = 0.1
    save_total_limit: int = 2
    seed: int = 42
    merge_adapter: bool = False
    log: str = "auto"
    resume: str = "auto"
    device: str = "auto"
    progress: bool = True

    def __post_init__(self) -> None:
        for name, value in checked(vars(self)).items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: Callable[[str], str] = lambda key: "") -> TrainConfig:
        """The configuration of JSON values.

        Args:
            where: key → what an error about it starts with, such as "run.yaml line 3: ".

        Raises:
            BadOption: an unknown key, with near names, a value that it does not take, or no `model` or `data_path`.
        """
        found = checked(values, where)
        missing = [n for n in ("model", "data_path") if n not in found]
        if missing:
            raise BadOption(f"{where('')}{' and '.join(missing)} must be given")
        return cls(**found)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str], overrides: Mapping[str, Any] | None = None) -> TrainConfig:
        """The configuration in a YAML (or JSON) file, with these values in the place of the file's.

        Raises:
            BadFolder: the file cannot be read. BadOption: it is not YAML, or what `from_dict` raises, with the line.
        """
        values, lines = read_yaml(path)
        changes = checked(overrides or {})

        def where(key: str) -> str:
            return f"{path} line {lines[key]}: " if key in lines else f"{path}: "

        return cls.from_dict({**checked(values, where), **changes}, where)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, all fields."""
        return dataclasses.asdict(self)

    def to_yaml(self) -> str:
        """Text that `from_yaml` reads."""
        return json.dumps(self.to_dict(), indent=1) + "\n"  # JSON is YAML

    def replace(self, **changes: Any) -> TrainConfig:
        """With other values of these fields; names and values are checked."""
        return type(self)(**{**self.to_dict(), **checked(changes)})


def fields() -> dict[str, dataclasses.Field[Any]]:
    """Return the fields of `TrainConfig` by name."""
    return {f.name: f for f in dataclasses.fields(TrainConfig)}


def checked(values: Mapping[str, Any], where: Callable[[str], str] = lambda key: "") -> dict[str, Any]:
    """The values as the fields take them.

    Raises:
        BadOption: an unknown key, or a value of another type or outside of its range.
    """
    if not isinstance(values, Mapping):
        raise BadOption(f"{where('')}a configuration is a mapping of names to values, not {type(values).__name__}")
    known = fields()
    for key in values:
        if key not in known:
            raise BadOption(f"{where(str(key))}there is no option {key!r}{near(str(key))}")
    return {key: _value(key, value, where(key)) for key, value in values.items()}


def near(key: str) -> str:
    """The advice for a name that is not known."""
    known = list(fields())
    plain = key.lower().replace("-", "_")
    found = [OTHER_NAMES[plain]] if plain in OTHER_NAMES else difflib.get_close_matches(plain, known, 3, 0.6)
    if not found:  # a typo in another tool's name
        found = [OTHER_NAMES[n] for n in difflib.get_close_matches(plain, OTHER_NAMES, 1, 0.75)]
    return f"; did you mean {' or '.join(found)}?" if found else "; qft.TrainConfig has the list"


_HINTS = typing.get_type_hints(TrainConfig)


def _value(key: str, value: Any, where: str) -> Any:
    hint = _HINTS[key]
    members = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = tuple(typing.get_origin(m) or m for m in members)
    if isinstance(value, os.PathLike) and str in kinds:
        value = os.fspath(value)
    if key == "quantization" and isinstance(value, str):
        value = QUANTIZERS.get(value, value)
    if key == "mixed_precision" and value in (None, False, "none", "None"):
        value = "no"
    if key == "optimize" and isinstance(value, bool):
        value = "yes" if value else "no"
    if isinstance(value, str) and float in kinds and str not in kinds:
        value = _number(value)  # YAML reads 1e-4 as text
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds:
        value = float(value) if not value or abs(value) < 2**53 else value
    good = isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)
    if not good or (isinstance(value, list) and not all(isinstance(v, str) for v in value)):
        raise BadOption(f"{where}{key}={value!r}; it is {_name(members)}")
    if value is None:
        return value
    if key in CHOICES and value not in CHOICES[key]:
        raise BadOption(f"{where}{key}={value!r}; it is one of {', '.join(CHOICES[key])}")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadOption(f"{where}{key}={value!r}; it is a finite number")
    if key in LEAST and value < LEAST[key]:
        raise BadOption(f"{where}{key}={value!r}; it is at least {LEAST[key]:g}")
    if key in MOST and value > MOST[key]:
        raise BadOption(f"{where}{key}={value!r}; it is at most {MOST[key]}")
    if key in ABOVE_ZERO and not value > 0:
        raise BadOption(f"{where}{key}={value!r}; it is above 0")
    if key in SHARES and not 0 <= value < 1:
        raise BadOption(f"{where}{key}={value!r}; it is a share, from 0 to below 1")
    if key in ("model", "data_path", "project_name") and not value.strip():
        raise BadOption(f"{where}{key} is empty")
    return value


def _number(text: str) -> Any:
    try:
        return float(text)
    except ValueError:
        return text


def _name(members: tuple[Any, ...]) -> str:
    words = {str: "text", int: "an integer", float: "a number", bool: "true or false", type(None): "null"}
    return " or ".join(
        words.get(m, "a list of names" if typing.get_origin(m) is list else "a mapping") for m in members
    )


def read_yaml(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, int]]:
    """A YAML file's top mapping, and the line of each of its keys, from 1.

    Raises:
        BadFolder: the file cannot be read. BadOption: it is not YAML, not a mapping, or names a key twice.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte, or text that is not UTF-8
        raise BadFolder(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error
    try:
        node, values = yaml.compose(text, Loader=yaml.SafeLoader), yaml.safe_load(text)
    except RecursionError as error:
        raise BadOption(f"{path}: the YAML is nested too deep; a configuration is one 'name: value' a line") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f" line {mark.line + 1}"
        raise BadOption(f"{path}{line}: not YAML: {getattr(error, 'problem', None) or error}") from error
    if not isinstance(values, dict):
        raise BadOption(f"{path}: a configuration is a mapping of names to values, one 'name: value' a line")
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if key.value in lines:
            raise BadOption(
                f"{path} line {key.start_mark.line + 1}: {key.value} is given a second time, after line {lines[key.value]}"
            )
        lines[key.value] = key.start_mark.line + 1
    return values, lines

"""Everything before the model: data, tokenizer, checks, token ids. Nothing is written, no weight is read."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qft.core.console import first_sentence
from qft.core.files import check_model_path
from qft.data.files import Rows
from qft.data.lengths import positions_of_config
from qft.data.splits import held_out, read_data
from qft.data.tokens import Tokens
from qft.errors import BadFolder, BadOption, MissingDependency, QftWarning, UnsupportedDevice
from qft.memory.plan import check_memory
from qft.pipeline.from_pretrained import read_config
from qft.training import checks, columns, encoding
from qft.training.config import TrainConfig
from qft.training.stored import check_stored

log = logging.getLogger("qft.training")

OPTIMIZERS = {
    "adamw": "adamw_torch",
    "adamw8bit": "adamw_8bit",
    "paged_adamw8bit": "paged_adamw_8bit",
    "paged_adamw32bit": "paged_adamw_32bit",
}
"""`qft.plan`'s names → transformers'."""
AUTO = {
    "causal-lm": "AutoModelForCausalLM",
    "seq2seq": "AutoModelForSeq2SeqLM",
    "classification": "AutoModelForSequenceClassification",
    "vision-language": "AutoModelForImageTextToText",
}
"""Task → transformers' class of its models."""


@dataclass
class Prepared:
    """What a run needs besides the model.

    Attributes:
        task, form: what is trained, and the format of the data: "chat", "prompt" or "text".
        processor: the tokenizer, or of vision-language models the processor.
        model_config: transformers' config of the model.
        train, evaluation: token ids and labels.
        labels: of a classification.
        digests: of data, model and template: equal where a run may be continued.
        findings: warnings, each with what to do.
        stored: how the model's folder is quantized already; None for a float model.
        limit: tokens of a row; of an encoder-decoder's, those that the encoder reads.
    """

    config: TrainConfig
    task: str
    form: str
    processor: Any
    model_config: Any
    train: encoding.Encoded
    evaluation: encoding.Encoded | None
    labels: list[Any]
    digests: dict[str, str]
    limit: int
    device: torch.device
    findings: list[str] = field(default_factory=list)
    stored: str | None = None

    @property
    def tokenizer(self) -> Any:
        return getattr(self.processor, "tokenizer", self.processor)


def prepare(config: TrainConfig) -> Prepared:
    """Read and check all that can be before a model is loaded.

    Raises:
        BadFolder: data or model that cannot be read. BadOption, BadShape: data, template, names and sizes that do not go
        together. MissingDependency, UnsupportedDevice: what the options ask for is not here.
    """
    config = config.replace(model=check_model_path(config.model))
    device = _device(config)
    _check_names(config, device)
    check_memory(step_memory(config))
    stored = check_stored(config)
    train, valid = read_data(
        config.data_path, config.train_split, config.valid_split, skip_bad_rows=config.skip_bad_rows
    )
    if valid is None:
        train, valid = held_out(train, config.eval_share, config.seed)
    model_config = read_config(config.model, {})
    task, form = columns.recognise(train.columns, model_config, config)
    if valid is not None and columns.recognise(valid.columns, model_config, config) != (task, form):
        raise BadOption(f"{valid.source} has other columns than {train.source}: {', '.join(valid.columns)}")
    if config.packing and task != "causal-lm":
        raise BadOption(f"packing is for causal language models, not for {task}")
    processor = _processor(config.model, task)
    tokenizer = getattr(processor, "tokenizer", processor)
    findings: list[str] = []
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise BadOption("the tokenizer has neither a padding token nor an end-of-text token: give it one")
        tokenizer.pad_token = tokenizer.eos_token  # labels are masked by place, not by token: check_padding
    limit = _limit(config, model_config, task, tokenizer)
    labels = _labels(config, task, model_config, train)
    one, found = _encoder(config, task, form, processor, train, labels, Path(config.data_path))
    findings += found
    cut = None if task == "vision-language" else limit
    encoded = encoding.encode(train, one, config, cut)
    evaluation = None if valid is None else encoding.encode(valid, one, config, cut)
    if task != "vision-language":
        size = getattr(model_config.get_text_config(), "vocab_size", None)
        rows = encoded.rows + (evaluation.rows if evaluation is not None else [])
        findings += checks.check_vocabulary(tokenizer, size, rows)
    for text in findings:
        warnings.warn(text, QftWarning, stacklevel=3)
    digests = {
        "training data": train.digest,
        "evaluation data": valid.digest if valid is not None else "",
        "model": _model_digest(config.model),
        "chat template": hashlib.sha256(repr(getattr(tokenizer, "chat_template", "")).encode()).hexdigest(),
    }
    return Prepared(
        config,
        task,
        form,
        processor,
        model_config,
        encoded,
        evaluation,
        labels,
        digests,
        limit.source,
        device,
        findings,
        stored,
    )


def _labels(config: TrainConfig, task: str, model_config: Any, train: Rows) -> list[str]:
    """The names of a classification's classes, which the head of a classifier has to have, too."""
    if task != "classification":
        return []
    labels = columns.labels_of(train, config.label_column)
    if len(labels) < 2:
        raise BadOption(
            f"{train.source} has {len(labels)} label(s) in {config.label_column!r}: a classification has two or more"
        )
    stored = any("SequenceClassification" in a for a in getattr(model_config, "architectures", None) or ())
    if stored and model_config.num_labels != len(labels):
        raise BadOption(
            f"model: {config.model} sorts into {model_config.num_labels} classes, and the data has {len(labels)}: give a "
            "model without a classifier's head, or data of the same classes"
        )
    return labels


def _encoder(
    config: TrainConfig, task: str, form: str, processor: Any, train: Rows, labels: list[Any], data: Path
) -> tuple[Any, list[str]]:
    """What makes one row, and what is doubtful about the chat template."""
    tokenizer = getattr(processor, "tokenizer", processor)
    made: list[checks.Chat] = []

    def chat() -> checks.Chat:
        if not made:
            made.append(checks.Chat(tokenizer, config.loss_on, config.chat_template))
            if config.chat_template is not None:
                tokenizer.chat_template = made[0].template  # saved beside the adapter: it was trained with this one
        return made[0]

    if task == "vision-language":
        from qft.training.vision import rows_with_images

        if config.chat_template is not None:
            raise BadOption(
                "chat_template= is not for vision-language models: set processor.chat_template and save that"
            )
        return rows_with_images(config, processor, data if data.is_dir() else data.parent), []
    if task == "classification":
        return encoding.classification(tokenizer, config, labels), []
    if form == "chat":
        one = encoding.chat(chat(), config)
    elif form == "text":
        one = encoding.text(tokenizer, config.text_column)
    else:
        pair = columns.pair_of(set(train.columns), config, task)
        assert pair is not None  # recognise() found them
        if len(pair.sources) > 1:
            log.info("%s, joined by line breaks, are read, and %s is learnt", " and ".join(pair.sources), pair.target)
        if task == "seq2seq":
            return encoding.seq2seq(tokenizer, pair), []
        one = encoding.prompt(tokenizer, pair, chat, config.loss_on)
        if isinstance(train.rows[0].get(pair.target), list):
            chat()
    if not made:
        return one, [] if tokenizer.eos_token_id is not None else [
            "the tokenizer has no end-of-text token: none is learnt"
        ]
    return one, made[0].findings + checks.check_end(tokenizer, made[0].end, _stops(config.model))


def _stops(model: str) -> Any:
    from transformers import GenerationConfig

    try:
        return GenerationConfig.from_pretrained(model).eos_token_id
    except (OSError, ValueError):  # it has none
        return None


def _check_names(config: TrainConfig, device: torch.device) -> None:
    from transformers import SchedulerType
    from transformers.training_args import OptimizerNames

    for name, value, known in (
        ("optimizer", optimizer_name(config), [o.value for o in OptimizerNames]),
        ("scheduler", config.scheduler, [s.value for s in SchedulerType]),
    ):
        if value not in known:
            import difflib

            found = difflib.get_close_matches(value, known, 3)
            advice = f"did you mean {' or '.join(found)}?" if found else f"it is one of {', '.join(known)}"
            raise BadOption(f"there is no {name} {value!r}; {advice}")
    name = optimizer_name(config)
    if any(word in name for word in ("8bit", "paged", "bnb")):
        if importlib.util.find_spec("bitsandbytes") is None:
            raise MissingDependency(f"optimizer={name!r} is of bitsandbytes: pip install bitsandbytes")
        if "paged" in name and device.type != "cuda":
            raise UnsupportedDevice(f"optimizer={name!r} needs CUDA, and this runs on {device.type}: use adamw_torch")
    if config.mixed_precision == "fp16" and device.type == "cpu":
        raise UnsupportedDevice("mixed_precision='fp16' needs an accelerator: use 'bf16' or 'no' on a CPU")
    if config.log == "tensorboard" and not has_tensorboard():
        raise MissingDependency("log='tensorboard' needs the package tensorboard: pip install tensorboard")
    if config.peft and config.quantization is not None:
        from qft.core.registry import parse_spec

        parse_spec(config.quantization)
    elif config.peft and config.init is not None:
        raise BadOption(
            f"init={config.init!r} starts adapters over quantized weights, and quantization is none: leave it out"
        )
    if not config.peft and config.merge_adapter:
        raise BadOption(
            "merge_adapter: there are no adapters to merge with peft off; the model is written whole anyway"
        )


def optimizer_name(config: TrainConfig) -> str:
    """Return transformers' name of the optimizer."""
    return OPTIMIZERS.get(config.optimizer, config.optimizer)


def has_tensorboard() -> bool:
    """Return whether a writer of TensorBoard events is installed."""
    return any(importlib.util.find_spec(name) is not None for name in ("tensorboard", "tensorboardX"))


def step_memory(config: TrainConfig) -> Any:
    """The value of `memory` as `qft.optimize_training` takes it: a number above 1 counts blocks."""
    memory = config.memory
    return int(memory) if isinstance(memory, float) and memory > 1 else memory


def _device(config: TrainConfig) -> torch.device:
    from qft.core.devices import check_device, default_device

    return default_device() if config.device == "auto" else check_device(config.device) or default_device()


def _processor(model: str, task: str) -> Any:
    from transformers import AutoProcessor, AutoTokenizer

    try:
        return (AutoProcessor if task == "vision-language" else AutoTokenizer).from_pretrained(model)
    except Exception as error:  # of many kinds, none of them documented
        what = "processor" if task == "vision-language" else "tokenizer"
        raise BadFolder(
            f"model: {model!r} has no {what} that transformers can load: {first_sentence(error)}"
        ) from error


def _limit(config: TrainConfig, model_config: Any, task: str, tokenizer: Any) -> encoding.Limit:
    import transformers

    positions = positions_of_config(model_config, getattr(transformers, AUTO[task]))
    most = config.max_length
    # the tokenizer's own truncation keeps the special tokens at both ends
    cut = Tokens(tokenizer).cut if task in ("classification", "seq2seq") else None
    return encoding.Limit(min(most, positions.source or most), min(most, positions.target or most), cut)


def _model_digest(model: str) -> str:
    """Of a folder's config, and of the ends of its weights; a hub id is its own."""
    if not os.path.isdir(model):
        return model
    found = hashlib.sha256()
    for file in sorted(Path(model).iterdir()):
        if file.suffix in (".json", ".safetensors", ".bin", ".gguf") and file.is_file():
            found.update(json.dumps([file.name, file.stat().st_size]).encode())
            with open(file, "rb") as stream:
                found.update(stream.read(1 << 20))
                stream.seek(max(0, file.stat().st_size - (1 << 20)))
                found.update(stream.read())
    return found.hexdigest()

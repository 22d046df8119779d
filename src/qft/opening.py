"""Open what a path names: the folder of an adapter, of a quantized model, a file of texts. A wrong name gets near ones."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from qft import hf
from qft.devices import check_device, place
from qft.errors import BadFolder, BadOption, NeedsCalibration
from qft.registry import from_config


def check_path(path: str | os.PathLike[str], what: str = "a model") -> str:
    """`path` as text, where it exists or may be an id of the hub.

    Raises:
        BadFolder: it is a path of this machine's, and nothing is there; near names are in the message.
    """
    text = os.path.expanduser(os.fspath(path))
    here = Path(text)
    try:
        if here.exists():
            return text
        near = _near(here)
    except OSError as error:
        raise BadFolder(f"cannot look at {text}: {error.strerror or error}") from error
    local = (
        here.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1 or text.endswith((".json", ".jsonl"))
    )
    if local or near or "/" not in text:
        hint = f"did you mean {' or '.join(near)}?" if near else f"give the folder of {what}, or an id of the hub"
        raise BadFolder(f"there is no {text}: {hint}")
    return text


def _near(path: Path) -> list[str]:
    """What is there in place of a path that is not: its first missing part by a near name."""
    missing = path
    while not missing.parent.exists():
        missing = missing.parent
    names = [entry.name for entry in missing.parent.iterdir() if not entry.name.startswith(".")]
    rest = path.relative_to(missing)
    found = difflib.get_close_matches(missing.name, names, n=3, cutoff=0.6)
    return [str(missing.parent / name / rest) if str(rest) != "." else str(missing.parent / name) for name in found]


def is_adapter(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an adapter."""
    return (Path(folder) / "adapter_config.json").is_file()


def refuse_parent(folder: str | os.PathLike[str]) -> None:
    """Raise `BadFolder` where a folder holds neither model nor adapter, and folders in it do."""
    here = Path(folder)
    if is_adapter(here) or (here / "config.json").is_file():
        return
    below = sorted(str(file.parent) for file in here.glob("*/adapter_config.json"))[:3]
    if below:
        raise BadFolder(f"{folder} holds no adapter itself: did you mean {' or '.join(below)}?")


def open_model(folder: str | os.PathLike[str], base: Any = None, *, device: Any = None, dtype: Any = None) -> nn.Module:
    """An adapter over its base, as `qft.load` gives it, or a quantized model.

    Args:
        folder: of an adapter, as `qft.save` and PEFT write it, or of a quantized model, or an id of the hub.
        base: of an adapter, where its config names another or none.
        device: default the accelerator where there is one.
        dtype: to load in; default the checkpoint's own.

    Raises:
        BadFolder: nothing there, or nothing that can be read. BadOption: a float model; a base for what is no adapter.
    """
    import qft
    from qft.loading import load_quantized, read_config, stored_quantization

    folder = check_path(folder, "an adapter or of a quantized model")
    options = {} if dtype is None else {"dtype": dtype}
    target = check_device(device)
    if is_adapter(folder):
        where = {} if target is None else {"device": target}
        return qft.load(folder, base=None if base is None else check_path(base), **where, **options)
    refuse_parent(folder)
    if base is not None:
        raise BadOption(f"--base goes with an adapter, and {folder} holds none (no adapter_config.json)")
    if stored_quantization(folder, {}) is None:
        raise BadOption(f"{folder} is a float model: there is nothing quantized in it, and no adapter")
    if target is None:
        stored = getattr(read_config(folder, {}), "quantization_config", None)
        stored = stored if isinstance(stored, dict) or stored is None else stored.to_dict()
        target = place([from_config(stored)] if stored else [], stored=True)
    model = load_quantized(folder, None, target, False, **options)
    if hf.adopt(model) is None:
        raise BadFolder(f"{folder} says that it is quantized, and no quantized layer was found in it")
    return model


def read_tokenizer(path: str | os.PathLike[str] | None) -> Any | None:
    """The tokenizer in a folder or under an id of the hub, or None."""
    from transformers import AutoTokenizer

    if path is None:
        return None
    try:
        return AutoTokenizer.from_pretrained(os.fspath(path))
    except Exception:  # whatever is wrong with it, the model has none that can be written along
        return None


def read_texts(path: str | os.PathLike[str], tokenizer: Any = None) -> list[str]:
    """The texts of a .jsonl file, one a line, or of a text file, one a paragraph.

    A line of JSON is a string, or an object with `text`, with `prompt` and `completion`, or with `messages`, which the
    tokenizer's chat template joins where it has one.

    Raises:
        BadFolder: the file cannot be read. BadOption: a line that is none of these, by its number.
        NeedsCalibration: it holds no text.
    """
    file = Path(check_path(path, "texts"))
    try:
        content = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadFolder(f"{file} is no text in UTF-8: {error}") from error
    except OSError as error:
        raise BadFolder(f"cannot read {file}: {error.strerror or error}") from error
    lines = file.suffix in (".jsonl", ".json", ".ndjson")
    texts = list(_json_texts(file, content, tokenizer)) if lines else [t for t in content.split("\n\n") if t.strip()]
    if not any(text.strip() for text in texts):
        raise NeedsCalibration(f"{file} holds no text")
    return texts


def _json_texts(file: Path, content: str, tokenizer: Any) -> Iterator[str]:
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise BadOption(f"{file}, line {number}, is no JSON: {error}") from error
        text = _text(row, tokenizer)
        if text is None:
            keys = (
                f"an object with {', '.join(map(str, row)) or 'nothing'}" if isinstance(row, dict) else repr(row)[:40]
            )
            raise BadOption(
                f"{file}, line {number}, is {keys}: it wants a string, or text, prompt and completion, or messages"
            )
        yield text


def _text(row: Any, tokenizer: Any) -> str | None:
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        return None
    if isinstance(row.get("text"), str):
        return row["text"]
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        return row["prompt"] + row["completion"]
    messages = row.get("messages")
    if isinstance(messages, list) and messages and all(isinstance(m, dict) and "content" in m for m in messages):
        if getattr(tokenizer, "chat_template", None):
            return tokenizer.apply_chat_template(messages, tokenize=False)
        return "\n".join(str(m["content"]) for m in messages)
    return None

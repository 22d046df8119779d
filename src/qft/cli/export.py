"""`qft export`"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Format(StrEnum):
    safetensors = "safetensors"
    gguf = "gguf"


def command(
    folder: Annotated[str, typer.Argument(help="Of an adapter, or of a quantized model.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    format: Annotated[Format, typer.Option(help="For transformers, or for llama.cpp.")] = Format.safetensors,
    base: Annotated[str | None, typer.Option(help="Of an adapter.", show_default="what it names")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the floats.", show_default="the base's")] = None,
    original: Annotated[
        str | None, typer.Option(help="The float model: its weights are taken, not the dequantized ones.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda, xpu, mps, cpu.", show_default="what there is")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the weights in an existing folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, and say what would be written.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Write a quantized model, with its adapter merged in, as floats, for transformers or llama.cpp."""
    from qft.cli._common import answering, finite, said
    from qft.storing import export_folder

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

"""`qft merge`"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Into(StrEnum):
    float = "float"
    quantized = "quantized"


def command(
    adapter: Annotated[str, typer.Argument(help="The folder of an adapter, as qft.save or PEFT writes it.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    base: Annotated[str | None, typer.Option(help="The base model.", show_default="what the adapter names")] = None,
    into: Annotated[Into, typer.Option(help="What the result holds.")] = Into.float,
    dtype: Annotated[str | None, typer.Option(help="Of the floats.", show_default="the base's")] = None,
    original: Annotated[
        str | None, typer.Option(help="The float model: merge into its weights, not into the dequantized ones.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="cuda, xpu, mps, cpu.", show_default="what there is")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the weights in an existing folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, and say what would be written.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Merge an adapter into its base, and write the model that comes of it."""
    from qft.cli._common import answering, finite, said
    from qft.storing import merge_folder

    with answering(as_json) as answer:
        written = merge_folder(
            adapter,
            out,
            base=base,
            into=into.value,
            dtype=dtype,
            original=original,
            device=device,
            overwrite=overwrite,
            dry_run=dry_run,
        )
        text = said(written)
        if not dry_run:
            text += f"\n{written.report['weights']} weights: {written.report['recommendation']}"
        answer(finite(written.to_dict()), text)

"""The verb `qft merge`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from qft_cli import AsJson, Base, Device, DryRun, FloatDtype, Original, Overwrite


class Into(StrEnum):
    """What `qft merge` merges into."""

    float = "float"
    quantized = "quantized"


def command(
    adapter: Annotated[str, typer.Argument(help="The folder of an adapter, as qft.save or PEFT writes it.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    base: Base = None,
    into: Annotated[Into, typer.Option(help="What the result holds.")] = Into.float,
    dtype: FloatDtype = None,
    original: Original = None,
    device: Device = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Merge an adapter into its base, and write the model that comes of it."""
    from qft.cli._common import answering, finite, said
    from qft.cli._folders import merge_folder

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

"""The verb `qft quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qft_cli import AsJson, Device, DryRun, Overwrite, complete_quantizer


def command(
    model: Annotated[str, typer.Argument(help="A float model's folder, or a hub id.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    quantizer: Annotated[
        str, typer.Option(help="Its name, with options: 'nf4', 'hqq:bits=3'.", autocompletion=complete_quantizer)
    ] = "nf4",
    calibration: Annotated[
        Path | None, typer.Option(help="Texts for quantizers that need data: jsonl, json, csv, parquet; or txt.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of what stays float.")] = "auto",
    device: Device = None,
    skip: Annotated[list[str] | None, typer.Option(help="A module to leave; may be given again.")] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a model and store it with its tokenizer, for transformers and qft to load."""
    from qft.cli._common import answering, finite, said
    from qft.cli._folders import quantize_folder

    with answering(as_json) as answer:
        written = quantize_folder(
            model,
            out,
            quantizer,
            calibration=calibration,
            dtype=dtype,
            device=device,
            skip=skip or None,
            overwrite=overwrite,
            dry_run=dry_run,
        )
        answer(finite(written.to_dict()), said(written))

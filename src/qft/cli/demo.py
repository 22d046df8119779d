"""The verb `qft demo`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from qft.cli._demo import DemoResult

STAGES = {
    "float": "float",
    "float tuned": "float, tuned identically",
    "quantized": "quantized",
    "tuned": "tuned, with its adapter",
    "merged": "merged, exported, loaded back",
}


def command(
    quantizer: Annotated[
        str, typer.Option(help="Its name, with options: 'nf4', 'reference:format=int,bits=3'.")
    ] = "nf4",
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Training steps.", show_default="as many as the time allows, at most 100"),
    ] = None,
    minutes: Annotated[
        float, typer.Option(help="End within this time, by fewer steps and a shorter evaluation; not with --steps.")
    ] = 5.0,
    model: Annotated[
        str | None, typer.Option(help="A folder or a hub id.", show_default="SmolLM2-135M-Instruct, from a package")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder for the exported model and the adapter.")] = Path("qft-demo"),
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences a step.")] = 2,
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens a sequence.")] = 256,
    learning_rate: Annotated[float, typer.Option(help="At the start; it falls to zero.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of the adapter's start and of the batches.")] = 0,
    compare_float: Annotated[
        bool, typer.Option("--compare-float", help="Also tune the float model identically, and report the gap.")
    ] = False,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
) -> None:
    """Quantize a real language model, fine-tune it, merge it, export it and load it back."""
    from rich.console import Console

    from qft.cli._demo import run_demo
    from qft.errors import BadFolder

    if json is not None and (json.is_dir() or not json.absolute().parent.is_dir()):
        raise BadFolder(f"Cannot write {str(json)!r} (--json): it is a folder, or its folder does not exist.")
    result = run_demo(
        model,
        quantizer,
        steps=steps,
        minutes=minutes,
        out=out,
        seed=seed,
        batch_size=batch_size,
        sequence_length=sequence_length,
        learning_rate=learning_rate,
        compare_float=compare_float,
    )
    if json is not None:
        result.write(json)
    report(result, Console())


def report(result: DemoResult, console: Console) -> None:
    """The figures as a table, then what the exported model says."""
    from rich.table import Table

    table = Table("", "held-out perplexity", "weights in memory", header_style="bold")
    for column in table.columns[1:]:
        column.justify = "right"
    for stage, label in STAGES.items():
        if stage in result.perplexity:
            nbytes = _size(result.nbytes[stage]) if stage in result.nbytes else ""
            table.add_row(label, f"{result.perplexity[stage]:.3f}", nbytes)
    tuning, total = result.seconds["tune"], result.seconds["total"]
    speed = f"{result.tokens_per_second:.0f} tokens/s on {result.device} in {result.dtype}"
    lines = [
        f"{result.model} in {result.quantizer}, {result.bits_per_weight:.2f} bits a quantized weight",
        table,
        f"tuned for {result.steps} step{'s' * (result.steps > 1)} in {tuning:.0f} s: {speed}; {total:.0f} s in all",
    ]
    if result.sized:
        lines.append(result.sized)
    if result.gap is not None:
        lines.append(f"gap to the float model tuned identically: {result.gap:.1%}")
    if "tuning peak" in result.nbytes:
        lines.append(f"most memory while tuning: {_size(result.nbytes['tuning peak'])}")
    lines += [f"exported to {result.folder}; loaded back, it says:", f"  {result.answer!r}"]
    console.print(*lines, sep="\n", highlight=False, markup=False, soft_wrap=True)


def _size(nbytes: int) -> str:
    return f"{nbytes / 2**30:.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.1f} MiB"

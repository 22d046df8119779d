"""The verb `qft plan`."""

from __future__ import annotations

from typing import Annotated

import typer

from qft_cli import AsJson, complete_quantizer


def command(
    model: Annotated[str, typer.Argument(help="A folder, its config.json, or a hub id that was downloaded before.")],
    quantizer: Annotated[
        str, typer.Option(help="Its name, with options: 'nf4', 'hqq:bits=3'.", autocompletion=complete_quantizer)
    ] = "nf4",
    sequence_length: Annotated[int, typer.Option(min=1, help="Tokens a sequence.")] = 2048,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences a step.")] = 1,
    memory: Annotated[
        str | None,
        typer.Option(help="What there is, '24GB': finds what fits. Or which blocks keep activations: least, most."),
    ] = None,
    lora_r: Annotated[int, typer.Option(min=1, help="Rank of the adapter.")] = 16,
    target_modules: Annotated[str, typer.Option(help="Adapted layers, with commas.")] = "all-linear",
    optimizer: Annotated[
        str, typer.Option(help="adamw, adamw8bit, paged_adamw8bit, paged_adamw32bit, sgd, sgd_momentum.")
    ] = "adamw",
    offload: Annotated[str | None, typer.Option(help="To host memory: activations, weights, all.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the model.", show_default="its config's")] = None,
    loading: Annotated[str, typer.Option(help="folder: streamed; memory: quantized in place.")] = "folder",
    cards: Annotated[int, typer.Option(min=1, help="Shard over so many.")] = 1,
    plain: Annotated[bool, typer.Option("--plain", help="Without qft.optimize_training.")] = False,
    as_json: AsJson = False,
) -> None:
    """Count the memory that a fine-tune takes, before any is spent. Exits with 1 where --memory is too little."""
    from peft import LoraConfig

    import qft
    from qft.cli._common import answering
    from qft.core.files import check_path

    targets = target_modules if "," not in target_modules else [t.strip() for t in target_modules.split(",")]
    if targets != "all-linear" and isinstance(targets, str):
        targets = [targets]
    with answering(as_json) as answer:
        plan = qft.plan(
            check_path(model, "file or folder"),
            quantizer,
            sequence_length=sequence_length,
            batch_size=batch_size,
            adapter=LoraConfig(r=lora_r, lora_alpha=lora_r, target_modules=targets),
            optimizer=optimizer,
            memory="least" if memory is None else memory,
            fast=not plain,
            cards=cards,
            loading=loading,
            dtype=dtype,
            offload=offload,
        )
        answer(plan.to_dict(), str(plan))
    if memory is not None and memory[:1].isdigit() and not plan.fits(memory):
        raise typer.Exit(1)

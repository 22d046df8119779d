"""The verb `qft audit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qft_cli import AsJson, Base, Device


def command(
    folder: Annotated[str, typer.Argument(help="Of a quantized model, or of an adapter.")],
    base: Base = None,
    original: Annotated[str | None, typer.Option(help="The float model: adds the error of each weight.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Texts (jsonl, json, csv, parquet, txt): adds activations, and errors of outputs."),
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Weigh a quantized model: bits a weight, what stayed float and why, errors layer by layer."""
    import qft
    from qft.cli._common import answering
    from qft.core.files import check_model_path
    from qft.data.files import read_texts
    from qft.errors import BadFolder
    from qft.saving.open import find_tokenizer, open_model

    with answering(as_json) as answer:
        float_model = None if original is None else check_model_path(original)
        tokenizer = texts = None
        if data is not None:
            model_of = base or original or folder
            tokenizer = find_tokenizer(folder, model_of)
            texts = read_texts(data, tokenizer)
            if tokenizer is None:
                raise BadFolder(f"{model_of} holds no tokenizer that can be read, and --data is texts")
        model = open_model(folder, base, device=device)
        audit = qft.audit(model, original=float_model, data=texts, tokenizer=tokenizer)
        answer(audit.to_dict(), str(audit))

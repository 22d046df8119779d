"""The verb `qft doctor`."""

from __future__ import annotations

from typing import Annotated

import typer


def command(as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout.")] = False) -> None:
    """Look at this machine: what works, what does not, and what to do. Exits with 1 where there are problems."""
    import qft
    from qft.cli._common import answering

    with answering(as_json) as answer:
        found = qft.doctor()
        answer(found.to_dict(), str(found))
    if not found.ok:
        raise typer.Exit(1)

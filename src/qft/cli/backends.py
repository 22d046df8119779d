"""The verb `qft backends`."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def command(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document on stdout, with capabilities.")] = False,
) -> None:
    """List the quantizers, whether each is ready on this machine, and what it can do."""
    import qft
    from qft.cli._common import answering, finite

    infos = qft.available_quantizers().values()
    with answering(as_json) as answer:
        if as_json:
            answer([finite({**vars(info), "capabilities": _capabilities(info.name)}) for info in infos], "")
            return
    _table(list(infos))


def _capabilities(name: str) -> dict[str, Any] | None:
    """Of a quantizer's default configuration; None where it has none on this machine."""
    import qft

    try:
        return qft.capabilities(name).as_dict()
    except Exception:  # one that cannot be built here is still in the list, with its hint
        return None


def _table(infos: list[Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    colours = {"ready": "green", "missing": "yellow", "unusable": "red"}
    table = Table("name", "state", "what it is", "bits", "merges", "devices", "what to do", header_style="bold")
    for info in infos:
        found = _capabilities(info.name) or {}
        bits = f"{found['bits']:g}" if found else ""
        allowed = [
            word for word, key in (("float", "merge_to_float"), ("quantized", "merge_to_quantized")) if found.get(key)
        ]
        state = f"[{colours[info.state]}]{info.state}[/]"
        devices = " ".join(found.get("devices", ()))
        table.add_row(info.name, state, escape(info.summary), bits, ", ".join(allowed), devices, escape(info.hint))
    Console().print(table)

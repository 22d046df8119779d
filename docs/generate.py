"""Writes docs/capabilities.md from the quantizers' own flags; with --check, fails where the page is stale."""

import argparse
import dataclasses
import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import qft
from qft.quantizer import DERIVED, Capabilities
from qft.registry import ENTRY_POINTS

PAGE = Path(__file__).with_name("capabilities.md")
DECLARED = tuple(field.name for field in dataclasses.fields(Capabilities))
HEAD = """# What each quantizer can do

Written by `python docs/generate.py` from `qft.capabilities(name)`; do not edit it. The flags are those of each name's
default options. Support is derived, never declared twice: what the second table says follows from the first.
"""


def page() -> str:
    third_parties = {point.name for point in importlib.metadata.entry_points(group=ENTRY_POINTS)}
    names = [name for name in qft.available_quantizers() if name not in third_parties]
    flags = {name: qft.capabilities(name) for name in names}
    summaries = {name: qft.available_quantizers()[name].summary for name in names}
    parts = [
        HEAD,
        "## Declared\n",
        _table(["", *names], [["", *summaries.values()], *_rows(DECLARED, flags)]),
        "\n## Derived\n",
        _table(["", *names], _rows(DERIVED, flags)),
        "\n## What the flags mean\n",
        *(f"- `{name}`: {meaning}" for name, meaning in _meanings().items()),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _rows(names: tuple[str, ...], flags: dict[str, Capabilities]) -> list[list[str]]:
    return [[f"`{name}`", *(_cell(getattr(caps, name)) for caps in flags.values())] for name in names]


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "–"
    return ", ".join(sorted(value)) if isinstance(value, frozenset) else f"{value:g}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _meanings() -> dict[str, str]:
    """From the `Attributes:` of the class's docstring, and from the derived properties' own docstrings."""
    attributes = (Capabilities.__doc__ or "").partition("Attributes:")[2]
    meanings: dict[str, str] = {}
    for line in attributes.splitlines():
        name, colon, text = line.strip().partition(": ")
        if colon and name in DECLARED:
            meanings[name] = text[:1].upper() + text[1:]
        elif line.strip() and meanings:
            meanings[next(reversed(meanings))] += " " + line.strip()
    for name in DERIVED:
        meanings[name] = (getattr(Capabilities, name).__doc__ or "").strip()
    return meanings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the page is stale")
    if not parser.parse_args().check:
        PAGE.write_text(page(), encoding="utf-8")
    elif not PAGE.exists() or PAGE.read_text(encoding="utf-8") != page():
        sys.exit("docs/capabilities.md is stale: run 'python docs/generate.py'")


if __name__ == "__main__":
    main()

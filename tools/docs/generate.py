"""Writes capabilities.md from the quantizers' own flags, api.md and cli.md from docstrings, and the tables of figures.

With --check, nothing is written, and the exit status is 1 where a page is stale.
"""

import argparse
import dataclasses
import importlib.metadata
import re
import sys
from pathlib import Path
from typing import Any

import qft
from qft.core.quantizer import DERIVED, Capabilities
from qft.core.registry import ENTRY_POINTS

sys.path.insert(0, str(Path(__file__).parent))
import guide_tables
import memory_tables
import reference
import speed_tables
import tables

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "capabilities.md"
FIGURES = tuple(
    DOCS / name
    for name in (
        "how_to_start.md", "backends.md", "speed.md", "methods.md", "memory.md", "which_quantizer.md", "concepts.md",
        "fit_memory.md", "merging.md", "auto.md", "from_peft.md",
    )
)  # fmt: skip
TABLES = tables.TABLES | speed_tables.TABLES | memory_tables.TABLES | guide_tables.TABLES
DECLARED = tuple(field.name for field in dataclasses.fields(Capabilities))
HEAD = """# What each quantizer can do

Written by `python tools/docs/generate.py` from `qft.capabilities(name)`; do not edit it. The flags are those of each name's
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


def generated() -> dict[Path, str]:
    """The pages that are written whole."""
    return {PAGE: page(), PAGE.with_name("api.md"): reference.api(), PAGE.with_name("cli.md"): reference.cli()}


def with_tables(text: str) -> str:
    """A page with what stands between `<!-- table: name -->` and `<!-- end -->` made anew."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- table: {match[1]} -->\n\n{TABLES[match[1]]()}\n\n<!-- end -->"

    return re.sub(r"<!-- table: (\w+) -->.*?<!-- end -->", fill, text, flags=re.DOTALL)


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
    check = parser.parse_args().check
    for path, text in {**generated(), **{p: with_tables(p.read_text(encoding="utf-8")) for p in FIGURES}}.items():
        if not check:
            path.write_text(text, encoding="utf-8")
        elif not path.exists() or path.read_text(encoding="utf-8") != text:
            sys.exit(f"docs/{path.name} is stale: run 'python tools/docs/generate.py'")


if __name__ == "__main__":
    main()

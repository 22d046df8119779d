"""An audit as a figure, drawn without pyplot: nothing global is touched, and no display is needed."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

from qft.core.files import write
from qft.core.names import place
from qft.errors import BadOption
from qft.pipeline.audit.views import need

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from qft.pipeline.audit.result import Audit

# title, figure drawn with a full line, and figure of the same kind drawn dashed
_PANELS = (
    ("relative error of the weights", "error", "adapted_error", "with adapters"),
    ("relative error of the outputs", "output_error", "adapted_output_error", "with adapters"),
    ("bits per weight", "bits_per_weight", None, None),
    ("largest activation", "input_max", "output_max", "going out"),
)
_LEGEND = 28  # kinds of layers that it names


def plot(audit: Audit, path: str | os.PathLike[str] | None) -> Figure:
    """`Audit.plot`."""
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise need("plot", "matplotlib") from error

    panels = [p for p in _PANELS if any(getattr(w, p[1]) is not None for w in audit.weights.values())]
    lines, ticks = _lines(audit)
    columns = 2 if len(panels) == 4 else max(1, len(panels))
    rows = math.ceil(len(panels) / columns)
    legend = 0.2 * math.ceil((min(len(lines), _LEGEND) + 2) / 4)
    figure = Figure(figsize=(max(6.0, 4.8 * columns), 3.2 * max(1, rows) + legend), layout="constrained")
    colors = colormaps["tab10" if len(lines) <= 10 else "tab20"]
    entries: dict[str, Any] = {}
    notes: dict[str, Any] = {}
    axes: Any = figure.subplots(rows, columns, squeeze=False).flat if panels else []
    for axis, (title, full, dashed, note) in zip(axes, panels):
        for i, points in enumerate(lines.values()):
            _draw(axis, audit, points, full, color=colors(i % colors.N), marker="o")
            if dashed is not None:
                drawn = _draw(axis, audit, points, dashed, color=colors(i % colors.N), marker="o", dashed=True)
                if drawn and note == "with adapters":
                    notes["with adapters"] = Line2D([], [], color="0.4", linestyle="--", marker="o", mfc="white")
        axis.set_title(title if full != "input_max" else "largest activation (dashed: going out)", fontsize=10)
        axis.set_xlabel("block")
        axis.grid(alpha=0.25)
        if full == "input_max":
            axis.set_yscale("log")
            axis.axhline(65504, color="tab:red", linewidth=1)
            axis.annotate("float16's largest", (0.02, 65504), xycoords=("axes fraction", "data"), fontsize=8, va="top")
        else:
            axis.set_ylim(bottom=0)
            axis.margins(y=0.1)
        if ticks is None:
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        else:
            axis.set_xticks(*ticks)
    for i, label in enumerate(list(lines)[:_LEGEND]):
        entries[label] = Line2D([], [], color=colors(i % colors.N), marker="o")
    if len(lines) > _LEGEND:
        entries[f"and {len(lines) - _LEGEND} more"] = Line2D([], [], linestyle="")
    entries |= notes
    if entries:
        figure.legend(
            list(entries.values()),
            list(entries),
            loc="outside lower center",
            ncols=min(4, len(entries)),
            fontsize=8,
            frameon=False,
        )
    if path is not None:
        _save(figure, path)
    return figure


def _lines(audit: Audit) -> tuple[dict[str, list[tuple[int, str]]], tuple[list[int], list[str]] | None]:
    """Kind of layer → its places along the axis and names; and the axis's ticks where they are not block numbers."""
    places = {name: place(name) for name in audit.weights}
    stacks = {name: name.split(f".{block}.")[0] for name, (block, _) in places.items() if block is not None}
    last = max((block for block, _ in places.values() if block is not None), default=-1)
    several = len(set(stacks.values())) > 1  # an encoder's and a decoder's blocks
    lines: dict[str, list[tuple[int, str]]] = {}
    for name, (block, kind) in places.items():
        label = f"{stacks[name]}: {kind}" if several and block is not None else kind
        lines.setdefault(label, []).append((last + 1 if block is None else block, name))
    if all(block is not None for block, _ in places.values()):
        return lines, None
    shown = list(range(0, last + 1, max(1, math.ceil((last + 1) / 8))))
    return lines, ([*shown, last + 1], [*map(str, shown), "outside"])


def _draw(axis: Any, audit: Audit, points: list[tuple[int, str]], key: str, dashed: bool = False, **style: Any) -> bool:
    """Every figure as a point, and a line through the means of those at one place, such as a block's experts."""
    found: dict[int, list[float]] = {}
    for x, name in points:
        value = getattr(audit.weights[name], key)
        if value is not None and math.isfinite(value):
            found.setdefault(x, []).append(value)
    if not found:
        return False
    xs = sorted(found)
    face = {"mfc": "white"} if dashed else {}
    axis.plot(xs, [sum(found[x]) / len(found[x]) for x in xs], linestyle="--" if dashed else "-", ms=4, **face, **style)
    single = [(x, v) for x in xs for v in found[x] if len(found[x]) > 1]
    if single:
        axis.plot(*zip(*single), linestyle="", marker=".", ms=3, alpha=0.5, color=style["color"])
    return True


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    ending = os.path.splitext(os.fspath(path))[1].removeprefix(".").lower() or "png"
    known = figure.canvas.get_supported_filetypes()
    if ending not in known:
        raise BadOption(f"matplotlib writes no {ending!r} files; it writes {', '.join(sorted(known))}")
    write(path, lambda partial: figure.savefig(partial, format=ending, dpi=150))

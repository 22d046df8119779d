"""Plots as inline SVG: lines, bars, a heat strip. Colours are CSS variables of the page, so light, dark and print agree."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

WIDTH, HEIGHT = 760, 280
LEFT, RIGHT, TOP, BOTTOM = 78, 14, 12, 44
SERIES = 6
"""Colours that the page's style defines, `--s0` to `--s5`; more series start over with other dashes."""
DASHES = ("", "7 4", "2 3", "9 3 2 3")
POINTS = 1000
"""Points that a line keeps: of more, each stretch keeps its smallest and its largest."""
CHAR = 6.3
"""Width of a character of 11 px, about."""

Series = Sequence[float] | Sequence[tuple[float, float]] | Mapping[float, float]


def number(value: float) -> str:
    """A number for people: four digits at most, exponents only where they are needed."""
    if not math.isfinite(value):
        return {math.inf: "∞", -math.inf: "−∞"}.get(value, "nan")
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        text = f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
        return text.replace("-", "−")
    digits, _, power = f"{value:.2e}".partition("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}".replace("-", "−")


def lines(series: Mapping[str, Series], *, x: str = "", y: str = "", log: bool = False) -> str:
    """Lines over a numeric axis.

    Args:
        series: name → y values (over 0, 1, ...), (x, y) pairs, or {x: y}. Where a y is NaN, infinite, or on a
            logarithmic axis not positive, the line has a gap.
        log: a logarithmic y axis.
    """
    points = {name: _pairs(values) for name, values in series.items()}
    drawn = {name: _thinned(p, log) for name, p in points.items()}
    kept = [p for each in drawn.values() for p in each if _can(p[1], log)]
    if not kept:
        return _empty()
    whole = all(p[0].is_integer() for p in kept)
    horizontal = _Axis([p[0] for p in kept], LEFT, WIDTH - RIGHT, whole=whole)
    vertical = _Axis([p[1] for p in kept], HEIGHT - BOTTOM, TOP, log)
    parts = [_grid(vertical, y), _scale(horizontal, x)]
    for index, (name, each) in enumerate(drawn.items()):
        style = f"stroke:var(--s{index % SERIES})"
        dash = DASHES[index // SERIES % len(DASHES)] if len(drawn) > SERIES else DASHES[index % len(DASHES)]
        for piece in _pieces(each, log):
            at = [(horizontal(a), vertical(b)) for a, b in piece]
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in at)
            parts.append(f'<polyline class="line" style="{style}" stroke-dasharray="{dash}" points="{path}"/>')
        if len(each) <= 40:
            fill = f"fill:var(--s{index % SERIES})"
            for a, b in (p for p in each if _can(p[1], log)):
                tip = _title(f"{name}: {number(b)} at {number(a)}")
                parts.append(
                    f'<circle style="{fill}" cx="{horizontal(a):.1f}" cy="{vertical(b):.1f}" r="2.6">{tip}</circle>'
                )
    return _svg("".join(parts), f"lines: {', '.join(series)}") + _legend(list(drawn))


def bars(values: Mapping[str, float], *, x: str = "", y: str = "") -> str:
    """A bar a name, from zero. A value that is NaN or infinite has a cross in its place."""
    finite = {name: v for name, v in values.items() if math.isfinite(v)}
    if not values:
        return _empty()
    vertical = _Axis([0.0, *finite.values()], HEIGHT - BOTTOM, TOP)
    step = (WIDTH - LEFT - RIGHT) / len(values)
    zero = vertical(0.0)
    parts = [_grid(vertical, y)]
    every = max(1, math.ceil(max(len(n) for n in values) * CHAR / step))
    long = every > 1 and len(values) <= 24  # cut short rather than left out
    for index, (name, value) in enumerate(values.items()):
        at = LEFT + index * step
        tip = _title(f"{name}: {number(value)}")
        if name in finite:
            top = vertical(value)
            box = f'x="{at + step * 0.1:.1f}" y="{min(top, zero):.1f}" width="{step * 0.8:.1f}" height="{abs(zero - top):.1f}"'
            parts.append(f'<rect style="fill:var(--s0)" {box}>{tip}</rect>')
        else:
            parts.append(f'<text class="bad" x="{at + step / 2:.1f}" y="{zero - 4:.1f}">×{tip}</text>')
        if long or index % every == 0:
            shown = _short(name, int(step / CHAR) - 1) if long else name
            parts.append(
                f'<text class="mid" x="{at + step / 2:.1f}" y="{HEIGHT - BOTTOM + 15}">{html.escape(shown)}</text>'
            )
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{zero:.1f}" y2="{zero:.1f}"/>')
    parts.append(_label(x))
    return _svg("".join(parts), f"bars: {y or x}")


def heat(rows: Mapping[str, Sequence[float | None]], *, x: str = "", columns: Sequence[str] | None = None) -> str:
    """A strip of cells a row, darker where the value is larger; the scale is shared and starts at zero.

    Args:
        rows: name → values; None has no cell, NaN and infinity have a crossed one.
        columns: a name for each cell of a row; their numbers otherwise.
    """
    width = max((len(r) for r in rows.values()), default=0)
    largest = max((v for r in rows.values() for v in r if v is not None and math.isfinite(v)), default=0.0)
    if not width:
        return _empty()
    names = list(columns) if columns is not None else [str(i) for i in range(width)]
    left = min(260.0, max(len(n) for n in rows) * CHAR + 12)
    step, tall = (WIDTH - left - RIGHT) / width, 20
    height = TOP + tall * len(rows) + 62
    parts = []
    for row, (name, values) in enumerate(rows.items()):
        y = TOP + row * tall
        shown = _short(name, 40)
        parts.append(f'<text class="end" x="{left - 8:.1f}" y="{y + 14}">{html.escape(shown)}</text>')
        for column, value in enumerate(values):
            if value is None:
                continue
            tip = _title(f"{name}, {names[column]}: {number(value)}")
            box = f'x="{left + column * step:.2f}" y="{y + 1}" width="{max(step - 0.6, 0.4):.2f}" height="{tall - 2}"'
            if math.isfinite(value):
                share = value / largest if largest > 0 else 0.0
                parts.append(
                    f'<rect class="cell" style="fill-opacity:{0.06 + 0.94 * max(0.0, share):.3f}" {box}>{tip}</rect>'
                )
            else:
                parts.append(f'<rect class="bad" {box}>{tip}</rect>')
    below = TOP + tall * len(rows) + 14
    every = max(1, math.ceil(max(len(n) for n in names) * CHAR / step))
    for column in range(0, width, every):
        parts.append(
            f'<text class="mid" x="{left + (column + 0.5) * step:.1f}" y="{below}">{html.escape(names[column])}</text>'
        )
    parts.append(f'<text class="mid" x="{(left + WIDTH - RIGHT) / 2:.1f}" y="{below + 16}">{html.escape(x)}</text>')
    parts.append(f'<text class="end" x="{left + 22:.1f}" y="{below + 35}">0</text>')
    for i in range(20):
        box = f'x="{left + 28 + i * 6:.1f}" y="{below + 26}" width="6.2" height="10"'
        parts.append(f'<rect class="cell" style="fill-opacity:{0.06 + 0.94 * i / 19:.3f}" {box}/>')
    parts.append(f'<text x="{left + 154:.1f}" y="{below + 35}">{number(largest)}</text>')
    return _svg("".join(parts), f"heat strip: {', '.join(rows)}", height)


# ---- axes ----------------------------------------------------------------------------------------------------


class _Axis:
    """From values to places, with round ticks."""

    def __init__(self, values: Sequence[float], start: float, end: float, log: bool = False, whole: bool = False):
        self.log, self.start, self.end = log, start, end
        low, high = min(values), max(values)
        if log:
            low, high = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
            high += high == low
            jump = math.ceil((high - low) / 6)
            self.ticks = [10.0**e for e in range(low, high + 1, jump)]
        else:
            if low == high:
                pad = abs(low) * 0.1 or 1.0
                low, high = low - pad * (low != 0), high + pad
            step = _round_step((high - low) / 5)
            step = max(1.0, round(step)) if whole else step
            if start > end:  # upwards: to full steps
                low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
            first = math.ceil(low / step - 1e-9)
            self.ticks = [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]
        self.low, self.high = low, high

    def __call__(self, value: float) -> float:
        at = math.log10(value) if self.log else value
        return self.start + (at - self.low) / (self.high - self.low) * (self.end - self.start)


def _round_step(rough: float) -> float:
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)


def _grid(axis: _Axis, label: str) -> str:
    parts = []
    for tick in axis.ticks:
        y = axis(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="end" x="{LEFT - 8}" y="{y + 4:.1f}">{_tick(tick, axis)}</text>')
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text class="mid" transform="translate(13 {middle:.0f}) rotate(-90)">{html.escape(label)}</text>')
    return "".join(parts)


def _scale(axis: _Axis, label: str) -> str:
    y = HEIGHT - BOTTOM
    ticks = [f'<text class="mid" x="{axis(t):.1f}" y="{y + 15}">{_tick(t, axis)}</text>' for t in axis.ticks]
    return f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>{"".join(ticks)}{_label(label)}'


def _tick(value: float, axis: _Axis) -> str:
    return number(0.0 if not axis.log and abs(value) < 1e-9 * max(abs(axis.low), abs(axis.high)) else value)


def _label(text: str) -> str:
    return f'<text class="mid" x="{(LEFT + WIDTH - RIGHT) / 2:.0f}" y="{HEIGHT - 8}">{html.escape(text)}</text>'


# ---- points --------------------------------------------------------------------------------------------------


def _pairs(values: Series) -> list[tuple[float, float]]:
    items = list(values.items()) if isinstance(values, Mapping) else list(values)
    if items and isinstance(items[0], tuple | list):
        return [(float(a), float(b)) for a, b in items if math.isfinite(float(a))]
    return [(float(i), float(v)) for i, v in enumerate(items)]


def _can(value: float, log: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log)


def _thinned(points: list[tuple[float, float]], log: bool) -> list[tuple[float, float]]:
    if len(points) <= POINTS:
        return points
    size = math.ceil(2 * len(points) / POINTS)
    kept = []
    for start in range(0, len(points), size):
        piece = points[start : start + size]
        if all(_can(p[1], log) for p in piece):
            ends = min(piece, key=lambda p: p[1]), max(piece, key=lambda p: p[1])
            piece = sorted(set(ends), key=piece.index)
        kept += piece
    return kept


def _pieces(points: list[tuple[float, float]], log: bool) -> list[list[tuple[float, float]]]:
    pieces: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if _can(point[1], log):
            pieces[-1].append(point)
        elif pieces[-1]:
            pieces.append([])
    return [p for p in pieces if len(p) > 1]


# ---- elements ------------------------------------------------------------------------------------------------


def _short(name: str, most: int) -> str:
    """The end of a long name, which tells layers apart."""
    return name if len(name) <= max(most, 3) else "…" + name[-max(most - 1, 2) :]


def _title(text: str) -> str:
    return f"<title>{html.escape(text)}</title>"


def _svg(inside: str, label: str, height: float = HEIGHT) -> str:
    label = html.escape(label if len(label) < 120 else label[:119] + "…")
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img" aria-label="{label}">{inside}</svg>'


def _legend(names: list[str]) -> str:
    if len(names) < 2:
        return ""
    items = []
    for index, name in enumerate(names):
        dash = DASHES[index // SERIES % len(DASHES)] if len(names) > SERIES else DASHES[index % len(DASHES)]
        stroke = f'style="stroke:var(--s{index % SERIES})" stroke-dasharray="{dash}"'
        key = f'<svg class="key" viewBox="0 0 26 10"><line class="line" {stroke} x1="0" x2="26" y1="5" y2="5"/></svg>'
        items.append(f"<span>{key}{html.escape(name)}</span>")
    return f'<div class="legend">{"".join(items)}</div>'


def _empty() -> str:
    return '<p class="none">nothing to draw: no finite values</p>'

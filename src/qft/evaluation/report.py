"""One self-contained HTML page of text, tables and plots: no network, no scripts, light and dark, printable."""

from __future__ import annotations

import html
import math
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qft.core.files import write
from qft.errors import BadFolder
from qft.evaluation import svg

_LIGHT = (
    "--page:#ffffff;--ink:#1c2330;--soft:#5b6472;--rule:#d9dde3;--panel:#f5f7f9;--warn:#b45309;--warnbg:#fff6e6;"
    "--s0:#2563b8;--s1:#c2570c;--s2:#0f8a5f;--s3:#a63a8f;--s4:#8a6d00;--s5:#4b5563;"
)
_DARK = (
    "--page:#14181f;--ink:#e6e9ee;--soft:#a0a8b4;--rule:#343b47;--panel:#1d232c;--warn:#fbbf24;--warnbg:#2e2614;"
    "--s0:#6ea8fe;--s1:#fb923c;--s2:#4ade9f;--s3:#e58ad3;--s4:#e5c453;--s5:#aab4c3;"
)
_STYLE = """
.qft-report{LIGHTcolor-scheme:light dark;font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;
color:var(--ink);background:var(--page);max-width:860px;margin:0 auto;padding:28px 24px 48px}
@media screen and (prefers-color-scheme:dark){.qft-report{DARK}}
.qft-report h1{font-size:26px;line-height:1.25;margin:0 0 4px;overflow-wrap:anywhere}
.qft-report h2{font-size:19px;margin:34px 0 8px;padding-top:12px;border-top:1px solid var(--rule)}
.qft-report h3{font-size:14px;margin:20px 0 4px}
.qft-report p{margin:6px 0;overflow-wrap:anywhere}
.qft-report .sub,.qft-report .none,.qft-report figcaption,.qft-report footer{color:var(--soft);font-size:13px}
.qft-report .tiles{display:flex;flex-wrap:wrap;gap:10px;margin:16px 0}
.qft-report .tiles div{background:var(--panel);border:1px solid var(--rule);border-radius:8px;padding:8px 14px;
flex:1 1 130px}
.qft-report .tiles b{display:block;font-size:21px;font-variant-numeric:tabular-nums}
.qft-report .tiles span{color:var(--soft);font-size:13px}
.qft-report .warn{border-left:4px solid var(--warn);background:var(--warnbg);padding:8px 12px;margin:10px 0}
.qft-report .rows{overflow-x:auto;margin:10px 0}
.qft-report table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums}
.qft-report caption{caption-side:top;text-align:left;color:var(--soft);font-size:13px;padding-bottom:4px}
.qft-report th,.qft-report td{padding:4px 14px 4px 0;text-align:left;vertical-align:top;border-bottom:1px solid var(--rule)}
.qft-report th{font-weight:600}
.qft-report .n{text-align:right;white-space:nowrap}
.qft-report figure{margin:14px 0;break-inside:avoid}
.qft-report svg{width:100%;height:auto;display:block}
.qft-report svg text{fill:var(--soft);font-size:11px;font-family:inherit}
.qft-report svg .mid{text-anchor:middle}
.qft-report svg .end{text-anchor:end}
.qft-report svg .line{fill:none;stroke-width:2;stroke-linejoin:round}
.qft-report svg .grid{stroke:var(--rule)}
.qft-report svg .axis{stroke:var(--soft)}
.qft-report svg .cell{fill:var(--s0)}
.qft-report svg text.bad{fill:var(--warn);text-anchor:middle;font-weight:700}
.qft-report svg rect.bad{fill:var(--warn)}
.qft-report .legend{display:flex;flex-wrap:wrap;gap:2px 18px;font-size:13px;margin:4px 0 0 10%}
.qft-report .legend svg{display:inline-block;width:26px;height:10px;margin-right:6px}
.qft-report pre{background:var(--panel);border:1px solid var(--rule);border-radius:6px;padding:10px 12px;overflow-x:auto;
font-size:12.5px;white-space:pre-wrap;overflow-wrap:anywhere}
.qft-report footer{margin-top:36px;border-top:1px solid var(--rule);padding-top:8px}
@media print{.qft-report{max-width:none;padding:0;font-size:11pt}.qft-report tr,.qft-report .tiles{break-inside:avoid}
.qft-report h2,.qft-report h3{break-after:avoid}.qft-report .rows{overflow:visible}
.qft-report *{print-color-adjust:exact;-webkit-print-color-adjust:exact}}
""".replace("LIGHT", _LIGHT).replace("DARK", _DARK)
_PAGE = (
    "html,body{margin:0;background:#fff}@media screen and (prefers-color-scheme:dark){html,body{background:#14181f}}"
)
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"


class Report:
    """A page that is put together call by call; each call returns the report itself.

    Whatever is given is shown as text: markup in it is escaped.

    >>> Report("A run").text("It went well.").plot({"loss": [3.0, 2.0, 1.5]}, x="step").write("report.html")
    """

    def __init__(self, title: str, subtitle: str = ""):
        self.title, self.subtitle = str(title), str(subtitle)
        self._parts: list[str] = []

    def section(self, title: str, text: str = "") -> Report:
        """Start a section, with a paragraph where `text` is given."""
        self._parts.append(f"<h2>{_e(title)}</h2>")
        return self.text(text) if text else self

    def text(self, text: str) -> Report:
        """Paragraphs, split at empty lines."""
        self._parts += [f"<p>{_e(p.strip())}</p>" for p in str(text).split("\n\n") if p.strip()]
        return self

    def warn(self, text: str) -> Report:
        """A paragraph that stands out."""
        self._parts.append(f'<div class="warn">{_e(text)}</div>')
        return self

    def code(self, text: str) -> Report:
        """Text in a fixed-width font, its lines as they are."""
        self._parts.append(f"<pre>{_e(text)}</pre>")
        return self

    def tiles(self, figures: Mapping[str, Any]) -> Report:
        """The few figures that matter, large: {what it is: value}."""
        inside = "".join(f"<div><b>{_e(_cell(v))}</b><span>{_e(k)}</span></div>" for k, v in figures.items())
        self._parts.append(f'<div class="tiles">{inside}</div>')
        return self

    def table(
        self, rows: Mapping[str, Any] | Sequence[Any], header: Sequence[str] | None = None, *, caption: str = ""
    ) -> Report:
        """A table; columns that hold numbers only are set to the right.

        Args:
            rows: sequences, mappings (their keys are the header then), or one mapping, which makes two columns.
            header: of the columns.
        """
        if isinstance(rows, Mapping):
            cells = [[k, v] for k, v in rows.items()]
        elif rows and all(isinstance(r, Mapping) for r in rows):
            header = list(header or dict.fromkeys(k for r in rows for k in r))
            cells = [[r.get(k) for k in header] for r in rows]
        else:
            cells = [list(r) for r in rows]
        width = max([len(header or ()), *map(len, cells)])
        cells = [[*r, *[None] * (width - len(r))] for r in cells]
        right = [
            any(_numeric(r[i]) for r in cells) and all(r[i] is None or _numeric(r[i]) for r in cells)
            for i in range(width)
        ]
        kind = ['class="n"' if r else "" for r in right]
        head = (
            "".join(f"<th {kind[i]}>{_e(_cell(h))}</th>" for i, h in enumerate([*header, *[None] * width][:width]))
            if header
            else ""
        )
        body = "".join(
            f"<tr>{''.join(f'<td {kind[i]}>{_e(_cell(v))}</td>' for i, v in enumerate(r))}</tr>" for r in cells
        )
        title = f"<caption>{_e(caption)}</caption>" if caption else ""
        head = f"<thead><tr>{head}</tr></thead>" if head else ""
        self._parts.append(f'<div class="rows"><table>{title}{head}<tbody>{body}</tbody></table></div>')
        return self

    def plot(
        self,
        series: Mapping[str, svg.Series],
        *,
        title: str = "",
        x: str = "",
        y: str = "",
        log: bool = False,
        caption: str = "",
    ) -> Report:
        """Lines, such as loss curves: {name: y values, (x, y) pairs, or {x: y}}; `log` makes the y axis logarithmic."""
        return self._figure(svg.lines(series, x=x, y=y, log=log), title, caption)

    def bars(
        self, values: Mapping[str, float], *, title: str = "", x: str = "", y: str = "", caption: str = ""
    ) -> Report:
        """A bar for each name."""
        return self._figure(svg.bars({str(k): float(v) for k, v in values.items()}, x=x, y=y), title, caption)

    def heat(
        self,
        rows: Mapping[str, Sequence[float | None]],
        *,
        title: str = "",
        x: str = "",
        columns: Sequence[str] | None = None,
        caption: str = "",
    ) -> Report:
        """A strip of cells for each name, darker where the value is larger, such as errors layer by layer."""
        return self._figure(svg.heat(rows, x=x, columns=columns), title, caption)

    def _figure(self, drawing: str, title: str, caption: str) -> Report:
        head = f"<h3>{_e(title)}</h3>" if title else ""
        tail = f"<figcaption>{_e(caption)}</figcaption>" if caption else ""
        self._parts.append(f"<figure>{head}{drawing}{tail}</figure>")
        return self

    def body(self) -> str:
        """The page's content with its style, for a place inside another page."""
        from qft.core.version import __version__

        sub = f'<p class="sub">{_e(self.subtitle)}</p>' if self.subtitle else ""
        made = f"<footer>made with qft {_e(__version__)}, {datetime.now(UTC).date().isoformat()}</footer>"
        inside = f"<h1>{_e(self.title)}</h1>{sub}{''.join(self._parts)}{made}"
        return f'<style>{_STYLE}</style><main class="qft-report">{inside}</main>'

    def html(self) -> str:
        """The whole page."""
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            '<meta name="color-scheme" content="light dark">'
            f"<title>{_e(self.title)}</title><style>{_PAGE}</style></head><body>\n{self.body()}\n</body></html>\n"
        )

    def _repr_html_(self) -> str:
        return self.body()

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Write the page under a temporary name, then rename it.

        Raises:
            BadFolder: the file cannot be written; a file that was there before is left.
        """
        check_writable(path)
        write(path, lambda partial: partial.write_text(self.html(), encoding="utf-8", errors="replace"))
        return Path(path)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse a path that no file can be written to, before the work whose result goes there.

    Raises:
        BadFolder: it is a folder, its folder does not exist, or may not be written to.
    """
    path = Path(path)
    folder = path.absolute().parent
    if path.is_dir():
        raise BadFolder(f"cannot write {path}: it is a folder, give a file in it")
    if not folder.is_dir():
        raise BadFolder(f"cannot write {path}: there is no folder {folder}")
    if not os.access(folder, os.W_OK):
        raise BadFolder(f"cannot write {path}: no permission to write to {folder}")


def _e(text: Any) -> str:
    return html.escape(str(text))


def _numeric(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return svg.number(value) if not value.is_integer() or math.fabs(value) >= 1e5 else f"{value:,.0f}"
    return str(value)

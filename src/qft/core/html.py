"""Summary cards for notebooks: HTML that needs nothing from outside."""

from __future__ import annotations

import html
from collections.abc import Iterable

_STYLE = """
.qft-card{font:13px/1.45 system-ui,sans-serif;border:1px solid rgba(128,128,128,.45);border-radius:8px;
padding:12px 16px;max-width:1100px}
.qft-card h4{margin:0 0 8px;font-size:14px}
.qft-card p{margin:3px 0}
.qft-card .tiles{display:flex;flex-wrap:wrap;gap:8px 28px;margin:8px 0}
.qft-card .tiles b{display:block;font-size:18px}
.qft-card .tiles span{opacity:.7}
.qft-card .warn{border-left:4px solid #d97706;padding-left:8px;margin:8px 0}
.qft-card pre{max-height:420px;overflow:auto;margin-top:6px;font-size:12px;background:none}
"""


def html_card(
    title: str,
    tiles: Iterable[tuple[str, str]] = (),
    *,
    lines: Iterable[str] = (),
    warnings: Iterable[str] = (),
    details: str = "",
) -> str:
    """A card: a title, figures with what they are, lines, warnings, and the text behind a click. All of it is escaped."""
    e = html.escape
    figures = "".join(f"<div><b>{e(big)}</b><span>{e(small)}</span></div>" for big, small in tiles)
    alarms = "".join(f"<p>{e(text)}</p>" for text in warnings)
    return (
        f'<div class="qft-card"><style>{_STYLE}</style><h4>{e(title)}</h4>'
        + (f'<div class="tiles">{figures}</div>' if figures else "")
        + (f'<div class="warn">{alarms}</div>' if alarms else "")
        + "".join(f"<p>{e(line)}</p>" for line in lines)
        + (f"<details><summary>all of it</summary><pre>{e(details)}</pre></details>" if details else "")
        + "</div>"
    )

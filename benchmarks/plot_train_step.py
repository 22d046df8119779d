"""Bars of what `train_step.py` measured: tokens a second and peak memory of every stack, one picture a file of figures.

    python benchmarks/plot_train_step.py [benchmarks/results/train_step-8b-h100.json ...]

Without names it takes every `train_step-*.json` in benchmarks/results/; each picture lies beside its file, as SVG.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
OURS, THEIRS = "#2a6f97", "#b0b7bf"


def plot(found: dict[str, Any], path: Path) -> bool:
    """Draws one file's figures into `path`; False where there is nothing to draw."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "qft"  # the same figures give the same file
    from matplotlib import pyplot

    runs = [r for r in found["runs"] if "error" not in r]
    if not runs:
        return False
    many = len({r["sequence"] for r in runs}) > 1
    names = [
        r["stack"].partition("@")[0]
        + ("" if r["recompute"] == "all" else f", {r['recompute']} recomputed")
        + (f", {r['batch']} × {r['sequence']}" if many else "")
        for r in runs
    ]
    memory = all("peak_gib" in r for r in runs)
    figure, axes = pyplot.subplots(1, 1 + memory, figsize=(10, 1.2 + 0.34 * len(runs)), sharey=True, squeeze=False)
    colours = [OURS if n.startswith("qft") else THEIRS for n in names]
    columns = [("tokens_per_second", "tokens a second", "{:,.0f}"), ("peak_gib", "peak memory, GiB", "{:.1f}")]
    for axis, (key, title, form) in zip(axes[0], columns, strict=False):
        values = [r[key] for r in runs]
        bars = axis.barh(range(len(runs)), values, color=colours)
        axis.bar_label(bars, [form.format(v) for v in values], padding=3, fontsize=8)
        axis.set_xlim(0, max(values) * 1.18)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_yticks(range(len(runs)), names, fontsize=8)
    axes[0][0].invert_yaxis()
    size = "" if many else f", batch {runs[0]['batch']} × {runs[0]['sequence']}"
    title = f"{found['shape'].upper()} shape{size}, rank {found['rank']}: {found['device']}, {found['date'][:10]}"
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--format", choices=("svg", "png"), default="svg")
    options = parser.parse_args()
    for file in options.files or sorted(RESULTS.glob("train_step-*.json")):
        picture = file.with_suffix(f".{options.format}")
        drawn = plot(json.loads(file.read_text(encoding="utf-8")), picture)
        print(picture if drawn else f"{file}: nothing to draw")


if __name__ == "__main__":
    main()

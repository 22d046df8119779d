"""Write the page "Which models?" from the results of `architectures.py`.

python benchmarks/architectures_page.py benchmarks/results/architectures-cpu.json docs/which_models.md
"""

from __future__ import annotations

import json
import sys
from collections import Counter, defaultdict
from pathlib import Path

HEADER = """# Which models?

<!-- written by benchmarks/architectures_page.py -->

qft works over linear layers and fused experts, so most model classes of transformers need no code of their own. This
table shows what was tried: a tiny model of each class with random weights, on a CPU in float32, made by shrinking the
default config of the class (`benchmarks/architectures.py`). It says that the mechanism works for the class; it says
nothing about the quality of a trained model.

Each class is checked for these: every linear layer is quantized or named in the summary with a reason; each adapter gets
a gradient where the float weight gets one; `merge_to_float` gives the outputs of the adapted model; `unmerge` restores
every tensor to the bit; `save` and `load`; `export`, read back by plain transformers; greedy tokens of `generate` are
those of the merged model; `plan` counts the bytes of the quantized weights; `optimize_training` gives the same loss and
gradients. Models of images and text were given text only, and blocks are not compiled in this run.

A class is "right" where no check is refused or wrong; checks that do not apply, such as a loss that a class does not
compute, are named as "skipped". "refused": a check ended in an error of qft that gives the reason. "wrong": a known
defect. "not tried": the class has no tiny config that runs, with the reason.
"""


def page(results: dict[str, dict[str, list[str]]]) -> str:
    """Make the page's text.

    Args:
        results: `task/class/quantizer` → check → `[outcome, detail]`.
    """
    tasks: dict[str, dict[str, dict[str, dict[str, list[str]]]]] = defaultdict(lambda: defaultdict(dict))
    for key, found in results.items():
        task, name, quantizer = key.split("/", 2)
        tasks[task][name][quantizer] = found
    parts = [HEADER, _summary(tasks)]
    for task, names in sorted(tasks.items()):
        right = [n for n, by in sorted(names.items()) if all(o == "right" for f in by.values() for o, _ in f.values())]
        quantizers = ", ".join(f"`{q}`" for q in sorted({q for by in names.values() for q in by}))
        parts.append(
            f"\n## {task}\n\n{len(names)} classes over {quantizers}; every check is right for {len(right)}:\n\n"
        )
        parts.append(", ".join(f"`{n}`" for n in right) + ".\n\n| class | check | outcome |\n|---|---|---|\n")
        for name, by in sorted(names.items()):
            parts += _rows(name, by)
    return "".join(parts)


def _worst(by: dict[str, dict[str, list[str]]]) -> str:
    """The outcome of a class: that of its worst check, over all quantizers."""
    found = {outcome for checks in by.values() for outcome, _ in checks.values()}
    built = {outcome for checks in by.values() for check, (outcome, _) in checks.items() if check == "build"}
    if "skipped" in built:
        return "not tried"
    return next((o for o in ("wrong", "refused") if o in found), "right")


def _summary(tasks: dict[str, dict[str, dict[str, dict[str, list[str]]]]]) -> str:
    """A table of how many classes of each task are right."""
    outcomes = ("right", "refused", "wrong", "not tried")
    lines = [f"\n| task | classes | {' | '.join(outcomes)} |", "|---|" + "---:|" * 5]
    for task, names in sorted(tasks.items()):
        counts = Counter(_worst(by) for by in names.values())
        lines.append(f"| [{task}](#{task}) | {len(names)} | {' | '.join(str(counts[o]) for o in outcomes)} |")
    return "\n".join(lines) + "\n"


def _rows(name: str, by: dict[str, dict[str, list[str]]]) -> list[str]:
    seen: dict[tuple[str, str, str], list[str]] = defaultdict(list)
    for quantizer, found in by.items():
        for check, (outcome, detail) in found.items():
            if outcome != "right":
                seen[check, outcome, detail].append(quantizer)
    rows = []
    for (check, outcome, detail), quantizers in seen.items():
        only = "" if len(quantizers) == len(by) else f" ({', '.join(quantizers)})"
        text = detail.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
        rows.append(f"| `{name}` | {check}{only} | {outcome}: {text} |\n")
    return rows


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(page(json.loads(Path(sys.argv[1]).read_text())["results"]))

"""Tables of measured figures, from the files that the benchmarks wrote; `generate.py` puts them on the pages."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
INITS = ("zero", "loftq", "loftq:steps=5", "qera", "qera-full", "pissa", "olora")
NAMES = {
    "nf4": "NF4",
    "fp4": "FP4",
    "int8": "int8",
    "reference:format=int,bits=4,group_size=64": "4-bit affine, 64",
    "reference:format=int,bits=3,group_size=64": "3-bit affine, 64",
    "reference:format=int,bits=2,group_size=32": "2-bit affine, 32",
    "hqq": "HQQ 4-bit, 64",
    "quanto:format=int4": "quanto int4",
    "gptq:group_size=64,symmetric=false": "GPTQ 4-bit, 64",
    "float": "float",
}


OWN = "vendor's forward"


def read(name: str) -> dict[str, Any]:
    """A file of figures, without runs that failed."""
    found = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    found["runs"] = [r for r in found["runs"] if "error" not in r]
    return found


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *rows])


def _mean(values: list[float]) -> str:
    if not values:
        return "–"
    mean = sum(values) / len(values)
    return f"{mean:.2f}" if mean < 1000 else f"{mean:.0f}"


def _quality() -> list[dict[str, Any]]:
    return read("quality-h100.json")["runs"] + read("quality-cpu.json")["runs"]


def starts() -> str:
    runs, rows = _quality(), []
    for folded in (False, True):
        for quantizer, label in NAMES.items():
            for rank in (16, 64):

                def found(init: str, q: str = quantizer, r: int = rank, f: bool = folded) -> list[float]:
                    ranks = (16, 64) if init == "zero" else (r,)
                    hits = [
                        x["perplexity"]["start"]
                        for x in runs
                        if (x["quantizer"], x["init"], x["folded"]) == (q, init, f) and x["rank"] in ranks
                    ]
                    return hits[:1]

                cells = [_mean(found(i)) for i in INITS]
                if quantizer != "float" and set(cells[1:]) != {"–"}:
                    rows.append([label + (", folded" if folded else ""), str(rank), *cells])
    return table(["weights", "rank", *INITS], rows) + _files("quality-h100.json", "quality-cpu.json")


def rates() -> str:
    runs = [r for r in _quality() if not r["merge"]]
    steps = sorted({r["rate"] for r in runs})
    rows = []
    for quantizer, label in NAMES.items():
        for init in ("float", *INITS):
            cells = []
            for rate in steps:
                hits = [
                    r["perplexity"]["tuned"]
                    for r in runs
                    if (r["quantizer"], r["init"], r["rate"]) == (quantizer, init, rate)
                ]
                cells.append(_mean(hits) + (f" ({len(hits)} seeds)" if len(hits) > 1 else ""))
            if set(cells) != {"–"}:
                rows.append([label, "" if init == "float" else init, *cells])
    return table(["weights", "init", *(f"{r:g}" for r in steps)], rows) + _files("quality-h100.json")


def merges() -> str:
    kinds = ("start", "tuned", "merged to float", "merged", "merged from the original", "unmerged")
    rows = []
    for run in sorted(_quality(), key=lambda r: (r["quantizer"], INITS.index(r["init"]) if r["init"] in INITS else 9)):
        if run["merge"] and run["rank"] == 16 and not run["folded"] and "merged" in run["perplexity"]:
            rows.append([NAMES[run["quantizer"]], run["init"], *(f"{run['perplexity'][k]:.2f}" for k in kinds)])
    return table(["weights", "init", *kinds], rows) + _files("quality-h100.json")


def seconds() -> str:
    rows = [
        [r["init"], f"{r['seconds']:.1f}", f"{r['calibration_tokens']:,}"] for r in read("init_8b-h100.json")["runs"]
    ]
    return table(["init", "seconds", "calibration tokens"], rows) + _files("init_8b-h100.json")


def backends() -> str:
    """A line a backend and device, from `benchmarks/backends.py`."""
    rows = []
    found = {name: read(name) for name in ("backends-cpu.json", "backends-h100.json", "backends-h200.json")}
    order = list(dict.fromkeys(r["quantizer"] for f in found.values() for r in f["runs"]))
    for quantizer in order:
        for name, file in found.items():
            for run in (r for r in file["runs"] if r["quantizer"] == quantizer):
                ppl, merged = run["perplexity"], run.get("merged")
                lossy = f"{merged['relative_error']:.1e}" if isinstance(merged, dict) else "refused" if merged else ""
                rows.append(
                    [
                        f"`{quantizer}`",
                        name.removeprefix("backends-").removesuffix(".json").upper(),
                        *(
                            [f"{run['quantize_s']:.1f}" + "*" * ("busy" in run), f"{run['peak_bytes'] / 2**20:.0f}"]
                            if "quantize_s" in run
                            else ["", ""]
                        ),
                        f"{run['bits_per_weight']:.2f}",
                        _mean([ppl["plain"]]) + (f" ({ppl[OWN]:.2f})" if OWN in ppl else ""),
                        _mean([ppl["folded"]]),
                        *(f"{run[k]:.1e}" if k in run else "" for k in ("gradient_error", "merge_error")),
                        lossy,
                        "" if "round_trip" not in run else "exact" if run["round_trip"] is True else "no",
                    ]
                )
    head = ["quantizer", "device", "seconds", "peak MiB", "bits", "perplexity", "folded", "gradients", "to float", "merged",
            "saved, loaded"]  # fmt: skip
    return table(head, rows) + _busy(r for f in found.values() for r in f["runs"]) + _files(*found)


def _busy(runs: Iterable[dict[str, Any]]) -> str:
    """What the mark at a figure means, where there is one."""
    return "\n\n\\* other work was on the card." * any("busy" in r for r in runs)


def backend_shapes() -> str:
    rows = [
        [r["shape"].upper(), f"`{r['quantizer']}`", f"{r['quantize_s']:.1f}", f"{r['float_bytes'] / 2**30:.1f}",
         f"{r['peak_bytes'] / 2**30:.2f}", f"{r['bits_per_weight']:.2f}", f"{r['calibration_tokens']:,}"]
        for r in read("backends_shapes-h100.json")["runs"]
    ]  # fmt: skip
    head = ["shape", "quantizer", "seconds", "float GiB", "peak beyond, GiB", "bits", "calibration tokens"]
    return table(head, rows) + _files("backends_shapes-h100.json")


def dequantize() -> str:
    found = json.loads((RESULTS / "dequantize-h100.json").read_text(encoding="utf-8"))
    rows = []
    for r in found["rows"]:
        shape = " × ".join(map(str, r["shape"]))
        figures = [f"{r['us']:.0f}", f"{r['gb_s']:,.0f}", f"{r['share_of_copy']:.0%}", f"{r['torch_us']:,.0f}"]
        rows.append([r["packing"], shape, *figures])
    head = ["packing", "shape", "µs", "GB/s", "share of a copy", "torch code, µs"]
    return table(head, rows) + _files("dequantize-h100.json")


def experts() -> str:
    """A mixture of experts on one GPU, from `benchmarks/experts.py`."""
    found = json.loads((RESULTS / "experts-h100.json").read_text(encoding="utf-8"))
    training, decode, gib = found["training"], found["decode"], 2**30
    tokens = f"{training['batch']} × {training['sequence']}"
    rows = [
        ["parameters", f"{found['parameters'] / 1e9:.2f} billion"],
        ["in bfloat16", f"{found['float_bytes'] / gib:.2f} GiB"],
        [f"on the device, `{found['spec']}`", f"{found['model_bytes'] / gib:.2f} GiB"],
        ["bits a quantized weight", f"{found['bits_per_weight']:.2f}"],
        ["expert weights left in 16 bit", f"{found['experts_left_in_16_bit']}"],
        ["peak while it was built", f"{found['peak_while_building_gib']:.2f} GiB"],
        [f"trainable, rank {found['rank']} on attention and experts", f"{found['trainable'] / 1e6:.0f} million"],
        [f"training, {tokens}, every layer recomputed", f"{training['tokens_per_second']:,.0f} tokens/s"],
        ["peak of training", f"{training['peak_gib']:.2f} GiB"],
        ["experts dequantized a layer for one token", f"{max(decode['experts_dequantized'])} of {decode['of']}"],
    ]
    return table([f"shape {found['shape']}", ""], rows) + _files("experts-h100.json")


def two_bits() -> str:
    """Formats of about two bits, from `benchmarks/two_bits.py`."""
    rows = []
    for run in read("two_bits-1b-h100.json")["runs"]:
        if "layer_output_error" in run:
            figures = [f"{run['bits_per_weight']:.2f}", f"{run['layer_output_error']:.4f}", f"{run['block_s']:.1f}"]
            rows.append([f"`{run['quantizer']}`", *figures])
    whole = [
        f"\n\nA whole model of that shape, {r['layers']} blocks, in `{r['quantizer']}`: {r['quantize_s']:.0f} s over "
        f"{r['calibration_tokens']:,} calibration tokens, {r['peak_bytes'] / 2**30:.1f} GiB at most"
        + (", with other work on the card." if "busy" in r else ".")
        for r in read("two_bits-1b-h100.json")["runs"]
        if "whole_model" in r
    ]
    head = ["quantizer", "bits", "error of outputs", "seconds a block"]
    return table(head, rows) + "".join(whole) + _files("two_bits-1b-h100.json")


def two_bits_smollm() -> str:
    """The same formats over SmolLM2, whole."""
    found = read("two_bits-smollm-h200.json")
    rows = []
    for run in found["runs"]:
        error, took = run.get("layer_output_error"), run.get("quantize_s")
        rows.append(
            [
                f"`{run['quantizer']}`",
                f"{run['bits_per_weight']:.2f}",
                f"{run['perplexity']:,.1f}",
                "" if error is None else f"{error:.3f}",
                "" if took is None else f"{took:.1f}" + "*" * ("busy" in run),
            ]
        )
    head = ["quantizer", "bits", "perplexity", "error of outputs", "seconds"]
    return table(head, rows) + _busy(found["runs"]) + _files("two_bits-smollm-h200.json")


def _methods() -> list[dict[str, Any]]:
    return json.loads((RESULTS / "peft_methods-cpu.json").read_text(encoding="utf-8"))["runs"]


def methods() -> str:
    """A line a method, a column a backend, from `benchmarks/peft_methods.py`."""
    runs = _methods()
    quantizers = list(dict.fromkeys(r["quantizer"] for r in runs))
    marks = {"right": "✓", "refused": "–"}
    rows = []
    for method in dict.fromkeys(r["method"] for r in runs):
        mine = {r["quantizer"]: r for r in runs if r["method"] == method}
        cells = [marks.get(mine[q]["status"], mine[q]["status"]) if q in mine else "" for q in quantizers]
        errors = [r["errors"] for r in mine.values() if r["status"] == "right"]
        figures = [
            max((e[k] for e in errors if k in e), default=None) for k in ("output", "gradients", "merged_to_float")
        ]
        shown = ["" if v is None else f"{v:.0e}" if v else "0" for v in figures]
        if errors and figures[-1] is None:
            shown[-1] = "refused"
        rows.append([method, *cells, *shown])
    names = [q.partition(":")[0] for q in quantizers]
    heads = [n if names.count(n) == 1 else f"`{q}`" for n, q in zip(names, quantizers, strict=True)]
    head = ["method", *heads, "output", "gradients", "to float"]
    return table(head, rows) + _files("peft_methods-cpu.json")


def method_refusals() -> str:
    """Why methods are refused, or what of them is."""
    lines: dict[str, None] = {}
    for run in _methods():
        if run["status"] == "refused":
            lines[f"- {run['method']}: {_reason(run['reason'])}."] = None
        elif "merged_to_float" in run.get("refusals", {}):
            said = run["refusals"]["merged_to_float"].partition(": ")[2]
            lines[f"- {run['method']}, merging to float: {_reason(said)}."] = None
    return "\n".join(lines)


def _reason(text: str) -> str:
    """What of a refusal's text is about the method, without its end mark."""
    found = re.search(
        r"is refused: (.*?)\. LoRA works|(changes no weight), |cannot merge this adapter at \S+: (.*)", text
    )
    said = next(g for g in found.groups() if g) if found else text
    return said.rstrip(".").replace("NotImplementedError", "PEFT has no code for it")


def _files(*names: str) -> str:
    lines = []
    for name in names:
        found = json.loads((RESULTS / name).read_text(encoding="utf-8"))
        versions = ", ".join(f"{k} {v}" for k, v in found["versions"].items() if k in ("torch", "peft", "bitsandbytes"))
        lines.append(f"`benchmarks/results/{name}`: {found['device']}, {found['date'][:10]}, {versions}")
    return "\n\n" + "; ".join(lines) + "."


TABLES: dict[str, Callable[[], str]] = {
    "starts": starts,
    "rates": rates,
    "merges": merges,
    "seconds": seconds,
    "backends": backends,
    "backend_shapes": backend_shapes,
    "dequantize": dequantize,
    "experts": experts,
    "two_bits": two_bits,
    "two_bits_smollm": two_bits_smollm,
    "methods": methods,
    "method_refusals": method_refusals,
}

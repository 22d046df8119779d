"""One application of an init to one model: collects the starts while weights are quantized, then fills the adapters."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from qft.core.experts import packed_weights
from qft.core.modes import normal_mode
from qft.core.quantizer import Quantizer
from qft.core.record import record_of
from qft.core.registry import quantizer_of
from qft.data.collect import Group
from qft.data.statistics import Statistics
from qft.errors import AdapterMismatch, BadOption, BadShape, NonFiniteWeights, QftWarning, UnsupportedOperation
from qft.lora.experts import adapted_weights, joined
from qft.lora.inits.base import AdapterInit
from qft.lora.model import targeted


@dataclass(frozen=True)
class WeightInit:
    """Where one layer's adapter starts.

    Attributes:
        before, after: the error that the init minimises, of Ŵ alone and of Ŵ + sBA, relative to the same measure of W.
        kept: False where the init did not lower it, and the layer has PEFT's own start and its old Ŵ.
        note: anything else to know, or "".
    """

    before: float
    after: float
    kept: bool
    note: str = ""


@dataclass
class InitReport:
    """What an init did, layer by layer; `str()` is a short summary.

    Attributes:
        init: its `repr`.
        weights: layer name → `WeightInit`.
    """

    init: str
    weights: dict[str, WeightInit] = field(default_factory=dict)

    @property
    def rolled_back(self) -> list[str]:
        """Layers that have PEFT's own start."""
        return [n for n, w in self.weights.items() if not w.kept]

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return {"init": self.init, "weights": {n: vars(w) for n, w in self.weights.items()}}

    def __str__(self) -> str:
        if not self.weights:
            return f"{self.init}: no layer to start on"
        before = sum(w.before for w in self.weights.values()) / len(self.weights)
        after = sum(w.after if w.kept else w.before for w in self.weights.values()) / len(self.weights)
        text = f"{self.init}: error {before:.4f} → {after:.4f} on average over {len(self.weights)} layers"
        if back := self.rolled_back:
            text += f"; {len(back)} rolled back, {back[0]} first: it was not lowered there"
        notes = {w.note for w in self.weights.values() if w.note}
        return "; ".join([text, *sorted(notes)])


@dataclass
class InitRun:
    """One application of an init to one model: `on_weight` collects, `apply` fills the adapters."""

    init: AdapterInit
    config: LoraConfig
    model: nn.Module | None = None

    def __post_init__(self):
        self.values: dict[str, tuple[Tensor, Tensor]] = {}
        self.ranks: dict[str, int] = {}
        self.report = InitReport(repr(self.init))
        self.base_changed = False
        self._undo: list[tuple[Quantizer, Any, Any]] = []
        if self.model is not None:
            self.over(self.model)

    def over(self, model: nn.Module) -> None:
        """Take `model` as the one to start adapters on; its targets are what the config matches now."""
        self.model, self.ranks = model, targeted(model, self.config)

    def rank_and_scaling(self, name: str) -> tuple[int, float] | None:
        """Return r and s of the adapter on this layer, or None where there is none."""
        from peft.utils.other import get_pattern_key

        config, rank = self.config, self.ranks.get(name)
        if rank is None:
            return None
        alpha = (config.alpha_pattern or {}).get(
            get_pattern_key((config.alpha_pattern or {}).keys(), name), config.lora_alpha
        )
        return rank, alpha / rank**0.5 if config.use_rslora else alpha / rank

    @normal_mode()
    def on_weight(self, name: str, weight: Tensor, quantized: Tensor, statistics: Statistics | None) -> None:
        """Compute the start of one layer's adapter; called with the quantized layer in its place."""
        found = self.rank_and_scaling(name)
        if found is None:
            return
        rank, scaling = found
        init, device = self.init, _fast(weight.device)
        quantizer, handle = _quantizer_and_handle(self.model, name)
        roundtrip, saved = None, None
        if quantizer.capabilities.requantize:

            def roundtrip(value: Tensor) -> Tensor:
                nonlocal saved
                if saved is None:
                    saved = quantizer.snapshot(handle)
                quantizer.requantize(handle, value)
                return quantizer.dequantize(handle, dtype=torch.float32).to(device)

        elif init.changes_base:
            raise UnsupportedOperation(
                f"{init!r} changes the quantized weights, which {quantizer!r} cannot do (capability "
                "iterated_loftq); one step, qft.LoftQ(), leaves them alone"
            )
        if weight.ndim == 3:
            return self._on_experts(name, weight, quantized, rank, scaling, quantizer, handle)
        statistics = statistics if init.needs else None
        w, w_hat = weight.to(device, torch.float32), quantized.to(device, torch.float32)
        try:
            a, b, base = init(w, w_hat, rank, scaling, statistics=statistics, roundtrip=roundtrip)
            _check(init, name, a, b, rank, w.shape)
            if base is not None and not init.changes_base:
                raise BadOption(f"{init!r} gave another base for {name}, and its changes_base says that it never does")
        except BaseException:
            if saved is not None:
                quantizer.restore(handle, saved)
            raise
        whole, before = init.error(w, statistics) or 1.0, init.error(w - w_hat, statistics)
        if base is not None:
            w_hat = roundtrip(base)
        elif saved is not None:
            quantizer.restore(handle, saved)
        after = init.error(w - w_hat - (b @ a) * scaling, statistics)
        kept = after < before
        note = "layers that read no calibration tokens started as with LoftQ" if init.needs and not statistics else ""
        self.report.weights[name] = WeightInit(before / whole, after / whole, kept, note)
        if kept:
            self.values[name] = (a.cpu(), b.cpu())
            self.base_changed |= base is not None
        elif base is not None:
            quantizer.restore(handle, saved)

    def _on_experts(
        self, name: str, weight: Tensor, quantized: Tensor, rank: int, scaling: float, quantizer: Any, handle: Any
    ) -> None:
        """The starts of a fused weight's adapters, expert by expert; one that is not lowered has B = 0."""
        init, device, dtype = self.init, _fast(weight.device), handle.dtype
        if init.needs:
            raise UnsupportedOperation(no_statistics(init))
        shape, starts, changed, sums = weight.shape[1:], [], {}, [0.0, 0.0, 0.0]

        def roundtrip(value: Tensor) -> Tensor:
            packed = quantizer._pack(value.to(weight.device, dtype), None)
            return quantizer.unpack(packed, shape=tuple(shape), dtype=torch.float32).to(device)

        kept = 0
        for e in range(weight.shape[0]):
            w, w_hat = weight[e].to(device, torch.float32), quantized[e].to(device, torch.float32)
            a, b, base = init(w, w_hat, rank, scaling, statistics=None, roundtrip=roundtrip)
            _check(init, name, a, b, rank, w.shape)
            if base is not None and not init.changes_base:
                raise BadOption(f"{init!r} gave another base for {name}, and its changes_base says that it never does")
            before = init.error(w - w_hat, None)
            new = w_hat if base is None else roundtrip(base)
            after = init.error(w - new - (b @ a) * scaling, None)
            for i, value in enumerate((init.error(w, None), before, min(before, after))):
                sums[i] += value**2
            if after < before:
                kept += 1
                if base is not None:
                    changed[e] = base.to(weight.device, torch.float32)
            else:
                b = torch.zeros_like(b)
            starts.append((a.cpu(), b.cpu()))
        whole, before, after = (s**0.5 for s in sums)
        note = (
            "" if kept in (0, len(starts)) else f"{len(starts) - kept} of {len(starts)} experts of {name} start at zero"
        )
        self.report.weights[name] = WeightInit(before / (whole or 1.0), after / (whole or 1.0), kept > 0, note)
        if kept:
            self.values[name] = joined(*(torch.stack(side) for side in zip(*starts, strict=True)))
        if changed:
            stack = handle.module
            for e, base in changed.items():
                for key, tensor in quantizer._pack(base.to(dtype), None).items():
                    stack.packed[key].data[e] = tensor
            self.base_changed = True

    def run_over(self, original: Callable[[str], Tensor], groups: Any = None) -> None:
        """Collect over a model that was quantized before, its float weights given by name.

        Args:
            groups: what `activations.collect` gives over the model's quantized targets, or None without statistics.

        Raises:
            AdapterMismatch: a weight of another shape. Where anything is raised, the quantized weights are as they were.
        """
        whole = [Group(self.quantized_targets(), {})] if groups is None else groups
        try:
            with closing(groups) if groups is not None else nullcontext():
                for name, statistics in ((n, g.statistics.get(n)) for g in whole for n in g.names):
                    quantizer, handle = _quantizer_and_handle(self.model, name)
                    quantized, weight = quantizer.dequantize(handle, dtype=torch.float32), original(name)
                    if weight.shape != quantized.shape:
                        raise AdapterMismatch(
                            f"the original's {name} is {tuple(weight.shape)}, and the model's {tuple(quantized.shape)}: "
                            "it is the original of another model"
                        )
                    if self.init.changes_base:
                        self._undo.append((quantizer, handle, quantizer.snapshot(handle)))
                    self.on_weight(name, weight.to(quantized.device), quantized, statistics)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Put back what `run_over` changed of the quantized weights, to the bit."""
        while self._undo:
            quantizer, handle, saved = self._undo.pop()
            quantizer.restore(handle, saved)

    def quantized_targets(self) -> list[str]:
        """The layers to start on: those of the config that are quantized."""
        packed = dict(packed_weights(self.model))
        return [n for n in self.ranks if n in packed or _is_quantized(self.model, n)]

    def apply(self, peft_model: nn.Module, adapter_name: str) -> None:
        """Fill the adapters of a freshly wrapped model with what was collected."""
        record = record_of(peft_model)
        for name, module in adapted_weights(peft_model.get_base_model()):
            if adapter_name not in module.lora_A:
                continue
            if name not in self.values:
                continue  # a float layer, or one that was rolled back: there is no error to start from
            a, b = self.values[name]
            for target, value in ((module.lora_A, a), (module.lora_B, b)):
                target[adapter_name].weight.data.copy_(value)
            module.starts[adapter_name] = (a, b)
            if self.base_changed:
                module.mark_residual(adapter_name)
            if adapter_name in module.lora_variant:  # DoRA: the magnitude is that of the weight it starts from
                delta = (b @ a) * module.scaling[adapter_name]
                start = module.quantizer.dequantize(module.handle, dtype=torch.float32)
                magnitude = module.lora_magnitude_vector[adapter_name].weight
                magnitude.data.copy_(torch.linalg.norm(start + delta.to(start.device), dim=1))
        record.init = repr(self.init)
        record.base_changed |= self.base_changed
        peft_model.init_report = self.report
        if len(self.report.rolled_back) == len(self.report.weights) > 0:
            warnings.warn(f"the init did nothing: {self.report}", QftWarning, stacklevel=4)


def _check(init: AdapterInit, name: str, a: Tensor, b: Tensor, rank: int, shape: Mapping[int, int] | Any) -> None:
    """What an init of somebody else's gave."""
    wanted = ((rank, shape[1]), (shape[0], rank))
    if (tuple(a.shape), tuple(b.shape)) != wanted:
        raise BadShape(
            f"{init!r} gave A {tuple(a.shape)} and B {tuple(b.shape)} for {name}; they are {wanted[0]} and {wanted[1]}"
        )
    if not (a.isfinite().all() and b.isfinite().all()):
        raise NonFiniteWeights(f"{init!r} gave NaN or infinity for {name}")


def _fast(device: torch.device) -> torch.device:
    """Where to compute: the GPU when there is one."""
    if device.type == "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def no_statistics(init: AdapterInit) -> str:
    """Why an init that reads data does not start adapters on fused experts."""
    return (
        f"{init!r} weighs the error by what a layer reads, and which tokens each of a layer's fused experts reads is not "
        "gathered: leave target_parameters out, or take init='loftq', which needs no data"
    )


def _is_quantized(model: nn.Module, name: str) -> bool:
    try:
        return quantizer_of(model.get_submodule(name)) is not None
    except AttributeError:  # a fused weight that stays float
        return False


def _quantizer_and_handle(model: nn.Module, name: str) -> tuple[Quantizer, Any]:
    module = model.get_submodule(name)
    quantizer = quantizer_of(module)
    return quantizer, quantizer.weights(module)[0]

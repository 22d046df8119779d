"""A folder or hub id, quantized shard by shard: the float model is never whole in memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qft import marks
from qft.errors import BadFolder, NonFiniteWeights, QftError
from qft.quantizer import OnWeight, Quantizer, float_weight, is_conv1d, replace_module
from qft.selection import Selection, select


class Plan:
    """How to quantize a model while transformers streams its weights in."""

    def __init__(
        self,
        quantizers: Mapping[str, Quantizer | None],
        skip: str | Iterable[str] | None,
        on_weight: OnWeight | None = None,
        prepare: Any = None,
    ):
        self.quantizers, self.skip, self.on_weight, self.prepare = quantizers, skip, on_weight, prepare
        self.selection = Selection()
        self.record = marks.Record()
        self.error: QftError | None = None
        self._samples: dict[str, Tensor] = {}

    def start(self, model: nn.Module) -> None:
        """Every check that needs no weights, on the empty model."""
        from qft.pipeline import settle

        self.selection = settle(select(model, self.quantizers, self.skip), model)
        self.record.left, self.record.experts = self.selection.left, self.selection.experts
        if self.prepare is not None:
            self.prepare(model)

    def wants(self, parameter: str) -> bool:
        name, _, last = parameter.rpartition(".")
        return last == "weight" and name in self.selection.targets

    def arrive(self, model: nn.Module, parameter: str, value: Tensor) -> None:
        """One float weight: check it, quantize it, put the layer in its place."""
        try:
            self._arrive(model, parameter.removesuffix(".weight"), value)
        except QftError as error:  # transformers collects what goes wrong in a load: keep ours, to raise it
            self.error = self.error or error
            raise

    def _arrive(self, model: nn.Module, name: str, value: Tensor) -> None:
        quantizer = self.selection.targets[name]
        quantizer = self.selection.targets[name] = quantizer.on_device(value.device)
        old = model.get_submodule(name)
        layer = _with_weight(old, value)
        weight = float_weight(layer)
        if not weight.isfinite().all():
            raise NonFiniteWeights(f"{name}.weight holds NaN or infinity: repair the checkpoint, or skip this weight")
        new = quantizer.quantize_layer(layer)
        new.bias = old.bias  # on "meta" still, or loaded already
        new._is_hf_initialized = True
        new._qft_quantizer = quantizer
        new.requires_grad_(False)
        replace_module(model, name, new)
        self.record.quantizers[name] = quantizer
        self.record.float_bytes += weight.numel() * weight.element_size()
        self._samples[name] = marks.sample(weight)
        if self.on_weight is not None:
            for handle in quantizer.weights(new):
                self.on_weight(name, weight, quantizer.dequantize(handle, dtype=torch.float32), None)

    def finish(self, model: nn.Module) -> None:
        """Check that every target arrived, and write the note."""
        missing = [n for n in self.selection.targets if n not in self.record.quantizers]
        if missing:
            raise BadFolder(f"the checkpoint has no weight for {len(missing)} layers, {missing[0]} first")
        self.record.fingerprint = {n: (tuple(_shape(model, n)), s.tolist()) for n, s in self._samples.items()}
        marks.mark(model, self.record)


def _shape(model: nn.Module, name: str) -> tuple[int, ...]:
    from qft.registry import quantizer_of

    module = model.get_submodule(name)
    return quantizer_of(module).weights(module)[0].shape


def _with_weight(old: nn.Module, value: Tensor) -> nn.Module:
    """A float layer of the kind of `old` that holds `value` and no bias."""
    with torch.device("meta"):
        if is_conv1d(old):
            layer: nn.Module = type(old)(value.shape[1], value.shape[0])
            layer.bias = None
        else:
            layer = nn.Linear(value.shape[1], value.shape[0], bias=False)
    layer.weight = nn.Parameter(value, requires_grad=False)
    return layer


def load_quantized(path: str, plan: Plan | None, device: torch.device | None, progress: bool, **kwargs: Any) -> nn.Module:
    """`from_pretrained` of the model class that the config names, quantizing as `plan` says.

    Raises:
        BadFolder: no such folder, or files that cannot be read.
    """
    from qft.saving import QftConfig

    if device is not None:
        kwargs.setdefault("device_map", {"": device})
    kwargs.setdefault("dtype", "auto")
    if plan is not None:
        config = QftConfig()
        config.plan = plan
        kwargs["quantization_config"] = config
    cls = model_class(path, kwargs)
    try:
        with _quiet(progress):
            model = cls.from_pretrained(path, **kwargs)
    except QftError:
        raise
    except Exception as error:
        if plan is not None and plan.error is not None:
            raise plan.error from error
        if isinstance(error, OSError | ValueError | RuntimeError) and not isinstance(error, torch.cuda.OutOfMemoryError):
            raise BadFolder(f"cannot load a model from {path}: {error}") from error
        raise
    if plan is not None:
        if plan.error is not None:
            raise plan.error
        plan.finish(model)
    return model


def model_class(path: str, kwargs: Mapping[str, Any]) -> Any:
    """The class that the model's own config names, else the causal language model that fits."""
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(
            path,
            **{k: kwargs[k] for k in ("trust_remote_code", "revision", "token", "cache_dir", "gguf_file") if k in kwargs},
        )
    except Exception as error:
        where = Path(path)
        detail = "there is no such folder, and it is no model id that can be had here" if not where.exists() else str(error)
        raise BadFolder(f"cannot read a model from {path}: {detail}") from error
    for name in getattr(config, "architectures", None) or ():
        cls = getattr(transformers, name, None)
        if cls is not None:
            return cls
    return transformers.AutoModelForCausalLM


class _quiet:
    """transformers' own progress bars, off where the caller wants none."""

    def __init__(self, progress: bool):
        self.progress = progress

    def __enter__(self) -> None:
        from transformers.utils import logging

        self.was = logging.is_progress_bar_enabled()
        if not self.progress:
            logging.disable_progress_bar()

    def __exit__(self, *exc: Any) -> None:
        from transformers.utils import logging

        if self.was:
            logging.enable_progress_bar()

"""Carry an adapter to another backend's base, the difference of the two bases fitted into it."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from qft.core import record
from qft.core.console import one_line, quiet, say
from qft.core.devices import check_device
from qft.core.files import as_path
from qft.core.modes import normal_mode
from qft.core.registry import Spec, parse_spec
from qft.core.unquantized import Unquantized
from qft.data.calibration import Calibration, batches
from qft.data.collect import Group, collect
from qft.errors import AdapterMismatch, BadOption, BadShape, NeedsOriginal, UnsupportedOperation
from qft.lora.guard import refused_by_peft
from qft.lora.layer import QftLinear
from qft.lora.model import check_saved_modules
from qft.lora.weights import float_twin, is_quantized, linear_weights
from qft.pipeline.from_pretrained import stored_quantization
from qft.pipeline.quantize import quantize_as
from qft.saving.load import check_adapter_files, names_as_stored
from qft.saving.origin import Origin
from qft.saving.save import read_note
from qft.saving.transfer_source import adapted, check_source, loaded, original_of_folder, readable
from qft.saving.transfer_weight import Carried, TransferReport, carry


def transfer(
    folder_or_model: nn.Module | str | os.PathLike[str],
    quantizer: Any,
    *,
    original: Any = None,
    base: Any = None,
    rank: int | None = None,
    calibration: Any = None,
    tokenizer: Any = None,
    skip: str | Iterable[str] | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
    **load_options: Any,
) -> PeftModel:
    """Carry a LoRA adapter to a base that another quantizer made of the same float weights.

    What the adapter learnt stays, and as much of the difference of the two bases as its rank can hold, D = Ŵ₁ − Ŵ₂, is
    fitted into it: by SVD, or with calibration data so that the layers' outputs change least, as QERA does (arXiv
    2410.06040). The returned model's `transfer_report` says what is left.

    Args:
        folder_or_model: a wrapped model with one active adapter, or the folder of an adapter, as `qft.save` writes it.
            It is left as it is.
        quantizer: of the new base, as `quantize` takes it.
        original: the float weights: a model in memory, which is left as it is, or a folder or hub id, which is
            streamed. None takes what the adapter's config names.
        base: for a folder: what `qft.load` takes. A model in memory is left as it is.
        rank: None keeps the update as it is and gives D as many directions as the adapter has: the rank doubles. A
            larger rank keeps it, too, and gives D the rest; one that is not larger holds the best fit of update and D
            together. Layers that are too small for the rank take their full one, where nothing is left; layers that
            are float in both bases keep theirs.
        calibration, tokenizer: data as `qft.Calibration` takes it, for the fit and for quantizers that need it. The
            source is run over it.
        skip, device, progress: as in `quantize`, for the new base.
        **load_options: passed to `from_pretrained` where something is loaded.

    Returns:
        A new `peft.PeftModel`, whose adapter has the name of the source's; it is trainable where the source's is.

    Raises:
        BadOption: no wrapped model, merged, disabled or several active adapters.
        UnsupportedOperation: an adapter of another kind than LoRA and DoRA on layers.
        NeedsOriginal: the float weights are nowhere to be found.
        AdapterMismatch: those float weights are not what the source was quantized from.
        BadShape: the rank. NonFiniteWeights: the adapter. What `load` and `quantize` raise.
        In all cases source, base and original are as they were.
    """
    spec = parse_spec(quantizer)
    if rank is not None and (type(rank) is not int or rank < 1):
        raise BadShape(f"the rank is a positive integer, not {rank!r}")
    target = check_device(device)
    job = _Job(spec, rank, calibration, tokenizer, skip, target, progress and not quiet(), load_options)
    if isinstance(original, nn.Module):
        if hasattr(original, "peft_config") or is_quantized(original):
            raise BadOption("original= is quantized or has adapters itself: give the float model, or its folder")
    elif isinstance(original, str | os.PathLike):
        if stored := stored_quantization(os.fspath(original), load_options):
            raise NeedsOriginal(f"{original} is quantized ({stored}), and the float weights are needed")
    elif original is not None:
        raise BadOption(f"original= is a float model or its folder, not a {type(original).__name__}")
    if isinstance(folder_or_model, nn.Module):
        if base is not None:
            raise BadOption("base= is for an adapter's folder; a model has its base under it")
        job.check_options(original)
        with normal_mode():
            return job.run(folder_or_model, original)
    folder = as_path(folder_or_model)
    if (folder / "adapter_config.json").is_file():  # else load says what is wrong
        check_adapter_files(folder)
        original = original_of_folder(folder, original, base, load_options)
        if base is None and not (read_note(folder) or {"base_stored": True})["base_stored"]:
            base = original
        job.check_options(original, base or folder)
    with normal_mode(), loaded(folder, base, target, load_options) as source:
        return job.run(source, original)


@dataclass
class _Job:
    spec: Spec
    rank: int | None
    calibration: Any
    tokenizer: Any
    skip: Any
    device: torch.device | None
    progress: bool
    load_options: dict[str, Any]

    def check_options(self, *places: Any) -> None:
        """Raise where there are options for loading, and nothing to load."""
        if self.load_options and all(isinstance(p, nn.Module) for p in places):
            raise BadOption(f"{', '.join(self.load_options)}: these are for loading from a path, and models were given")

    def run(self, source: nn.Module, original: Any) -> PeftModel:
        source, name, config = check_source(source)
        old = record.base_model(source)
        if original is None:
            names = [config.base_model_name_or_path, getattr(getattr(old, "config", None), "_name_or_path", None)]
            original = readable(names, self.load_options)
        read = None
        if self.calibration is not None:
            read = batches(self.calibration, self.tokenizer, model=old)
        new = self.new_base(old, original, config, read)
        report = TransferReport(_named(old), _named(new))
        with torch.no_grad():
            carried = self.carry_all(source, new, name, read, report)
        model = _wrapped(new, source, name, config, carried)
        record.record_of(new).init = f"transfer from {report.source}"
        model.transfer_report = report
        if self.progress:
            say(f"  {report}")
        return model

    def new_base(self, old: nn.Module, original: Any, config: LoraConfig, read: list[Any] | None) -> nn.Module:
        """The float weights, quantized, once it is known that the source was quantized from the same."""
        origin = Origin(old)

        def prepare(model: nn.Module, targets: Iterable[str]) -> None:
            origin.compare_all(model)
            check_saved_modules(model, config, targets)

        needed = any(q is not None and q.capabilities.needs_calibration for q in self.spec.quantizers.values())
        in_memory = isinstance(original, nn.Module)
        quantizers = self.spec.quantizers.values()
        with float_twin(original, quantizers) if in_memory else contextlib.nullcontext(original) as floats:
            new = quantize_as(
                floats,
                self.spec,
                calibration=Calibration(read, samples=sys.maxsize) if needed and read is not None else None,
                skip=self.skip,
                device=self.device,
                progress=self.progress,
                on_weight=lambda name, weight, *_: origin.compare(name, weight),
                prepare=prepare,
                load_options={} if in_memory else dict(self.load_options),
            )
        origin.compare_all(new)
        return new

    def carry_all(
        self, source: PeftModel, new: nn.Module, name: str, read: list[Any] | None, report: TransferReport
    ) -> dict[str, Carried]:
        """The adapter's part on each linear layer; one layer's floats at a time."""
        old = record.base_model(source)
        layers = {n: m for n, m in adapted(source, name).items() if isinstance(m, QftLinear)}
        here, there = linear_weights(new), linear_weights(old)
        # a layer without an entry started at zero, unless an init is noted and all entries were lost on the way
        known = record.record_of(old).init is None or any(name in m.starts for m in layers.values())
        groups: Iterable[Group] = [Group(list(layers), {})]
        if read is not None:
            groups = collect(old, list(layers), read, "full", progress=self.progress)
        carried = {}
        for group in groups:
            for n in group.names:
                quantizer, handle = here[n]
                carried[n] = carry(
                    layers[n],
                    name,
                    quantizer.dequantize(handle, dtype=torch.float32),
                    rank=self.rank,
                    equal=_float(quantizer) and _float(layers[n].quantizer),
                    calibrated=read is not None,
                    statistics=group.statistics.get(n),
                    start_known=known,
                )
        report.weights = {n: carried[n].figures for n in layers}
        for n in there:
            if n in here and n not in layers and not (_float(there[n][0]) and _float(here[n][0])):
                w1, w2 = (q.dequantize(h, dtype=torch.float32) for q, h in (there[n], here[n]))
                report.unadapted[n] = float((w1.to(w2) - w2).norm()) / (float(w1.norm()) or 1.0)
        return carried


def _float(quantizer: Any) -> bool:
    return isinstance(quantizer, Unquantized)


def _named(model: nn.Module) -> str:
    return ", ".join(dict.fromkeys(map(repr, record.record_of(model).quantizers.values())))


def _wrapped(
    new: nn.Module, source: PeftModel, name: str, config: LoraConfig, carried: dict[str, Carried]
) -> PeftModel:
    """The new base with the adapter."""
    before = adapted(source, name)
    ranks = {n: carried[n].figures.rank if n in carried else m.r[name] for n, m in before.items()}
    config.r = Counter(ranks.values()).most_common(1)[0][0]
    config.rank_pattern = {f"^{re.escape(n)}": r for n, r in ranks.items() if r != config.r}
    named, config.base_model_name_or_path = config.base_model_name_or_path, None
    record.record_of(new).forward = record.record_of(record.base_model(source)).forward
    with refused_by_peft():
        model = get_peft_model(new, config, adapter_name=name)
    if not config.base_model_name_or_path:
        config.base_model_name_or_path = named
    state = get_peft_model_state_dict(source, adapter_name=name, save_embedding_layers=False)
    # with bias="all" PEFT stores those of modules that are trained whole a second time, under names that nobody loads
    state = {k: v for k, v in state.items() if ".modules_to_save." not in k}
    layers = adapted(model, name)
    for n, layer in layers.items():
        prefix = f"base_model.model.{n}."
        ratio = before[n].scaling[name] / layer.scaling[name]
        for key in ("lora_B.weight", "lora_B.bias", "lora_embedding_B"):
            if prefix + key in state:
                state[prefix + key] = state[prefix + key].float() * ratio
        if n in carried:
            (a, b), fresh = carried[n].factors, layer.lora_A[name].weight.detach().cpu()
            state[f"{prefix}lora_A.weight"] = torch.cat([a, fresh[len(a) :]])
            state[f"{prefix}lora_B.weight"] = torch.cat([b, b.new_zeros(len(b), len(fresh) - len(a))], 1)
            layer.starts.update(carried[n].start)
    try:
        with names_as_stored():
            result = set_peft_model_state_dict(model, state, adapter_name=name)
    except RuntimeError as error:
        raise AdapterMismatch(f"the adapter does not fit the new base: {one_line(error)}") from error
    lost = [*result.unexpected_keys, *(k for k in result.missing_keys if f".{name}." in f"{k}.")]
    if lost:
        raise UnsupportedOperation(f"this part of the adapter cannot be carried to the new base: {lost[0]}")
    return model.train(source.training)

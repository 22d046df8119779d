"""transformers' view of a model that qft quantized: its marks, and how `from_pretrained` loads and quantizes for us."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from qft.core import record as marks
from qft.core.experts import PackedExperts, put_stack
from qft.core.names import METHOD, bare_layers, bare_state_dict
from qft.core.packed import PackedLinear, PackedModule
from qft.core.quantizer import Quantizer, is_conv1d, replace_module
from qft.core.registry import get_quantizer, quantizer_of
from qft.errors import BadFolder, QftError


@register_quantization_config(METHOD)
class QftConfig(QuantizationConfigMixin):
    """What `config.json` says of a model saved with packed weights, and what `from_pretrained` is told to quantize.

    Args:
        quantizers: quantizer by layer name, as objects or as `Quantizer.to_dict()` makes them.
        templates: shapes and dtypes of the packed tensors, by quantizer index, weight shape and dtype.
        layers: layer name → [quantizer index, out_features, in_features, kind, dtype]; and the key of its template
            where its packed tensors differ from those of other such layers, as after an exact merge.
        experts: name of a fused expert weight → [quantizer index, experts, out_features, in_features, transposed, dtype,
            key of its template], which is of the stacked tensors.
    """

    def __init__(
        self, quantizers: Any = (), templates: Any = None, layers: Any = None, experts: Any = None, **kwargs: Any
    ):
        self.quant_method = METHOD
        self.quantizers = list(quantizers)
        self.templates = templates or {}
        self.layers = layers or {}
        self.experts = experts or {}

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": METHOD,
            "quantizers": [q.to_dict() if isinstance(q, Quantizer) else q for q in self.quantizers],
            "templates": self.templates,
            "layers": self.layers,
            **({"experts": self.experts} if self.experts else {}),
        }

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def __deepcopy__(self, memo: dict[int, Any]) -> QftConfig:
        # configs of submodules are copies of the model's: they must not keep a plan, and what it holds, alive
        twin = copy.copy(self)
        twin.__dict__.pop("plan", None)
        return twin


@register_quantizer(METHOD)
class QftHfQuantizer(HfQuantizer):
    """transformers' handle on our models: trainers accept them, and what cannot be saved raises instead of lying.

    `plan`, an object of `qft.pipeline.from_pretrained`, says how to quantize while
    `from_pretrained` streams the weights in; without it the checkpoint holds packed weights already.
    """

    requires_calibration = False

    def __init__(self, quantization_config: Any, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        self.plan = getattr(quantization_config, "plan", None)
        if self.plan is not None:
            self.pre_quantized = False

    def is_serializable(self) -> bool:
        return getattr(self.quantization_config, "qft_serializable", True)

    @property
    def is_trainable(self) -> bool:
        return True

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def get_state_dict_and_metadata(self, model: nn.Module, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict]:
        if getattr(model, "_hf_peft_config_loaded", False):  # adapters of transformers' add_adapter are what is saved
            return None, {}
        _keep_codes_apart(model)
        self._describe_anew(model)
        # whatever state dict save_pretrained was given, it takes this one
        own = isinstance(self.quantization_config, QftConfig)
        state = bare_state_dict(model, stored=not own)
        if own:
            _store_packed(model, state)
        layers = {} if own else {n: m for n, m in bare_layers(model) if quantizer_of(m) is not None}
        metadata: dict[str, str] = {}
        for quantizer in dict.fromkeys(quantizer_of(m) for m in layers.values()):
            metadata |= quantizer.stored_metadata(state, layers)
        return state, metadata

    def _describe_anew(self, model: nn.Module) -> None:
        """A merge may have changed the dtypes of packed tensors since the model was marked."""
        record = marks.record_of(model)
        if record is None or not isinstance(self.quantization_config, QftConfig):
            return
        now = describe_packed(_as_packed(model).items())
        for config in (self.quantization_config, getattr(model.config, "quantization_config", None)):
            if isinstance(config, QftConfig):
                config.quantizers, config.templates = now.quantizers, now.templates
                config.layers, config.experts = now.layers, now.experts

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        return self.plan is not None and self.plan.wants(param_name)

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeOnLoad(self.plan)

    def param_element_size(self, model: nn.Module, param_name: str, param: torch.Tensor) -> float:
        # transformers reserves this much on an accelerator before loading
        return self.plan.element_size(param_name, param) if self.plan is not None else param.element_size()

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.plan is not None:
            self.plan.start(model)
        else:
            _build_packed_layers(model, self.quantization_config)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self.plan is None:
            _freeze_biases(model)
            for name, module in model.named_modules():
                if isinstance(module, PackedLinear) and not module._first.is_meta:
                    module.quantizer.loaded(name, module)
            quantizers: dict[str, Quantizer] = {
                n: m.quantizer for n, m in model.named_modules() if isinstance(m, PackedModule)
            }
            mark(model, marks.Record(quantizers=quantizers))
        return model


class _QuantizeOnLoad(ConversionOps):
    """transformers gives each float weight as it arrives; it is quantized, put in its place, and dropped."""

    def __init__(self, plan: Any):
        self.plan = plan

    def convert(self, input_dict, *, model=None, missing_keys=None, **kwargs):
        others = {}
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            if not self.plan.wants(name):  # stored as one tensor with one that is quantized
                others[name] = value
                continue
            self.plan.arrive(model, name, value)
            if missing_keys is not None:
                missing_keys.discard(name)
        return others


def _build_packed_layers(model: nn.Module, config: QftConfig) -> None:
    try:
        quantizers = [get_quantizer(q) for q in config.quantizers]
        for name, (index, out_features, in_features, kind, dtype, *own) in config.layers.items():
            template = config.templates[own[0] if own else f"{index}:{out_features}x{in_features}:{dtype}"]
            packed = {
                key: torch.empty(shape, dtype=getattr(torch, dt), device="meta")
                for key, (shape, dt) in template.items()
            }
            old = model.get_submodule(name)
            # constants keep the dtypes that they were saved in; the layer shows the dtype that is loaded now
            layer = PackedLinear(
                quantizers[index], packed, (out_features, in_features), old.weight.dtype, old.bias, kind
            )
            layer._is_hf_initialized = True
            replace_module(model, name, layer)
        for name, (index, *shape, transposed, dtype, key) in config.experts.items():
            packed = {
                n: torch.empty(size, dtype=getattr(torch, dt), device="meta")
                for n, (size, dt) in config.templates[key].items()
            }
            parent_name, _, last = name.rpartition(".")
            dtype = model.get_submodule(parent_name)._parameters[last].dtype
            stack = PackedExperts(quantizers[index], packed, tuple(shape), dtype, transposed)
            stack._is_hf_initialized = True
            put_stack(model, name, stack)
    except QftError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadFolder(f"this model's quantization_config does not fit it: {error!r}") from error


def _freeze_biases(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, PackedLinear) and module.bias is not None:
            module.bias.requires_grad_(False)


def describe_packed(layers: Iterable[tuple[str, nn.Module]]) -> QftConfig:
    """The config of a model with these layers by name, of which the packed modules are its quantized ones."""
    quantizers: list[Quantizer] = []
    templates: dict[str, Any] = {}
    described: dict[str, list[Any]] = {}
    experts: dict[str, list[Any]] = {}
    for name, module in layers:
        if not isinstance(module, PackedModule):
            continue
        if module.quantizer not in quantizers:
            quantizers.append(module.quantizer)
        index = quantizers.index(module.quantizer)
        dtype = str(module.dtype).removeprefix("torch.")
        template = {k: [list(t.shape), str(t.dtype).removeprefix("torch.")] for k, t in module.packed.items()}
        shape = module.handle.shape
        key = common = f"{index}:{'x'.join(map(str, shape))}:{dtype}"
        while templates.setdefault(key, template) != template:
            key += "+"
        if isinstance(module, PackedExperts):
            experts[name] = [index, *shape, module.transposed, dtype, key]
            continue
        described[name] = [index, *shape, module.kind, dtype]
        if key != common:
            described[name].append(key)
    return QftConfig(quantizers, templates, described, experts)


def _as_packed(model: nn.Module) -> dict[str, nn.Module]:
    """The quantized layers of a model by their bare names, as packed modules where they have such a form.

    Backends with layers of their own are asked for it in a model with packed experts, which their files cannot hold, and
    in one with subclasses of `nn.Linear`, which transformers does not replace when it loads those files.
    """
    layers = {n: m for n, m in bare_layers(model) if quantizer_of(m) is not None and not hasattr(m, "base_layer")}
    if not any(_only_ours(m) for m in layers.values()):
        return layers
    packed = {n: m if isinstance(m, PackedModule) else quantizer_of(m).as_packed(m) for n, m in layers.items()}
    return {n: m if m is not None else layers[n] for n, m in packed.items()}


def _only_ours(module: nn.Module) -> bool:
    """Whether transformers' loaders of a backend's own format have no place for this quantized module."""
    return isinstance(module, PackedExperts) or getattr(module, "of_subclass", False)


def _store_packed(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Put the packed form of layers of a backend's own in the place of what they keep."""
    layers = dict(bare_layers(model))
    for name, packed in _as_packed(model).items():
        if packed is not layers[name] and isinstance(packed, PackedModule):
            for key in [k for k in state if k.startswith(f"{name}.") and k != f"{name}.bias"]:
                del state[key]
            state |= {f"{name}.{key}": tensor.detach() for key, tensor in packed.packed.items()}


def mark_for_transformers(model: nn.Module, record: marks.Record) -> None:
    """Give an in-memory model the marks by which trainers and `save_pretrained` know a quantized model."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "save_pretrained"):
        return
    quantizers = list(dict.fromkeys(record.quantizers.values()))
    if not isinstance(config, PretrainedConfig):  # of diffusers: frozen, and its models save no quantizer but its own
        model.hf_quantizer = QftHfQuantizer(QftConfig(quantizers))
        return
    described: Any = None
    layers = [m for _, m in bare_layers(model) if isinstance(m, PackedLinear)]
    fits = all(
        (m.kind != "conv1d" or m.quantizer.config_conv1d)
        and m.quantizer.transformers_reads((m.out_features, m.in_features))
        for m in layers
    )
    fits = fits and not any(_only_ours(m) for m in model.modules())
    if len(quantizers) == 1 and fits:  # the backend's own format, where it has one that others read
        described = quantizers[0].transformers_config_for(
            [n for n, m in bare_layers(model) if quantizer_of(m) is not None],
            _unquantized_linears(model),
            getattr(model, "dtype", None),
        )
    layers = _as_packed(model) if described is None else {}
    if described is None and all(isinstance(m, PackedModule) for m in layers.values()):
        described = describe_packed(layers.items())
        described.qft_serializable = all(q.capabilities.serializable for q in quantizers)
    if described is None:
        described = QftConfig(quantizers)
        described.qft_serializable = False
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):  # they make TRL cast adapters to bf16
        model.__dict__.pop(flag, None)
    model.hf_quantizer = QftHfQuantizer(described)
    model.is_quantized = True
    model.quantization_method = described.quant_method
    config.quantization_config = described
    if torch.cuda.device_count() > 1:  # Trainer would wrap in DataParallel, which copies packed weights wrongly
        model.is_parallelizable = model.model_parallel = True


def _keep_codes_apart(model: nn.Module) -> None:
    """Have `save_pretrained` fuse no quantized layers into the tensors that the model's original files had.

    transformers splits or fuses weights of some models while it loads them, and undoes that where it saves, with codes
    and constants as with floats: what it writes cannot be read. Unfused, it can.
    """
    from transformers.core_model_loading import WeightConverter

    conversions = weight_conversions(model)
    weights = [f"{name}.weight" for name, module in bare_layers(model) if quantizer_of(module) is not None]
    weights += [
        f"{name}.{key}"
        for name, module in bare_layers(model)
        if isinstance(module, PackedExperts)
        for key in module.packed
    ]

    def touches(conversion: Any) -> bool:
        if not isinstance(conversion, WeightConverter):
            return False
        try:
            back = conversion.reverse_transform()
        except Exception:
            return True
        return any(back.rename_source_key(w)[1] is not None for w in weights)

    kept = [c for c in conversions if not touches(c)]
    if len(kept) < len(conversions):
        model.__dict__.setdefault("_qft_conversions", getattr(model, "_weight_conversions", None))
        model._weight_conversions = kept


def weight_conversions(model: nn.Module) -> list[Any]:
    """What transformers renames, splits or fuses in the model's files, as `save_pretrained` finds it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # a model that was built in memory
        conversions = [
            c for c in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(c, PrefixChange)
        ]
    return conversions


def forget_renames(model: nn.Module, renames: Mapping[str, str]) -> None:
    """`save_pretrained` would undo them, which held for the names in another tool's files, and wrongly."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions and renames:
        model._weight_conversions = [
            c for c in conversions if renames.keys().isdisjoint(getattr(c, "_original_source_patterns", ()))
        ]


def _unquantized_linears(model: nn.Module) -> list[str]:
    """What transformers must be told to leave in float, as it matches names: from the start, or by their ends."""
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear | PackedLinear) or is_conv1d(m)]
    quantized = [n for n in linears if quantizer_of(model.get_submodule(n)) is not None]
    left = sorted(set(linears) - set(quantized))
    return [f"^{n}$" if any(q.endswith(n) for q in quantized) else n for n in left]


def unmark(model: nn.Module) -> None:
    """Remove every mark: the model is a plain float model again."""
    model.__dict__.pop("_qft", None)
    if "_qft_conversions" in model.__dict__:
        model._weight_conversions = model.__dict__.pop("_qft_conversions")
    conversions = model.__dict__.get("_weight_conversions")
    if conversions:  # those that a quantizer read its codes with: they have no way back, and floats no use for them
        model._weight_conversions = [
            c for c in conversions if not any(hasattr(o, "hf_quantizer") for o in getattr(c, "operations", ()))
        ]
    for name in (
        "hf_quantizer",
        "is_quantized",
        "is_loaded_in_4bit",
        "is_loaded_in_8bit",
        "quantization_method",
        "hqq_quantized",
        "is_parallelizable",
        "model_parallel",
    ):
        model.__dict__.pop(name, None)
    # submodules may hold configs of their own, copies made while the model was built
    configs = {id(c): c for m in model.modules() for c in (getattr(m, "config", None),) if c is not None}
    for config in list(configs.values()):
        for part in [config, *_sub_configs(config)]:
            for name in ("quantization_config", "_is_quantized"):
                if name in getattr(part, "__dict__", {}):
                    delattr(part, name)


def _sub_configs(config: Any) -> list[Any]:
    return [getattr(config, name) for name in getattr(config, "sub_configs", {}) if hasattr(config, name)]


def mark(model: nn.Module, record: marks.Record) -> None:
    """Write the note, and give the model transformers' own marks."""
    from qft.core.enable_inputs import EnableInputs

    model.__dict__["_qft"] = record
    mark_for_transformers(model, record)
    if hasattr(model, "enable_input_require_grads"):
        EnableInputs(model).put_on()

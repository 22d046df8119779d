"""PEFT's door: on models that qft marked, LoRA layers are ours; on every other model PEFT's own."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.lora.model import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, _check_lora_target_modules_mamba, check_target_module_exists
from torch import nn

from qft.core.console import quiet_imports
from qft.core.experts import PackedExperts, as_stack, fused_parameters, packed_weights
from qft.core.record import record_of
from qft.core.registry import quantizer_of
from qft.core.selection import linear_targets
from qft.core.ties import check_parting, check_shared_modules, is_tied, settle_tie, tied_pairs
from qft.core.unquantized import is_float_linear
from qft.errors import BadOption, BadShape, NoTargets, QftWarning, UnsupportedOperation
from qft.lora.exact import merge_exactly
from qft.lora.experts import QftExperts, adaptable, chain, matches
from qft.lora.generating import Generate
from qft.lora.guard import (
    as_it_was,
    check_called,
    check_every_name,
    check_not_nested,
    refuse_unknown,
    unknown_names_warned,
    warn_of_patterns,
)
from qft.lora.layer import DequantizedForward, QftLinear, WeightMerge
from qft.lora.merge_weight import Merging, residual_error
from qft.lora.noted import REWRITTEN, noted

KEPT_INITS = (True, False, "gaussian", "orthogonal", "eva")
"""PEFT's initialisations that leave the base weight alone; the others are ours to translate, or refused."""

# what PEFT has no right code for over a weight that is not a float tensor
_REFUSED = {
    "arrow_config": "Arrow routing",
    "use_bdlora": "block-diagonal LoRA",
    "alora_invocation_tokens": "activated LoRA",
    "velora_config": "VeLoRA",
    "monteclora_config": "MonteCLoRA",
    "kasa_config": "KaSA, which rewrites the base weights",
    "layer_replication": "layer replication",
    "megatron_config": "Megatron layers",
}


_ADAPTABLE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)


class QftLoraModel(LoraModel):
    """`LoraModel` that builds `QftLinear` on models quantized by qft, and PEFT's layers on all others."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        note_configs(self)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT leaves its hooks on the layers where the forward pass raises, and the next call takes them for its own."""
        before = {m: set(m._forward_pre_hooks) for m in self.modules()} if kwargs.get("adapter_names") else {}
        try:
            with super()._enable_peft_forward_hooks(*args, **kwargs):
                yield
        finally:
            for module, keys in before.items():
                for key in set(module._forward_pre_hooks) - keys:
                    del module._forward_pre_hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)

    def disable_adapter_layers(self) -> None:
        check_residual(self.model, "switched off")
        super().disable_adapter_layers()

    def delete_adapter(self, adapter_name: str) -> None:
        check_residual(self.model, "deleted", adapter_name)
        super().delete_adapter(adapter_name)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        record = record_of(model)
        if record is not None:
            config = self.peft_config[adapter_name]
            check_not_nested(model, adapter_name)
            check_config(config)
            check_tokens(model, config)
            if not config.inference_mode:
                with unknown_names_warned():
                    check_every_name(model, config)
                    if config.target_parameters:
                        _targeted_parameters(model, config)
                warn_of_patterns(model, config)
            if config.target_modules == "all-linear":
                config.target_modules = set(all_linear(model, config))
            elif not config.inference_mode:  # an adapter that was trained elsewhere computes here what it did there
                check_called(model, config)
            check_groups(model, config)
        with quiet_imports():
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        if record is not None:
            merge_exactly(model)
            self.peft_config[adapter_name] = noted(self.peft_config[adapter_name], self.model)
            DequantizedForward.take_off(model)
            if record.forward == "dequantize":
                DequantizedForward.put_on(model)
            Generate.put_on(model)

    def _create_new_module(self, lora_config, adapter_name, target, **kwargs):
        record = record_of(self.model)
        parameter = kwargs.get("parameter_name")
        if record is not None and parameter is not None and adaptable(target):
            kept = {k: kwargs[k] for k in ("r", "lora_alpha")}
            return QftExperts(target, adapter_name, parameter, lora_config, **kept)
        if record is None or parameter is not None:
            return super()._create_new_module(lora_config, adapter_name, target, **kwargs)
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if not _quantized(base) and not is_float_linear(base):
            return super()._create_new_module(lora_config, adapter_name, target, **kwargs)
        for key in ("device_map", "loaded_in_8bit", "loaded_in_4bit", "parameter_name"):
            kwargs.pop(key, None)
        kwargs = {k: v for k, v in kwargs.items() if not k.endswith("quantization_config")}
        return QftLinear(target, adapter_name, lora_config, native=record.forward == "native", **kwargs)

    def _replace_module(self, parent, child_name, new_module, child):
        if isinstance(new_module, Merging):
            setattr(parent, child_name, new_module)
            new_module.train(child.training)
        elif isinstance(child, Merging):
            setattr(parent, child_name, new_module)
        else:
            super()._replace_module(parent, child_name, new_module, child)

    def _check_target_module_exists(self, peft_config, key):
        # packed experts stand in a parameter's place: names of layers do not mean them
        if record_of(self.model) is not None and isinstance(_submodule(self.model, key), PackedExperts):
            return False
        return super()._check_target_module_exists(peft_config, key)

    def _inject_parameters(self, peft_config, model, adapter_name, low_cpu_mem_usage):
        found = []
        if record_of(self.model) is not None:
            # in the order of definition, which decides the nesting and with it the names in files, as in PEFT
            for name, _ in list(packed_weights(model)):
                if matches(name, peft_config.target_parameters):
                    self._adapt_experts(peft_config, model, adapter_name, name, low_cpu_mem_usage)
                    found.append(name)
        others = super()._inject_parameters(
            peft_config=peft_config, model=model, adapter_name=adapter_name, low_cpu_mem_usage=low_cpu_mem_usage
        )
        return [*found, *others]

    def _adapt_experts(self, config, model, adapter_name, name, low_cpu_mem_usage):
        where, _, parameter = name.rpartition(".")
        outer = model.get_submodule(where)
        target = next((m for m in chain(outer) if m.parameter_name == parameter), outer)
        parent, _, last = where.rpartition(".")
        with init_empty_weights() if low_cpu_mem_usage else nullcontext():
            self._create_and_replace(
                config,
                adapter_name,
                target,
                last,
                model.get_submodule(parent),
                current_key=name,
                parameter_name=parameter,
            )

    def _check_merge_allowed(self):
        record = record_of(self.model)
        if record is None:
            return super()._check_merge_allowed()
        method = self.model.__dict__.pop("quantization_method", None)
        try:  # PEFT refuses GPTQ here, which our layer can merge or refuses by its capabilities
            super()._check_merge_allowed()
        finally:
            if method is not None:
                self.model.quantization_method = method

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, *args, **kwargs
    ) -> None:
        exists = adapter_name in self.peft_config  # then PEFT does nothing
        super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
        if exists:
            return
        self._settle_scaling(adapter_name)
        share = dict(zip(adapters, weights))
        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                _combine_biases(module, share, adapter_name)
            if isinstance(module, Merging) and any(name in module.starts for name in adapters):
                module.starts[adapter_name] = None

    def _settle_scaling(self, adapter_name: str) -> None:
        """Have the config of a combined adapter describe it: PEFT leaves out rank patterns and scales rsLoRA twice."""
        config = self.peft_config[adapter_name]
        config.use_rslora = False
        for name, module in self.model.named_modules():
            if not isinstance(module, LoraLayer) or adapter_name not in module.scaling:
                continue
            module.scaling[adapter_name] = 1.0  # A holds the scaling of the adapters that were combined
            matrix = module.lora_A[adapter_name].weight if adapter_name in module.lora_A else None
            if matrix is None and adapter_name in module.lora_embedding_A:
                matrix = module.lora_embedding_A[adapter_name]
            if matrix is not None and not isinstance(module, ParamWrapper) and matrix.shape[0] != config.r:
                rank = matrix.shape[0]
                module.r[adapter_name] = module.lora_alpha[adapter_name] = rank
                config.rank_pattern[name] = config.alpha_pattern[name] = rank

    @classmethod
    def _convert_state_dict_for_initial_model(cls, peft_model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """PEFT's `path_initial_model_for_weight_conversion`, which subtracts the start of an adapter from it.

        Raises:
            UnsupportedOperation: the base is rewritten: it and the start together are not the quantized original.
        """
        record = record_of(peft_model)
        if record is not None and record.base_changed:
            raise UnsupportedOperation(
                "path_initial_model_for_weight_conversion= does not give an adapter over the quantized original, since the "
                "base was quantized again after its init: qft.save stores the base with its adapter, and qft.transfer moves "
                "what was learnt to another base"
            )
        return super()._convert_state_dict_for_initial_model(peft_model, *args, **kwargs)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        self._check_all(adapter_names)
        merge_exactly(self.model)
        with all_or_nothing(self.model):
            super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(self, merge=True, progressbar=False, safe_merge=False, adapter_names=None):
        record = record_of(self.model)
        if not merge:
            check_residual(self.model, "unloaded")
        if record is not None and merge:
            self._check_all(adapter_names)
            check_parting(self.model)
            merge_exactly(self.model)
        layers = [m for m in self.model.modules() if isinstance(m, Merging)]
        was_tied = is_tied(self.model)
        with as_it_was(self.model), all_or_nothing(self.model):
            model = super()._unload_and_optionally_merge(
                merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
            )
        DequantizedForward.take_off(model)
        Generate.take_off(model)
        if record is not None and merge:
            settle_tie(model, was_tied=was_tied)
        merges = [m.last_merge for m in layers if m.merged and m.last_merge is not None]
        if record is not None and merges:
            record.base_changed = record.merged = True
            warn_of_loss(merges)
        return model

    def _check_add_weighted_adapter(self, adapters, combination_type, svd_rank):
        combination_type, rank, targets = super()._check_add_weighted_adapter(adapters, combination_type, svd_rank)
        configs = [self.peft_config[name] for name in adapters]
        _check_combination(adapters, configs, combination_type)
        sizes = {c.qalora_group_size if c.use_qalora else None for c in configs}
        if len(sizes) > 1 or (sizes != {None} and combination_type.endswith("svd")):
            raise UnsupportedOperation(
                f"{', '.join(adapters)} cannot be combined by {combination_type!r}: group-pooled adapters (use_qalora) of "
                "one qalora_group_size combine by 'cat' or 'linear', and with no others"
            )
        return combination_type, rank, targets

    def _check_all(self, adapter_names: list[str] | None) -> None:
        """Raise before the first weight changes."""
        if record_of(self.model) is not None:
            check_shared_modules(self.model)
        for module in self.model.modules():
            if isinstance(module, Merging):
                names = adapter_names if adapter_names is not None else module.active_adapters
                module.check_merge([n for n in names if n in module.lora_A])


def note_configs(tuner: Any) -> None:
    """Have the configs of a tuner over a quantized model note its base, after they were copied or unpickled."""
    model = tuner._modules.get("model")
    if model is not None and model.__dict__.get("_qft") is not None:
        for name, config in list(tuner.peft_config.items()):
            tuner.peft_config[name] = noted(config, model)


def check_residual(model: nn.Module, what: str, adapter: str | None = None) -> None:
    """Refuse to take an adapter away whose start is a part of the base: what is left is a residual.

    Raises:
        UnsupportedOperation: the init of an adapter (PiSSA, OLoRA, LoftQ of several steps) rewrote the base.
    """
    for module in model.modules():
        needed = getattr(module, "rewritten_by", None) if isinstance(module, Merging) else None
        if needed and (adapter is None or adapter == needed):
            raise UnsupportedOperation(residual_error(needed, what))


def _check_combination(adapters: list[str], configs: list[Any], combination_type: str) -> None:
    """Refuse to combine adapters of which a part would be lost.

    Raises:
        UnsupportedOperation: DoRA, trained tokens, or biases with a combination that is not a sum.
    """
    plain = combination_type in ("cat", "linear", "svd")
    for name, config in zip(adapters, configs):
        lost = (
            "its magnitudes (use_dora) are not linear in the adapter"
            if config.use_dora
            else "its trained tokens (trainable_token_indices) would be lost"
            if config.trainable_token_indices
            else f"its biases (lora_bias) have no {combination_type!r} combination"
            if config.lora_bias and not plain
            else None
        )
        if lost is not None:
            raise UnsupportedOperation(
                f"{', '.join(adapters)} cannot be combined: adapter {name!r} cannot be part of a sum, since {lost}; merge each "
                "of them with qft.merge_to_float instead"
            )


@torch.no_grad()
def _combine_biases(layer: Any, share: dict[str, float], adapter_name: str) -> None:
    """Set the bias of a combined adapter to the weighted sum of the biases of its parts."""
    target = layer.lora_B[adapter_name] if adapter_name in layer.lora_B else None
    bias = getattr(target, "bias", None)
    if not isinstance(bias, torch.Tensor):
        return
    bias.zero_()
    for name, weight in share.items():
        part = layer.lora_B[name].bias if name in layer.lora_B else None
        if isinstance(part, torch.Tensor):
            bias += weight * layer.scaling[name] * part.to(bias)


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Run a block that merges; where it raises, what is merged is what was merged before."""
    layers = [(m, list(m.merged_adapters)) for m in model.modules() if isinstance(m, BaseTunerLayer)]
    try:
        yield
    except BaseException:
        for layer, before in layers:
            if list(layer.merged_adapters) != before:
                layer.unmerge()
                if before:
                    layer.merge(adapter_names=before)
        raise


def warn_of_loss(merges: list[WeightMerge]) -> None:
    """Say what share of the update survived a merge into quantized weights, where that rounded anything."""
    if all(m.relative_error < 1e-6 for m in merges):  # float32 rounding alone: float zero points took the update in
        return
    share = sum(m.survived for m in merges) / len(merges)
    warnings.warn(
        f"merged into the quantized weights: {share:.0%} of the update survived the rounding on average over "
        f"{len(merges)} weights; qft.merge_to_float keeps all of it",
        QftWarning,
        stacklevel=4,
    )


def _quantized(module: nn.Module) -> bool:
    """Whether `module` is a quantized linear layer."""
    return quantizer_of(module) is not None and not isinstance(module, PackedExperts)


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def check_config(config: LoraConfig) -> None:
    """Refuse, before anything is wrapped, what would be wrong over quantized weights.

    Raises:
        UnsupportedOperation: a LoRA variant that reads or rewrites float base weights, or does not go with QA-LoRA.
        BadOption: an initialisation that only `qft.wrap(..., init=)` can do.
        BadShape: a rank below one.
    """
    for field, label in _REFUSED.items():
        if getattr(config, field, None):
            raise UnsupportedOperation(
                f"{label} ({field}) is not supported over quantized weights; plain LoRA, QA-LoRA, rsLoRA and DoRA are"
            )
    if config.use_qalora:
        _check_pooling(config)
    if config.target_parameters:
        _check_parameters(config)
    if config.init_lora_weights == REWRITTEN:
        raise BadOption(
            "this adapter belongs to a rewritten base that is not stored with it: load it with qft.load over that base, or "
            "into the adapter that it was saved from with model.load_adapter(folder, name)"
        )
    if config.init_lora_weights not in KEPT_INITS:
        raise BadOption(
            f"init_lora_weights={config.init_lora_weights!r} rewrites the float base weights, which PEFT cannot do over "
            "quantized ones; use qft.wrap(model, adapter, init=...), which can"
        )
    ranks = [config.r, *(config.rank_pattern or {}).values()]
    for rank in ranks:
        if type(rank) is not int or rank < 1:
            raise BadShape(f"the rank is a positive integer, not {rank!r}")


def _check_parameters(config: LoraConfig) -> None:
    for there, label in (
        (config.use_dora, "DoRA (use_dora)"),
        (config.lora_dropout, f"lora_dropout={config.lora_dropout}"),
        (config.lora_bias, "lora_bias"),
        (config.fan_in_fan_out, "fan_in_fan_out"),
        (config.init_lora_weights in ("eva", "orthogonal"), f"init_lora_weights={config.init_lora_weights!r}"),
    ):
        if there:
            raise UnsupportedOperation(
                f"{label} does not go together with target_parameters, in PEFT either: leave it out, or put the adapters on "
                "linear layers alone"
            )


def _check_pooling(config: LoraConfig) -> None:
    size = config.qalora_group_size
    if type(size) is not int or size < 1:
        raise BadOption(f"qalora_group_size={size!r}; it is a positive number of input features")
    for there, label in (
        (config.use_dora, "use_dora"),
        (config.target_parameters, "target_parameters"),
        (config.init_lora_weights == "eva", "init_lora_weights='eva', whose A is as wide as the layer"),
    ):
        if there:
            raise UnsupportedOperation(f"group-pooled adapters (use_qalora) do not go together with {label}")


def check_groups(model: nn.Module, config: LoraConfig) -> None:
    """Refuse, before anything is wrapped, group-pooled adapters on layers that they do not fit.

    Raises:
        BadShape: the groups do not divide a layer's in_features.
        UnsupportedOperation: a target that is no linear layer.
    """
    if not config.use_qalora:
        return
    config = copy.copy(config)
    fill_targets(model, config)
    if config.target_modules == "all-linear":
        config.target_modules = set(all_linear(model, config))
    size, inside = config.qalora_group_size, ()
    for name, module in model.named_modules():
        if name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):  # the adapted layer is the target, not what it is made of
            inside += (name + ".",)
            module = module.get_base_layer()
        hit = check_target_module_exists(config, name)
        if not hit or type(hit).__name__ == "_ExcludedModule" or isinstance(module, PackedExperts):
            continue
        if not _quantized(module) and not is_float_linear(module):
            raise UnsupportedOperation(
                f"group-pooled adapters (use_qalora) are for linear layers, and target_modules takes in {name}, a "
                f"{type(module).__name__}"
            )
        in_features = _shape(module)[1]
        if in_features % size:
            raise BadShape(
                f"qalora_group_size={size} does not divide the in_features of {name}, {in_features}: take a number that "
                "divides every target's, the quantizer's group_size or a multiple of it where the merge is to be exact"
            )


def fill_targets(model: nn.Module, config: LoraConfig) -> None:
    """Settle `target_modules` where the config leaves them open, as PEFT does, by the kind of model.

    Raises:
        NoTargets: PEFT has no default for this kind.
    """
    if config.target_modules is not None or config.target_parameters:
        return
    kind = getattr(getattr(model, "config", None), "model_type", None)
    defaults = LoraModel.target_module_mapping.get(kind)
    if defaults is None:
        raise NoTargets(
            f"the adapter config names no target_modules, and PEFT has no default for {kind or type(model).__name__}; "
            "target_modules='all-linear' takes every linear layer"
        )
    config.target_modules = defaults if isinstance(defaults, str) else set(defaults)


def check_saved_modules(model: nn.Module, config: LoraConfig, targets: Iterable[str] = ()) -> None:
    """Refuse to train quantized weights whole: those of `model`, and the layers that are about to be quantized.

    Raises:
        UnsupportedOperation: `modules_to_save` takes in a quantized layer.
    """
    saved = tuple(config.modules_to_save or ())
    if not saved:
        return
    targets = set(targets)
    for name, module in model.named_modules():
        if not name.endswith(saved):
            continue
        inside = (n for n, m in module.named_modules(prefix=name) if n in targets or quantizer_of(m) is not None)
        hit = next(inside, None)
        if hit is not None:
            raise UnsupportedOperation(
                f"modules_to_save={sorted(saved)} would train {hit} whole, and its weights are quantized: leave it in "
                "float with skip=, or target it with the adapter"
            )


def check_tokens(model: nn.Module, config: Any) -> None:
    """Refuse, before anything changes, `trainable_token_indices` that do not fit the model.

    Raises:
        BadOption: an index that is not a token of the embedding, or one that is given twice.
        UnsupportedOperation: another adapter on a layer that shares its weight with this embedding.
    """
    wanted = getattr(config, "trainable_token_indices", None)
    if not wanted:
        return
    embedding = _input_embeddings(model)
    by_name = wanted if isinstance(wanted, dict) else {"": wanted}
    for name, indices in by_name.items():
        found = [m for n, m in model.named_modules() if n == name or n.endswith(f".{name}")] if name else [embedding]
        for module in found:
            shape = getattr(getattr(module, "weight", None), "shape", None)
            if shape:  # PEFT says what is wrong with a module that has no table of weights
                _check_indices(indices, shape[0])
    taken = set(config.modules_to_save or ()) if getattr(config, "modules_to_save", None) else set()
    for name in {name.rpartition(".")[0] for pair in tied_pairs(model) for name in pair}:
        module = _submodule(model, name)
        if module is None or module is embedding:
            continue
        if name.rpartition(".")[2] in taken or _is_target(config, name):
            raise UnsupportedOperation(
                f"{name} shares its weight with the embedding, whose tokens are trained by trainable_token_indices: put no "
                f"other adapter on {name}, or train the embedding with target_modules or modules_to_save instead"
            )


def _input_embeddings(model: nn.Module) -> nn.Module | None:
    try:
        return model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None


def _check_indices(indices: Any, rows: int) -> None:
    whole = isinstance(indices, Iterable) and not isinstance(indices, str | dict)
    found = list(indices) if whole else []
    wrong = [i for i in found if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < rows]
    if not whole or wrong:
        said = f"{wrong[0]!r} is not a token" if wrong else f"{indices!r} is not a list of token ids"
        raise BadOption(f"trainable_token_indices: {said}; the embedding has tokens 0 to {rows - 1}")
    if len(set(found)) < len(found):
        twice = next(i for i in found if found.count(i) > 1)
        raise BadOption(f"trainable_token_indices holds token {twice} more than once")


def _is_target(config: Any, name: str) -> bool:
    hit = check_target_module_exists(config, name) if getattr(config, "target_modules", None) else False
    return bool(hit) and type(hit).__name__ != "_ExcludedModule"


def all_linear(model: nn.Module, config: Any, *, say: bool = False) -> list[str]:
    """The layers that "all-linear" means: those of `linear_targets` that are as large as the rank, and that PEFT adapts.

    Args:
        say: warn of the layers that are left out, by name.

    Raises:
        BadShape: every layer is smaller than the rank.
    """
    kept: list[str] = []
    left: dict[str, str] = {}
    small = ""
    for name in linear_targets(model, _quantized):
        shape = _shape(_bare(model.get_submodule(name)))
        named = _rank_of(config, name) != getattr(config, "r", 1)  # by rank_pattern: refused where it does not fit
        if _rank_of(config, name) > min(shape) and not named:
            left[name] = "smaller than the rank"
            first = f"rank {_rank_of(config, name)} is larger than {name}, whose weight is {shape[0]} × {shape[1]}"
            small = small or first
        elif not _allowed_by_peft(model, config, name):
            left[name] = "PEFT does not adapt it in this architecture"
        else:
            kept.append(name)
    if small and not kept:
        raise BadShape(f"{small}, and no linear layer of this model is larger")
    if left and say:
        reasons = {reason: [n for n, r in left.items() if r == reason] for reason in dict.fromkeys(left.values())}
        said = "; ".join(
            f"{', '.join(n[:3])}{f' and {len(n) - 3} more' if len(n) > 3 else ''}: {r}" for r, n in reasons.items()
        )
        warnings.warn(f"all-linear leaves out {len(left)} layers: {said}", QftWarning, stacklevel=3)
    return kept


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _allowed_by_peft(model: nn.Module, config: Any, name: str) -> bool:
    try:
        _check_lora_target_modules_mamba(config, model, name.rpartition(".")[2])
    except ValueError:
        return False
    return True


def _bare(module: nn.Module) -> nn.Module:
    """The base layer of an adapted one."""
    while isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    return getattr(module, "layer", module) if type(module).__name__ == "LinearView" else module


def _rank_of(config: Any, name: str) -> int:
    from peft.utils.other import get_pattern_key

    patterns = getattr(config, "rank_pattern", None) or {}
    rank = getattr(config, "r", 1)
    return patterns.get(get_pattern_key(patterns.keys(), name), rank) if patterns else rank


def targeted(model: nn.Module, config: LoraConfig) -> dict[str, int]:
    """The linear layers and fused experts that `config` would adapt, with their rank: name → r.

    Raises:
        NoTargets: it matches none, or its target_parameters no parameter.
        BadShape: a rank larger than a layer.
        BadOption: a layer that is never called, since the model's code reads its weight.
    """
    if config.target_modules == "all-linear":
        names = all_linear(model, config, say=True)
        excluded = copy.copy(config)
        excluded.target_modules = set(names)
        config = excluded
    found, other = {}, 0
    for name, module in model.named_modules():
        try:
            hit = check_target_module_exists(config, name)
        except re.error as error:
            raise BadOption(f"the adapter config holds a pattern that is no regular expression: {error}") from error
        if not hit or type(hit).__name__ == "_ExcludedModule" or isinstance(module, PackedExperts):
            continue
        if not _quantized(module) and not is_float_linear(module):
            if not isinstance(module, _ADAPTABLE) and type(module).__module__.startswith(("torch.", "transformers.")):
                raise BadOption(
                    f"target_modules={config.target_modules!r} takes in {name}, a {type(module).__name__}, which LoRA "
                    "cannot adapt: it adapts linear layers, convolutions and embeddings"
                )
            other += 1
            continue
        rank = _rank_of(config, name)
        shape = _shape(module)
        if rank > min(shape):
            raise BadShape(f"rank {rank} is larger than {name}, whose weight is {shape[0]} × {shape[1]}")
        found[name] = rank
    check_called(model, config)
    if config.target_parameters:
        found |= _targeted_parameters(model, config)
    elif not found and not other:
        some = [n for n, m in model.named_modules() if _quantized(m) or is_float_linear(m)][:4]
        raise NoTargets(
            f"target_modules={config.target_modules!r} matches no layer; this model has, among others, {', '.join(some)}; "
            "'all-linear' takes all of them"
        )
    return found


def _targeted_parameters(model: nn.Module, config: LoraConfig) -> dict[str, int]:
    """The fused experts, packed or float, that `target_parameters` takes in, with their rank."""
    from peft.utils.other import get_pattern_key

    shapes = {name: stack.handle.shape for name, stack in packed_weights(model)}
    others: list[str] = []
    for where, module in model.named_modules():
        fused = fused_parameters(module)
        for key, parameter in module._parameters.items():
            name = f"{where.replace('.base_layer', '')}.{key}"
            if key in fused:
                shapes[name] = as_stack(parameter, module.is_transposed).shape
            elif parameter is not None and not isinstance(module, PackedExperts):
                others += [name] if matches(name, config.target_parameters) else []
    found = {}
    for name, shape in shapes.items():
        if not matches(name, config.target_parameters):
            continue
        key = get_pattern_key(config.rank_pattern.keys(), name) if config.rank_pattern else None
        rank = (config.rank_pattern or {}).get(key, config.r)
        if rank > min(shape[1:]):
            raise BadShape(f"rank {rank} is larger than an expert of {name}, whose weight is {shape[1]} × {shape[2]}")
        found[name] = rank
    if not found and not others:
        raise NoTargets(
            f"target_parameters={sorted(config.target_parameters)} matches no parameter of this model; its fused experts are "
            f"{', '.join(list(shapes)[:4]) or 'none'}"
        )
    unknown = [t for t in config.target_parameters if not any(matches(name, [t]) for name in [*found, *others])]
    refuse_unknown("target_parameters", unknown, model)
    return found


def _shape(module: nn.Module) -> tuple[int, int]:
    from qft.core.unquantized import Unquantized

    quantizer = quantizer_of(module) or Unquantized()
    return quantizer.weights(module)[0].shape


def install() -> None:
    """Put `QftLoraModel` in the place of PEFT's `LoraModel`: it is one on every model that qft did not mark."""
    PEFT_TYPE_TO_TUNER_MAPPING[PeftType.LORA] = QftLoraModel


install()

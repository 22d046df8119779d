"""What `qft.json` says of an adapter and its base, and how it comes into every folder that an adapter is saved in.

PEFT, trainers and the hub save adapters through `PeftModel.save_pretrained`, which has the adapter's config write itself.
On models that qft quantized, the config writes `qft.json` next to its own file.
"""

from __future__ import annotations

import copy
import json
import math
import weakref
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftType
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import nn

from qft.core import record as marks
from qft.core.classifiers import noted_classes
from qft.core.codes import codes_fingerprint
from qft.errors import UnsupportedOperation

NOTE = "qft.json"
REWRITTEN = "of a rewritten base that is not stored here (see qft.json)"
"""As `init_lora_weights` of an adapter whose base is neither q(W) nor stored with it: PEFT does not load it over another."""


def note_of(record: marks.Record, base: nn.Module | None, stores_base: bool) -> dict[str, Any]:
    """The content of `qft.json`, as JSON values.

    Args:
        record: what qft notes on the base.
        base: the base model, for the fingerprint of its codes; None leaves it out.
        stores_base: the base is stored in the same folder.
    """
    from qft.core.version import __version__

    quantizers = list(dict.fromkeys(record.quantizers.values()))
    return {
        "format": 1,
        "qft": __version__,
        "quantizers": [q.to_dict() for q in quantizers],
        "layers": {n: quantizers.index(q) for n, q in record.quantizers.items()},
        "init": record.init,
        "forward": record.forward,
        "base_stored": stores_base,
        "base_changed": record.base_changed,
        "base_merged": record.merged,
        "fingerprint": {
            n: [list(shape), [float(f"{v:.6g}") for v in values]] for n, (shape, values) in record.fingerprint.items()
        },
        "rewritten_by": None if base is None else _rewritten_by(base),
        "codes": {} if base is None or _merged(base) else codes_fingerprint(base),
        **({} if base is None else noted_classes(base)),
    }


class Noted:
    """Mixed into the class of an adapter's config: `save_pretrained` also writes `qft.json`."""

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write the config and, where the base is known, `qft.json`; see `peft.PeftConfig.save_pretrained`."""
        base = self.__dict__.get("_qft_base", _none)()
        record = None if base is None else base.__dict__.get("_qft")
        if record is not None:
            describe(self, base)
        super().save_pretrained(save_directory, **kwargs)  # type: ignore[misc]
        if record is None:
            return
        folder = Path(save_directory)
        note = note_of(record, base, stores_base=False)
        if (name := _name_of(self, base)) is not None:
            note["name"] = name
        (folder / NOTE).write_text(json.dumps(note, indent=1))
        if record.base_changed:
            mark_rewritten(folder, True)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        state = {k: v for k, v in self.__dict__.items() if k != "_qft_base"}
        twin.__dict__.update(copy.deepcopy(state, memo))
        base = self.__dict__.get("_qft_base", _none)()
        here = memo.get(id(base), base)  # a copy of the model has a base of its own
        if here is not None:
            twin.__dict__["_qft_base"] = weakref.ref(here)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return _plain, (type(self).__mro__[2], {k: v for k, v in self.__dict__.items() if k != "_qft_base"})


def noted(config: PeftConfig, base: nn.Module) -> PeftConfig:
    """A copy of an adapter's config that writes what qft notes on `base` wherever it is saved."""
    cls = type(config)
    if not isinstance(config, Noted):
        if cls not in _CLASSES:
            _CLASSES[cls] = type(cls.__name__, (Noted, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})
        cls = _CLASSES[cls]
    twin = cls.__new__(cls)
    twin.__dict__.update(config.__dict__)
    twin.__dict__["_qft_base"] = weakref.ref(base)
    return twin


def _rewritten_by(base: nn.Module) -> str | None:
    """The adapter whose init rewrote the base."""
    return next((by for m in base.modules() if (by := m.__dict__.get("rewritten_by")) is not None), None)


def _merged(base: nn.Module) -> bool:
    """Whether adapters are merged in place, so that the codes are not those that the adapters belong to."""
    return any(isinstance(m, BaseTunerLayer) and m.merged for m in base.modules())


def _name_of(config: Any, base: nn.Module) -> str | None:
    """The name of the adapter that a config describes."""
    configs = base.__dict__.get("peft_config") or {}
    return next((name for name, known in configs.items() if known is config), None)


def describe(config: Any, base: nn.Module) -> None:
    """Have a LoRA config say the ranks and scalings that its layers have: a hot swap changes the layers alone."""
    name = _name_of(config, base)
    if name is None or config.peft_type != PeftType.LORA:  # AdaLoRA's config is a subclass, and its ranks are its own
        return
    found: dict[str, tuple[int, float]] = {}
    told: dict[str, tuple[int, float]] = {}
    for path, module in base.named_modules():
        matrix = getattr(module, "lora_A", None)
        if (
            not isinstance(module, LoraLayer)
            or matrix is None
            or name not in matrix
            or isinstance(module, ParamWrapper)
        ):
            continue
        rank, scaling = matrix[name].weight.shape[0], float(module.scaling[name])
        found[path] = rank, scaling
        told[path] = _told(config, path)
    if all(f[0] == t[0] and math.isclose(f[1], t[1], rel_tol=1e-6) for f, t in zip(found.values(), told.values())):
        return
    if any(name in module.lora_embedding_A for module in base.modules() if isinstance(module, LoraLayer)):
        raise UnsupportedOperation(
            f"adapter {name!r} was swapped for one of another rank or alpha, and it is on an embedding: load it with "
            "model.load_adapter under its own name, and save that"
        )
    ranks = {rank for rank, _ in found.values()}
    alphas = {path: _alpha(rank, scaling, config.use_rslora) for path, (rank, scaling) in found.items()}
    config.r = max(ranks)
    config.lora_alpha = next(iter(alphas.values()))
    config.rank_pattern = {path: rank for path, (rank, _) in found.items() if rank != config.r}
    config.alpha_pattern = {path: alpha for path, alpha in alphas.items() if alpha != config.lora_alpha}


def _told(config: Any, path: str) -> tuple[int, float]:
    """The rank and scaling that a config gives a layer."""
    rank_key = get_pattern_key(config.rank_pattern.keys(), path) if config.rank_pattern else path
    alpha_key = get_pattern_key(config.alpha_pattern.keys(), path) if config.alpha_pattern else path
    rank = (config.rank_pattern or {}).get(rank_key, config.r)
    alpha = (config.alpha_pattern or {}).get(alpha_key, config.lora_alpha)
    return rank, alpha / (math.sqrt(rank) if config.use_rslora else rank)


def _alpha(rank: int, scaling: float, rslora: bool) -> float | int:
    alpha = scaling * (math.sqrt(rank) if rslora else rank)
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-6) else alpha


def mark_rewritten(folder: Path, rewritten: bool) -> None:
    """Have the adapter's config in a folder say whether its base is rewritten and stored elsewhere."""
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    if "init_lora_weights" in config:
        config["init_lora_weights"] = REWRITTEN if rewritten else True
        path.write_text(json.dumps(config, indent=2, sort_keys=True))


_CLASSES: dict[type, type] = {}


def _plain(cls: type, state: dict[str, Any]) -> Any:
    """A config of PEFT's own class, for `pickle`; `QftLoraModel` has it noted again."""
    made = cls.__new__(cls)
    made.__dict__.update(state)
    return made


def _none() -> None:
    return None

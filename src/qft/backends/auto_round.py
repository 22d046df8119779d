"""AutoRound's checkpoints: integers in GPTQ's words without `g_idx`, or in AWQ's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch import Tensor

from qft.backends.awq import AWQ
from qft.backends.gptq import GPTQ, natural
from qft.core.packed import PackedLinear
from qft.core.quantizer import Capabilities, Quantizer
from qft.errors import BadOption

_GPTQ = {
    "auto_round:auto_gptq": "gptq",
    "auto_round:gptq": "gptq",
    "auto_round": "gptq_v2",
    "auto_round:gptqmodel": "gptq_v2",
}
"""Packing formats in GPTQ's words, by how they keep zero points: less one, or as they are."""

_ELSEWHERE = frozenset({
    # what was quantized, and how: the checkpoint's tensors say so themselves
    "quant_method", "bits", "group_size", "sym", "packing_format", "extra_config", "block_name_to_quantize", "data_type",
    "quant_block_list", "to_quant_block_names", "supported_types", "scale_dtype", "dataset", "autoround_version", "backend",
    "amp", "batch_size", "enable_minmax_tuning", "enable_norm_bias_tuning", "enable_quanted_input", "iters", "lr", "seqlen",
    "gradient_accumulate_steps", "low_gpu_mem_usage", "minmax_lr", "nsamples", "enable_alg_ext", "desc_act", "damp_percent",
    "true_sequential", "static_attention_granularity", "static_kv_granularity", "modules_to_not_convert", "zero_point",
    "version",
})  # fmt: skip


@dataclass(frozen=True)
class AutoRound(GPTQ):
    """Integers in the layout of auto-round's checkpoints (packing formats auto_round:auto_gptq and auto_round).

    Codes and constants are GPTQ's (see `qft.GPTQ`), and groups follow each other: no `g_idx` is kept. AutoRound's own
    search for better roundings is its package's: here weights are rounded to nearest. Checkpoints of the packing format
    auto_round:auto_awq are read as AWQ, those of auto_round:gptqmodel as GPTQ.

    Packed tensors: `qweight`, `qzeros` and `scales` as GPTQ has them.
    """

    name: ClassVar[str] = "auto-round"
    config_methods: ClassVar[tuple[str, ...]] = ("auto-round", "auto_round", "intel/auto-round")
    foreign_types: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        super().__post_init__()
        if self.desc_act:
            raise BadOption("auto-round: desc_act=True: its checkpoints keep columns in their order; take gptq")

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(bits=self.bits, devices=frozenset({"cpu", "cuda", "xpu"}), requantize=True)

    def pack(self, weight: Tensor, *, statistics: Any = None) -> dict[str, Tensor]:
        packed = super().pack(weight)
        del packed["g_idx"]
        return packed

    def unpack(
        self, packed: Mapping[str, Tensor], *, shape: tuple[int, ...], dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        owner = natural(shape[1], self._group_size(shape), packed["qweight"].device)
        return super().unpack({**packed, "g_idx": owner}, shape=shape, dtype=dtype, out=out)

    def template(self, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        found = super().template(shape, dtype)
        del found["g_idx"]
        return found

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return sum(prod(sizes) * kind.itemsize for sizes, kind in self.template(shape, torch.float16).values())

    def doubt(self, shape: tuple[int, ...], statistics: Any) -> str | None:
        return None

    def loaded(self, name: str, layer: PackedLinear) -> None:
        layer.quantizer = self._as_stored(name, layer)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Quantizer:
        layout = str(config.get("packing_format") or "auto_round:auto_gptq")
        bits, size, symmetric = config.get("bits"), config.get("group_size", 128), config.get("sym", True)
        for key, value in config.items():
            if key not in _ELSEWHERE and not (key.startswith("act_") and value in (None, 16, True, False)):
                if value not in (None, False, "") and value not in ({}, []):
                    raise BadOption(f"this AutoRound config has {key}={value!r}, which qft does not know")
        if str(config.get("data_type", "int")) not in ("int", "int_sym", "int_asym"):
            raise BadOption(f"this AutoRound config has data_type={config['data_type']!r}: qft reads its integers")
        if config.get("desc_act"):
            raise BadOption("this AutoRound config has desc_act=True, which its layouts cannot say")
        for name, changes in (config.get("extra_config") or {}).items():
            if changes.get("bits", bits) >= 16:  # left in float
                continue
            for key in ("bits", "group_size", "sym", "data_type"):
                if key in changes and changes[key] != config.get(key):
                    raise BadOption(
                        f"extra_config gives {name!r} its own {key}={changes[key]!r}: qft reads checkpoints whose layers have "
                        "the same options"
                    )
        if layout in ("auto_round:auto_awq", "auto_round:awq"):
            return AWQ.from_config({"bits": bits, "group_size": size, "zero_point": not symmetric, "version": "gemm"})
        if layout not in _GPTQ:
            raise BadOption(
                f"the packing format {layout!r} is not read here; {', '.join(_GPTQ)} and auto_round:auto_awq are: export "
                "the model in one of these with auto-round"
            )
        own = GPTQ if layout == "auto_round:gptqmodel" else cls
        return own(bits=bits, group_size=size, symmetric=bool(symmetric), checkpoint_format=_GPTQ[layout])  # type: ignore[arg-type]

    def transformers_config_for(
        self, quantized: list[str], skipped: list[str], dtype: torch.dtype | None
    ) -> Any | None:
        from transformers import AutoRoundConfig

        stacks = {
            re.split(r"\.\d+\.", name, maxsplit=1)[0] if re.search(r"\.\d+\.", name) else "" for name in quantized
        }
        if len(stacks) != 1 or "" in stacks:  # layers outside of one stack of blocks: its config cannot say which
            return None
        left = [n for n in (s.removeprefix("^").removesuffix("$") for s in skipped) if n.startswith(min(stacks))]
        return AutoRoundConfig(
            bits=self.bits,
            group_size=self.group_size,
            sym=self.symmetric,
            data_type="int",
            packing_format="auto_round:auto_gptq" if self.checkpoint_format == "gptq" else "auto_round",
            block_name_to_quantize=min(stacks),
            **({"extra_config": {name: {"bits": 16} for name in left}} if left else {}),
        )

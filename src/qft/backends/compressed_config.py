"""The `quantization_config` of compressed-tensors' checkpoints (llm-compressor's, vLLM's), read and written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from qft.errors import BadOption

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mxfp4-pack-quantized")

_ELSEWHERE = frozenset({
    # what was quantized, and how far: the checkpoint's tensors say so themselves
    "quant_method", "config_groups", "ignore", "format", "quantization_status", "global_compression_ratio", "version",
    # how a vendor's loader is to take it
    "run_compressed", "dequantize", "use_optimized_inference",
})  # fmt: skip
_HOW = frozenset({"observer", "observer_kwargs", "zp_dtype", "scale_dtype", "dynamic", "actorder"})
"""Of a weight's arguments: how its codes came, or what its tensors show; `dynamic` and `actorder` are looked at."""


def read(config: Mapping[str, Any]) -> dict[str, Any]:
    """Format and arguments of the weights: format, type, bits, strategy, group_size, block_structure, symmetric.

    Activations that a vendor's kernels would quantize are left as they are by qft, and said nothing of.

    Raises:
        BadOption: anything that changes the weights or the outputs otherwise.
    """
    for key, value in config.items():
        if key not in _ELSEWHERE and value not in (None, False, "") and value not in ({}, []):
            raise BadOption(f"this compressed-tensors config has {key}={value!r}, which qft does not know")
    groups = config.get("config_groups") or {}
    if not isinstance(groups, Mapping) or not all(isinstance(g, Mapping) for g in groups.values()) or not groups:
        raise BadOption(f"this compressed-tensors config describes no weights: config_groups={groups!r}")
    found: list[dict[str, Any]] = []
    for group in groups.values():
        if group.get("output_activations") is not None:
            raise BadOption("this compressed-tensors config quantizes outputs of layers, which qft does not")
        own = _weights(group.get("weights"), group.get("format") or config.get("format"))
        if own not in found:
            found.append(own)
    if len(found) > 1:
        raise BadOption(f"the layers of this checkpoint have {len(found)} different options: qft reads those with one")
    return found[0]


def _weights(given: Any, layout: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise BadOption("this compressed-tensors config leaves weights in float: there is nothing quantized to read")
    layout = str(getattr(layout, "value", layout))
    if layout not in FORMATS:
        raise BadOption(
            f"the compressed-tensors format {layout!r} is not read here, {', '.join(FORMATS)} are: load the model with "
            "transformers and CompressedTensorsConfig(dequantize=True), which gives a float model"
        )
    known = {"num_bits", "type", "symmetric", "strategy", "group_size", "block_structure", *_HOW}
    for key, value in given.items():
        if key not in known and value not in (None, False, "") and value not in ({}, []):
            raise BadOption(f"weights of this compressed-tensors config have {key}={value!r}, which qft does not know")
    if given.get("dynamic"):
        raise BadOption("this compressed-tensors config has dynamic weights: their codes change with every input")
    if given.get("actorder") not in (None, False, "weight", "static"):
        raise BadOption(f"actorder={given['actorder']!r} reorders columns: qft reads those in their own order")
    size = given.get("group_size")
    strategy = given.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    return {
        "format": layout,
        "type": str(given.get("type", "int")),
        "bits": given.get("num_bits", 8),
        "strategy": str(strategy),
        "group_size": size if strategy == "group" else None,
        "block_structure": given.get("block_structure"),
        "symmetric": given.get("symmetric", True),
    }


def written(layout: str, weights: Mapping[str, Any], skipped: Sequence[str]) -> Any | None:
    """Make transformers' config object for linear layers with these weights, where compressed-tensors is installed.

    Args:
        weights: compressed-tensors' `QuantizationArgs`.
        skipped: names of float layers, or patterns `^name$`.
    """
    if find_spec("compressed_tensors") is None:
        return None
    from transformers import CompressedTensorsConfig

    return CompressedTensorsConfig(
        config_groups={"group_0": {"targets": ["Linear"], "weights": dict(weights), "format": layout}},
        format=layout,
        quantization_status="compressed",
        ignore=[f"re:{name}" if name.startswith("^") else name for name in skipped],
    )

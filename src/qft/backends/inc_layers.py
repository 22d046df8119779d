"""Layers that INC quantized, as packed layers over their tensors; and its HQQ solver, called on one weight."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qft.backends.inc_codes import packed_integers
from qft.core.console import quiet_import
from qft.core.packed import PackedLinear
from qft.core.quantizer import _installed
from qft.errors import BadOption, MissingDependency, UnsupportedOperation

REQUIREMENT = "neural-compressor-pt>=3.8,<4"


def check_package() -> None:
    """Raise `MissingDependency` where the package, which the method hqq needs, is not there."""
    version, fits = _installed(REQUIREMENT)
    if not fits:
        found = "not installed" if version is None else f"installed is {version}"
        raise MissingDependency(
            f"inc's method hqq needs {REQUIREMENT} ({found}): pip install '{REQUIREMENT}', or take 'hqq', which needs nothing"
        )


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """INC logs every step, and looks through the whole heap for garbage twice a weight: seconds each in a large process."""
    was, freeze = logging.root.manager.disable, not gc.get_freeze_count()
    logging.disable(max(was, logging.WARNING))
    if freeze:  # it finds nothing old to look through
        gc.freeze()
    try:
        yield
    finally:
        if freeze:
            gc.unfreeze()
        logging.disable(was)


def solved(weight: Tensor, bits: int, size: int, layer: str) -> dict[str, Tensor]:
    """Codes and constants of INC's HQQ, as its layers keep them in float16, with `quant_zero=False`."""
    check_package()
    hqq = quiet_import(layer.rpartition(".core.")[0])
    core = quiet_import(f"{hqq.__name__}.core")
    config = hqq.QTensorConfig(nbits=bits, channel_wise=True, group_size=size, optimize=True, round_zero=bits == 4)
    with _silent():
        found = core.HQQTensorHandle.quantize(weight, config)
    scale, zero = found.scale.half(), found.zero.half()
    if not bool(scale.isfinite().all() & zero.isfinite().all()):
        raise BadOption(
            "inc: a group of this weight is so narrow, and so far from zero, that its zero point does not fit float16: "
            "skip it, or take method=rtn"
        )
    # made under inference_mode, such tensors could not be changed in place
    tensors = {"qweight": found.val, "scale": scale, "zero": zero}
    return {n: t.to(weight.device).clone() for n, t in tensors.items()}


def taken_over(module: nn.Module, inc: Callable[..., Any]) -> PackedLinear:
    """Return the packed layer of a layer that INC quantized.

    Args:
        inc: the class of the quantizer.

    Raises:
        UnsupportedOperation: its codes are in a layout, or it computes in a way, that qft does not have.
    """
    names = {c.__name__ for c in type(module).__mro__}
    if "PatchedModuleBase" in names:
        return _float8(module, inc)
    if "MulLinear" in names:
        layer = taken_over(module.linear, inc) if type(module.linear) is not nn.Linear else None
        if layer is None or layer.quantizer.method not in ("rtn",):
            raise _refused(module, "its inner layer is not quantized to integers")
        packed = {**layer.packed, "input_scale": module.input_scale.detach().float()}
        quantizer = inc("awq", layer.quantizer.bits, layer.quantizer.group_size, layer.quantizer.symmetric)
        return _layer(quantizer, packed, layer.out_features, layer.in_features, layer.dtype, layer.bias)
    if "HQQLinear" in names:
        return _hqq(module, inc)
    if "INCWeightOnlyLinear" not in names:
        raise _refused(module, "its codes are in the layout of a Gaudi kernel")
    return _weight_only(module, inc)


def _refused(module: nn.Module, why: str) -> UnsupportedOperation:
    return UnsupportedOperation(
        f"a {type(module).__name__} of this INC model cannot be trained over, since {why}: quantize the float model with "
        "qft, or with INC on a CPU"
    )


def _layer(quantizer: Any, packed: Any, rows: int, columns: int, dtype: torch.dtype, bias: Tensor | None) -> Any:
    # tensors that were made under inference_mode cannot be changed in place
    packed = {n: t.detach().clone() if t.is_inference() else t.detach() for n, t in packed.items()}
    return PackedLinear(quantizer, packed, (rows, columns), dtype, bias)


def _weight_only(module: Any, inc: Callable[..., Any]) -> PackedLinear:
    rows, columns, bits = module.out_features, module.in_features, module.bits
    size = -1 if module.group_size >= columns else module.group_size
    if module.enable_w4a8 or bool((module.scale_bf16_to_fp8 != 0).any()):
        raise _refused(module, "it rounds to float8 on top of its integers (w4a8)")
    owner = module.g_idx
    if owner is not None:
        owner = owner.to(torch.int32)
        natural = torch.arange(columns, device=owner.device, dtype=torch.int32) // module.group_size
        owner = None if torch.equal(owner, natural) else owner  # `recover` leaves one behind
    scales = module.scales.detach()
    more = {} if owner is None else {"g_idx": owner}
    if module.dtype == "nf4":
        if module.compression_dim != 1 or module.qweight.dtype != torch.int32 or owner is not None:
            raise _refused(module, "its NF4 codes are in no int32 words along the inputs")
        quantizer = inc("nf4", group_size=size)
        packed = {"qweight": module.qweight, "scales": scales}
    elif "int" not in module.dtype:
        raise _refused(module, f"qft has no {module.dtype} of INC's kind")
    elif module.use_optimum_format:
        quantizer = inc("rtn", bits, size, act_order=owner is not None)
        packed = {"qweight": module.qweight, "qzeros": module.qzeros, "scales": scales, **more}
    else:  # INC's other layouts: its own unpacking knows them
        if owner is not None:
            raise _refused(module, "its g_idx holds columns, not groups")
        with _silent():
            found = module.unpack()
        codes, zero, middle = found["int_weight"].to(torch.int32), found["zp"], 2 ** (bits - 1)
        if zero is None:
            codes, zero = codes + middle, torch.full_like(scales, middle)
        quantizer = inc("rtn", bits, size)
        packed = {**packed_integers(codes, zero, bits), "scales": scales.T.contiguous()}
    dtype = module.bias.dtype if module.bias is not None else torch.float32
    layer = _layer(quantizer, packed, rows, columns, dtype, _bias(module))
    if quantizer.method == "rtn":
        field = sum((2 ** (bits - 1) - 1) << bits * i for i in range(32 // bits))
        zeros = layer.packed["qzeros"]
        whole = zeros[:, : rows // (32 // bits)]
        symmetric = bool((whole == (field - 2**32 if field >= 2**31 else field)).all())
        layer.quantizer = inc("rtn", bits, size, symmetric, quantizer.act_order)
    return layer


def _bias(module: Any) -> Tensor | None:
    """None for zeros, which INC stores for layers without a bias."""
    bias = module.bias
    return bias.detach() if bias is not None and bool(bias.any()) else None


def _hqq(module: Any, inc: Callable[..., Any]) -> PackedLinear:
    codes = module.q_weight
    meta = codes.meta_info
    if not meta.packing or meta.axis != 0:
        raise _refused(module, "its HQQ codes are not packed along the groups")

    def plain(value: Any) -> Tensor:  # constants that are quantized themselves: INC unpacks them in its first forward
        if isinstance(value, Tensor):
            return value
        inner = value.val.to(value.scale.dtype)
        groups = value.meta_info.group_size
        if value.meta_info.nbits != 8 or (groups is not None and inner.numel() % groups):
            raise _refused(module, "its constants have other than 8 bits")
        return ((inner - value.zero) * value.scale).reshape(tuple(value.meta_info.shape))

    rows, columns = meta.shape
    quantizer = inc("hqq", meta.nbits, -1 if meta.group_size is None else meta.group_size)
    packed = {"qweight": codes.val, "scale": plain(codes.scale), "zero": plain(codes.zero)}
    dtype = module.bias.dtype if module.bias is not None else torch.float32
    return _layer(quantizer, packed, rows, columns, dtype, module.bias)


def _float8(module: Any, inc: Callable[..., Any]) -> PackedLinear:
    if type(module).__name__ != "PatchedLinear":
        raise _refused(module, "it computes in float8, and is no plain linear layer: keep it out with INC's blocklist")
    if module.weight.dtype != torch.float8_e4m3fn:
        raise UnsupportedOperation(
            f"a {type(module).__name__} of this model is still being measured by INC, or has weights of "
            f"{module.weight.dtype}: call finalize_calibration and convert first, with float8_e4m3fn"
        )
    if not module.use_qdq:
        raise _refused(
            module, "its kernel multiplies in float8, and INC gives no scales to undo that: use_qdq=True does"
        )
    if module.is_dynamic_quantization:
        raise _refused(module, "it finds the scale of its inputs anew at each step")
    device = module.weight.device
    scale = torch.as_tensor(module.dequant_weights.scale, dtype=torch.float32, device=device)
    inputs = torch.as_tensor(module.quant_input.scale, dtype=torch.float32, device=device)
    if inputs.numel() > 1 or scale.numel() not in (1, module.weight.shape[1]):
        raise _refused(module, "its scales are neither one a tensor nor one an output")
    scale = scale.reshape(()) if scale.numel() == 1 else scale.reshape(-1, 1)
    packed = {
        "qweight": module.weight.detach().T.contiguous(),
        "weight_scale": scale,
        "input_scale": inputs.reshape(()),
    }
    columns, rows = module.weight.shape
    return _layer(inc("fp8"), packed, rows, columns, module.dequant_weights.hp_dtype, module.bias)

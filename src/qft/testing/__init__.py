"""The conformance kit: what every quantizer must keep, checked on small layers and a small model.

>>> import qft
>>> qft.testing.check_quantizer(qft.get_quantizer("nf4"))
"""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import LoraConfig
from torch import Tensor, nn

from qft.core import record
from qft.core.packed import dequantizer
from qft.core.quantizer import QuantizedWeight, Quantizer, float_weight
from qft.errors import BadShape, NonFiniteWeights, QftError, UnsupportedOperation
from qft.lora.merging.merge import merge, merge_to_float, unmerge
from qft.ops.linear import Update, lora_linear
from qft.pipeline.prepare import prepare_model_for_kbit_training
from qft.pipeline.quantize import quantize
from qft.pipeline.wrap import wrap
from qft.saving.load import load
from qft.saving.save import save
from qft.testing.hostile_weights import Hostile, hostile_updates, hostile_weights

SHAPES = ((64, 128), (192, 64), (33, 256), (40, 96))
"""(out_features, in_features) of the layers that the checks go through; one number of rows is odd, and one width no
multiple of 64, on purpose."""


class ConformanceError(AssertionError):
    """A quantizer does not keep the interface; the message lists every check that failed."""


@dataclass
class Conformance:
    """The outcome: checks that passed, and those that the capabilities rule out."""

    passed: list[str] = field(default_factory=list)
    ruled_out: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = f"{len(self.passed)} checks passed: {', '.join(self.passed)}"
        return text + (f"; ruled out by its capabilities: {', '.join(self.ruled_out)}" if self.ruled_out else "")


def check_quantizer(
    quantizer: Quantizer,
    *,
    device: str | torch.device = "cpu",
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16),
    max_error: float | None = None,
) -> Conformance:
    """Check that a quantizer keeps the interface, and that no capability flag lies.

    One that claims `float_zero_points` must shift whole groups of a weight exactly, and restore it to the bit; one that
    does not must refuse to.

    Args:
        quantizer: any `Quantizer` object.
        device: where to quantize and run.
        dtypes: of the float weights.
        max_error: bound on ‖W − Ŵ‖ / ‖W‖ for normal weights; default 3.5 · 2**-bits.

    Returns:
        What was checked.

    Raises:
        ConformanceError: at least one check failed; the message lists them all.
    """
    device = torch.device(device)
    run = _Run(quantizer, device, dtypes, max_error or 3.5 * 2.0**-quantizer.capabilities.bits)
    result, failed = Conformance(), []
    for name, check in run.checks():
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                ruled_out = check()
            (result.ruled_out if ruled_out else result.passed).append(name)
        except (AssertionError, QftError, RuntimeError, TypeError, ValueError, AttributeError, KeyError) as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else ""
            failed.append(f"{name}: {type(error).__name__}: {first}")
    if failed:
        lines = "\n  ".join(failed)
        raise ConformanceError(f"{quantizer!r} on {device} fails {len(failed)} of its checks:\n  {lines}")
    return result


@dataclass
class _Run:
    quantizer: Quantizer
    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    max_error: float

    def checks(self) -> Iterator[tuple[str, Callable[[], bool | None]]]:
        for method in (
            self.options_round_trip,
            self.handle_describes_the_layer,
            self.dequantize_is_close,
            self.dequantize_takes_dtype_and_out,
            self.conv1d_is_transposed,
            self.forward_matches,
            self.requantize_is_honest,
            self.restore_is_bit_exact,
            self.shift_is_honest,
            self.recognised,
            self.copies_and_casts_keep_the_weight,
            self.nbytes_is_true,
            self.gradients_match_float64,
            self.hostile_weights_are_right_or_refused,
            self.hostile_updates_are_merged_or_refused,
            self.model_trains_and_merges,
            self.model_saves_and_loads,
        ):
            yield method.__name__, method

    # ---- helpers -----------------------------------------------------------------------------------------

    def layers(self) -> Iterator[tuple[nn.Module, nn.Module, QuantizedWeight, Quantizer]]:
        """Float layer, quantized layer, handle, and the quantizer with its open options settled."""
        generator = torch.Generator().manual_seed(0)
        shapes = [shape for shape in SHAPES if self._holds(shape)]
        assert len(shapes) >= 2, f"resolve() refuses all but {len(shapes)} of the shapes {SHAPES}"
        for dtype in self.dtypes:
            for i, (rows, columns) in enumerate(shapes):
                layer = nn.Linear(columns, rows, bias=i % 2 == 0)
                layer.weight.data = torch.randn(rows, columns, generator=generator) * 0.05
                yield self.quantized(layer.to(self.device, dtype).requires_grad_(False))

    def _holds(self, shape: tuple[int, int]) -> bool:
        """Whether the format takes odd shapes: some layouts hold whole words only, and say so."""
        try:
            self.quantizer.resolve([("layer", shape)])
        except BadShape:
            return False
        return True

    def quantize(self, model: nn.Module, inputs: int = 64, dtype: torch.dtype | None = None) -> nn.Module:
        """A sequential model, quantized over normal data where that is needed."""
        data = torch.randn(512, inputs, generator=torch.Generator().manual_seed(5)).to(self.device, dtype)
        needs = self.quantizer.capabilities.needs_calibration
        return quantize(model, self.quantizer, calibration=[{"input": data}] if needs else None, progress=False)

    def quantized(self, layer: nn.Module) -> tuple[nn.Module, nn.Module, QuantizedWeight, Quantizer]:
        q = self.quantizer.resolve([("layer", tuple(float_weight(layer).shape))]).on_device(self.device)
        new = q.quantize_layer(layer)
        handles = q.weights(new)
        assert len(handles) == 1, f"weights() of a quantized linear gave {len(handles)} handles, not one"
        return layer, new, handles[0], q

    # ---- one layer ---------------------------------------------------------------------------------------

    def options_round_trip(self) -> None:
        q = self.quantizer
        options = json.loads(json.dumps(q.to_dict()))
        assert type(q).from_dict(options) == q, f"from_dict(to_dict()) is {type(q).from_dict(options)!r}"
        assert repr(q).startswith(type(q).__name__ + "("), "repr() is not the constructor call"
        hash(q)

    def handle_describes_the_layer(self) -> None:
        for layer, new, handle, q in self.layers():
            assert handle.module is new, "the handle's module is not the layer"
            assert tuple(handle.shape) == tuple(layer.weight.shape), f"shape {handle.shape}"
            assert handle.dtype == layer.weight.dtype, f"dtype {handle.dtype}, of a {layer.weight.dtype} layer"
            assert (handle.kind, handle.transposed) == ("linear", False), f"kind {handle.kind}"
            same_bias = (
                layer.bias is None
                if handle.bias is None
                else layer.bias is not None and torch.equal(handle.bias.float(), layer.bias.float())
            )
            assert same_bias, "the bias was not kept"
            assert not q.weights(nn.Linear(4, 4)), "weights() claims a float linear"
            trainable = [n for n, p in new.named_parameters() if p.requires_grad]
            assert not trainable, f"{trainable} require grad: quantized parameters are frozen"

    def dequantize_is_close(self) -> None:
        for layer, _, handle, q in self.layers():
            w, w_hat = layer.weight.float(), q.dequantize(handle, dtype=torch.float32)
            assert w_hat.shape == w.shape, f"shape {tuple(w_hat.shape)} of a {tuple(w.shape)} weight"
            assert w_hat.device == w.device, f"dequantized on {w_hat.device}"
            error = _relative(w_hat, w)
            assert error <= self.max_error, f"‖W − Ŵ‖ / ‖W‖ = {error:.3f}, above {self.max_error:.3f}"
            assert torch.equal(w_hat, q.dequantize(handle, dtype=torch.float32)), "two calls differ"

    def dequantize_takes_dtype_and_out(self) -> None:
        for layer, _, handle, q in self.layers():
            exact = q.dequantize(handle, dtype=torch.float32)
            assert q.dequantize(handle).dtype == layer.weight.dtype, "the default dtype is not the float layer's"
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                value = q.dequantize(handle, dtype=dtype)
                assert value.dtype == dtype, f"asked for {dtype}, got {value.dtype}"
                assert _relative(value, exact) <= 2 * torch.finfo(dtype).eps, f"{dtype} differs from float32"
                out = torch.full_like(value, float("nan"))
                back = q.dequantize(handle, out=out)
                assert torch.equal(out, value) and back.data_ptr() == out.data_ptr(), "out= was not filled"

    def conv1d_is_transposed(self) -> None:
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(1)
        _, _, handle, q = self.quantized(Conv1D(128, 64).to(self.device).requires_grad_(False))
        assert (handle.kind, handle.transposed, tuple(handle.shape)) == ("conv1d", True, (128, 64)), str(handle)
        x = torch.randn(5, 64, device=self.device)
        y = lora_linear(x, dequantizer(q, handle), handle.bias)
        assert _relative(y, x @ q.dequantize(handle).T + handle.bias) < 1e-5, "the layer's product is not x Ŵᵀ + b"

    def forward_matches(self) -> bool | None:
        if not self.quantizer.capabilities.exact_forward:
            return True
        for layer, new, handle, q in self.layers():
            dtype = layer.weight.dtype
            eye = torch.eye(handle.shape[1], device=self.device, dtype=dtype)
            bias = 0 if handle.bias is None else handle.bias.float()
            with torch.no_grad():
                y = new.train()(eye).float() - bias
            w_hat = q.dequantize(handle, dtype=torch.float32)
            assert _relative(y.T, w_hat) <= 4 * torch.finfo(dtype).eps, (
                f"exact_forward is claimed, and the forward on the identity is {_relative(y.T, w_hat):.1e} off"
            )
        return None

    def requantize_is_honest(self) -> bool | None:
        for layer, _, handle, q in self.layers():
            w = layer.weight.float()
            if not q.capabilities.requantize:
                try:
                    q.requantize(handle, w)
                except UnsupportedOperation:
                    return True
                raise AssertionError("requantize works, and its capability says that it does not")
            fresh = _relative(q.dequantize(handle, dtype=torch.float32), w)
            generator = torch.Generator().manual_seed(2)
            other = (torch.randn(w.shape, generator=generator) * 0.2).to(w)
            q.requantize(handle, other)
            again = q.weights(handle.module)[0]
            error = _relative(q.dequantize(again, dtype=torch.float32), other)
            assert error <= 1.25 * fresh + 1e-3, f"error {error:.3f} after requantize, {fresh:.3f} when fresh"
            assert again.dtype == handle.dtype, "requantize changed the dtype"
        return None

    def restore_is_bit_exact(self) -> bool | None:
        if not self.quantizer.capabilities.requantize:
            return True
        for layer, new, handle, q in self.layers():
            before = {k: v.clone() for k, v in new.state_dict().items()}
            value = q.dequantize(handle, dtype=torch.float32)
            saved = q.snapshot(handle)
            q.requantize(handle, layer.weight.float() * -3 + 1)
            q.restore(q.weights(new)[0], saved)
            after = new.state_dict()
            changed = [k for k in before if not _same_bits(before[k], after[k])]
            assert not changed and before.keys() == after.keys(), f"{changed} differ after restore"
            assert torch.equal(q.dequantize(q.weights(new)[0], dtype=torch.float32), value), "Ŵ differs after restore"
        return None

    def shift_is_honest(self) -> None:
        tried = 0
        for layer, new, handle, q in self.layers():
            size = q.group_size_of(handle)
            if size is None or not q.capabilities.float_zero_points:
                assert size is None, "group_size_of() gives a size, and float_zero_points is not claimed"
                try:
                    q.shift(handle, torch.zeros(handle.shape[0], 1, device=self.device))
                except UnsupportedOperation:
                    continue
                raise AssertionError("shift works, and group_size_of() or the capability says that it does not")
            tried += 1
            rows, columns = handle.shape
            assert type(size) is int and columns % size == 0, f"groups of {size} in a row of {columns}"
            before = {k: v.clone() for k, v in new.state_dict().items()}
            value = q.dequantize(handle, dtype=torch.float32)
            generator = torch.Generator().manual_seed(5)
            delta = (torch.randn(rows, columns // size, generator=generator) * 0.02).to(self.device)
            wanted = value.double() + delta.double().repeat_interleave(size, dim=1)
            saved = q.snapshot(handle)
            q.shift(handle, delta)
            again = q.weights(new)[0]
            shifted = q.dequantize(again, dtype=torch.float32)
            error = _relative(shifted, wanted)
            assert error <= 1e-6, f"float_zero_points is claimed, and a shift of whole groups is {error:.1e} off"
            assert again.dtype == handle.dtype == layer.weight.dtype, "shift changed the dtype"
            twin = copy.deepcopy(new).to(torch.float16).to(torch.bfloat16)
            assert torch.equal(q.dequantize(q.weights(twin)[0], dtype=torch.float32), shifted), (
                "a cast undoes the shift"
            )
            state = {k: v.clone() for k, v in new.state_dict().items()}
            q.restore(again, saved)
            after = new.state_dict()
            changed = [k for k in before if not _same_bits(before[k], after[k])]
            assert not changed and before.keys() == after.keys(), f"{changed} differ after restore from a shift"
            q.load_state(q.weights(new)[0], state)
            back = q.dequantize(q.weights(new)[0], dtype=torch.float32)
            assert torch.equal(back, shifted), "load_state does not bring a shifted weight back"
            q.requantize(q.weights(new)[0], layer.weight.float())
            changed = [k for k, v in new.state_dict().items() if v.dtype != before[k].dtype]
            assert not changed, f"{changed} keep the dtype of a shift after requantize"
        claims = self.quantizer.capabilities.float_zero_points
        assert tried or not claims, "float_zero_points is claimed, and group_size_of() is None for every layer"

    def recognised(self) -> None:
        for _, new, _, q in self.layers():
            found = type(q).recognise(new)
            assert found == q, f"recognise() reads {found!r} off a layer of {q!r}"
            assert type(q).recognise(nn.Linear(4, 4)) is None, "recognise() claims a float linear"

    def copies_and_casts_keep_the_weight(self) -> None:
        for _, new, handle, q in self.layers():
            value = q.dequantize(handle, dtype=torch.float32)
            twin = copy.deepcopy(new)
            assert torch.equal(q.dequantize(q.weights(twin)[0], dtype=torch.float32), value), "a deep copy differs"
            for dtype in (torch.float16, torch.bfloat16, torch.float32):
                twin.to(dtype)
            assert torch.equal(q.dequantize(q.weights(twin)[0], dtype=torch.float32), value), "casts changed Ŵ"

    def nbytes_is_true(self) -> None:
        from qft.pipeline.audit.measure import layer_bytes

        for layer, new, handle, q in self.layers():
            if layer.weight.dtype == torch.float32:
                continue
            found, said = layer_bytes(new), q.nbytes(handle.shape)
            assert abs(found - said) <= 16 + 0.01 * found, f"nbytes() says {said}, the layer has {found}"

    def gradients_match_float64(self) -> None:
        for layer, _, handle, q in self.layers():
            if layer.weight.dtype != torch.float32:
                continue
            generator = torch.Generator().manual_seed(3)

            def draw(*shape: int, generator: torch.Generator = generator) -> Tensor:
                return torch.randn(*shape, generator=generator).to(self.device).requires_grad_(True)

            rows, columns = handle.shape
            x, a, b = draw(2, 5, columns), draw(4, columns), draw(rows, 4)
            lora_linear(x, dequantizer(q, handle), handle.bias, [Update(a, b, 0.5)]).square().sum().backward()
            exact = [t.detach().double().requires_grad_(True) for t in (x, a, b)]
            w = q.dequantize(handle, dtype=torch.float32).double()
            bias = 0 if handle.bias is None else handle.bias.double()
            y = exact[0] @ w.T + bias + 0.5 * (exact[0] @ exact[1].T @ exact[2].T)
            y.square().sum().backward()
            for name, mine, theirs in zip("xAB", (x, a, b), exact, strict=True):
                error = _relative(mine.grad, theirs.grad)
                assert error < 1e-4, f"the gradient of {name} is {error:.1e} off"

    # ---- hostile weights ---------------------------------------------------------------------------------

    def hostile_weights_are_right_or_refused(self) -> None:
        refused = []
        for i, case in enumerate(hostile_weights()):
            for dtype in dict.fromkeys((self.dtypes[0], self.dtypes[i % len(self.dtypes)])):
                weight = case.weight.to(self.device, dtype)
                if not weight.isfinite().all():
                    continue
                layer = nn.Linear(weight.shape[1], weight.shape[0], device=self.device, dtype=dtype)
                layer.weight = nn.Parameter(weight, requires_grad=False)
                model = nn.Sequential(layer)
                try:
                    self.quantize(model, weight.shape[1], dtype)
                except QftError as error:
                    assert model[0] is layer and layer.weight is not None, (
                        f"{case.name}: {error}; the layer was changed"
                    )
                    refused.append(case.name)
                    continue
                self._check_hostile(case, model[0], weight)
        told = [name for name in refused if "row of zeros" in name or "storage" in name]
        assert not told, f"refused: {', '.join(told)}"

    def _check_hostile(self, case: Hostile, new: nn.Module, weight: Tensor) -> None:
        q = new._qft_quantizer
        (handle,) = q.weights(new)
        w, w_hat = weight.double(), q.dequantize(handle, dtype=torch.float32)
        assert w_hat.isfinite().all(), f"{case.name} ({weight.dtype}): Ŵ holds NaN or infinity"
        error, norm = float((w_hat.double() - w).norm()), float(w.norm())
        usual = (
            1.25 if q.capabilities.bits >= 2 else 1.4
        )  # below two bits, rows of zeros weigh on the scale of the others
        bound = usual * self.max_error if case.as_usual else max(1.02, self.max_error)
        assert error <= bound * norm + 1e-12, f"{case.name} ({weight.dtype}): ‖W − Ŵ‖ / ‖W‖ = {error / norm:.3f}"
        if q.capabilities.exact_forward:
            # small enough for outputs in float16, large enough for those of denormal weights not to matter
            x = (torch.randn(9, weight.shape[1], generator=torch.Generator().manual_seed(6)) / 16).to(weight)
            with torch.no_grad():
                y = new.train()(x).double()
            bias = 0 if handle.bias is None else handle.bias.double()
            exact, terms = x.double() @ w_hat.double().T + bias, x.double().abs() @ w_hat.double().abs().T + abs(bias)
            slack = 8 * torch.finfo(weight.dtype).eps * float(terms.norm())
            assert float((y - exact).norm()) <= slack, f"{case.name} ({weight.dtype}): the forward is not x Ŵᵀ + b"
        if q.capabilities.requantize:
            before = {k: v.clone() for k, v in new.state_dict().items()}
            saved = q.snapshot(handle)
            q.requantize(handle, weight.float())
            again = q.dequantize(q.weights(new)[0], dtype=torch.float32)
            assert again.isfinite().all(), f"{case.name} ({weight.dtype}): requantize makes NaN or infinity"
            q.restore(q.weights(new)[0], saved)
            changed = [k for k, v in new.state_dict().items() if not _same_bits(v, before[k])]
            assert not changed, f"{case.name}: {changed} differ after restore"

    def hostile_updates_are_merged_or_refused(self) -> bool | None:
        if not self.quantizer.capabilities.merge_to_quantized:
            return True
        torch.manual_seed(7)
        base = nn.Sequential(nn.Linear(64, 64)).to(self.device)
        self.quantize(base)
        model = wrap(base, LoraConfig(r=1, lora_alpha=1, target_modules="all-linear")).eval()
        layer, x = record.base_model(model)[0], torch.randn(9, 64, device=self.device)
        weight = layer.quantizer.dequantize(layer.handle, dtype=torch.float32)
        for name, b, a in hostile_updates(weight):
            with torch.no_grad():
                layer.lora_A["default"].weight.copy_(a)
                layer.lora_B["default"].weight.copy_(b)
                before, y = {k: v.clone() for k, v in model.state_dict().items()}, model(x)
                assert _relative(y, x @ (weight + b @ a).T + layer.handle.bias) < 1e-5, f"{name}: the outputs are wrong"
                with suppress(NonFiniteWeights):  # beyond what the format holds
                    merge(model)
                merged = layer.quantizer.dequantize(layer.handle, dtype=torch.float32)
                assert merged.isfinite().all() and model(x).isfinite().all(), f"{name}: merged to NaN or infinity"
                unmerge(model)
                changed = [k for k, v in model.state_dict().items() if not _same_bits(v, before[k])]
                assert not changed, f"{name}: {changed} differ after unmerge, or after a refused merge"
        return None

    # ---- a small model -----------------------------------------------------------------------------------

    @contextmanager
    def tuned(self) -> Iterator[tuple[nn.Module, Tensor]]:
        """A small model, quantized, wrapped, and trained for a few steps; and a batch."""
        torch.manual_seed(4)
        model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64, bias=False)).to(self.device)
        self.quantize(model)
        prepare_model_for_kbit_training(model)
        model = wrap(model, LoraConfig(r=4, lora_alpha=12, target_modules="all-linear"))
        x = torch.randn(16, 64, device=self.device)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        for _ in range(3):
            (model(x) - x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        yield model.eval(), x

    def model_trains_and_merges(self) -> bool | None:
        if not self.quantizer.capabilities.merge_to_float:
            return True
        with self.tuned() as (model, x), torch.no_grad():
            y = model(x)
            with model.disable_adapter():
                assert _relative(model(x), y) > 1e-6, "training did not move the adapter"
            error = _relative(merge_to_float(model, dtype=torch.float32)(x), y)
            assert error <= 1e-5, f"merge_to_float is {error:.1e} off the tuned model"
            if not self.quantizer.capabilities.merge_to_quantized:
                try:
                    merge(model)
                except UnsupportedOperation:
                    return None
                raise AssertionError("merge works, and its capability says that it does not")
            before = {k: v.clone() for k, v in model.state_dict().items()}
            merge(model)
            unmerge(model)
            changed = [k for k, v in model.state_dict().items() if not _same_bits(v, before[k])]
            assert not changed, f"{changed} differ after unmerge"
            assert torch.equal(model(x), y), "the outputs differ after unmerge"
        return None

    def model_saves_and_loads(self) -> bool | None:
        if not self.quantizer.capabilities.serializable:
            return True
        with self.tuned() as (model, x), tempfile.TemporaryDirectory() as folder, torch.no_grad():
            save(model, Path(folder) / "adapter")
            torch.manual_seed(4)
            base = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64, bias=False)).to(self.device)
            self.quantize(base)
            again = load(Path(folder) / "adapter", base)
            assert torch.equal(again(x), model(x)), "a loaded adapter over the same base gives other outputs"
            for name, layer in record.base_model(model).named_modules():
                handles = self.quantizer.weights(layer)
                if not handles:
                    continue
                state = {k: v.clone() for k, v in layer.state_dict().items()}
                twin = record.base_model(again).get_submodule(name)
                value = self.quantizer.dequantize(handles[0], dtype=torch.float32)
                if self.quantizer.capabilities.requantize:
                    self.quantizer.requantize(self.quantizer.weights(twin)[0], value * 2 + 1)
                self.quantizer.load_state(self.quantizer.weights(twin)[0], state)
                back = self.quantizer.dequantize(self.quantizer.weights(twin)[0], dtype=torch.float32)
                assert torch.equal(back, value), "load_state does not bring back what state_dict held"
        return None


def _bytes(tensor: Tensor) -> Tensor:
    """The bytes of a tensor, uint8 (n,); a view of one element may have any stride, which `view(dtype)` refuses."""
    return tensor.reshape(-1).clone(memory_format=torch.contiguous_format).view(torch.uint8)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    a, b = a.detach().cpu().contiguous(), b.detach().cpu().contiguous()
    return a.dtype == b.dtype and a.shape == b.shape and bool((_bytes(a) == _bytes(b)).all())


def _relative(a: Tensor, b: Tensor) -> float:
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-300))

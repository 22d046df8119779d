"""How adapters are merged into one weight and taken out of it, over `dequantize`, `requantize`, `snapshot`, `restore`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor

from qft.core.kept import KeptParameter, give_back, give_own, keep
from qft.core.modes import normal_mode
from qft.core.quantizer import QuantizedWeight
from qft.errors import BadOption, NonFiniteWeights, UnsupportedOperation


@dataclass(frozen=True)
class WeightMerge:
    """What merging did to one weight.

    Attributes:
        survived: the share ⟨Δ′, Δ⟩ / ⟨Δ, Δ⟩ of the update Δ that the stored weight took over, Δ′ = Ŵ′ − Ŵ.
        relative_error: ‖Ŵ′ − (Ŵ + Δ)‖ / ‖Ŵ + Δ‖.
        update_norm: ‖Δ‖ / ‖Ŵ‖.
    """

    survived: float
    relative_error: float
    update_norm: float


def check_merged(layer: Any) -> None:
    """Refuse a forward pass over merged weights that would leave an active adapter out, or train a merged one.

    Raises:
        BadOption: an adapter is active and not merged, or the layer is in training mode with gradients, and one of its
            merged adapters is trainable.
    """
    refuse_left_out(layer)
    if not (layer.training and torch.is_grad_enabled()):
        return
    merged = set(layer.merged_adapters)
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad and merged.intersection(name.split(".")):
            raise BadOption(
                f"adapter {', '.join(layer.merged_adapters)} is merged into the weights, so training it would change nothing: "
                "call qft.unmerge(model) first, or model.eval() to use the merged model"
            )


def refuse_left_out(layer: Any) -> None:
    """Refuse to compute with a layer whose active adapters are merged in part: PEFT leaves the others out.

    Raises:
        BadOption: an adapter of this layer is active and not merged, while another one is merged.
    """
    if not layer.merged or layer.disable_adapters:
        return
    left = [name for name in layer.active_adapters if name not in layer.merged_adapters]
    if not left:
        return
    known = layer._get_available_adapters()
    left = [name for name in left if name in known]
    if left:
        raise BadOption(
            f"adapter {', '.join(left)} is active, and only {', '.join(layer.merged_adapters)} is merged, so the outputs would "
            "be without it: merge all active adapters, or call qft.unmerge(model) first"
        )


def residual_error(adapter: str, what: str) -> str:
    """Why an adapter cannot be taken away from a base that its init rewrote."""
    return (
        f"the init of adapter {adapter!r} put a part of the weights into the adapter, so the base without it is a residual and "
        f"not the quantized model: it cannot be {what}. For a reference model, quantize the original again without an init, "
        "or start with init='loftq' or 'qera', which leave the base alone"
    )


class Merging:
    """The merging half of the layers with adapters.

    Attributes:
        last_merge: what the last merge did.
        from_original: what is merged was merged over the original weight W, not over Ŵ.
        starts: adapter → (A, B) that its init put there, float32 on the host; None where that is not known; absent
            where B was 0, and where nobody told.
        rewritten_by: the adapter whose init rewrote the base weight, which is a residual without it.
        rewritten_scaling: the scaling of that adapter, with which the residual and its update make the weight.
    """

    last_merge: WeightMerge | None
    from_original: bool
    rewritten_by: str | None = None
    rewritten_scaling: float | None = None
    starts: dict[str, tuple[Tensor, Tensor] | None]
    _saved: tuple[Any, KeptParameter | None] | None

    def delta(self, name: str, like: Tensor, *, learnt: bool = False) -> Tensor:
        """`scaling * B @ A`, (out_features, in_features), in the dtype and on the device of `like`.

        Args:
            learnt: without what the adapter's init put there, scaling * B0 @ A0.

        Raises:
            UnsupportedOperation: `learnt`, and the start is not known.
        """
        a, b = self.lora_A[name].weight, self.lora_B[name].weight
        value = b.to(like) @ a.to(like)
        if learnt and name in self.starts:
            a0, b0 = self.known_start(name)
            value -= b0.to(like) @ a0.to(like)
        return self._expanded(name, value).mul_(self.scaling[name])

    def known_start(self, name: str) -> tuple[Tensor, Tensor]:
        """(A0, B0) of an adapter with a recorded start, as its parameters held them, in their dtype.

        Raises:
            UnsupportedOperation: it is recorded as not known.
        """
        start = self.starts[name]
        if start is None:
            raise UnsupportedOperation(
                f"where adapter {name!r} started is not known, so what it learnt cannot be added to the original weights: "
                "merge without original=, or the adapters that it was made from"
            )
        a, b = (t.to(m[name].weight) for t, m in zip(start, (self.lora_A, self.lora_B)))
        return a, b

    def merged_weight(self, adapter_names: list[str], weight: Tensor, *, learnt: bool = False) -> Tensor:
        """The weight and the updates of these adapters in one float weight, (out_features, in_features).

        Args:
            adapter_names: merged in this order, which matters where one of them is DoRA.
            weight: Ŵ in float32, or W with `learnt`; left as it is.
            learnt: add Δ − Δ0, Δ0 being what an adapter started from: it stands for W − Ŵ, which W does not lack.

        Raises:
            NonFiniteWeights: an adapter holds NaN or infinity.
            UnsupportedOperation: `learnt`, and a start is not known.
        """
        value = weight.clone()
        for name in adapter_names:
            delta = self.delta(name, weight, learnt=learnt)
            if name in self.lora_variant:  # DoRA, arXiv 2402.09353, equation 5
                magnitude = self.lora_magnitude_vector[name].weight.to(weight)
                value.add_(delta).mul_((magnitude / divisors(weight + delta))[:, None])
            else:
                value.add_(delta)
        if not value.isfinite().all():
            raise NonFiniteWeights(
                f"merging {', '.join(adapter_names)} gives NaN or infinity: the adapter is broken, nothing was merged"
            )
        return value

    def merged_bias(self, adapter_names: list[str]) -> Tensor | None:
        """The base bias with the adapters' own, or None without any."""
        bias = self.handle.bias
        for name in adapter_names:
            extra = self.lora_B[name].bias
            if extra is None:
                continue
            if bias is None:
                raise UnsupportedOperation(
                    "this adapter has a lora_bias and the layer has no bias to merge it into: a merged model would "
                    "have parameters that its config does not know"
                )
            bias = bias.detach() + (extra.detach() * self.scaling[name]).to(bias)
        if bias is not None and not bias.isfinite().all():
            raise NonFiniteWeights("an adapter's bias holds NaN or infinity: nothing was merged")
        return bias

    def mark_residual(self, adapter: str) -> None:
        """Note that the base weight is a residual without this adapter at the scaling that it has now."""
        self.rewritten_by, self.rewritten_scaling = adapter, _plain_number(self.scaling[adapter])

    def check_complete(self, active: Iterable[str], what: str = "switched off") -> None:
        """Check that the adapter whose init rewrote the base is among `active`, with the scaling that it started with.

        Raises:
            UnsupportedOperation: it is not, so that the outputs would be those of a residual.
        """
        needed = self.rewritten_by
        if needed is None:
            return
        if needed not in active:
            raise UnsupportedOperation(residual_error(needed, what))
        scaling = _plain_number(self.scaling[needed])
        if needed not in self.merged_adapters and None not in (scaling, self.rewritten_scaling):
            if scaling != self.rewritten_scaling:
                raise UnsupportedOperation(residual_error(needed, "scaled"))

    def check_merge(self, adapter_names: list[str]) -> None:
        """Raise what `merge` would raise, without changing anything."""
        self.check_complete([*self.merged_adapters, *adapter_names], "left out of a merge")
        if not self.quantizer.capabilities.merge_to_quantized:
            raise UnsupportedOperation(
                f"{self.quantizer!r} cannot take a merge (capability merge_to_quantized); qft.merge_to_float works"
            )
        if self.from_original and any(n not in self.merged_adapters for n in adapter_names):
            raise BadOption(
                f"{', '.join(self.merged_adapters)} was merged over the original weights, and nothing can be merged on top "
                "of that: call qft.unmerge(model), then merge all of them at once"
            )
        for name in adapter_names:
            tensors = [p for m in (self.lora_A, self.lora_B, self.lora_magnitude_vector) if name in m
                       for p in m[name].parameters()]  # fmt: skip
            if not all(t.isfinite().all() for t in tensors):
                raise NonFiniteWeights(f"adapter {name!r} holds NaN or infinity: nothing was merged")
        self.merged_bias(adapter_names)

    @normal_mode()
    def merge(
        self, safe_merge: bool = False, adapter_names: list[str] | None = None, *, original: Tensor | None = None
    ) -> None:
        """Merge adapters into the base weight, quantized as it is; `last_merge` says what survived.

        With `original`, W in float32, (out_features, in_features), what is stored is q(W + Δ − Δ0) instead of q(Ŵ + Δ).

        Adapters that are merged already are taken out and merged again with the new ones, from the unmerged weight,
        so that the weight is rounded once. Group-pooled adapters whose groups are whole groups of the quantizer are
        merged into its float zero points, exact to float32 rounding, where its capabilities say `exact_merge`.
        """
        names = [n for n in check_adapters_to_merge(self, adapter_names) if n in self.lora_A]
        if not names:
            return
        earlier = list(self.merged_adapters)
        if earlier:
            self.check_merge(names)
            if original is not None:
                raise BadOption("adapters are merged already: call qft.unmerge(model) before merging over the original")
        try:
            self._merge(earlier + names, original)
        except BaseException:
            self.unmerge()
            if earlier:
                self._merge(earlier)
            raise

    def _merge(self, names: list[str], original: Tensor | None = None) -> None:
        self.check_merge(names)
        if self._saved is not None:
            self._restore()
        handle = self.handle
        before = self.quantizer.dequantize(handle, dtype=torch.float32)
        wanted = tuned = self.merged_weight(names, before)
        if original is not None:
            wanted = self.merged_weight(names, original.to(before), learnt=True)
        bias = self.merged_bias(names)
        old_bias = handle.bias
        self._saved = (self.quantizer.snapshot(handle), None if old_bias is None else keep(old_bias))
        shift = None if original is not None else self._group_shift(names, handle)
        if shift is None:
            self._requantize(names, handle, wanted)
        else:
            self.quantizer.shift(handle, shift)
        if bias is not old_bias:
            give_own(handle.module, "bias", bias)
        self.merged_adapters[:] = names
        self.from_original = original is not None
        after = self.quantizer.dequantize(handle, dtype=torch.float32)
        if not after.isfinite().all():
            raise NonFiniteWeights(
                f"merging {', '.join(names)} goes beyond what {self.quantizer!r} can store: nothing was merged"
            )
        self.last_merge = compare_merge(before, tuned, after)

    def _requantize(self, names: list[str], handle: QuantizedWeight, wanted: Tensor) -> None:
        try:
            self.quantizer.requantize(handle, wanted)
        except BadOption as error:  # the format's own check of the range
            raise NonFiniteWeights(
                f"merging {', '.join(names)} goes beyond what {self.quantizer!r} can store: nothing was merged ({error})"
            ) from error

    def _group_shift(self, names: list[str], handle: QuantizedWeight) -> Tensor | None:
        """Return what these adapters add to each of the quantizer's groups.

        Returns:
            (out_features, groups) in float32; None where that is not one number for each group.
        """
        size = self.quantizer.group_size_of(handle) if self.quantizer.capabilities.exact_merge else None
        if size is None:
            return None
        pools = [self.qalora_group_size.get(n) for n in names]
        if any(pool is None or pool % size for pool in pools):
            return None
        return torch.stack([
            self._expanded(n, self.lora_B[n].weight.float() @ self.lora_A[n].weight.float())[:, ::size]
            * self.scaling[n] for n in names
        ]).sum(0)  # fmt: skip

    def unmerge(self) -> None:
        """Put the base weight back, to the bit."""
        if self._saved is not None:
            self._restore()
        self.merged_adapters.clear()
        self.from_original = False

    @normal_mode()
    def _restore(self) -> None:
        saved, bias = self._saved
        self.quantizer.restore(self.handle, saved)
        if bias is not None:
            give_back(self.handle.module, "bias", bias)
        self._saved = None

    def get_delta_weight(self, adapter: str) -> Tensor:
        """`scaling * B @ A`, (out_features, in_features), in the adapter's dtype; group-pooled ones expanded."""
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return (self._expanded(adapter, b.float() @ a.float()) * self.scaling[adapter]).to(b.dtype)


def _plain_number(scaling: Any) -> float | None:
    """A scaling as a number; None for a tensor, which PEFT makes of it for compiled hot swaps."""
    return None if isinstance(scaling, Tensor) else float(scaling)


def divisors(weight: Tensor) -> Tensor:
    """The norms of a weight's rows as DoRA divides by them: 1 for rows of zeros, which stay zero."""
    norms = torch.linalg.norm(weight, dim=1)
    return torch.where(norms > 0, norms, 1.0)


def compare_merge(before: Tensor, wanted: Tensor, after: Tensor) -> WeightMerge:
    """The figures of a merge from Ŵ, Ŵ + Δ and Ŵ′, all float32 of one shape, whatever Ŵ′ was made from."""
    delta, stored = wanted - before, after - before
    square = float((delta * delta).sum())
    norm = float(wanted.norm())
    return WeightMerge(
        survived=float((stored * delta).sum()) / square if square else 1.0,
        relative_error=float((after - wanted).norm()) / norm if norm else 0.0,
        update_norm=square**0.5 / float(before.norm()) if float(before.norm()) else 0.0,
    )

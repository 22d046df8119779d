"""A model's own forward, run with labels, whose loss comes from hidden states instead of logits.

The model's code runs as it is. Two things in it are stood in for: the head, which keeps its input and returns a probe of
nine numbers, and `loss_function`, which sees from what became of the probe how the model scales its logits and computes
the loss with `loss.linear_cross_entropy`. What else a model adds to its loss, such as that of its routers, stays.
Where a model's code does anything else with its logits, its own loss is computed, and a warning says why.
"""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qft.core.console import one_line
from qft.errors import QftWarning
from qft.ops.loss import IGNORE, PROBE, LogitScaling, Targets, linear_cross_entropy, shifted


class _Unfit(Exception):
    """The model does with its logits what only its own code can."""


class Patch:
    """A forward put on one instance of a module; a class, so that models with it can be copied and pickled."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.before = module.__dict__.get("forward")
        self.active = True
        self.told = False

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.original)

    @property
    def original(self) -> Any:
        """The forward without us, as a function of its arguments."""
        if self.before is not None:
            return self.before
        # not a bound method: after a break in a graph, the compiler finds one by its name, which is ours
        return functools.partial(type(self.module).forward, self.module)

    @property
    def is_traced(self) -> bool:
        """Whether the caller's own torch.compile traces this call of a model that trains, which goes around it."""
        return torch.compiler.is_compiling() and self.active and self.module.training and torch.is_grad_enabled()

    def put_on(self) -> None:
        self.module.__dict__["forward"] = self

    def take_off(self) -> None:
        """Give the module its forward back; where another wrapper was put on top since, pass everything through."""
        self.active = False
        if self.module.__dict__.get("forward") is self:
            del self.module.__dict__["forward"]
            if self.before is not None:
                self.module.__dict__["forward"] = self.before


@torch.compiler.disable
def outside_compiler(patch: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a patch outside of the caller's torch.compile, and warn once that the latter is not needed."""
    if not patch.told:
        patch.told = True
        warnings.warn(
            f"qft.optimize_training compiles the blocks of {type(patch.module).__name__} itself, recomputation included: "
            "torch.compile around it is superfluous in training, and left out",
            QftWarning,
            stacklevel=2,
        )
    return patch(*args, **kwargs)


class HeadlessForward(Patch):
    """Put on a causal language model: its loss without logits while it trains, its own forward otherwise.

    `logits` of the output are None where the loss came from here.
    """

    def __init__(self, model: nn.Module, kernel: str = "auto"):
        super().__init__(model)
        self.kernel = kernel
        self.unfit: str | None = None
        self._seen: tuple[Tensor, LogitScaling] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.is_traced:
            return outside_compiler(self, args, kwargs)
        labels = kwargs.get("labels")
        if labels is None or self.unfit is not None or not self._wanted(kwargs):
            return self.original(*args, **kwargs)
        head = _plain_head(self.module)
        if head is None:
            return self.original(*args, **kwargs)
        step = _Step(self, head, kwargs)
        try:
            with step.stand_in():
                output = self.original(*args, **kwargs)
            if not step.done:
                raise _Unfit("its forward does not call its loss_function")
            return _without_logits(output)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # what comes before the head, or from the loss itself, is an error of the call and not of our stand-ins
            if not isinstance(error, _Unfit) and (not step.seen_head or step.done or step.computing):
                raise
            self.unfit = one_line(error)
        warnings.warn(
            f"{type(self.module).__name__} computes its own loss, with the logits of all tokens: {self.unfit}",
            QftWarning,
            stacklevel=2,
        )
        return self.original(*args, **kwargs)

    def _wanted(self, kwargs: dict[str, Any]) -> bool:
        module = self.module
        keep = kwargs.get("logits_to_keep", 0)
        return (
            self.active
            and module.training
            and torch.is_grad_enabled()
            and not torch.compiler.is_compiling()
            and not kwargs.get("fused_lm_head")  # TRL's own, where it wrapped the forward before us
            and (keep is None or (isinstance(keep, int) and keep == 0))
            and kwargs.get("return_dict", getattr(module.config, "return_dict", True)) is not False
            and _plain_loss(module)
        )

    def scaling(self, values: Tensor) -> LogitScaling:
        if self._seen is None or not torch.equal(self._seen[0], values):
            found = None if values.shape != PROBE.shape or values.device.type != "cpu" else LogitScaling.fit(values)
            if found is None:
                raise _Unfit("what it does to its logits is neither a scale nor a soft cap")
            self._seen = (values.clone(), found)
        return self._seen[1]


class _Step:
    """One forward: what the head was given, and the loss from it."""

    def __init__(self, forward: HeadlessForward, head: nn.Linear, kwargs: dict[str, Any]):
        self.forward, self.head = forward, head
        self.hidden: Tensor | None = None
        self.seen_head = self.computing = self.done = False
        # how many labels count is asked before the forward, and read behind it: the host does not wait for the device
        self.labels, self.shift = kwargs["labels"], kwargs.get("shift_labels")
        device = head.weight.device
        first = shifted(self.labels) if self.shift is None else self.shift
        self.targets = Targets.of(first.to(device))

    @contextmanager
    def stand_in(self) -> Iterator[None]:
        model, head = self.forward.module, self.head
        had_loss = "_loss_function" in model.__dict__
        loss = model.__dict__.get("_loss_function")
        head.__dict__["forward"] = self.take
        model.__dict__["_loss_function"] = self.loss
        try:
            yield
        finally:
            del head.__dict__["forward"]
            if had_loss:
                model.__dict__["_loss_function"] = loss
            else:
                del model.__dict__["_loss_function"]

    def take(self, hidden: Tensor) -> Tensor:
        if self.seen_head:
            raise _Unfit("it runs its head more than once")
        self.seen_head, self.hidden = True, hidden
        return PROBE.clone()

    def loss(
        self,
        logits: Tensor,
        labels: Tensor,
        vocab_size: int | None = None,
        num_items_in_batch: Tensor | float | None = None,
        ignore_index: int = IGNORE,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if self.hidden is None:
            raise _Unfit("its loss does not come from its output embeddings")
        scaling = self.forward.scaling(logits)
        hidden, weight = self.hidden, self.head.weight
        if vocab_size != weight.shape[0]:
            raise _Unfit(f"its head has {weight.shape[0]} rows for a vocabulary of {vocab_size}")
        targets = self.targets
        if labels is not self.labels or shift_labels is not self.shift or ignore_index != IGNORE:
            values = shifted(labels, ignore_index) if shift_labels is None else shift_labels
            targets = Targets.of(values.to(hidden.device), ignore_index)
        if targets.values.numel() != hidden.shape[:-1].numel():
            raise _Unfit(f"it has {targets.values.numel()} labels for {hidden.shape[:-1].numel()} hidden states")
        self.hidden, self.computing = None, True
        value = linear_cross_entropy(
            hidden,
            weight,
            targets,
            bias=self.head.bias,
            scaling=scaling,
            num_items=num_items_in_batch,
            kernel=self.forward.kernel,
        )
        self.computing, self.done = False, True
        return value


def _plain_head(model: nn.Module) -> nn.Linear | None:
    """The output head where it is a frozen float linear that nothing else has its hands on, else None."""
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear or "forward" in head.__dict__:
        return None
    if head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks:
        return None
    for parameter in (head.weight, head.bias):
        if parameter is None:
            continue
        # sharded weights (DTensor, ZeRO's placeholders) are whole only inside the head's own call
        if parameter.requires_grad or type(parameter) is not nn.Parameter or hasattr(parameter, "ds_id"):
            return None
        if not parameter.is_floating_point() or parameter.device.type == "meta":
            return None
    return head


def _plain_loss(model: nn.Module) -> bool:
    from transformers.loss.loss_utils import ForCausalLMLoss

    return getattr(model, "loss_function", None) is ForCausalLMLoss


def why_not(model: nn.Module) -> str | None:
    """Why the loss of this model cannot come from hidden states, or None where it can as far as one sees from outside."""
    if not callable(getattr(model, "get_output_embeddings", None)) or not hasattr(type(model), "loss_function"):
        return "it is no language model of transformers"
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError, TypeError):
        head = None
    if head is None:
        return "it has no output embeddings"
    if not _plain_loss(model):
        return "its loss is not the next-token loss"
    if _plain_head(model) is None:
        weight = getattr(head, "weight", None)
        if isinstance(weight, Tensor) and weight.requires_grad:
            return "its head is trained"
        return "its head is not a plain linear layer"
    return None


def _without_logits(output: Any) -> Any:
    fields = {k: v for k, v in output.items() if k != "logits"}
    return type(output)(**fields)

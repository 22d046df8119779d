"""What goes into each layer while a model reads calibration data: one pass, block by block, for every consumer.

The batches are run in step: each is stopped at the door of every block until all of them have arrived there, so that
only one block has to be on the device, and the layers of a block may be replaced once all batches are through it.
Nothing is assumed about how a model calls its blocks: each batch runs the model's own forward, in a thread of its own,
and only one of the threads runs at a time.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map, tree_map_only

from qft.core.console import one_line
from qft.data.calibration import Batch, call
from qft.data.statistics import Accumulator, Statistics, StatisticsKind, running, watch
from qft.errors import BadOption, QftError

LOOPED = "the statistics of a block are taken in one go, and would miss what it reads later"


@dataclass
class Group:
    """Layers whose statistics are ready, and whose block no batch has to pass any more.

    Attributes:
        names: of the layers.
        statistics: of those that read a token.
        broken: layers that read none because all rows held NaN or infinity → how many these were.
    """

    names: list[str]
    statistics: dict[str, Statistics]
    broken: dict[str, int] = field(default_factory=dict)


def collect(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Batch],
    kinds: StatisticsKind | Mapping[str, StatisticsKind],
    *,
    through: Literal["old", "new"] = "old",
    device: torch.device | None = None,
    progress: bool = False,
) -> Iterator[Group]:
    """Run `model` over `batches` and give the statistics of the named layers, block by block.

    Between two groups the caller may replace the layers of those that it was given. A caller that may stop early closes
    the generator (`contextlib.closing`): that ends the passes and takes the hooks off.

    Args:
        names: of the layers to watch; each is in one group, those that no batch came through in the last.
        batches: what `calibration.batches` returned.
        kinds: what to gather, for all layers or by name.
        through: what goes on into the next block was computed with the "old" layers of this one, or with those that the
            caller put there, the "new" ones, which takes each block twice.
        device: move each block there when its turn comes, and everything outside the blocks at the start. None runs
            the model where it is. Where nothing was given yet and an error comes, what was moved goes back.
        progress: show a bar on stderr.

    Raises:
        BadOption: the model cannot run on these batches, or comes back to a block after it was in another.
    """
    if not names:
        return
    layers = {name: model.get_submodule(name) for name in names}
    blocks = _blocks(model, layers.values())
    owner = {id(m): i for i, block in enumerate(blocks) for m in block.modules()}
    members: dict[int, list[str]] = {}
    for name, layer in layers.items():
        members.setdefault(owner.get(id(layer), -1), []).append(name)
    watched = set(members)
    logits = _reads_logits(model, layers.values())
    sums = {n: Accumulator(kinds if isinstance(kinds, str) else kinds[n]) for n in layers}
    training = {n for n, m in model.named_modules() if m.training}
    moved = _Moved(model, blocks, device)
    passes: list[_Pass] = []
    handles: list[Any] = []
    given = False

    def group(index: int) -> Group:
        names = members.pop(index, [])
        read = {n: sums.pop(n) for n in names}
        found = {n: s for n, a in read.items() if (s := a.result()) is not None}
        broken = {n: left for n, a in read.items() if n not in found and (left := int(a.sums.get("left_out", 0)))}
        return Group(names, found, broken)

    def step(one: _Pass, here: int | None) -> None:
        if one.at not in (here, (here, "again")) and one.at in watched and one.at not in left:
            raise BadOption(f"this {type(model).__name__} goes through its blocks more than once in turn: {LOOPED}")
        one.go_on()

    bar = _bar(len(batches) * max(1, len(blocks)), progress)
    try:
        model.eval()
        moved.start()
        for name, layer in layers.items():
            handles += watch(layer, sums[name])
        del layers, layer  # nothing here keeps a layer alive that the caller replaces
        for index, block in enumerate(blocks):
            _door(block, index, again=through == "new" and index in members)
        passes += [_Pass(lambda b=b: _run(model, b, moved.device, logits), b, moved.device) for b in batches]
        for one in passes:
            one.go_on()
        left = set(range(len(blocks)))
        while left:
            here = next((one.at for one in passes if one.at in left), None)
            if here is None:
                break
            left.remove(here)
            moved.bring(blocks[here])
            for one in passes:
                while one.at is not None and one.at not in left and one.at != (here, "again"):
                    step(one, here)
                bar()
            if here in members:
                given = moved.for_good()
                yield group(here)
                for one in passes if through == "new" else ():
                    while one.at is not None and one.at not in left:
                        if one.at == here:
                            raise BadOption(
                                f"this {type(model).__name__} goes through a block twice in a row: {LOOPED}"
                            )
                        one.go_on()
        for one in passes:
            while one.at is not None:
                step(one, None)
            if not blocks:
                bar()
        given = moved.for_good()
        for index in list(members):
            yield group(index)
    except (QftError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if given:
            raise
        line = one_line(error)
        raise BadOption(f"this {type(model).__name__} cannot run on the calibration data: {line}") from error
    finally:
        bar.close()
        for one in passes:
            one.abort()
        for block in blocks:
            block.__dict__.pop("forward", None)
        for handle in handles:
            handle.remove()
        for name, module in model.named_modules():  # by name: layers may have been replaced
            module.training = name in training
        if not given:
            moved.back()


def _bar(total: int, progress: bool) -> Any:
    class Silent:
        def __call__(self) -> None: ...
        def close(self) -> None: ...

    if not progress:
        return Silent()
    from tqdm.auto import tqdm

    class Bar(tqdm):
        def __call__(self) -> None:
            self.update()

    return Bar(total=total, desc="reading calibration data", unit="batch", leave=False)


def _blocks(model: nn.Module, layers: Any) -> list[nn.Module]:
    """The entries of the outermost `ModuleList`s that hold layers: a transformer's blocks."""
    wanted = {id(layer) for layer in layers}
    found: list[nn.Module] = []
    inside: set[int] = set()
    for module in model.modules():
        if not isinstance(module, nn.ModuleList) or id(module) in inside:
            continue
        if any(id(m) in wanted for m in module.modules()):
            inside.update(id(m) for m in module.modules())
            found += [m for m in module if "forward" not in m.__dict__ and not isinstance(m, nn.ModuleList)]
    return list({id(m): m for m in found}.values())


class _Moved:
    """What was moved to the device, so that it can go back."""

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], device: torch.device | None):
        if device is not None and device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        self.model, self.blocks, self.device = model, blocks, device
        self.was: list[tuple[nn.Module, torch.device]] = []
        self.keep = True

    def start(self) -> None:
        if self.device is None:
            return
        inside = {id(m) for block in self.blocks for m in block.modules()}
        self._move(m for m in self.model.modules() if id(m) not in inside)

    def for_good(self) -> bool:
        """From here on nothing goes back."""
        self.was, self.keep = [], False
        return True

    def bring(self, block: nn.Module) -> None:
        if self.device is not None:
            self._move(block.modules())

    def _move(self, modules: Any) -> None:
        for module in modules:
            tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
            if tensors and tensors[0].device != self.device:
                if self.keep:
                    self.was.append((module, tensors[0].device))
                _move_own(module, self.device)

    def back(self) -> None:
        for module, device in self.was:
            _move_own(module, device)


def _move_own(module: nn.Module, device: torch.device) -> None:
    """Move a module's own tensors, not those of its children; parameters that modules share stay shared."""
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(device)
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = buffer.to(device)


class _Abort(BaseException):
    """Ends a batch's forward where its result is no longer wanted."""


@dataclass
class _Pass:
    """One batch's forward, in a thread that runs only between `go_on` and the next door."""

    run: Callable[[], Any]
    batch: Batch
    device: torch.device | None
    at: Any = -1
    error: BaseException | None = None
    aborted: bool = False
    _mine: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _theirs: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _thread: threading.Thread | None = None

    def go_on(self) -> None:
        """Run to the next door, or to the end, where `at` is None."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._body, daemon=True)
            self._thread.start()
        self._mine.release()
        self._theirs.acquire()
        if self.error is not None:
            raise self.error

    def _body(self) -> None:
        self._mine.acquire()
        try:
            if self.aborted:
                return
            running.batch = self
            if self.device is not None and self.device.type == "cuda":
                torch.cuda.set_device(self.device)
            with torch.no_grad():
                self.run()
        except _Abort:
            pass
        except BaseException as error:
            self.error = error
        finally:
            running.__dict__.clear()
            self.at = None
            self._theirs.release()

    def stop(self, door: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Wait at a block's door, what goes in kept in host memory meanwhile where the device has little room."""
        devices = tree_map_only(Tensor, lambda t: t.device, (args, kwargs))
        kept = tree_map_only(Tensor, _parked, (args, kwargs))
        del args, kwargs
        self.at = door
        running.last = (None, None, None)  # between blocks nothing of theirs is kept
        self._theirs.release()
        self._mine.acquire()
        if self.aborted:
            raise _Abort
        return tree_map(lambda t, d: t.to(self.device or d) if isinstance(t, Tensor) else t, kept, devices)

    def abort(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            return
        self.aborted = True
        self._mine.release()
        self._thread.join()


def _parked(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cuda":
        return tensor
    free, total = torch.cuda.mem_get_info(tensor.device)
    cached = torch.cuda.memory_reserved(tensor.device) - torch.cuda.memory_allocated(tensor.device)
    return tensor if 2 * (free + cached) > total else tensor.to("cpu")


def _door(block: nn.Module, index: int, again: bool) -> None:
    """Have each batch stop before this block, and where it is to go through `again`, behind it too."""
    inner = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        one = getattr(running, "batch", None)
        if one is None:
            return inner(*args, **kwargs)
        args, kwargs = one.stop(index, args, kwargs)
        if again:
            inner(*args, **kwargs)
            args, kwargs = one.stop((index, "again"), args, kwargs)
        return inner(*args, **kwargs)

    block.__dict__["forward"] = forward


def _reads_logits(model: nn.Module, layers: Any) -> bool:
    """Whether the head is among the layers, so that it has to run over all tokens."""
    try:
        head = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError, TypeError):
        return True
    return any(layer is head for layer in layers)


def _run(model: nn.Module, batch: Batch, device: torch.device | None, logits: bool) -> Any:
    if device is None:
        with contextlib.suppress(StopIteration):
            device = next(model.parameters()).device
    forward = inspect.signature(type(model).forward).parameters
    config = getattr(model, "config", None)
    if config is not None and not getattr(config, "is_encoder_decoder", False):  # nobody reads the loss here,
        batch = {k: v for k, v in batch.items() if k != "labels"}
    if "logits_to_keep" in forward and "labels" not in batch and not logits:  # nor the logits
        batch = {**batch, "logits_to_keep": 1}
    return call(model, batch, device)

"""Find linear layers whose weight a model's code reads itself, not through the layer's forward.

Such code gets packed codes where it expects floats, and never calls an adapter. Mamba's fused kernels, WavLM's attention and
Gemma 3n's AltUp do that. The source of each class is read once; conditions that depend on the module's own settings are
evaluated, so that a path that the config switches off does not count.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

from qft.core.quantizer import is_conv1d

_HARMLESS = frozenset(
    "device dtype shape size ndim dim numel element_size is_meta requires_grad grad layout is_cuda itemsize nbytes T".split()
) - {"T"}
"""What code may ask a weight without reading its values."""

_SKIPPED = frozenset("__init__ _init_weights init_weights reset_parameters tie_weights _tie_weights extra_repr".split())
_UNKNOWN = object()
_EACH = "*"
"""In a path: any child, as a loop over a list of layers or an index takes it."""

_OTHERS = (
    "torch.", "qft.", "bitsandbytes.", "peft.", "torchao.", "transformers.modeling_", "transformers.generation.",
    "transformers.integrations.", "transformers.utils.",
)  # fmt: skip
"""Modules whose methods read no weights of a model's own layers in a forward pass."""

_DEPTH = 3
"""How many calls of a class's own methods a layer is followed through as an argument."""


@dataclass(frozen=True)
class _Read:
    """One read of a weight: the path of the layer from `self`, and the conditions around it."""

    path: tuple[str, ...]
    method: str
    conditions: tuple[tuple[ast.expr, bool], ...]


def direct_reads(model: nn.Module) -> dict[str, str]:
    """Names of the linear layers of `model` whose weight other code reads → where, such as "WavLMAttention.forward"."""
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[str, str] = {}
    called = _called({type(module) for module in model.modules()})
    for module in model.modules():
        for read in _reads_of(type(module)):
            if read.method not in called or not all(_holds(test, module, wanted) for test, wanted in read.conditions):
                continue
            for layer in _follow(module, read.path):
                name = names.get(id(layer))
                if name is not None and (isinstance(layer, nn.Linear) or is_conv1d(layer)):
                    found.setdefault(name, f"{type(module).__name__}.{read.method}")
    return found


def _called(classes: set[type]) -> set[str]:
    """Names of the methods that a forward pass may call: `forward`, and what is named in a method that may be called.

    Others, such as the fusing of projections in diffusers, are for the caller to use, before the model is quantized.
    """
    found, new = set(), {"forward", "__call__"}
    while new:
        found |= new
        new = {name for cls in classes for method in new for name in _named_in(cls, method)} - found
    return found


@cache
def _named_in(cls: type, method: str) -> frozenset[str]:
    """The attributes, and texts that may name one, in a method of a class."""
    tree = None if cls.__module__.startswith(_OTHERS) else _source_of(cls, method)
    if tree is None:
        return frozenset()
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return frozenset(attributes | {text for text in texts if text.isidentifier()})


def _follow(module: nn.Module, path: tuple[str, ...]) -> list[nn.Module]:
    """The modules that a path leads to."""
    found = [module]
    for key in path:
        parts = [part for m in found for part in (m._modules.values() if key == _EACH else [m._modules.get(key)])]
        found = [part for part in parts if isinstance(part, nn.Module)]
    return found


@cache
def _reads_of(cls: type) -> tuple[_Read, ...]:
    """The reads in the methods of a class and of its bases."""
    if cls.__module__.startswith(_OTHERS):
        return ()
    return tuple(read for name in dir(cls) if name not in _SKIPPED for read in _Method(cls, name).reads())


@cache
def _source_of(cls: type, name: str) -> ast.FunctionDef | None:
    """The syntax tree of a method, its own or inherited; None where it has no source, or is not the model's."""
    method = inspect.getattr_static(cls, name, None)
    method = getattr(method, "__func__", method)
    if not inspect.isfunction(method) or method.__module__.startswith(_OTHERS):
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method))).body[0]
    except (OSError, TypeError, SyntaxError, ValueError, IndexError, RecursionError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


_Paths = frozenset[tuple[str, ...]]
_Conditions = tuple[tuple[ast.expr, bool], ...]
_NONE: _Paths = frozenset()


class _Method:
    """The reads of one method.

    Args:
        given: what the arguments are, as paths from `self`, where another method passes its layers on.
    """

    def __init__(self, cls: type, name: str, given: Mapping[str, _Paths] | None = None, depth: int = 0):
        self.cls, self.name, self.depth = cls, name, depth
        self.tree = _source_of(cls, name)
        self.known: dict[str, _Paths] = dict(given or {})
        if self.tree is not None and self.tree.args.args:
            self.known.setdefault(self.tree.args.args[0].arg, frozenset({()}))
            for _ in range(2):  # a name may stand for what a later line assigns, in a loop
                for node in ast.walk(self.tree):
                    self._bind(node)

    def reads(self, conditions: _Conditions = ()) -> Iterator[_Read]:
        if self.tree is not None:
            yield from self._search_all(self.tree.body, conditions)

    # ---- what the names stand for ------------------------------------------------------------------------

    def _bind(self, node: ast.AST) -> None:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                self._assign(target, node.value)
        elif isinstance(node, ast.NamedExpr):
            self._assign(node.target, node.value)
        elif isinstance(node, ast.For | ast.comprehension):
            self._iterate(node.target, node.iter)

    def _assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple) and len(target.elts) == len(value.elts):
            for part, given in zip(target.elts, value.elts, strict=True):
                self._assign(part, given)
        elif isinstance(target, ast.Name):
            self._add(target, self._paths(value))

    def _iterate(self, target: ast.expr, values: ast.expr) -> None:
        """Bind the target of a loop over layers: a list of them, `enumerate`, `zip`, `reversed`, or `.items()`."""
        if isinstance(values, ast.Call):
            called = values.func.id if isinstance(values.func, ast.Name) else getattr(values.func, "attr", "")
            pairs = target.elts if isinstance(target, ast.Tuple) else []
            if called == "enumerate" and len(pairs) == 2 and values.args:
                return self._iterate(pairs[1], values.args[0])
            if called == "zip":
                for part, given in zip(pairs, values.args, strict=False):
                    self._iterate(part, given)
                return None
            if called in ("reversed", "list", "tuple") and values.args:
                return self._iterate(target, values.args[0])
            if isinstance(values.func, ast.Attribute) and called in ("items", "named_children") and len(pairs) == 2:
                return self._iterate(pairs[1], values.func.value)
            if isinstance(values.func, ast.Attribute) and called in ("values", "children"):
                return self._iterate(target, values.func.value)
        if isinstance(target, ast.Name):
            listed = values.elts if isinstance(values, ast.Tuple | ast.List) else None
            found = (
                [p for v in listed for p in self._paths(v)] if listed else [(*p, _EACH) for p in self._paths(values)]
            )
            self._add(target, frozenset(found))
        return None

    def _add(self, target: ast.Name, paths: _Paths) -> None:
        if paths and len(merged := self.known.get(target.id, _NONE) | paths) < 32:
            self.known[target.id] = merged

    def _paths(self, node: ast.AST) -> _Paths:
        """The paths that an expression may stand for: {("mixer", "dt_proj")} of `self.mixer.dt_proj`."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id, _NONE)
        if isinstance(node, ast.IfExp):
            return self._paths(node.body) | self._paths(node.orelse)
        if isinstance(node, ast.Subscript):
            return frozenset((*p, _EACH) for p in self._paths(node.value))
        if attribute := _attribute(node):
            return frozenset((*p, attribute[1]) for p in self._paths(attribute[0]) if len(p) < 8)
        return _NONE

    # ---- what is read ------------------------------------------------------------------------------------

    def _search_all(self, statements: list[Any], conditions: _Conditions) -> Iterator[_Read]:
        """Search statements in order; what follows `if test: return ...` runs where the test is false."""
        for statement in statements:
            yield from self._search(statement, conditions)
            if isinstance(statement, ast.If) and isinstance(statement.body[-1], ast.Return | ast.Raise):
                conditions = (*conditions, (statement.test, False))

    def _search(self, node: ast.AST, conditions: _Conditions) -> Iterator[_Read]:
        if isinstance(node, ast.If | ast.IfExp):
            yield from self._search(node.test, conditions)
            for branch, wanted in ((node.body, True), (node.orelse, False)):
                statements = branch if isinstance(branch, list) else [branch]
                yield from self._search_all(statements, (*conditions, (node.test, wanted)))
            return
        if isinstance(node, ast.FunctionDef):
            yield from self._search_all(node.body, conditions)
            return
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr"):
                return
            yield from self._passed_on(node, conditions)
        if isinstance(node, ast.Attribute) and node.attr in _HARMLESS and self._weights(node.value):
            return
        if weights := self._weights(node):
            yield from (_Read(path, self.name, conditions) for path in weights)
            return
        for child in ast.iter_child_nodes(node):
            yield from self._search(child, conditions)

    def _weights(self, node: ast.AST) -> list[tuple[str, ...]]:
        """The layers whose weight an expression is."""
        attribute = _attribute(node)
        if attribute is None or attribute[1] != "weight":
            return []
        return sorted(path for path in self._paths(attribute[0]) if path)

    def _passed_on(self, call: ast.Call, conditions: _Conditions) -> Iterator[_Read]:
        """The reads of a method of the same class that is given layers: `self.rescale(self.output)`."""
        func = call.func
        if not isinstance(func, ast.Attribute) or self._paths(func.value) != {()} or self.depth >= _DEPTH:
            return
        tree = _source_of(self.cls, func.attr)
        if tree is None:
            return
        static = isinstance(inspect.getattr_static(self.cls, func.attr), staticmethod)
        names = [a.arg for a in tree.args.args][0 if static else 1 :]
        passed = [*zip(names, call.args, strict=False), *((k.arg, k.value) for k in call.keywords if k.arg)]
        given = {name: paths for name, value in passed if (paths := self._paths(value) - {()})}
        if given:
            yield from _Method(self.cls, func.attr, given, self.depth + 1).reads(conditions)


def _attribute(node: ast.AST) -> tuple[ast.expr, str] | None:
    """(x, "name") of `x.name` and of `getattr(x, "name")`."""
    if isinstance(node, ast.Attribute):
        return node.value, node.attr
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "getattr"
        and len(node.args) > 1
    ):
        name = node.args[1]
        if isinstance(name, ast.Constant) and isinstance(name.value, str):
            return node.args[0], name.value
    return None


def _holds(test: ast.expr, module: nn.Module, wanted: bool) -> bool:
    """Whether a condition may have this value for this module."""
    value = _value(test, module)
    return value is _UNKNOWN or bool(value) is wanted


def _value(node: ast.expr, module: nn.Module) -> Any:
    """The value of an expression over the module's own settings, or `_UNKNOWN`."""
    if isinstance(node, ast.BoolOp):
        values = [_value(v, module) for v in node.values]
        decisive = isinstance(node.op, ast.Or)
        if any(v is not _UNKNOWN and bool(v) is decisive for v in values):
            return decisive
        return _UNKNOWN if _UNKNOWN in values else not decisive
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        value = _value(node.operand, module)
        return value if value is _UNKNOWN else not value
    settled = all(
        not isinstance(n, ast.Name | ast.Call) or (isinstance(n, ast.Name) and n.id == "self") for n in ast.walk(node)
    )
    reads = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    if not settled or reads & {"training", "device", "dtype", "weight", "is_cuda"}:
        return _UNKNOWN
    try:
        return eval(compile(ast.Expression(node), "<condition>", "eval"), {"__builtins__": {}}, {"self": module})
    except Exception:
        return _UNKNOWN

"""Find linear layers whose weight a model's code reads itself, not through the layer's forward.

Such code gets packed codes where it expects floats, and never calls an adapter. Mamba's fused kernels, WavLM's attention and
Gemma 3n's AltUp do that. The source of each class is read once; conditions that depend on the module's own settings are
evaluated, so that a path that the config switches off does not count.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import nn

_HARMLESS = frozenset(
    "device dtype shape size ndim dim numel element_size is_meta requires_grad grad layout is_cuda itemsize nbytes T".split()
) - {"T"}
"""What code may ask a weight without reading its values."""

_SKIPPED = frozenset("__init__ _init_weights init_weights reset_parameters tie_weights _tie_weights extra_repr".split())
_UNKNOWN = object()


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
    for module in model.modules():
        for read in _reads_of(type(module)):
            layer = _follow(module, read.path)
            name = names.get(id(layer))
            if name is None or name in found or not isinstance(layer, nn.Linear):
                continue
            if all(_holds(test, module, wanted) for test, wanted in read.conditions):
                found[name] = f"{type(module).__name__}.{read.method}"
    return found


def _follow(module: nn.Module, path: tuple[str, ...]) -> Any:
    found: Any = module
    for key in path:
        found = getattr(found, "_modules", {}).get(key)
        if found is None:
            return None
    return found


@cache
def _reads_of(cls: type) -> tuple[_Read, ...]:
    """The reads in the methods of a class, its bases included."""
    if cls.__module__.startswith(("torch.", "qft.", "bitsandbytes.", "peft.", "torchao.")):
        return ()
    found: list[_Read] = []
    for name in dir(cls):
        method = inspect.getattr_static(cls, name, None)
        if name in _SKIPPED or not inspect.isfunction(method) or not method.__module__ == cls.__module__:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
        except (OSError, TypeError, SyntaxError, ValueError):
            continue
        found += _search(tree, name, ())
    return tuple(found)


def _search(node: ast.AST, method: str, conditions: tuple[tuple[ast.expr, bool], ...]) -> Iterator[_Read]:
    if isinstance(node, ast.If | ast.IfExp):
        yield from _search(node.test, method, conditions)
        for branch, wanted in ((node.body, True), (node.orelse, False)):
            statements = branch if isinstance(branch, list) else [branch]
            yield from _search_all(statements, method, (*conditions, (node.test, wanted)))
        return
    if isinstance(node, ast.FunctionDef):
        yield from _search_all(node.body, method, conditions)
        return
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "hasattr"):
        return
    if isinstance(node, ast.Attribute):
        if node.attr in _HARMLESS and _path(node.value) is not None:
            return
        path = _path(node)
        if path is not None:
            yield _Read(path, method, conditions)
            return
    for child in ast.iter_child_nodes(node):
        yield from _search(child, method, conditions)


def _search_all(statements: list[Any], method: str, conditions: tuple[tuple[ast.expr, bool], ...]) -> Iterator[_Read]:
    """Search statements in order; what follows `if test: return ...` runs where the test is false."""
    for statement in statements:
        yield from _search(statement, method, conditions)
        if isinstance(statement, ast.If) and isinstance(statement.body[-1], ast.Return | ast.Raise):
            conditions = (*conditions, (statement.test, False))


def _path(node: ast.AST) -> tuple[str, ...] | None:
    """("mixer", "dt_proj") of `self.mixer.dt_proj.weight`; None of anything else."""
    if not isinstance(node, ast.Attribute) or node.attr != "weight":
        return None
    keys: list[str] = []
    inner: ast.AST = node.value
    while isinstance(inner, ast.Attribute):
        keys.append(inner.attr)
        inner = inner.value
    return tuple(reversed(keys)) if keys and isinstance(inner, ast.Name) and inner.id == "self" else None


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

"""Modules whose result selects among tokens or experts, found by the source of their forward."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache

_SAME = frozenset("to int long view reshape contiguous squeeze unsqueeze detach clone".split())
"""Methods of an index that give an index."""

_MADE = frozenset("where full_like masked_fill clamp".split())
"""Functions that give an index where all their tensors are indices."""


@cache
def selects(cls: type) -> bool:
    """Whether the forward of a class takes the largest of its scores."""
    tree = _forward(cls)
    return tree is not None and any(_is_topk(node) for node in ast.walk(tree))


@cache
def returns_indices(cls: type) -> bool:
    """Whether all that the forward of a class returns are indices of its largest scores."""
    if not selects(cls):
        return False
    tree = _forward(cls)
    assert tree is not None
    known: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            target = node.targets[0]
            if isinstance(target, ast.Tuple) and _is_topk(node.value) and isinstance(target.elts[-1], ast.Name):
                known.add(target.elts[-1].id)
            elif isinstance(target, ast.Name) and _is_index(node.value, known):
                known.add(target.id)
    returned = [node.value for node in ast.walk(tree) if isinstance(node, ast.Return)]
    return bool(returned) and all(value is not None and _is_index(value, known) for value in returned)


@cache
def _forward(cls: type) -> ast.AST | None:
    if cls.__module__.startswith("torch."):
        return None
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(cls.forward)))  # type: ignore[attr-defined]
    except (OSError, TypeError, SyntaxError, ValueError, AttributeError, RecursionError):
        return None


def _is_topk(node: ast.AST) -> bool:
    if not isinstance(node, ast.Call):
        return False
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    return name == "topk"


def _is_index(node: ast.AST, known: set[str]) -> bool:
    """Whether an expression is an index, or a comparison of one; `known` are the names of indices."""
    if isinstance(node, ast.Name):
        return node.id in known
    if isinstance(node, ast.Attribute):
        return node.attr == "indices" and _is_topk(node.value)
    if isinstance(node, ast.Subscript):
        second = isinstance(node.slice, ast.Constant) and node.slice.value == 1
        return (second and _is_topk(node.value)) or _is_index(node.value, known)
    if isinstance(node, ast.Compare):
        return any(_is_index(part, known) for part in (node.left, *node.comparators))
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    if node.func.attr in _SAME and _is_index(node.func.value, known):
        return True
    parts = [a for a in node.args if not isinstance(a, ast.Constant | ast.UnaryOp)]
    return node.func.attr in _MADE and bool(parts) and all(_is_index(part, known) for part in parts)

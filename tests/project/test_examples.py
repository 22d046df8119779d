"""The examples run as they stand, and the custom quantizer stays as short as it is advertised."""

import ast
import os
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, *args):
    path = os.pathsep.join(filter(None, sys.path))
    return subprocess.run(
        [sys.executable, str(EXAMPLES / name), *args],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_custom_quantizer_registers_conforms_trains_merges_saves_and_loads():
    done = run("custom_quantizer.py")
    assert done.returncode == 0, done.stderr
    for line in ("17 checks passed", "trained: loss", "merged to float:", "saved and loaded: the same logits"):
        assert line in done.stdout
    assert "ruled out" not in done.stdout
    assert "QftWarning" not in done.stderr
    assert "14 layers in Rowwise8(clip=0.98)" in done.stderr


def test_custom_quantizer_is_under_30_lines():
    source = (EXAMPLES / "custom_quantizer.py").read_text()
    (cls,) = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef)]
    start = min(d.lineno for d in cls.decorator_list)
    assert cls.name == "Rowwise8"
    assert cls.end_lineno - start + 1 < 30


def test_custom_quantizer_uses_public_names_only():
    tree = ast.parse((EXAMPLES / "custom_quantizer.py").read_text())
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    assert not [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module.startswith("qft")]
    assert "qft" in imported
    import qft

    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "qft"}
    assert used <= set(qft.__all__)

"""The reference pages: `api.md` from the docstrings of `qft.__all__`, `cli.md` from the verbs of the command."""

from __future__ import annotations

import dataclasses
import html
import inspect
import re
from collections.abc import Iterator
from typing import Any

import qft
import qft_cli

API_HEAD = """# Python API

Written by `python tools/docs/generate.py` from the docstrings of `qft.__all__`; do not edit it.
"""
CLI_HEAD = """# Command line

Written by `python tools/docs/generate.py` from the verbs in `src/qft/cli/`; do not edit it. `qft VERB --help` says the same in
the terminal. `qft --install-completion` installs tab completion for your shell.
"""
GROUPS = {
    "Quantize and wrap": "quantize prepare_model_for_kbit_training wrap quantize_and_wrap audit transfer",
    "Plan and train": "plan optimize_training unoptimize PackingCollator train TrainConfig evaluate auto doctor",
    "Merge, save and load": "merge unmerge merge_to_float export save load",
    "Quantizers by name": "available_quantizers get_quantizer capabilities register_quantizer",
    "What verbs return": "Audit AutoResult Doctor Evaluation InitReport MergeReport Plan QuantizerInfo TrainResult "
    "TransferReport",
    "Starts of adapters": "AdapterInit LoftQ QERA QERAFull PiSSA OLoRA register_init Calibration Statistics",
    "To write a quantizer": "Quantizer TensorQuantizer Capabilities QuantizedWeight PackedLinear testing",
}
"""Every other name is a quantizer or an error."""
SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Yields|Note|Example|Examples):$")
ENTRY = re.compile(r"(\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: \([^)]*\))?: ")


# ---- Python ------------------------------------------------------------------------------------------------


def api() -> str:
    parts, listed = [API_HEAD], set()
    for title, names in GROUPS.items():
        parts.append(f"\n## {title}\n")
        for name in (n for n in names.split() if n in qft.__all__):
            listed.add(name)
            parts += _described(name)
    rest = [name for name in qft.__all__ if name not in listed and name != "errors"]
    failures = [name for name in rest if _is_error(getattr(qft, name))]
    parts.append("\n## Quantizers\n")
    for name in rest:
        if name not in failures:
            parts += _described(name)
    parts += ["\n## Errors\n", "`qft.errors` draws the tree:\n", "```text", (qft.errors.__doc__ or "").strip(), "```\n"]
    parts += [f"- `qft.{name}`: {_text(getattr(qft, name).__doc__)}" for name in failures]
    return "\n".join(parts).rstrip() + "\n"


def _is_error(thing: Any) -> bool:
    return isinstance(thing, type) and issubclass(thing, Exception | Warning)


def _described(name: str) -> Iterator[str]:
    thing = getattr(qft, name)
    yield f"\n### qft.{name}\n"
    if inspect.ismodule(thing):
        yield from docstring(thing.__doc__)
        for member, value in vars(thing).items():
            if inspect.isfunction(value) and value.__module__ == thing.__name__ and not member.startswith("_"):
                yield from ["", *_signature(f"qft.{name}.{member}", value), "", *docstring(value.__doc__)]
        return
    shown = not isinstance(thing, type) or (dataclasses.is_dataclass(thing) and not inspect.isabstract(thing))
    if shown:
        yield from [*_signature(f"qft.{name}", thing), ""]
    yield from docstring(thing.__doc__)
    if isinstance(thing, type):
        yield from _members(thing)


def _signature(name: str, thing: Any) -> list[str]:
    """One line where that is short, else a line an argument."""
    signature = inspect.signature(thing)
    values = [_parameter(value) for value in signature.parameters.values()]
    kinds = [value.kind for value in signature.parameters.values()]
    if inspect.Parameter.KEYWORD_ONLY in kinds and inspect.Parameter.VAR_POSITIONAL not in kinds:
        values.insert(kinds.index(inspect.Parameter.KEYWORD_ONLY), "*")
    annotation = inspect.Signature.empty if isinstance(thing, type) else signature.return_annotation
    returned = "" if annotation is inspect.Signature.empty else f" -> {_annotation(annotation)}"
    line = f"{name}({', '.join(values)}){returned}"
    if len(line) > 100:
        line = "\n".join([f"{name}(", *(f"    {value}," for value in values), f"){returned}"])
    return ["```python", line, "```"]


def _parameter(value: inspect.Parameter) -> str:
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}.get(value.kind, "")
    text = stars + value.name
    if value.annotation is not inspect.Parameter.empty:
        text += f": {_annotation(value.annotation)}"
    if value.default is inspect.Parameter.empty:
        return text
    default = repr(value.default)
    return f"{text} = {'...' if default.startswith('<') else default}"


def _annotation(value: Any) -> str:
    return value if isinstance(value, str) else inspect.formatannotation(value)


def _members(cls: type) -> Iterator[str]:
    """Public methods and properties with docstrings, as a list."""
    for name, value in vars(cls).items():
        if name.startswith("_"):
            continue
        bare = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if isinstance(value, property):
            if value.fget.__doc__:
                yield f"\n#### {cls.__name__}.{name}\n"
                yield from docstring(value.fget.__doc__)
        elif inspect.isfunction(bare) and bare.__doc__:
            yield f"\n#### {cls.__name__}.{name}()\n"
            bound = bare if isinstance(value, staticmethod) else _Unbound(bare)
            yield from [*_signature(f"{cls.__name__}.{name}", bound), ""]
            yield from docstring(bare.__doc__)


class _Unbound:
    """A method, whose signature leaves its first argument out."""

    def __init__(self, function: Any) -> None:
        signature = inspect.signature(function)
        self.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(self) -> None:
        raise NotImplementedError


def docstring(text: str | None) -> list[str]:
    """Markdown of a docstring with Google's sections."""
    lines: list[str] = []
    section = None
    for line in inspect.cleandoc(_raises_apart(text or "")).splitlines():
        heading = SECTION.match(line)
        if heading:
            section = heading[1]
            lines += [f"**{section}**", ""]
        elif section is None or (line and not line.startswith(" ")):
            section = None
            lines.append(f"    {line}" if line.startswith(">>> ") else _text(line))
        else:
            lines.append(_entry(line[4:], section, follows=lines[-1].startswith(("- ", "    "))))
    return lines


def _raises_apart(text: str) -> str:
    """Errors that share a line in `Raises:` have a line each."""
    head, mark, tail = inspect.cleandoc(text).partition("\nRaises:\n")
    return head + mark + re.sub(r"(?<=[.;])\s+((?:[A-Z]\w+, )*[A-Z][a-z]\w+): ", r"\n    \1: ", tail)


def _entry(line: str, section: str, follows: bool) -> str:
    """A line of a section: an item of a list, what belongs to the one before, or a paragraph."""
    found = ENTRY.match(line)
    if section in ("Args", "Attributes", "Raises") and found:
        names = ", ".join(f"`{name}`" for name in found[1].split(", "))
        return f"- {names}: {_text(line[found.end() :])}"
    if not line.strip():
        return ""
    inside = line.startswith("    ") or follows
    return ("    " if inside and section != "Returns" else "") + _text(line.strip())


def _text(line: str | None) -> str:
    """What Markdown would take for HTML is text; code stays as it is."""
    pieces = (line or "").split("`")
    return "`".join(p if i % 2 else html.escape(p, quote=False).replace("*", r"\*") for i, p in enumerate(pieces))


# ---- the command -------------------------------------------------------------------------------------------


def commands() -> dict[str, Any]:
    """Verb → click's command."""
    import typer.main

    return dict(sorted(typer.main.get_command(qft_cli.app()).commands.items()))  # type: ignore[attr-defined]


def cli() -> str:
    parts = [CLI_HEAD, f"{qft_cli.EXIT_CODES}\n"]
    for verb, command in commands().items():
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
        words = [p.metavar or (p.name.upper() if p.required else f"[{p.name.upper()}]") for p in arguments]
        parts += [f"\n## qft {verb}\n", "```text", " ".join(["qft", verb, *words, "[OPTIONS]"]), "```\n"]
        parts += [*docstring(command.help), ""]
        parts += [f"- `{p.metavar or p.name.upper()}`: {_text(p.help)}" for p in arguments]
        parts += ["", "| option | default | what it is |", "|---|---|---|"]
        for option in options:
            names = ", ".join(f"`{n}`" for n in [*option.opts, *option.secondary_opts] if "_" not in n)
            parts.append(f"| {names} | {_default(option)} | {_text(option.help).replace('|', chr(92) + '|')} |")
    return "\n".join(parts).rstrip() + "\n"


def _default(option: Any) -> str:
    """What is shown, or the value; a flag that is off, and None, show nothing."""
    if isinstance(option.show_default, str):
        return option.show_default
    value = option.default() if callable(option.default) else option.default
    value = getattr(value, "value", value)
    return "" if value is None or value is False or option.show_default is False else f"`{value}`"

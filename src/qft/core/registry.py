"""Names to quantizers. No backend is imported until its name is asked for."""

from __future__ import annotations

import difflib
import importlib
import importlib.metadata
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field, is_dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from torch import nn

from qft.core.quantizer import Capabilities, Quantizer
from qft.errors import BadOption, MissingDependency, QftError, UnknownQuantizer

ENTRY_POINTS = "qft.quantizers"
"""Third parties announce their quantizers under this entry-point group: `name = "package.module:Class"`."""


@dataclass(frozen=True)
class Entry:
    """One name: where its class is, and the options that the name stands for."""

    target: str | type[Quantizer]
    options: Mapping[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    summary: str = ""

    def load(self) -> type[Quantizer]:
        if not isinstance(self.target, str):
            return self.target
        module, _, attribute = self.target.partition(":")
        try:
            cls = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError) as error:
            raise MissingDependency(
                f"the quantizer registered as {self.target!r} cannot be imported: {error}; install or repair its package"
            ) from error
        return _check_class(cls)


_BNB = "qft.backends.bnb"
_entries: dict[str, Entry] = {
    "nf4": Entry(
        f"{_BNB}:BitsAndBytes4bit",
        {"quant_type": "nf4"},
        ("bnb-nf4", "bitsandbytes", "bitsandbytes_4bit"),
        "NF4, blocks of 64 (bitsandbytes)",
    ),
    "fp4": Entry(f"{_BNB}:BitsAndBytes4bit", {"quant_type": "fp4"}, ("bnb-fp4",), "FP4, blocks of 64 (bitsandbytes)"),
    "int8": Entry(f"{_BNB}:BitsAndBytes8bit", {}, ("llm.int8", "bitsandbytes_8bit"), "LLM.int8() (bitsandbytes)"),
    "aqlm": Entry(
        "qft.backends.aqlm:AQLM", {}, (), "sums of codebook vectors, 2 bits and less, fitted by calibration data (AQLM)"
    ),
    "awq": Entry(
        "qft.backends.awq:AWQ", {}, ("autoawq",), "4 bits in AWQ's layout, ranges and codes by calibration data"
    ),
    "eetq": Entry("qft.backends.eetq:EETQ", {}, (), "int8, a scale a row, in EETQ's layout, without its kernels"),
    "auto-round": Entry(
        "qft.backends.auto_round:AutoRound", {}, ("auto_round",), "integers in the layout of auto-round's checkpoints"
    ),
    "bitnet": Entry("qft.backends.bitnet:BitNet", {}, (), "ternary weights with one scale (BitNet b1.58)"),
    "compressed-tensors": Entry(
        "qft.backends.compressed_tensors:CompressedTensors",
        {},
        ("compressed_tensors",),
        "integers of 2 to 8 bits and float8 in compressed-tensors' layouts (llm-compressor, vLLM)",
    ),
    "fp8": Entry("qft.backends.fp8:FP8", {}, ("finegrained_fp8",), "float8 with a scale a block, a row or a weight"),
    "gguf": Entry("qft.backends.gguf:GGUF", {}, (), "llama.cpp's blocks, as a GGUF file has them"),
    "gptq": Entry(
        "qft.backends.gptq:GPTQ", {}, ("gptqmodel", "auto-gptq"), "GPTQ, 2, 3, 4 or 8 bits, its checkpoints' own layout"
    ),
    "hqq": Entry("qft.backends.hqq:HQQ", {}, (), "integers of 1 to 8 bits, zero points fitted, no data (HQQ)"),
    "inc": Entry(
        "qft.backends.inc:INC",
        {},
        ("neural-compressor", "neural_compressor"),
        "INC's RTN, NF4, GPTQ, AWQ and HQQ, and FP8 by calibration data (Intel Neural Compressor)",
    ),
    "mxfp4": Entry("qft.backends.mxfp4:MXFP4", {}, (), "E2M1 with a power of two for 32 weights (OCP MX)"),
    "quanto": Entry(
        "qft.backends.quanto:Quanto", {}, ("optimum-quanto",), "int2, int4, int8 and float8 (optimum-quanto)"
    ),
    "sinq": Entry(
        "qft.backends.sinq:SINQ", {}, (), "integers of 2 to 8 bits, rows and columns evened out, no data (SINQ)"
    ),
    "torchao": Entry(
        "qft.backends.torchao:TorchAO", {}, (), "int8, float8, integers of 1 to 8 bits, int4 and NF4 (torchao)"
    ),
    "reference": Entry(
        "qft.backends.reference:Reference", {}, (), "NF4, FP4, integers of 2 to 8 bits, in pure PyTorch, on any device"
    ),
}


@dataclass(frozen=True)
class QuantizerInfo:
    """A registered quantizer's state on this machine.

    Attributes:
        state: "ready", "missing" (a package is not installed) or "unusable" (it is, and cannot be used).
        hint: what to do about it, or a note; empty where it is simply ready.
    """

    name: str
    state: Literal["ready", "missing", "unusable"]
    hint: str
    summary: str


@dataclass(frozen=True)
class Spec:
    """What a caller asked for: quantizers by module pattern (None leaves a match in 16 bit), and further skips."""

    quantizers: Mapping[str, Quantizer | None]
    skip: tuple[str, ...] = ()
    calibration: Any = None
    """What a transformers config brings along as its `dataset` and `tokenizer`; data given by the caller wins."""
    tokenizer: Any = None


def register_quantizer(
    name: str,
    quantizer: type[Quantizer] | str | None = None,
    *,
    aliases: tuple[str, ...] = (),
    summary: str = "",
    replace: bool = False,
) -> Any:
    """Register a quantizer under a name, directly or as a class decorator.

    Args:
        name: how it is called in specs, such as `"my8bit"` or `"my8bit:group_size=64"`.
        quantizer: a `Quantizer` class, or `"package.module:Class"`, imported on first use.
        aliases: further names.
        summary: one line for `available_quantizers()`.
        replace: allow a name that is taken.

    Raises:
        BadOption: a name that is taken or cannot be written in a spec, or something that is no `Quantizer`.

    Example:
        >>> @qft.register_quantizer("my8bit")
        ... @dataclass(frozen=True)
        ... class My8bit(qft.TensorQuantizer): ...
    """
    if quantizer is None:
        return lambda cls: register_quantizer(name, cls, aliases=aliases, summary=summary, replace=replace)
    for n in (name, *aliases):
        if not isinstance(n, str) or not n or any(c in n for c in ":,=* \t\n"):
            raise BadOption(f"a quantizer cannot be called {n!r}: names are strings without spaces and ':,=*'")
    if not isinstance(quantizer, str):
        _check_class(quantizer)
    taken = [n for n in (name, *aliases) if _find(n, third_parties=False) is not None]
    if taken and not replace:
        raise BadOption(f"the name {taken[0]!r} is taken; pass replace=True to take it over")
    doc = summary or (quantizer.__doc__ or "").strip().partition("\n")[0] if not isinstance(quantizer, str) else summary
    _entries[name] = Entry(quantizer, {}, aliases, doc)
    _owners.cache_clear()
    _converter.cache_clear()
    return quantizer


def _check_class(cls: Any) -> type[Quantizer]:
    if not (isinstance(cls, type) and issubclass(cls, Quantizer)):
        raise BadOption(f"{cls!r} is no Quantizer class: subclass qft.Quantizer or qft.TensorQuantizer")
    if not is_dataclass(cls) or not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise BadOption(f"{cls.__name__} is no frozen dataclass: put @dataclass(frozen=True) right above the class")
    if inspect.isabstract(cls):
        raise BadOption(f"{cls.__name__} does not define {', '.join(sorted(cls.__abstractmethods__))}")
    if not isinstance(getattr(cls, "name", None), str):
        raise BadOption(f"{cls.__name__} has no name: give it one, such as name: ClassVar[str] = 'my8bit'")
    return cls


def _third_parties() -> dict[str, importlib.metadata.EntryPoint]:
    return {ep.name: ep for ep in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def _find(name: str, *, third_parties: bool = True) -> Entry | None:
    if name in _entries:
        return _entries[name]
    for entry in _entries.values():
        if name in entry.aliases:
            return entry
    if third_parties and name in (points := _third_parties()):
        return Entry(f"{points[name].module}:{points[name].attr}")
    return None


def _entry(name: str) -> Entry:
    if not isinstance(name, str):
        raise BadOption(f"{name!r} is no name of a quantizer: a string is")
    entry = _find(name)
    if entry is None:
        known = [*_entries, *_third_parties()]
        near = difflib.get_close_matches(name.lower(), known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise UnknownQuantizer(f"no quantizer is called {name!r}; {hint}known: {', '.join(known)}")
    return entry


def get_quantizer(spec: Any) -> Quantizer:
    """A quantizer from its name, an option string, an object, transformers' config, or `to_dict()`'s output.

    Args:
        spec: `"nf4"`, `"reference:format=int,bits=3"`, `qft.Reference(bits=3, format="int")`,
            `BitsAndBytesConfig(load_in_4bit=True)`, or `{"name": "reference", "bits": 3, "format": "int"}`.

    Raises:
        UnknownQuantizer: no such name; near names are in the message.
        BadOption: an option that the quantizer does not have, or a value that it does not take.
        MissingDependency: a package is not installed; the pip line is in the message. For `nf4` and `fp4` the
            reference quantizer takes over instead, with a warning.
    """
    quantizer = _build(spec)
    try:
        quantizer.check_installed()
    except MissingDependency as error:
        fallback = getattr(quantizer, "fallback", None)
        if fallback is None:
            raise
        return fallback(str(error))
    return quantizer


def _build(spec: Any) -> Quantizer:
    if isinstance(spec, Quantizer):
        return spec
    if isinstance(spec, type) and issubclass(spec, Quantizer):
        return _check_class(spec).from_dict({})
    if isinstance(spec, Mapping) and "name" in spec:
        entry = _entry(spec["name"])
        return entry.load().from_dict({**entry.options, **spec})
    if isinstance(spec, str):
        name, _, text = spec.partition(":")
        entry, options = _entry(name.strip()), parse_options(spec, text)
        if "name" in options:
            raise BadOption(f"there is no option 'name', in {spec!r}: the name stands before the colon")
        return entry.load().from_dict({**entry.options, **options})
    config = _from_transformers(spec)
    if config is not None:
        return config
    raise BadOption(
        f"{spec!r} is no quantizer: give a name such as 'nf4', an option string such as 'reference:format=int,bits=3', "
        "a qft quantizer object, a transformers quantization config, or a mapping of module patterns to these"
    )


def parse_options(spec: str, text: str) -> dict[str, Any]:
    """The options of `name:key=value,key=value`, given whole as `spec` for messages, and from the colon on as `text`."""
    options: dict[str, Any] = {}
    for part in text.split(",") if text.strip() else ():
        key, equals, value = (p.strip() for p in part.partition("="))
        if not equals or not key.isidentifier() or not value:
            raise BadOption(f"cannot read {part.strip()!r} in {spec!r}: options are written name:key=value,key=value")
        if key in options:
            raise BadOption(f"{key!r} stands twice in {spec!r}")
        options[key] = _parse_value(value)
    return options


def _parse_value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for convert in (int, float):
        try:
            return convert(text)
        except ValueError:
            pass
    return text


def _from_transformers(config: Any) -> Quantizer | None:
    if not hasattr(config, "quant_method"):
        return None
    options = config.to_dict()
    method = options.get("quant_method") or config.quant_method
    quantizer = from_config({**options, "quant_method": str(getattr(method, "value", method))})
    if quantizer is None:
        raise UnknownQuantizer(
            f"no quantizer here takes a {type(config).__name__}; known: {', '.join([*_entries, *_third_parties()])}"
        )
    return quantizer


def from_config(config: Mapping[str, Any]) -> Quantizer | None:
    """The quantizer that a checkpoint's `quantization_config` names, or None where no backend here reads its method.

    Raises:
        BadOption: one does, and not these options.
    """
    method = str(config.get("quant_method", ""))
    for backend in _loaded():
        if method in backend.config_methods:
            return backend.from_config(config)
    return None


def folder_reader(folder: Path) -> type[Quantizer] | None:
    """The backend whose own tool wrote a folder, by its `folder_marks`, or None."""
    return next((b for b in _loaded() if any((folder / mark).is_file() for mark in b.folder_marks)), None)


def file_reader(options: Mapping[str, Any]) -> type[Quantizer] | None:
    """The backend whose file the options of `from_pretrained` name, or None."""
    return next((b for b in _loaded() if b.file_option is not None and options.get(b.file_option) is not None), None)


def _loaded() -> list[type[Quantizer]]:
    """Every registered class once, broken registrations apart: their name says so when it is asked for."""
    found: dict[type[Quantizer], None] = {}
    for entry in _entries.values():
        try:
            found[entry.load()] = None
        except QftError:
            continue
    return list(found)


def parse_spec(spec: Any) -> Spec:
    """Everything that `quantize` takes as its quantizer, mappings of module patterns included."""
    if isinstance(spec, Mapping) and "name" not in spec:
        if not spec or not all(isinstance(k, str) for k in spec):
            raise BadOption("a mapping of quantizers has module patterns as its keys, such as {'*.mlp.*': 'nf4'}")
        quantizers = {k: None if v is None else get_quantizer(v) for k, v in spec.items()}
        for pattern, value in spec.items():
            if _only(value):
                raise BadOption(f"modules_in_block_to_quantize under the pattern {pattern!r}: write patterns for them")
        data = next((v for v in spec.values() if _dataset(v) is not None), None)
        skips = tuple(dict.fromkeys(s for v in spec.values() for s in _skips(v)))
        return Spec(quantizers, skips, _dataset(data), _tokenizer(data))
    quantizer = get_quantizer(spec)
    names = [f"*{name}" for name in _only(spec)] or ["*"]
    return Spec(dict.fromkeys(names, quantizer), _skips(spec), _dataset(spec), _tokenizer(spec))


def _skips(spec: Any) -> tuple[str, ...]:
    """Modules that a transformers config leaves in float: they add to the default skips, and do not replace them."""
    named = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")
    skips = [module for name in named for module in getattr(spec, name, None) or ()]
    weights = getattr(spec, "linear_weights_not_to_quantize", None) or ()
    return tuple(dict.fromkeys([*skips, *(w.removesuffix(".weight") for w in weights)]))


def _only(spec: Any) -> list[str]:
    """The only layers that a transformers config wants quantized, by how their names end; none for all."""
    groups = getattr(spec, "modules_in_block_to_quantize", None) if hasattr(spec, "quant_method") else None
    return [name for group in groups or () for name in ([group] if isinstance(group, str) else group)]


def _dataset(spec: Any) -> Any:
    return getattr(spec, "dataset", None) if hasattr(spec, "quant_method") else None


def _tokenizer(spec: Any) -> Any:
    tokenizer = getattr(spec, "tokenizer", None) if _dataset(spec) is not None else None
    if not isinstance(tokenizer, str):
        return tokenizer
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(tokenizer)
    except Exception as error:
        raise BadOption(
            f"the tokenizer {tokenizer!r} of the {type(spec).__name__} cannot be loaded: {error}"
        ) from error


def capabilities(spec: Any) -> Capabilities:
    """What a quantizer's configuration can do on this machine; see `Capabilities`.

    Raises:
        UnknownQuantizer, BadOption: as `get_quantizer` does. A missing package is no error here.
    """
    return _build(spec).capabilities


def available_quantizers() -> Mapping[str, QuantizerInfo]:
    """Every registered quantizer by name, with its state on this machine. Imports no backend's package."""
    infos = {}
    entries = {**{n: Entry(f"{p.module}:{p.attr}") for n, p in _third_parties().items()}, **_entries}
    for name in sorted(entries, key=lambda n: (n not in _entries, n)):
        infos[name] = _info(name, entries[name])
    return MappingProxyType(infos)


def _info(name: str, entry: Entry) -> QuantizerInfo:
    try:
        cls = entry.load()
    except Exception as error:  # a third party's module may raise anything
        return QuantizerInfo(name, "unusable", f"{type(error).__name__}: {error}", entry.summary)
    summary = entry.summary or (cls.__doc__ or "").strip().partition("\n")[0]
    problem = cls.problem()
    if problem is None:
        return QuantizerInfo(name, "ready", "", summary)
    state, hint = problem
    if hasattr(cls, "fallback"):
        return QuantizerInfo(name, "ready", f"through the reference quantizer, more slowly; {hint}", summary)
    return QuantizerInfo(name, state, hint, summary)


@lru_cache
def _owners(cls: type[nn.Module]) -> tuple[type[Quantizer], ...]:
    """The backends that may own layers of a class; looked up once a class, since models have thousands of modules."""
    names = _names(cls)
    return tuple(backend for backend in _loaded() if names.intersection(backend.layer_types))


@lru_cache
def _converter(cls: type[nn.Module]) -> type[Quantizer] | None:
    names = _names(cls)
    return next((backend for backend in _loaded() if names.intersection(backend.foreign_types)), None)


def _names(cls: type) -> set[str]:
    return {f"{c.__module__}.{c.__qualname__}" for c in cls.__mro__}


def converted(module: nn.Module) -> nn.Module | None:
    """A backend's own layer over the codes of another tool's layer, or None where `module` is none that it knows."""
    backend = _converter(type(module))  # type: ignore[arg-type]
    return None if backend is None else backend.converted(module)


def quantizer_of(module: nn.Module) -> Quantizer | None:
    """The quantizer of a quantized layer, whoever quantized it, or None."""
    known = module.__dict__.get("_qft_quantizer")
    if known is not None:
        return known
    own = module.__dict__.get("quantizer")  # a PackedLinear
    if isinstance(own, Quantizer):
        return own
    for cls in _owners(type(module)):  # type: ignore[arg-type]
        quantizer = cls.recognise(module)
        if quantizer is not None:
            quantizer.adopt(module)
            module._qft_quantizer = quantizer
            return quantizer
    return None

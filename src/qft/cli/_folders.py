"""From folder to folder: quantize a model and store it, merge an adapter and store what comes of it.

Each takes `dry_run=True`, checks what can be checked without weights, and says what it would write and how large.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from qft.cli._outputs import check_output, merged_size, quantized_size
from qft.core import record
from qft.core.devices import check_device
from qft.core.files import atomic_folder, check_model_path, is_adapter
from qft.core.quantizer import as_float_dtype
from qft.core.registry import parse_spec
from qft.data.files import read_texts
from qft.errors import BadFolder, BadOption, NeedsCalibration, UnsupportedOperation
from qft.lora.merging.merge import merge
from qft.pipeline.audit.measure import audit
from qft.pipeline.from_pretrained import check_files, stored_quantization
from qft.pipeline.quantize import quantize
from qft.saving.export import FORMATS, export, no_progress_bar
from qft.saving.open import base_of, find_tokenizer, open_model

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-?????-of-?????.safetensors")


@dataclass(frozen=True)
class Written:
    """What was written, or with `dry_run` would be.

    Attributes:
        nbytes: of all files; of the weights, estimated, in a dry run.
        files: name → bytes; none in a dry run.
        what: in a few words.
        report: figures of what was done: an audit's, or a merge's.
    """

    folder: str
    nbytes: int
    what: str
    dry_run: bool = False
    files: dict[str, int] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def quantize_folder(
    model: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    quantizer: Any = "nf4",
    *,
    calibration: str | os.PathLike[str] | None = None,
    dtype: Any = "auto",
    device: Any = None,
    skip: Any = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: bool = True,
) -> Written:
    """Load a float model, quantize it, and store it with its tokenizer, as transformers (with qft installed) loads it.

    Args:
        model: its folder, or an id of the hub.
        folder: to write; an existing one that is not empty only with `overwrite`.
        calibration: a file of texts, as `qft.data.files.read_texts` takes it.
        (the others): as `qft.quantize` takes them.

    Raises:
        UnsupportedOperation: a quantizer whose models cannot be stored.
        BadFolder: the paths, a full disk. What `qft.quantize` raises. Nothing was written.
    """
    source = check_model_path(model)
    spec = parse_spec(quantizer)
    chosen = [q for q in spec.quantizers.values() if q is not None]
    for q in chosen:
        if not q.capabilities.serializable:
            raise UnsupportedOperation(f"{q!r} cannot be stored (capability serializable): quantize while loading")
    if len(chosen) != 1:
        raise UnsupportedOperation("a model with several quantizers has no format of its own yet: give one")
    check_device(device)
    if is_adapter(source):
        raise BadOption(f"{source} holds an adapter: give its base model, or qft merge to merge the two")
    if stored := stored_quantization(source, {}):
        raise BadOption(f"{source} is quantized already ({stored}): give the float model")
    tokenizer, texts = find_tokenizer(source), None
    if calibration is not None:
        texts = read_texts(calibration, tokenizer)
        if tokenizer is None:
            raise BadFolder(f"{source} holds no tokenizer that can be read, and the calibration data is texts")
    elif chosen[0].capabilities.needs_calibration:
        raise NeedsCalibration(f"{chosen[0]!r} needs calibration data: give a file of texts, --calibration data.jsonl")
    if os.path.isdir(source):
        check_files(Path(source))
    nbytes = quantized_size(source, spec, skip, dtype)
    check_output(folder, overwrite, [source], nbytes)
    what = f"{Path(source).name} in {chosen[0]!r}"
    if dry_run:
        return Written(os.fspath(folder), nbytes, what, True)
    quantized = quantize(
        source,
        quantizer,
        calibration=texts,
        tokenizer=tokenizer if texts is not None else None,
        skip=skip,
        device=device,
        progress=progress,
        dtype=dtype,
    )
    figures = audit(quantized)
    report = {key: getattr(figures, key) for key in ("bits_per_weight", "nbytes", "float_bytes")}
    report |= {"layers": len(figures.weights), "left": figures.left}
    _store(quantized, folder, tokenizer)
    return _written(folder, what, report)


def merge_folder(
    adapter: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    base: str | None = None,
    into: str = "float",
    dtype: Any = None,
    original: str | None = None,
    device: Any = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Written:
    """Merge an adapter into its base, and store the plain model with its tokenizer.

    Args:
        adapter: its folder.
        base: default what the adapter's own files name.
        into: "float", as `qft.export` writes it, or "quantized", the base's own format.
        dtype: of the floats.
        original: folder of the float model: its weights are merged into, instead of the dequantized ones.

    Raises:
        BadFolder, BadOption: the paths and options. What `qft.load`, `qft.merge` and `qft.export` raise.
    """
    if into not in ("float", "quantized"):
        raise BadOption(f"into={into!r}; it is 'float' or 'quantized'")
    if into == "quantized" and dtype is not None:
        raise BadOption("dtype is of floats, and the merge goes into the quantized weights: leave it out")
    source = check_model_path(adapter)
    if os.path.isdir(source) and (Path(source) / "config.json").is_file() and not is_adapter(source):
        raise BadOption(f"{source} holds a model and no adapter: qft export writes its weights as floats")
    return _from_adapter(
        source, folder, base, into, "safetensors", dtype, original, device, overwrite, dry_run, "the merged model"
    )


def export_folder(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    format: str = "safetensors",
    base: str | None = None,
    dtype: Any = None,
    original: str | None = None,
    device: Any = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Written:
    """Export an adapter merged into its base, or a quantized model, as floats: `qft.export` from folder to folder.

    Raises:
        BadFolder, BadOption: the paths and options. What `qft.load` and `qft.export` raise.
    """
    if format not in FORMATS:
        raise BadOption(f"format={format!r} is not known; the formats are {', '.join(FORMATS)}")
    source = check_model_path(source)
    return _from_adapter(
        source, folder, base, "float", format, dtype, original, device, overwrite, dry_run, f"floats, as {format}"
    )


def _from_adapter(
    source: str, folder: Any, base: str | None, into: str, format: str, dtype: Any, original: str | None, device: Any,
    overwrite: bool, dry_run: bool, what: str,
) -> Written:  # fmt: skip
    wanted = None if dtype is None else as_float_dtype(dtype)
    check_device(device)
    for path in (base, original):
        if path is not None:
            check_model_path(path)
    named = base_of(source, base)
    if named is None and dry_run:
        raise BadFolder(f"{source} does not name its base model: give --base")
    nbytes = 0 if named is None else merged_size(source, named, into, wanted)
    check_output(folder, overwrite, [p for p in (source, base, original) if p is not None], nbytes)
    if dry_run:
        return Written(os.fspath(folder), nbytes, what, True)
    model = open_model(source, base, device=device)
    tokenizer = find_tokenizer(source, named)
    if into == "float":
        report = export(model, folder, dtype=dtype, original=original, format=format, tokenizer=tokenizer)
        return _written(folder, what, _summary(report))
    if not record.base_model(model).hf_quantizer.is_serializable():
        raise UnsupportedOperation("this quantized base has no format of its own: merge into float")
    report = merge(model, original=original)
    _store(model.unload(), folder, tokenizer)  # type: ignore[operator]
    return _written(folder, what, _summary(report))


def _summary(report: Any) -> dict[str, Any]:
    found = {key: getattr(report, key) for key in ("route", "source", "survived", "relative_error", "recommendation")}
    return {**found, "weights": len(report.weights)}


def _store(model: nn.Module, folder: Any, tokenizer: Any) -> None:
    """A quantized model and its tokenizer, under a temporary name until all of it is there."""
    if not model.hf_quantizer.is_serializable():  # type: ignore[union-attr]
        raise UnsupportedOperation("this quantized model has no format of its own, and cannot be stored")
    with atomic_folder(folder, drop=WEIGHTS) as partial, no_progress_bar():
        model.save_pretrained(partial)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)


def _written(folder: Any, what: str, report: dict[str, Any]) -> Written:
    files = {str(p.relative_to(folder)): p.stat().st_size for p in sorted(Path(folder).rglob("*")) if p.is_file()}
    return Written(os.fspath(folder), sum(files.values()), what, False, files, report)

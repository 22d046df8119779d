"""Save adapters, and the base under them where it is asked for, under a temporary name that is renamed at the end."""

from __future__ import annotations

import glob
import json
import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import nn

from qft import marks
from qft.classifiers import noted_classes
from qft.errors import BadFolder, BadOption, QftError, UnsupportedOperation
from qft.hf import bare_state_dict
from qft.starts import save_starts

NOTE = "qft.json"


@contextmanager
def atomic_folder(folder: str | os.PathLike[str], *, drop: Sequence[str] = ()) -> Iterator[Path]:
    """A temporary folder that takes the place of `folder` when the block ends well; else the old one stays.

    Files of the old folder that the new one does not write are kept, save those that match a pattern of `drop`.
    """
    final = as_path(folder)
    if os.path.exists(final) and not os.path.isdir(final):  # False, too, where looking is not allowed
        raise BadFolder(f"{final} is a file, and a folder is to be written there")
    host = f".{final.name}.partial-{platform.node()}-"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        for left in final.parent.glob(f"{glob.escape(host)}*"):  # by a process that was killed
            if not _alive(left.name.removeprefix(host)):
                shutil.rmtree(left, ignore_errors=True)
        partial = final.parent / f"{host}{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise BadFolder(f"cannot write to {final}: {error.strerror or error}") from error
    try:
        yield partial
        final.mkdir(exist_ok=True)
        _move_in(partial, final, drop)
    except OSError as error:
        if isinstance(error, QftError):
            raise
        raise BadFolder(f"cannot write to {final}: {error.strerror or error}") from error
    except SafetensorError as error:  # what the system refuses its writer, such as a full disk
        raise BadFolder(f"cannot write to {final}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _move_in(partial: Path, final: Path, drop: Sequence[str]) -> None:
    """Give every new file its place; where one cannot have it, all old ones are put back."""
    new = sorted(partial.rglob("*"))
    old = {path for pattern in drop for path in final.glob(pattern)}
    old |= {final / path.relative_to(partial) for path in new}
    attic = partial / ".replaced"
    attic.mkdir()
    moves = [(path, attic / str(i)) for i, path in enumerate(sorted(old)) if path.is_file()]
    moves += [(path, final / path.relative_to(partial)) for path in new if not path.is_dir()]
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(source, target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            os.replace(target, source)
        raise


def as_path(folder: Any) -> Path:
    try:
        return Path(folder)
    except TypeError:
        raise BadOption(f"give the path of a folder, not a {type(folder).__name__}") from None


def _alive(pid: str) -> bool:
    import psutil  # comes with accelerate and PEFT

    return pid.isdecimal() and psutil.pid_exists(int(pid))


def save(model: nn.Module, folder: str | os.PathLike[str], *, base: bool = False) -> None:
    """Save an adapter, and with `base` the quantized model under it, in one folder.

    Writes PEFT's own adapter files, which plain PEFT loads over the same base, and `qft.json`: the quantizers, the
    base's fingerprint and the init; beside an adapter that did not start at zero, `start.safetensors`. Everything is
    written under a temporary name and renamed at the end. The base is stored in
    `folder/base` where `base=True`, and always where it is not q(W), as after iterated LoftQ.

    Args:
        model: what `qft.wrap` or `qft.quantize_and_wrap` returned.
        folder: created where it does not exist.
        base: store the quantized base too.

    Raises:
        BadOption: a model without adapters, or with merged ones.
        UnsupportedOperation: the base must be stored, and its backend cannot.
        BadFolder: the folder cannot be written; what was there before is intact.
    """
    record = marks.record_of(model)
    if not hasattr(model, "peft_config"):
        raise BadOption(
            "qft.save stores adapters, and this model has none: wrap it first, or use model.save_pretrained"
        )
    merged = [n for n, m in model.named_modules() if getattr(m, "merged_adapters", None)]
    if merged:
        raise BadOption(f"adapters are merged into {len(merged)} weights: call qft.unmerge(model) before saving")
    with atomic_folder(folder) as partial:
        model.save_pretrained(partial)
        save_starts(model, partial, as_path(folder))
        if record is not None:
            stores_base = base or record.base_changed
            note = {**_note(record, stores_base), **noted_classes(marks.base_model(model))}
            (partial / NOTE).write_text(json.dumps(note, indent=1))
            if stores_base:
                _save_base(model, partial / "base", record)


def _note(record: marks.Record, stores_base: bool) -> dict[str, Any]:
    import qft

    quantizers = list(dict.fromkeys(record.quantizers.values()))
    return {
        "format": 1,
        "qft": qft.__version__,
        "quantizers": [q.to_dict() for q in quantizers],
        "layers": {n: quantizers.index(q) for n, q in record.quantizers.items()},
        "init": record.init,
        "forward": record.forward,
        "base_stored": stores_base,
        "base_changed": record.base_changed,
        "base_merged": record.merged,
        "fingerprint": {
            n: [list(shape), [float(f"{v:.6g}") for v in values]] for n, (shape, values) in record.fingerprint.items()
        },
    }


def read_note(folder: str | os.PathLike[str]) -> dict[str, Any] | None:
    """`qft.json` of a saved folder, or None where plain PEFT wrote it.

    Raises:
        BadFolder: it is not one that qft wrote.
    """
    path = Path(folder) / NOTE
    if not path.exists():
        return None
    try:
        note = json.loads(path.read_text())
        if note["format"] != 1:
            raise BadFolder(f"{path} has format {note['format']}, which this version of qft does not read")
        note["fingerprint"] = {n: (tuple(s), [float(x) for x in v]) for n, (s, v) in note["fingerprint"].items()}
        names = [q["name"] for q in note["quantizers"]]
        note["layers"] = {str(n): range(len(names))[i] for n, i in note["layers"].items()}
        note.setdefault("base_merged", False)
        for flag in ("base_stored", "base_changed", "base_merged"):
            if not isinstance(note[flag], bool):
                raise TypeError(f"{flag} is {note[flag]!r}")
        return note
    except BadFolder:
        raise
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise BadFolder(f"{path} is not a file that qft wrote, or is damaged: {error!r}") from error


def _save_base(model: nn.Module, folder: Path, record: marks.Record) -> None:
    """The quantized base without its adapters, in its own format; plain modules as one safetensors file."""
    base = marks.base_model(model)
    bad = [q for q in record.quantizers.values() if not q.capabilities.serializable]
    if bad:
        raise UnsupportedOperation(f"the base must be stored too, and {bad[0]!r} cannot be (capability serializable)")
    if hasattr(base, "save_pretrained"):
        if base.hf_quantizer is not None and not base.hf_quantizer.is_serializable():
            raise UnsupportedOperation(
                "the base must be stored too, and a model with several quantizers has no format of its own yet"
            )
        _save_pretrained_bare(base, folder)
    else:
        from safetensors.torch import save_file

        folder.mkdir()
        save_file({k: v.contiguous() for k, v in bare_state_dict(base).items()}, folder / "model.safetensors")


def _save_pretrained_bare(base: nn.Module, folder: Path) -> None:
    # transformers saves only adapters where it sees any
    loaded = base.__dict__.pop("_hf_peft_config_loaded", None)
    peft_config = base.__dict__.pop("peft_config", None)
    try:
        base.save_pretrained(folder)
    finally:
        if loaded is not None:
            base._hf_peft_config_loaded = loaded
        if peft_config is not None:
            base.peft_config = peft_config

"""The folder of a run: its note, `training.json`, its checkpoints, and whether it may be continued."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from qft.core.files import as_path
from qft.errors import BadFolder, BadOption
from qft.training.config import TrainConfig, fields

NOTE = "training.json"
LOCK = ".lock"
PARTIAL = ".partial-"
_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")
FREE = (
    "project_name", "data_path", "resume", "progress", "log", "logging_steps", "save_steps", "save_total_limit",
    "max_seconds",
)  # fmt: skip
"""Fields that may differ when a run is continued: data goes by its content, and the others change no step's outcome."""


class RunFolder:
    """Where a run writes. A checkpoint has its name only once it is whole; what a killed run left half-written is removed."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = as_path(os.path.expanduser(path), "project_name: ")

    def note(self) -> dict[str, Any] | None:
        """What `training.json` says, or None without one."""
        try:
            note = json.loads((self.path / NOTE).read_text(encoding="utf-8"))
            if note["format"] != 1 or not isinstance(note["config"], dict):
                raise ValueError(f"format {note['format']}")
            return note
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise BadFolder(f"cannot read {self.path / NOTE}: {error.strerror}") from error
        except (ValueError, LookupError, TypeError) as error:
            raise BadFolder(
                f"{self.path / NOTE} is not a note of this version of qft, or is damaged: {error}"
            ) from error

    def check(self, config: TrainConfig, digests: dict[str, str]) -> dict[str, Any] | None:
        """The note of the run to go on with, or None where a new one begins. Nothing is changed.

        Raises:
            BadOption: a run of another configuration, or over other data or another model, is here.
            BadFolder: the folder is something else's, or cannot be read.
        """
        if self.path.exists() and not self.path.is_dir():
            raise BadFolder(f"project_name: {self.path} is a file, and a folder is to be written there")
        note = self.note()
        if note is None:
            try:
                others = (
                    [n for n in sorted(os.listdir(self.path)) if not n.startswith(".")] if self.path.exists() else []
                )
            except OSError as error:
                raise BadFolder(f"project_name: cannot read {self.path}: {error.strerror}") from error
            if others:
                raise BadFolder(
                    f"project_name: {self.path} holds {', '.join(others[:3])}{' ...' * (len(others) > 3)} and no run of qft's: "
                    "choose a new or an empty folder"
                )
            return None
        if config.resume == "restart" or note["state"] == "clearing":
            return None
        defaults = {name: field.default for name, field in fields().items()}
        now, then = config.to_dict(), {**defaults, **note["config"]}
        changed = [
            f"{k} was {then.get(k)!r} and is {v!r}" for k, v in now.items() if k not in FREE and then.get(k) != v
        ]
        changed += [f"the {k} is another" for k, v in digests.items() if note["digests"].get(k, "") != v]
        if changed:
            raise BadOption(
                f"{self.path} holds a run with other settings: {'; '.join(changed)}. Give those to go on with it, another "
                "project_name for another run, or resume='restart' to begin anew"
            )
        return note

    def begin(self, config: TrainConfig, digests: dict[str, str], note: dict[str, Any] | None) -> None:
        """Make the folder, or what an earlier run left in it ready.

        Raises:
            BadFolder: it cannot be written.
        """
        from qft.core.version import __version__

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for left in self.path.glob(f"{PARTIAL}*"):
                shutil.rmtree(left, ignore_errors=True)
            if note is None:
                note = {"format": 1, "qft": __version__, "config": config.to_dict(), "digests": digests}
                self.write({**note, "state": "clearing"})  # a kill in between leaves nothing to go on with
                for name in ("adapter", "model", "merged", "runs", *self._all_checkpoints()):
                    shutil.rmtree(self.path / name, ignore_errors=True)
                self.write({**note, "state": "running"})
        except OSError as error:
            raise BadFolder(f"project_name: cannot write to {self.path}: {error.strerror or error}") from error

    def abandon(self) -> None:
        """Undo `begin` for a run that was refused, so that the folder does not keep its settings."""
        for name in (NOTE, LOCK):
            (self.path / name).unlink(missing_ok=True)
        with suppress(OSError):  # something else is in it
            self.path.rmdir()

    def write(self, note: dict[str, Any]) -> None:
        """Put this in the place of the note, whole or not at all."""
        partial = self.path / f"{PARTIAL}note"
        try:
            with open(partial, "w", encoding="utf-8") as file:
                json.dump(note, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.path / NOTE)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise BadFolder(f"cannot write {self.path / NOTE}: {error.strerror or error}") from error

    def check_there(self) -> None:
        """Refuse to go on where the folder was deleted during the run.

        Raises:
            BadFolder: the run's note is not there any more.
        """
        if not (self.path / NOTE).is_file():
            raise BadFolder(f"{self.path} was deleted while this run was writing to it: start the run again")

    def checkpoints(self) -> list[tuple[int, Path]]:
        """Whole checkpoints, by step."""
        try:
            names = os.listdir(self.path)
        except OSError:
            return []
        found = [(int(m[1]), self.path / m[0]) for m in map(_CHECKPOINT.match, names) if m]
        return sorted((step, path) for step, path in found if _whole(path))

    def _all_checkpoints(self) -> list[str]:
        return [name for name in os.listdir(self.path) if _CHECKPOINT.match(name)]

    @property
    def last(self) -> Path | None:
        """The checkpoint that a run goes on from."""
        found = self.checkpoints()
        return found[-1][1] if found else None

    def adopt(self, partial: Path, keep: int) -> Path:
        """Give a checkpoint that is whole its name, and remove the oldest beyond `keep`."""
        for file in partial.rglob("*"):
            if file.is_file():
                _sync(file)
        final = self.path / partial.name
        self._remove(final)
        os.replace(partial, final)
        _sync(self.path)
        for _, path in self.checkpoints()[:-keep]:
            self._remove(path)
        return final

    def _remove(self, path: Path) -> None:
        """Its name goes first: what is half-removed is no checkpoint."""
        if path.exists():
            trash = self.path / f"{PARTIAL}trash-{path.name}"
            shutil.rmtree(trash, ignore_errors=True)
            os.replace(path, trash)
            shutil.rmtree(trash, ignore_errors=True)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """The only process that trains into this folder; a kill lets go of it.

        Raises:
            BadFolder: another one does.
        """
        try:
            import fcntl
        except ImportError:  # Windows
            yield
            return
        lock = self.path / LOCK
        with open(lock, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise BadFolder(f"project_name: another process is training into {self.path}") from error
            yield


def _whole(path: Path) -> bool:
    try:
        json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return any(path.glob("*.safetensors")) and (path / "optimizer.pt").is_file() and (path / "scheduler.pt").is_file()


def _sync(path: Path) -> None:
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)

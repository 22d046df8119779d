"""Read the index of a sharded checkpoint: which file of the folder holds which tensor."""

from __future__ import annotations

import json
from pathlib import Path

from qft.errors import BadFolder


def read_weight_map(index: str | Path) -> dict[str, str]:
    """Read `weight_map` of an index and check that every file that it names is in the folder of the index.

    The check reads the names only, because caches of the hub link files to another folder.

    Args:
        index: the path of a `model.safetensors.index.json`.

    Returns:
        The name of each tensor and its file, relative to the folder of the index.

    Raises:
        BadFolder: the index cannot be read, has another form, or names a file outside its folder.
    """
    try:
        found = json.loads(Path(index).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadFolder(f"{index} is damaged: {error}; download or save the folder again") from error
    files = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise BadFolder(
            f"{index} is damaged: its 'weight_map' does not name a file for each tensor; download or save the folder again"
        )
    for name in set(files.values()):
        parts = name.replace("\\", "/").split("/")
        if "\0" in name or ":" in parts[0] or ".." in parts or not all(parts):
            raise BadFolder(
                f"{index} names {name!r}, which is not a file of its folder: do not use this checkpoint unless you "
                "trust it; a correct index holds plain file names"
            )
    return files

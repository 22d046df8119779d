"""SIGTERM ends a run with a checkpoint, and the same call ends as a run without it."""

import os
import signal
import threading

import pytest
from safetensors.torch import load_file
from tiny_training import chats, quick, save_model, write_jsonl
from transformers import Trainer, TrainerCallback

import qft


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


class _Kill(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("step", [0, 2, 5])
def test_a_run_ended_by_sigterm_goes_on_to_the_same_numbers(model, tmp_path, caplog, step):
    data = write_jsonl(tmp_path / "d.jsonl", chats())
    call = {"model": model, "data_path": data, **quick(save_steps=4, lora_dropout=0.1)}
    whole = qft.train(project_name=str(tmp_path / "whole"), **call)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        plain = Trainer.train

        def train(self, *args, **kwargs):
            self.add_callback(_Kill(step))
            return plain(self, *args, **kwargs)

        patch.setattr(Trainer, "train", train)
        with pytest.raises(SystemExit) as stopped:
            qft.train(project_name=str(tmp_path / "cut"), **call)
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before
    assert f"checkpoint-{step + 1}" in caplog.text
    assert not (tmp_path / "cut" / "adapter").exists()
    result = qft.train(project_name=str(tmp_path / "cut"), **call)
    assert result.resumed_from == str(tmp_path / "cut" / f"checkpoint-{step + 1}")
    assert (result.steps, result.loss) == (whole.steps, whole.loss)
    ours, theirs = (load_file(f"{r.adapter}/adapter_model.safetensors") for r in (result, whole))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


class _KillAt(TrainerCallback):
    """Sends SIGTERM once, at an event of the step `step`."""

    def __init__(self, event, step):
        self.step, self.evaluated = step, 0
        setattr(self, event, self.kill)

    def kill(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_evaluate(self, args, state, control, **kwargs):
        self.evaluated += 1


@pytest.mark.parametrize("event", ["on_prediction_step", "on_save"])
def test_sigterm_during_an_evaluation_or_a_save_stops_at_this_step(model, tmp_path, caplog, event):
    data = write_jsonl(tmp_path / "d.jsonl", chats(24))
    call = {"model": model, "data_path": data, "valid_split": data, **quick(lora_dropout=0.1)}
    whole = qft.train(project_name=str(tmp_path / "whole"), **call)
    killing = _KillAt(event, 2)
    with pytest.MonkeyPatch.context() as patch:
        plain = Trainer.train

        def train(self, *args, **kwargs):
            self.callback_handler.callbacks.insert(0, killing)  # before the one that handles it
            return plain(self, *args, **kwargs)

        patch.setattr(Trainer, "train", train)
        with pytest.raises(SystemExit) as stopped:
            qft.train(project_name=str(tmp_path / "cut"), **call)
    assert stopped.value.code == 143 and "checkpoint-2" in caplog.text
    assert killing.evaluated == (event == "on_save")
    result = qft.train(project_name=str(tmp_path / "cut"), **call)
    assert result.resumed_from == str(tmp_path / "cut" / "checkpoint-2")
    assert (result.steps, result.loss, result.evaluation) == (whole.steps, whole.loss, whole.evaluation)
    ours, theirs = (load_file(f"{r.adapter}/adapter_model.safetensors") for r in (result, whole))
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_auto_says_that_the_same_call_goes_on(model, tmp_path, caplog, monkeypatch):
    data = write_jsonl(tmp_path / "d.jsonl", chats(24))
    call = {"out": tmp_path / "out", "memory": "8GiB", "device": "cpu", "steps": 1, "progress": False}
    monkeypatch.setattr("qft.training.run.train", lambda config: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        qft.auto(model, data, **call)
    assert stopped.value.code == 143 and f"goes on with what {tmp_path / 'out'} holds" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is before
    monkeypatch.undo()
    assert qft.auto(model, data, **call).resumed


def test_a_run_that_sigterm_ends_while_it_loads_starts_again(model, tmp_path, caplog):
    from qft.training import run

    data = write_jsonl(tmp_path / "d.jsonl", chats())
    call = {"model": model, "data_path": data, "project_name": str(tmp_path / "out"), **quick(max_steps=1)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_model", lambda prepared: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(SystemExit) as stopped:
            qft.train(**call)
    assert stopped.value.code == 143 and "no checkpoint yet" in caplog.text
    assert qft.train(**call).steps == 1


def test_handlers_are_left_alone_outside_of_the_main_thread(model, tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", chats())
    found = []
    call = {"model": model, "data_path": data, "project_name": str(tmp_path / "out"), **quick(max_steps=1)}
    thread = threading.Thread(target=lambda: found.append(qft.train(**call).steps))
    thread.start()
    thread.join()
    assert found == [1]

"""The demo times its first window and steps, and ends in time on machines of any speed."""

import pytest
from models import llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qft.cli import _demo, _demo_budget
from qft.errors import BadOption


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    llama(vocab_size=256, max_position_embeddings=1024).save_pretrained(path)
    vocabulary = {chr(i): i for i in range(256)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", eos_token="\x00").save_pretrained(path)
    return str(path)


class Machine:
    """A clock that goes on by so many seconds for each forward pass of a window and of a step, and for each loading."""

    def __init__(self, window, step, load=1.0, slower_after=None, slower=1.0):
        self.now, self.window, self.step, self.load = 0.0, window, step, load
        self.steps, self.slower_after, self.slower = 0, slower_after, slower

    def forward(self, module, args, kwargs):
        length = kwargs["input_ids"].shape[-1]
        if module.training:
            self.steps += 1
            late = self.slower_after is not None and self.steps > self.slower_after
            self.now += self.step * (self.slower if late else 1)
        else:
            self.now += self.window * length / _demo.WINDOW


@pytest.fixture
def on(monkeypatch, folder, tmp_path):
    """Runs the demo on a machine."""

    def run(machine, **options):
        plain = _demo.load_model

        def load(*args):
            model = plain(*args)
            machine.now += machine.load
            model.register_forward_pre_hook(machine.forward, with_kwargs=True)
            return model

        monkeypatch.setattr(_demo_budget, "clock", lambda: machine.now)
        monkeypatch.setattr(_demo, "load_model", load)
        return _demo.run_demo(folder, out=tmp_path / "out", progress=False, **options)

    return run


def test_a_fast_machine_does_all(on):
    machine = Machine(window=0.5, step=1.0)
    result = on(machine)
    assert (result.steps, result.held_out_windows, machine.steps) == (100, 8, 100)
    assert machine.now < 300 and "within 5 minutes" in result.sized


@pytest.mark.parametrize("factor", [3, 20])
def test_a_slow_machine_does_less_and_ends_in_time(on, factor):
    machine = Machine(window=1.0 * factor, step=2.0 * factor, load=1.0 * factor)
    result = on(machine)
    assert 1 <= result.steps < 100 and result.steps == machine.steps
    assert 1 <= result.held_out_windows <= 8
    assert 100 < machine.now < 300
    assert (
        f"{result.steps} training step" in result.sized and f"{result.held_out_windows} held-out window" in result.sized
    )


def test_a_machine_that_becomes_slow_after_some_steps_ends_in_time(on):
    machine = Machine(window=0.5, step=1.0, slower_after=10, slower=8)
    result = on(machine)
    assert 10 < result.steps < 60 and machine.now < 300


def test_one_slow_step_among_many_does_not_end_the_run(on):
    machine = Machine(window=0.5, step=1.0, slower_after=10, slower=20)
    plain = machine.forward

    def once(module, args, kwargs):
        plain(module, args, kwargs)
        if machine.steps == 11:
            machine.slower = 1

    machine.forward = once
    assert on(machine).steps > 60


def test_a_hopeless_machine_takes_one_window_and_one_step(on):
    machine = Machine(window=200.0, step=400.0)
    result = on(machine)
    assert (result.steps, result.held_out_windows) == (1, 1)


def test_the_float_model_is_tuned_for_as_many_steps(on):
    machine = Machine(window=4.0, step=4.0)
    result = on(machine, compare_float=True)
    assert machine.steps == 2 * result.steps and machine.now < 300
    assert result.gap is not None


def test_the_limit_can_be_chosen(on):
    assert on(Machine(window=4.0, step=4.0), minutes=10.0).steps > on(Machine(window=4.0, step=4.0), minutes=4.0).steps


def test_steps_that_are_given_are_made_whatever_they_take(on):
    machine = Machine(window=50.0, step=100.0)
    result = on(machine, steps=5)
    assert (result.steps, machine.steps, result.held_out_windows, result.sized) == (5, 5, 8, "")


@pytest.mark.parametrize("minutes", [0.0, -1.0, float("nan"), float("inf")])
def test_limits_that_are_no_time_are_refused(folder, minutes):
    with pytest.raises(BadOption, match="minutes"):
        _demo.run_demo(folder, minutes=minutes, progress=False)


def test_the_learning_rate_falls_with_the_steps(on, monkeypatch):
    rates, plain = [], _demo.torch.optim.AdamW.step

    def step(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(_demo.torch.optim.AdamW, "step", step)
    result = on(Machine(window=4.0, step=8.0), learning_rate=1e-3)
    assert len(rates) == result.steps and rates[0] == 1e-3
    assert rates == sorted(rates, reverse=True) and rates[-1] <= 2e-3 / result.steps

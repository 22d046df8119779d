"""Configs, indexes and numbers that no model has end in one clear error before anything is built."""

import json

import pytest
from safetensors.torch import load_file, save_file
from tiny_training import chats, quick, save_model, write_jsonl

import qft
from qft.errors import AdapterMismatch, BadFolder, BadOption, NonFiniteWeights
from qft.saving.open import base_of

SIZES = {qft.plan: {"sequence_length": 8}, qft.quantize: {}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def changed(folder, tmp_path):
    """Makes a folder like the model's with other values in its config."""
    import shutil

    def make(**values):
        shutil.copytree(folder, tmp_path / "m")
        file = tmp_path / "m" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
        return str(tmp_path / "m")

    return make


@pytest.mark.parametrize("verb", [qft.plan, qft.quantize])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", -32),
        ("num_hidden_layers", 10**9),
        ("num_hidden_layers", 0),
        ("num_attention_heads", "four"),
        ("num_key_value_heads", -1),
        ("vocab_size", 1e3),
        ("intermediate_size", True),
        ("architectures", 5),
        ("architectures", [5]),
    ],
)
def test_a_config_with_an_absurd_field_is_refused_and_the_field_is_named(changed, verb, field, value):
    with pytest.raises(BadFolder, match=field):
        verb(changed(**{field: value}), "nf4", **SIZES[verb])


@pytest.mark.parametrize("verb", [qft.plan, qft.quantize])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_cache", 5),
        ("vocab_size", None),
        ("model_type", []),
        ("dtype", "x"),
        ("hidden_act", "x"),
        ("head_dim", 0),
        ("num_key_value_heads", 0),
        ("pad_token_id", 10**20),
        ("rope_parameters", {"rope_type": "x", "rope_theta": 10**20}),
        ("attention_dropout", 10**20),
    ],
)
def test_a_config_that_builds_no_model_is_refused(changed, verb, field, value):
    with pytest.raises(BadFolder):
        verb(changed(**{field: value}), "nf4", **SIZES[verb])


@pytest.mark.parametrize("name", [5, ["m"], {"a": 1}, True])
def test_a_base_name_that_is_not_text_is_refused(folder, tmp_path, name):
    model = qft.quantize_and_wrap(folder, "nf4", progress=False)
    qft.save(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "base_model_name_or_path": name}))
    for verb in (qft.load, lambda path: base_of(str(path), None)):
        with pytest.raises(BadFolder, match=r"base_model_name_or_path is .*; it is a text"):
            verb(tmp_path)


@pytest.mark.parametrize(
    ("field", "value"), [("eos_token", 5), ("tokenizer_class", ["x"]), ("extra_special_tokens", "x"), ("pad_token", -1)]
)
def test_a_tokenizer_config_of_other_types_is_refused(changed, tmp_path, field, value):
    path = changed()
    file = tmp_path / "m" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), field: value}))
    data = write_jsonl(tmp_path / "d.jsonl", chats())
    with pytest.raises(BadFolder, match="no tokenizer that transformers can load"):
        qft.train(model=path, data_path=data, project_name=str(tmp_path / "out"), **quick())


@pytest.mark.parametrize(
    "field", [{"lora_alpha": 1e308}, {"lr": 1e308}, {"weight_decay": 1e308}, {"calibration_samples": 0}]
)
def test_numbers_that_float32_cannot_calculate_with_are_refused(field):
    with pytest.raises(BadOption, match=next(iter(field))):
        qft.TrainConfig.from_dict({"model": "m", "data_path": "d", **field})


@pytest.mark.parametrize("memory", ["x", "\0", -1.0, 0.5e-3 - 1])
def test_a_memory_that_is_no_amount_is_refused_whether_it_is_used_or_not(folder, tmp_path, memory):
    data = write_jsonl(tmp_path / "d.jsonl", chats())
    with pytest.raises(BadOption, match="memory"):
        qft.train(model=folder, data_path=data, project_name=str(tmp_path / "out"), **quick(memory=memory))


def test_a_chat_template_named_with_a_zero_byte_is_refused(folder, tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", chats())
    with pytest.raises(BadOption, match="chat_template"):
        qft.train(model=folder, data_path=data, project_name=str(tmp_path / "out"), **quick(chat_template="\0"))


@pytest.mark.parametrize("save_steps", [1, 5])
def test_weights_that_are_infinite_after_the_last_step_are_not_saved(folder, tmp_path, monkeypatch, save_steps):
    from qft.training import config

    monkeypatch.setitem(config.MOST, "lr", 1e38)
    data = write_jsonl(tmp_path / "d.jsonl", chats())
    call = quick(lr=1e38, optimizer="sgd", max_grad_norm=0.0, max_steps=1, save_steps=save_steps)
    with pytest.raises(NonFiniteWeights, match="after step 1: lower lr"):
        qft.train(model=folder, data_path=data, project_name=str(tmp_path / "out"), **call)
    assert not (tmp_path / "out" / "adapter").exists() and not list((tmp_path / "out").glob("checkpoint-*"))


@pytest.mark.parametrize("text", ["[]", "5", "[" * 100_000, "{"])
@pytest.mark.parametrize("verb", [qft.plan, qft.quantize])
def test_a_config_that_is_not_an_object_is_refused(changed, tmp_path, verb, text):
    path = changed()
    (tmp_path / "m" / "config.json").write_text(text)
    with pytest.raises(BadFolder, match=r"config\.json is damaged"):
        verb(path, "nf4", **SIZES[verb])


@pytest.mark.parametrize("text", ["[]", '"text"', "[" * 100_000])
def test_an_adapter_config_that_is_not_an_object_is_refused(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(BadFolder, match=r"adapter_config\.json is damaged"):
        qft.load(tmp_path)
    with pytest.raises(BadFolder, match=r"adapter_config\.json is damaged"):
        base_of(str(tmp_path), None)


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/etc/passwd", "a/../../b.safetensors", ""])
def test_an_index_whose_files_lie_outside_of_the_folder_is_refused(changed, tmp_path, name):
    path = changed()
    (tmp_path / "m" / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    index = {"weight_map": {"lm_head.weight": name}}
    (tmp_path / "m" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(BadFolder, match="not a file of its folder"):
        qft.quantize(path, "nf4")


@pytest.mark.parametrize("number", [10**14, 10**20])
def test_plans_of_absurd_sizes_are_refused(folder, number):
    for option in ("sequence_length", "batch_size"):
        with pytest.raises(BadOption, match=f"{option}={number}"):
            qft.plan(folder, "nf4", **{"sequence_length": 8, option: number})


@pytest.mark.parametrize("field", ["seed", "max_steps", "max_length", "batch_size", "lora_r", "epochs"])
def test_numbers_of_a_run_are_bounded(field):
    with pytest.raises(BadOption, match=rf"{field}=1.*at most"):
        qft.TrainConfig(model="m", data_path="d", **{field: 1e20 if field == "epochs" else 10**20})


def test_yaml_nested_a_thousand_deep_is_refused(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: " + "[" * 2000 + "]" * 2000)
    with pytest.raises(BadOption, match="nested too deep"):
        qft.TrainConfig.from_yaml(file)


LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (LOOPS, "loops too often"),
        ("{% for i in range(200 * 900) %}x{% endfor %}", "refuses this conversation"),
        ("{% for i in range(10**12) %}x{% endfor %}", r"line 1 of the chat template.* holds a power \(\*\*\)"),
        ("{{ 10**10**10 }}", r"holds a power \(\*\*\)"),
        ("\n{{ 'x' * 0x10000000000 }}", "line 2 of the chat template.* holds the number 0x10000000000"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "refuses this conversation"),
        ("{{ 'long' * 1000 }}", "writes 4000 characters"),
    ],
)
def test_a_template_that_costs_too_much_is_refused(folder, tmp_path, monkeypatch, template, message):
    from qft.data import messages

    monkeypatch.setattr(messages, "RENDER_SECONDS", 0.5)
    monkeypatch.setattr(messages, "MOST_CHARACTERS", 3000)
    data = write_jsonl(tmp_path / "d.jsonl", chats())
    call = {"model": folder, "data_path": data, "project_name": str(tmp_path / "out"), "chat_template": template}
    with pytest.raises(BadOption, match=message):
        qft.train(**call, **quick())
    assert not (tmp_path / "out").exists()


def test_a_block_that_ends_in_time_is_not_interrupted_later():
    import time

    from qft.core.deadline import TimeIsUp, deadline

    with deadline(0.05):
        pass
    time.sleep(0.1)
    with pytest.raises(TimeIsUp), deadline(0.05):
        while True:
            pass


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_a_float_weight_with_nan_outside_of_the_quantized_layers_is_refused(changed, tmp_path, name):
    path = changed()
    file = tmp_path / "m" / "model.safetensors"
    tensors = load_file(file)
    tensors[name].view(-1)[-1] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(NonFiniteWeights, match=name):
        qft.quantize(path, "nf4")


@pytest.mark.parametrize("layer", ["model.layers.9.self_attn.q_proj", "model.layers.0.mlp.up_proj"])
def test_adapter_weights_of_layers_that_are_not_adapted_are_refused(folder, tmp_path, layer):
    from peft import LoraConfig

    model = qft.quantize_and_wrap(folder, quantizer="nf4", adapter=LoraConfig(r=2, target_modules=["q_proj"]))
    qft.save(model, tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"base_model.model.{layer}.lora_A.weight"] = next(iter(tensors.values())).clone()
    save_file(tensors, file)
    with pytest.raises(AdapterMismatch, match=layer):
        qft.load(tmp_path / "a", folder)


def test_adapters_on_a_head_that_the_trainer_refuses_end_in_an_option_error(folder, tmp_path):
    data = write_jsonl(tmp_path / "d.jsonl", chats())
    call = {"model": folder, "data_path": data, "project_name": str(tmp_path / "out"), "target_modules": ["lm_head"]}
    with pytest.raises(BadOption, match="lm_head"):
        qft.train(**call, **quick(max_steps=2))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("log", ["none", "tensorboard"])
def test_an_output_folder_that_is_deleted_during_a_run_ends_it_with_one_error(folder, tmp_path, monkeypatch, log):
    import shutil

    from qft.training.trainers import Watch

    out = tmp_path / "out"
    plain = Watch.on_step_end

    def delete(self, args, state, control, **kwargs):
        if state.global_step == 1:
            shutil.rmtree(out)
        plain(self, args, state, control, **kwargs)

    monkeypatch.setattr(Watch, "on_step_end", delete)
    data = write_jsonl(tmp_path / "d.jsonl", chats())
    with pytest.raises(BadFolder, match="out"):
        qft.train(model=folder, data_path=data, project_name=str(out), **quick(log=log))

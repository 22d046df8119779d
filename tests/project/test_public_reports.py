"""Public reports of wrong numbers in fine-tuning over quantized models, each held against the float truth."""

import copy
import json
import math

import pytest
import torch
from helpers import refuses
from models import batch, gpt2, llama, logits, qwen3_moe, relative
from moes import gpt_oss
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_training import chats, quick, save_model, tokenizer, write_jsonl
from transformers import LlamaConfig, LlamaForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from twins import fill, pair

import qft
from qft.errors import BadFolder, BadOption, NoTargets, UnsupportedOperation
from qft.ops.loss import IGNORE
from qft.optimize import optimize

SPECS = ["nf4", "int8", "reference"]
MORE = [*SPECS, "hqq", "torchao"]


@pytest.fixture(autouse=True)
def uncompiled(monkeypatch):
    monkeypatch.setattr(optimize, "switches", optimize.Switches(compile=False))


def tuned(spec="reference", builder=llama, name="default", size=0.03, **options):
    """A quantized model with a random adapter that is not at its start."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 9, "target_modules": ["q_proj", "down_proj"], **options})
    return fill(qft.quantize_and_wrap(builder(), spec, adapter=config, progress=False), name, size=size).eval()


def with_second(model, seed=1, size=0.05, **options):
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], **options})
    model.add_adapter("second", config)
    return fill(model, "second", seed=seed, size=size).eval()


@torch.no_grad()
def outputs(model, ids=None):
    return logits(model, ids).clone()


# ---- huggingface/peft#3531: unmerging DoRA on Conv1D divides along the wrong axis, silently on square weights


@pytest.mark.parametrize("skip", [None, ["h.1"]], ids=["quantized", "some float"])
@pytest.mark.parametrize("spec", MORE)
def test_dora_on_conv1d_comes_back_to_the_bit(spec, skip):
    config = LoraConfig(r=4, target_modules=["c_attn", "c_proj"], use_dora=True)
    ours, theirs = pair(gpt2, spec, config, skip=skip)
    base, tuned = outputs(theirs.unload()), outputs(ours)
    assert relative(tuned, base) > 1e-3
    ours.merge_adapter()
    with ours.disable_adapter():
        assert relative(outputs(ours), base) < 1e-5
    ours.unmerge_adapter()
    assert torch.equal(outputs(ours), tuned)


# ---- huggingface/peft#3756: adapters that are active beside a merged one are left out


@pytest.mark.parametrize("targets", [["q_proj", "down_proj"], ["q_proj", "embed_tokens"], ["lm_head"]], ids=str)
@pytest.mark.parametrize("spec", MORE)
def test_an_active_adapter_beside_a_merged_one(spec, targets):
    model = with_second(tuned(spec, target_modules=targets), target_modules=targets)
    model.base_model.set_adapter(["default", "second"])
    both = outputs(model)
    model.merge_adapter(["default"])
    for compute in (outputs, qft.merge_to_float):
        with pytest.raises(BadOption, match="second is active, and only default is merged"):
            compute(model)
    model.merge_adapter(["second"])
    merged = outputs(model)
    assert relative(outputs(qft.merge_to_float(model)), merged) < 1e-5
    model.unmerge_adapter()
    assert torch.equal(outputs(model), both)
    model.base_model.set_adapter(["default"])
    model.merge_adapter(["default"])
    assert relative(merged, outputs(model)) > 1e-3


# ---- huggingface/peft#1960, #2422: rows of a mixed batch go through the classifier of another adapter


def classifier(dtype=torch.float32):
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_labels=3, pad_token_id=0)
    return LlamaForSequenceClassification(config).to(dtype).eval()


@pytest.mark.parametrize("spec", SPECS)
def test_each_row_of_a_mixed_batch_has_its_own_head(tmp_path, spec):
    model = tuned(spec, classifier, task_type="SEQ_CLS", modules_to_save=["score"])
    model = with_second(model, task_type="SEQ_CLS", modules_to_save=["score"])
    ids, names = batch(shape=(5, 12)).clamp(min=1), ["second", "default", "__base__", "default", "second"]
    alone = {}
    with torch.no_grad():
        for name in ("default", "second"):
            model.set_adapter(name)
            alone[name] = model(input_ids=ids).logits
        with model.disable_adapter():
            alone["__base__"] = model(input_ids=ids).logits
        mixed = model(input_ids=ids, adapter_names=names).logits
    for row, name in enumerate(names):
        assert relative(mixed[row], alone[name][row]) < 1e-5
    assert relative(alone["default"], alone["second"]) > 1e-2
    qft.save(model, tmp_path / "a")
    back = qft.load(tmp_path / "a", classifier()).eval()
    with torch.no_grad():
        assert relative(back(input_ids=ids, adapter_names=names).logits, mixed) < 1e-6


# ---- huggingface/peft#1707: layers that are replicated share one weight, and merges add up in it
# ---- huggingface/peft#2826: activated LoRA has no gradients under gradient checkpointing


@pytest.mark.parametrize("forward", ["dequantize", "native"])
@pytest.mark.parametrize(
    "option", [{"layer_replication": [[0, 2], [1, 2]]}, {"alora_invocation_tokens": [3, 4], "task_type": "CAUSAL_LM"}],
    ids=["layer replication", "activated LoRA"],
)  # fmt: skip
@pytest.mark.parametrize("spec", ["nf4", "reference"])
def test_methods_without_right_numbers_are_refused(spec, option, forward):
    model = qft.quantize(llama(), spec, progress=False)
    with refuses(UnsupportedOperation, model=model):
        qft.wrap(model, LoraConfig(r=4, target_modules=["q_proj"], **option), forward=forward)


# ---- huggingface/peft#2733: set_scale takes rsLoRA's scaling for the plain one; and what was set is not saved


@pytest.mark.parametrize("builder", [llama, qwen3_moe], ids=["llama", "experts"])
@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rsLoRA"])
@pytest.mark.parametrize("spec", ["nf4", "reference"])
def test_a_scale_that_was_set_is_computed_merged_and_saved(tmp_path, spec, rslora, builder):
    options = {"target_parameters": ["experts.down_proj"]} if builder is qwen3_moe else {}
    options["target_modules"] = ["q_proj"]
    model = tuned(spec, builder, use_rslora=rslora, size=0.1, **options)
    full = outputs(model)
    for module in model.modules():
        if hasattr(module, "set_scale") and "default" in module.scaling:
            module.set_scale("default", 0.5)
            want = 0.5 * 9 / (math.sqrt(4) if rslora else 4)
            assert module.scaling["default"] == pytest.approx(want)
    half = outputs(model)
    assert relative(half, full) > 1e-4
    qft.save(model, tmp_path / "a")
    assert relative(outputs(qft.load(tmp_path / "a", builder()).eval()), half) < 1e-6
    assert relative(outputs(qft.merge_to_float(copy.deepcopy(model))), half) < 1e-5


# ---- huggingface/transformers#34191, #37766, #39659: the loss of accumulated steps is not that of one batch


def ragged(n=10):
    """Rows of 12 tokens of which 2 to 11 are learnt."""
    rows = []
    for i, ids in enumerate(batch(seed=5, shape=(n, 12)).tolist()):
        hidden = 10 - i % 10
        rows.append({"input_ids": ids, "attention_mask": [1] * 12, "labels": [-100] * hidden + ids[hidden:]})
    return rows


def arguments(folder, **changes):
    options = {"max_steps": 3, "learning_rate": 1e-2, "report_to": [], "seed": 3, "use_cpu": True}
    options |= {"disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "optim": "sgd", "max_grad_norm": 0.0}
    return TrainingArguments(str(folder), **{**options, **changes})


@pytest.mark.parametrize("optimized", [False, True], ids=["plain", "optimized"])
@pytest.mark.parametrize("spec", SPECS)
def test_accumulated_steps_learn_what_one_batch_learns(tmp_path, spec, optimized):
    """Batches of 4, 4 and 2 rows: the last step of an epoch is incomplete."""
    ends, losses = [], []
    for size, steps in ((4, 1), (1, 4)):
        model = tuned(spec, task_type="CAUSAL_LM")
        if optimized:
            qft.optimize_training(model)
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        trainer = Trainer(model, arguments(tmp_path, **options), train_dataset=ragged())
        trainer.train()
        losses.append([e["loss"] for e in trainer.state.log_history if "loss" in e])
        ends.append(torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "lora_" in n]))
    start = torch.cat([p.detach().flatten() for n, p in tuned(spec).named_parameters() if "lora_" in n])
    assert relative(ends[1] - start, ends[0] - start) < 1e-3
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


# ---- huggingface/peft#394, huggingface/transformers#29078: the best checkpoint's adapter is not loaded at the end


@pytest.mark.parametrize("spec", SPECS)
def test_the_best_checkpoint_is_what_is_left(tmp_path, spec):
    model = tuned(spec, task_type="CAUSAL_LM")
    seen = {}

    class Look(TrainerCallback):
        def on_evaluate(self, args, state, control, **kwargs):
            seen[state.global_step] = outputs(model)

    options = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1}
    options |= {"load_best_model_at_end": True, "learning_rate": 30.0, "per_device_train_batch_size": 5}
    trainer = Trainer(
        model, arguments(tmp_path, **options), train_dataset=ragged(), eval_dataset=ragged(), callbacks=[Look()]
    )
    trainer.train()
    best = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    assert torch.equal(outputs(model), seen[best])
    assert any(relative(seen[best], other) > 1e-3 for other in seen.values())


# ---- bitsandbytes-foundation/bitsandbytes#960, #1060: states and copies after a training step have lost their scales


@pytest.mark.parametrize("spec", MORE)
def test_states_and_copies_after_a_training_step(spec):
    model = tuned(spec)
    ids = batch()
    model.train()(input_ids=ids, labels=ids).loss.backward()
    before = outputs(model.eval())
    state = copy.deepcopy(model.state_dict())
    twin = copy.deepcopy(model)
    fresh = fill(tuned(spec), seed=9)
    assert relative(outputs(fresh), before) > 1e-3
    fresh.load_state_dict(state)
    for other in (model, twin, fresh):
        assert torch.equal(outputs(other), before)
    model.load_state_dict(state)
    assert torch.equal(outputs(model), before)
    assert relative(outputs(qft.merge_to_float(twin)), before) < 1e-5
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "float after bfloat16"])
@pytest.mark.parametrize("spec", MORE)
def test_casts_leave_the_quantized_weights(spec, cast):
    """bitsandbytes-foundation/bitsandbytes#1527 and others: casts that move a part of a quantized weight alone."""
    model = tuned(spec)
    before = outputs(model)
    model = {
        "bfloat16": lambda: model.to(torch.bfloat16),
        "half": lambda: model.half(),
        "float after bfloat16": lambda: model.to(torch.bfloat16).float(),
    }[cast]()
    assert relative(outputs(model), before) < 3e-2
    back = outputs(qft.merge_to_float(model))
    assert relative(back, before) < 3e-2


# ---- unslothai/unsloth#9331: modules that target_modules names get no adapter, without a word


@pytest.mark.parametrize("spec", ["nf4", "reference"])
@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "layers.1.mlp.up_proj"])
def test_every_target_that_is_named_is_adapted(spec, name):
    model = qft.quantize(llama(), spec, progress=False)
    model = qft.wrap(model, LoraConfig(r=4, target_modules=["q_proj", name]))
    adapted = [n for n, m in model.named_modules() if hasattr(m, "lora_A")]
    assert any(n.endswith(f".{name}") for n in adapted)


MISSPELT = {
    "target": {"target_modules": ["q_proj", "q_porj"]},
    "layer": {"target_modules": ["q_proj", "layers.7.mlp.up_proj"]},
    "module": {"modules_to_save": ["lm_haed"]},
    "number": {"layers_to_transform": [1, 7]},
}


@pytest.mark.parametrize("door", ["wrap", "quantize_and_wrap"])
@pytest.mark.parametrize("wrong", MISSPELT)
def test_names_that_no_module_has_are_refused(wrong, door):
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **MISSPELT[wrong]})
    model = llama() if door == "quantize_and_wrap" else qft.quantize(llama(), "nf4", progress=False)
    with refuses(NoTargets, "no module", model=model):
        if door == "wrap":
            qft.wrap(model, config)
        else:
            qft.quantize_and_wrap(model, "nf4", adapter=config, progress=False)


@pytest.mark.parametrize("door", ["add_adapter", "get_peft_model"])
@pytest.mark.parametrize("wrong", MISSPELT)
def test_names_that_no_module_has_are_named_at_pefts_doors(wrong, door):
    """It may be a saved adapter, whose names are those of another version of the model."""
    config = LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **MISSPELT[wrong]})
    model = tuned() if door == "add_adapter" else qft.quantize(llama(), "nf4", progress=False)
    with pytest.warns(qft.QftWarning, match="no module"):
        model.add_adapter("second", config) if door == "add_adapter" else get_peft_model(model, config)


@pytest.mark.parametrize("spec", [None, "nf4", "reference"])
def test_fused_experts_under_target_modules_are_refused(spec):
    """The lists that fit models with a linear layer an expert leave out the experts where these are fused."""
    model, config = gpt_oss(), LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    with pytest.raises(NoTargets, match=r"experts\.down_proj is a parameter: name it in target_parameters"):
        if spec is None:
            qft.quantize_and_wrap(model, "nf4", adapter=config, progress=False)
        qft.wrap(qft.quantize(model, spec, progress=False), config)


@pytest.mark.parametrize("spec", ["nf4", "reference"])
def test_parameters_that_no_module_has_are_refused(spec):
    config = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["experts.down_proj", "experts.up_porj"])
    model = qft.quantize(qwen3_moe(), spec, progress=False)
    with refuses(NoTargets, "target_parameters names experts.up_porj", model=model):
        qft.wrap(model, config)
    with pytest.warns(qft.QftWarning, match=r"target_parameters names experts\.up_porj"):
        get_peft_model(model, config)


@pytest.mark.parametrize("is_trainable", [False, True])
@pytest.mark.parametrize("spec", ["nf4", "reference"])
def test_saved_adapters_whose_lists_hold_more_names_are_loaded(tmp_path, spec, is_trainable):
    model = tuned(spec)
    model.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"target_modules": [*config["target_modules"], "c_attn"]}))
    base = qft.quantize(llama(), spec, progress=False)
    for back in (
        PeftModel.from_pretrained(base, tmp_path, is_trainable=is_trainable),
        qft.load(tmp_path, llama(), is_trainable=is_trainable),
    ):
        assert torch.equal(outputs(back.eval()), outputs(model))


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_patterns_that_no_module_has_are_named(field):
    """One pattern may serve several models, so it is no error."""
    model = qft.quantize(llama(), "nf4", progress=False)
    pattern = {"q_porj": 2, r"layers\.0\..*_proj": 3}
    with pytest.warns(qft.QftWarning, match=f"{field} names q_porj, and no module"):
        qft.wrap(model, LoraConfig(r=4, target_modules="all-linear", **{field: pattern}))


def test_names_of_other_methods_are_checked_too():
    model = qft.quantize(llama(), "nf4", progress=False)
    with refuses(NoTargets, "q_porj", model=model):
        qft.wrap(model, LoHaConfig(r=4, target_modules=["q_proj", "q_porj"]))


# ---- huggingface/peft#2115, #2699, huggingface/sentence-transformers#3247: weights of a file that go nowhere


@pytest.mark.parametrize("spec", ["nf4", "reference"])
@pytest.mark.parametrize("change", ["_orig_mod", "other prefix", "one missing"])
def test_adapter_files_whose_names_do_not_fit_are_refused(tmp_path, spec, change):
    qft.save(tuned(spec), tmp_path / "a")
    path = tmp_path / "a" / "adapter_model.safetensors"
    state = load_file(path)
    if change == "_orig_mod":
        state = {k.replace("model.model.", "model._orig_mod.model."): v for k, v in state.items()}
    elif change == "other prefix":
        state = {
            k.replace("base_model.model.model.", "base_model.model.model.language_model."): v for k, v in state.items()
        }
    else:
        state.pop(sorted(state)[0])
    save_file(state, path)
    with pytest.raises(BadFolder, match="does not fit"):
        qft.load(tmp_path / "a", llama())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("name", ["lora", "a", "default"])
@pytest.mark.parametrize("spec", ["nf4", "reference"])
def test_adapters_whose_names_are_a_part_of_pefts(tmp_path, spec, name, low_cpu_mem_usage):
    """PEFT warns of them: their weights may be those of a new adapter after loading."""
    model = tuned(spec)
    with_second(model)
    config = LoraConfig(r=4, lora_alpha=3, target_modules=["q_proj", "up_proj"])
    if name != "default":
        model.add_adapter(name, config)
        fill(model, name, seed=6, size=0.1)
    model.set_adapter(name)
    now = outputs(model)
    qft.save(model, tmp_path / "a")
    back = qft.load(tmp_path / "a", llama()).eval()
    assert torch.equal(outputs(back), now)
    model.save_pretrained(tmp_path / "b", selected_adapters=[name])
    folder = tmp_path / "b" if name == "default" else tmp_path / "b" / name
    base = qft.quantize(llama(), spec, progress=False)
    back = PeftModel.from_pretrained(base, folder, adapter_name=name, low_cpu_mem_usage=low_cpu_mem_usage).eval()
    assert torch.equal(outputs(back), now)


# ---- huggingface/transformers#36051: generation between steps under gradient checkpointing


@pytest.mark.parametrize("optimized", [False, True], ids=["plain", "optimized"])
@pytest.mark.parametrize("spec", SPECS)
def test_generation_between_steps_with_checkpointing(spec, optimized):
    model = tuned(spec, task_type="CAUSAL_LM", size=0.2)
    ids = batch(shape=(2, 6))
    wanted = model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0)

    def gradients():
        model.zero_grad()
        model(input_ids=batch(), labels=batch()).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])

    expected = gradients()
    qft.optimize_training(model) if optimized else model.gradient_checkpointing_enable()
    model.train()
    before = gradients()
    with torch.no_grad():
        assert torch.equal(model.generate(input_ids=ids, max_new_tokens=8, do_sample=False, pad_token_id=0), wanted)
    assert model.training
    after = gradients()
    assert torch.equal(before, after) and relative(after, expected) < 1e-4


# ---- huggingface/trl#926, huggingface/peft#2270: adapters over adapters


DOORS = {
    "wrap": lambda model, config: qft.wrap(model, config),
    "wrap, the base": lambda model, config: qft.wrap(model.get_base_model(), config),
    "get_peft_model": lambda model, config: get_peft_model(model, config),
    "get_peft_model, the base": lambda model, config: get_peft_model(model.get_base_model(), config),
}


@pytest.mark.parametrize("method", [LoraConfig, LoHaConfig])
@pytest.mark.parametrize("door", DOORS)
def test_an_adapter_over_adapters_or_under_the_name_of_one_is_refused(door, method):
    model = qft.quantize_and_wrap(llama(), "nf4", adapter=method(r=4, target_modules=["q_proj"]), progress=False)
    model = fill(model).eval()
    before = outputs(model)
    with pytest.raises(BadOption, match="already"):
        DOORS[door](model, method(r=2, target_modules=["up_proj"]))
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("spec", ["nf4", "reference"])
def test_adapters_that_are_loaded_one_after_the_other(tmp_path, spec):
    """Each computes what it computes alone, whatever layers the others are on."""
    targets = {"a": ["q_proj", "down_proj"], "b": ["up_proj"], "c": ["down_proj", "lm_head"]}
    alone = {}
    for seed, (name, names) in enumerate(targets.items()):
        config = LoraConfig(r=4, target_modules=names)
        model = fill(qft.quantize_and_wrap(llama(), spec, adapter=config, progress=False), seed=seed).eval()
        alone[name] = outputs(model)
        model.save_pretrained(tmp_path / name)
    assert relative(alone["a"], alone["b"]) > 1e-3 and relative(alone["a"], alone["c"]) > 1e-3
    base = qft.quantize(llama(), spec, progress=False)
    for name in ("a", "b", "c", "b2"):
        model = PeftModel.from_pretrained(base, tmp_path / name[0], adapter_name=name).eval()
        assert relative(outputs(model), alone[name[0]]) < 1e-6
    model.set_adapter("a")
    assert relative(outputs(model), alone["a"]) < 1e-6


# ---- huggingface/peft#1457, #2415, unslothai/unsloth#237: embeddings that were resized after quantizing


@pytest.mark.parametrize("trained", [[], ["embed_tokens", "lm_head"]], ids=["frozen", "trained"])
@pytest.mark.parametrize("new", [101, 80])
@pytest.mark.parametrize("spec", ["nf4", "reference"])
def test_resized_embeddings(tmp_path, spec, new, trained):
    llama().save_pretrained(tmp_path / "base")
    model = qft.quantize(str(tmp_path / "base"), spec, progress=False)
    model.resize_token_embeddings(new)
    model = fill(qft.wrap(model, LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=trained or None)))
    ids = batch() % new
    ids[0, 0] = new - 1
    now = outputs(model.eval(), ids)
    merged = qft.merge_to_float(copy.deepcopy(model))
    assert relative(outputs(merged, ids), now) < 1e-5
    merged.save_pretrained(tmp_path / "m")
    from transformers import AutoModelForCausalLM

    assert relative(outputs(AutoModelForCausalLM.from_pretrained(tmp_path / "m"), ids), now) < 1e-5
    qft.save(model, tmp_path / "a")
    with pytest.raises(BadFolder, match="does not fit"):
        qft.load(tmp_path / "a", str(tmp_path / "base"))
    base = qft.quantize(str(tmp_path / "base"), spec, progress=False)
    base.resize_token_embeddings(new)
    assert relative(outputs(qft.load(tmp_path / "a", base).eval(), ids), now) < 1e-6


# ---- huggingface/peft#3514: trained tokens that two adapters share, merged one at a time


@pytest.mark.parametrize("spec", ["nf4", "reference"])
def test_tokens_that_two_adapters_train(spec):
    model = tuned(spec, trainable_token_indices=[1, 2, 3])
    first = outputs(model)
    with_second(model, trainable_token_indices=[3, 4])
    model.merge_adapter(["default"])
    merged = outputs(model)
    with pytest.raises(ValueError, match="disjunct"):
        model.merge_adapter(["second"])
    assert torch.equal(outputs(model), merged)
    model.unmerge_adapter()
    assert torch.equal(outputs(model), first)
    model.set_adapter("second")
    second = outputs(model)
    assert relative(outputs(qft.merge_to_float(model)), second) < 1e-5
    assert relative(second, first) > 1e-3


# ---- huggingface/trl#5292: a second adapter on fused experts


@pytest.mark.parametrize("spec", ["nf4", "reference"])
def test_a_second_adapter_on_experts(spec):
    options = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    model = tuned(spec, qwen3_moe, **options)
    first = outputs(model)
    with_second(model, **options)
    model.set_adapter("second")
    second = outputs(model)
    assert relative(second, first) > 1e-4
    assert relative(outputs(qft.merge_to_float(copy.deepcopy(model))), second) < 1e-5
    model.set_adapter("default")
    assert torch.equal(outputs(model), first)


# ---- biases that are trained with an adapter


@pytest.mark.parametrize("bias", ["all", "lora_only"])
@pytest.mark.parametrize("spec", ["nf4", "reference", "int8"])
def test_trained_biases(tmp_path, spec, bias):
    config = LoraConfig(r=4, target_modules=["c_attn", "c_fc"], bias=bias)
    model = qft.quantize_and_wrap(gpt2(), spec, adapter=config, progress=False)
    base = outputs(model.eval())
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    now = outputs(model)
    assert relative(now, base) > 1e-2
    qft.save(model, tmp_path / "a")
    assert relative(outputs(qft.load(tmp_path / "a", gpt2()).eval()), now) < 1e-6
    assert relative(outputs(qft.merge_to_float(copy.deepcopy(model))), now) < 1e-5


# ---- huggingface/trl#2834, #1230: without FlashAttention, rows that are laid end to end read each other


@pytest.mark.parametrize("optimized", [False, True], ids=["plain", "optimized"])
@pytest.mark.parametrize("spec", SPECS)
def test_rows_that_trl_lays_end_to_end_do_not_read_each_other(tmp_path, spec, optimized):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    model = tuned(spec, task_type="CAUSAL_LM", size=0.2)
    ids = batch(seed=5, shape=(4, 12)).clamp(min=1)
    rows = [{"input_ids": row[: 12 - 2 * i].tolist()} for i, row in enumerate(ids)]
    with torch.no_grad():
        losses = [model(input_ids=x, labels=x).loss for x in (torch.tensor([r["input_ids"]]) for r in rows)]
    counts = torch.tensor([len(r["input_ids"]) - 1.0 for r in rows])
    wanted = float((torch.stack(losses) * counts).sum() / counts.sum())
    if optimized:
        qft.optimize_training(model)
    options = {"report_to": [], "use_cpu": True, "bf16": False, "padding_free": True, "max_length": None}
    config = trl.SFTConfig(str(tmp_path), per_device_train_batch_size=4, **options)
    data = datasets.Dataset.from_list(rows)
    trainer = trl.SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer())
    inputs = next(iter(trainer.get_train_dataloader()))
    assert inputs["input_ids"].shape == (1, sum(len(r["input_ids"]) for r in rows))
    loss = trainer.compute_loss(model.train(), dict(inputs))
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-5)


# ---- huggingface/trl#1623: the token that ends an answer is padding, too, and is not learnt


@pytest.mark.parametrize("form", ["chat", "prompt"])
def test_the_end_is_learnt_where_it_is_padding_too(tmp_path, monkeypatch, form):
    pytest.importorskip("trl")
    end, seen, step = tokenizer().eos_token_id, [], Trainer.training_step

    def looked_at(self, model, inputs, *args, **kwargs):
        seen.append(inputs["labels"].clone())
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", looked_at)
    rows = chats() if form == "chat" else [{"prompt": "ab", "completion": "c" * (1 + n)} for n in range(8)]
    folder = save_model(tmp_path / "model", pad_token="<|im_end|>")
    config = qft.TrainConfig(
        folder, write_jsonl(tmp_path / "d.jsonl", rows), str(tmp_path / "out"), **quick(batch_size=3)
    )
    qft.train(config)
    labels = [[t for t in row.tolist() if t != IGNORE] for batch in seen for row in batch]
    assert len(labels) > 4
    assert all(row.count(end) == 1 for row in labels)
    if form == "prompt":
        assert all(row[-1] == end for row in labels) and len({len(row) for row in labels}) > 1

"""The exported folder is the one that saving `merge_to_float`'s model would give, and loads without qft or PEFT."""

import copy
import json
import resource
import sys
from contextlib import contextmanager
from datetime import UTC, datetime

import pytest
import torch
from helpers import refuses, run_python, unchanged
from models import BUILDERS, gpt2, llama, logits, name_of, plain, qwen2, qwen3_moe, t5, train_a_little
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast
from twins import SPECS, fill

import qft

pytestmark = pytest.mark.filterwarnings("ignore")

ALL = {**BUILDERS, "qwen3_moe": qwen3_moe}
VARIANTS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


def tuned(builder, spec="nf4", dtype=torch.float32, skip=None, **options):
    config = LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": "all-linear", **options})
    model = qft.quantize(builder(dtype), spec, skip=skip, progress=False)
    return fill(qft.wrap(model, config).eval())


def weights(folder):
    """All tensors of a folder's files, each of which must be there once."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
        tensors = load_file(file)
        assert not found.keys() & tensors.keys()
        found |= tensors
    return found


def load(folder, **options):
    cls = AutoModelForSeq2SeqLM if "t5" in (folder / "config.json").read_text() else AutoModelForCausalLM
    return cls.from_pretrained(folder, **options).eval()


def assert_same_weights(found, wanted):
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@torch.no_grad()
def check(model, tmp_path, **options):
    """Export, and hold every file against those of `merge_to_float` and `save_pretrained`; the merged model."""
    kwargs = {k: v for k, v in options.items() if k == "dtype"}
    with unchanged(model):
        report = qft.export(model, tmp_path / "a", **options)
    merged = qft.merge_to_float(model, **kwargs)
    assert report.to_dict() == merged.merge_report.to_dict()
    if not hasattr(merged, "save_pretrained"):
        assert_same_weights(weights(tmp_path / "a"), merged.state_dict())
        return merged
    merged.save_pretrained(tmp_path / "b")
    assert_same_weights(weights(tmp_path / "a"), weights(tmp_path / "b"))
    for name in ("config.json", "generation_config.json"):
        assert (tmp_path / "a" / name).read_text() == (tmp_path / "b" / name).read_text(), name
    assert "quantization_config" not in (tmp_path / "a" / "config.json").read_text()
    return merged


# ---- what is written -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("builder", ALL)
def test_the_same_files_and_outputs_as_merge_to_float(builder, spec, tmp_path):
    merged = check(tuned(ALL[builder], spec), tmp_path)
    if builder != "plain":
        assert torch.equal(logits(load(tmp_path / "a")), logits(merged))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("builder", [gpt2, qwen2], ids=name_of)
def test_adapters_of_every_kind(builder, variant, tmp_path):
    merged = check(tuned(builder, **VARIANTS[variant]), tmp_path)
    assert torch.equal(logits(load(tmp_path / "a")), logits(merged))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
@pytest.mark.parametrize("builder", ALL)
def test_sixteen_bit_models_stay_so(builder, dtype, tmp_path):
    check(tuned(ALL[builder], "nf4", dtype), tmp_path)
    assert {t.dtype for t in weights(tmp_path / "a").values()} == {dtype}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("builder", [llama, gpt2, t5, qwen3_moe], ids=name_of)
def test_another_dtype(builder, dtype, tmp_path):
    """Bit for bit what `merge_to_float` computes in that dtype: rotary frequencies are not cast, nor T5's wo to float16."""
    merged = check(tuned(builder), tmp_path, dtype=dtype)
    again = load(tmp_path / "a")
    assert again.dtype == getattr(torch, dtype)
    assert torch.equal(logits(again), logits(merged))
    kept = {n for n, t in weights(tmp_path / "a").items() if t.dtype == torch.float32}
    assert bool(kept) == (builder is t5 and dtype == "float16") and all(".wo." in n for n in kept)


def test_a_quantized_model_without_adapters(tmp_path):
    check(qft.quantize(qwen2(), "int8", progress=False), tmp_path)


def test_adapters_over_a_float_model(tmp_path):
    model = fill(get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear"))).eval()
    qft.export(model, tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(copy.deepcopy(model).merge_and_unload()))


def test_merged_and_disabled_adapters(tmp_path):
    model = tuned(llama, "int8")
    qft.merge(model)
    merged = check(model, tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged" / "a")), logits(merged))
    qft.unmerge(model)
    with model.disable_adapter():
        merged = check(model, tmp_path / "off")
    assert torch.equal(logits(load(tmp_path / "off" / "a")), logits(merged))
    assert not torch.equal(logits(merged), logits(qft.merge_to_float(model)))


@pytest.mark.parametrize(
    "options",
    [
        {"modules_to_save": ["lm_head"]},
        {"modules_to_save": ["embed_tokens"]},
        {"modules_to_save": ["embed_tokens", "lm_head"]},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]},
    ],
    ids=str,
)
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_heads_and_embeddings(options, trained, tied, tmp_path):
    """Tied ones are parted in the config where training parted them, and else written once."""
    model = qft.quantize(qwen2() if tied else llama(), "nf4", progress=False)
    model = qft.wrap(model, LoraConfig(**{"r": 4, "target_modules": "all-linear", **options})).eval()
    if trained:
        fill(model)
    merged = check(model, tmp_path)
    again = load(tmp_path / "a")
    assert torch.equal(logits(again), logits(merged))
    written = {"lm_head.weight", "model.embed_tokens.weight"} & weights(tmp_path / "a").keys()
    assert len(written) == (1 if again.config.tie_word_embeddings else 2)


@pytest.mark.parametrize("spec", ["nf4", "reference"])
@pytest.mark.parametrize("source", ["memory", "folder"])
def test_weights_that_files_hold_fused(fused_on_disk, source, spec, tmp_path):
    """Some models' files hold q, k and v as one tensor, of layers that are quantized one by one."""
    model = fused_on_disk()
    if source == "folder":
        model.save_pretrained(tmp_path / "float")
        model = tmp_path / "float"
    model = qft.quantize(model, spec, progress=False)
    model = fill(qft.wrap(model, LoraConfig(r=4, target_modules="all-linear"))).eval()
    merged = check(model, tmp_path, max_shard_size="60KB")
    assert "model.layers.0.self_attn.qkv.weight" in weights(tmp_path / "a")
    assert torch.equal(logits(load(tmp_path / "a")), logits(merged))


def test_fused_weights_are_computed_group_by_group(fused_on_disk, tmp_path, monkeypatch):
    """At no time are more layers in floats than one tensor of the files is made of."""
    from qft.lora.merging import lazy_float_model
    from qft.saving.shards import ShardWriter

    events = []
    compute, write = lazy_float_model.FloatLayers.__call__, ShardWriter.write
    monkeypatch.setattr(
        lazy_float_model.FloatLayers, "__call__", lambda *args: events.append("compute") or compute(*args)
    )
    monkeypatch.setattr(ShardWriter, "write", lambda *args: events.append("write") or write(*args))
    qft.export(qft.quantize(fused_on_disk(), "nf4", progress=False), tmp_path)
    runs = [len(run) for run in "".join(e[0] for e in events).split("w")]
    assert sum(runs) == 14 and max(runs) == 3


def test_renames_that_hang_on_each_other(monkeypatch, tmp_path):
    """transformers has renames that only count once another name was seen; converting group by group must see it."""
    from transformers import conversion_mapping
    from transformers.core_model_loading import Chunk, GroupWeightRename, WeightConverter

    conversion_mapping.get_checkpoint_conversion_mapping("llama")
    renames = GroupWeightRename(
        [r"layers.(\d+).a_layernorm", r"layers.(\d+).mlp.gate_up_proj"],
        [r"layers.\1.input_layernorm", r"layers.\1.mlp.fused"],
    )
    gate_up = WeightConverter("mlp.fused.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(dim=0)])
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "llama", [renames, gate_up])
    check(tuned(llama), tmp_path)
    assert "model.layers.1.mlp.gate_up_proj.weight" in weights(tmp_path / "a")


def test_buffers_and_ties_of_a_plain_module(tmp_path):
    """Persistent buffers are written in their dtype, others are not; a tied weight is written once."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 32)
            self.embed, self.head = nn.Embedding(9, 32), nn.Linear(32, 9, bias=False)
            self.head.weight = self.embed.weight
            self.register_buffer("count", torch.tensor(7))
            self.register_buffer("odd", torch.arange(3, dtype=torch.uint8))
            self.register_buffer("mean", torch.randn(5))
            self.register_buffer("cache", torch.randn(5), persistent=False)

    model = qft.quantize(Net(), "nf4", progress=False)
    qft.export(model, tmp_path, dtype="float16", max_shard_size=100)
    wanted = qft.merge_to_float(model, dtype="float16").state_dict()
    assert wanted.pop("head.weight") is not None
    assert wanted["odd"].dtype == torch.uint8 and wanted["mean"].dtype == torch.float16
    assert_same_weights(weights(tmp_path), wanted)


def test_a_plain_module_loads_from_its_state_dict(tmp_path):
    model = tuned(plain)
    qft.export(model, tmp_path)
    again = plain(seed=5)
    load_model(again, tmp_path / "model.safetensors")
    assert torch.equal(logits(again), logits(qft.merge_to_float(model)))
    assert {f.name for f in tmp_path.iterdir()} == {"model.safetensors", "README.md"}


@pytest.mark.parametrize("size", [1, 5000, "20KB", "0.1MB", "2GB"])
@pytest.mark.parametrize("builder", [llama, plain], ids=name_of)
def test_shards(builder, size, tmp_path):
    model = tuned(builder)
    qft.export(model, tmp_path, max_shard_size=size)
    files = sorted(f.name for f in tmp_path.glob("*.safetensors"))
    if size in ("2GB",):
        assert files == ["model.safetensors"] and not (tmp_path / "model.safetensors.index.json").exists()
    else:
        assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        held = {name: file for file in files for name in load_file(tmp_path / file)}
        assert index["weight_map"] == held
        state = qft.merge_to_float(model).state_dict()
        assert index["metadata"] == {
            "total_size": sum(t.nbytes for t in state.values()),
            "total_parameters": sum(t.numel() for t in state.values()),
        }
        limit = {"20KB": 20_000, "0.1MB": 100_000}.get(size, size)
        for file in files:
            tensors = load_file(tmp_path / file)
            assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= limit
    if builder is llama:
        assert torch.equal(logits(load(tmp_path)), logits(qft.merge_to_float(model)))


def test_a_fresh_interpreter_loads_it_without_qft(tmp_path):
    model = tuned(llama)
    qft.export(model, tmp_path)
    torch.save(logits(model), tmp_path / "logits.pt")
    run_python(
        """
        import sys, torch
        from transformers import AutoModelForCausalLM
        from models import logits
        folder = sys.argv[1]
        model = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert not {"qft", "peft"} & sys.modules.keys()
        torch.testing.assert_close(logits(model), torch.load(folder + "/logits.pt"), rtol=1e-4, atol=1e-5)
        """,
        tmp_path,
    )


# ---- the folder ----------------------------------------------------------------------------------------------


def byte_tokenizer(size=96):
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())[:size])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def test_the_tokenizer_goes_along(tmp_path):
    qft.export(tuned(llama), tmp_path, tokenizer=byte_tokenizer())
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert again("abc").input_ids == byte_tokenizer()("abc").input_ids


@pytest.mark.parametrize(("first", "second"), [("20KB", "2GB"), ("2GB", "20KB"), ("20KB", "60KB")])
def test_weights_of_an_earlier_export_do_not_survive(first, second, tmp_path):
    """A left model.safetensors would be loaded in the place of new shards."""
    qft.export(tuned(llama), tmp_path, max_shard_size=first)
    (tmp_path / "notes.txt").write_text("mine")
    model = tuned(qwen2)
    qft.export(model, tmp_path, max_shard_size=second)
    qft.export(model, tmp_path / "fresh", max_shard_size=second)
    fresh = {f.name for f in (tmp_path / "fresh").iterdir()}
    assert {f.name for f in tmp_path.iterdir() if f.is_file()} == fresh | {"notes.txt"}
    assert torch.equal(logits(load(tmp_path)), logits(qft.merge_to_float(model)))


def test_over_the_folder_that_the_model_came_from(tmp_path):
    llama().save_pretrained(tmp_path)
    model = qft.quantize(tmp_path, "nf4", progress=False)
    wanted = logits(qft.merge_to_float(model))
    qft.export(model, tmp_path)
    assert torch.equal(logits(load(tmp_path)), wanted)


def listing(folder):
    return {f.relative_to(folder): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@contextmanager
def file_size_limit(size):
    """No file may grow beyond this: the system refuses the write, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    ("size", "options"),
    [
        (100, {}),  # not even the config
        (50_000, {}),
        (50_000, {"max_shard_size": "20KB"}),  # a single large tensor
        (2_000, {"tokenizer": True}),  # the tokenizers library has an error of its own
        (50_000, {"format": "gguf", "tokenizer": True}),
    ],
    ids=str,
)
def test_a_full_disk(size, options, before, tmp_path):
    model = tuned(lambda dtype: llama(dtype, vocab_size=300))
    options = {k: byte_tokenizer(256) if k == "tokenizer" else v for k, v in options.items()}
    folder = tmp_path / "out"
    if before:
        qft.export(tuned(qwen2), folder)
    old = listing(tmp_path)
    with refuses(qft.BadFolder, str(folder) if "tokenizer" not in options or size > 9999 else "", model=model):
        with file_size_limit(size):
            qft.export(model, folder, **options)
    assert listing(tmp_path) == old
    assert sorted(f.name for f in tmp_path.iterdir()) == (["out"] if before else [])
    qft.export(model, folder, **options)


def test_an_interrupted_export_leaves_the_old_one(tmp_path, monkeypatch):
    from qft.lora.merging import lazy_float_model

    qft.export(tuned(qwen2), tmp_path / "out")
    old = listing(tmp_path)
    calls, compute = [], lazy_float_model.FloatLayers.__call__

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return compute(*args)

    monkeypatch.setattr(lazy_float_model.FloatLayers, "__call__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        qft.export(tuned(llama), tmp_path / "out")
    assert listing(tmp_path) == old


def test_a_name_that_is_taken_by_a_folder_puts_everything_back(tmp_path):
    qft.export(tuned(qwen2), tmp_path / "out")
    (tmp_path / "out" / "README.md").unlink()
    (tmp_path / "out" / "model.safetensors").rename(tmp_path / "kept")
    (tmp_path / "out" / "model.safetensors").mkdir()
    (tmp_path / "out" / "model.safetensors" / "mine").write_text("mine")
    old = listing(tmp_path)
    with refuses(qft.BadFolder, "out"):
        qft.export(tuned(llama), tmp_path / "out")
    assert listing(tmp_path) == old


# ---- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"format": "onnx"}, qft.BadOption, "safetensors, gguf"),
        ({"dtype": "int8"}, qft.BadOption, "float type"),
        ({"dtype": "floaty"}, qft.BadOption, "floaty"),
        ({"max_shard_size": "big"}, qft.BadOption, "'2GB'"),
        ({"max_shard_size": 0}, qft.BadOption, "'2GB'"),
        ({"max_shard_size": True}, qft.BadOption, "'2GB'"),
        ({"max_shard_size": None}, qft.BadOption, "'2GB'"),
        ({"tokenizer": "gpt2"}, qft.BadOption, "tokenizer="),
    ],
    ids=str,
)
def test_bad_options(options, error, says, tmp_path):
    model = tuned(llama)
    with refuses(error, says, model=model):
        qft.export(model, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("builder", [llama, plain], ids=name_of)
def test_a_float_model_is_refused(builder, tmp_path):
    model = builder()
    with refuses(qft.BadOption, "float model already", model=model):
        qft.export(model, tmp_path / "out")
    with refuses(qft.BadOption, "torch module"):
        qft.export("gpt2", tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", ["q_proj.lora_A", "embed_tokens.lora_embedding_B", "lm_head.modules_to_save"])
def test_broken_adapters_are_refused(part, value, tmp_path):
    model = tuned(llama, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"])
    _name, parameter = next((n, p) for n, p in model.named_parameters() if part in n)
    parameter.data.view(-1)[3] = value
    with refuses(qft.NonFiniteWeights, part.split(".")[0], model=model, outputs=False):
        qft.export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    model.base_model.disable_adapter_layers()
    qft.export(model, tmp_path / "out")


def test_a_weight_too_large_for_the_dtype(tmp_path):
    model = tuned(llama)
    next(p for n, p in model.named_parameters() if "1.mlp.down_proj.lora_B" in n).data.fill_(1e6)
    with refuses(qft.NonFiniteWeights, "float32 holds it", model=model):
        qft.export(model, tmp_path / "out", dtype="float16")
    assert not list(tmp_path.iterdir())


def test_lora_bias_without_a_bias(tmp_path):
    model = tuned(llama, lora_bias=True)
    with refuses(qft.UnsupportedOperation, "lora_bias", model=model):
        qft.export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_folders_that_cannot_be_written(tmp_path):
    model = tuned(llama)
    (tmp_path / "file").write_text("mine")
    for folder in (tmp_path / "file", tmp_path / "file" / "out"):
        with refuses(qft.BadFolder, "file", model=model):
            qft.export(model, folder)
    with refuses(qft.BadOption, "path of a folder"):
        qft.export(model, 3)
    assert listing(tmp_path) == {(tmp_path / "file").relative_to(tmp_path): b"mine"}


def test_no_permission(tmp_path):
    """As a user to whom permissions mean something: root writes everywhere."""
    (tmp_path / "closed").mkdir()
    out = run_python(
        """
        import os, pathlib, sys, qft
        from models import plain
        model = qft.quantize(plain(), "reference", progress=False)
        folder = pathlib.Path(sys.argv[1])
        qft.export(model, folder / "open")
        (folder / "closed").chmod(0o555)
        if os.geteuid() == 0:
            os.seteuid(65534)
        try:
            qft.export(model, folder / "closed" / "out")
        except qft.BadFolder as error:
            print(error)
        """,
        tmp_path,
    )
    assert "Permission denied" in out.splitlines()[-1]
    assert not list((tmp_path / "closed").iterdir())


def test_a_folder_with_an_adapter_is_refused(tmp_path):
    """`from_pretrained` would put the adapter over the weights that hold it already."""
    model = tuned(llama)
    qft.save(model, tmp_path)
    old = listing(tmp_path)
    with refuses(qft.BadFolder, "holds an adapter", model=model):
        qft.export(model, tmp_path)
    assert listing(tmp_path) == old


@pytest.mark.parametrize("init", [None, "loftq"])
def test_the_original_weights_with_what_was_learnt(init, tmp_path):
    """Bit for bit what merge_to_float makes of the same original; the start's own part is not counted twice."""
    wrapped = qft.quantize_and_wrap(llama(), "nf4", init=init, progress=False)
    train_a_little(wrapped)
    report = qft.export(wrapped, tmp_path / "out", original=llama())
    plain = qft.merge_to_float(wrapped, original=llama())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert report.source == "original" and report.to_dict() == plain.merge_report.to_dict()
    assert torch.equal(logits(again), logits(plain))
    with refuses(qft.AdapterMismatch, "another"):
        qft.export(wrapped, tmp_path / "other", original=llama(seed=5))
    assert not (tmp_path / "other").exists()


# ---- the model card ------------------------------------------------------------------------------------------


def test_the_model_card(tmp_path):
    from huggingface_hub import ModelCard

    model = tuned(llama, "nf4", use_dora=True, target_modules=["q_proj", "v_proj"])
    model.peft_config["default"].base_model_name_or_path = "someone/Some-Model-1B"
    report = qft.export(model, tmp_path / "mine", dtype="bfloat16")
    text = (tmp_path / "mine" / "README.md").read_text()
    card = ModelCard(text)
    assert card.data.base_model == "someone/Some-Model-1B"
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["qft", "lora", "bitsandbytes_4bit"]
    for part in (
        "# mine",
        "nf4",
        "4.50 bits a weight",
        "DoRA, r 4, alpha 12, on q_proj, v_proj",
        "bfloat16",
        f"relative error {report.relative_error:.2e}",
        f"{report.survived:.2%} of the update survived",
        f"qft {qft.__version__}",
        f"torch {torch.__version__}",
        "transformers ",
        "peft ",
        datetime.now(UTC).date().isoformat(),
    ):
        assert part in text, part
    assert 0 < report.relative_error < 0.01


def test_the_card_keeps_paths_to_itself(tmp_path):
    llama().save_pretrained(tmp_path / "somewhere" / "my-llama")
    model = qft.quantize(tmp_path / "somewhere" / "my-llama", "nf4", progress=False)
    qft.export(model, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "my-llama" in text and "somewhere" not in text and "base_model:" not in text


def test_a_readme_of_somebody_elses_is_kept(tmp_path):
    model = tuned(llama)
    (tmp_path / "README.md").write_text("# mine\n")
    with pytest.warns(qft.QftWarning, match="README.md"):
        qft.export(model, tmp_path)
    assert (tmp_path / "README.md").read_text() == "# mine\n"
    (tmp_path / "README.md").unlink()
    qft.export(model, tmp_path)
    qft.export(model, tmp_path, dtype="float16")
    assert "float16" in (tmp_path / "README.md").read_text()


# ---- memory --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA is enforced on Linux")
def test_the_float_model_is_never_whole_in_memory(tmp_path):
    """105 MiB of floats are exported where 20 MiB are left; `merge_to_float` does not fit there."""
    out = run_python(
        """
        import ctypes, gc, pathlib, resource, sys, torch, qft
        from peft import LoraConfig
        from models import llama
        model = llama(hidden_size=256, intermediate_size=1024, num_hidden_layers=28)
        size = sum(p.nbytes for p in model.parameters()) / 2**20
        model = qft.quantize_and_wrap(model, "nf4", adapter=LoraConfig(r=4, target_modules="all-linear"), progress=False)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.01)
        qft.export(qft.quantize(llama(), "nf4", progress=False), sys.argv[1] + "/small")  # imports what it needs
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        status = dict(l.split(":", 1) for l in pathlib.Path("/proc/self/status").read_text().splitlines())
        now = int(status["VmData"].split()[0]) * 1024
        resource.setrlimit(resource.RLIMIT_DATA, (now + 20 * 2**20,) * 2)
        qft.export(model, sys.argv[1] + "/out")
        print("exported", round(size))
        try:
            qft.merge_to_float(model)
        except (RuntimeError, MemoryError):
            print("no room")
        """,
        tmp_path,
    )
    assert out.splitlines()[-2:] == ["exported 105", "no room"]
    assert round(sum(p.nbytes for p in load(tmp_path / "out").parameters()) / 2**20) == 105

"""Models in folders: quantized shard by shard, saved, and loaded again, by qft and by plain transformers."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from models import BUILDERS, batch, llama, logits, plain, qwen2, qwen3_moe, relative, train_a_little
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import qft
from qft.core.registry import quantizer_of
from qft.errors import (
    AdapterMismatch,
    AlreadyQuantized,
    BadFolder,
    BadOption,
    NeedsOriginal,
    NonFiniteWeights,
    QftError,
    QftWarning,
    UnsupportedOperation,
)

SPECS = ["nf4", "fp4:double_quant=true", "int8", "reference", "reference:format=int,bits=3,group_size=32"]
MODELS = ["llama", "qwen2", "gpt2", "t5"]
UP_PROJ = "model.layers.1.mlp.up_proj.weight"

pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The float models of `BUILDERS`, each in a folder of several shards."""
    root = tmp_path_factory.mktemp("float")
    for name in MODELS:
        BUILDERS[name]().save_pretrained(root / name, max_shard_size="100KB")
        assert len(list((root / name).glob("*.safetensors"))) > 2
    return root


@pytest.fixture
def llama_folder(tmp_path):
    """A folder of shards that a test may damage."""
    llama().save_pretrained(tmp_path / "llama", max_shard_size="100KB")
    return tmp_path / "llama"


def change(folder, name, edit):
    """Rewrite the shard of `folder` that holds the tensor `name`, with `edit` applied to the shard's tensors."""
    index = folder / "model.safetensors.index.json"
    file = folder / json.loads(index.read_text())["weight_map"][name]
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return file


def same_tensors(a, b, but=lambda key: False):
    """Names, dtypes and values of two state dicts agree, to the bit."""
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    wrong = [k for k in a if not but(k) and (a[k].dtype != b[k].dtype or not torch.equal(a[k], b[k]))]
    assert not wrong
    return True


def no_meta(model):
    return not [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]


def run(code, *arguments):
    """Run Python in a process of its own and give what it printed as JSON."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def quantizer_warnings(caught):
    return [str(w.message) for w in caught if issubclass(w.category, QftWarning)]


# ---- a folder is quantized as the model in memory --------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", MODELS)
def test_a_folder_gives_the_codes_of_the_model_in_memory(folders, name, spec):
    expected = qft.quantize(BUILDERS[name](), spec, progress=False)
    model = qft.quantize(folders / name, spec, progress=False)
    assert same_tensors(model, expected)
    assert no_meta(model)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in expected.named_modules()]
    assert not model.training
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, p in expected.named_parameters() if not p.requires_grad}
    assert torch.equal(logits(model), logits(expected))
    mine, theirs = model._qft, expected._qft
    assert mine.quantizers == theirs.quantizers and mine.left == theirs.left
    assert mine.fingerprint == theirs.fingerprint and mine.float_bytes == theirs.float_bytes
    assert qft.audit(model).bits_per_weight == qft.audit(expected).bits_per_weight


def test_one_file_and_many_shards_are_the_same(folders, tmp_path):
    llama().save_pretrained(tmp_path)
    assert same_tensors(
        qft.quantize(tmp_path, "nf4", progress=False), qft.quantize(folders / "llama", "nf4", progress=False)
    )


@pytest.mark.parametrize("spec", ["nf4", "int8", "reference:format=int,bits=4,group_size=32"])
def test_dtype_is_cast_before_quantizing(folders, spec):
    model = qft.quantize(folders / "qwen2", spec, dtype="bfloat16", progress=False)
    cast = qwen2()
    for p in cast.parameters():  # not model.to(): that casts the rotary frequencies too, and loading does not
        p.data = p.data.bfloat16()
    assert same_tensors(model, qft.quantize(cast, spec, progress=False))
    assert torch.equal(logits(model), logits(cast))
    assert model.dtype == torch.bfloat16 and logits(model).dtype == torch.bfloat16


def test_dtype_auto_is_the_checkpoints_own(tmp_path):
    llama(torch.bfloat16).save_pretrained(tmp_path)
    model = qft.quantize(tmp_path, "nf4", progress=False)
    assert {p.dtype for n, p in model.named_parameters() if "norm" in n or "embed" in n} == {torch.bfloat16}
    model = qft.quantize_and_wrap(tmp_path, "nf4", dtype=torch.float32, progress=False)
    assert {p.dtype for n, p in model.named_parameters() if "norm" in n or "embed" in n} == {torch.float32}


@pytest.mark.parametrize("name", ["t5"])
def test_what_the_model_keeps_in_float32_is_loaded_in_float32(folders, name):
    model = qft.quantize(folders / name, "nf4", dtype=torch.float16, progress=False)
    wo = [m for n, m in model.named_modules() if n.endswith(".wo")]
    assert wo and all(type(m) is nn.Linear and m.weight.dtype == torch.float32 for m in wo)
    assert model.shared.weight.dtype == torch.float16


def test_skip_and_patterns(folders):
    skip = ["o_proj", "layers.0"]
    model = qft.quantize(folders / "llama", "nf4", skip=skip, progress=False)
    assert same_tensors(model, qft.quantize(llama(), "nf4", skip=skip, progress=False))
    original = llama()
    for name in ("model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj", "lm_head"):
        assert type(model.get_submodule(name)) is nn.Linear
        assert torch.equal(model.get_submodule(name).weight, original.get_submodule(name).weight)

    spec = {"*.mlp.down_proj": None, "*.mlp.*": "reference:format=int,bits=3", "*": "nf4"}
    model = qft.quantize(folders / "llama", spec, progress=False)
    assert same_tensors(model, qft.quantize(llama(), spec, progress=False))
    kinds = {n.rpartition(".")[2]: type(quantizer_of(m)).__name__ for n, m in model.named_modules() if ".1." in n}
    assert (
        kinds["down_proj"] == "NoneType" and kinds["up_proj"] == "Reference" and kinds["q_proj"] == "BitsAndBytes4bit"
    )


@pytest.mark.parametrize("init", ["loftq", qft.LoftQ(steps=3)])
@pytest.mark.parametrize("name, spec", [("llama", "nf4"), ("gpt2", "reference"), ("t5", "int8")])
def test_loftq_from_a_folder_is_loftq_in_memory(folders, name, spec, init):
    adapter = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear")
    torch.manual_seed(0)
    expected = qft.quantize_and_wrap(BUILDERS[name](), spec, adapter=adapter, init=init, progress=False)
    torch.manual_seed(0)
    model = qft.quantize_and_wrap(folders / name, spec, adapter=adapter, init=init, progress=False)
    float_layers = {f"base_model.model.{n}" for n in expected.get_base_model()._qft.left}  # no error to start from
    assert same_tensors(model, expected, lambda key: "lora_A" in key and key.partition(".lora_A")[0] in float_layers)
    assert no_meta(model)
    # and it is nearer to the float model than the quantized one is
    float_logits = logits(BUILDERS[name]())
    without = relative(logits(qft.quantize(folders / name, spec, progress=False)), float_logits)
    assert relative(logits(model.eval()), float_logits) < without


def test_a_wrapped_folder_trains_and_merges(folders):
    model = train_a_little(qft.quantize_and_wrap(folders / "qwen2", "nf4", progress=False))
    merged = qft.merge_to_float(model, dtype=torch.float32)
    assert relative(logits(merged), logits(model)) < 1e-5
    assert type(merged.model.layers[0].mlp.up_proj) is nn.Linear
    assert not hasattr(merged.config, "quantization_config")


def test_submodules_configs_keep_nothing_of_the_load(folders):
    """T5's encoder has a copy of the config: it must not hold the callbacks of the load, nor mark a merged model."""
    model = qft.quantize_and_wrap(folders / "t5", "nf4", init="loftq", progress=False)
    for module in model.modules():
        stored = getattr(getattr(module, "config", None), "quantization_config", None)
        assert getattr(stored, "plan", None) is None
    merged = qft.merge_to_float(model)
    assert not [n for n, m in merged.named_modules() if hasattr(getattr(m, "config", None), "quantization_config")]


def test_a_mixture_of_experts_from_a_folder(tmp_path):
    """Stored one expert a tensor, fused while loading, skipped here: the rest is quantized."""
    qwen3_moe().save_pretrained(tmp_path, max_shard_size="100KB")
    expected = qft.quantize(qwen3_moe(), "nf4", skip=["experts"], progress=False)
    model = qft.quantize(tmp_path, "nf4", skip=["experts"], progress=False)
    assert same_tensors(model, expected)
    assert model._qft.experts == expected._qft.experts and len(model._qft.experts) == 4
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize("skip", [None, ["gate_proj"], ["up_proj", "q_proj"]])
@pytest.mark.parametrize("spec", ["nf4", "int8", "reference"])
def test_weights_that_are_fused_on_disk(fused_on_disk, tmp_path, spec, skip):
    """transformers fuses them again where it saves, and would do that with codes: then nothing can read them."""
    fused_on_disk().save_pretrained(tmp_path / "float")
    stored = load_file(tmp_path / "float" / "model.safetensors")
    assert "model.layers.0.self_attn.qkv.weight" in stored and "model.layers.0.mlp.up_proj.weight" not in stored
    expected = qft.quantize(fused_on_disk(), spec, skip=skip, progress=False)
    model = qft.quantize(tmp_path / "float", spec, skip=skip, progress=False)
    assert same_tensors(model, expected)
    for n, source in enumerate((model, expected)):
        source.save_pretrained(tmp_path / f"quantized{n}")
        again = type(model).from_pretrained(tmp_path / f"quantized{n}")
        assert torch.equal(logits(again), logits(model))
    qft.merge_to_float(model).save_pretrained(tmp_path / "merged")
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == stored.keys()


@pytest.mark.parametrize("spec", ["nf4", "int8", "reference"])
def test_biases_that_come_after_their_weights(tmp_path, spec):
    """Under other names in the file, which `from_pretrained` is told to rename."""
    qwen2().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = {k.replace(".bias", ".z_bias"): v for k, v in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    expected = qft.quantize(qwen2(), spec, progress=False)
    model = qft.quantize(tmp_path, spec, key_mapping={r"\.z_bias$": ".bias"}, progress=False)
    assert same_tensors(model, expected) and no_meta(model)
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {n for n, p in expected.named_parameters() if not p.requires_grad}
    with pytest.raises(BadFolder, match=r"lacks 6 .*bias"):
        qft.quantize(tmp_path, spec, progress=False)


# ---- bad folders -----------------------------------------------------------------------------------------


def truncate(folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    os.truncate(file, 1000)
    return file.name


def garble(folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(b"garbage " * 100)
    return file.name


def lose_a_shard(folder):
    file = sorted(folder.glob("*.safetensors"))[1]
    file.unlink()
    return file.name


def lose_the_config(folder):
    (folder / "config.json").unlink()
    return "config.json"


def damage_the_config(folder):
    (folder / "config.json").write_text('{"model_type": "llama", ')
    return "config.json"


def name_an_unknown_type(folder):
    (folder / "config.json").write_text('{"model_type": "martian"}')
    return "martian"


def damage_the_index(folder):
    (folder / "model.safetensors.index.json").write_text("{}")
    return "model.safetensors.index.json"


def lose_the_weights(folder):
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    return str(folder)


def lose_a_tensor(folder):
    file = change(folder, UP_PROJ, lambda tensors: tensors.pop(UP_PROJ))
    assert file.is_file()
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    del content["weight_map"][UP_PROJ]
    index.write_text(json.dumps(content))
    return UP_PROJ


def cut_a_tensor(folder):
    change(folder, UP_PROJ, lambda tensors: tensors.update({UP_PROJ: tensors[UP_PROJ][:5].contiguous()}))
    return UP_PROJ


DAMAGES = [
    truncate,
    garble,
    lose_a_shard,
    lose_the_config,
    damage_the_config,
    name_an_unknown_type,
    damage_the_index,
    lose_the_weights,
    lose_a_tensor,
    cut_a_tensor,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_a_damaged_folder_is_refused_in_one_sentence(llama_folder, damage):
    culprit = damage(llama_folder)
    with pytest.raises(BadFolder) as caught:
        qft.quantize_and_wrap(llama_folder, "nf4", progress=False)
    message = str(caught.value)
    assert culprit in message
    assert "\n" not in message and len(message) < 100 + len(str(llama_folder)) * 2 + 150


@pytest.mark.parametrize("path", ["no/such/folder/anywhere", "someone/no-such-model", "no model at all!"])
def test_an_unknown_path_is_refused_by_its_name(path):
    with pytest.raises(BadFolder, match="no such folder") as caught:
        qft.quantize(path, "nf4", progress=False)
    assert path in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_is_no_folder(llama_folder):
    with pytest.raises(BadFolder, match="is a file"):
        qft.quantize(llama_folder / "config.json", "nf4", progress=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("spec", ["nf4", "int8", "reference"])
def test_nan_in_a_shard_is_refused_by_name(llama_folder, spec, value):
    def poison(tensors):
        tensors[UP_PROJ][3, 4] = value

    change(llama_folder, UP_PROJ, poison)
    with pytest.raises(NonFiniteWeights, match=UP_PROJ.replace(".", r"\.")):
        qft.quantize(llama_folder, spec, progress=False)
    model = qft.quantize(llama_folder, spec, skip=["layers.1.mlp.up_proj"], progress=False)
    assert not model.model.layers[1].mlp.up_proj.weight.isfinite().all()


def test_a_refusal_ends_the_load_at_once(llama_folder, monkeypatch):
    """The first bad weight ends it: transformers on its own would go on through every shard, and report at the end."""
    from qft.pipeline.from_pretrained import LoadingPlan

    def poison(tensors):
        tensors["model.layers.0.mlp.down_proj.weight"][0, 0] = float("nan")

    change(llama_folder, "model.layers.0.mlp.down_proj.weight", poison)
    arrived, before = [], LoadingPlan._arrive
    monkeypatch.setattr(
        LoadingPlan, "_arrive", lambda self, m, name, v: (arrived.append(name), before(self, m, name, v))
    )
    with pytest.raises(NonFiniteWeights):
        qft.quantize(llama_folder, "nf4", progress=False)
    assert arrived[-1] == "model.layers.0.mlp.down_proj" and len(arrived) < 14


def test_interrupting_a_load_is_an_interrupt(llama_folder, monkeypatch):
    from qft.pipeline.from_pretrained import LoadingPlan

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(LoadingPlan, "_arrive", interrupt)
    with pytest.raises(KeyboardInterrupt):
        qft.quantize(llama_folder, "nf4", progress=False)


def test_options_that_nothing_takes(llama_folder):
    with pytest.raises(BadOption, match="nonsense"):
        qft.quantize(llama_folder, "nf4", nonsense=3, progress=False)
    with pytest.raises(BadOption, match="floot16"):
        qft.quantize(llama_folder, "nf4", dtype="floot16", progress=False)
    with pytest.raises(BadOption, match="no_such_layer"):
        qft.quantize(llama_folder, "nf4", skip=["no_such_layer"], progress=False)
    with pytest.raises(QftError, match="rank 65"):
        qft.quantize_and_wrap(
            llama_folder, "nf4", adapter=LoraConfig(r=65, target_modules="all-linear"), progress=False
        )


# ---- memory ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_the_float_model_is_never_whole_in_memory(tmp_path):
    """320 MiB of float32 in 28 linear layers of 12 MiB and less, quantized in a process that watches its memory."""
    script = Path(__file__).parents[2] / "benchmarks" / "load_peak.py"
    subprocess.run(
        [sys.executable, str(script), "--out", str(tmp_path / "peak.json"), "--quantizer", "nf4", "reference"],
        check=True,
        capture_output=True,
    )
    for row in json.loads((tmp_path / "peak.json").read_text())["runs"]:
        assert row["float"] > 300 * 2**20 and row["samples"] > 100
        assert row["quantized"] < row["float"] / 3.5
        assert row["peak"] < row["quantized"] + 8 * row["largest_layer"], row
        assert row["peak"] < row["float"] / 2, row
        assert row["after"] < 1.1 * row["quantized"] + 2**23, row


# ---- checkpoints that are quantized already --------------------------------------------------------------

BNB = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "fp4:double_quant=true": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}
OTHER = {"nf4": "nf4:double_quant=true", "fp4:double_quant=true": "fp4", "int8": "nf4"}


def save_with_transformers(folders, name, spec, folder):
    cls = type(BUILDERS[name]())
    model = cls.from_pretrained(folders / name, quantization_config=BNB[spec])
    model.save_pretrained(folder)
    return cls


@pytest.mark.parametrize("spec", BNB)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_checkpoint_of_transformers_and_bitsandbytes_is_taken_as_it_is(folders, tmp_path, name, spec):
    cls = save_with_transformers(folders, name, spec, tmp_path)
    expected = logits(cls.from_pretrained(tmp_path))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = qft.quantize(tmp_path, spec, progress=False)
    assert [w for w in quantizer_warnings(caught) if "quantized in that way already" in w]
    assert torch.equal(logits(model), expected)
    ours = qft.quantize(folders / name, spec, progress=False)
    assert same_tensors(model, ours)

    with pytest.raises(AlreadyQuantized, match="quantized already"):
        qft.quantize(tmp_path, OTHER[spec], progress=False)

    wrapped = qft.wrap(qft.prepare_model_for_kbit_training(model))
    start = logits(wrapped.eval())
    train_a_little(wrapped)
    tuned = logits(wrapped)
    assert relative(tuned, start) > 1e-2
    codes = {k: v.clone() for k, v in model.state_dict().items() if "lora" not in k}
    assert relative(logits(qft.merge_to_float(wrapped)), tuned) < 1e-5
    report = qft.merge(wrapped)
    assert len(report.weights) == len(model._qft.quantizers)
    qft.unmerge(wrapped)
    after = {k: v for k, v in model.state_dict().items() if "lora" not in k}
    assert all(torch.equal(after[k], v) for k, v in codes.items())
    assert torch.equal(logits(wrapped), tuned)


def test_quantize_and_wrap_over_a_quantized_checkpoint(folders, tmp_path):
    save_with_transformers(folders, "llama", "nf4", tmp_path)
    with pytest.warns(QftWarning, match="already"):
        model = qft.quantize_and_wrap(tmp_path, "nf4", progress=False)
    assert relative(logits(model.eval()), logits(qft.quantize(llama(), "nf4", progress=False))) < 1e-6
    with pytest.raises(NeedsOriginal):
        qft.quantize_and_wrap(tmp_path, "nf4", init="loftq", progress=False)


# ---- saving a quantized model ----------------------------------------------------------------------------

PLAIN = """
import json, sys, torch, transformers
root = sys.argv[1]
told = {}
for name, cls in json.load(open(root + "/cases.json")).items():
    model = getattr(transformers, cls).from_pretrained(f"{root}/{name}")
    ids = torch.load(f"{root}/ids.pt")
    extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    torch.save(model(input_ids=ids, **extra).logits.detach(), f"{root}/{name}.pt")
    told[name] = sum("bitsandbytes" in type(m).__module__ for m in model.modules())
print(json.dumps({"qft": "qft" in sys.modules, "quantized": told}))
"""
SAVED = {
    "llama": ("nf4", "bfloat16", None),
    "qwen2": ("nf4:block_size=32", "float32", ["0.self_attn.q_proj"]),
    "gpt2": ("fp4:double_quant=true", "float32", ["mlp.c_fc"]),
    "t5": ("int8", "float32", None),
}


@pytest.fixture(scope="module")
def read_by_plain_transformers(folders, tmp_path_factory):
    """The models of `SAVED`, saved by `save_pretrained`; what they gave, and what plain transformers made of them."""
    root, expected, counts = tmp_path_factory.mktemp("saved"), {}, {}
    for name, (spec, dtype, skip) in SAVED.items():
        model = qft.quantize(folders / name, spec, dtype=dtype, skip=skip, progress=False)
        expected[name], counts[name] = logits(model).detach(), len(model._qft.quantizers)
        model.save_pretrained(root / name)
    (root / "cases.json").write_text(json.dumps({name: type(BUILDERS[name]()).__name__ for name in SAVED}))
    torch.save(batch(), root / "ids.pt")
    told = run(PLAIN, root)
    assert told["qft"] is False
    return {n: (expected[n], torch.load(root / f"{n}.pt"), counts[n], told["quantized"][n]) for n in SAVED}


@pytest.mark.parametrize("name", SAVED)
def test_plain_transformers_reads_what_save_pretrained_writes(read_by_plain_transformers, name):
    expected, found, layers, quantized = read_by_plain_transformers[name]
    assert quantized == layers > 0
    assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_a_float_layer_whose_name_ends_anothers_stays_float(tmp_path):
    """transformers matches what it leaves in float by the ends of names, too."""
    from qft.core.transformers_quantizer import _unquantized_linears

    model = plain()
    model.blocks[0].out = nn.Linear(64, 64)
    qft.quantize(model, "nf4", skip="out", progress=False)
    assert _unquantized_linears(model) == ["^out$"]


@pytest.mark.parametrize("spec", ["reference", "reference:format=fp4,double_quant=true", "reference:format=int,bits=3"])
@pytest.mark.parametrize("name", MODELS)
def test_a_packed_model_reloads_exactly(folders, tmp_path, name, spec):
    model = qft.quantize(folders / name, spec, progress=False)
    expected = logits(model)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    assert torch.equal(logits(model), expected)
    again = type(model).from_pretrained(tmp_path)
    assert same_tensors(again, model) and no_meta(again)
    assert torch.equal(logits(again), expected)
    assert {n for n, m in again.named_modules() if isinstance(m, qft.PackedLinear)} == set(model._qft.quantizers)
    with pytest.warns(QftWarning, match="already"):
        assert torch.equal(logits(qft.quantize(tmp_path, spec, progress=False)), expected)
    # and a second round
    again.save_pretrained(tmp_path / "again")
    assert same_tensors(type(model).from_pretrained(tmp_path / "again"), model)


@pytest.mark.parametrize("spec", ["reference", "reference:format=int,bits=4,group_size=32"])
def test_a_dtype_at_loading_leaves_codes_and_constants_alone(folders, tmp_path, spec):
    model = qft.quantize(folders / "qwen2", spec, progress=False)
    model.save_pretrained(tmp_path)
    half = type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)
    packed = {n: m for n, m in half.named_modules() if isinstance(m, qft.PackedLinear)}
    assert packed
    for name, layer in packed.items():
        for key, tensor in layer.packed.items():
            stored = getattr(model.get_submodule(name), key)
            assert tensor.dtype == stored.dtype and torch.equal(tensor, stored), f"{name}.{key}"
        assert layer.weight.dtype == torch.bfloat16
        assert layer.bias is None or layer.bias.dtype == torch.bfloat16
    assert half.model.norm.weight.dtype == half.model.embed_tokens.weight.dtype == torch.bfloat16
    assert relative(logits(half), logits(model)) < 0.03
    # the same as casting the model in memory
    cast = qft.quantize(qwen2(), spec, progress=False).to(torch.bfloat16)
    assert torch.equal(cast.model.layers[0].mlp.up_proj.weight, half.model.layers[0].mlp.up_proj.weight)


def test_a_reloaded_packed_model_wraps_trains_and_merges(folders, tmp_path):
    qft.quantize(folders / "gpt2", "reference", progress=False).save_pretrained(tmp_path)
    model = qft.wrap(qft.prepare_model_for_kbit_training(type(BUILDERS["gpt2"]()).from_pretrained(tmp_path)))
    before = {k: v.clone() for k, v in model.state_dict().items() if "lora" not in k}
    train_a_little(model)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert relative(logits(qft.merge_to_float(model)), logits(model)) < 1e-5


@pytest.mark.parametrize("spec", [{"*.mlp.*": "fp4", "*": "nf4"}, {"*.mlp.*": "reference", "*": "nf4"}])
def test_a_model_with_several_formats_refuses_to_be_saved(folders, tmp_path, spec):
    model = qft.quantize(folders / "llama", spec, progress=False)
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "out")
    assert not list(tmp_path.glob("out/*.safetensors"))
    wrapped = qft.wrap(model)
    with pytest.raises(UnsupportedOperation, match="several quantizers"):
        qft.save(wrapped, tmp_path / "adapter", base=True)
    assert not (tmp_path / "adapter").exists()
    qft.save(wrapped, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()


def test_several_packed_formats_have_one_of_their_own(folders, tmp_path):
    spec = {"*.mlp.*": "reference:format=int,bits=3,group_size=32", "*": "reference"}
    model = qft.quantize(folders / "llama", spec, progress=False)
    model.save_pretrained(tmp_path)
    assert same_tensors(type(model).from_pretrained(tmp_path), model)


def test_a_tampered_packed_config_is_a_bad_folder(folders, tmp_path):
    qft.quantize(folders / "llama", "reference", progress=False).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["layers"]["model.layers.7.mlp.up_proj"] = [0, 128, 64, "linear", "float32"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadFolder, match="does not fit"):
        qft.quantize(tmp_path, "reference", progress=False)


def test_saving_a_wrapped_model_saves_adapters(folders, tmp_path):
    model = qft.quantize_and_wrap(folders / "llama", "nf4", progress=False)
    train_a_little(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    files = {p.name for p in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in files and not {f for f in files if f.startswith("model")}
    size = (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size
    adapter = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert adapter <= size < adapter + 10_000

    base = qft.quantize(folders / "llama", "nf4", progress=False)
    assert torch.equal(logits(PeftModel.from_pretrained(base, str(tmp_path / "adapter"))), expected)
    # the base under it, without its adapters, still refuses or writes what it is
    unloaded = model.unload()
    unloaded.save_pretrained(tmp_path / "base")
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "base")),
        logits(qft.quantize(llama(), "nf4", progress=False)),
    )


# ---- qft.save and qft.load -------------------------------------------------------------------------------


def tuned(folder, spec="nf4", **options):
    options.setdefault("adapter", LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    return train_a_little(qft.quantize_and_wrap(folder, spec, progress=False, **options))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_an_adapter_round_trips_over_the_base_that_its_config_names(folders, tmp_path, name, spec):
    model = tuned(folders / name, spec)
    expected = logits(model)
    qft.save(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error", QftWarning)
        again = qft.load(tmp_path / "adapter")
    assert torch.equal(logits(again), expected)
    assert not again.training and not [n for n, p in again.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("base", ["folder", "float model", "quantized model", "quantized folder"])
@pytest.mark.parametrize("spec", ["nf4", "int8", "reference"])
def test_an_adapter_round_trips_over_any_form_of_its_base(folders, tmp_path, spec, base):
    model = tuned(folders / "llama", spec)
    expected = logits(model)
    qft.save(model, tmp_path / "adapter")
    if base == "folder":
        given = folders / "llama"
    elif base == "float model":
        given = llama()
    elif base == "quantized model":
        given = qft.quantize(llama(), spec, progress=False)
    else:
        given = tmp_path / "quantized"
        qft.quantize(llama(), spec, progress=False).save_pretrained(given)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        again = qft.load(tmp_path / "adapter", base=given, is_trainable=True)
    # only a base that somebody stored without its fingerprint is worth a word
    assert bool(quantizer_warnings(caught)) == (base == "quantized folder")
    assert not [m for m in quantizer_warnings(caught) if "another quantization" in m]
    assert torch.equal(logits(again), expected)
    trainable = {n for n, p in again.named_parameters() if p.requires_grad}
    assert trainable == {n for n, p in model.named_parameters() if p.requires_grad}
    train_a_little(again)
    assert relative(logits(again), expected) > 1e-3


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", ["qwen2", "gpt2", "t5"])
def test_a_stored_base_needs_nothing_else(tmp_path, name, spec):
    """The float model was never in a folder, and qft.save stores the quantized one."""
    model = tuned(BUILDERS[name](), spec)
    expected = logits(model)
    qft.save(model, tmp_path / "all", base=True)
    assert torch.equal(logits(model), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error", QftWarning)
        again = qft.load(tmp_path / "all")
    assert torch.equal(logits(again), expected)
    assert again.get_base_model()._qft.fingerprint.keys() == model.get_base_model()._qft.fingerprint.keys()
    # the stored base is a checkpoint of its own, without any adapter
    base = type(BUILDERS[name]()).from_pretrained(tmp_path / "all" / "base")
    with model.disable_adapter():
        assert relative(logits(base), logits(model)) < (1e-6 if spec != "int8" else 5e-2)
    assert not [k for k in base.state_dict() if "lora" in k or "base_layer" in k]


@pytest.mark.parametrize("base", [None, "folder", "float model"])
def test_iterated_loftq_stores_the_base_that_it_changed(folders, tmp_path, base):
    model = tuned(folders / "llama", "nf4", init=qft.LoftQ(steps=3))
    expected = logits(model)
    qft.save(model, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "base" / "model.safetensors").is_file()
    given = {None: None, "folder": folders / "llama", "float model": llama()}[base]
    assert torch.equal(logits(qft.load(tmp_path / "adapter", base=given)), expected)


def test_a_plain_module_round_trips(tmp_path):
    model = tuned(plain(), "reference")
    expected = logits(model)
    qft.save(model, tmp_path / "adapter")
    assert torch.equal(logits(qft.load(tmp_path / "adapter", base=plain())), expected)
    with pytest.raises(BadFolder, match="base="):
        qft.load(tmp_path / "adapter")
    qft.save(model, tmp_path / "all", base=True)
    assert torch.equal(logits(qft.load(tmp_path / "all", base=plain())), expected)
    with pytest.raises(BadFolder, match="base="):
        qft.load(tmp_path / "all")


def test_qft_json_says_what_the_folder_holds(folders, tmp_path):
    spec = {"*.mlp.*": "reference:format=int,bits=4,group_size=32", "*": "nf4"}
    model = tuned(folders / "llama", spec, init="loftq")
    qft.save(model, tmp_path)
    note = json.loads((tmp_path / "qft.json").read_text())
    record = model.get_base_model()._qft
    assert note["format"] == 1 and note["qft"] == qft.__version__
    assert {n: note["quantizers"][i]["name"] for n, i in note["layers"].items()} == {
        n: q.name for n, q in record.quantizers.items()
    }
    assert qft.get_quantizer(note["quantizers"][note["layers"]["model.layers.0.mlp.up_proj"]]) == qft.Reference(
        format="int", bits=4, group_size=32
    )
    assert note["init"] == repr(qft.LoftQ()) and note["forward"] == "dequantize"
    assert note["base_stored"] is False and note["base_changed"] is False
    assert note["fingerprint"].keys() == record.quantizers.keys()
    shape, values = note["fingerprint"]["model.layers.1.mlp.up_proj"]
    assert shape == [128, 64] and len(values) == 64
    assert set(values) <= {float(f"{v:.6g}") for v in llama().model.layers[1].mlp.up_proj.weight.flatten().tolist()}
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(folders / "llama") and config["init_lora_weights"] is True


def test_another_models_weights_are_a_mismatch(folders, tmp_path):
    model = tuned(folders / "llama")
    qft.save(model, tmp_path / "adapter")
    other = llama(seed=5)
    other.save_pretrained(tmp_path / "other")
    for base in (tmp_path / "other", other, qft.quantize(llama(seed=5), "nf4", progress=False)):
        before = logits(base) if isinstance(base, nn.Module) else None
        with pytest.raises(AdapterMismatch, match="original weights"):
            qft.load(tmp_path / "adapter", base=base)
        if before is not None:
            assert torch.equal(logits(base), before)
    almost = llama()
    with torch.no_grad():  # fine-tuned a little, as a later release of the same model would be
        almost.model.layers[1].mlp.up_proj.weight.mul_(1.03)
    with pytest.raises(AdapterMismatch, match=r"1 of 14 layers differ, model\.layers\.1\.mlp\.up_proj"):
        qft.load(tmp_path / "adapter", base=almost)


def test_another_dtype_of_the_same_weights_is_none(folders, tmp_path):
    qft.save(tuned(folders / "llama"), tmp_path / "adapter")
    again = qft.load(tmp_path / "adapter", base=folders / "llama", dtype=torch.bfloat16)
    assert logits(again).dtype == torch.bfloat16


def test_another_quantizer_over_the_same_weights_is_a_warning(folders, tmp_path):
    model = tuned(folders / "llama")
    expected = logits(model)
    qft.save(model, tmp_path / "adapter")
    with pytest.warns(QftWarning, match="another quantization"):
        again = qft.load(tmp_path / "adapter", base=qft.quantize(llama(), "int8", progress=False))
    assert 0 < relative(logits(again), expected) < 0.2


def test_an_adapter_without_a_note_is_taken_over_a_quantized_base(folders, tmp_path):
    model = tuned(folders / "llama")
    expected = logits(model)
    model.save_pretrained(tmp_path)
    (tmp_path / "qft.json").unlink()  # as PEFT writes the folder where qft is not loaded
    base = qft.quantize(folders / "llama", "nf4", progress=False)
    assert torch.equal(logits(qft.load(tmp_path, base=base)), expected)
    with pytest.raises(BadOption, match="float model"):
        qft.load(tmp_path)

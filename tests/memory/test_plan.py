"""Plans against what was measured: peaks on a GPU, bytes of real layers, what autograd saves in a step, published figures."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from models import gpt2, llama, qwen2, qwen3_moe, t5, whisper
from peft import LoraConfig
from transformers import LlamaConfig, Qwen3MoeConfig

import qft
from qft.core.blocks import find_blocks
from qft.memory.estimate import Estimate, optimizer_bytes
from qft.memory.report import PARTS, memory_of, needed

GIB = 2**30
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def config(hidden, wide, layers, heads, kv, vocabulary=128256, tied=False, **more):
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=wide,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        max_position_embeddings=131072,
        dtype="bfloat16",
        **more,
    )


SHAPES = {
    "8b": config(4096, 14336, 32, 32, 8),
    "3b": config(3072, 8192, 28, 24, 8, tied=True),
    "1b": config(2048, 8192, 16, 32, 8, tied=True),
    "llama2-7b": config(4096, 11008, 32, 32, 32, 32000),
    "13b": config(5120, 13824, 40, 40, 40, 32000),
    "33b": config(6656, 17920, 60, 52, 52, 32000),
    "65b": config(8192, 22016, 80, 64, 64, 32000),
    "70b": config(8192, 28672, 80, 64, 8),
}
MEMORY = {"all": "least", "half": 0.5, "none": "most", "auto": "most"}  # "auto" on 80 GB
small = llama(torch.bfloat16, vocab_size=96).config


# ---- peaks that were measured on a GPU -------------------------------------------------------------------


def measured():
    """Every run of qft's stacks that the results hold: (file, shape, spec, recomputation, batch, sequence) and its figures."""
    found = {}
    for path in sorted(RESULTS.glob("train_step-*h100.json")):
        document = json.loads(path.read_text())
        for run in document["runs"]:
            name, _, spec = run["stack"].partition("@")[0].partition(":")
            if name == "qft" and "peak_gib" in run:
                key = (path.stem, document["shape"], spec or "nf4", run["recompute"], run["batch"], run["sequence"])
                found[key] = run
    return found


MEASURED = measured()
MISSES: dict = {}
"""Key of `MEASURED` → why its plan is off by more than 5 %. There is none."""


def planned(shape, spec="nf4", *, batch, sequence, recompute="all", **more):
    options = {"optimizer": "paged_adamw8bit", "memory": MEMORY[recompute], **more}
    return qft.plan(SHAPES[shape], spec, batch_size=batch, sequence_length=sequence, **options)


@pytest.mark.parametrize("key", MEASURED, ids=lambda k: "-".join(map(str, k)))
def test_peaks_measured_on_a_gpu(key):
    """Within 5 % is asked for, and within 1 % is what they are."""
    _, shape, spec, recompute, batch, sequence = key
    plan = planned(shape, spec, batch=batch, sequence=sequence, recompute=recompute)
    run = MEASURED[key]
    if key in MISSES:
        assert abs(plan.training_peak / GIB / run["peak_gib"] - 1) > 0.05, "no miss any more"
        return
    assert plan.training_peak / GIB == pytest.approx(run["peak_gib"], rel=0.01)
    frozen = sum(plan.moments["loss"][p] for p in ("codes", "constants", "embeddings", "other", "adapters"))
    # bitsandbytes' and HQQ's weights come out of larger pieces, whose rests torch's allocator counts, too
    assert 0 <= run["model_gib"] - frozen / GIB + 1e-3 <= 0.12


COMBINATIONS = [r for r in json.loads((RESULTS / "memory_plan-h200.json").read_text())["runs"] if "peak_gib" in r]


@pytest.mark.parametrize("run", COMBINATIONS, ids=lambda r: f"{r['combination']}-{r['model']}-{r['quantizer']}")
def test_combinations_measured_on_a_gpu(run, monkeypatch):
    """Three architectures, small and large, and a mixture: within 5 %."""
    monkeypatch.syspath_prepend(RESULTS.parent)
    import memory_plan

    plan = qft.plan(
        memory_plan.config(run["model"], False), run["quantizer"], batch_size=run["batch"], fast=run["fast"],
        sequence_length=run["sequence"], adapter=memory_plan.adapter(run["model"]), optimizer=run["optimizer"],
        memory=MEMORY[run["recompute"]],
    )  # fmt: skip
    ratio = plan.training_peak / GIB / run["peak_gib"]
    assert ratio == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("name", "abcd")
def test_a_70b_shape_measured_on_a_gpu(name):
    document = json.loads((RESULTS / "seventy-h100.json").read_text())
    run = next(r for r in document["runs"] if r["run"] == name)
    memory = run["limit"] if run["offload"] else "least"
    plan = planned(
        "70b", document["quantizer"], batch=1, sequence=run["sequence"], optimizer="adamw8bit", memory=memory,
        offload=run["offload"],
    )  # fmt: skip
    assert plan.resident == run.get("resident") and plan.fits(run["limit"])
    assert plan.training_peak / GIB == pytest.approx(run["peak_gib"], rel=0.01)


def test_offloaded_inputs_measured_on_a_gpu():
    document = json.loads((RESULTS / "train_step-8b-memory-h100.json").read_text())
    run = next(r for r in document["runs"] if r["stack"] == "qft-offload")
    plan = planned("8b", batch=4, sequence=2048, offload="activations")
    assert plan.training_peak / GIB == pytest.approx(run["peak_gib"], rel=0.02)


CONTEXTS = [
    r
    for r in json.loads((RESULTS / "context-h200.json").read_text())["runs"]
    if "peak_gib" in r and r["stack"] in ("qft", "qft-offload")
]


@pytest.mark.parametrize("run", CONTEXTS, ids=lambda r: f"{r['stack']}-{r['sequence']}")
def test_long_sequences_measured_on_a_gpu(run):
    """Up to 131,072 tokens, with and without offloaded inputs."""
    offload = "activations" if run["stack"] == "qft-offload" else None
    plan = planned("8b", batch=1, sequence=run["sequence"], offload=offload)
    assert plan.training_peak / GIB == pytest.approx(run["peak_gib"], rel=0.01)


def test_a_loss_without_a_kernel_takes_more(monkeypatch):
    asked = {"batch": 4, "sequence": 512}
    with_kernel = planned("1b", **asked).moments["loss"]["logits"]
    monkeypatch.setattr("qft.ops.kernels.launch.enabled", False)
    without = planned("1b", **asked).moments["loss"]["logits"]
    assert 2**27 < without - with_kernel < 2**29  # float32 copies of a part of a chunk


def test_there_are_fixtures():
    assert len(MEASURED) >= 12 and len(COMBINATIONS) >= 17 and len(CONTEXTS) >= 14


def test_a_mixture_measured_on_a_gpu():
    found = json.loads((RESULTS / "experts-h100.json").read_text())
    mixture = Qwen3MoeConfig(**found["model"], tie_word_embeddings=False, dtype="bfloat16")
    adapter = LoraConfig(
        r=16, target_modules="all-linear", target_parameters=["experts.gate_up_proj", "experts.down_proj"]
    )
    plan = qft.plan(
        mixture, found["spec"], sequence_length=2048, adapter=adapter, optimizer="adamw8bit", fast=False, autocast=True
    )
    parts = plan.moments["loss"]
    assert parts["codes"] + parts["constants"] == found["quantized_bytes"]
    assert parts["adapters"] == pytest.approx(4 * found["trainable"], rel=1e-3)
    assert plan.training_peak / GIB == pytest.approx(found["training"]["peak_gib"], rel=0.01)


def test_quantizing_in_place_measured_on_a_gpu():
    run = json.loads((RESULTS / "quantize_8b-h200.json").read_text())["runs"][0]
    plan = planned("8b", batch=1, sequence=16, loading="memory")
    assert plan.totals["loading"] / GIB == pytest.approx(run["peak_gib"], rel=1e-3)
    assert plan.moment == "loading" and plan.peak == plan.totals["loading"]


# ---- published figures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, gib",
    [("llama2-7b", 3.60), ("8b", 5.31), ("13b", 6.71), ("33b", 16.22), ("65b", 32.09), ("70b", 36.80)],
)
def test_published_weights_alone(shape, gib):
    """NF4 with double quantization, bfloat16 embeddings and head."""
    parts = planned(shape, "nf4:double_quant=true", batch=1, sequence=16).moments["loading"]
    assert sum(parts[p] for p in ("codes", "constants", "embeddings", "other")) / GIB == pytest.approx(gib, abs=0.006)


@pytest.mark.parametrize("shape, batch, sequence, gib", [("8b", 2, 2048, 7.4), ("3b", 2, 4096, 4.6)])
def test_published_torchtune(shape, batch, sequence, gib):
    """torchtune, compiled. Its rank is 8, its optimizer torch's AdamW; it has the logits of all tokens in chunks, where ours
    are gone before the peak: of the 3B shape, whose vocabulary is wide for its size, the plan is 3 % less."""
    modules = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapter = LoraConfig(r=8, target_modules=modules)
    plan = planned(shape, "nf4:double_quant=true", batch=batch, sequence=sequence, adapter=adapter, optimizer="adamw")
    assert gib * 0.96 < plan.training_peak / GIB < gib


@pytest.mark.parametrize("shape, gb", [("llama2-7b", 6.9), ("13b", 11.3), ("33b", 24.7), ("65b", 45.0)])
def test_published_qlora(shape, gb):
    """The QLoRA paper, batch 1 × 512, rank 64, 10⁹ bytes. Between two plans: with the paged states of its 32-bit AdamW in host
    memory, and with all of them on the card, where they stay while there is room, beside its float32 embeddings and head."""
    adapter = LoraConfig(r=64, target_modules="all-linear")
    options = {"batch": 1, "sequence": 512, "adapter": adapter, "fast": False, "autocast": True}
    plan = planned(shape, "nf4:double_quant=true", optimizer="paged_adamw32bit", **options)
    most = plan.training_peak + plan.host + plan.parts["embeddings"]
    assert plan.training_peak < gb * 1e9 < most


# ---- weights ---------------------------------------------------------------------------------------------

WIDE = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 4}


def quantized(model, spec):
    quantizer = qft.get_quantizer(spec)
    data = [torch.randint(0, 96, (1, 16)) for _ in range(2)] if quantizer.capabilities.needs_calibration else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return qft.audit(qft.quantize(model, quantizer, calibration=data, progress=False))


def weighed(config, spec):
    parts = qft.plan(config, spec, sequence_length=16, dtype=torch.bfloat16).moments["loading"]
    return parts["codes"] + parts["constants"], sum(parts[p] for p in ("codes", "constants", "embeddings", "other"))


SPECS = [n for n, info in qft.available_quantizers().items() if info.state == "ready" and n != "aqlm"]


@pytest.mark.parametrize("spec", [*SPECS, "nf4:double_quant=true", "reference:format=int,bits=3"])
def test_bytes_of_every_backend(spec):
    """To the byte, but for the padding of small tensors to CUDA's 512 bytes and scalars of double quantization."""
    model = llama(torch.bfloat16, **WIDE)
    found = quantized(model, spec)
    codes, whole = weighed(model.config, spec)
    assert abs(codes - found.quantized_bytes) <= 16 * len(found.weights)
    assert 0 <= whole - found.nbytes + 16 * len(found.weights) < 3000


@pytest.mark.slow
def test_bytes_of_codebooks():
    model = llama(torch.bfloat16, **WIDE, num_hidden_layers=1)
    assert weighed(model.config, "aqlm")[0] == quantized(model, "aqlm").quantized_bytes


@pytest.mark.parametrize("make", [qwen2, gpt2, qwen3_moe])
def test_bytes_of_architectures(make):
    """Biases and tied heads, Conv1D, experts."""
    model = make(torch.bfloat16)
    found = quantized(model, "nf4")
    codes, whole = weighed(model.config, "nf4")
    assert codes == found.quantized_bytes
    assert 0 <= whole - found.nbytes < 16000


def test_a_mixture_of_quantizers():
    spec = {"*.mlp.*": "reference:format=int,bits=3", "*.k_proj": None, "*": "nf4"}
    model = llama(torch.bfloat16)
    codes, _ = weighed(model.config, spec)
    assert codes == qft.audit(qft.quantize(model, spec, progress=False)).quantized_bytes


@pytest.mark.parametrize("make", [llama, gpt2, qwen3_moe])
def test_adapters_as_they_are_made(make):
    adapter = LoraConfig(r=4, target_modules="all-linear", rank_pattern={".*0.*": 8})
    if make is qwen3_moe:
        adapter.target_parameters = ["experts.gate_up_proj", "experts.down_proj"]
    model = make(torch.bfloat16)
    estimate = Estimate(model.config, "nf4", adapter=adapter, dtype=torch.bfloat16)
    wrapped = qft.quantize_and_wrap(model, "nf4", adapter=adapter, progress=False)
    real = sorted(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert sorted(estimate.outline.weights.trained) == real


# ---- activations -----------------------------------------------------------------------------------------


def saved_bytes(block, run):
    """Bytes that autograd saves while `run` runs, each storage once; weights are left out."""
    weights = {p.untyped_storage().data_ptr() for p in block.parameters()}
    found = {}

    def pack(tensor):
        pointer = tensor.untyped_storage().data_ptr()
        if pointer not in weights:
            found[pointer] = (tensor, -(-tensor.untyped_storage().nbytes() // 512) * 512)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run()
    return y, sum(nbytes for _, nbytes in found.values())


@pytest.mark.parametrize("make", [llama, qwen2, gpt2])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_saved_is_what_a_real_step_saves(make, dropout):
    """The plain path, in float32: the same storages as on any CPU."""
    adapter = LoraConfig(r=4, target_modules="all-linear", lora_dropout=dropout)
    model = make()
    estimate = Estimate(model.config, "nf4", adapter=adapter, dtype=torch.float32, fast=False)
    wrapped = qft.quantize_and_wrap(
        model, "nf4", adapter=adapter, use_gradient_checkpointing=False, progress=False
    ).train()
    block = find_blocks(wrapped)[0][1][1]
    inside, found = block.forward, {}

    def spy(x, *args, **kwargs):
        y, found["bytes"] = saved_bytes(block, lambda: inside(x, *args, **kwargs))
        found["boundary"] = x.untyped_storage().nbytes()
        return y

    block.forward = spy
    ids = torch.randint(0, 96, (2, 64))
    wrapped(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    profile = estimate.measured(2, 64).blocks[1]
    assert profile.boundary == found["boundary"]
    # position embeddings are shared by all blocks: here they are among what is saved, and a plan has them once
    shared = found["bytes"] - profile.saved
    assert 0 <= shared <= 4 * 64 * 16 * 4


def test_bytes_grow_with_what_is_kept_and_with_the_batch():
    peaks = [qft.plan(small, sequence_length=64, batch_size=4, memory=m).training_peak for m in (0, 1, 2)]
    assert peaks == sorted(set(peaks))
    batches = [qft.plan(small, sequence_length=64, batch_size=b).training_peak for b in (1, 2, 4)]
    assert batches == sorted(set(batches))


def test_a_second_size_is_measured_as_the_first_would_be():
    again, once = Estimate(small, "nf4"), Estimate(small, "nf4")
    again.measured(1, 32)
    assert again.measured(2, 64) == once.measured(2, 64)


def test_the_plain_path_has_all_logits():
    fast, plain = (qft.plan(small, sequence_length=128, batch_size=8, fast=f) for f in (True, False))
    tokens = 8 * 128
    assert plain.moments["loss"]["logits"] > 2 * 4 * tokens * small.vocab_size
    assert plain.training_peak > fast.training_peak


# ---- optimizers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, bytes_a_weight", [("adamw", 8), ("adamw8bit", 2), ("sgd", 0), ("sgd_momentum", 4)])
def test_optimizer_states(name, bytes_a_weight):
    device, host, _ = optimizer_bytes(name, (2**20, 2**20))
    assert host == 0 and device == pytest.approx(bytes_a_weight * 2**21, rel=0.02)


def test_optimizer_states_of_torch_are_these():
    weights = [torch.nn.Parameter(torch.zeros(128, 64)) for _ in range(3)]
    optimizer = torch.optim.AdamW(weights)
    for w in weights:
        w.grad = torch.ones_like(w)
    optimizer.step()
    real = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values() if t.dim())
    assert optimizer_bytes("adamw", tuple(w.numel() for w in weights))[0] == real


def test_paged_states_of_large_weights_are_on_the_host():
    device, host, _ = optimizer_bytes("paged_adamw8bit", (65536, 229376))
    assert host == 2 * 229376 and device < 2 * 65536 * 1.1 + 8 * 229376 / 256
    assert optimizer_bytes("paged_adamw32bit", (229376,)) == (0, 8 * 229376, 0)


# ---- what comes out --------------------------------------------------------------------------------------


def test_parts_add_up_and_are_printed(tmp_path):
    plan = qft.plan(small, batch_size=2, sequence_length=64, optimizer="adamw_torch")
    assert plan.peak == sum(plan.parts.values()) == max(plan.totals.values())
    assert {p for parts in plan.moments.values() for p in parts} <= set(PARTS)
    text = str(plan)
    for says in ("LlamaForCausalLM", "all blocks recomputed", "quantized weights", plan.moment, "GiB"):
        assert says in text
    read = json.loads(plan.to_json(tmp_path / "plan.json"))
    assert read == json.loads((tmp_path / "plan.json").read_text())
    assert read["peak"] == plan.peak and read["optimizer"] == "adamw"
    with pytest.raises(qft.BadFolder, match="nowhere"):
        plan.to_json(tmp_path / "nowhere" / "plan.json")


def test_fits_leaves_room_for_what_the_allocator_does_not_count():
    plan = qft.plan(small, sequence_length=64)
    assert plan.needed == needed(plan.peak) > plan.peak
    assert plan.fits(plan.needed) and not plan.fits(plan.needed - 1)
    assert plan.fits("24GB") and not plan.fits("10MB")


def test_amounts():
    assert memory_of("24GB") == 24 * 10**9 and memory_of("1.5 GiB") == 3 * 2**29 and memory_of(5) == 5
    for wrong in ("24", "GB", "B", "-1GB", "many GB", 0, True, None, "nanGB", "infGB"):
        with pytest.raises(qft.BadOption, match="24GB"):
            memory_of(wrong)


def test_more_cards_take_less_each():
    one, four = (planned("8b", batch=1, sequence=512, cards=c) for c in (1, 4))
    assert four.moments["loss"]["codes"] == one.moments["loss"]["codes"] // 4
    assert one.training_peak / 4 < four.training_peak < one.training_peak


# ---- what fits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amount", ["24GB", "80GB", "10GiB", "9GB"])
def test_what_fits_is_the_most_that_fits(amount):
    plan = qft.plan(SHAPES["8b"], batch_size=2, sequence_length=2048, optimizer="paged_adamw8bit", memory=amount)
    assert plan.fits(amount) and amount in plan.answer and plan.answer in str(plan)
    assert f"batch {plan.batch_size} × 2048" in plan.answer
    if plan.kept < plan.blocks:
        again = qft.plan(
            SHAPES["8b"],
            plan.quantizer,
            batch_size=plan.batch_size,
            sequence_length=2048,
            optimizer="paged_adamw8bit",
            memory=plan.kept + 1,
        )
        assert not again.fits(amount)
    if amount == "24GB":
        assert plan.batch_size == 2 and plan.quantizer == "nf4" and 0 < plan.kept < plan.blocks
    if amount == "80GB":
        assert plan.kept == plan.blocks and "memory='most'" in plan.answer


@pytest.mark.slow
def test_less_than_possible_says_what_would_do():
    plan = qft.plan(SHAPES["8b"], batch_size=4, sequence_length=2048, memory="4GB")
    assert not plan.fits("4GB") and "too little" in plan.answer and "leave no room" in plan.answer
    plan = qft.plan(SHAPES["8b"], batch_size=1, sequence_length=16384, memory="9GB")
    assert not plan.fits("9GB") and "what would fit" in plan.answer


# ---- what goes in ----------------------------------------------------------------------------------------


def test_config_folder_and_model_are_one(tmp_path):
    model = llama(torch.bfloat16)
    model.config.save_pretrained(tmp_path)
    before = {n: p.clone() for n, p in model.named_parameters()}
    plans = [qft.plan(s, sequence_length=64, dtype="bfloat16").to_dict() for s in (model, model.config, tmp_path)]
    assert plans[0] == plans[1] == plans[2]
    assert all(torch.equal(p, before[n]) and not p.is_meta for n, p in model.named_parameters())
    wrapped = qft.quantize_and_wrap(model, "nf4", progress=False)
    assert qft.plan(wrapped, sequence_length=64, dtype="bfloat16").to_dict() == plans[0]


def test_longer_than_the_model_is_a_warning():
    with pytest.warns(qft.QftWarning, match="128 positions"):
        qft.plan(small, sequence_length=256)


@pytest.mark.parametrize(
    "options, says",
    [
        ({"optimizer": "adam8bit"}, "adamw8bit"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": True}, "batch_size"),
        ({"sequence_length": -1}, "sequence_length"),
        ({"cards": 0}, "cards"),
        ({"memory": "much"}, "24GB"),
        ({"memory": 1.5}, "memory=1.5"),
        ({"loading": "disk"}, "loading"),
        ({"device": "gpu"}, "device"),
        ({"skip": "lm_head"}, "skip"),
        ({"quantizer": None}, "no quantizer"),
        ({"dtype": "int8"}, "int8"),
    ],
)
def test_bad_options(options, says):
    with pytest.raises(qft.BadOption, match=says):
        qft.plan(small, **{"sequence_length": 16, **options})


def test_what_is_not_known_is_refused(tmp_path):
    for make in (t5, whisper):
        with pytest.raises(qft.UnsupportedOperation, match="encoder-decoder"):
            qft.plan(make(), sequence_length=16)
    with pytest.raises(qft.UnsupportedOperation, match="use_dora"):
        qft.plan(small, sequence_length=16, adapter=LoraConfig(use_dora=True, target_modules="all-linear"))
    with pytest.raises(qft.BadFolder):
        qft.plan(tmp_path, sequence_length=16)
    with pytest.raises(qft.BadOption, match="no config"):
        qft.plan(torch.nn.Linear(4, 4), sequence_length=16)
    with pytest.raises(qft.BadOption, match="folder"):
        qft.plan(7, sequence_length=16)
    with pytest.raises(qft.UnknownQuantizer):
        qft.plan(small, "nf5", sequence_length=16)
    with pytest.raises(qft.NoTargets):
        qft.plan(small, sequence_length=16, adapter=LoraConfig(target_modules=["nothing"]))
    with pytest.raises(qft.BadShape):
        qft.plan(small, sequence_length=16, adapter=LoraConfig(r=4096, target_modules="all-linear"))

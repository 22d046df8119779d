"""What only a CUDA device shows; `pytest -m gpu` runs these and the kit's CUDA half."""

import models
import pytest
import torch
from models import BUILDERS, batch, logits, relative, train_a_little
from moes import EXPERTS, MOES
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from twins import gradient_error, loss_and_gradients, pair

import qft

pytestmark = pytest.mark.gpu

SPECS = [
    "nf4",
    "fp4:double_quant=true",
    "int8",
    "reference",
    "reference:format=int,bits=3,group_size=32",
    "gptq",
    "gptq:bits=3,group_size=32,desc_act=true",
    "gptq:bits=8,group_size=16,checkpoint_format=gptq_v2,symmetric=false",
    "awq",
    "awq:group_size=32",
    "awq:group_size=-1,zero_point=false",
    "hqq",
    "hqq:bits=3,axis=0",
    "quanto",
    "quanto:format=int4",
    "quanto:format=float8",
    "eetq",
    "torchao",
    "torchao:group_size=32",
    "torchao:format=float8",
    "torchao:format=int,bits=4,group_size=32",
    "torchao:format=nf4,scaler_block_size=8",
    "aqlm:rounds=1,beam=2",
    "aqlm:num_codebooks=1,nbits_per_codebook=12,rounds=1,beam=1",
    "auto-round",
    "bitnet",
    "compressed-tensors",
    "compressed-tensors:bits=3,group_size=32,symmetric=false",
    "fp8",
    "fp8:scaling=row",
    "gguf:type=Q4_1",
    "gguf",
    "inc",
    "inc:bits=3,group_size=32,symmetric=false",
    "inc:method=nf4",
    "inc:method=gptq,group_size=32",
    "inc:method=awq,group_size=32",
    "mxfp4",
    "reference:format=int,group_size=64,scaling=sinq",
    "hqq:scaling=sinq",
    "sinq",
    "sinq:bits=3,group_size=32,double_quant=false",
    "sinq:bits=5",
]


def llama(dtype=torch.float32):
    """Widths in multiples of 64, as EETQ has them."""
    return models.llama(dtype, num_key_value_heads=4)


def options(spec, architecture=""):
    """What a spec needs besides itself."""
    found = {"progress": False}
    if qft.capabilities(spec).needs_calibration:
        found["calibration"] = batch(3, (6, 20))
    if spec == "eetq" and architecture in ("llama", "qwen2"):
        found["skip"] = ["k_proj", "v_proj"]
    if spec == "eetq" and architecture == "plain":
        found["skip"] = ["out"]
    return found


def quantized(spec, dtype=torch.float32, **other):
    return qft.quantize_and_wrap(llama(dtype).cuda(), spec, **options(spec), **other)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("architecture", BUILDERS)
def test_tuned_model_merges_to_float(architecture, spec):
    torch.backends.cuda.matmul.allow_tf32 = False
    model = BUILDERS[architecture]().cuda()
    model = train_a_little(qft.quantize_and_wrap(model, spec, **options(spec, architecture)))
    tuned = logits(model)
    assert relative(logits(qft.merge_to_float(model, dtype=torch.float32)), tuned) < 1e-5
    before = {k: v.clone() for k, v in model.state_dict().items()}
    report = qft.merge(model)
    assert 0 < report.survived < 1.2
    qft.unmerge(model)
    assert all(torch.equal(_bits(v), _bits(before[k])) for k, v in model.state_dict().items())
    assert torch.equal(logits(model), tuned)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_trains_and_merges(spec, dtype):
    model = train_a_little(quantized(spec, dtype), lr=2e-3)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    bound = 0.02 if dtype == torch.bfloat16 else 0.003
    assert relative(logits(qft.merge_to_float(model)), logits(model)) < bound


SEARCHED = ["aqlm:rounds=1,beam=2", "inc:method=awq,group_size=32"]
"""Found by a search with many ends of nearly the same error: rounding decides which."""


@pytest.mark.parametrize("spec", SEARCHED)
def test_as_close_to_the_float_model_as_on_the_cpu(spec):
    with torch.no_grad():
        wanted = logits(llama())
        cpu, cuda = (logits(qft.quantize(m, spec, **options(spec))) for m in (llama(), llama().cuda()))
    assert relative(cuda.cpu(), wanted) == pytest.approx(relative(cpu, wanted), rel=0.15)


@pytest.mark.parametrize("spec", [s for s in SPECS if s not in SEARCHED])
def test_same_weights_as_on_the_cpu(spec):
    """One and the same codes, to rounding ties, wherever a model is quantized."""
    cpu = qft.quantize(llama(), spec, **options(spec))
    cuda = qft.quantize(llama().cuda(), spec, **options(spec))
    # LLM.int8() rounds activations, HQQ's solver stops when it no longer gains, calibrated ones carry errors on
    bound = 0.02 if spec.partition(":")[0] in ("int8", "hqq", "gptq", "awq") else 2e-3
    if spec.startswith("sinq"):
        bound = 0.05  # its zero points are codes: a tie moves a group, and a last bit of the weights as much
    if (spec.startswith("torchao") and "group_size" in spec) or spec == "compressed-tensors":
        bound = 0.05  # their symmetric scales put the largest weight of each group on a tie between two codes
    assert relative(logits(cuda), logits(cpu)) < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("spec", ["nf4", "int8", "reference:format=int,bits=4,group_size=32", "hqq:group_size=32"])
@pytest.mark.parametrize("builder", MOES.values(), ids=MOES)
def test_experts(builder, spec, dtype):
    """Outputs and gradients of packed experts, by loops in float32 and by grouped kernels in bfloat16."""
    torch.backends.cuda.matmul.allow_tf32 = False
    config = LoraConfig(r=4, target_modules="all-linear", target_parameters=EXPERTS)
    ours, theirs = (m.cuda() for m in pair(builder, spec, config))
    wanted = loss_and_gradients(theirs)[1]
    if dtype == torch.float32:
        assert relative(logits(ours), logits(theirs)) < 1e-5
        assert gradient_error(loss_and_gradients(ours)[1], wanted) < 1e-4
    else:
        with torch.autocast("cuda", dtype=dtype):
            assert relative(logits(ours), logits(theirs)) < 0.02
            found = loss_and_gradients(ours)[1]
        assert gradient_error(found, wanted) < 0.1


def test_quantizing_to_a_device_moves_everything():
    model = qft.quantize(llama(), "nf4", device="cuda", progress=False)
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("spec", SPECS)
def test_moving_a_quantized_model(spec):
    model = qft.quantize_and_wrap(llama(), spec, **options(spec))
    there = logits(model.cuda())
    back = logits(model.cpu())
    assert relative(there, back) < 1e-4


@pytest.mark.parametrize("spec", SPECS)
def test_save_and_load(tmp_path, spec):
    model = train_a_little(quantized(spec))
    calibrated = qft.capabilities(spec).needs_calibration
    qft.save(model, tmp_path / "adapter", base=calibrated)
    again = qft.load(tmp_path / "adapter", base=None if calibrated else llama().cuda()).cuda()
    assert torch.equal(logits(again), logits(model))


def test_a_folder_goes_to_the_gpu(tmp_path):
    llama(torch.bfloat16).save_pretrained(tmp_path)
    model = qft.quantize_and_wrap(tmp_path, "nf4", progress=False, init="loftq")
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    other = qft.quantize_and_wrap(llama(torch.bfloat16).cuda(), "nf4", progress=False, init="loftq")
    assert relative(logits(model), logits(other)) < 1e-2


@pytest.mark.parametrize(
    "options",
    [
        {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
        {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
        {"load_in_8bit": True},
    ],
)
def test_a_model_that_transformers_quantized(tmp_path, options):
    """Recognised, wrapped, trained, merged and unmerged like one of ours."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    llama(torch.float32).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitsAndBytesConfig(**options), device_map={"": 0}, dtype=torch.float32
    )
    with torch.no_grad():
        logits(model)  # a forward first: LLM.int8() moves its constants then
    model = train_a_little(qft.wrap(qft.prepare_model_for_kbit_training(model)))
    tuned = logits(model)
    assert relative(logits(qft.merge_to_float(model, dtype=torch.float32)), tuned) < 1e-5
    qft.merge(model)
    qft.unmerge(model)
    assert torch.equal(logits(model), tuned)


def test_autocast_trains():
    model = qft.quantize_and_wrap(llama(torch.bfloat16).cuda(), "nf4", progress=False)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        loss = logits(model.train()).float().square().mean()
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
    assert grads and all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_gradients_match_a_dequantized_float_copy(use_dora, spec):
    torch.backends.cuda.matmul.allow_tf32 = False
    from peft import get_peft_model

    model = qft.quantize(llama().cuda(), spec, **options(spec))
    copy = qft.merge_to_float(model)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=use_dora)
    torch.manual_seed(0)
    mine = qft.wrap(model, config)
    theirs = get_peft_model(copy, config)
    with torch.no_grad():
        for (_, a), (_, b) in zip(_adapters(mine), _adapters(theirs), strict=True):
            if a.ndim == 2:
                a.normal_(std=0.05)
            b.copy_(a)
    for m in (mine, theirs):
        logits(m).float().square().mean().backward()
    for (name, a), (_, b) in zip(_adapters(mine), _adapters(theirs), strict=True):
        assert relative(a.grad, b.grad) < 1e-4, name


def _bits(tensor):
    """Comparable, also where a tensor subclass has no `equal`."""
    if hasattr(tensor, "__tensor_flatten__"):
        return torch.cat(
            [_bits(getattr(tensor, n)).flatten().view(torch.uint8) for n in tensor.__tensor_flatten__()[0]]
        )
    return tensor.detach().contiguous().view(torch.uint8) if tensor.dim() else tensor


def _adapters(model):
    return sorted((n, p) for n, p in model.named_parameters() if "lora_" in n)


@pytest.mark.parametrize("init", ["loftq", "qera", "qera-full", "pissa", "loftq:steps=3"])
def test_starts_from_a_folder_on_the_gpu(tmp_path, init):
    """Statistics with the blocks brought to the GPU one by one: the same starts as on the CPU."""
    float_model = llama()
    float_model.save_pretrained(tmp_path / "float")
    data = [batch(seed=s) for s in range(3)]
    options = {"init": init, "calibration": data if "qera" in init else None, "progress": False}
    ours = qft.quantize_and_wrap(str(tmp_path / "float"), "reference", device="cuda", **options)
    there = qft.quantize_and_wrap(llama(), "reference", **options)
    assert {p.device.type for p in ours.parameters()} == {"cuda"}
    for name, weight in ours.init_report.weights.items():
        twin = there.init_report.weights[name]
        assert weight.kept == twin.kept and weight.after == pytest.approx(twin.after, rel=2e-3)
    assert relative(logits(ours.eval()), logits(there.eval())) < 5e-3


def test_data_that_does_not_fit_sends_the_blocks_back():
    model = llama()
    with pytest.raises(qft.BadOption, match="cannot run"):
        qft.quantize_and_wrap(
            model, "nf4", init="qera", calibration=[{"input_ids": batch(), "attention_mask": torch.ones(7, 3, 2)}],
            device="cuda", progress=False,
        )  # fmt: skip
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert not any("forward" in vars(m) or m._forward_hooks for m in model.modules())
    qft.quantize(model, "nf4", progress=False)


def test_merging_over_the_original_exporting_and_transferring(tmp_path):
    model = qft.quantize_and_wrap(llama().cuda(), "nf4", init="loftq", progress=False)
    train_a_little(model)
    before = logits(model)
    report = qft.merge(model, original=llama(), data=[batch()])
    assert report.routes.keys() == {"dequantized", "original"} and report.source == "original"
    qft.unmerge(model)
    assert torch.equal(logits(model), before)
    plain = qft.merge_to_float(model, original=llama())
    qft.export(model, tmp_path / "out", original=llama())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").cuda()
    assert torch.equal(logits(again), logits(plain))
    moved = qft.transfer(
        model, "reference:format=int,bits=4,group_size=32", original=llama(), rank=64, device="cuda", progress=False
    )
    assert {p.device.type for p in moved.parameters()} == {"cuda"}
    assert relative(logits(moved.eval()), before) < 2e-2


def test_a_device_without_room_is_left_for_the_host(monkeypatch):
    from qft.lora.merging import float_copy

    model = qft.quantize_and_wrap(llama().cuda(), "nf4", progress=False)
    room = float_copy.free_bytes
    monkeypatch.setattr(float_copy, "free_bytes", lambda d: 10 if d.type == "cuda" else room(d))
    with pytest.warns(qft.QftWarning, match="host memory"):
        plain = qft.merge_to_float(model)
    assert {p.device.type for p in plain.parameters()} == {"cpu"}

"""Fused experts of mixtures: packed, computed for what a batch hits, adapted; Qwen3-MoE, Mixtral and GPT-OSS shapes."""

import copy

import pytest
import torch
from helpers import Rows
from models import batch, logits, qwen3_moe, relative
from moes import EXPERTS, MOES, gpt_oss
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from twins import both_errors, dequantized_copy, fill, gradient_error, loss_and_gradients, pair, share, stock

import qft
from qft.core.experts import PackedExperts, packed_weights

SPECS = [
    "nf4",
    "fp4:double_quant=true",
    "int8",
    "reference:format=int,bits=4,group_size=32",
    "hqq:group_size=32",
    "quanto:format=int4",
    "torchao:format=int8",
    "torchao:format=int,bits=4,group_size=32",
]
PACKED = ["reference", "hqq:group_size=32", "quanto:format=int4"]
"""Of which the whole model has qft's own format."""


def config(**changes):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "target_parameters": EXPERTS, **changes})


def quantize(model, spec, **options):
    return qft.quantize(model, spec, progress=False, **options)


def tuned(builder, spec="reference", dtype=torch.float32, **changes):
    return fill(qft.wrap(quantize(builder(dtype), spec), config(**changes)))


def bits(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


# ---- what is quantized -------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("builder", MOES.values(), ids=MOES)
def test_all_linear_on_a_mixture(builder, spec):
    """Experts are quantized, whatever the backend; the router is neither quantized nor adapted."""
    float_model = builder()
    routers = {n: p.clone() for n, p in float_model.named_parameters() if ".gate." in n or "router" in n}
    fused = [n for n, p in float_model.named_parameters() if p.ndim == 3]
    model = quantize(float_model, spec)
    assert [n for n, _ in packed_weights(model)] == fused
    assert len(fused) == 4 and len(routers) >= 2
    audit = qft.audit(model)
    assert not audit.experts and set(fused) <= set(audit.weights)
    assert "ATTENTION" not in audit.summary()
    wrapped = qft.wrap(model)
    assert not [n for n, _ in wrapped.named_parameters() if "lora_" in n and "self_attn" not in n]
    assert all(torch.equal(p, dict(model.named_parameters())[n]) for n, p in routers.items())


@pytest.mark.parametrize("builder", MOES.values(), ids=MOES)
def test_it_weighs_what_its_bits_weigh(builder):
    model = quantize(builder(), "reference:format=int,bits=4,group_size=32")
    for name, stack in packed_weights(model):
        experts, *one = stack.handle.shape
        stored = sum(t.numel() * t.element_size() for t in stack.packed.values())
        # scales and zero points of a float32 model are float32
        groups = experts * one[0] * one[1] // 32
        assert stored == experts * one[0] * one[1] // 2 + 8 * groups
        assert qft.audit(model).weights[name].nbytes == stored
        assert stored == experts * stack.quantizer.nbytes(tuple(one)) + 4 * groups  # nbytes is of 16-bit weights
    assert not [
        n for n, p in model.named_parameters() if p.ndim == 3 and p.is_floating_point() and ".experts." not in n
    ]
    in_16_bit = qft.audit(quantize(builder(torch.bfloat16), "nf4"))
    assert in_16_bit.bits_per_weight == pytest.approx(4.5)


def test_ones_own_quantizer_packs_experts():
    model = quantize(qwen3_moe(), Rows(bits=8))
    assert len(dict(packed_weights(model))) == 4
    assert relative(logits(model), logits(dequantized_copy(model, qwen3_moe()))) < 1e-6


def test_calibrated_backends_leave_experts_and_say_so():
    model = quantize(qwen3_moe(), "gptq:group_size=32", calibration=[batch(seed=s) for s in range(4)])
    assert not dict(packed_weights(model))
    audit = qft.audit(model)
    assert len(audit.experts) == 4
    loud = next(line for line in audit.summary().splitlines() if "ATTENTION" in line)
    assert "4 fused expert weights stay in 16 bit" in loud and next(iter(audit.experts)) in loud


@pytest.mark.parametrize(
    ("skip", "left"),
    [(["experts"], 4), (["layers.1.mlp.experts.down_proj"], 2), (r".*layers\.0\.mlp.*", 2)],
)
def test_experts_can_be_skipped(skip, left):
    """A module's are packed all or none: its code reads them together."""
    model = quantize(qwen3_moe(), "nf4", skip=skip)
    assert len(qft.audit(model).experts) == left
    assert len(dict(packed_weights(model))) == 4 - left
    assert relative(logits(model), logits(dequantized_copy(model, qwen3_moe()))) < 1e-6


def test_patterns_choose_the_quantizers_of_experts():
    spec = {"*.experts.down_proj": "reference:format=int,bits=8,group_size=32", "*.experts.*": "nf4", "*": "hqq"}
    model = quantize(qwen3_moe(), spec)
    kinds = {n.rpartition(".")[2]: m.quantizer for n, m in packed_weights(model)}
    assert (kinds["down_proj"].bits, kinds["gate_up_proj"].format) == (8, "nf4")


def test_refusals_leave_the_model_as_it_was():
    model = qwen3_moe()
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[2, 3, 4] = torch.nan
    before = bits(model)
    with pytest.raises(qft.NonFiniteWeights, match=r"layers\.1\.mlp\.experts\.down_proj"):
        quantize(model, "nf4")
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if "layers.1.mlp.experts" not in n)
    assert not dict(packed_weights(model))
    model = qwen3_moe()
    before = bits(model)
    with pytest.raises(qft.BadShape, match=r"experts\.down_proj has in_features 32"):
        quantize(model, "reference:format=int,group_size=64", skip=["self_attn"])
    with pytest.raises(qft.BadOption, match="nonesuch"):
        quantize(model, "nf4", skip=["experts.nonesuch"])
    assert same(bits(model), before)


# ---- what is computed --------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("builder", MOES.values(), ids=MOES)
def test_outputs_and_gradients_are_those_of_floats(builder, spec):
    """Against plain PEFT's `ParamWrapper` over a float copy that holds the dequantized weights."""
    ours, theirs = pair(builder, spec, config())
    evaluated, trained, gradients = both_errors(ours, theirs)
    assert evaluated < 1e-6
    assert trained < 1e-6
    assert gradients < 5e-6


@pytest.mark.parametrize("rank", [1, 3])
def test_ranks_alpha_and_patterns(rank):
    settings = config(r=rank, lora_alpha=5, use_rslora=True, rank_pattern={"down_proj": 2}, target_modules=["q_proj"])
    ours, theirs = pair(gpt_oss, "reference", settings)
    assert max(both_errors(ours, theirs)) < 5e-6


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("builder", MOES.values(), ids=MOES)
def test_every_path_of_transformers_computes_the_same(builder, implementation):
    model = quantize(builder(), "reference")
    twin = dequantized_copy(model, builder())
    twin.set_experts_implementation(implementation)
    assert relative(logits(model), logits(twin)) < 1e-6


@pytest.mark.parametrize("spec", ["reference", "hqq:group_size=32", "reference:double_quant=true"])
@pytest.mark.parametrize("builder", MOES.values(), ids=MOES)
def test_only_the_experts_that_are_hit_are_dequantized(builder, spec, monkeypatch):
    model = tuned(builder, spec)
    experts = model.get_base_model().model.layers[0].mlp.experts
    forward, x = experts.get_base_layer().forward, torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    asked = []
    unpacked = PackedExperts.unpacked

    def spy(self, dtype, out=None, experts=None):
        asked.append(self.experts if experts is None else experts.tolist())
        return unpacked(self, dtype, out, experts)

    monkeypatch.setattr(PackedExperts, "unpacked", spy)
    for chosen in ([[2, 2]] * 5, [[0, 3], [3, 0], [3, 3], [0, 0], [0, 3]], [[0, 1], [2, 3], [0, 1], [1, 2], [3, 0]]):
        index = torch.tensor(chosen)
        scores = torch.rand(index.shape, generator=torch.Generator().manual_seed(1))
        results = []
        for everything in (False, True):
            forward.all_experts = everything
            mine = x.clone().requires_grad_()
            asked.clear()
            y = experts(mine, index, scores)
            hit = index.unique().tolist()
            assert asked == [4 if everything or len(hit) == 4 else hit] * 2
            model.zero_grad()
            y.square().sum().backward()
            assert len(asked) == 4  # once more in the backward pass, and nothing was kept
            results.append([y, mine.grad, *(p.grad.clone() for p in experts.parameters() if p.grad is not None)])
        assert len(results[0]) == 6
        for a, b in zip(*results, strict=True):
            assert float((a - b).norm()) <= 1e-6 * float(b.norm())
    forward.all_experts = False
    assert experts(x[:0], index[:0], scores[:0]).shape == (0, 64)
    assert forward.last_hit == 0


def test_many_tokens_do_not_ask_the_device():
    model = quantize(qwen3_moe(), "reference")
    x = torch.randn(64, 64)
    experts = model.model.layers[0].mlp.experts
    y = experts(x, torch.zeros(64, 2, dtype=torch.long), torch.ones(64, 2))
    assert experts.forward.last_hit == 4
    assert relative(experts(x[:3], torch.zeros(3, 2, dtype=torch.long), torch.ones(3, 2)), y[:3]) < 1e-6
    assert experts.forward.last_hit == 1


@pytest.mark.parametrize("builder", MOES.values(), ids=MOES)
def test_nothing_dequantized_is_kept_for_the_backward_pass(builder):
    model = tuned(builder)
    model.train()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        out = logits(model)
    shapes = {tuple(s.handle.shape[1:]) for _, s in packed_weights(model)}
    assert not [s for s in kept if len(s) == 3 and {tuple(s[1:]), tuple(s[:0:-1])} & shapes]
    out.sum().backward()


@pytest.mark.parametrize("builder", MOES.values(), ids=MOES)
def test_under_gradient_checkpointing_and_the_fast_step(builder):
    plain = tuned(builder)
    y, expected = loss_and_gradients(plain)
    model = fill(qft.quantize_and_wrap(builder(), "reference", adapter=config(), progress=False))
    assert relative(loss_and_gradients(model)[0], y) < 1e-6
    assert gradient_error(loss_and_gradients(model)[1], expected) < 1e-6
    ids = batch()
    losses = []
    for fast in (False, True):
        one = tuned(builder)
        if fast:
            qft.optimize_training(one)
        one.train()
        loss = one(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append((loss.detach(), {n: p.grad for n, p in one.named_parameters() if p.grad is not None}))
    assert abs(losses[0][0] - losses[1][0]) < 1e-5
    assert gradient_error(losses[1][1], losses[0][1]) < 1e-5


@pytest.mark.parametrize("builder", MOES.values(), ids=MOES)
def test_bfloat16_and_autocast(builder):
    exact, gradients = loss_and_gradients(tuned(builder))
    model = tuned(builder)
    with torch.autocast("cpu", torch.bfloat16):
        y, mine = loss_and_gradients(model)
    assert relative(y, exact) < 0.03 and gradient_error(mine, gradients) < 0.1
    half = tuned(builder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    y, mine = loss_and_gradients(half)
    assert y.dtype == torch.bfloat16 and relative(y, exact) < 0.05


# ---- adapters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"lora_dropout": 0.1}, qft.UnsupportedOperation, "lora_dropout"),
        ({"use_dora": True}, qft.UnsupportedOperation, "DoRA"),
        ({"lora_bias": True}, qft.UnsupportedOperation, "lora_bias"),
        ({"init_lora_weights": "orthogonal"}, qft.UnsupportedOperation, "orthogonal"),
        ({"target_parameters": ["experts.up"]}, qft.NoTargets, r"experts\.up.*experts\.gate_up_proj"),
        ({"target_modules": ["q_proj"], "target_parameters": ["experts.up"]}, qft.NoTargets, r"experts\.up"),
        ({"r": 33, "target_modules": ["q_proj"]}, qft.BadShape, r"rank 33.*experts"),
        ({"target_modules": ["experts"]}, qft.BadOption, "experts"),
        ({"modules_to_save": ["experts"]}, qft.UnsupportedOperation, "experts"),
    ],
)
def test_what_does_not_go_over_experts(changes, error, words):
    for start in (lambda: quantize(qwen3_moe(), "reference"), qwen3_moe):
        model = start()
        before = bits(model)
        with pytest.raises(error, match=words):
            if dict(packed_weights(model)):
                qft.wrap(model, config(**changes))
            else:
                qft.quantize_and_wrap(model, "reference", adapter=config(**changes), progress=False)
        assert same(bits(model), before)


def test_an_init_that_reads_data_is_refused():
    model = qwen3_moe()
    before = bits(model)
    with pytest.raises(qft.UnsupportedOperation, match="target_parameters"):
        qft.quantize_and_wrap(model, "nf4", adapter=config(), init="qera", calibration=[batch()], progress=False)
    assert same(bits(model), before)
    made = qft.quantize_and_wrap(
        model, "nf4", adapter=config(target_parameters=None), init="qera", calibration=[batch()], progress=False
    )
    assert len(dict(packed_weights(made))) == 4


def test_mixed_batches_are_refused():
    model = tuned(qwen3_moe).eval()
    with pytest.raises(qft.UnsupportedOperation, match="mixed batches"):
        model(input_ids=batch(), adapter_names=["default", "default"])


@pytest.mark.parametrize("spec", ["nf4", "hqq:group_size=32"])
def test_names_of_layers_mean_experts_where_peft_says_so(spec):
    """PEFT takes the names that Qwen3-MoE's experts had as layers for target_parameters; no packed module is a layer."""
    ours, theirs = pair(qwen3_moe, spec, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    assert max(both_errors(ours, theirs)) < 5e-6
    with pytest.raises(qft.NoTargets, match=r"experts\.down_proj is a parameter"):
        qft.wrap(quantize(gpt_oss(), spec), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))


@pytest.mark.parametrize("init", ["loftq", qft.LoftQ(steps=3), "pissa"], ids=["loftq", "loftq3", "pissa"])
@pytest.mark.parametrize("spec", ["nf4", "reference:format=int,bits=3,group_size=32"])
@pytest.mark.parametrize("builder", MOES.values(), ids=MOES)
def test_inits_lower_the_error_of_every_expert(builder, spec, init):
    model = qft.quantize_and_wrap(builder(), spec, adapter=config(), init=init, progress=False)
    report = model.init_report
    assert len(report.weights) == 12
    for name, _ in packed_weights(model.get_base_model()):
        assert report.weights[name].after < 0.95 * report.weights[name].before
    errors = {n: w.adapted_error for n, w in qft.audit(model, original=builder()).weights.items()}
    for name, error in errors.items():
        assert error == pytest.approx(report.weights[name].after, rel=1e-3)
    after = qft.wrap(quantize(builder(), spec), config(), init="loftq", original=builder())
    assert relative(logits(qft.merge_to_float(after, original=builder())), logits(builder())) < 1e-6


@pytest.mark.parametrize("spec", ["nf4", "int8", "hqq:group_size=32", "quanto:format=int4", "torchao:format=int8"])
@pytest.mark.parametrize("builder", MOES.values(), ids=MOES)
def test_merge_and_unmerge_to_the_bit(builder, spec):
    model = tuned(builder, spec)
    before, y = bits(model), logits(model)
    report = qft.merge(model)
    assert len(report.weights) == 12 and report.survived > 0.8
    merged = logits(model)
    assert 0 < relative(merged, y) < 0.5
    assert relative(merged, logits(dequantized_copy(model.get_base_model(), builder()))) < 1e-6
    qft.unmerge(model)
    assert same(bits(model), before)
    assert torch.equal(logits(model), y)
    assert qft.merge(model, original=builder()).survived > 0.8
    qft.unmerge(model)
    model.merge_adapter()
    assert torch.equal(logits(model), merged)
    model.unmerge_adapter()
    assert same(bits(model), before)
    with pytest.warns(qft.QftWarning, match="survived"):
        unloaded = model.merge_and_unload()
    assert relative(logits(unloaded), merged) < (0.05 if spec == "int8" else 1e-6)  # by the vendors' own forwards


@pytest.mark.parametrize("builder", MOES.values(), ids=MOES)
def test_floats_hold_what_was_learnt(builder, tmp_path):
    model = tuned(builder, "nf4")
    before, y = bits(model), logits(model)
    plain = qft.merge_to_float(model)
    assert relative(logits(plain), y) < 2e-6
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in builder().named_parameters()]
    assert {type(m) for m in plain.modules()} == {type(m) for m in builder().modules()}
    plain.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()), logits(plain))
    report = qft.export(model, tmp_path / "exported")
    assert report.weights.keys() == plain.merge_report.weights.keys() and len(report.weights) == 12
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "exported").eval()), logits(plain))
    assert same(bits(model), before)
    bare = quantize(builder(), "nf4")
    assert torch.equal(logits(qft.merge_to_float(bare)), logits(dequantized_copy(bare, builder())))


# ---- files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", PACKED)
@pytest.mark.parametrize("builder", MOES.values(), ids=MOES)
def test_a_packed_model_reloads(builder, spec, tmp_path):
    model = quantize(builder(), spec)
    model.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert torch.equal(logits(again), logits(model))
    assert same(bits(again), bits(model))
    wrapped = fill(qft.wrap(again, config()))
    qft.save(wrapped, tmp_path / "tuned", base=True)
    assert torch.equal(logits(qft.load(tmp_path / "tuned")), logits(wrapped))


@pytest.mark.parametrize("spec", ["nf4", "nf4:double_quant=true", "int8"])
def test_bitsandbytes_mixtures_are_stored_packed(spec, tmp_path, recwarn):
    """Its own files have no place for packed experts: its layers are stored with the same codes, as the experts are."""
    model = qft.quantize_and_wrap(qwen3_moe(), spec, adapter=config(), init=qft.LoftQ(steps=2), progress=False)
    qft.save(fill(model), tmp_path)  # the base with it, which is not q(W)
    again = qft.load(tmp_path)
    assert not [w for w in recwarn if issubclass(w.category, qft.QftWarning) and "another" in str(w.message)]
    assert relative(logits(again), logits(model)) < 1e-6
    AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with pytest.warns(qft.QftWarning, match="nothing to do"):
        quantize(tmp_path / "base", spec, device="cpu")


@pytest.mark.parametrize("spec", ["nf4", "int8", "torchao:format=int8", "reference"])
@pytest.mark.parametrize("builder", MOES.values(), ids=MOES)
def test_adapters_reload_and_go_to_plain_peft_and_back(builder, spec, tmp_path):
    model = tuned(builder, spec)
    qft.save(model, tmp_path)
    assert torch.equal(logits(qft.load(tmp_path, builder())), logits(model))
    twin = stock(dequantized_copy(model.get_base_model(), builder()), config(), model.peft_config["default"])
    share(model, twin)
    assert relative(logits(twin), logits(model)) < 1e-6
    fill(twin, seed=7).save_pretrained(tmp_path / "theirs")
    back = qft.load(tmp_path / "theirs", quantize(builder(), spec))
    assert relative(logits(back), logits(twin)) < 1e-6


@pytest.mark.parametrize("spec", ["nf4", "hqq:group_size=32"])
@pytest.mark.parametrize("builder", MOES.values(), ids=MOES)
def test_from_a_folder(builder, spec, tmp_path):
    """Streamed, and fused on the way where files hold one expert a tensor; inits see each weight once."""
    builder().save_pretrained(tmp_path, max_shard_size="100KB")
    model = quantize(tmp_path, spec, device="cpu")
    expected = quantize(builder(), spec)
    assert same(bits(model), bits(expected)) and model._qft.fingerprint == expected._qft.fingerprint
    assert torch.equal(logits(model), logits(expected))
    made = qft.quantize_and_wrap(tmp_path, spec, adapter=config(), init="loftq", device="cpu", progress=False)
    there = qft.quantize_and_wrap(builder(), spec, adapter=config(), init="loftq", progress=False)
    assert torch.equal(logits(made), logits(there))


def test_folders_that_are_damaged(tmp_path):
    model = gpt_oss()
    with torch.no_grad():
        model.model.layers[0].mlp.experts.gate_up_proj[1, 2, 3] = torch.inf
    model.save_pretrained(tmp_path / "infinite")
    with pytest.raises(qft.NonFiniteWeights, match=r"layers\.0\.mlp\.experts\.gate_up_proj"):
        quantize(tmp_path / "infinite", "reference", device="cpu")
    model = gpt_oss()
    state = {k: v for k, v in model.state_dict().items() if "layers.1.mlp.experts.down_proj" not in k}
    model.save_pretrained(tmp_path / "short", state_dict=state)
    with pytest.raises(qft.BadFolder, match=r"layers\.1\.mlp\.experts\.down_proj"):
        quantize(tmp_path / "short", "reference", device="cpu")


def test_another_original_is_told_apart(tmp_path):
    model = tuned(qwen3_moe)
    qft.save(model, tmp_path)
    other = qwen3_moe()
    with torch.no_grad():
        other.model.layers[1].mlp.experts.down_proj.mul_(-1)
    with pytest.raises(qft.AdapterMismatch, match=r"experts\.down_proj"):
        qft.load(tmp_path, other)
    assert not dict(packed_weights(other))


def test_copies_and_second_adapters():
    model = tuned(gpt_oss)
    y = logits(model)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), y)
    twin.add_adapter("other", config())
    fill(twin, "other", seed=5)
    twin.set_adapter("other")
    assert relative(logits(twin), y) > 1e-3
    twin.set_adapter("default")
    assert torch.equal(logits(twin), y) and torch.equal(logits(model), y)
    twin.delete_adapter("other")
    with twin.disable_adapter():
        assert torch.equal(logits(twin), logits(quantize(gpt_oss(), "reference")))
    stack = twin.get_base_model().model.layers[0].mlp.experts.get_base_layer().down_proj
    value = stack.weight
    assert value.shape == stack.shape == (4, 96, 64)
    packed = bits(stack)
    stack.half()
    assert same(bits(stack), packed) and torch.equal(stack.weight, value.half())

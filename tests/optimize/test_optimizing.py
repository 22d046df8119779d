"""`optimize_training` changes what a step costs, and nothing else; `unoptimize` leaves no trace."""

import copy
import importlib
import io
import pickle
import warnings

import models
import pytest
import torch
from helpers import refuses, unchanged
from models import BUILDERS, VOCABULARY, batch, gpt2, llama, logits, plain, qwen2, qwen3_moe, relative
from peft import LoraConfig, get_peft_model
from transformers import (
    BartConfig,
    BartForCausalLM,
    BloomConfig,
    BloomForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

import qft
from qft.core.blocks import find_blocks
from qft.optimize import optimize, optimizers
from qft.optimize.blocks import BlockForward
from qft.optimize.loss_without_logits import HeadlessForward, Patch

SIZES = {**models.SIZES, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
NEOX = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
OPT = {**NEOX, "ffn_dim": 128, "word_embed_proj_dim": 64, "dropout": 0.0}

MODELS = {
    "llama": llama,
    "qwen2": qwen2,
    "gpt2": gpt2,
    "qwen3_moe": qwen3_moe,
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=16)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=16, sliding_window=8)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, head_dim=16, sliding_window=8)),
    "phi": lambda: PhiForCausalLM(PhiConfig(**SIZES)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SIZES)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=3.0)),
    "opt": lambda: OPTForCausalLM(OPTConfig(**OPT)),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**NEOX)),
    "bloom": lambda: BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=2, n_head=4)),
}
LORA = {"r": 4, "target_modules": "all-linear", "init_lora_weights": False}
IDS = batch(shape=(2, 13))
LABELS = IDS.clone().index_fill_(1, torch.arange(4), -100)


@pytest.fixture(autouse=True)
def own_switches(monkeypatch):
    """Without a compiler, which takes half a minute a graph on the CPU, unless a test wants it."""
    monkeypatch.setattr(optimize, "switches", optimize.Switches(compile=torch.cuda.is_available()))
    torch._dynamo.reset()
    return optimize.switches


@pytest.fixture
def compiled(own_switches):
    """Compiled up to the generated code: the partitioner runs."""
    own_switches.compile, own_switches.backend = True, "aot_eager"
    return own_switches


def still(model):
    """Without dropout, so that two runs are the same."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def adapted(model=None, **changes):
    torch.manual_seed(0)
    return still(get_peft_model(llama() if model is None else model, LoraConfig(**{**LORA, **changes}))).train()


def step(model, ids=IDS, labels=LABELS, **kwargs):
    """(loss, all gradients as one vector, output)."""
    model.zero_grad()
    device = next(model.parameters()).device
    out = model(input_ids=ids.to(device), labels=labels.to(device), **kwargs)
    out.loss.backward()
    grads = [p.grad.flatten().float() for p in model.parameters() if p.grad is not None]
    return float(out.loss.detach()), torch.cat(grads), out


def same_step(model, before, rel=3e-6, **kwargs):
    loss, grads, out = step(model, **kwargs)
    assert loss == pytest.approx(before[0], rel=rel)
    assert relative(grads, before[1]) < rel
    return out


def patches(model):
    return [m.__dict__["forward"] for m in model.modules() if isinstance(m.__dict__.get("forward"), Patch)]


# ---- every architecture --------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_the_same_step(name, checkpointing):
    model = adapted(MODELS[name]())
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    before = step(model, num_items_in_batch=torch.tensor(7))
    for memory in ["auto", "least", "most", 1, 0.5]:
        qft.optimize_training(model, memory=memory)
        out = same_step(model, before, num_items_in_batch=torch.tensor(7))
        assert out.get("logits") is None
    qft.unoptimize(model)
    assert not patches(model)
    assert same_step(model, before, rel=1e-7, num_items_in_batch=torch.tensor(7)).logits is not None


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("memory", ["least", "most"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt"])
def test_compiled_blocks_are_one_graph_without_breaks(compiled, name, memory, padded):
    """However many blocks there are, however often it is called."""
    mask = torch.ones(2, 13).index_fill_(1, torch.arange(3), 0) if padded else None
    model = adapted(MODELS[name]())
    model.enable_input_require_grads()
    before = step(model, attention_mask=mask)
    torch._dynamo.utils.counters.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error", qft.QftWarning)
        qft.optimize_training(model, memory=memory)
        for _ in range(2):
            same_step(model, before, attention_mask=mask)
    counters = torch._dynamo.utils.counters
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


def test_numbers_and_lengths_that_change_do_not_compile_again_and_again(compiled):
    model = qft.optimize_training(adapted())
    model.enable_input_require_grads()
    torch._dynamo.utils.counters.clear()
    for length in range(6, 16):
        ids = batch(shape=(2, length))
        step(model, ids, ids, num_items_in_batch=length)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2  # of one length, then of any
    plan = next(p for p in patches(model) if isinstance(p, BlockForward)).plan
    assert all(kind.compiles and kind.whole for kind in plan.kinds.values())


def test_the_last_product_of_a_block_is_not_recomputed(compiled):
    """Of the 21 products of a block (7 linears, with A and B each), 19 run again: not down_proj's, nor its B's."""
    from functorch.compile import min_cut_rematerialization_partition
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    products = {}

    def count(name):
        def compiler(graph, _):
            products[name] = sum("mm" in str(n.target) for n in graph.graph.nodes if n.op == "call_function")
            return make_boxed_func(graph.forward)

        return compiler

    compiled.backend = aot_autograd(
        fw_compiler=count("forward"),
        bw_compiler=count("backward"),
        partition_fn=min_cut_rematerialization_partition,
    )
    found = {}
    for memory in ["most", "least"]:
        model = qft.optimize_training(adapted(), memory=memory)
        model.enable_input_require_grads()
        step(model)
        found[memory] = dict(products)
    assert found["most"] == {"forward": 21, "backward": 35}
    assert found["least"] == {"forward": 21, "backward": 35 + 19}


def test_a_model_that_others_compile_is_right_in_inference_mode():
    model = qft.quantize_and_wrap(llama(), "nf4", progress=False).eval()
    wanted = logits(model, IDS)
    with torch.inference_mode():
        found = torch.compile(model, backend="aot_eager")(input_ids=IDS).logits
    assert relative(found, wanted) < 1e-6


def test_dropout_is_the_same_in_what_is_recomputed(compiled):
    """The gradient of a step with dropout is that of its own masks: both ways of keeping activations agree."""
    model = get_peft_model(llama(), LoraConfig(**LORA, lora_dropout=0.5)).train()
    model.enable_input_require_grads()
    found = {}
    for memory in ["most", "least"]:
        qft.optimize_training(model, memory=memory)
        torch.manual_seed(3)
        found[memory] = step(model)
    assert found["least"][0] == pytest.approx(found["most"][0], rel=1e-6)
    assert relative(found["least"][1], found["most"][1]) < 3e-6


def test_a_break_in_a_block_is_said_and_the_step_is_right(compiled):
    model = adapted()
    before = step(model)
    for block in model.get_base_model().model.layers:
        inner = block.mlp.forward
        block.mlp.forward = lambda x, inner=inner: (torch._dynamo.graph_break(), inner(x))[1]
    qft.optimize_training(model, memory="most")
    with pytest.warns(qft.QftWarning, match="compiled in pieces"):
        same_step(model, before)
    same_step(model, before)


def test_a_compiler_that_fails_is_said_and_the_step_is_right(compiled):
    def fails(graph, inputs):
        raise OSError("no space left on device")

    compiled.backend = fails
    model = adapted()
    before = step(model)
    qft.optimize_training(model)
    with pytest.warns(qft.QftWarning, match="is not compiled: .*no space left"):
        same_step(model, before)


def test_without_a_compiler_blocks_run_as_they_are(own_switches, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda *_: None)
    own_switches.compile = True
    model = adapted()
    before = step(model)
    with pytest.warns(qft.QftWarning, match=r"no C\+\+ compiler"):
        qft.optimize_training(model)
    same_step(model, before)


@pytest.mark.slow
def test_inductor_on_the_cpu(monkeypatch):
    """By default, since it helps there, too."""
    monkeypatch.setattr(optimize, "switches", optimize.Switches())
    model = adapted()
    model.enable_input_require_grads()
    before = step(model)
    qft.optimize_training(model, memory="least")
    torch._dynamo.utils.counters.clear()
    same_step(model, before, rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


# ---- memory --------------------------------------------------------------------------------------------------


def recomputed(model, monkeypatch):
    """Indices of the blocks that ran through our checkpoint in one step."""
    from qft.optimize import blocks

    seen, order = [], [m for _, members in find_blocks(model) for m in members]
    recompute = blocks._recomputed

    def watched(forward, block, args, kwargs):
        seen.append(order.index(block))
        return recompute(forward, block, args, kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(blocks, "_recomputed", watched)
        for forward in patches(model):
            if isinstance(forward, BlockForward):
                forward.plan.kinds.clear()
        step(model)
    return seen


@pytest.mark.parametrize(
    ("memory", "expected"),
    [("least", [0, 1, 2, 3]), ("most", []), (1, [0, 1, 2]), (0.5, [0, 1]), (9, []), (0, [0, 1, 2, 3]), (1.0, [])],
)
def test_memory_chooses_which_blocks_are_recomputed(monkeypatch, memory, expected):
    for checkpointing in [False, True]:
        model = adapted(llama(num_hidden_layers=4))
        if checkpointing:
            model.gradient_checkpointing_enable()
        assert recomputed(qft.optimize_training(model, memory=memory), monkeypatch) == expected


def test_auto_follows_the_model_also_when_that_changes_later(monkeypatch):
    model = qft.optimize_training(adapted(llama(num_hidden_layers=4)))
    assert recomputed(model, monkeypatch) == []
    model.gradient_checkpointing_enable()
    assert recomputed(model, monkeypatch) == [0, 1, 2, 3]
    assert model.get_base_model().is_gradient_checkpointing
    model.gradient_checkpointing_disable()
    assert recomputed(model, monkeypatch) == []


def test_recomputation_frees_activations():
    """What autograd keeps between the passes, in bytes."""

    def kept(memory):
        model, total = qft.optimize_training(adapted(llama(num_hidden_layers=4)), memory=memory), 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel() * tensor.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(input_ids=IDS, labels=LABELS)
        return total

    least, half, most = kept("least"), kept(0.5), kept("most")
    assert least < 0.25 * most
    assert half == pytest.approx((least + most) / 2, rel=0.1)


def test_every_block_runs_twice_at_most():
    """No checkpoint inside another: transformers' own is out of the way, and back afterwards."""
    model = adapted()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    calls = []
    model.get_base_model().model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: calls.append(1))
    qft.optimize_training(model, memory="least")
    step(model)
    assert len(calls) == 2
    assert all(layer.gradient_checkpointing for layer in model.get_base_model().model.layers)


# ---- exact to undo -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BUILDERS)
def test_unoptimize_leaves_no_trace(name):
    model = qft.quantize_and_wrap(BUILDERS[name](), "reference", progress=False)
    with unchanged(model):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", qft.QftWarning)
            qft.optimize_training(model, memory="least")
            qft.optimize_training(model, memory="most")
        qft.unoptimize(model)
        qft.unoptimize(model)
    assert not patches(model)


def test_evaluation_and_generation_run_the_models_own_code():
    model = adapted().eval()
    ids = IDS[:1, :5]
    own, text = logits(model, IDS), model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    qft.optimize_training(model, memory="least")
    assert torch.equal(logits(model, IDS), own)
    assert torch.equal(model.generate(input_ids=ids, max_new_tokens=4, do_sample=False), text)
    out = model(input_ids=IDS, labels=LABELS)
    assert torch.equal(out.logits, own) and out.loss is not None
    model.train()
    assert relative(model(input_ids=IDS).logits, own) < 1e-6  # no labels
    with torch.no_grad():
        assert model(input_ids=IDS, labels=LABELS).logits is not None
    assert model(input_ids=IDS, labels=LABELS[:, -1:], logits_to_keep=1).logits.shape[1] == 1
    assert isinstance(model(input_ids=IDS, labels=LABELS, return_dict=False), tuple)


def test_state_dict_copies_and_pickles():
    model = adapted()
    keys, before = list(model.state_dict()), step(model)
    qft.optimize_training(model, memory="least")
    assert list(model.state_dict()) == keys
    step(model)
    stored = io.BytesIO()
    torch.save(model, stored)
    twins = [
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
        torch.load(io.BytesIO(stored.getvalue()), weights_only=False),
    ]
    ours = {id(m) for m in model.modules()}
    for twin in twins:
        assert patches(twin) and not any(id(p.module) in ours for p in patches(twin))
        same_step(twin, before)
        same_step(qft.unoptimize(twin), before)
    assert patches(model)


def test_saving_merging_and_loading(tmp_path):
    model = qft.optimize_training(qft.quantize_and_wrap(llama(), "reference", progress=False), memory="least")
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        step(model)
        optimizer.step()
    model.eval()
    tuned = logits(model)
    qft.save(model, tmp_path)
    again = qft.load(tmp_path, base=llama())
    assert torch.equal(logits(again), tuned)
    for name, parameter in again.named_parameters():
        parameter.requires_grad_("lora_" in name)
    before = step(again.train())
    same_step(qft.optimize_training(again), before)
    report = qft.merge(model)
    assert 0 < report.survived < 1.2
    qft.unmerge(model)
    assert torch.equal(logits(model), tuned)
    assert relative(logits(qft.merge_to_float(model, dtype=torch.float32)), tuned) < 1e-5


def test_a_wrapper_that_was_put_on_top_stays():
    model = adapted()
    before = step(model)
    qft.optimize_training(model)
    inner = model.get_base_model()
    ours, calls = inner.forward, []
    inner.forward = lambda *a, **k: (calls.append(1), ours(*a, **k))[1]
    same_step(model, before)
    qft.unoptimize(model)
    assert same_step(model, before).logits is not None
    assert len(calls) == 2


def test_a_forward_that_was_there_before_stays():
    model = adapted()
    inner, calls = model.get_base_model(), []
    own = inner.forward
    put = inner.forward = lambda *a, **k: (calls.append(1), own(*a, **k))[1]
    before = step(model)
    qft.optimize_training(model)
    same_step(model, before)
    qft.unoptimize(model)
    assert inner.forward is put and len(calls) == 2


@pytest.mark.parametrize("where", ["norm", "head", "loss"])
def test_an_exception_in_the_middle_leaves_the_model_usable(monkeypatch, where):
    model = adapted()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    before = step(model)
    qft.optimize_training(model)
    attributes = {n: set(m.__dict__) for n, m in model.named_modules()}
    inner = model.get_base_model()

    def fails(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where == "norm":
            patch.setattr(type(inner.model.norm), "forward", fails)
        else:
            patch.setattr(
                "qft.optimize.loss_without_logits.linear_cross_entropy"
                if where == "loss"
                else "qft.optimize.loss_without_logits._Step.take",
                fails,
            )
        with pytest.raises(KeyboardInterrupt):
            step(model)
    assert {n: set(m.__dict__) for n, m in model.named_modules()} == attributes
    assert all(layer.gradient_checkpointing for layer in inner.model.layers)
    same_step(model, before)
    same_step(qft.unoptimize(model), before)


# ---- where the model's own loss is needed ----------------------------------------------------------------------


def test_routers_keep_their_share_of_the_loss():
    model = adapted(qwen3_moe())
    with_routers = step(model, output_router_logits=True)
    without = step(model)
    assert with_routers[0] != without[0]
    qft.optimize_training(model)
    out = same_step(model, with_routers, output_router_logits=True)
    assert out.aux_loss is not None and out.get("logits") is None
    same_step(model, without)


def test_hidden_states_can_still_be_asked_for():
    model = adapted()
    own = model(input_ids=IDS, labels=LABELS, output_hidden_states=True).hidden_states
    qft.optimize_training(model)
    ours = model(input_ids=IDS, labels=LABELS, output_hidden_states=True).hidden_states
    assert len(ours) == len(own) and all(relative(a, b) < 1e-6 for a, b in zip(ours, own))


def test_labels_that_are_shifted_already():
    model = adapted()
    shift = torch.nn.functional.pad(LABELS, (0, 1), value=-100)[:, 1:].contiguous()
    before = step(model, shift_labels=shift)
    qft.optimize_training(model)
    assert same_step(model, before, shift_labels=shift).get("logits") is None


def test_autocast():
    model = adapted()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = step(model)
        qft.optimize_training(model, memory="least")
        same_step(model, before, rel=1e-2)


@pytest.mark.parametrize("spec", ["nf4", "int8", "reference", "reference:format=int,bits=3,group_size=32"])
def test_quantized_models(spec):
    model = qft.quantize_and_wrap(llama(), spec, progress=False)
    before = step(model.train())
    for memory in ["auto", "most"]:
        same_step(qft.optimize_training(model, memory=memory), before, rel=1e-5)


def test_a_quantized_model_without_adapters():
    """Gradients reach what its owner trains: here the embeddings of the prompt."""
    model = qft.quantize(llama(), "reference", progress=False).train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    inputs = torch.randn(2, 13, 64, requires_grad=True)

    def run():
        inputs.grad = None
        out = model(inputs_embeds=inputs, labels=LABELS)
        out.loss.backward()
        return inputs.grad, out

    before, _ = run()
    with warnings.catch_warnings():
        warnings.simplefilter("error", qft.QftWarning)
        qft.optimize_training(model, memory="least")
    grad, out = run()
    assert relative(grad, before) < 1e-5 and out.get("logits") is None


@pytest.mark.parametrize("changes", [{"modules_to_save": ["lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}])
def test_a_trained_head_keeps_the_models_own_loss(changes):
    model = adapted(**changes)
    before = step(model)
    with pytest.warns(qft.QftWarning, match="logits of all tokens: its head"):
        qft.optimize_training(model)
    assert same_step(model, before).logits is not None


def test_a_head_that_is_trained_later_gets_its_gradient():
    model = adapted()
    qft.optimize_training(model)
    model.get_base_model().lm_head.weight.requires_grad_(True)
    step(model)
    assert model.get_base_model().lm_head.weight.grad.norm() > 0


def test_a_loss_that_the_models_code_computes_itself_stays():
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=VOCABULARY, d_model=64, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=128, dropout=0.0
    )
    model = adapted(BartForCausalLM(config))
    before = step(model)
    qft.optimize_training(model)
    with pytest.warns(qft.QftWarning, match="BartForCausalLM computes its own loss"):
        assert same_step(model, before).logits is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error", qft.QftWarning)
        same_step(model, before)


def test_a_loss_function_of_ones_own_stays():
    model = adapted()
    model.get_base_model().loss_function = lambda logits, labels, vocab_size, **_: logits.square().mean()
    before = step(model)
    with pytest.warns(qft.QftWarning, match="its loss is not the next-token loss"):
        qft.optimize_training(model)
    same_step(model, before)


def test_logits_that_are_changed_in_another_way_keep_the_models_own_loss():
    class Clamped(type(llama())):
        def forward(self, input_ids=None, labels=None, **kwargs):
            hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
            logits = self.lm_head(hidden).clamp(min=0)
            return CausalLMOutputWithPast(loss=self.loss_function(logits, labels, VOCABULARY), logits=logits)

    model = llama()
    model.__class__ = Clamped
    model = adapted(model)
    before = step(model)
    qft.optimize_training(model)
    with pytest.warns(qft.QftWarning, match="neither a scale nor a soft cap"):
        same_step(model, before)


def test_errors_of_the_call_stay_errors():
    model = qft.optimize_training(adapted())
    with pytest.raises(ValueError, match="input_ids"):
        model(labels=LABELS)
    with pytest.raises(IndexError):
        model(input_ids=IDS, labels=torch.full_like(LABELS, VOCABULARY))
    assert next(p for p in patches(model) if isinstance(p, HeadlessForward)).unfit is None
    assert model(input_ids=IDS, labels=LABELS).get("logits") is None


def test_a_model_that_is_no_language_model_says_what_is_left_out():
    with pytest.warns(qft.QftWarning, match="no language model of transformers"):
        qft.optimize_training(plain())


def test_a_model_without_blocks_says_that_layers_are_not_compiled():
    class Flat(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

    with pytest.warns(qft.QftWarning, match="no repeated blocks"):
        qft.optimize_training(Flat())


def test_blocks_of_every_architecture_are_found():
    expected = {"llama": 2, "qwen2": 2, "gpt2": 2, "t5": 4, "plain": 2}
    for name, build in BUILDERS.items():
        assert sum(len(members) for _, members in find_blocks(build())) == expected[name], name
    for name, build in MODELS.items():
        assert [len(members) for _, members in find_blocks(adapted(build()))] == [2], name


# ---- options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["some", -1, 1.5, -0.1, True, None, float("nan")])
def test_memory_of_another_kind_is_refused(memory):
    model = adapted().eval()
    with refuses(qft.BadOption, "memory=", "'least'", model=model):
        qft.optimize_training(model, memory=memory)


def test_other_options_are_refused_and_the_first_call_stands():
    model = qft.optimize_training(adapted(), memory="least")
    with refuses(qft.BadOption, "compute="):
        qft.optimize_training(model, compute="int4")
    with refuses(qft.BadOption, "offload="):
        qft.optimize_training(model, offload="disk")
    with refuses(qft.UnsupportedDevice, "cpu"):
        qft.optimize_training(model, offload="activations")
    assert model.get_base_model().model.layers[0].forward.plan.keeps == frozenset()


# ---- on a GPU ----------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("memory", ["least", "most", 1])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_step_on_cuda(name, memory):
    torch.backends.cuda.matmul.allow_tf32 = False
    model = adapted(MODELS[name]().cuda())
    before = step(model)
    qft.optimize_training(model, memory=memory)
    for _ in range(2):
        same_step(model, before, rel=2e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("room", [True, False])
def test_paged_states_are_read_whole(monkeypatch, room):
    """Steps that nobody waited for, behind a long queue: the states of the last one, as an optimizer that waits has them."""
    from bitsandbytes.optim import PagedAdamW8bit

    asked = []
    real = PagedAdamW8bit.prefetch_state
    monkeypatch.setattr(PagedAdamW8bit, "prefetch_state", lambda self, p: asked.append(p) or real(self, p))
    if not room:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (0, 2**30))

    model = qft.quantize_and_wrap(llama(torch.bfloat16).cuda(), "nf4", progress=False).train()
    weights = [torch.nn.Parameter(torch.zeros(2**20, device="cuda")) for _ in range(4)]
    found = []
    for waits in (True, False):
        for p in weights:
            p.data.zero_()
        if not waits:
            qft.optimize_training(model)
        own = [p for p in model.parameters() if p.requires_grad][:1]
        optimizer, generator = PagedAdamW8bit([*own, *weights], lr=1e-2), torch.Generator("cuda").manual_seed(0)
        for _ in range(3):
            busy = torch.randn(8192, 8192, device="cuda")
            for _ in range(10):
                busy = busy @ busy
            for p in weights:
                p.grad = torch.randn(p.shape, generator=generator, device="cuda")
            optimizer.step()
        assert len(asked) == (12 if waits or not room else 0)
        asked.clear()
        optimizer.state_dict()  # waits
        found.append([optimizer.state[p]["state1"].clone() for p in weights])
        assert found[-1][0].numel() >= 1e5
    assert len(found[0]) == 4 and all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_only_position_ids_that_were_given_are_searched_for_packed_sequences(monkeypatch):
    """To look at them, the host waits for the device."""
    from transformers import masking_utils

    asked = []
    real = masking_utils.find_packed_sequence_indices
    monkeypatch.setattr(masking_utils, "find_packed_sequence_indices", lambda p: asked.append(p) or real(p))
    model = llama().train()
    model.config.use_cache = False  # it looks where it has no cache
    positions = torch.arange(IDS.shape[1]).remainder(5).expand_as(IDS)
    before, packed = step(model), step(model, position_ids=positions)
    assert len(asked) == 2
    qft.optimize_training(model)
    same_step(model, before)
    assert len(asked) == 2
    same_step(model, packed, position_ids=positions)
    assert len(asked) == 3
    model.eval()
    logits(model, use_cache=False)
    assert len(asked) == 4
    monkeypatch.undo()
    same_step(model.train(), packed, position_ids=positions)


@pytest.mark.gpu
@pytest.mark.parametrize("loss", ["auto", "liger"])
@pytest.mark.parametrize("memory", ["least", "most"])
def test_no_step_waits_for_the_one_before_it(own_switches, memory, loss):
    """Nor for itself, but for what liger-kernel's loss asks of the device, where that is installed."""
    own_switches.loss = loss
    model = qft.quantize_and_wrap(llama(torch.bfloat16).cuda(), "nf4", progress=False).train()
    qft.optimize_training(model, memory=memory)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = IDS.pin_memory()
    for mode in ("default", "default", "warn"):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode(mode)
            try:
                here = ids.to("cuda", non_blocking=True)
                model(input_ids=here, labels=here).loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            finally:
                torch.cuda.set_sync_debug_mode("default")
    waits = [w.filename for w in found if "synchronizing" in str(w.message)]
    assert all("liger_kernel" in name for name in waits) and (loss == "liger" or not waits)


@pytest.mark.gpu
@pytest.mark.parametrize("spec", ["nf4", "int8", "reference"])
def test_quantized_models_on_cuda(spec):
    model = qft.quantize_and_wrap(llama(torch.bfloat16).cuda(), spec, progress=False)
    before = step(model.train())
    qft.optimize_training(model)
    same_step(model, before, rel=0.05)


def test_bitsandbytes_waits_where_states_are_read(monkeypatch):
    bnb = pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    module = importlib.import_module("bitsandbytes.optim.optimizer")
    waits = []
    own = lambda tensor: waits.append(tensor.shape)  # noqa: E731
    monkeypatch.setattr(module, "sync_gpu", own)
    model = qft.quantize_and_wrap(llama(), "nf4", progress=False).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = bnb.optim.AdamW8bit(weights, lr=1e-3)

    def step():
        for p in weights:
            p.grad = torch.ones_like(p)
        optimizer.step()

    step()
    assert len(waits) == len(weights)
    qft.optimize_training(model)
    waits.clear()
    step()
    assert not waits and module.sync_gpu is own
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(optimizer, "update_step", lambda *_: 1 / 0)
        step()
    step()
    assert not waits and module.sync_gpu is own
    optimizer.state_dict()
    assert len(waits) == 1
    waits.clear()
    other = torch.nn.Linear(64, 64)
    waits.clear()
    bnb.optim.AdamW8bit(other.parameters()).step()
    other.weight.grad, other.bias.grad = torch.ones(64, 64), torch.ones(64)
    bnb.optim.AdamW8bit(other.parameters()).step()
    assert len(waits) == 2  # weights of another model
    qft.unoptimize(model)
    waits.clear()
    step()
    assert len(waits) == len(weights)


@pytest.mark.parametrize("room", [True, False])
def test_paged_states_are_asked_for_where_room_is_short(monkeypatch, room):
    bnb = pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")
    asked = []
    monkeypatch.setattr(bnb.optim.PagedAdamW8bit, "prefetch_state", lambda self, p: asked.append(p))
    monkeypatch.setattr(optimizers, "_has_room", lambda *_: room)
    model = qft.quantize_and_wrap(llama(), "nf4", progress=False).train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = bnb.optim.PagedAdamW8bit(weights, lr=1e-3)

    def step():
        asked.clear()
        for p in weights:
            p.grad = torch.ones_like(p)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Paged optimizers")  # those of a CPU are not
            optimizer.step()
        return len(asked)

    assert step() == len(weights)
    qft.optimize_training(model)
    assert step() == (0 if room else len(weights))
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(optimizer, "update_step", lambda *_: 1 / 0)
        step()
    assert step() == (0 if room else len(weights))
    qft.unoptimize(model)
    assert step() == len(weights) and "prefetch_state" not in vars(optimizer)

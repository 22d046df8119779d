"""`qft.audit`: its figures against plain computations on captured activations, its warnings, and its views."""

import copy
import json
import re
import sys
from dataclasses import dataclass
from html.parser import HTMLParser
from typing import ClassVar

import pytest
import torch
from helpers import Rows, refuses, unchanged
from models import BUILDERS, Plain, batch, llama, logits, plain
from peft import LoraConfig, PromptTuningConfig
from torch import nn
from twins import fill, quantized

import qft
from qft.core.names import place
from qft.core.quantizer import float_weight
from qft.pipeline.audit.figures import WeightAudit
from qft.pipeline.audit.result import Audit

SPEC = "reference:format=int,bits=3,group_size=32"


@torch.no_grad()
def captured(model, data):
    """Quantized layer → the rows that it read, float64, and the largest value that it wrote; by plain hooks."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    names = [n.removesuffix(".base_layer") for n, *_ in quantized(base)]
    rows, out, hooks = {n: [] for n in names}, dict.fromkeys(names, 0.0), []
    for name in names:

        def hook(module, args, result, name=name):
            rows[name].append(args[0].double().flatten(0, -2))
            out[name] = max(out[name], float(result.abs().max()))

        hooks.append(base.get_submodule(name).register_forward_hook(hook))
    training = model.training
    model.eval()
    for ids in data:
        logits(model, ids)
    model.train(training)
    for hook in hooks:
        hook.remove()
    return {n: torch.cat(r) for n, r in rows.items()}, out


def pair(builder=llama, spec=SPEC, **kwargs):
    model = builder(**kwargs)
    original = copy.deepcopy(model)
    return qft.quantize(model, spec, progress=False), original


def wrapped(builder=llama, spec=SPEC, **lora):
    model, original = pair(builder, spec)
    return qft.wrap(model, LoraConfig(**{"r": 4, "target_modules": "all-linear", **lora})), original


def output_error(x, w, w_hat):
    """‖x (W − Ŵ)ᵀ‖ / ‖x Wᵀ‖ in float64."""
    return float((x @ (w - w_hat).double().T).norm() / (x @ w.double().T).norm())


# ---- figures -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("builder", BUILDERS.values(), ids=BUILDERS)
def test_figures_are_those_of_plain_hooks(builder):
    model, original = pair(builder)
    data = [batch(seed=1), batch(seed=2, shape=(3, 7))]
    with unchanged(model):
        audited = qft.audit(model, original=original, data=data)
    rows, out = captured(model, data)
    assert list(audited.weights) == [n for n, *_ in quantized(model)] == list(rows)
    for name, _, quantizer, handle in quantized(model):
        w = float_weight(original.get_submodule(name))
        w_hat = quantizer.dequantize(handle, dtype=torch.float32)
        found = audited.weights[name]
        assert found.error == pytest.approx(float((w - w_hat).norm() / w.norm()), rel=1e-5)
        assert found.output_error == pytest.approx(output_error(rows[name], w, w_hat), rel=1e-5)
        assert found.input_max == pytest.approx(float(rows[name].abs().max()), rel=1e-6)
        assert found.output_max == pytest.approx(out[name], rel=1e-6)
        assert found.tokens == len(rows[name])
        assert found.adapted_error is None and found.adapted_output_error is None and found.warning is None
    assert audited.warnings == {}


def test_padding_counts_in_no_figure():
    model, original = pair()
    ids, mask = batch(shape=(2, 12)), torch.ones(2, 12, dtype=torch.long)
    mask[1, 5:] = 0
    padded = qft.audit(model, original=original, data=[{"input_ids": ids, "attention_mask": mask}])
    bare = qft.audit(model, original=original, data=[ids[:1], ids[1:, :5]])
    for name, w in bare.weights.items():
        assert padded.weights[name].tokens == w.tokens == 17
        assert padded.weights[name].output_error == pytest.approx(w.output_error, rel=1e-4)
        assert padded.weights[name].output_max == pytest.approx(w.output_max, rel=1e-5)


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"use_rslora": True, "lora_alpha": 3}], ids=str)
def test_active_adapters_count_in_a_second_figure(lora):
    model, original = wrapped(**lora)
    fill(model)
    model.train()
    with unchanged(model, outputs=False):
        audited = qft.audit(model, original=original, data=[batch()])
    rows, _ = captured(model, [batch()])
    merged = qft.merge_to_float(model)
    for name, _, quantizer, handle in quantized(model.get_base_model()):
        name = name.removesuffix(".base_layer")
        found, w = audited.weights[name], original.get_submodule(name).weight.detach()
        w_hat = quantizer.dequantize(handle, dtype=torch.float32)
        adapted = merged.get_submodule(name).weight.detach()
        assert found.error == pytest.approx(float((w - w_hat).norm() / w.norm()), rel=1e-5)
        assert found.adapted_error == pytest.approx(float((w - adapted).norm() / w.norm()), rel=1e-5)
        assert found.output_error == pytest.approx(output_error(rows[name], w, w_hat), rel=1e-5)
        assert found.adapted_output_error == pytest.approx(output_error(rows[name], w, adapted), rel=1e-5)


def test_what_an_init_gains_can_be_seen():
    model = llama()
    original = copy.deepcopy(model)
    model = qft.quantize_and_wrap(model, SPEC, init="loftq", adapter=LoraConfig(r=8), progress=False)
    audited = qft.audit(model, original=original, data=[batch()])
    adapted = [w for n, w in audited.weights.items() if n.endswith(("q_proj", "v_proj"))]
    assert len(adapted) == 4
    assert all(w.adapted_error < w.error and w.adapted_output_error < w.output_error for w in adapted)
    assert all(w.adapted_error is None for n, w in audited.weights.items() if n.endswith("mlp.up_proj"))
    assert "of the outputs with the adapters" in audited.summary()


def test_disabled_and_zero_adapters_change_no_figure():
    model, original = pair()
    bare = qft.audit(model, original=original, data=[batch()])
    model = qft.wrap(model, LoraConfig(r=4, target_modules="all-linear"))
    zero = qft.audit(model, original=original, data=[batch()])
    fill(model)
    with model.disable_adapter():
        disabled = qft.audit(model, original=original, data=[batch()])
        assert all(m.disable_adapters for m in model.modules() if isinstance(m, qft.lora.layer.QftLinear))
    for name, w in bare.weights.items():
        assert zero.weights[name].adapted_error == zero.weights[name].error == w.error
        assert zero.weights[name].adapted_output_error == pytest.approx(w.output_error, rel=1e-5)
        assert disabled.weights[name].adapted_error is None
        assert disabled.weights[name].output_error == pytest.approx(w.output_error, rel=1e-5)


def test_merged_adapters_are_part_of_the_stored_weight():
    model, original = wrapped()
    fill(model, size=0.1)
    before = qft.audit(model, original=original, data=[batch()])
    qft.merge(model)
    with unchanged(model):
        after = qft.audit(model, original=original, data=[batch()])
    rows, _ = captured(model, [batch()])
    for name, _, quantizer, handle in quantized(model.get_base_model()):
        name = name.removesuffix(".base_layer")
        w, w_hat = original.get_submodule(name).weight.detach(), quantizer.dequantize(handle, dtype=torch.float32)
        assert after.weights[name].adapted_error is None
        assert after.weights[name].output_error == pytest.approx(output_error(rows[name], w, w_hat), rel=1e-5)
        assert after.weights[name].error > before.weights[name].error


def test_the_original_in_a_folder_gives_the_same_figures(tmp_path):
    model, original = wrapped(BUILDERS["gpt2"])
    fill(model)
    original.save_pretrained(tmp_path)
    mine, theirs = (qft.audit(model, original=o, data=[batch()]) for o in (original, tmp_path))
    assert mine.to_dict() == theirs.to_dict()


def test_data_without_an_original_and_an_original_without_data():
    model, original = pair()
    data = qft.audit(model, data=[batch()]).weights["model.layers.0.mlp.up_proj"]
    assert data.error is None and data.output_error is None and data.input_max > 0 and data.tokens == 24
    both = qft.audit(model, original=original).weights["model.layers.0.mlp.up_proj"]
    assert both.error > 0 and both.output_error is None and both.input_max is None


def test_texts_are_read_with_their_tokenizer():
    def tokenizer(text, verbose=True):
        return {"input_ids": [ord(c) % 90 for c in text]}

    audited = qft.audit(pair()[0], data="a text of some length", tokenizer=tokenizer)
    assert all(w.tokens == 21 for w in audited.weights.values())


def test_a_layer_that_reads_nothing_shows_none():
    class Spare(Plain):
        def __init__(self):
            super().__init__()
            self.spare = nn.Linear(64, 64)

    model, original = pair(Spare)
    audited = qft.audit(model, original=original, data=[batch()])
    spare = audited.weights["spare"]
    assert spare.error > 0
    assert (spare.tokens, spare.input_max, spare.output_max, spare.output_error) == (None,) * 4
    assert all(w.tokens == 24 for n, w in audited.weights.items() if n != "spare")
    assert "5 of 6 layers read any" in audited.summary()
    assert audited._repr_html_() and str(audited) and audited.plot() and len(audited.to_dataframe())


def test_a_layer_that_reads_only_zeros_has_no_output_error():
    model, original = pair(plain)
    for m in (model, original):
        m.embed.weight.data.zero_()
    audited = qft.audit(model, original=original, data=[batch()])
    assert audited.weights["blocks.0.0"].output_error is None
    assert audited.weights["blocks.0.0"].input_max == 0.0
    json.loads(audited.to_json())


@pytest.mark.gpu
def test_the_original_may_be_on_another_device():
    model, original = pair()
    here = qft.audit(model, original=original, data=[batch()])
    there = qft.audit(model.cuda(), original=original, data=[batch()])
    for name, w in here.weights.items():
        assert there.weights[name].error == pytest.approx(w.error, rel=1e-4)
        assert there.weights[name].output_error == pytest.approx(w.output_error, rel=1e-3)
    assert next(original.parameters()).device.type == "cpu"


@dataclass(frozen=True)
class Twins(Rows):
    """Two weights in one module."""

    name: ClassVar[str] = "twins"

    def weights(self, module):
        return tuple(
            qft.QuantizedWeight(module, n, tuple(getattr(module, f"{n}_q").shape), "linear", False, torch.float32)
            for n in ("first", "second")
        )

    def dequantize(self, weight, *, dtype=None, out=None):
        value = getattr(weight.module, f"{weight.name}_q").to(dtype)
        return value if out is None else out.copy_(value)


class TwoWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.quantizer, self.bias = Twins(), None
        self.first_q = nn.Parameter(torch.ones(64, 64, dtype=torch.int8), requires_grad=False)
        self.second_q = nn.Parameter(torch.ones(32, 64, dtype=torch.int8), requires_grad=False)

    def forward(self, x):
        return x @ self.first_q.float().T @ self.second_q.float().T


def test_several_weights_of_a_module_have_names_of_their_own():
    model = nn.Sequential(nn.Embedding(96, 64), TwoWeights())
    model.forward = lambda input_ids: model[1](model[0](input_ids))
    audited = qft.audit(model, data=[batch()])
    assert {n: (w.shape, w.nbytes) for n, w in audited.weights.items()} == {
        "1.first": ((64, 64), 64 * 64),
        "1.second": ((32, 64), 32 * 64),
    }
    assert audited.bits_per_weight == 8
    assert all(w.tokens == 24 for w in audited.weights.values())


# ---- float16 -------------------------------------------------------------------------------------------------


def scaled(factor, dtype=torch.float32):
    """A llama whose second block's MLP reads `factor` as its largest value, or nearly."""
    model = pair(dtype=dtype)[0]
    name = "model.layers.1.mlp.gate_proj"
    largest = qft.audit(model, data=[batch()]).weights[name].input_max
    norm = model.model.layers[1].post_attention_layernorm
    norm.weight.data = norm.weight.data.float().mul_(factor / largest).to(dtype)
    return qft.audit(model, data=[batch()])


def test_activations_near_and_beyond_float16_are_warned_of():
    readers = {f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up")}
    assert not readers & set(scaled(32_700).warnings)
    near = scaled(32_800)
    assert readers <= set(near.warnings)
    assert near.warnings["model.layers.1.mlp.up_proj"].startswith("float16 overflow: input up to 3.28e+04, within a")
    beyond = scaled(200_000)
    assert readers <= set(beyond.warnings) and all(n.startswith("model.layers.1.mlp.") for n in beyond.warnings)
    assert re.match(r"float16 overflow: input up to 2e\+05(;|$)", beyond.warnings["model.layers.1.mlp.up_proj"])
    assert "output up to" in beyond.warnings["model.layers.1.mlp.down_proj"]  # gate times up
    assert "ATTENTION" in beyond.summary() and "65504" in beyond.summary()
    assert "float16 overflow" in str(beyond) and "float16 overflow" in beyond._repr_html_()
    assert set(beyond.to_dict()["warnings"]) == set(beyond.warnings)


def test_a_model_that_does_overflow_is_warned_of():
    """In float16, gate times up is infinite in all rows: down_proj reads nothing that counts, which is no silence."""
    audited = scaled(60_000, dtype=torch.float16)
    down = audited.weights["model.layers.1.mlp.down_proj"]
    assert (down.tokens, down.left_out, down.input_max) == (0, 24, None)
    assert audited.warnings["model.layers.1.mlp.down_proj"] == "float16 overflow: NaN or infinity in 24 tokens"
    assert json.loads(audited.to_json())["weights"]["model.layers.1.mlp.down_proj"]["left_out"] == 24


def test_infinite_figures_are_warned_of_and_valid_in_every_view():
    model = pair(plain)[0]
    model.blocks[0][2].bias.data[0] = torch.inf
    audited = qft.audit(model, data=[batch()])
    assert audited.warnings["blocks.0.2"] == "float16 overflow: output up to inf"
    assert audited.warnings["blocks.1.0"] == "float16 overflow: NaN or infinity in 24 tokens"
    assert "blocks.0.0" not in audited.warnings
    assert json.loads(audited.to_json())["weights"]["blocks.0.2"]["output_max"] == "inf"
    assert audited.plot() and audited._repr_html_() and str(audited)
    assert audited.to_dataframe().loc["blocks.0.2", "output_max"] == torch.inf


# ---- refusals ------------------------------------------------------------------------------------------------


def test_what_cannot_be_audited_is_refused_and_changes_nothing():
    model, original = wrapped()
    fill(model)
    with refuses(qft.AdapterMismatch, model=model):
        qft.audit(model, original=llama(seed=5), data=[batch()])
    with refuses(qft.BadOption, "no layer", model=model):
        qft.audit(model, original=plain(), data=[batch()])
    with refuses(qft.NeedsCalibration, model=model):
        qft.audit(model, original=original, data=[])
    with refuses(qft.BadOption, "token id 96", model=model):
        qft.audit(model, data=[torch.tensor([[1, 96]])])
    with refuses(qft.BadOption, "tokenizer", model=model):
        qft.audit(model, data="a text")
    with refuses(qft.BadOption, "cannot run", model=model):
        qft.audit(model, data=[{"inputs_embeds": torch.ones(1, 5, 63)}])
    next(m for n, m in model.named_modules() if n.endswith("1.mlp.up_proj.lora_B.default")).weight.data[0, 0] = (
        torch.nan
    )
    with refuses(qft.NonFiniteWeights, "model.layers.1.mlp.up_proj", model=model, outputs=False):
        qft.audit(model, original=original)


def test_an_original_of_another_shape_is_refused_where_there_is_no_fingerprint():
    model, original = pair(plain)
    del model._qft  # as if somebody else had quantized it
    original.out = nn.Linear(64, 1, bias=False)
    with refuses(qft.AdapterMismatch, "out of the original is (1, 64)"):
        qft.audit(model, original=original)


def test_merged_and_disabled_adapters_are_left_merged():
    model, original = wrapped()
    fill(model)
    qft.merge(model)
    with unchanged(model), model.disable_adapter():
        assert qft.audit(model, original=original).weights
        with refuses(qft.BadOption, "merged and disabled", "qft.unmerge"):
            qft.audit(model, original=original, data=[batch()])


def test_virtual_tokens_are_refused_and_the_model_under_them_is_not():
    model = qft.wrap(pair()[0], PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with refuses(qft.UnsupportedOperation, "PROMPT_TUNING", "get_base_model"):
        qft.audit(model, data=[batch()])
    assert qft.audit(model.get_base_model(), data=[batch()]).weights and qft.audit(model).weights


def test_an_interrupted_run_leaves_nothing_behind():
    model, original = wrapped()

    def interrupt(*args):
        raise KeyboardInterrupt

    model.get_base_model().model.layers[1].mlp.down_proj.register_forward_hook(interrupt)
    model.train()
    with unchanged(model, outputs=False), pytest.raises(KeyboardInterrupt):
        qft.audit(model, original=original, data=[batch(), batch(seed=2)])
    assert not any("forward" in m.__dict__ for m in model.modules())


# ---- views ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def audited():
    model, original = wrapped()
    fill(model)
    return qft.audit(model, original=original, data=[batch()])


def test_the_table_has_a_row_a_weight_and_only_columns_that_say_something(audited):
    lines = str(audited).splitlines()
    head = next(line for line in lines if "output error" in line)
    rows = [line for line in lines if line.startswith("  model.layers.")]
    assert len(rows) == 14 and head.count("with adapters") == 2
    w = audited.weights["model.layers.0.mlp.up_proj"]
    row = next(r for r in rows if "0.mlp.up_proj" in r)
    assert [f"{w.error:.4f}", f"{w.adapted_error:.4f}", f"{w.output_error:.4f}"] == row.split()[5:8]
    plain_table = str(qft.audit(pair()[0]))
    assert "error" not in plain_table and "largest" not in plain_table and "model.layers.1.mlp.up_proj" in plain_table
    assert str(Audit()).startswith("  0.00 bits")


def test_json_holds_every_figure(audited, tmp_path):
    text = audited.to_json(tmp_path / "audit.json")
    read = json.loads((tmp_path / "audit.json").read_text())
    assert read == json.loads(text) == audited.to_dict()
    for name, w in audited.weights.items():
        assert {**read["weights"][name], "shape": w.shape} == {**vars(w), "bits_per_weight": w.bits_per_weight}
    assert [p.name for p in tmp_path.iterdir()] == ["audit.json"]
    with refuses(qft.BadFolder, "nowhere"):
        audited.to_json(tmp_path / "nowhere" / "audit.json")


def test_the_data_frame_has_a_row_a_weight(audited):
    frame = audited.to_dataframe()
    assert list(frame.index) == list(audited.weights)
    for name, w in audited.weights.items():
        for key in ("error", "adapted_error", "output_error", "adapted_output_error", "input_max", "bits_per_weight"):
            assert frame.loc[name, key] == getattr(w, key)
    assert frame.groupby("block").size().to_dict() == {0: 7, 1: 7}
    assert frame.loc["model.layers.1.self_attn.q_proj", "kind"] == "self_attn.q_proj"
    bare = qft.audit(pair(plain)[0]).to_dataframe()
    assert bare["error"].isna().all() and bare.loc["blocks.1.2", "block"] == 1
    assert bare["error"].dtype == "float64" and bare["tokens"].dtype == "Int64"
    assert len(Audit().to_dataframe()) == 0


def test_places_in_a_model():
    assert place("model.layers.3.mlp.experts.5.up_proj") == (3, "mlp.experts.*.up_proj")
    assert place("blocks.0.2") == (0, "2")
    assert place("stack.4") == (4, "stack")
    assert place("out") == (None, "out")


def test_the_figure_shows_what_there_is(audited, tmp_path):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    figure = audited.plot(tmp_path / "audit.png")
    assert (tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")
    titles = [axis.get_title() for axis in figure.axes]
    assert len(titles) == 4 and titles[:2] == ["relative error of the weights", "relative error of the outputs"]
    errors = [w.error for n, w in audited.weights.items() if n.endswith("q_proj")]
    assert any(list(line.get_ydata()) == errors for line in figure.axes[0].lines)
    adapted = [w.adapted_output_error for n, w in audited.weights.items() if n.endswith("q_proj")]
    assert any(list(line.get_ydata()) == adapted for line in figure.axes[1].lines)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == [*dict.fromkeys(place(n)[1] for n in audited.weights), "with adapters"]
    assert pyplot.get_fignums() == [] and figure.canvas.manager is None
    audited.plot(tmp_path / "audit.SVG")
    assert "<svg" in (tmp_path / "audit.SVG").read_text()
    assert {p.name for p in tmp_path.iterdir()} == {"audit.png", "audit.SVG"}
    with refuses(qft.BadOption, "'docx'", "png"):
        audited.plot(tmp_path / "audit.docx")
    with refuses(qft.BadFolder, "nowhere"):
        audited.plot(tmp_path / "nowhere" / "audit.png")


def test_the_figure_of_models_without_blocks_with_two_stacks_and_with_many_layers(tmp_path):
    def labels(audit):
        figure = audit.plot(tmp_path / "figure.png")
        return [t.get_text() for legend in figure.legends for t in legend.get_texts()]

    t5 = labels(qft.audit(pair(BUILDERS["t5"])[0]))
    assert len(t5) == 16 and sum(label.startswith("decoder.block: ") for label in t5) == 10
    assert labels(qft.audit(pair(plain)[0])) == ["0", "2", "out"]
    many = Audit(weights={f"layer_{i:c}": WeightAudit("Q()", (8, 8), 32) for i in range(97, 150)})
    assert labels(many)[-1] == "and 25 more"
    assert labels(Audit()) == []


def test_the_card_is_whole_escaped_and_needs_nothing_from_outside(audited):
    class Tags(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.seen, self.text = [], [], []

        def handle_starttag(self, tag, attrs):
            self.open.append(tag)
            self.seen.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

        def handle_data(self, data):
            self.text.append(data)

    def parsed(card):
        tags = Tags()
        tags.feed(card)
        tags.close()
        assert tags.open == []
        return tags

    tags = parsed(audited._repr_html_())
    assert tags.seen.count("tr") == 15
    w = audited.weights["model.layers.1.mlp.up_proj"]
    assert {"model.layers.1.mlp.up_proj", f"{w.error:.4f}", f"{w.output_error:.4f}"} <= set(tags.text)
    assert not re.search(r"https?:|src=|url\(|@import", audited._repr_html_())
    evil = "<script>alert('x')</script>&"
    bad = Audit(
        weights={evil: WeightAudit(evil, (8, 8), 32, error=0.5, input_max=1e6)},
        left={evil: evil},
        experts={evil: 5},
        merges=(evil,),
    )
    tags = parsed(bad._repr_html_())
    assert "script" not in tags.seen and evil in tags.text
    assert parsed(Audit()._repr_html_()).open == []


@pytest.mark.parametrize(("package", "view"), [("pandas", "to_dataframe"), ("matplotlib", "plot")])
def test_a_missing_package_is_named_with_the_pip_line(audited, monkeypatch, package, view):
    for name in [n for n in sys.modules if n.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with refuses(qft.MissingDependency, f"pip install {package}", "qft[plot]"):
        getattr(audited, view)()
    assert str(audited) and audited.to_json() and audited._repr_html_()

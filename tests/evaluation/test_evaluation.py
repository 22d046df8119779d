"""qft.evaluate: its numbers by plain computation, what it finds wrong, what it refuses."""

import copy
import json
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from helpers import refuses, unchanged
from models import VOCABULARY, Plain, bert, gpt2, llama, t5
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import qft
from qft.evaluation import evaluate
from qft.evaluation.data import rows
from qft.evaluation.sequences import sequences

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'][0] }}>{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


COARSE = "reference:format=int,bits=2,group_size=32"


def characters(template=None):
    """A tokenizer of single characters whose ids fit the small models."""
    vocabulary = {chr(i + 32): i for i in range(VOCABULARY)}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="?")
    tokenizer.chat_template = template
    return tokenizer


def ids(*lengths, seed=0):
    torch.manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (n,)).tolist() for n in lengths]


def quantized(builder=llama, spec="nf4", **changes):
    return qft.quantize(builder(**changes), spec, progress=False)


@torch.no_grad()
def logits(model, row):
    return model(input_ids=torch.tensor([row]), use_cache=False).logits[0].double()


def loss(model, row, counted=None):
    """Summed next-token loss of a row, and over how many tokens."""
    at = [t for t in range(1, len(row)) if counted is None or t in counted]
    lp = logits(model, row).log_softmax(-1)
    return -sum(float(lp[t - 1, row[t]]) for t in at), len(at)


# ---- numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("builder", [llama, gpt2])
def test_perplexity_and_drift_by_a_plain_computation(builder, batch_size):
    base, model, data = builder(), quantized(builder, COARSE), ids(20, 7, 33, 2, 90)
    with unchanged(model), unchanged(base):
        found = evaluate(model, data, baseline=base, samples=3, batch_size=batch_size, progress=False)
    for which, score in ((model, found.score), (base, found.baseline_score)):
        sums = [loss(which, row) for row in data]
        total, tokens = (sum(s[i] for s in sums) for i in (0, 1))
        assert score.tokens == tokens == 147
        assert score.loss == pytest.approx(total / tokens, rel=1e-6)
        assert score.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-5)
    p = torch.cat([logits(base, row)[:-1] for row in data[:3]])
    q = torch.cat([logits(model, row)[:-1] for row in data[:3]])
    kl = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")
    assert (found.drift.samples, found.drift.tokens) == (3, 57)
    assert found.drift.kl == pytest.approx(float(kl), rel=1e-4, abs=2e-7)
    assert found.drift.mse == pytest.approx(float((p - q).square().mean()), rel=1e-4)
    assert found.drift.agreement == float((p.argmax(-1) == q.argmax(-1)).double().mean())
    each = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    first = found.drift.by_position["1"]
    assert first == pytest.approx(float((each[0] + each[19] + each[25]) / 3), rel=1e-4, abs=2e-7)


def test_a_model_beside_its_own_copy_does_not_drift():
    base = llama()
    found = evaluate(copy.deepcopy(base), ids(40), baseline=base, progress=False)
    assert (found.drift.kl, found.drift.mse, found.drift.agreement) == (0.0, 0.0, 1.0)
    assert found.perplexity == found.baseline_perplexity and found.weights is None and not found.warnings


def test_fewer_bits_are_worse():
    base, data = llama(), ids(100, 100)
    drifts = [
        evaluate(
            quantized(spec=f"reference:format=int,bits={b},group_size=32"), data, baseline=base, progress=False
        ).drift
        for b in (8, 4, 2)
    ]
    assert drifts[0].kl < drifts[1].kl < drifts[2].kl
    assert drifts[0].mse < drifts[1].mse < drifts[2].mse
    assert drifts[0].agreement > drifts[2].agreement


@pytest.mark.parametrize(
    ("length", "stride"), [(16, None), (16, 15), (16, 4), (2, None), (50, None), (51, None), (128, 1)]
)
def test_windows_predict_each_token_once(length, stride):
    """By hand: a token is predicted from what its first window shows before it."""
    (row,), model = ids(50), llama()
    found = evaluate(model, [row], baseline=False, length=length, stride=stride, progress=False)
    step, total, done = stride or length - 1, 0.0, set()
    for start in range(0, 50, step):
        window = row[start : start + length]
        new = [t for t in range(1, len(window)) if start + t not in done]
        total += loss(model, window, new)[0]
        done |= {start + t for t in new}
        if start + length >= 50:
            break
    assert done == set(range(1, 50)) and found.score.tokens == 49
    assert found.score.loss == pytest.approx(total / 49, rel=1e-6)


def test_wide_strides_leave_the_first_token_of_a_window_out():
    cut = list(sequences(rows([list(range(20))]), None, length=10, stride=10))
    assert [s.ids for s in cut] == [list(range(10)), list(range(10, 20))]
    assert [s.tokens for s in cut] == [9, 9]


def test_limit_and_samples():
    found = evaluate(llama(), ids(5, 6, 7), baseline=llama(seed=1), limit=2, samples=1, progress=False)
    assert (found.sequences, found.score.tokens, found.drift.samples, found.drift.tokens) == (2, 9, 1, 4)


def test_an_encoder_decoder_predicts_the_completion():
    model, base = quantized(t5), t5()
    data = [{"input_ids": a, "labels": b} for a, b in zip(ids(9, 4), ids(3, 8, seed=1))]
    for batch_size in (1, 2):
        found = evaluate(model, data, baseline=base, batch_size=batch_size, progress=False)
        total = 0.0
        with torch.no_grad():
            for row in data:
                out = model(input_ids=torch.tensor([row["input_ids"]]), labels=torch.tensor([row["labels"]]))
                total += float(F.cross_entropy(out.logits[0].double(), torch.tensor(row["labels"]), reduction="sum"))
        assert found.score.tokens == 11 and found.drift.tokens == 11
        assert found.score.loss == pytest.approx(total / 11, rel=1e-5)


# ---- which tokens count ------------------------------------------------------------------------------------


def counted(row, template=None):
    tokenizer = characters(template)
    (cut,) = sequences(rows([row]), tokenizer, length=128)
    text = "".join(tokenizer.convert_ids_to_tokens(cut.ids))
    return text, "".join(c if k else "_" for c, k in zip(text, cut.counted))


@pytest.mark.parametrize(
    ("row", "text", "predicted"),
    [
        ("abc", "abc", "_bc"),
        ({"text": "abc", "id": 7}, "abc", "_bc"),
        ({"prompt": "ab", "completion": "cde"}, "abcde", "__cde"),
        (
            {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]},
            "<u>hi;<a>yo;",
            "_________yo;",
        ),
        (
            {
                "messages": [
                    {"role": r, "content": c}
                    for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"))
                ]
            },
            "<u>a;<a>b;<u>c;<a>d;",
            "________b;________d;".replace("________b;________d;", "_" * 8 + "b;" + "_" * 8 + "d;"),
        ),
        (
            {"prompt": [{"role": "user", "content": "hi"}], "completion": [{"role": "assistant", "content": "yo"}]},
            "<u>hi;<a>yo;",
            "_________yo;",
        ),
    ],
)
def test_what_is_predicted(row, text, predicted):
    assert counted(row, TEMPLATE) == (text, predicted)


def test_a_newline_after_the_end_of_the_turn_is_no_answer():
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a b"}]}
    text, predicted = counted(row, TEMPLATE.replace(";", "; "))
    assert (text, predicted) == ("<u>hi; <a>a b; ", "_" * 10 + "a b;_")


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_are_written_out_as_in_training(as_text):
    tools = [{"name": "f"}]
    row = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ab"}]}
    row["tools"] = json.dumps(tools) if as_text else tools
    text, predicted = counted(row, "{% if tools %}{{ tools[0]['name'] }}:{% endif %}" + TEMPLATE)
    assert (text, predicted) == ("f:<u>hi;<a>ab;", "_" * 11 + "ab;")


def test_labels_say_which_ids_count():
    (cut,) = sequences(rows([{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}]), None, length=8)
    assert cut.counted == [False, False, True, True]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"question": "x"}, "has question, and a row has"),
        ({"text": 5}, "text is a int"),
        ({"prompt": "x", "completion": None}, "completion is missing"),
        ({"prompt": None, "completion": "x"}, "prompt is missing"),
        ("", "no token to predict"),
        ("a", "no token to predict"),
        ({"messages": []}, "not empty"),
        ({"messages": ["hi"]}, "role and content"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no message of the assistant"),
        ([1.5], "list of token ids"),
        ({"input_ids": [1, 2], "labels": [1]}, "2 input_ids and 1 labels"),
    ],
)
def test_rows_that_say_nothing_are_refused_by_number(row, says):
    with refuses(qft.BadOption, "row 2", says):
        list(sequences(rows(["fine", row]), characters(TEMPLATE), length=16))


def test_messages_need_a_template():
    with refuses(qft.BadOption, "row 1", "chat template"):
        counted({"messages": [{"role": "assistant", "content": "x"}]})


# ---- ranges ------------------------------------------------------------------------------------------------


def test_ranges_are_the_largest_outputs_without_padding():
    model, data = llama(), ids(30, 5)
    seen = {}
    for name, module in model.named_modules():
        if name.startswith(("model.layers.0", "model.layers.1", "model.embed_tokens")):
            block = ".".join(name.split(".")[:3])
            module.register_forward_hook(
                lambda _m, _a, out, block=block: seen.setdefault(block, []).append(
                    float((out[0] if isinstance(out, tuple) else out).abs().max())
                )
            )
    for row in data:
        logits(model, row)
    want = {block: max(values) for block, values in seen.items()}
    for batch_size in (1, 2):
        found = evaluate(model, data, baseline=False, batch_size=batch_size, progress=False)
        assert list(found.ranges) == ["model.embed_tokens", "model.layers.0", "model.layers.1", "logits"]
        for block, value in want.items():
            assert found.ranges[block].largest == pytest.approx(value, rel=1e-5)
            assert found.ranges[block].not_finite == found.ranges[block].beyond_float16 == 0


def test_values_beyond_float16_are_found():
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1e6)
    found = evaluate(model, ids(30), baseline=False, progress=False)
    assert found.ranges["model.layers.1"].largest > 65504 and found.ranges["model.layers.1"].beyond_float16 > 0
    assert found.ranges["model.layers.0"].beyond_float16 == 0
    assert any("model.layers.1: values beyond float16" in text for text in found.warnings)
    assert math.isfinite(found.perplexity)


def test_an_overflow_is_found_where_it_begins(tmp_path):
    """In float16 a product beyond 65504 is infinite, and the loss is no number that anybody could trust."""
    model = llama(dtype=torch.float16)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(60000.0)
    found = evaluate(model, ids(30, 10), baseline=llama(dtype=torch.float16), progress=False)
    block = found.ranges["model.layers.1"]
    assert block.not_finite > 0 and block.first_not_finite == "mlp.up_proj"
    assert found.ranges["model.layers.0"].not_finite == 0
    assert math.isnan(found.perplexity) and found.score.tokens == 38
    broken = sum(int((~logits(model, row)[:-1].isfinite()).any(-1).sum()) for row in ids(30, 10))
    assert found.score.not_finite == broken > 0
    assert math.isnan(found.drift.kl) and math.isfinite(found.baseline_perplexity)
    assert any("first in model.layers.1.mlp.up_proj" in text for text in found.warnings)
    values = json.loads(found.to_json())
    assert values["perplexity"] == "nan" and values["drift"]["kl"] == "nan"
    assert "nan" in str(found)
    found.report(tmp_path / "r.html")


# ---- baselines ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A float model, an adapter over its NF4 copy, the quantized copy, and an adapter that plain PEFT wrote."""
    path = tmp_path_factory.mktemp("models")
    base = llama()
    base.save_pretrained(path / "float")
    characters(TEMPLATE).save_pretrained(path / "float")
    wrapped = qft.quantize_and_wrap(str(path / "float"), "nf4", device="cpu", progress=False)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    qft.save(wrapped, path / "adapter")
    plain = get_peft_model(
        llama(), LoraConfig(r=4, target_modules="all-linear", base_model_name_or_path=str(path / "float"))
    )
    plain.peft_config["default"].base_model_name_or_path = str(path / "float")
    plain.save_pretrained(path / "plain")
    qft.quantize(str(path / "float"), "nf4", device="cpu", progress=False).save_pretrained(path / "quantized")
    return path


def test_an_adapters_folder_finds_its_float_model(folders):
    data = ["some held-out text", {"prompt": "a", "completion": "b"}]
    found = evaluate(folders / "adapter", data, device="cpu", progress=False)
    assert found.baseline == str(folders / "float")
    tuned = qft.load(folders / "adapter", device="cpu")
    by_hand = evaluate(tuned, data, baseline=llama(), tokenizer=characters(), progress=False)
    assert found.score == by_hand.score and found.drift == by_hand.drift
    assert found.baseline_score == by_hand.baseline_score
    assert found.weights.weights["model.layers.0.mlp.up_proj"].error > 0.01
    assert any("what tuning changed" in note for note in found.notes)


def test_an_adapter_of_plain_peft_over_a_float_model(folders):
    found = evaluate(folders / "plain", ["abcdef"], device="cpu", progress=False)
    assert found.baseline == str(folders / "float") and found.weights is None
    assert found.drift.kl == 0.0  # PEFT's zero start


def test_a_quantized_folder_and_a_model_quantized_in_memory(folders):
    found = evaluate(folders / "quantized", ["abcdef"], device="cpu", progress=False, tokenizer=folders / "float")
    assert found.baseline is None and found.no_baseline and "no baseline" in str(found)
    model = qft.quantize(str(folders / "float"), "nf4", device="cpu", progress=False)
    again = evaluate(model, ["abcdef"], progress=False)
    assert again.baseline == str(folders / "float") and again.score == found.score


def test_another_float_model_is_no_baseline(folders, tmp_path):
    """The folder was overwritten since: nothing is compared with other weights in silence."""
    llama().save_pretrained(tmp_path / "float")
    model = qft.quantize(str(tmp_path / "float"), "nf4", device="cpu", progress=False)
    llama(seed=5).save_pretrained(tmp_path / "float")
    found = evaluate(model, ids(10), progress=False)
    assert found.baseline is None and "is no baseline" in found.no_baseline
    given = evaluate(model, ids(10), baseline=llama(seed=5), progress=False)
    assert given.drift.kl > 0 and any("errors of the weights were not measured" in note for note in given.notes)


def test_a_folder_without_all_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    llama().save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["model.layers.0.mlp.up_proj.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with refuses(qft.BadFolder, "mlp.up_proj"):
        evaluate(tmp_path, ids(5), device="cpu", progress=False)


def test_refusals(folders):
    model = llama()
    for arguments, says in (
        ({"samples": 0}, "samples=0"),
        ({"length": 1}, "length=1"),
        ({"length": 4096}, "128 positions"),
        ({"batch_size": 2.0}, "batch_size=2.0"),
        ({"baseline": model}, "baseline= is the model itself"),
        ({"baseline": llama(vocab_size=100)}, "different vocabularies"),
        ({"baseline": 5}, "not a int"),
        ({"data": []}, "no rows"),
        ({"data": None}, "nothing to measure"),
        ({"data": [[1, VOCABULARY]]}, f"token id {VOCABULARY}"),
        ({"data": [[1, -1]]}, "token id -1"),
        ({"data": ["some text"]}, "pass tokenizer="),
    ):
        with refuses(qft.BadOption, says, model=model):
            evaluate(model, **{"data": ids(5), "progress": False, **arguments})
    with refuses(qft.BadOption, "logits for each token"):
        evaluate(bert(), ids(5), baseline=False, progress=False)
    with refuses(qft.BadFolder, "there is no folder"):
        evaluate("/nowhere/at/all", ids(5))
    with refuses(qft.BadFolder, "neither a model"):
        evaluate(folders, ids(5))
    with refuses(qft.BadFolder, "holds no tokenizer"):
        evaluate(model, ["x"], tokenizer=folders / "adapter", progress=False)


def test_modules_of_ones_own():
    class Bare(Plain):
        def forward(self, input_ids, attention_mask=None):
            return super().forward(input_ids)

    torch.manual_seed(0)
    model = Bare()
    found = evaluate(qft.quantize(copy.deepcopy(model), "nf4", progress=False), ids(12), baseline=model, progress=False)
    assert found.drift.kl > 0 and found.weights is not None
    with refuses(qft.BadOption, "does not take", "attention_mask"):
        evaluate(Plain(), ids(5), progress=False)


# ---- files -------------------------------------------------------------------------------------------------


def test_every_format_gives_the_same_rows(tmp_path, monkeypatch):
    import pandas

    monkeypatch.setitem(sys.modules, "datasets", None)  # of training alone
    values = [{"prompt": "a", "completion": "b,\nc"}, {"prompt": "ü", "completion": '"d"'}]
    (tmp_path / "a.jsonl").write_text("\ufeff" + "\n\n".join(json.dumps(v) for v in values))
    (tmp_path / "a.json").write_text(json.dumps(values))
    pandas.DataFrame(values).to_csv(tmp_path / "a.csv", index=False)
    pandas.DataFrame(values).to_parquet(tmp_path / "a.parquet")
    pandas.DataFrame(values).to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    (tmp_path / "wrapped.json").write_text(json.dumps({"data": values}))
    (tmp_path / "lines.json").write_text("\n".join(json.dumps(v) for v in values))
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet", "a.tsv", "wrapped.json", "lines.json"):
        assert [r.value for r in rows(tmp_path / name)] == values, name
    (tmp_path / "one.json").write_text(json.dumps(values[0]))
    (tmp_path / "ids.jsonl").write_text("[5, 6, 7]\n[8, 9]\n")
    assert [r.value for r in rows(tmp_path / "one.json")] == values[:1]
    assert [s.ids for s in sequences(rows(tmp_path / "ids.jsonl"), None, length=8)] == [[5, 6, 7], [8, 9]]
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert [r.value for r in rows(str(tmp_path / "a.txt"))] == ["one\ntwo\n"]


def test_a_chat_is_the_same_tokens_from_every_format(tmp_path):
    import pandas

    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo", "name": "x"}]
    pandas.DataFrame({"messages": [json.dumps(chat)]}).to_csv(tmp_path / "a.csv", index=False)
    pandas.DataFrame({"messages": [chat]}).to_parquet(tmp_path / "a.parquet")
    template = TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] }}{{ '!' if 'name' in m }}")
    for row in (rows(tmp_path / "a.csv")[0].value, rows(tmp_path / "a.parquet")[0].value, {"messages": chat}):
        assert counted(row, template) == ("<u>hi;<a>yo!;", "_________yo!;")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2: broken JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n\xff\n', "line 3: not UTF-8"),
        ("a.jsonl", b"3\n", "line 1: a row is an object with messages"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b"\n\n", "has no rows"),
        ("a.txt", b" \n", "has no rows"),
        ("a.json", b"3", "JSON list of objects, not int"),
        ("a.json", b'[{"text": "x"},\n3]', "line 2: a row is"),
        ("a.csv", b"text\n", "has no rows"),
        ("a.csv", b"text,id\na,1\nb\n", "line 3: fewer values"),
        ("a.csv", b"text\na,1\n", "line 2: more values"),
        ("a.csv", b'text\n"a" b\n', "line 2:"),
        ("a.parquet", b"PAR1nonsense", "no parquet file"),
        ("a.xlsx", b"x", ".xlsx is not known"),
    ],
)
def test_broken_files(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with refuses(qft.BadOption, name, says):
        rows(tmp_path / name)


def test_files_that_are_not_there(tmp_path):
    with refuses(qft.BadFolder, "there is no file"):
        rows("nowhere.jsonl")
    with refuses(qft.BadFolder, "is a folder with no data files"):
        rows(tmp_path)


def test_a_folder_gives_its_held_out_split(tmp_path):
    datasets = pytest.importorskip("datasets", reason="pip install 'qft[train]'")
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    assert [r.value for r in rows(tmp_path)] == [{"text": "a"}]  # its only one
    (tmp_path / "test.csv").write_text("text\nb\nc\n")
    found = rows(str(tmp_path))
    assert [r.value for r in found] == [{"text": "b"}, {"text": "c"}] and found[1].where.endswith("test.csv line 3")
    (tmp_path / "valid.jsonl").write_text('{"text": "d"}\n{\n')
    with refuses(qft.BadOption, "valid.jsonl line 2", "broken JSON"):
        rows(tmp_path)
    part = datasets.Dataset.from_list
    datasets.DatasetDict({"train": part([{"text": "a"}]), "dev": part([{"text": "b"}])}).save_to_disk(
        tmp_path / "saved"
    )
    (only,) = rows(tmp_path / "saved")
    assert only.value == {"text": "b"} and only.where == f"{tmp_path / 'saved'}[dev] row 1"
    part([{"text": "e"}]).save_to_disk(tmp_path / "whole")
    assert [r.value for r in rows(tmp_path / "whole")] == [{"text": "e"}]
    datasets.DatasetDict({"train": part([{"text": "a"}]), "more": part([{"text": "b"}])}).save_to_disk(tmp_path / "no")
    with refuses(qft.BadFolder, "train, more", "give a file"):
        rows(tmp_path / "no")


# ---- tasks -------------------------------------------------------------------------------------------------


@pytest.fixture
def harness(monkeypatch):
    """lm-eval as its documentation describes it, with one task that counts calls."""
    calls = []

    class HFLM:
        def __init__(self, **options):
            self.options = options

    def simple_evaluate(**options):
        model = options["model"].options["pretrained"]
        model.train()  # such a thing must not stay
        calls.append((model, options))
        if options["tasks"] == ["broken"]:
            raise ConnectionError("no network")
        results = {
            "alias": "easy",
            "sample_len": 3,
            "acc,none": 0.5,
            "acc_stderr,none": 0.1,
            "em,strict": 1,
            "f1_stderr,none": "N/A",
        }
        return {"results": {"easy": results}}

    manager = types.SimpleNamespace(all_tasks=["easy", "broken"])
    tree = {
        "lm_eval": {"simple_evaluate": simple_evaluate, "__spec__": types.SimpleNamespace(name="lm_eval")},
        "lm_eval.models": {},
        "lm_eval.models.huggingface": {"HFLM": HFLM},
        "lm_eval.tasks": {"TaskManager": lambda include_path=None: manager},
    }
    for name, names in tree.items():
        module = types.ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
    return calls


def test_tasks_run_on_both_models(harness):
    model, base = quantized(), llama()
    found = evaluate(model, baseline=base, tasks="easy", tokenizer=characters(), limit=3, progress=False)
    assert [c[0] for c in harness] == [model, base] and harness[0][1]["limit"] == 3
    assert not model.training and not base.training
    assert found.tasks["easy"]["acc"] == 0.5 and found.tasks["easy"]["em (strict)"] == 1.0
    assert found.tasks["easy"].keys() == {"acc", "acc stderr", "em (strict)", "f1 stderr"}
    assert math.isnan(found.tasks["easy"]["f1 stderr"]) and found.baseline_tasks.keys() == {"easy"}
    assert "0.5000 ± 0.1000" in str(found) and "0.5000 ± 0.1000" in found.page().html()
    assert json.loads(found.to_json())["tasks"]["easy"]["f1 stderr"] == "nan"
    assert any("no data was given" in note for note in found.notes)


def test_tasks_that_cannot_run(harness, monkeypatch):
    with refuses(qft.BadOption, "no task 'eesy'", "did you mean easy"):
        evaluate(llama(), tasks=["eesy"], tokenizer=characters(), progress=False)
    with refuses(qft.BadOption, "broken", "no network"):
        evaluate(llama(), tasks=["broken"], tokenizer=characters(), progress=False)
    with refuses(qft.BadOption, "pass tokenizer="):
        evaluate(llama(), tasks=["easy"], progress=False)
    monkeypatch.delitem(sys.modules, "lm_eval")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, find=None: None)
    with refuses(qft.MissingDependency, "pip install lm-eval"):
        evaluate(llama(), tasks=["easy"], tokenizer=characters(), progress=False)


# ---- what is shown -----------------------------------------------------------------------------------------


def test_the_result_as_text_json_and_page(tmp_path):
    found = evaluate(quantized(), ids(60, 20), baseline=llama(), progress=False)
    text = str(found)
    assert f"{found.perplexity:.4f}" in text and f"{found.drift.agreement:.2%}" in text and "4.50" in text
    values = json.loads(found.to_json(tmp_path / "e.json"))
    assert values == json.loads((tmp_path / "e.json").read_text()) == found.to_dict()
    assert values["drift"]["kl"] == found.drift.kl and values["weights"]["bits_per_weight"] == 4.5
    page = found.report(tmp_path / "e.html").read_text()
    assert f"{found.perplexity:.3f}" in page and "KL by position" in page and "Relative error of the weights" in page
    assert found._repr_html_() in page
    with refuses(qft.BadFolder, "there is no folder"):
        found.to_json(tmp_path / "no" / "e.json")


def test_names_from_data_are_shown_as_text():
    found = qft.Evaluation("<script>alert(1)</script>", "</td><script>", data="<script>")
    found.notes.append("<script>")
    found.tasks["<script>"] = {"<script>": 1.0}
    assert "<script" not in found.page().html()

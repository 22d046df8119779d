"""What is learnt of rows as people have them: every answer, nothing else, or a refusal that names the row."""

import pytest
from helpers import refuses
from tiny_training import CHATML, MARKED, quick, save_model, t5, tokenizer, vision, write_jsonl
from tokenizers import processors

import qft
from qft.data.files import read_texts
from qft.evaluation.data import rows as evaluation_rows
from qft.evaluation.sequences import sequences
from qft.ops.loss import IGNORE
from qft.training.checks import Chat
from qft.training.setup import prepare

pytest.importorskip("trl", reason="pip install trl")

PARTS_ONLY = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for part in m['content'] %}{{ part['text'] }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FIRST_ROLE = "{% if messages[0]['role'] == 'system' %}{% endif %}" + CHATML
"""As Qwen2.5's: it reads the first message."""
CALLS = CHATML.replace(
    "{{ m['content'] }}",
    "{{ m['content'] or '' }}{% for c in m.tool_calls or [] %}<call>{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}{% endfor %}",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def encoder_decoder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("t5"), model=t5(), eos_token="</s>")


def prepared(model, tmp_path, rows, **changes):
    return prepare(qft.TrainConfig(model, write_jsonl(tmp_path / "d.jsonl", rows), **quick(**changes)))


def learnt(labels, tok):
    return tok.decode([i for i in labels if i != IGNORE])


def of(chat, *messages, **options):
    """What a chat learns of messages."""
    return learnt(chat(list(messages), **options)[1], chat.tokenizer)


def user(content="ab", **more):
    return {"role": "user", "content": content, **more}


def assistant(content="cd", **more):
    return {"role": "assistant", "content": content, **more}


def text(*parts):
    return [{"type": "text", "text": part} for part in parts]


# ---- content as parts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, MARKED, PARTS_ONLY], ids=["text", "marked", "parts only"])
@pytest.mark.parametrize(
    "answer",
    ["cd", text("cd"), text("c", "d"), [{"text": "cd"}], ["c", "d"], [{"type": "text", "text": "cd", "image": None}]],
    ids=["text", "a part", "parts", "no type", "texts", "nulls"],
)
def test_parts_of_text_are_learnt_as_text_by_every_template(template, answer):
    chat = Chat(tokenizer(template))
    ids, labels = chat([user(text("ab")), assistant(answer)])
    assert learnt(labels, chat.tokenizer) == "cd<|im_end|>"
    assert chat.tokenizer.decode(ids) == "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\ncd<|im_end|>\n"


def test_parts_are_text_in_evaluation_and_calibration_too(tmp_path):
    tok = tokenizer(CHATML)
    rows = [{"messages": [user(text("ab")), assistant(text("c", "d"))]}]
    (cut,) = sequences(evaluation_rows(rows), tok, length=99)
    assert tok.decode([i for i, c in zip(cut.ids, cut.counted) if c]) == "cd<|im_end|>"
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    assert read_texts(path, tok) == ["<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\ncd<|im_end|>\n"]
    tok.chat_template = None
    assert read_texts(path, tok) == ["ab\ncd"]


def test_a_part_that_is_not_text_is_refused_by_its_type(model, tmp_path):
    bad = {"messages": [user([{"type": "image", "image": "a.png"}, *text("ab")]), assistant()]}
    good = {"messages": [user(), assistant()]}
    with refuses(qft.BadOption, "line 2", "'image'", "reads text only"):
        prepared(model, tmp_path, [good, bad])
    assert prepared(model, tmp_path, [good, bad], skip_bad_rows=True).train.counts.skipped == 1
    with refuses(qft.BadOption, "row 1", "'image'"):
        list(sequences(evaluation_rows([bad]), tokenizer(), length=99))


# ---- which answers are learnt ------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, MARKED, FIRST_ROLE], ids=["by its prefix", "by its marks", "first role"])
def test_a_conversation_that_the_assistant_opens_is_learnt_from_its_first_word(template):
    chat = Chat(tokenizer(template))
    assert of(chat, assistant("hi"), user(), assistant("cd")) == "hi<|im_end|>cd<|im_end|>"
    assert of(chat, assistant("hi")) == "hi<|im_end|>"
    assert of(Chat(tokenizer(template), "last_answer"), assistant("hi")) == "hi<|im_end|>"
    row = {"messages": [assistant("hi"), user(), assistant("cd")]}
    (cut,) = sequences(evaluation_rows([row]), tokenizer(template), length=99)
    assert chat.tokenizer.decode([i for i, c in zip(cut.ids, cut.counted) if c]) == "hi<|im_end|>cd<|im_end|>"


def test_a_template_that_wants_the_user_first_refuses_the_row(model, tmp_path):
    strict = "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('roles must alternate') }}{% endif %}"
    folder = save_model(tmp_path / "m", strict + CHATML)
    with refuses(qft.BadOption, "line 1", "roles must alternate"):
        prepared(folder, tmp_path, [{"messages": [assistant("hi"), user(), assistant("cd")]}])


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["by its prefix", "by its marks"])
@pytest.mark.parametrize("off", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": False}], ids=str)
def test_a_message_of_weight_0_is_not_learnt(template, off):
    said = [user(), assistant("cd", **off), user("ef"), assistant("gh", weight=1)]
    assert of(Chat(tokenizer(template)), *said) == "gh<|im_end|>"
    said = [user(), assistant("cd"), user("ef"), assistant("gh", **off)]
    assert of(Chat(tokenizer(template)), *said) == "cd<|im_end|>"
    everything = of(Chat(tokenizer(template), "all"), *said)
    assert "ab<|im_end|>" in everything and "cd<|im_end|>" in everything and "gh" not in everything
    (cut,) = sequences(evaluation_rows([{"messages": said}]), tokenizer(template), length=99)
    assert sum(cut.counted) == 3


def test_weights_that_are_not_supported_are_refused(model, tmp_path):
    for row, says in (
        ([user(), assistant(weight=0)], "no token to learn"),
        ([user(), assistant(weight=0.5)], "'weight': 0.5"),
        ([user(), assistant(weight="no")], "'weight': 'no'"),
        ([user(train=True), assistant()], "only the assistant's"),
        ([user(), assistant(weight=1, train=False)], "contradict"),
    ):
        with refuses(qft.BadOption, "line 1", says):
            prepared(model, tmp_path, [{"messages": row}])


def test_roles_by_other_spellings_are_learnt():
    said = [{"role": "Human", "content": "ab"}, {"role": "Assistant", "content": "cd"}, user("e"), assistant("f")]
    assert of(Chat(tokenizer()), *said) == "cd<|im_end|>f<|im_end|>"
    assert of(Chat(tokenizer()), user(), {"role": "gpt", "content": "cd"}) == "cd<|im_end|>"


@pytest.mark.parametrize("marks", [False, True])
def test_an_answer_that_the_template_drops_or_changes_is_refused_with_its_name(marks, tmp_path):
    """As templates drop what an answer thought; where they mark answers, nothing else shows it."""
    content = "{{ m['content'].split('</think>')[-1] }}"
    template = (MARKED if marks else CHATML).replace("{{ m['content'] }}", content)
    folder = save_model(tmp_path / "m", template)
    good, bad = {"messages": [user(), assistant()]}, {"messages": [user(), assistant("<think>x</think>cd")]}
    with refuses(qft.BadOption, "line 2", "'<think>x</think>cd'", "not among the learnt", f"template of {folder}"):
        prepared(folder, tmp_path, [good, bad])
    counts = prepared(folder, tmp_path, [good, bad], skip_bad_rows=True).train.counts
    assert (counts.rows, counts.skipped) == (1, 1)
    with refuses(qft.BadOption, "row 1", "drops or changes"):
        list(sequences(evaluation_rows([bad]), tokenizer(template), length=99))
    with refuses(qft.BadOption, "line 1", "'hm'"):
        prepared(folder, tmp_path, [{"messages": [user(), assistant(reasoning_content="hm")]}])


def test_characters_that_the_tokenizer_does_not_know_are_no_reason_to_refuse():
    assert of(Chat(tokenizer()), user("ü"), assistant("Grüße  dich")) == "Gr??e  dich<|im_end|>"


def test_tool_calls_are_learnt_once_encoded_or_refused(model, tmp_path):
    def call(arguments):
        return {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}

    for arguments in ({"x": "y z"}, '{"x": "y z"}'):
        assert of(Chat(tokenizer(CALLS)), user(), call(arguments)) == '<call>f {"x": "y z"}<|im_end|>'
    strict = CALLS.replace("{{ m['content'] or '' }}", "{{ m['content'] + '' }}")
    assert of(Chat(tokenizer(strict)), user(), call({"x": "y z"})) == '<call>f {"x": "y z"}<|im_end|>'
    with refuses(qft.BadOption, "line 1"):
        prepared(model, tmp_path, [{"messages": [user(), call({"x": "y z"})]}])


def test_tools_that_the_template_does_not_write_out_are_refused(model, tmp_path):
    row = {"messages": [user(), assistant()], "tools": [{"type": "function", "function": {"name": "fn"}}]}
    with refuses(qft.BadOption, "line 1", "does not write out the tool 'fn'"):
        prepared(model, tmp_path, [row])
    folder = save_model(tmp_path / "m", "{% for t in tools or [] %}{{ t | tojson }}{% endfor %}" + CHATML)
    assert prepared(folder, tmp_path, [row]).train.counts.rows == 1


@pytest.mark.parametrize("opens", [False, True])
def test_a_vision_model_learns_weighted_answers_and_an_opening(tmp_path, opens):
    from transformers import AutoProcessor

    from qft.training.vision import VisionCollator, rows_with_images

    pytest.importorskip("PIL")
    folder, _ = vision(tmp_path)
    processor = AutoProcessor.from_pretrained(folder)
    said = [user("which?"), assistant("red", weight=0), user("sure?"), assistant("yes")]
    said = [assistant("hello"), *said] if opens else said
    config = qft.TrainConfig(folder, "d.jsonl")
    row = rows_with_images(config, processor, tmp_path)({"images": ["0.png"], "messages": said})
    labels = VisionCollator(processor, "answers", 200)([row])["labels"]
    assert learnt(labels[0].tolist(), processor.tokenizer) == ("hello<|im_end|>" if opens else "") + "yes<|im_end|>"


# ---- tokens that begin and end a text ----------------------------------------------------------------------


def with_bos(template="{{ bos_token }}" + CHATML, end=False):
    """A tokenizer that puts a token in front of every text, as Llama's does."""
    tok = tokenizer(template, bos_token="</s>")
    bos = ("</s>", tok.bos_token_id)
    single = "</s> $A <|im_end|>" if end else "</s> $A"
    tok.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[bos, ("<|im_end|>", tok.eos_token_id)]
    )
    return tok


@pytest.mark.parametrize("end", [False, True], ids=["begins", "begins and ends"])
@pytest.mark.parametrize("form", ["text", "prompt", "all of prompt"])
def test_text_that_went_through_a_template_has_each_special_token_once(tmp_path, model, form, end):
    import shutil

    folder = shutil.copytree(model, tmp_path / "m")
    tok = with_bos(end=end)
    tok.save_pretrained(folder)
    said = tok.apply_chat_template([user(), assistant()], tokenize=False).rstrip()
    ids = tok(said, add_special_tokens=False)["input_ids"]
    cut = said.index("cd")
    row = {"text": said} if form == "text" else {"prompt": said[:cut], "completion": said[cut:]}
    found = prepared(str(folder), tmp_path, [row], loss_on="all" if form == "all of prompt" else "answers")
    assert found.train.rows[0]["input_ids"] == ids
    expected = tok.decode(ids[1:]) if form != "prompt" else "cd<|im_end|>"
    assert learnt(found.train.rows[0]["labels"], tok) == expected
    (counted,) = sequences(evaluation_rows([row]), tok, length=99)
    assert counted.ids == ids
    (batch,) = qft.data.calibration.batches([said], tok)
    assert batch["input_ids"].tolist() == [ids]
    plain = prepared(str(folder), tmp_path, [{"text": "xy"}]).train.rows[0]["input_ids"]
    assert tok.decode(plain) == "</s>xy<|im_end|>"


def test_a_newline_behind_the_end_of_a_turn_gets_no_second_end(model, tmp_path):
    (row,) = prepared(model, tmp_path, [{"text": "ab<|im_end|>\n"}]).train.rows
    assert tokenizer().decode(row["input_ids"]) == "ab<|im_end|>\n"


def test_a_vision_models_template_that_begins_with_bos_gets_no_second_one(tmp_path):
    from transformers import AutoProcessor

    from qft.training.vision import VisionCollator, rows_with_images

    pytest.importorskip("PIL")
    folder, _ = vision(tmp_path)
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.bos_token = "</s>"
    processor.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", processor.tokenizer.bos_token_id)]
    )
    processor.chat_template = "</s>" + processor.chat_template
    row = {"images": ["0.png"], "messages": [user("which?"), assistant("red")]}
    row = rows_with_images(qft.TrainConfig(folder, "d.jsonl"), processor, tmp_path)(row)
    batch = VisionCollator(processor, "answers", 200)([row])
    assert batch["input_ids"][0].tolist().count(processor.tokenizer.bos_token_id) == 1
    assert learnt(batch["labels"][0].tolist(), processor.tokenizer) == "red<|im_end|>"


# ---- columns -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "read"),
    [
        ({"instruction": "add", "input": "1 2", "output": "3"}, "add\n1 2"),
        ({"instruction": "add", "input": "", "output": "3"}, "add"),
        ({"instruction": "add", "input": None, "output": "3"}, "add"),
        ({"instruction": "add", "input": "1 2", "output": "3", "text": "add 1 2: 3"}, "add\n1 2"),
        ({"question": "who?", "context": "me", "answer": "3"}, "who?\nme"),
        ({"system": "be", "instruction": "add", "output": "3"}, "be\nadd"),
        ({"instruction": "sum", "text": "long", "summary": "3"}, "sum\nlong"),
        ({"source": "wiki", "question": "who?", "answer": "3"}, "who?"),
        ({"source": "ab", "target": "3"}, "ab"),
        ({"prompt": "ab", "completion": "3"}, "ab"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, dict) else "",
)
def test_an_encoder_reads_every_column_that_is_part_of_the_input(encoder_decoder, tmp_path, row, read):
    found = prepared(encoder_decoder, tmp_path, [row])
    (encoded,) = found.train.rows
    assert found.tokenizer.decode(encoded["input_ids"]).removesuffix("</s>") == read
    assert found.tokenizer.decode(encoded["labels"]) == "3</s>"


@pytest.mark.parametrize("task", ["seq2seq", "causal-lm"])
def test_alpaca_by_named_columns_keeps_its_input(model, encoder_decoder, tmp_path, task):
    rows = [{"instruction": "add", "input": "1 2", "output": "3", "history": []}]
    names = {"prompt_column": "instruction", "completion_column": "output"}
    folder = model if task == "causal-lm" else encoder_decoder
    found = prepared(folder, tmp_path, rows, **names)
    assert "add\n1 2" in found.tokenizer.decode(found.train.rows[0]["input_ids"])
    rows[0]["history"] = [["a", "b"]]
    with refuses(qft.BadOption, "line 1", "'history' would be lost"):
        prepared(folder, tmp_path, rows, **names)


def test_an_empty_input_is_refused(encoder_decoder, tmp_path):
    with refuses(qft.BadOption, "line 1", "'instruction' and 'input' are empty"):
        prepared(encoder_decoder, tmp_path, [{"instruction": " ", "input": "", "output": "3"}])


def test_a_column_with_the_system_prompt_goes_before_the_conversation(model, tmp_path):
    said = [user(), assistant()]
    for row in ({"messages": said}, {"prompt": said[:1], "completion": said[1:]}):
        found = prepared(model, tmp_path, [{**row, "system": "be"}])
        assert found.tokenizer.decode(found.train.rows[0]["input_ids"]).startswith("<|im_start|>system\nbe<|im_end|>")
        (cut,) = sequences(evaluation_rows([{**row, "system": "be"}]), tokenizer(), length=99)
        assert cut.ids == found.train.rows[0]["input_ids"]
    assert read_texts(write_jsonl(tmp_path / "c.jsonl", [{"messages": said, "system": "be"}]))[0].startswith("be\n")
    plain = {"prompt": "ab", "completion": "cd", "system": "be"}
    (row,) = prepared(model, tmp_path, [plain]).train.rows
    (cut,) = sequences(evaluation_rows([plain]), tokenizer(), length=99)
    assert tokenizer().decode(row["input_ids"]) == "be\nabcd<|im_end|>" and cut.ids == row["input_ids"][:-1]
    with refuses(qft.BadOption, "line 1", "different system prompts"):
        prepared(model, tmp_path, [{"messages": [{"role": "system", "content": "no"}, *said], "system": "be"}])


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"label": False}, "'label' is false"),
        ({"rejected": [{"role": "assistant", "content": "no"}]}, "'rejected' holds a bad answer"),
        ({"weight": 0}, "'weight' is 0"),
        ({"weight": 0.5}, "'weight' is 0.5"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_a_row_that_must_not_be_learnt_as_it_stands_is_refused(model, tmp_path, more, says):
    said = [user(), assistant()]
    for row in ({"messages": said}, {"prompt": "ab", "completion": "cd"}):
        good = {**row, "label": True, "weight": 1, "rejected": None}
        with refuses(qft.BadOption, "line 2", says):
            prepared(model, tmp_path, [good, {**good, **more}])


# ---- labels ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("labels", "names", "indices"),
    [
        ([0, "0", 1, "1"], ["0", "1"], [0, 0, 1, 1]),
        ([1, 1.0, 2.0, "2"], ["1", "2"], [0, 0, 1, 1]),
        ([10, 9, -1, 10], ["-1", "9", "10"], [2, 1, 0, 2]),
        ([True, False, True, False], ["False", "True"], [1, 0, 1, 0]),
        (["a", "b ", "b", " a"], ["a", "b"], [0, 1, 1, 0]),
        (["a", "1", "b", "a"], ["1", "a", "b"], [1, 0, 2, 1]),
    ],
    ids=str,
)
def test_labels_that_are_written_in_several_ways_are_one_class(model, tmp_path, labels, names, indices):
    found = prepared(model, tmp_path, [{"text": "ab", "label": label} for label in labels])
    assert found.labels == names and [row["labels"] for row in found.train.rows] == indices


@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([0, 1, True], ["0 (a number", "line 1", "True (a boolean", "line 3"]),
        (["a", 1], ["'a' (a name", "line 1", "1 (a number", "line 2"]),
        (["true", True], ["'true' (a name", "True (a boolean"]),
        (["1", "01", "2"], ["'1'", "'01'", "line 2"]),
    ],
    ids=str,
)
def test_labels_of_mixed_types_are_refused(model, tmp_path, labels, says):
    with refuses(qft.BadOption, *says):
        prepared(model, tmp_path, [{"text": "ab", "label": label} for label in labels])

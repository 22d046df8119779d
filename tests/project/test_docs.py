"""What the pages say is what the code says."""

import ast
import dataclasses
import importlib.util
import json
import re
import shlex
import shutil
import time
from pathlib import Path

import pytest
import tiny_training
from models import llama

ROOT = Path(__file__).parents[2]


def _generate():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "tools" / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_capability_matrix_is_fresh():
    """`python tools/docs/generate.py` writes it; edit a flag and this fails until it is run."""
    assert (ROOT / "docs" / "capabilities.md").read_text() == _generate().page()


def test_reference_pages_are_fresh():
    """A docstring, an option or a public name that changes makes them stale."""
    for path, text in _generate().generated().items():
        assert path.read_text(encoding="utf-8") == text, f"{path.name} is stale: run 'python tools/docs/generate.py'"


def test_the_reference_names_everything():
    import qft

    text = (ROOT / "docs" / "api.md").read_text()
    for name in qft.__all__:
        assert f"qft.{name}" in text, name
    assert " at 0x" not in text


def test_figures_are_those_of_the_results():
    generate = _generate()
    assert generate.FIGURES
    for path in generate.FIGURES:
        text = path.read_text(encoding="utf-8")
        assert "<!-- table:" in text and text == generate.with_tables(text), path.name


def test_a_changed_flag_makes_the_page_stale(monkeypatch):
    import qft

    before = _generate().page()
    monkeypatch.setattr(
        "qft.backends.bnb.BitsAndBytes8bit.capabilities",
        property(lambda self: qft.Capabilities(bits=8, devices=frozenset({"cpu"}))),
    )
    assert _generate().page() != before


PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
WRITTEN = [p for p in PAGES if p not in ("docs/api.md", "docs/cli.md", "docs/capabilities.md")]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert ((ROOT / page).parent / target).exists(), target


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text()
    for path in (ROOT / "docs").glob("*.md"):
        assert re.search(rf": {path.name}$", nav, re.MULTILINE), path.name


@pytest.mark.parametrize("page", WRITTEN)
def test_names_on_the_pages_exist(page):
    import qft

    for name in set(re.findall(r"\bqft\.([A-Za-z_][A-Za-z0-9_]*)", (ROOT / page).read_text())):
        known = hasattr(qft, name) or name in ("json", "quantizers") or (ROOT / "src" / "qft" / name).is_dir()
        assert known, f"{page} speaks of qft.{name}"


# ---- what the pages tell to type ---------------------------------------------------------------------------

RUN = """README quickstart which_quantizer concepts fit_memory merging from_peft train_from_file evaluate how_to_start
    memory speed auto train_others"""


def blocks(page):
    """The Python of a page, but for what the page itself says cannot run here."""
    text = (ROOT / ("README.md" if page == "README" else f"docs/{page}.md")).read_text()
    return [
        m[2] for m in re.finditer(r"(<!-- not run: .*? -->\n)?^```python\n(.*?)^```", text, re.M | re.S) if not m[1]
    ]


def data_files(page):
    """Names and rows of the data that a page shows: the name in backticks, then a block of JSON."""
    text = (ROOT / "docs" / f"{page}.md").read_text()
    shown = re.findall(r"`(\w+\.jsonl)`[^`]*\n\n```json\n(.*?)```", text, re.S)
    return {name: [json.loads(line) for line in block.splitlines()] for name, block in shown}


@pytest.fixture
def other_models(workplace):
    """An encoder-decoder and one that reads images, under the names on the page, and the page's data."""
    tiny_training.save_model("google-t5/t5-small", model=tiny_training.t5(), eos_token="</s>")
    folder, _ = tiny_training.vision(workplace)
    shutil.copytree(folder, "llava-hf/llava-interleave-qwen-0.5b-hf")
    shutil.copy("0.png", "red.png")
    shutil.copy("1.png", "blue.png")
    files = data_files("train_others")
    assert len(files) == 3
    for name, rows in files.items():
        tiny_training.write_jsonl(workplace / name, rows * 4)


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A folder in which the names on the pages lead to a small model, data and an adapter."""
    import qft

    monkeypatch.chdir(tmp_path)
    folder = "HuggingFaceTB/SmolLM2-135M-Instruct"
    small = llama(vocab_size=tiny_training.SIZE, max_position_embeddings=256)
    tiny_training.save_model(folder, model=small)
    shutil.copytree(folder, "model")
    for name in ("train.jsonl", "held_out.jsonl"):
        tiny_training.write_jsonl(tmp_path / name, tiny_training.chats(8))
    qft.save(qft.quantize_and_wrap(folder, "nf4", progress=False), "adapter")
    return tmp_path


@pytest.mark.parametrize("page", RUN.split())
def test_code_on_the_pages_runs(page, workplace, request):
    """All blocks of a page, in order, in one namespace; models and data are small ones under the pages' names."""
    import transformers

    import qft

    if page == "train_others":
        request.getfixturevalue("other_models")
    folder = "HuggingFaceTB/SmolLM2-135M-Instruct"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = ["say a few words", "and some more of them"] * 4
    ids = [tokenizer(text)["input_ids"][:14] for text in texts]
    space = {
        "qft": qft,
        "texts": texts,
        "tokenizer": tokenizer,
        "dataset": [{"input_ids": i, "labels": i} for i in ids],
        "folder": folder,
        "BitsAndBytesConfig": transformers.BitsAndBytesConfig,
        "config": transformers.AutoConfig.from_pretrained(folder),
        "model": transformers.AutoModelForCausalLM.from_pretrained(folder),
    }

    def quick(*args, **options):
        return transformers.TrainingArguments(
            *args, **{**options, "max_steps": 2, "per_device_train_batch_size": 1, "report_to": [], "use_cpu": True}
        )

    for number, block in enumerate(blocks(page)):
        if page in FRESH:  # each block starts from a float model, as the words around it say
            space["model"] = transformers.AutoModelForCausalLM.from_pretrained(folder)
        tree = ast.parse(block)
        space["_quick"] = quick
        exec(compile(_quickened(tree), f"{page}, block {number}", "exec"), space)


FRESH = ("README", "how_to_start", "speed", "memory")


def _quickened(tree):
    """`TrainingArguments(...)` makes two steps."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == "TrainingArguments":
            node.id = "_quick"
    return tree


@pytest.mark.parametrize("page", WRITTEN)
def test_commands_on_the_pages_exist(page):
    """`$ qft VERB ...` in a console block: the verb, its options, and the keys of a training run."""
    import qft

    commands = _generate().reference.commands()
    fields = {f.name for f in dataclasses.fields(qft.TrainConfig)}
    for line in re.findall(r"^\$ qft (.+)$", (ROOT / page).read_text(), re.M):
        verb, *words = shlex.split(line)
        assert verb in commands, line
        command = commands[verb]
        context = command.make_context(verb, list(words))  # parses as the shell's words are parsed
        assert context is not None
        if verb == "train":
            keys = [w.partition("=")[0] for w in words if "=" in w and not w.startswith("-")]
            assert set(keys) <= fields, line


def test_messages_under_troubleshooting_are_those_of_the_code():
    """`Error`: "piece of its message": both are in the source."""
    import qft

    pieces = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                pieces.add(node.value)
    said = " ".join((ROOT / "docs" / "troubleshooting.md").read_text().split())
    found = re.findall(r"`(\w+)`: \"([^\"]+)\"", said)
    assert len(found) > 25
    for error, text in found:
        assert issubclass(getattr(qft, error), qft.QftError | qft.QftWarning), error
        assert any(text in piece for piece in pieces), f"no message of qft says {text!r}"


def test_the_notebook_runs(capsys):
    """Its code cells, in order, in one namespace; it is stored without outputs."""
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text())
    assert notebook["nbformat"] == 4
    space, start = {}, time.process_time()  # other work on the machine does not count
    for number, cell in enumerate(notebook["cells"]):
        assert cell.get("outputs", []) == []
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"quickstart.ipynb, cell {number}", "exec"), space)
    assert time.process_time() - start < 60
    said = capsys.readouterr().out
    assert "held-out perplexity" in said and "LlamaForCausalLM" in said


def test_results_say_where_they_come_from():
    """Each figure that is kept has its device, versions and date, and no path of anybody's machine."""
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert files
    for file in files:
        result = json.loads(file.read_text())
        assert {"device", "versions", "date"} <= result.keys(), file.name
        assert not re.search(r'"/(home|root|work|tmp|Users)/', file.read_text()), file.name


def test_what_the_readme_says_of_the_demo_is_what_was_measured():
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    results = ROOT / "benchmarks" / "results"
    quiet, busy = (json.loads((results / f"demo-{name}.json").read_text()) for name in ("cpu", "busy-cpu"))
    assert (
        f"all {quiet['steps']} steps took {quiet['seconds']['total']:.0f} s (`benchmarks/results/demo-cpu.json`)"
        in text
    )
    assert busy["steps"] == 1 and busy["dtype"] == "float32" and busy["seconds"]["total"] < 300
    assert f"took {busy['seconds']['total']:.0f} s for one step (`demo-busy-cpu.json`)" in text

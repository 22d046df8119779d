"""What the pages say is what the code says."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def _generate():
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_capability_matrix_is_fresh():
    """`python docs/generate.py` writes it; edit a flag and this fails until it is run."""
    assert (ROOT / "docs" / "capabilities.md").read_text() == _generate().page()


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


PAGES = ["README.md", "CONTRIBUTING.md", "docs/index.md", "docs/quickstart.md", "docs/how_to_start.md"]


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", text):
        assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize(
    "page", ["README.md", "docs/quickstart.md", "docs/custom_quantizer.md", "docs/how_to_start.md"]
)
def test_names_on_the_pages_exist(page):
    import qft

    for name in set(re.findall(r"\bqft\.([A-Za-z_][A-Za-z0-9_]*)", (ROOT / page).read_text())):
        assert hasattr(qft, name) or name in ("json", "quantizers"), f"{page} speaks of qft.{name}"


def test_results_say_where_they_come_from():
    """Each figure that is kept has its device, versions and date, and no path of anybody's machine."""
    files = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    assert files
    for file in files:
        result = json.loads(file.read_text())
        assert {"device", "versions", "date"} <= result.keys(), file.name
        assert not re.search(r'"/(home|root|work|tmp|Users)/', file.read_text()), file.name

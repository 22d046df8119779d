"""The page: it is whole, needs nothing from outside, shows data as text, and draws numbers where they belong."""

import math
import re
from html.parser import HTMLParser

import pytest
from helpers import refuses

import qft
from qft.evaluation import Report, svg

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Every element closes in its turn; what elements there are, and what text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.seen, self.said, self.attributes = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.seen.append(tag)
        self.attributes += [(tag, k, v) for k, v in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.seen.append(tag)
        self.attributes += [(tag, k, v) for k, v in attributes]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.said.append(data)


def full(evil="x"):
    page = Report(f"title {evil}", f"subtitle {evil}").section(f"section {evil}", f"text {evil}")
    page.text(f"one {evil}\n\ntwo").warn(f"warn {evil}").code(f"code {evil}").tiles({f"tile {evil}": f"value {evil}"})
    page.table({f"key {evil}": f"value {evil}"}, caption=f"caption {evil}")
    page.table([{f"column {evil}": f"cell {evil}"}]).table([(f"a {evil}", 1)], (f"head {evil}", "n"))
    page.plot({f"line {evil}": [1.0, 2.0], "other": [2.0, 1.0]}, title=evil, x=evil, y=evil, caption=evil)
    page.bars({f"bar {evil}": 1.0}, title=evil, x=evil, y=evil)
    return page.heat({f"row {evil}": [1.0, None]}, title=evil, x=evil, columns=[evil, "b"])


@pytest.mark.parametrize(
    "evil", ["x", "<script>alert(1)</script>", "\"'><img src=http://a.b onerror=c>", "</svg></style>&amp;"]
)
def test_a_page_is_whole_and_shows_data_as_text(evil):
    plain, page = Page(full().html()), Page(full(evil).html())
    assert page.seen == plain.seen  # data makes no elements
    assert "script" not in page.seen
    assert evil in "".join(page.said)
    assert f"title {evil}" in page.said and f"cell {evil}" in page.said


def test_a_page_needs_nothing_from_outside():
    text = full().html()
    assert not re.search(r"https?:|//|url\(|@import|<script|<link|<iframe", text)
    page = Page(text)
    assert not [a for a in page.attributes if a[1] in ("src", "href") or a[1].startswith("on")]
    policy = [v for tag, k, v in page.attributes if tag == "meta" and k == "content"]
    assert any("default-src 'none'" in v for v in policy)
    assert "prefers-color-scheme:dark" in text and "@media print" in text


def points(drawing, index=0):
    found = re.findall(r'<polyline[^>]* points="([^"]*)"', drawing)
    return [tuple(map(float, p.split(","))) for p in found[index].split()]


def test_lines_are_where_their_numbers_are():
    drawn = points(svg.lines({"a": [0.0, 5.0, 10.0]}))
    assert [p[0] for p in drawn] == pytest.approx(
        [svg.LEFT, (svg.LEFT + svg.WIDTH - svg.RIGHT) / 2, svg.WIDTH - svg.RIGHT]
    )
    assert [p[1] for p in drawn] == pytest.approx(
        [svg.HEIGHT - svg.BOTTOM, (svg.HEIGHT - svg.BOTTOM + svg.TOP) / 2, svg.TOP]
    )
    logarithmic = points(svg.lines({"a": {1: 1.0, 2: 10.0, 3: 100.0}}, log=True))
    assert [p[1] for p in logarithmic] == [p[1] for p in drawn]


def test_lines_break_where_there_is_no_number():
    drawing = svg.lines({"a": [1.0, 2.0, math.nan, 3.0, 4.0, math.inf, 5.0, 6.0]})
    assert drawing.count("<polyline") == 3
    assert svg.lines({"a": [-1.0, 1.0, 2.0, 0.0]}, log=True).count("<polyline") == 1


@pytest.mark.parametrize("values", [[], [math.nan], [math.inf, -math.inf]])
def test_nothing_to_draw_is_said(values):
    assert "nothing to draw" in svg.lines({"a": values})
    Page(Report("t").plot({"a": values}).html())


@pytest.mark.parametrize(
    "values", [[1.0], [0.0, 0.0], [2.0] * 3, [1e-300, 2e-300], [1e300, -1e300], [-5.0, -4.0], [1e-9, 1e9], [3, 4]]
)
@pytest.mark.parametrize("log", [False, True])
def test_odd_scales_stay_within_the_picture(values, log):
    drawing = svg.lines({"a": values}, log=log) + svg.bars({str(i): v for i, v in enumerate(values)})
    for key, limit in (("x", svg.WIDTH), ("cx", svg.WIDTH), ("y", svg.HEIGHT), ("cy", svg.HEIGHT)):
        found = [float(v) for v in re.findall(rf'\b{key}="([^"]*)"', drawing)]
        assert all(math.isfinite(v) and -0.1 <= v <= limit for v in found), (key, found)
    assert "nan" not in drawing


def test_long_lines_keep_their_peaks():
    values = [math.sin(i / 50) for i in range(100_000)]
    values[70_123] = 9.0
    drawing = svg.lines({"a": values})
    drawn = points(drawing)
    assert len(drawn) <= svg.POINTS + 2 and len(drawing) < 40_000
    flat = svg._thinned([(float(i), v) for i, v in enumerate(values)], False)
    assert (70_123.0, 9.0) in flat and flat == sorted(flat)


def test_bars_begin_at_zero():
    drawing = svg.bars({"a": 2.0, "b": 1.0, "c": -1.0, "d": math.nan})
    tall = [float(v) for v in re.findall(r'<rect [^>]*height="([^"]*)"', drawing)]
    assert len(tall) == 3
    assert tall[0] == pytest.approx(2 * tall[1], abs=0.11) and tall[1] == pytest.approx(tall[2], abs=0.11)
    assert "×" in drawing


def test_heat_grows_with_the_value():
    drawing = svg.heat({"a": [0.0, 1.0, 2.0], "b": [None, math.inf, 4.0]})
    cells = re.findall(r'fill-opacity:([\d.]+)" x="[^"]*" y="[^"]*" width="[^"]*" height="18"', drawing)
    assert [float(c) for c in cells] == pytest.approx([0.06, 0.295, 0.53, 1.0], abs=1e-3)
    assert drawing.count('rect class="bad"') == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1.0, "1"),
        (0.12345, "0.1235"),
        (12345.6, "12346"),
        (1e-7, "1e−7"),
        (1.25e6, "1.25e6"),
        (-2.5, "−2.5"),
        (math.inf, "∞"),
    ],
)
def test_numbers_for_people(value, text):
    assert svg.number(value) == text


def test_tables_set_numbers_to_the_right():
    page = Report("t").table([("a", 1, 2.5), ("b", 12345, None)], ("name", "count", "value")).html()
    assert '<td class="n">12,345</td>' in page and '<td class="n">2.5</td>' in page and "<td >a</td>" in page
    assert "<td" in Report("t").table([]).table({}).table([("a",), ("b", 2)]).html()


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    target = tmp_path / "report.html"
    assert full().write(target) == target
    before = target.read_bytes()
    monkeypatch.setattr(Report, "html", lambda self: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with refuses(qft.BadFolder, "No space left", str(target)):
        full().write(target)
    assert target.read_bytes() == before and list(tmp_path.iterdir()) == [target]


def test_places_that_cannot_be_written_to(tmp_path):
    for path, says in ((tmp_path, "it is a folder"), (tmp_path / "no" / "r.html", "there is no folder")):
        with refuses(qft.BadFolder, says):
            full().write(path)
    assert not list(tmp_path.iterdir())

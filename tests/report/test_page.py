import base64
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from expertmesh.report import figures, write_report
from expertmesh.report.tokens import printable, printable_lines
from tests.report.synthetic import read_lines, write_lines, write_run

VOID = {"meta", "link", "img", "br"}
LOADS = {"src", "href", "srcset", "data", "action", "poster", "background"}


class Outline(HTMLParser):
    """Collects text and attributes, and fails on a tag closed out of order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.images: list[str] = []
        self.ids: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        values = dict(attrs)
        assert not [name for name in values if name.startswith("on")]
        self.links += [value or "" for name, value in attrs if name in LOADS]
        if tag == "img":
            self.images.append(values["src"] or "")
        if values.get("id"):
            self.ids.add(values["id"] or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def parse(page: Path) -> Outline:
    outline = Outline()
    outline.feed(page.read_text(encoding="utf-8"))
    assert outline.open == []
    return outline


@pytest.fixture
def words_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without pictures, most of a page's time."""
    monkeypatch.setattr(figures, "draw", lambda run: [])


def test_one_page_that_loads_nothing(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", drops=True)
    page = write_report(path)
    assert page == path / "report.html"
    outline = parse(page)
    for link in outline.links:
        assert link.startswith(("data:", "#"))
        assert not link.startswith("#") or link[1:] in outline.ids
    html = page.read_text(encoding="utf-8")
    assert "script" not in outline.tags
    assert not re.search(r"https?://|@import|url\(", html)
    written = {file.read_bytes() for file in (path / "figures").glob("*.png")}
    prefix = "data:image/png;base64,"
    assert {base64.b64decode(image.removeprefix(prefix)) for image in outline.images} == written
    assert len(written) == 8


def test_what_users_supply_is_escaped(tmp_path: Path) -> None:
    path = write_run(tmp_path / "a<b>&c", steps=20)
    outline = parse(write_report(path))
    assert "script" not in outline.tags
    assert "i" not in outline.tags
    assert "b" not in outline.tags
    assert "a<b>&c" in outline.text
    assert "<script>alert(1)</script>" in outline.text
    assert "To be, or <i>not</i>\n\tto be & so on" in outline.text
    assert 'dir = "runs/<b>made up</b>"' in outline.text
    assert "␣the" in outline.text
    assert "größe" in outline.text
    assert "日本" in outline.text
    assert "\\u202e" in outline.text
    assert "\u202e" not in outline.text


@pytest.mark.usefixtures("words_alone")
def test_a_folder_whose_name_no_encoding_has(tmp_path: Path) -> None:
    path = write_run(tmp_path / os.fsdecode(b"two words \xff"), steps=10)
    outline = parse(write_report(path, tmp_path / "report"))
    assert "two words \\udcff" in outline.text


def test_names_of_layers_are_escaped(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", num_layers=1, steps=10)
    for name in ("routing.jsonl", "expert_tokens.json"):
        text = (path / name).read_text(encoding="utf-8")
        (path / name).write_text(text.replace("blocks.0.moe", "<u>$x"), encoding="utf-8")
    outline = parse(write_report(path))
    assert "u" not in outline.tags
    assert "<u>$x" in outline.text


@pytest.mark.usefixtures("words_alone")
def test_numbers_of_the_balance_table(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", num_layers=1, num_experts=4)
    layer = {"load": [0, 2, 4, 2], "entropy": 1.25, "dropped": 0.125}
    write_lines(path / "routing.jsonl", [{"step": 1, "layers": {"blocks.0.moe": layer}}])
    html = write_report(path).read_text(encoding="utf-8")
    row = re.search(r"<tr><td><code>blocks\.0\.moe</code></td>(.*?)</tr>", html)
    assert row is not None
    cells = re.findall(r"<td[^>]*>(.*?)</td>", row[1])
    assert cells == ["4", "2.00", "0.00", "0.707", "1", "1.25", "12.5 %"]


def test_says_that_nothing_was_dropped(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", steps=20, drops=True)
    write_report(path)
    assert (path / "figures" / "drops.png").exists()
    records = read_lines(path / "metrics.jsonl"), read_lines(path / "routing.jsonl")
    for record in records[0]:
        record["dropped"] = 0.0
    for record in records[1]:
        for layer in record["layers"].values():
            layer["dropped"], layer["dropped_by_position"] = 0.0, [0.0] * 16
    write_lines(path / "metrics.jsonl", records[0])
    write_lines(path / "routing.jsonl", records[1])
    outline = parse(write_report(path))
    assert "nothing was dropped." in outline.text
    assert not (path / "figures" / "drops.png").exists()


def test_dense_model(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", num_layers=0)
    outline = parse(write_report(path))
    assert len(outline.images) == 3
    assert "logged no routing" in outline.text
    assert "nothing was dropped" not in outline.text
    assert "tokens" not in outline.ids


@pytest.mark.usefixtures("words_alone")
def test_notes_are_shown(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", steps=10)
    (path / "expert_tokens.json").write_text("{", encoding="utf-8")
    outline = parse(write_report(path))
    assert "expert_tokens.json is not readable" in outline.text


def test_same_run_same_page_elsewhere_too(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", steps=20)
    first = write_report(path).read_bytes()
    elsewhere = write_report(path, tmp_path / "new" / "folder")
    assert elsewhere == tmp_path / "new" / "folder" / "report.html"
    assert elsewhere.read_bytes() == first
    assert sorted(file.name for file in elsewhere.parent.rglob("*")) == sorted(
        ["report.html", "figures", *(file.name for file in (path / "figures").iterdir())]
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" the\n", "␣the\\n"),
        ("\t\r", "\\t\\r"),
        ("\x00\x7f\xa0", "\\x00\\x7f\\xa0"),
        ("\u200b\ud800\U000e0001", "\\u200b\\ud800\\U000e0001"),
        ("\u0301a", "\N{DOTTED CIRCLE}\u0301a"),
        ("e\u0301 ö 日", "e\u0301␣ö␣日"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_printable_lines_keep_their_layout() -> None:
    assert printable_lines("a  b\n\tc\x1b[0m\n") == "a  b\n\tc\\x1b[0m"

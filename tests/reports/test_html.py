"""Pages: one file, nothing fetched, text escaped."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from megatron_eslm.errors import ConfigError
from megatron_eslm.reports import html
from megatron_eslm.reports.compare import compare
from megatron_eslm.reports.groups import Group
from megatron_eslm.reports.page import comparison_page
from megatron_eslm.reports.tables import Table

HOSTILE = "<script>alert(\"1\")</script> & 'x' </style>"


class Outline(HTMLParser):
    """Checks that tags nest, and gathers text and attributes."""

    VOID = frozenset({"meta", "img", "source", "br", "link"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(page)
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [v for k, v in attrs if k in ("src", "srcset", "href")]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        self.text += data


def assert_stands_alone(page: str) -> Outline:
    outline = Outline(page)
    assert not {"script", "link", "iframe", "object"} & set(outline.tags)
    assert all(link.startswith("data:") for link in outline.links)
    assert not re.search(r"url\(|@import", page)
    assert "prefers-color-scheme: dark" in page and 'name="viewport"' in page
    return outline


def test_hostile_text_stays_text():
    table = Table(HOSTILE, ["", HOSTILE], [[HOSTILE, HOSTILE]], HOSTILE)
    outline = assert_stands_alone(html.document(HOSTILE, html.table(table)))
    assert outline.text.count(HOSTILE) == 7


def test_tables_scroll_by_themselves():
    page = html.table(Table("T", ["", "x"], [["a", "1"]]))
    assert '<div class="scroll" tabindex="0"><table>' in page


def test_comparison_page(make_run):
    groups = [
        Group(label, [make_run(name, (6.0, 4.0), selection=name)])
        for name, label in (("clm", "plain"), ("random", HOSTILE))
    ]
    comparison = compare(groups)
    outline = assert_stands_alone(comparison_page(comparison))
    assert len(outline.links) == 2 and outline.links[0] != outline.links[1]
    for table in comparison.tables:
        assert table.title in outline.text
        assert all(cell in outline.text for row in table.rows for cell in row)
    assert all(note in outline.text for note in comparison.notes)


def test_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"^--output: .* cannot be written"):
        html.write_page(tmp_path / "file" / "x.html", "", "--output")

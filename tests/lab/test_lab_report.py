"""The lab's page."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

from sdpo.lab.report import Section, write_report


class Page(HTMLParser):
    """Collects pictures, cells, links and ids."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images, self.cells, self.links, self.ids = [], [], [], set()
        self.within = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.add(attrs.get("id"))
        if tag == "img":
            self.images.append(attrs)
        if tag == "a":
            self.links.append(attrs["href"])
        self.within = tag

    def handle_data(self, data):
        if self.within in ("td", "th"):
            self.cells.append(data)

    def handle_endtag(self, tag):
        self.within = None


def write(tmp_path, **kwargs):
    section = Section("Is <it> so?", "Because & why.", "run --it", **kwargs)
    out = tmp_path / "lab" / "report.html"
    out.parent.mkdir()
    write_report(out, "Title", "About", [section])
    return Page(out.read_text())


def test_tables_show_their_numbers_and_gaps(tmp_path):
    rows = [{"a < b": "x", "n": 3, "v": 0.123456}, {"a < b": "y", "n": None, "v": -12.0}]
    page = write(tmp_path, tables={"one": rows, "empty": []})
    assert page.cells == ["a < b", "n", "v", "x", "3", "0.1235", "y", "–", "-12"]


def test_pictures_are_linked_from_where_the_page_lies(tmp_path):
    pictures = {tmp_path / "lab" / "a b" / 'x".png': 'says "x"'}
    (image,) = write(tmp_path, pictures=pictures).images
    assert Path(image["src"]) == Path('a b/x".png')
    assert image["alt"] == 'says "x"'


def test_the_list_leads_to_the_sections(tmp_path):
    page = write(tmp_path)
    assert page.links == ["#s0"]
    assert "s0" in page.ids

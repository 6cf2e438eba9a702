"""A page of sections, each a question with tables and pictures: one HTML file beside its PNGs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from sdpo.common.files import write_text

Cell = str | int | float | None
Table = Sequence[Mapping[str, Cell]]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 76rem; padding: 1rem;
  color: #1b1f24; background: #fff; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
figure { margin: 1rem 0; overflow-x: auto; } img { max-width: 100%; min-width: 40rem; }
figcaption, .command { color: #57606a; font-size: .875rem; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .5rem 0; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid #d0d7de; text-align: right;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
code { font-size: .875em; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True)
class Section:
    """One question. `tables` are named; their columns are those of their first row."""

    title: str
    about: str
    command: str
    tables: Mapping[str, Table] = field(default_factory=dict)
    pictures: Mapping[Path, str] = field(default_factory=dict)  # file to caption


def write_report(path: Path, title: str, about: str, sections: Sequence[Section]) -> None:
    """Write the page; pictures are linked relative to it."""
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1><p>{escape(about)}</p><nav><ol>",
        *(
            f'<li><a href="#s{i}">{escape(section.title)}</a></li>'
            for i, section in enumerate(sections)
        ),
        "</ol></nav>",
    ]
    for i, section in enumerate(sections):
        parts += _section(section, f"s{i}", path.parent)
    write_text(path, "\n".join([*parts, "</body></html>\n"]))


def _section(section: Section, anchor: str, directory: Path) -> list[str]:
    parts = [
        f'<section id="{anchor}"><h2>{escape(section.title)}</h2>',
        f"<p>{escape(section.about)}</p>",
        f'<p class="command"><code>{escape(section.command)}</code></p>',
    ]
    for name, rows in section.tables.items():
        if rows:
            parts.append(_table(name, rows))
    for picture, caption in section.pictures.items():
        source = escape(Path(os.path.relpath(picture, directory)).as_posix(), quote=True)
        alt = escape(caption, quote=True)
        parts.append(
            f'<figure><img src="{source}" alt="{alt}" loading="lazy">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )
    return [*parts, "</section>"]


def _table(name: str, rows: Table) -> str:
    columns = list(rows[0])
    head = "".join(f'<th scope="col">{escape(c)}</th>' for c in columns)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(_text(row.get(c)))}</td>" for c in columns) + "</tr>"
        for row in rows
    )
    return (
        f'<div class="table"><table><caption>{escape(name)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _text(cell: Cell) -> str:
    if cell is None:
        return "–"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell)

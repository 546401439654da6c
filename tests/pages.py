"""Reads the page of a run as a browser would, and holds it to what every such page must be."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from pathlib import Path

_VOID = {"meta", "img", "br", "link", "input", "hr"}
_ALLOWED = set(
    "html head title style body main h1 h2 p table caption thead tbody tr th td figure figcaption img meta".split()
)


class Page(HTMLParser):
    """A page whose tags are balanced and known, which runs nothing and fetches nothing."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self.images: list[bytes] = []
        self.text = ""
        self._open: list[str] = []
        content = file.read_text(encoding="utf-8")
        assert content.startswith("<!DOCTYPE html>") and "default-src 'none'" in content
        self.feed(content)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        assert tag in _ALLOWED and not any(name.startswith("on") for name in given), (tag, given)
        assert {"src", "href", "srcset", "data"} & set(given) <= ({"src"} if tag == "img" else set())
        if tag == "img":
            kind, _, content = str(given["src"]).partition(",")
            assert kind == "data:image/png;base64" and given["alt"]
            self.images.append(base64.b64decode(content, validate=True))
            assert self.images[-1].startswith(b"\x89PNG")
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += "" if self._open[-1:] == ["style"] else data
        if self._open and self._open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    def column(self, name: str) -> list[str]:
        """What stands below a column's name, in the first table that has it."""
        head, *rows = next(table for table in self.tables if name in table[0])
        return [row[head.index(name)] for row in rows]

    def row(self, name: str) -> list[str]:
        """The cells of the first row that is called so."""
        return next(row[1:] for table in self.tables for row in table if row[0] == name)

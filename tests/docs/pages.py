"""The Markdown of the repository as tests read it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
RESULTS = [
    ROOT / "simulations/RESULTS.md",
    *sorted((ROOT / "research").rglob("*.md")),
]


@dataclass(frozen=True)
class Fence:
    """A block of code of a page: its language, its text, and its line from 1."""

    page: Path
    language: str
    text: str
    line: int


def parse(page: Path) -> list[Token]:
    text = page.read_text(encoding="utf-8")
    return MarkdownIt("commonmark").enable("table").parse(text)


def fences(page: Path) -> Iterator[Fence]:
    for token in parse(page):
        if token.type == "fence" and token.map is not None:
            yield Fence(page, token.info.strip(), token.content, token.map[0] + 1)


def links(page: Path) -> Iterator[str]:
    """The address of every link and picture."""
    for block in parse(page):
        for token in block.children or ():
            address = token.attrGet("href") or token.attrGet("src")
            if address is not None:
                yield str(address)


def anchors(page: Path) -> set[str]:
    """Of its headings, by the rule of code forges: letters, digits, hyphens and underscores."""
    tokens = parse(page)
    titles = [
        "".join(child.content for child in after.children or ())
        for token, after in pairwise(tokens)
        if token.type == "heading_open"
    ]
    kept = ("".join(c for c in title.lower() if c.isalnum() or c in " -_") for title in titles)
    return {title.replace(" ", "-") for title in kept}

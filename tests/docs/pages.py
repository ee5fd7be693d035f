"""The Markdown of the repository as tests read it: blocks, commands, links, headings."""

import os
import re
import shlex
import sys
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
SHELL = {"bash", "console", "sh", "shell"}
HEREDOC = re.compile(r"<<-?'?(\w+)'?")


@dataclass(frozen=True)
class Fence:
    """A block of code of a page: its language and its text."""

    page: Path
    language: str
    text: str


def parse(page: Path) -> list[Token]:
    text = page.read_text(encoding="utf-8")
    return MarkdownIt("commonmark").enable("table").parse(text)


def fences(page: Path) -> Iterator[Fence]:
    for token in parse(page):
        if token.type == "fence":
            yield Fence(page, token.info.strip(), token.content)


def commands() -> list[str]:
    """Of README, CONTRIBUTING, docs and results, a command a line as a shell would read it: without
    comments, and without the text after ``<<``."""
    found, pages = [], (*PAGES, *RESULTS)
    for block in (fence for page in pages for fence in fences(page) if fence.language in SHELL):
        lines = iter(block.text.replace("\\\n", " ").splitlines())
        for line in lines:
            heredoc = HEREDOC.search(line)
            words = shlex.split(HEREDOC.sub("", line).replace("<", "'<'"), comments=True)
            found += [part.strip() for part in shlex.join(words).split("'&&'")]
            while heredoc and next(lines) != heredoc[1]:
                pass
    return [command for command in found if command]


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


def commands_in(folder: Path) -> str:
    """A PATH with ``deal`` and ``python``, as an active environment has them, in a new folder."""
    folder.mkdir()
    python = shlex.quote(sys.executable)
    for name, command in (("deal", f"{python} -m simulations.cli"), ("python", python)):
        (folder / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"

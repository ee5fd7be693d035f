"""The commands of the pages: blocks marked ``bash``, a command a line as a shell would read it."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass

from tests.docs.pages import PAGES, ROOT, Fence, fences

LANGUAGES = {"bash", "console", "sh", "shell"}
HEREDOC = re.compile(r"<<-?'?(\w+)'?")


@dataclass(frozen=True)
class Command:
    """A command of a page.

    Attributes:
        place: page and line, for people.
        words: as a shell splits them, without comments; the text after ``<<`` is left out.
    """

    place: str
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return shlex.join(self.words)


def commands() -> list[Command]:
    """Of README, CONTRIBUTING and docs, in their order."""
    blocks = (fence for page in PAGES for fence in fences(page) if fence.language in LANGUAGES)
    return [command for block in blocks for command in commands_of(block)]


def commands_of(block: Fence) -> Iterator[Command]:
    place = f"{block.page.relative_to(ROOT)}:{block.line}"
    lines = iter(block.text.replace("\\\n", " ").splitlines())
    for line in lines:
        words = [word.replace("<this repository>", "REPOSITORY") for word in split(line)]
        while "&&" in words:
            end = words.index("&&")
            yield Command(place, tuple(words[:end]))
            words = words[end + 1 :]
        if words:
            yield Command(place, tuple(words))
        if heredoc := HEREDOC.search(line):
            while next(lines) != heredoc[1]:
                pass


def split(line: str) -> list[str]:
    """Words of a line, without its comment."""
    quoted = line.replace("<this repository>", "'<this repository>'")
    return shlex.split(HEREDOC.sub("", quoted), comments=True)

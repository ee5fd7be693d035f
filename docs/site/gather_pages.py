"""Gather the pages of the docs site: ``python docs/site/gather_pages.py FOLDER``.

The pages are README.md, docs/*.md, every file of the repository that a page links to, and the two
references that are made from the program itself: of commands and of configuration. Pages
keep their places, so links hold as they are written; zensical checks those between pages, and this
program those to other files. Equations become MathML: browsers show it without a script.
"""

from __future__ import annotations

import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

import typer
from configuration import configuration_page
from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from typer.cli import get_docs_for_click

from simulations import cli

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = """\
# Commands

This page is made from the command line itself; `deal COMMAND --help` says the same.

The exit code is 0 where a command has done what it is for,
2 where what was typed, or a file that it names, is wrong, or a run cannot go on (one line says
what, where, and the cure); 1 where a run of a study has failed, an audit has refuted
a claim, or the program has a fault; 130 where it was interrupted.

"""
EQUATION = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
DELIMITERS = {
    **{r"\lVert": "‖", r"\rVert": "‖", r"\lvert": "|", r"\rvert": "|"},
    **{r"\lfloor": "⌊", r"\rceil": "⌉"},
}
"""As characters: latex2mathml does not know these commands after ``\\bigl``."""


def linked(text: str) -> Iterator[str]:
    """Yield the address of every link and picture of a page."""
    for block in MarkdownIt("commonmark").enable("table").parse(text):
        for token in block.children or ():
            address = token.attrGet("href") or token.attrGet("src")
            if address is not None:
                yield str(address)


def files_of_site(root: Path) -> list[Path]:
    """Return README, docs, and what their pages link to, directly or through others, sorted.

    Args:
        root: of the repository.

    Raises:
        SystemExit: a page links to no file of the repository.
    """
    found: set[Path] = set()
    waiting = [root / "README.md", *(root / "docs").glob("*.md")]
    while waiting:
        file = waiting.pop()
        if file in found:
            continue
        found.add(file)
        for address in linked(file.read_text(encoding="utf-8")) if file.suffix == ".md" else ():
            path = unquote(address.partition("#")[0])
            if not path or re.match(r"[a-z]+:", path):
                continue
            target = (file.parent / path).resolve()
            if not (target.is_file() and target.is_relative_to(root)):
                raise SystemExit(f"{file.relative_to(root)}: no file {address}; name one")
            waiting.append(target)
    return sorted(found)


def with_mathml(text: str) -> str:
    """Return a page with each ```` ```math ```` block as MathML."""

    def equation(block: re.Match[str]) -> str:
        latex = block[1]
        for command, character in DELIMITERS.items():
            latex = re.sub(re.escape(command) + r"(?![A-Za-z])", character, latex)
        latex = re.sub(r"\\tag\{(\w+)\}", r"\\qquad(\\mathrm{\1})", latex)
        mathml = convert(latex.strip(), display="block")
        return mathml.replace(r">\{<", ">{<").replace(r">\}<", ">}<")  # after \Bigl

    return EQUATION.sub(equation, text)


def gather(root: Path, folder: Path) -> int:
    """Write the pages and zensical's settings into a folder; what it held before is gone.

    Args:
        root: of the repository.
        folder: gets ``zensical.toml`` and ``pages/``.

    Returns:
        The number of files in ``pages/``.
    """
    pages = folder / "pages"
    shutil.rmtree(pages, ignore_errors=True)
    files = files_of_site(root)
    for file in files:
        copy = pages / file.relative_to(root)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix == ".md":
            copy.write_text(with_mathml(file.read_text(encoding="utf-8")), encoding="utf-8")
        else:
            shutil.copyfile(file, copy)
    deal = cli.command()
    context = typer.Context(deal)
    listed = get_docs_for_click(obj=deal, ctx=context, name="deal", indent=1)
    (pages / "docs/commands.md").write_text(COMMANDS + listed, encoding="utf-8")
    (pages / "docs/configuration.md").write_text(configuration_page(), encoding="utf-8")
    shutil.copyfile(Path(__file__).with_name("zensical.toml"), folder / "zensical.toml")
    return len(files) + 2


if __name__ == "__main__":
    print(f"{gather(ROOT, Path(sys.argv[1]))} files in {sys.argv[1]}/pages")

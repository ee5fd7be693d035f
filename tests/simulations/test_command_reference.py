"""The reference of the commands has every command with all it takes."""

from __future__ import annotations

import click

from simulations import cli
from simulations.command_reference import commands_page, leaves


def test_every_command_has_a_section_with_all_of_its_parameters() -> None:
    sections = {text.partition("\n")[0]: text for text in commands_page().split("\n## ")[1:]}
    contexts = list(leaves(click.Context(cli.command(), info_name="deal")))
    assert sections.keys() == {context.command_path for context in contexts}
    assert len(sections) > 20
    for context in contexts:
        section = sections[context.command_path]
        for parameter in context.command.params:
            if parameter.name == "help":
                continue
            if isinstance(parameter, click.Option):
                assert all(name in section for name in parameter.opts)
            else:
                assert f"`{parameter.make_metavar(context)}`" in section
            assert str(getattr(parameter, "help", "") or "").replace("|", "\\|") in section

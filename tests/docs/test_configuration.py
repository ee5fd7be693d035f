"""The configuration reference says something of every key."""

from typing import get_args

import pytest

from client.site_file import SiteFile
from deal_core.config.data import Table
from deal_core.config.experiment import Experiment
from deal_core.config.file import flatten
from docs.site.configuration import configuration_page

LARGEST = 90
"""Keys of an experiment: each costs a row in every table of what goes with what."""


def tables_of(model):
    """The model, and those of all tables in it."""
    yield model
    for field in model.model_fields.values():
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, Table):
                yield from tables_of(kind)


def test_every_key_of_an_experiment_is_there():
    section = configuration_page().split("## Experiment\n")[1].split("\n## site.toml")[0]
    keys, table = set(), ""
    for line in section.splitlines():
        if line.startswith("### `["):
            table = line.removeprefix("### `[").removesuffix("]`") + "."
        elif line.startswith("| `"):
            keys.add(table + line.split("`")[1])
    assert {key for key in keys if ".TASK." not in key} == set(flatten(Experiment()))
    assert len(flatten(Experiment())) <= LARGEST


@pytest.mark.parametrize(
    "model", sorted({*tables_of(Experiment), *tables_of(SiteFile)}, key=lambda m: m.__name__)
)
def test_every_key_has_a_docstring(model):
    values = {
        name
        for name, field in model.model_fields.items()
        if not (isinstance(field.annotation, type) and issubclass(field.annotation, Table))
    }
    assert [name for name in values if not model.model_fields[name].description] == []

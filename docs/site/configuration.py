"""The configuration reference, made from the models that check the files.

``python docs/site/configuration.py`` prints the page.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from client.site_file import SiteFile
from deal_core.config.data import Table
from deal_core.config.experiment import Experiment
from simulations.output import toml_value

INTRODUCTION = """\
# Configuration

This page is made from the models that check the files.

*Default* is the value of a key that is left out; a dash means that the key must be there. An
unknown key, a wrong type or a value out of range is one line with the nearest known key, and
nothing has started.

* [Experiment](#experiment): the same keys in an experiment file and with `--set table.key=value`;
  Flower's run config has the experiment as one JSON value.
* [site.toml](#sitetoml): what an institution decides. No experiment and no message changes it.
"""
Schema = Mapping[str, Any]
KINDS = {
    "string": "text",
    "integer": "whole number",
    "number": "number",
    "boolean": "true or false",
    "object": "table",
}
BOUNDS = {
    "exclusiveMinimum": "> {:g}",
    "minimum": "≥ {:g}",
    "exclusiveMaximum": "< {:g}",
    "maximum": "≤ {:g}",
    "pattern": "as in `{}`",
}


def configuration_page() -> str:
    """Return the page: every key of an experiment and of ``site.toml``."""
    sections = ("## Experiment\n", *keys_of(Experiment), "## site.toml\n", *keys_of(SiteFile))
    return "\n".join((INTRODUCTION, *sections))


def keys_of(model: type[Table]) -> Iterator[str]:
    """Yield the lines of a model: the table of its keys, and of those of the tables in it."""
    schema = model.model_json_schema()
    yield from _section(schema, "", schema.get("$defs", {}))


def _section(schema: Schema, name: str, models: Schema) -> Iterator[str]:
    """Yield the table ``name`` with its keys, then the tables in it; the outermost has no name."""
    if name:
        yield f"### `[{name}]`\n"
        yield f"{plain_markdown(schema.get('description', ''))}\n"
    rows, below = [], []
    for key, field in schema["properties"].items():
        place, named = f"{name}.{key}".removeprefix("."), field.get("additionalProperties", {})
        tables = [each for each in _parts(field) if "$ref" in each]
        if not tables or len(_parts(field)) > 1:
            needed = key in schema.get("required", ())
            kind, text = _kind(field), plain_markdown(field.get("description", ""))
            rows.append(row(f"`{key}`", kind, "–" if needed else _default(field), text))
        tables += [named] if "$ref" in named else []
        below += [(each, place if each is not named else f"{place}.TASK") for each in tables]
    if rows:
        yield row("key", "type", "default", "meaning")
        yield "|---|---|---|---|"
        yield "\n".join(rows) + "\n"
    for table, place in below:
        yield from _section(models[table["$ref"].rpartition("/")[2]], place, models)


def plain_markdown(text: str) -> str:
    """Return a docstring on one line, its double backticks and Sphinx roles as code."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", " ".join(text.split()))
    return text.replace("``", "`")


def row(*values: str) -> str:
    """Return one line of a Markdown table; a bar within a value is escaped."""
    return "| " + " | ".join(value.replace("|", "\\|") for value in values) + " |"


def _parts(field: Schema) -> list[Schema]:
    """Return what a value may be."""
    parts: list[Schema] = field.get("anyOf", [field])
    return parts


def _kind(field: Schema) -> str:
    """Return the type in words, and its limits."""
    if "anyOf" in field:
        return " or ".join(_kind(each) for each in field["anyOf"] if each.get("type") != "null")
    if values := field.get("enum", [field["const"]] if "const" in field else []):
        return " or ".join(f"`{toml_value(value)}`" for value in values)
    if field.get("type") == "array":
        kind = f"list of {_kind(field['items']).replace('number', 'numbers')}"
    elif "additionalProperties" in field:
        kind = f"table: name to {_kind(field['additionalProperties'])}"
    else:
        kind = KINDS[field.get("type", "object")]
    return ", ".join(
        [kind, *(BOUNDS[name].format(field[name]) for name in BOUNDS if name in field)]
    )


def _default(field: Schema) -> str:
    default = field.get("default", {})
    return "no table" if default is None else f"`{toml_value(default)}`"


if __name__ == "__main__":
    sys.stdout.write(configuration_page())

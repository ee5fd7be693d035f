"""The configuration reference, made from the models that check the files.

``python -m simulations.output.configuration`` prints the page.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from itertools import chain
from textwrap import dedent
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from client.site_file import SiteFile
from deal_core.config.data import Table
from deal_core.config.experiment import Experiment
from simulations.output.files import row, toml_value

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
KINDS = {str: "text", int: "whole number", float: "number", bool: "true or false"}
BOUNDS = {"gt": "> {}", "ge": "≥ {}", "lt": "< {}", "le": "≤ {}"}


def attribute_docstrings(model: type[Table]) -> dict[str, str]:
    """Return field name to the string literal that follows the field, on one line; fields without
    one are left out."""
    body = ast.parse(dedent(inspect.getsource(model))).body[0]
    assert isinstance(body, ast.ClassDef)
    texts = {}
    for field, after in zip(body.body, body.body[1:], strict=False):
        if (
            isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        ):
            texts[field.target.id] = plain_markdown(after.value.value)
    return texts


def plain_markdown(text: str) -> str:
    """Return a docstring on one line, its double backticks and Sphinx roles as code."""
    text = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", " ".join(text.split()))
    return text.replace("``", "`")


def configuration_page() -> str:
    """Return the page: every key of an experiment and of ``site.toml``."""
    lines = [
        INTRODUCTION,
        "## Experiment\n",
        *_section(Experiment, ""),
        "## site.toml\n",
        *_section(SiteFile, ""),
    ]
    return "\n".join(lines)


def _section(model: type[Table], name: str) -> Iterator[str]:
    """Yield the table ``name`` with its keys, then the tables in it; the outermost has no name."""
    if name:
        yield f"### `[{name}]`\n"
        yield plain_markdown(inspect.cleandoc(model.__doc__ or "")) + "\n"
    texts, rows, tables = attribute_docstrings(model), [], []
    for key, field in model.model_fields.items():
        kind, optional = _without_none(field.annotation)
        below = _table_in(kind)
        if below is None or optional or get_origin(kind) is dict:
            rows.append(_row(key, field, kind, texts.get(key, "")))
        if below is not None:
            each = ".TASK" if get_origin(kind) is dict else ""
            tables.append((below, f"{name}.{key}{each}".removeprefix(".")))
    if rows:
        yield row("key", "type", "default", "meaning")
        yield "|---|---|---|---|"
        yield "\n".join(rows) + "\n"
    for below, below_name in tables:
        yield from _section(below, below_name)


def _row(key: str, field: FieldInfo, kind: Any, text: str) -> str:
    values = (f"`{key}`", ", ".join([_kind(kind), *_bounds(field.metadata)]), _default(field))
    return row(*values, text)


def _without_none(annotation: Any) -> tuple[Any, bool]:
    """Return the type of a field, and whether the field may be left out altogether."""
    if isinstance(annotation, UnionType):
        (kind,) = (each for each in get_args(annotation) if each is not NoneType)
        return kind, True
    return annotation, False


def _table_in(kind: Any) -> type[Table] | None:
    """Return the model of a table, or of each of a table of named tables; None for a value."""
    kind = get_args(kind)[1] if get_origin(kind) is dict else kind
    return kind if isinstance(kind, type) and issubclass(kind, Table) else None


def _kind(kind: Any) -> str:
    """Return the type in words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(f"`{toml_value(value)}`" for value in arguments)
    if origin is Union:
        return " or ".join(map(_kind, arguments))
    if origin is Annotated:
        told = [each.metadata if isinstance(each, FieldInfo) else [each] for each in arguments[1:]]
        return ", ".join([_kind(arguments[0]), *_bounds(chain.from_iterable(told))])
    if origin is tuple:
        return f"list of {_kind(arguments[0]).replace('number', 'numbers')}"
    if origin is dict:
        return f"table: name to {_kind(arguments[1])}"
    return KINDS.get(kind, "table")


def _bounds(constraints: Any) -> Iterator[str]:
    """Yield the limits of a value in words."""
    for constraint in constraints:
        for name, form in BOUNDS.items():
            if (limit := getattr(constraint, name, None)) is not None:
                yield form.format(f"{limit:g}")
        if pattern := getattr(constraint, "pattern", None):
            yield f"as in `{pattern}`"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "–"
    default = field.get_default(call_default_factory=True)
    return "no table" if default is None else f"`{toml_value(default)}`"


if __name__ == "__main__":
    sys.stdout.write(configuration_page())

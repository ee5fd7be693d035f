"""From text to the frozen experiment and back: experiment files, ``--set``, and Flower's run
config, which carries an experiment as one JSON value."""

import hashlib
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from deal_core.config.data import Table
from deal_core.config.experiment import Experiment
from deal_core.errors import UserError, nearest
from deal_core.installed import package_digest

T = TypeVar("T", bound=Table)

SIMILAR = 0.8
"""Of a key of another table, to be meant: names of one table are few, of all tables many."""


def parse_experiment(tables: Mapping[str, Any], where: str) -> Experiment:
    """Return the experiment of nested tables, as :func:`parse_tables`."""
    return parse_tables(Experiment, tables, where)


def parse_tables(schema: type[T], tables: Mapping[str, Any], where: str) -> T:
    """Return nested tables as the model of their schema, checked.

    Raises:
        UserError: unknown keys (with the nearest known one) or wrong types; every line of the
            message starts with ``where`` and names the key.
    """
    try:
        return schema.model_validate_json(json.dumps(tables), strict=True)
    except ValidationError as error:
        found = dict.fromkeys(_problem(each, schema) for each in error.errors())
        raise UserError(*(f"{where}: {problem}" for problem in found)) from None
    except TypeError as error:
        raise UserError(f"{where}: {error}; use strings, numbers, booleans and lists") from None


def _problem(problem: ErrorDetails, schema: type[BaseModel]) -> str:
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{key}'{_meant(location, schema)}"
    if problem["type"] == "value_error":  # a model's own: keys that do not go together
        return f"{key}: {problem['msg'].removeprefix('Value error, ')}".removeprefix(": ")
    message = problem["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    return f"key '{key}' should be {message}, but is {json.dumps(problem['input'])}"


def _meant(location: Sequence[str], schema: type[BaseModel]) -> str:
    """Return ``; did you mean 'x'?``: the same key of another table, else the nearest key of its
    own table, else the nearest of any."""
    *_, leaf = location
    paths = sorted(_key_paths(schema), key=lambda path: path.count("."))
    same = [path for path in paths if path.rpartition(".")[2] == leaf]
    if same:
        return f"; did you mean {' or '.join(repr(path) for path in same[:3])}?"
    if near := nearest(leaf, _known_keys(schema, location[:-1])):
        return near
    close = get_close_matches(leaf, [path.rpartition(".")[2] for path in paths], 1, SIMILAR)
    like = [path for path in paths if close and path.rpartition(".")[2] == close[0]]
    return f"; did you mean {' or '.join(repr(path) for path in like[:3])}?" if like else ""


def _key_paths(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted keys of all tables, without those of tables with names of their own."""
    for name, field in schema.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _key_paths(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def _known_keys(schema: type[BaseModel], path: Sequence[str]) -> list[str]:
    table: Any = schema
    for part in path:  # a key of a table, or any name in a table of named tables
        fields = getattr(table, "model_fields", None)
        table = fields[part].annotation if fields else get_args(table)[1]
        if isinstance(table, UnionType):  # a table that may be left out
            table = get_args(table)[0]
    return list(table.model_fields)


def read_toml(path: Path) -> dict[str, Any]:
    """Return the tables of a TOML file.

    Raises:
        UserError: the file is missing, unreadable or no TOML; the message names the line.
    """
    try:
        # utf-8-sig: some editors put a mark before the first character.
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not valid TOML ({error})") from None
    except (ValueError, RecursionError) as error:  # a number too long, nested too deep
        raise UserError(f"{path}: cannot be read ({error})") from None


def apply_overrides(tables: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return ``tables`` with each ``table.key=value`` applied.

    The value is read as TOML; a bare word is a string.

    Raises:
        UserError: no ``=`` in an override, a path that runs through a plain value, or a date.
    """
    try:
        result: dict[str, Any] = json.loads(json.dumps(tables))
    except TypeError as error:  # a date, which TOML knows and no key takes
        raise UserError(f"a value is no text or number ({error}); put it in quotes") from None
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise UserError(f"--set {override}: write it as table.key=value")
        *parents, leaf = key.strip().split(".")
        table = result
        for parent in parents:
            table = table.setdefault(parent, {})
            if not isinstance(table, dict):
                raise UserError(f"--set {override}: '{parent}' is a value, not a table")
        table[leaf] = _toml_value(text.strip())
    return result


def overlaid(tables: Mapping[str, Any], layer: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``tables`` with the values of ``layer`` over them, table by table."""
    result: dict[str, Any] = json.loads(json.dumps(tables))
    for key, value in layer.items():
        both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
        result[key] = overlaid(result[key], value) if both else value
    return result


def _toml_value(text: str) -> Any:
    """Return the one value that the text is as TOML; where it is none, or more, the text."""
    try:
        read = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return read["value"] if len(read) == 1 else text


EXPERIMENT, PACKAGE = "experiment", "package"
"""Keys of Flower's run config; ``simulations/bundle/pyproject.toml`` declares them."""


def leaves(experiment: Experiment) -> dict[str, Any]:
    """Return dotted keys to plain values: scalars, lists and dicts."""
    found: dict[str, Any] = {}

    def visit(model: BaseModel, prefix: str) -> None:
        plain = model.model_dump(mode="json")
        for name in type(model).model_fields:
            value = getattr(model, name)
            if isinstance(value, BaseModel):
                visit(value, f"{prefix}{name}.")
            else:
                found[prefix + name] = plain[name]

    visit(experiment, "")
    return found


Value = bool | int | float | str

PATIENCE = ("federation.deadline_seconds", "federation.quorum")
"""Keys of how long a round waits, and for how many."""
WHERE = (
    *("description", "run.out", "run.resume", "run.track"),
    *("run.engine", "run.device", "run.threads", "run.workers", *PATIENCE),
)
"""Keys that say where and how a run is done, and change nothing of what it computes or releases:
with others a run may go on."""


def flatten(experiment: Experiment) -> dict[str, Value]:
    """Return dotted keys to scalars; lists and dicts as JSON text."""
    return {
        key: json.dumps(value) if isinstance(value, (list, dict)) else value
        for key, value in leaves(experiment).items()
    }


def to_run_config(experiment: Experiment) -> dict[str, Value]:
    """Return Flower's run config: the experiment as JSON text, and which package wrote it."""
    return {EXPERIMENT: as_text(experiment), PACKAGE: package_digest()}


def as_text(experiment: Experiment) -> str:
    """Return the experiment as JSON text."""
    return json.dumps(experiment.model_dump(mode="json"))


def from_run_config(run_config: Mapping[str, Any]) -> Experiment:
    """Return the experiment of :func:`to_run_config`; without one, that of all defaults."""
    return _parsed(str(run_config.get(EXPERIMENT, "")))


@lru_cache(maxsize=4)
def _parsed(text: str) -> Experiment:
    try:
        tables = json.loads(text or "{}")
    except ValueError:
        raise UserError("run config: the value of 'experiment' is no JSON text") from None
    if not isinstance(tables, dict):
        raise UserError("run config: the value of 'experiment' is no JSON object")
    return parse_experiment(tables, "run config")


def run_name(experiment: Experiment) -> str:
    """Return the name under which a ledger files an experiment's releases: equal for runs that
    release the same, wherever their files lie."""
    settings = flatten(experiment)
    for key in WHERE:
        settings.pop(key)
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

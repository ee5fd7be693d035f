"""An experiment from whatever a program has: a name, a file, tables, or an experiment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from deal_core.config.experiment import Experiment
from deal_core.config.file import apply_overrides, parse_experiment, read_toml
from deal_core.errors import UserError
from simulations.output.files import toml_value
from simulations.run.experiment import (
    Request,
    completed,
    find_experiment,
    own_folder,
    with_absolute_inputs,
)

Config: TypeAlias = str | Path | Mapping[str, Any] | Experiment
"""Name of a shipped experiment, path of a TOML file, nested tables, or an experiment."""


def experiment(config: Config, overrides: Mapping[str, Any] | None = None) -> Experiment:
    """Return an experiment, checked; keys that are not named have their defaults, and paths of a
    file are absolute, also those relative to it.

    Args:
        config: a name from ``deal ls``, a path, nested tables, or an experiment.
        overrides: dotted keys and their values, such as ``{"federation.rounds": 1}``.

    Raises:
        UserError: no such experiment, an unreadable file, an unknown key, or a value of a wrong
            type.
    """
    folder = None
    if isinstance(config, Experiment):
        tables, where = config.model_dump(mode="json"), "experiment"
    elif isinstance(config, Mapping):
        tables, where = dict(config), "tables"
    else:
        path = find_experiment(str(config))
        tables, where, folder = read_toml(path), str(path), own_folder(str(config), path)
    parsed = parse_experiment(tables, where)
    if overrides is not None and not isinstance(overrides, Mapping):
        raise UserError('overrides: dotted keys and their values, such as {"federation.rounds": 1}')
    if overrides:
        tables = apply_overrides(tables, _as_lines(overrides))
        parsed = parse_experiment(tables, "overrides")
    return parsed if folder is None else with_absolute_inputs(parsed, folder)


def placed(config: Config, overrides: Mapping[str, Any] | None, request: Request) -> Experiment:
    """Return an experiment that is ready to run: with a folder, and absolute paths.

    Args:
        config: as of :func:`experiment`.
        overrides: as there.
        request: folder, seed, engine, and whether a run is continued.

    Raises:
        UserError: as of :func:`experiment`.
    """
    own = find_experiment(str(config)).stem if isinstance(config, (str, Path)) else "python"
    return completed(experiment(config, overrides), request, own)


def _as_lines(values: Mapping[str, Any]) -> list[str]:
    return [f"{key}={toml_value(_plain(key, value))}" for key, value in values.items()]


def _plain(key: str, value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (bool, int, float, str, Mapping, Sequence)):
        return value
    kind = type(value).__name__
    raise UserError(f"overrides: '{key}' is a {kind}; use strings, numbers, booleans and lists")

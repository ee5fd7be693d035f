"""The experiment as Flower carries it: dotted keys to scalars, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel

from deal_core.config.experiment import Experiment
from deal_core.config.file import parse_experiment


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

WHERE = (
    *("description", "run.out", "run.resume", "run.track"),
    *("run.engine", "run.threads", "run.workers"),
)
"""Keys that say where and how a run is done, and change nothing of what it finds or releases."""


def flatten(experiment: Experiment) -> dict[str, Value]:
    """Return Flower's run config: dotted keys to scalars; lists and dicts as JSON text."""
    return {
        key: json.dumps(value) if isinstance(value, (list, dict)) else value
        for key, value in leaves(experiment).items()
    }


def from_run_config(run_config: Mapping[str, Any]) -> Experiment:
    """Return the experiment that :func:`flatten` made flat; the one parser of Flower's run config.

    Raises:
        UserError: as :func:`parse_experiment`.
    """
    structured = _structured_keys()
    values = {k: json.loads(v) if k in structured else v for k, v in run_config.items()}
    return parse_experiment(nested(values), "run config")


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted keys as tables in tables."""
    tables: dict[str, Any] = {}
    for key, value in values.items():
        *parents, leaf = key.split(".")
        table = tables
        for parent in parents:
            table = table.setdefault(parent, {})
        table[leaf] = value
    return tables


@cache
def _structured_keys() -> frozenset[str]:
    values = leaves(Experiment())
    return frozenset(key for key, value in values.items() if isinstance(value, (list, dict)))

"""The experiment as Flower carries it, one JSON value; and as dotted keys, to compare settings."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from pydantic import BaseModel

from deal_core.config.experiment import Experiment
from deal_core.config.file import parse_experiment
from deal_core.errors import UserError
from deal_core.installed import package_digest

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
    *("run.engine", "run.threads", "run.workers", *PATIENCE),
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

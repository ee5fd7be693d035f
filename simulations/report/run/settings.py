"""How to get the same again: settings, versions, commit, seed, engine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from deal_core.config.experiment import Experiment
from deal_core.config.run_config import WHERE, leaves
from simulations.report.page.blocks import Block, Cell, Facts, Folded, Section, Table, Text
from simulations.report.run.record import RunRecord, labels

HIDDEN = {*WHERE, "data.path", "data.files"}
"""Where files lie and how many threads there are: of the machine, and of no use elsewhere."""


def settings(run: RunRecord) -> Section:
    """Return the section."""
    return Section("settings", "Settings and versions", tuple(_blocks(run)))


def _blocks(run: RunRecord) -> Iterator[Block]:
    yield Facts(tuple(_facts(run)))
    own, usual = leaves(run.experiment), leaves(Experiment())
    changed = {
        key: value for key, value in own.items() if value != usual[key] and key not in HIDDEN
    }
    if changed:
        yield _table("Settings other than the defaults", changed, usual)
    else:
        yield Text("All settings have their defaults.")
    if (table := labels(run)) is not None:
        yield Folded("Labels of each task", (table,))
    every = {key: value for key, value in own.items() if key not in HIDDEN}
    yield Folded("All settings", (_table("All settings", every, usual),))


def _facts(run: RunRecord) -> Iterator[tuple[str, Cell]]:
    config, results = run.experiment.run, run.results
    yield "seed", str(config.seed)
    yield "engine", config.engine
    if results is not None:
        if results.commit:
            yield "commit", results.commit
        if results.finished:
            yield "finished (UTC)", results.finished.replace("T", " ").removesuffix("+00:00")
        yield from results.versions.items()
        yield "schema of results.json", str(results.schema_version)


def _table(caption: str, values: Mapping[str, Any], usual: Mapping[str, Any]) -> Table:
    rows = tuple((key, shown(value), shown(usual[key])) for key, value in values.items())
    return Table(caption, ("key", "value", "default"), rows, words=(1, 2))


def shown(value: Any) -> str:
    """Return a setting's value as it stands in a file."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)

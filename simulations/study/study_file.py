"""The study file: a grid of arms, seeds, task orders, and settings or privacy budgets over one
experiment."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from deal_core.config.data import Table
from deal_core.config.experiment import Experiment
from deal_core.config.file import parse_tables, read_toml
from deal_core.errors import UserError, at_home, choose
from simulations.output import shipped_experiments, shipped_studies
from simulations.run.experiment import budget_setting, epsilons, find_file
from simulations.study.outcome import BOUNDS

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
"""Of an arm, an order or a setting: it becomes part of a folder's name."""


class Arm(Table):
    """One line of the tables: a method with its settings, or a bound."""

    label: str = ""
    """In the tables; empty: the arm's name."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Tables of an experiment, as in its file."""
    bound: str = ""
    """``joint``, ``joint-all-labels``, ``per-task`` or ``local-only``: plain fine-tuning under
    other conditions."""
    seeds: tuple[int, ...] = ()
    """Empty: those of the study."""
    reference: bool = False
    """No contestant: compared with the others, but never the best baseline, the baseline or the
    candidate (a bound is not even compared)."""
    note: str = ""
    """Behind the label, e.g. ``not private``."""

    @property
    def contestant(self) -> bool:
        """May others be compared with it?"""
        return not (self.bound or self.reference)


class Order(Table):
    """One order of the tasks."""

    tasks: tuple[str, ...] = Field(min_length=1)


class StudyFile(Table):
    """``[set]`` and ``[settings.NAME]`` hold tables of an experiment, as in its file."""

    description: str = ""
    experiment: str = "quickstart"
    """A shipped name, or a path (relative to the study file)."""
    set: dict[str, Any] = Field(default_factory=dict)
    """What all cells have in common."""
    seeds: tuple[int, ...] = (0,)
    arms: dict[str, Arm] = Field(default_factory=dict)
    orders: dict[str, Order] = Field(default_factory=dict)
    """Empty: the experiment's own order alone."""
    settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Every arm is run under each; where both set a key, the arm's value holds."""
    epsilons: str = ""
    """Privacy budgets, e.g. ``1,8,inf`` (``inf``: without privacy): every arm is run under each, in
    the place of settings."""
    baseline: str = ""
    """An arm that every other one is compared with."""
    candidate: str = ""
    """The arm that is being judged: never itself the best baseline."""


@dataclass(frozen=True)
class Study:
    """A study file and where it lies."""

    name: str
    path: Path
    file: StudyFile

    def label(self, arm: str) -> str:
        """Return the label of an arm, with its marks."""
        own = self.file.arms[arm]
        marks = [mark for mark in ("bound" if own.bound else "", own.note) if mark]
        return (own.label or arm) + (f" ({', '.join(marks)})" if marks else "")


def load_study(name: str, seeds: tuple[int, ...] = (), budgets: str = "") -> Study:
    """Return a study, found, read and checked.

    Args:
        name: a shipped study or the path of one; or a shipped experiment or the path of one, which
            is then the only arm.
        seeds: in the place of the file's, and of its arms'; none: those of the file.
        budgets: in the place of its ``epsilons``; empty: those of the file.

    Raises:
        UserError: unknown study, unreadable file, unknown key, wrong type, or names that do not
            fit together.
    """
    path, file = _read(name)
    changes: dict[str, Any] = {}
    if seeds:
        arms = {key: arm.model_copy(update={"seeds": ()}) for key, arm in file.arms.items()}
        changes = {"seeds": seeds, "arms": arms}
    if budgets := budgets or file.epsilons:
        if file.settings:
            raise UserError(f"{path}: has settings, and budgets beside them; leave one out")
        changes["epsilons"] = budgets
        changes["settings"] = dict(map(budget_setting, epsilons(budgets)))
    file = file.model_copy(update=changes)
    if not file.arms:
        raise UserError(f"{path}: has no arm; add a table [arms.NAME]")
    for kind, names in (("arms", file.arms), ("orders", file.orders), ("settings", file.settings)):
        for each in (name for name in names if not NAME.fullmatch(name)):
            raise UserError(
                f"{path}: [{kind}.\"{each}\"]: a name is letters, digits, '-' and '_'; put the "
                "rest into its label"
            )
    for own in (file.seeds, *(arm.seeds for arm in file.arms.values() if arm.seeds)):
        if not own or len(set(own)) < len(own) or min(own) < 0:
            raise UserError(
                f"{path}: seeds {list(own)}: name one at least, all different and none negative"
            )
    for arm in file.arms.values():
        if arm.bound:
            choose("bound", arm.bound, {name: each for name, each in BOUNDS.items() if name})
    for role in filter(None, (file.baseline, file.candidate)):
        choose("arm", role, file.arms)
        if not file.arms[role].contestant:
            raise UserError(
                f"{path}: arm '{role}' is a bound or a reference, so it cannot be the baseline or "
                "the candidate; name another arm"
            )
    return Study(path.stem, path, file)


def _read(name: str) -> tuple[Path, StudyFile]:
    """Return path and content of a study; of an experiment a study whose only arm it is."""
    if name in shipped_experiments() and name not in shipped_studies():
        return _alone(name, shipped_experiments()[name])
    path = find_file("study", name, shipped_studies())
    tables = read_toml(path)
    if tables and "arms" not in tables and tables.keys() <= Experiment.model_fields.keys():
        return _alone(str(path), path)
    return path, parse_tables(StudyFile, tables, str(path))


def _alone(name: str, path: Path) -> tuple[Path, StudyFile]:
    experiment = name if name in shipped_experiments() else str(at_home(path).resolve())
    return path, StudyFile(
        description=f"{path.stem}.", experiment=experiment, arms={path.stem: Arm()}
    )

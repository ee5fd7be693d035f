"""From a study file (a grid of arms, seeds, task orders, and settings or privacy budgets over one
experiment) to its cells, and from a cell to the ordinary runs that it takes."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from pydantic import Field

from deal_core.config import file as config_file
from deal_core.config.data import Table
from deal_core.config.experiment import Experiment
from deal_core.data import open_source
from deal_core.errors import UserError, at_home, choose
from server.results import Strict
from simulations.output import shipped_experiments, shipped_studies
from simulations.run.experiment import (
    budget_setting,
    epsilons,
    find_experiment,
    find_file,
    own_folder,
    with_absolute_inputs,
    with_absolute_paths,
)
from simulations.study.outcome import BOUNDS

CELLS = "cells"
"""Folder of a study's runs."""
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
    experiments, studies = shipped_experiments(), shipped_studies()
    if name in experiments and name not in studies:
        path, experiment = experiments[name], name
    else:
        path = find_file("study", name, studies)
        tables = config_file.read_toml(path)
        if not tables or "arms" in tables or not tables.keys() <= Experiment.model_fields.keys():
            return path, config_file.parse_tables(StudyFile, tables, str(path))
        experiment = str(at_home(path).resolve())
    alone = {path.stem: Arm()}
    return path, StudyFile(description=f"{path.stem}.", experiment=experiment, arms=alone)


class Place(Strict):
    """One arm under one setting, with one order and one seed; ``order`` and ``setting`` are empty
    where the study names none."""

    arm: str
    order: str
    setting: str
    seed: int
    bound: str
    """Of the arm."""

    @property
    def name(self) -> str:
        """``arm.order.setting.seedN``, without what is empty; a folder is called so."""
        named = (self.arm, self.order, self.setting, f"seed{self.seed}")
        return ".".join(part for part in named if part)


class Cell(Place):
    """What is run there."""

    runs: dict[str, Experiment]
    """Name of a part (empty: there is one) to its complete experiment; ``run.out`` is a folder of
    its own."""


def settings_of(experiment: Experiment) -> dict[str, config_file.Value]:
    """Return all that decides what a run finds, by flat key: without the places of its data and
    results and the number of threads."""
    free = {*config_file.WHERE, "data.path"}
    return {key: value for key, value in config_file.flatten(experiment).items() if key not in free}


def precise(experiment: Experiment) -> Experiment:
    """Return the experiment with this machine's precision, where it is left to the machine."""
    from deal_core.models.loading import best_device
    from deal_core.training.hardware import compute_dtype

    exact = experiment.privacy.mechanism != "none"
    dtype = str(compute_dtype(experiment.train, best_device(), exact)).removeprefix("torch.")
    return experiment.changed(train={"precision": dtype})


def grid(study: Study, out: Path, overrides: Sequence[str] = ()) -> list[Cell]:
    """Return all cells, seed after seed: complete comparisons come early.

    Args:
        study: what to compare.
        out: folder of the study; the runs lie below ``out/cells``.
        overrides: ``table.key=value``, for all cells, over everything else.

    Raises:
        UserError: an experiment that is not valid; the message names the table of the study.
    """
    return [_cell(study, out, overrides, place) for place in places(study.file)]


def chosen(cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """Return the cells that a pattern matches, such as ``deal.*.seed0``; all without patterns."""

    def matches(cell: Cell, pattern: str) -> bool:
        return fnmatchcase(cell.name, pattern) or pattern in cell.name.split(".")

    for pattern in patterns:
        if not any(matches(cell, pattern) for cell in cells):
            some = ", ".join(cell.name for cell in cells[:3])
            raise UserError(f"--only {pattern}: no cell has such a name; there are {some}, ...")
    return [c for c in cells if not patterns or any(matches(c, each) for each in patterns)]


def places(file: StudyFile) -> Iterator[Place]:
    """Yield the place of every cell."""
    orders, settings = list(file.orders) or [""], list(file.settings) or [""]
    own = [seed for arm in file.arms.values() for seed in arm.seeds]
    for seed in dict.fromkeys((*file.seeds, *own)):
        for order in orders:
            for setting in settings:
                for name, arm in file.arms.items():
                    repeats = order != orders[0] and not BOUNDS[arm.bound].ordered
                    if seed in (arm.seeds or file.seeds) and not repeats:
                        at = {"arm": name, "order": order, "setting": setting, "seed": seed}
                        yield Place(**at, bound=arm.bound)


def _cell(study: Study, out: Path, overrides: Sequence[str], place: Place) -> Cell:
    """Return the cell; its runs have one process with one thread, unless the study asks for more,
    and folders of their own."""
    base, runs = _experiment(study, overrides, place), {}
    for name, part in BOUNDS[place.bound].parts(base, open_source(base.data).task_names()).items():
        own = {
            "seed": place.seed,
            "threads": part.run.threads or 1,
            "workers": part.run.workers or 1,
            "out": str(out / CELLS / place.name / name),
            "resume": False,
        }
        runs[name] = with_absolute_paths(part.changed(run=own))
    return Cell(**place.model_dump(), runs=runs)


def _experiment(study: Study, overrides: Sequence[str], place: Place) -> Experiment:
    """Return base, ``[set]``, order, setting, arm, ``--set`` as one experiment: the later one
    holds. Checked after each, so that a fault is blamed on the table that has it.

    Raises:
        UserError: one is not valid, or sets what a budget sets.
    """
    file = study.file
    base = file.experiment
    path = find_experiment(str(study.path.parent / base) if base.endswith(".toml") else base)
    tables = config_file.read_toml(path)
    config_file.parse_experiment(tables, str(path))
    layers: list[tuple[str, Mapping[str, Any]]] = [("[set]", file.set)]
    if place.order:
        tasks = {"data": {"tasks": list(file.orders[place.order].tasks)}}
        layers.append((f"[orders.{place.order}]", tasks))
    if place.setting:
        layers.append((f"[settings.{place.setting}]", file.settings[place.setting]))
    layers.append((f"[arms.{place.arm}.set]", file.arms[place.arm].set))
    for where, layer in layers:
        tables = config_file.overlaid(tables, layer)
        config_file.parse_experiment(tables, f"{study.path}: {where}")
    experiment = config_file.parse_experiment(
        config_file.apply_overrides(tables, overrides), "--set"
    )
    budget = file.settings[place.setting]["privacy"] if file.epsilons else {}
    if any(getattr(experiment.privacy, key) != value for key, value in budget.items()):
        raise UserError(
            f"{study.path}: budgets are those of --epsilon; leave privacy.mechanism and "
            "privacy.target_epsilon out of arms and --set"
        )
    return with_absolute_inputs(experiment, own_folder(base, path))

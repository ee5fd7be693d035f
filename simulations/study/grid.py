"""From a study to its cells, and from a cell to the ordinary runs that it takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from deal_core.config.experiment import Experiment
from deal_core.config.file import (
    WHERE,
    Value,
    apply_overrides,
    flatten,
    overlaid,
    parse_experiment,
    read_toml,
)
from deal_core.data import open_source
from deal_core.errors import UserError
from simulations.run.experiment import (
    find_experiment,
    own_folder,
    with_absolute_inputs,
    with_absolute_paths,
)
from simulations.study.outcome import BOUNDS
from simulations.study.study_file import Study, StudyFile

CELLS = "cells"
"""Folder of a study's runs."""


@dataclass(frozen=True)
class Cell:
    """One arm under one setting, with one order and one seed; ``order`` and ``setting`` are empty
    where the study names none."""

    arm: str
    order: str
    setting: str
    seed: int
    bound: str
    runs: Mapping[str, Experiment]
    """Name of a part (empty: there is one) to its complete experiment; ``run.out`` is a folder of
    its own."""

    @property
    def name(self) -> str:
        """Of :func:`cell_name`."""
        return cell_name(self.arm, self.order, self.setting, self.seed)


def settings_of(experiment: Experiment) -> dict[str, Value]:
    """Return all that decides what a run finds, by flat key: without the places of its data and
    results and the number of threads."""
    free = {*WHERE, "data.path"}
    return {key: value for key, value in flatten(experiment).items() if key not in free}


def precise(experiment: Experiment) -> Experiment:
    """Return the experiment with this machine's precision, where it is left to the machine."""
    from deal_core.models.loading import best_device
    from deal_core.training.hardware import compute_dtype

    exact = experiment.privacy.mechanism != "none"
    dtype = str(compute_dtype(experiment.train, best_device(), exact)).removeprefix("torch.")
    train = experiment.train.model_copy(update={"precision": dtype})
    return experiment.model_copy(update={"train": train})


def default_settings() -> dict[str, Value]:
    """Of an experiment that sets nothing."""
    return settings_of(Experiment())


def cell_name(arm: str, order: str, setting: str, seed: int) -> str:
    """Return ``arm.order.setting.seedN``, without what is empty."""
    return ".".join(part for part in (arm, order, setting, f"seed{seed}") if part)


def grid(study: Study, out: Path, overrides: Sequence[str] = ()) -> list[Cell]:
    """Return all cells, seed after seed: complete comparisons come early.

    Args:
        study: what to compare.
        out: folder of the study; the runs lie below ``out/cells``.
        overrides: ``table.key=value``, for all cells, over everything else.

    Raises:
        UserError: an experiment that is not valid; the message names the table of the study.
    """
    return [_cell(study, out, overrides, *place) for place in places(study.file)]


def chosen(cells: Sequence[Cell], patterns: Sequence[str]) -> list[Cell]:
    """Return the cells whose names match one of the patterns, such as ``deal.*.seed0``; all where
    there is none.

    Raises:
        UserError: a pattern that no cell matches.
    """

    def matches(cell: Cell, pattern: str) -> bool:
        return fnmatchcase(cell.name, pattern) or pattern in cell.name.split(".")

    for pattern in patterns:
        if not any(matches(cell, pattern) for cell in cells):
            some = ", ".join(cell.name for cell in cells[:3])
            raise UserError(f"--only {pattern}: no cell has such a name; there are {some}, ...")
    return [c for c in cells if not patterns or any(matches(c, each) for each in patterns)]


def places(file: StudyFile) -> Iterator[tuple[str, str, str, int]]:
    """Yield arm, order, setting and seed of every cell."""
    orders, settings = list(file.orders) or [""], list(file.settings) or [""]
    own = [seed for arm in file.arms.values() for seed in arm.seeds]
    for seed in dict.fromkeys((*file.seeds, *own)):
        for order in orders:
            for setting in settings:
                for name, arm in file.arms.items():
                    repeats = order != orders[0] and not BOUNDS[arm.bound].ordered
                    if seed in (arm.seeds or file.seeds) and not repeats:
                        yield name, order, setting, seed


def _cell(
    study: Study, out: Path, overrides: Sequence[str], arm: str, order: str, setting: str, seed: int
) -> Cell:
    base = _experiment(study, overrides, arm, order, setting)
    bound = study.file.arms[arm].bound
    tasks = open_source(base.data).task_names()
    parts = BOUNDS[bound].parts(base, tasks)
    folder = out / CELLS / cell_name(arm, order, setting, seed)
    runs = {name: _settled(part, folder / name, seed) for name, part in parts.items()}
    return Cell(arm, order, setting, seed, bound, runs)


def _experiment(
    study: Study, overrides: Sequence[str], arm: str, order: str, setting: str
) -> Experiment:
    """Return base, ``[set]``, order, setting, arm, ``--set`` as one experiment: the later one
    holds. Checked after each, so that a fault is blamed on the table that has it."""
    file = study.file
    base = file.experiment
    path = find_experiment(str(study.path.parent / base) if base.endswith(".toml") else base)
    tables = read_toml(path)
    parse_experiment(tables, str(path))
    layers: list[tuple[str, Mapping[str, Any]]] = [("[set]", file.set)]
    if order:
        layers.append((f"[orders.{order}]", {"data": {"tasks": list(file.orders[order].tasks)}}))
    if setting:
        layers.append((f"[settings.{setting}]", file.settings[setting]))
    layers.append((f"[arms.{arm}.set]", file.arms[arm].set))
    for where, layer in layers:
        tables = overlaid(tables, layer)
        parse_experiment(tables, f"{study.path}: {where}")
    experiment = parse_experiment(apply_overrides(tables, overrides), "--set")
    return with_absolute_inputs(experiment, own_folder(base, path))


def _settled(experiment: Experiment, folder: Path, seed: int) -> Experiment:
    """A run of one process with one thread, unless the study asks for more; in its folder."""
    run = experiment.run.model_copy(
        update={
            "seed": seed,
            "threads": experiment.run.threads or 1,
            "workers": experiment.run.workers or 1,
            "out": str(folder),
            "resume": False,
        }
    )
    return with_absolute_paths(experiment.model_copy(update={"run": run}))

"""From what a user typed to one complete experiment."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deal_core.config.experiment import Experiment
from deal_core.config.file import apply_overrides, parse_experiment, read_toml
from deal_core.errors import UserError, at_home, nearest
from simulations.engines import load_plugins
from simulations.output import shipped_experiments


@dataclass(frozen=True)
class Request:
    """The arguments of ``deal simulate``: they beat the overrides, which beat the experiment."""

    experiment: str
    """A shipped name or the path of a TOML file."""
    out: str = ""
    """Run folder; empty: the experiment's ``run.out``, or ``runs/NAME-seedN``."""
    overrides: tuple[str, ...] = ()
    """``table.key=value``, applied in order."""
    seed: int | None = None
    engine: str | None = None
    resume: bool = False
    """Continue the run in the folder."""


def load_experiment(request: Request) -> Experiment:
    """Return the experiment, found, read, overridden and completed; every path in it is absolute.

    Raises:
        UserError: unknown experiment, unreadable file, unknown key, wrong type.
    """
    path = find_experiment(request.experiment)
    tables = read_toml(path)
    parse_experiment(tables, str(path))  # so that a fault of the file is not blamed on --set
    experiment = parse_experiment(apply_overrides(tables, request.overrides), "--set")
    folder = own_folder(request.experiment, path)
    return completed(experiment, request, path.stem, folder)


def find_experiment(name: str) -> Path:
    """Return the file of a shipped experiment, or ``name`` itself where it is a path."""
    return find_file("experiment", name, shipped_experiments())


def own_folder(name: str, path: Path) -> Path | None:
    """Return the folder in which relative paths of an experiment may be, besides the working
    directory: that of a user's own file; None for a shipped one."""
    return None if name in shipped_experiments() else path.parent


def find_file(kind: str, name: str, shipped: Mapping[str, Path]) -> Path:
    """Return the shipped file of that name, or ``name`` itself where it is a path.

    Raises:
        UserError: neither; the message lists the shipped ones.
    """
    if name in shipped:
        return shipped[name]
    if name.endswith(".toml") or Path(name).is_file():
        return Path(name)
    raise UserError(
        f"unknown {kind} '{name}'; shipped: {', '.join(shipped)}{nearest(name, shipped)}"
        "; for a file of your own give its path, NAME.toml"
    )


def completed(
    experiment: Experiment, request: Request, name: str, folder: Path | None = None
) -> Experiment:
    """Return the experiment with folder, seed and engine as requested, and absolute paths. ``name``
    is that of the run folder, where none is given; ``folder``: see :func:`with_absolute_inputs`."""
    run = experiment.run
    seed = run.seed if request.seed is None else request.seed
    changes = {
        "resume": request.resume,
        "seed": seed,
        "engine": run.engine if request.engine is None else request.engine,
        "out": request.out or run.out or f"runs/{name}-seed{seed}",
    }
    return with_absolute_paths(experiment.changed(run=changes), folder)


def with_absolute_paths(experiment: Experiment, folder: Path | None = None) -> Experiment:
    """Return the experiment with absolute inputs (:func:`with_absolute_inputs`), and a run folder
    relative to the working directory: the apps may run in another one."""
    experiment = experiment.changed(run={"out": _resolved(experiment.run.out)})
    return with_absolute_inputs(experiment, folder)


def with_absolute_inputs(experiment: Experiment, folder: Path | None = None) -> Experiment:
    """Return the experiment with absolute paths of plugins, which are loaded, data and model:
    relative ones are of the working directory, or, where nothing is there, of the ``folder`` of the
    experiment's file."""
    data, model = experiment.data, experiment.model
    plugins = tuple(_resolved(path, folder) for path in experiment.plugins)
    load_plugins(plugins)
    if data.path:
        data = data.model_copy(update={"path": _resolved(data.path, folder)})
    if data.hub:
        hub = {
            task: own.model_copy(update={"path": _folder_or_name(own.path, folder)})
            for task, own in data.hub.items()
        }
        data = data.model_copy(update={"hub": hub})
    model = model.model_copy(update={"name": _folder_or_name(model.name, folder)})
    return experiment.model_copy(update={"data": data, "model": model, "plugins": plugins})


def _folder_or_name(path: str, folder: Path | None) -> str:
    """A name of the hub stays as it is."""
    resolved = _resolved(path, folder)
    return resolved if Path(resolved).is_dir() else path


def _resolved(path: str, folder: Path | None = None) -> str:
    here = at_home(path)
    there = here if folder is None or here.exists() else folder / here
    return str((there if there.exists() else here).resolve())


LARGEST = 1000.0
"""Of ``privacy.target_epsilon``."""


def epsilons(text: str) -> list[float]:
    """Return the budgets in the text, the smallest first; ``inf`` is training without privacy."""
    try:
        values = [float(word) for word in text.split(",") if word.strip()]
    except ValueError:
        values = []
    sound = all(0 < value <= LARGEST or value == math.inf for value in values)
    if not values or not sound or len(set(values)) < len(values):
        raise UserError(
            f"--epsilon {text}: write positive numbers up to {LARGEST:g} or inf, each once, e.g. "
            "--epsilon 1,8,inf"
        )
    return sorted(values)


def named(epsilon: float) -> str:
    """In tables and folders: ``8``, ``0.5``, ``inf``."""
    return f"{epsilon:g}"


def budget_setting(epsilon: float) -> tuple[str, dict[str, Any]]:
    """Return name (without a dot: it is part of a folder's) and tables of a study's setting."""
    name = f"eps-{named(epsilon)}".replace(".", "_").replace("+", "")
    private = {"mechanism": "record", "target_epsilon": epsilon}
    return name, {"privacy": private if math.isfinite(epsilon) else {"mechanism": "none"}}


def with_budget(experiment: Experiment, epsilon: float) -> Experiment:
    """Return the experiment under this budget."""
    return experiment.changed(**budget_setting(epsilon)[1])

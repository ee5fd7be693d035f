"""From what a user typed to one complete experiment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deal_core.config.experiment import Experiment
from deal_core.config.file import apply_overrides, parse_experiment, read_toml
from deal_core.errors import UserError, nearest
from simulations.run.shipped import shipped_experiments


@dataclass(frozen=True)
class Request:
    """The arguments of ``deal simulate``.

    Attributes:
        experiment: a shipped name or the path of a TOML file.
        out: run folder; empty: the experiment's ``run.out``, or ``runs/NAME-seedN``.
        overrides: ``table.key=value``, applied in order.
        seed, engine: beat the experiment and the overrides.
        resume: continue the run in the folder.
    """

    experiment: str
    out: str = ""
    overrides: tuple[str, ...] = ()
    seed: int | None = None
    engine: str | None = None
    resume: bool = False


def load_experiment(request: Request) -> Experiment:
    """Return the experiment, found, read, overridden and completed; every path in it is absolute.

    Raises:
        UserError: unknown experiment, unreadable file, unknown key, wrong type.
    """
    path = find_experiment(request.experiment)
    tables = read_toml(path)
    parse_experiment(tables, str(path))  # so that a fault of the file is not blamed on --set
    experiment = parse_experiment(apply_overrides(tables, request.overrides), "--set")
    return completed(experiment, request, path.stem)


def find_experiment(name: str) -> Path:
    """Return the file of a shipped experiment, or ``name`` itself where it is a path.

    Raises:
        UserError: neither; the message lists the shipped ones.
    """
    return find_file("experiment", name, shipped_experiments())


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


def completed(experiment: Experiment, request: Request, name: str) -> Experiment:
    """Return the experiment with folder, seed and engine as requested; paths are absolute.

    Args:
        experiment: as read.
        request: what beats it.
        name: of the run folder, where none is given.
    """
    changes: dict[str, Any] = {"resume": request.resume}
    if request.seed is not None:
        changes["seed"] = request.seed
    if request.engine is not None:
        changes["engine"] = request.engine
    seed = changes.get("seed", experiment.run.seed)
    changes["out"] = request.out or experiment.run.out or f"runs/{name}-seed{seed}"
    run = experiment.run.model_copy(update=changes)
    return with_absolute_paths(experiment.model_copy(update={"run": run}))


def with_absolute_paths(experiment: Experiment) -> Experiment:
    """Paths are relative to the working directory, and the apps may run in another one."""
    data, model, method = experiment.data, experiment.model, experiment.method
    if data.path:
        data = data.model_copy(update={"path": _resolved(data.path)})
    if Path(model.name).is_dir():
        model = model.model_copy(update={"name": _resolved(model.name)})
    if public := method.consolidation.public_path:
        own = method.consolidation.model_copy(update={"public_path": _resolved(public)})
        method = method.model_copy(update={"consolidation": own})
    run = experiment.run.model_copy(update={"out": _resolved(experiment.run.out)})
    tables = {"data": data, "model": model, "method": method, "run": run}
    return experiment.model_copy(update=tables)


def _resolved(path: str) -> str:
    return str(Path(path).expanduser().resolve())

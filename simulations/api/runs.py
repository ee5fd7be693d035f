"""A whole run from a program, and what a finished run has learnt."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from deal_core.config.experiment import Experiment
from deal_core.config.file import apply_overrides, parse_experiment, read_toml
from deal_core.errors import UserError, at_home
from deal_core.inference.folder import Answer, Written, find_adapter
from deal_core.inference.predictor import Predictor, load_predictor
from deal_core.models.loading import keep
from server.folder import Listener
from server.results import Results, read_results
from simulations.api.nouns import read_model
from simulations.output import toml_value
from simulations.run.experiment import (
    Request,
    completed,
    find_experiment,
    own_folder,
    with_absolute_inputs,
)
from simulations.run.simulate import claimed, prepare
from simulations.use.predict import typed_texts


@dataclass(frozen=True)
class Run:
    """A run that has finished."""

    folder: Path
    """Of the run, or of its adapter alone."""

    @cached_property
    def results(self) -> Results:
        """``results.json``: accuracies (0 to 1), privacy, bytes, seconds; read once.

        Raises:
            UserError: not there (an adapter folder has none), or not valid.
        """
        return read_results(self.folder)

    @cached_property
    def predictor(self) -> Predictor:
        """The base model with everything that was learnt; loaded once.

        Raises:
            UserError: a file is missing or damaged, or the base model cannot be loaded.
        """
        return load_predictor(find_adapter(self.folder))

    def predict(self, texts: Sequence[str], task: str = "") -> list[Answer | Written]:
        """Return the answer to each text, as ``deal predict`` gives it.

        Args:
            texts: they share passes, which changes scores by rounding.
            task: choose among its labels; empty: among those of all tasks learnt.

        Raises:
            UserError: unknown task; or none, and the model needs one; one string in the place of
                several, or a text that is empty or none; or as of ``predictor``.
        """
        if isinstance(texts, str):
            raise UserError("predict: texts is one string; give a list of texts")
        asked = [text.text for text in typed_texts(texts)]
        self.predictor.check(task)
        return self.predictor.answers(asked, task)


def run(
    config: Config,
    overrides: Mapping[str, Any] | None = None,
    *,
    out: str | Path = "",
    seed: int | None = None,
    engine: str | None = None,
    resume: bool = False,
    listener: Listener | None = None,
) -> Run:
    """Return an experiment's run, finished, as ``deal simulate`` does it, and print nothing: its
    warnings are Python warnings.

    Args:
        config: a name from ``deal ls``, a path, nested tables, or an experiment.
        overrides: dotted keys and their values, such as ``{"federation.rounds": 1}``.
        out: run folder; empty: ``run.out``, or ``runs/NAME-seedN``.
        seed: of the run; None: as configured.
        engine: ``inprocess`` or ``flower``; None: as configured.
        resume: continue the run in the folder.
        listener: called with every event of the run, a mapping as a line of ``metrics.jsonl``.

    Raises:
        UserError: bad input (nothing has started), or a run that cannot go on.
    """
    request = Request(str(config), str(out), (), seed, engine, resume)
    experiment = placed(config, overrides, request)
    with _workers_without_main():
        chosen = prepare(experiment, lambda line: warnings.warn(line, stacklevel=4))
        with claimed(experiment):
            chosen(experiment, listener or (lambda event: None))
    return Run(Path(experiment.run.out))


def load_run(path: str | Path, model: Any = None, tokenizer: Any = None) -> Run:
    """Return a finished run.

    Args:
        path: run folder, or an adapter folder (``RUN/adapter``, here or at a site).
        model: that the run's clients were passed, where they were; else it is known by its name.
        tokenizer: of the model.

    Raises:
        UserError: there is none, or it has not finished.
    """
    folder = at_home(path).resolve()
    find_adapter(folder)
    if model is not None:
        keep(read_model(model, tokenizer))
    return Run(folder)


@contextmanager
def _workers_without_main() -> Iterator[None]:
    """Within the block new worker processes do not import the calling program: it would run once
    more in each of them."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


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
    """Return an experiment (:func:`experiment`) that is ready to run: with a folder, and absolute
    paths."""
    own = find_experiment(str(config)).stem if isinstance(config, (str, Path)) else "python"
    return completed(experiment(config, overrides), request, own)


def _as_lines(values: Mapping[str, Any]) -> list[str]:
    lines = []
    for key, value in values.items():
        if not isinstance(value, (bool, int, float, str, Path, Mapping, Sequence)):
            raise UserError(
                f"overrides: '{key}' is a {type(value).__name__}; use strings, numbers, booleans "
                "and lists"
            )
        lines.append(f"{key}={toml_value(str(value) if isinstance(value, Path) else value)}")
    return lines

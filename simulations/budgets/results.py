"""``budgets.json``: what every budget costs in accuracy, and what the sweep itself would spend."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError, at_home
from deal_core.methods import resolve_auto
from deal_core.privacy.events import LedgerEvent, assumed_honest, composed, unit_of
from deal_core.privacy.ledger import Ledger
from server.results import Privacy, Results, Strict, read_results
from simulations.audit.found import Bound
from simulations.audit.tables import Audit
from simulations.budgets.budget_study import arm_name
from simulations.output.stored import read_stored
from simulations.run.epsilons import named
from simulations.study.grid import Cell
from simulations.study.outcome import outcome
from simulations.study.results import finished
from simulations.study.statistics import estimate


class Mean(Strict):
    """Over seeds; ``half_width`` of the 95 % interval; None: of one seed, which says nothing."""

    mean: float
    half_width: float | None
    n: int


class Point(Strict):
    """One method under one budget; accuracies are 0 to 1.

    Attributes:
        class_incremental: average accuracy among all labels seen so far; None: not known.
        epsilon: the budget; ``inf``: without privacy.
        gain_retained: share of the gain retained (M37), against the same seeds without privacy;
            None: they are not there, or learn nothing.
        spent: largest epsilon of a client's ledger in any seed, over all rounds and tasks, at
            ``delta`` per ``unit``; None: without privacy.
        assumes: whom what was spent takes to be honest; empty in files from before.
        disjoint_tasks: what was spent is that of a record in a single task.
        lower_bound: the largest epsilon that a kind of canaries of the audit has shown, each with
            95 % confidence by itself, at ``lower_bound_delta`` per the same unit; None: no audit.
        class_means: those of ``deal`` answer beside what is trained.
    """

    method: str
    epsilon: str
    seeds: list[int]
    zero_shot: Mean
    average_accuracy: Mean
    class_incremental: Mean | None = None
    forgetting: Mean | None
    worst_client: Mean | None
    gain_retained: Mean | None
    spent: float | None
    delta: float | None
    unit: str | None
    assumes: str = ""
    disjoint_tasks: bool = False
    simulation_only: bool
    lower_bound: float | None = None
    lower_bound_delta: float | None = None
    class_means: bool = False


class Sweep(Strict):
    """What all private runs together would spend, had they had the same real data.

    Attributes:
        runs: private ones that have finished.
        epsilon: composed at ``delta`` per ``unit``, for a record that lies in every run at the
            client that spent most, or for that client; None: nothing private has run, or some
            run has no ledger.
        assumes: whom it takes to be honest; empty in files from before.
        simulation_only: some noise came from a seed.
        without_privacy: runs that protect nothing: had they been trained on the same real data,
            no epsilon at all would hold.
    """

    runs: int
    epsilon: float | None
    delta: float | None
    unit: str | None
    assumes: str = ""
    simulation_only: bool = False
    without_privacy: int


Read = tuple[Cell, Results]
"""A finished cell and its results."""


class Budgets(Strict):
    """Schema of ``budgets.json``; ``wanted`` counts the runs of the whole grid."""

    schema_version: int = 1
    experiment: str
    wanted: int
    finished: int
    points: list[Point]
    sweep: Sweep


def collect(
    experiment: str, cells: Sequence[Cell], epsilons: Sequence[float], audit: Audit | None
) -> Budgets:
    """Return what the finished cells found. Those without accuracies are in no row.

    Raises:
        UserError: a results file that is not valid.
    """
    read = [(cell, _results(cell)) for cell in cells if finished(cell)]
    done = [(cell, found) for cell, found in read if found.accuracy_matrix]
    return Budgets(
        experiment=experiment,
        wanted=len(cells),
        finished=len(done),
        points=list(_points(done, epsilons, audit)),
        sweep=_sweep(read),
    )


def read_audit(folder: str) -> Audit | None:
    """Return the audit in a folder; None: no folder is named.

    Raises:
        UserError: there is none, or it is not valid.
    """
    if not folder:
        return None
    path = at_home(folder) / "audit.json"
    return read_stored(Audit, path, "audit", "see `deal audit`")


def check_unit(audit: Audit, private: Experiment) -> None:
    """Check that an audit attacked what a study protects.

    Args:
        audit: with the unit of its canaries.
        private: the study's experiment under some budget; methods may differ from its own.

    Raises:
        UserError: its canaries were of another unit.
    """
    unit = unit_of(private.privacy) if private.privacy.mechanism != "none" else None
    units = {found.unit for cell in audit.cells for found in cell.trainings}
    for other in units - {None, unit}:
        raise UserError(
            f"--audit: its canaries are each a {other}, but the budgets are of a {unit}; name an "
            "audit with the same privacy.mechanism"
        )


def _points(
    done: Sequence[Read], epsilons: Sequence[float], audit: Audit | None
) -> Iterator[Point]:
    bounds = {cell.epsilon: cell.strongest.bound for cell in audit.cells} if audit else {}
    for method in dict.fromkeys(cell.setting for cell, _ in done):
        own = [(cell, found) for cell, found in done if cell.setting == method]
        free = {cell.seed: found for cell, found in own if cell.arm == arm_name(math.inf)}
        for epsilon in epsilons:
            results = {cell.seed: found for cell, found in own if cell.arm == arm_name(epsilon)}
            if results:
                name = named(epsilon)
                yield _point(method, name, results, free, bounds.get(name))


def _point(
    method: str,
    epsilon: str,
    results: dict[int, Results],
    free: dict[int, Results],
    bound: Bound | None,
) -> Point:
    outcomes = [outcome(each) for each in results.values()]
    privacy = [each.privacy for each in results.values()]
    spent = [value for each in privacy for value in each.epsilon.values()]
    ways = [_way(each, free[seed]) for seed, each in results.items() if seed in free]
    return Point(
        method=method,
        epsilon=epsilon,
        seeds=list(results),
        zero_shot=_required([fmean(o.zero_shot.values()) for o in outcomes]),
        average_accuracy=_required([o.average_accuracy for o in outcomes]),
        class_incremental=_mean([o.among_all_labels for o in outcomes]),
        forgetting=_mean([o.forgetting for o in outcomes]),
        worst_client=_mean([o.worst_client for o in outcomes]),
        gain_retained=_mean(ways),
        spent=max(spent, default=None),
        delta=_largest_delta(privacy),
        unit=privacy[0].unit_text or None,
        assumes=next((each.trust for each in privacy if each.assumes_more), privacy[0].trust),
        disjoint_tasks=any(each.disjoint_tasks for each in privacy),
        simulation_only=any(each.simulation_only for each in privacy),
        lower_bound=bound.epsilon if bound else None,
        lower_bound_delta=bound.delta if bound else None,
        class_means=any(has_class_means(each.config) for each in results.values()),
    )


def has_class_means(experiment: Experiment) -> bool:
    """Return whether class means of ``deal`` answer in a run, as ``auto`` decides."""
    return experiment.method.name == "deal" and resolve_auto(experiment).prototype.enabled == "on"


def _way(private: Results, free: Results) -> float | None:
    start = fmean(free.zero_shot.values())
    reached, best = (
        outcome(private).average_accuracy - start,
        outcome(free).average_accuracy - start,
    )
    return reached / best if best > 0 else None


def _sweep(done: Sequence[Read]) -> Sweep:
    private = [(cell, found.privacy) for cell, found in done if found.privacy.epsilon]
    spent = [_largest_ledger(cell, own) for cell, own in private]
    privacy = [own for _, own in private]
    delta = _largest_delta(privacy)
    together = [event for events in spent for event in events] if all(spent) else []
    return Sweep(
        runs=len(private),
        epsilon=composed(together, delta) if together and delta else None,
        delta=delta,
        unit=privacy[0].unit_text or None if privacy else None,
        assumes=assumed_honest(together) if together else "",
        simulation_only=any(each.simulation_only for each in privacy),
        without_privacy=len(done) - len(private),
    )


def _largest_ledger(cell: Cell, privacy: Privacy) -> list[LedgerEvent]:
    """Return events of the client that spent most in a run; empty: there is none."""
    folder = Path(next(iter(cell.runs.values())).run.out)
    books = [Ledger(folder / "sites" / client) for client in privacy.epsilon]
    held = [book.events() for book in books if book.path.exists()]
    return max(held, key=lambda events: composed(events, privacy.delta or 1.0), default=[])


def _largest_delta(privacy: Sequence[Privacy]) -> float | None:
    return max((each.delta for each in privacy if each.delta is not None), default=None)


def _results(cell: Cell) -> Results:
    return read_results(Path(next(iter(cell.runs.values())).run.out))


def _mean(values: Sequence[float | None]) -> Mean | None:
    known = [value for value in values if value is not None]
    return _required(known) if known else None


def _required(values: Sequence[float]) -> Mean:
    found = estimate(values)
    return Mean(mean=found.mean, half_width=found.half_width, n=found.n)

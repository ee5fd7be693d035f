"""``budgets.md``: the table of a budget study, and what the study itself would spend."""

from __future__ import annotations

from collections.abc import Iterator

from server.results import extent, rounded_up
from simulations.budgets.results import Budgets, Mean, Point, Sweep
from simulations.output.files import DASH, head, row

EXPLANATION = (
    "Accuracies in %, forgetting in points: mean ± half width of the 95 % interval (Student's t "
    "over seeds; one seed has no interval). Gain retained: of the gain over zero-shot of the same "
    "seeds without privacy. Epsilon: the budget of a run, at the delta and per the unit of what "
    "was spent. Spent: the largest of a client's ledger in any seed. "
    "Lower bound: the largest that a kind of canaries of an audit has shown, each with 95 % "
    "confidence by itself, over all rounds and tasks of the audited run."
)
MEANS_APART = (
    "Class means answer as well where there is no privacy, from class sums with less noise "
    '(`method.prototype.enabled = "auto"`): of the gain without privacy a part is theirs, and of '
    "what is lost a part is not that of the steps."
)
ALL_LABELS = "all labels"
ALL_LABELS_EXPLAINED = (
    " All labels: average accuracy among the labels of all tasks, the task not told."
)
HEAD = (
    "epsilon",
    "n",
    "average accuracy",
    ALL_LABELS,
    "forgetting",
    "worst client",
    "gain retained",
    "spent",
    "lower bound",
)


def markdown(budgets: Budgets) -> str:
    """Return the whole page."""
    known = any(point.class_incremental is not None for point in budgets.points)
    more = ALL_LABELS_EXPLAINED if known else ""
    lines = [f"# Budgets of {budgets.experiment}", ""]
    lines += [f"{budgets.finished} of {budgets.wanted} runs done. {EXPLANATION}{more}", ""]
    for method in dict.fromkeys(point.method for point in budgets.points):
        points = [point for point in budgets.points if point.method == method]
        lines += [f"## {method}", "", *budget_table(points, known)]
    lines += ["## The sweep itself", "", sweep_text(budgets.sweep)]
    return "\n".join(lines) + "\n"


def budget_table(points: list[Point], among_all: bool) -> Iterator[str]:
    """Yield the table of one method, and what its epsilons mean.

    Args:
        points: of the method.
        among_all: whether accuracy among all labels is known of some method.
    """
    yield from (*_table(points, among_all), "", *_guarantees(points))
    if len({point.class_means for point in points}) > 1:
        yield MEANS_APART
        yield ""


def _table(points: list[Point], among_all: bool) -> Iterator[str]:
    names = [name for name in HEAD if among_all or name != ALL_LABELS]
    yield from head(*names)
    longest = max(points, key=lambda point: point.zero_shot.n)
    zero = longest.zero_shot
    yield row("0 (zero-shot)", str(zero.n), _percent(zero), *[DASH] * (len(names) - 3))
    for point in points:
        yield row(
            "inf (no privacy)" if point.epsilon == "inf" else point.epsilon,
            str(point.average_accuracy.n),
            _percent(point.average_accuracy),
            *([_percent(point.class_incremental)] if among_all else []),
            _percent(point.forgetting),
            _percent(point.worst_client),
            _percent(point.gain_retained, " %"),
            _spent(point),
            _shown(point),
        )


def _spent(point: Point) -> str:
    return DASH if point.spent is None or point.delta is None else rounded_up(point.spent, 3)


def _shown(point: Point) -> str:
    return DASH if point.lower_bound is None else f"≥ {point.lower_bound:.2f}"


def _guarantees(points: list[Point]) -> Iterator[str]:
    """Yield what the epsilons of a table mean, each meaning once: a line and an empty one."""
    units = [point.unit for point in points if point.unit]
    told: dict[str, list[str]] = {}
    for point in points:
        for text in (spent_meaning(point), bound_meaning(point, units[0] if units else "")):
            if text:
                told.setdefault(text, []).append(point.epsilon)
    for text, budgets in told.items():
        kind = text.partition(":")[0]
        several = sum(other.startswith(f"{kind}:") for other in told) > 1
        which = f" (budgets {', '.join(budgets)})" if several else ""
        yield text.replace(":", f"{which}:", 1)
        yield ""


def spent_meaning(point: Point) -> str:
    """Return what an epsilon spent means; empty: none was."""
    if point.spent is None or point.delta is None:
        return ""
    seeded = "; simulation only: the noise came from a seed" if point.simulation_only else ""
    trusted = f"; {point.assumes or 'whom it assumes honest was not recorded'}"
    return (
        f"Spent: epsilon at delta = {rounded_up(point.delta, 2)} per {point.unit}, over "
        f"{extent(point.disjoint_tasks)}{trusted}{seeded}."
    )


def bound_meaning(point: Point, unit: str) -> str:
    """Return what a lower bound is of; empty: there is none.

    Args:
        point: under one budget, perhaps without privacy.
        unit: of privacy, of the study.
    """
    if point.lower_bound is None:
        return ""
    of_what = f" per {unit}" if unit else ""
    delta = rounded_up(point.lower_bound_delta or 0.0, 2)
    return f"Lower bound: on epsilon at delta = {delta}{of_what}, of the audit's own experiment."


def sweep_text(sweep: Sweep) -> str:
    """Return what the choice of a budget would cost, if it were made on real data."""
    if not sweep.runs:
        return "No private run has finished: there is nothing to compose."
    if sweep.epsilon is None or sweep.delta is None:
        whole = f"The {sweep.runs} private runs have no common ledger to compose."
    else:
        whole = (
            f"Every run is a release of its own. On the same real data the {sweep.runs} private "
            f"runs of this sweep would together spend epsilon = {rounded_up(sweep.epsilon, 3)} at "
            f"delta = {rounded_up(sweep.delta, 2)} per {sweep.unit}, composed over all rounds, "
            f"tasks, seeds, methods and budgets, for a {sweep.unit} that lies in every run at the "
            f"client that spent most{_trust(sweep)}."
        )
    if sweep.without_privacy:
        whole += (
            f" The {sweep.without_privacy} runs without privacy protect nothing: with them, no "
            "epsilon holds at all."
        )
    return f"{whole} So choose a budget on public data."


def _trust(sweep: Sweep) -> str:
    seeded = "; simulation only" if sweep.simulation_only else ""
    return f"{f'; {sweep.assumes}' if sweep.assumes else ''}{seeded}"


def _percent(found: Mean | None, unit: str = "") -> str:
    if found is None:
        return DASH
    width = "" if found.half_width is None else f" ± {100 * found.half_width:.1f}"
    return f"{100 * found.mean:.1f}{width}{unit}"

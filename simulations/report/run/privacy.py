"""Privacy: what is promised to whom, and what every site has spent of its limit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from deal_core.config.experiment import Experiment, PrivacyConfig
from deal_core.privacy.events import GROUP, unit_text
from deal_core.protection import make_mechanism, mechanism_of
from server.measures import clients_that_spend
from server.results import OUTSIDE, VOID, extent, rounded_up, whole_extent, whole_trust
from simulations.report.charts.drawings import Dot, Level, dots
from simulations.report.page.blocks import (
    Block,
    Cell,
    Facts,
    Figure,
    Notice,
    Section,
    Table,
    Text,
    at_most,
    decimal,
    pointer,
)
from simulations.report.run.record import RunRecord
from simulations.run.summary import large_delta

NOTHING = (
    "No mechanism protects the updates. No text leaves its client, but an adapter may tell of the "
    "records that it was trained on: no epsilon holds. The experiment private shows how to change "
    "that."
)
DRAWN = 40


@dataclass(frozen=True)
class Spent:
    """What one client has spent; ``source`` points to it in ``results.json``."""

    client: str
    epsilon: float
    delta: float
    disjoint_tasks: bool
    simulation_only: bool
    void: bool
    assumes_more: bool
    source: str


def privacy(run: RunRecord) -> Section:
    """Return the section."""
    return Section("privacy", "Privacy", tuple(_blocks(run)))


def _blocks(run: RunRecord) -> Iterator[Block]:
    config = run.experiment.privacy
    if config.mechanism == "none":
        yield Notice(NOTHING, "warn")
        return
    spent = spendings(run)
    if any(each.simulation_only for each in spent):
        yield Notice(
            "Simulation only: noise came from a seed, so that the run can be repeated. Whoever "
            "knows the seed can take the noise off: nothing is guaranteed."
        )
    if any(each.void for each in spent):
        yield Notice(f"The epsilon is {VOID}.")
    if run.results is not None and (warning := large_delta(run.results.privacy)):
        yield Notice(warning[0].upper() + warning[1:] + ".")
    yield Text(statement(run, spent))
    if spent:
        yield _figure(run, spent)
    yield Facts(tuple(_facts(run.experiment)))
    if config.metrics in OUTSIDE:
        yield Notice(
            f"Counts of right answers on test records left {OUTSIDE[config.metrics]}: they are "
            "outside of the guarantee."
        )


def spendings(run: RunRecord) -> list[Spent]:
    """Return what is known of every client, from the results or else from the log."""
    found = []
    logged = {log.name: log.spent for log in run.log.clients.values() if log.spent is not None}
    told = run.results.privacy if run.results else None
    if told is not None and told.delta is not None:
        for number, epsilon in told.epsilon.items():
            name, source = run.log.name(number), pointer("privacy", "epsilon", number)
            flags = (told.disjoint_tasks, told.simulation_only, told.void, told.assumes_more)
            found.append(Spent(name, epsilon, told.delta, *flags, source))
        return found
    for name, own in logged.items():
        flags = (own.disjoint_tasks, own.simulation_only, own.void, own.assumes_more)
        found.append(Spent(name, own.epsilon, own.delta, *flags, ""))
    return found


def statement(run: RunRecord, spent: list[Spent]) -> str:
    """Return the guarantee in words: no epsilon without delta, unit, extent and trust."""
    if not spent:
        return f"Mechanism {run.experiment.privacy.mechanism}; no spending is recorded."
    largest = max(each.epsilon for each in spent)
    delta = max(each.delta for each in spent)
    clients = clients_that_spend(run.experiment)
    who = "Every client" if len(spent) >= clients else f"Each of the {len(spent)} that tell it"
    assumes = mechanism_of(run.experiment).assumes(run.experiment.privacy)
    over = whole_extent(any(each.disjoint_tasks for each in spent))
    trust = whole_trust(assumes, any(each.assumes_more for each in spent))
    times = run.results.privacy.times if run.results else ""
    return (
        f"{who} has spent at most epsilon = {rounded_up(largest, 4)} at delta = "
        f"{rounded_up(delta, 3)}{times} per {unit_of_run(run.experiment)}, composed over {over}, "
        f"as each last told. Trust: {trust}."
    )


def unit_of_run(experiment: Experiment) -> str:
    """Return what an epsilon of a run protects, in words; the column of groups included."""
    unit = make_mechanism(experiment).unit or "record"
    return unit_text(unit, experiment.privacy.unit_column if unit == GROUP else "")


def _figure(run: RunRecord, spent: list[Spent]) -> Figure:
    limit = run.experiment.privacy.target_epsilon
    delta = max(each.delta for each in spent)
    unit = unit_of_run(run.experiment)
    ordered = sorted(spent, key=lambda each: -each.epsilon)
    rows = [Dot(f"client {each.client}", each.epsilon) for each in ordered[:DRAWN]]
    name = f"epsilon at delta = {rounded_up(delta, 2)} per {unit}"
    return Figure(
        "Epsilon spent by each client against the experiment's limit. At a site, its own policy "
        "may set a lower one, which the server does not know.",
        dots(
            "epsilon",
            f"Epsilon of {len(rows)} clients against the limit {limit:g}",
            rows,
            name,
            [Level(limit, "limit")],
            from_zero=True,
        ),
        spending_table(run, spent),
    )


def spending_table(run: RunRecord, spent: list[Spent]) -> Table:
    """Return a row for each client."""
    limit = run.experiment.privacy.target_epsilon
    unit = unit_of_run(run.experiment)
    rows = tuple(
        (
            each.client,
            at_most(each.epsilon, 4, each.source),
            decimal(limit, 4),
            at_most(each.delta, 3),
            unit,
            extent(each.disjoint_tasks),
        )
        for each in spent
    )
    columns = ("client", "epsilon spent", "limit", "delta", "unit", "composed over")
    return Table("Spending of each client", columns, rows, words=(4, 5))


def _delta(config: PrivacyConfig) -> str:
    """Return at which delta the limit of an experiment holds, in words."""
    if config.target_delta:
        return f"delta = {config.target_delta:g}"
    return "the client's own delta"


def _facts(experiment: Experiment) -> Iterator[tuple[str, Cell]]:
    config = experiment.privacy
    yield "mechanism", MECHANISMS.get(config.mechanism, config.mechanism)
    unit = unit_of_run(experiment)
    yield "unit of privacy", unit
    whose = "all that a client's ledger holds"
    limit = f"epsilon = {config.target_epsilon:g} for {whose}, at {_delta(config)}, per {unit}"
    yield "limit of the experiment", limit
    yield "assumed honest", mechanism_of(experiment).assumes(config)
    yield "clipping bound of a gradient", decimal(config.max_grad_norm)
    yield "counts of right answers leave", config.metrics


MECHANISMS = {
    "record": "record: each example's gradient is clipped and noise is added, at the client",
}

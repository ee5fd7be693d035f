"""One private release as a ledger holds it, what releases cost together, and the budget that they
must be within; releases of one unit of privacy alone are added up.

The unit is what two neighbouring data sets differ by:

* ``record``: one record of a site, there or not.
* ``group``: all records of a site with one value of a column, such as those of a patient.

An epsilon of one unit says nothing of another. A group of many records loses more in releases that
hide single records. And one record, where its group stays, moves a clipped sum of groups by up to
twice the bound. So what was released for records and for groups, or for groups of two columns, is
never added up.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deal_core.config.privacy import PrivacyConfig
from deal_core.errors import UserError
from deal_core.privacy.accountant import DpEvent, adaptive_epsilon, epsilon_of
from deal_core.privacy.policy import BudgetSpent

RECORD, GROUP = "record", "group"
Unit = tuple[str, str]
"""A unit of privacy, and the column that makes it; no column: empty."""


class MixedUnits(UserError):
    """Releases of several units of privacy: no epsilon covers them together."""


def unit_of(privacy: PrivacyConfig) -> str:
    """Return what mechanism ``record`` protects under these settings."""
    return GROUP if privacy.unit_column else RECORD


def unit_text(unit: str, column: str) -> str:
    """Return a unit in words, as it follows 'per'."""
    return f"{unit} of '{column}'" if column else unit


def common_unit(units: Iterable[Unit]) -> Unit:
    """Return the one unit that an epsilon of all these protected releases, at least one, is of.

    Raises:
        MixedUnits: releases of records and of groups, or of groups of two columns.
    """
    first, *others = sorted(set(units))
    if others:
        one, other = unit_text(*first), unit_text(*others[0])
        raise MixedUnits(
            f"the ledger holds releases per {one} and per {other}, which cannot be added up: "
            "keep to the unit that it began with (privacy.unit_column, at a site "
            "policy.unit_column)"
        )
    return first


SET_ASIDE = 0.05
"""Part of delta for what several runs release: the settings of a later one may follow from what an
earlier one has released, and then other bounds hold. The rest is for one run."""
ROUNDING = 1e-9
"""Relative; a budget is not passed by the last bit."""


@dataclass(frozen=True)
class LedgerEvent:
    """One private release, or, of what a run plans, all of a kind."""

    run: str
    """Name of the run that asked: a hash of its settings, and at a site the run's own name."""
    task: str
    """Empty: of all tasks."""
    mechanism: str
    """``record``; of what left without protection ``none``, ``clear-counts`` or ``verdict``."""
    unit: str
    """What a neighbour differs by (see the module)."""
    sample_rate: float
    noise_multiplier: float
    """0: nothing was hidden."""
    steps: int
    phase: str = ""
    stage: int = 0
    server_round: int = 0
    max_grad_norm: float = 0.0
    """Clipping bound; for the ledger's reader, it costs nothing."""
    delta: float = 0.0
    """At which the budget was checked."""
    simulation_only: bool = False
    """The noise came from a seed: nothing is guaranteed."""
    slack: float = 0.0
    """What a step costs beyond the mechanism, because its noise is not quite that."""
    assumes: str = ""
    """Whom the noise takes to be honest; empty: nobody outside the site."""
    unit_column: str = ""
    """Whose values make the groups, where the unit is a group."""
    compared: bool = False
    """The records of its task were compared with those of other tasks before it was charged, and
    none was in two; what was not is of records that may be in any task."""

    @property
    def protected(self) -> bool:
        """Whether a mechanism has hidden anything: an unprotected release costs no epsilon, it
        voids every one that is told of its records."""
        return self.noise_multiplier > 0

    @property
    def spent(self) -> DpEvent:
        """What it costs; of an unprotected release no epsilon is large enough, a ValueError."""
        return DpEvent(self.sample_rate, self.noise_multiplier, self.steps)


CLEAR_COUNTS = "clear-counts"
"""In the place of a mechanism: counts of right answers on test records, as they are."""
VERDICT = "verdict"
"""Likewise: the bit that says what held-back training records make of new class means."""


def unprotected_event(run: str, mechanism: str, place: tuple[str, str, int, int]) -> LedgerEvent:
    """Return a release of a run that no mechanism has protected, an update (``none``),
    ``clear-counts`` or ``verdict``, of a task, phase, stage and round."""
    task, phase, stage, server_round = place
    return LedgerEvent(run, task, mechanism, "none", 1.0, 0.0, 1, phase, stage, server_round)


@dataclass(frozen=True)
class Budget:
    """What charges are checked against: ``epsilon`` at ``delta``."""

    epsilon: float
    delta: float
    disjoint_tasks: bool = False
    """Whether tasks compose in parallel."""
    most: int | None = None
    """So many releases of its kind has the run planned in a task, and it has no more; None: as many
    as fit."""
    any_choice: bool = False
    """Less than the run was planned for, so that what uses it up may follow from what was
    released."""


KEEPER_ALONE = "nobody but the keeper of this ledger is trusted"


def assumed_honest(events: Sequence[LedgerEvent]) -> str:
    """Return whom an epsilon of all protected events together takes to be honest, in words: all
    that one of them does."""
    counted = {(event.assumes, event.run) for event in events if event.protected and event.assumes}
    found = sorted({assumes for assumes, _ in counted})
    if not found:
        return KEEPER_ALONE
    runs = len({run for _, run in counted})
    which = f", of the {runs} runs that count on others each its own" if runs > 1 else ""
    return f"assumed honest{which}: {'; and: '.join(found)}"


def assumes_more(events: Sequence[LedgerEvent], trust: str, run: str) -> bool:
    """Return whether an epsilon of all protected events counts on others than ``trust`` says, in
    this ``run``: the sites of another run are others."""
    return any(
        event.protected and event.assumes and (event.run, event.assumes) != (run, trust)
        for event in events
    )


def is_void(events: Sequence[LedgerEvent]) -> bool:
    """Return whether something made of training records has left without protection: for these no
    epsilon holds."""
    return any(not event.protected and event.mechanism != CLEAR_COUNTS for event in events)


def composed(
    events: Sequence[LedgerEvent],
    delta: float,
    disjoint_tasks: bool = False,
    any_choice: bool = False,
) -> float:
    """Return the epsilon of all protected events together: of one record (or group), whatever tasks
    it is in, or, with ``disjoint_tasks``, of one that is in a single task, as far as records were
    compared: other events count in every task. It is void for records of which something has left
    unprotected (:attr:`LedgerEvent.protected`).

    Of one run everything is fixed before its first release, so that its losses compose exactly; of
    several the later may follow from the earlier, and what they spend adds up in a way that holds
    for any choice. The two have parts of delta, so that their sum holds for who chooses whether
    there is a second run (docs/method.md, section 8). ``any_choice``: of one run as well.

    Raises:
        MixedUnits: some events are of records and some of groups.
    """
    events = [event for event in events if event.protected]
    if events:
        common_unit((event.unit, event.unit_column) for event in events)
    if not disjoint_tasks:
        return _epsilon_with_slack(events, delta, any_choice)
    each = (
        [e for e in events if e.task in ("", task) or not e.compared]
        for task in {e.task for e in events}
    )
    return max((_epsilon_with_slack(some, delta, any_choice) for some in each), default=0.0)


def _epsilon_with_slack(events: Sequence[LedgerEvent], delta: float, any_choice: bool) -> float:
    """Return the mechanisms' epsilon with the slack of all steps: of densities that differ by a
    factor ``exp(s)`` in all, epsilon grows by ``s`` and delta by that factor."""
    slack = math.fsum(event.steps * event.slack for event in events)
    several = any_choice or len({event.run for event in events}) > 1
    of, part = (adaptive_epsilon, SET_ASIDE) if several else (epsilon_of, 1 - SET_ASIDE)
    return of((event.spent for event in events), part * delta * math.exp(-slack)) + slack


def require_within(events: Sequence[LedgerEvent], budget: Budget) -> None:
    """Check that all events together, the last one new, are within a budget, and that the last is
    one of those that its run has planned: which tasks' rounds use a budget up is not to follow from
    what was released.

    Raises:
        BudgetSpent: they are not, or the run has planned fewer like the last.
        MixedUnits: some are of records and some of groups.
    """
    last = events[-1]
    alike = (last.run, last.task, last.mechanism)
    given = sum((each.run, each.task, each.mechanism) == alike for each in events)
    if budget.most is not None and given > budget.most:
        raise BudgetSpent(
            f"the plan of this run has {budget.most} rounds of task '{last.task}', and they are "
            "over"
        )
    require_standing(events, budget)


def require_standing(events: Sequence[LedgerEvent], budget: Budget) -> None:
    """Check that events, at least one, are within a budget: all of them may be charged already, and
    the budget be one of today.

    Raises:
        BudgetSpent: they are not.
        MixedUnits: some are of records and some of groups.
    """
    epsilon = composed(events, budget.delta, budget.disjoint_tasks, budget.any_choice)
    unit = unit_text(events[-1].unit, events[-1].unit_column)
    if epsilon > budget.epsilon * (1 + ROUNDING):
        raise BudgetSpent(
            f"with this release epsilon would be {epsilon:.4g}, past {budget.epsilon:.4g} at "
            f"delta = {budget.delta:.3g} per {unit}, composed over all that the ledger "
            f"holds{', tasks in parallel' if budget.disjoint_tasks else ''}; "
            f"{assumed_honest(events)}"
        )

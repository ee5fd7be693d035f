"""What a run will release, planned before its first release, and the noise that makes it fit.

A multiplier that fits the budget of one round spends it again in the next. So the site counts
ahead: every round of every task, on top of what its ledger holds. The multiplier that makes the sum
fit is the plan's, once and for all.

Where noise is in the sum of all sites, shares make up a whole only where all are of one size. So
the multiplier follows from the experiment alone, whatever a site's ledger holds: each site solves
the same, and then looks whether what it has spent before leaves room.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

from pydantic import BaseModel, ConfigDict
from scipy.optimize import brentq

from deal_core.config.privacy import PrivacyConfig
from deal_core.errors import UserError
from deal_core.privacy.accountant import DpEvent, epsilon_of
from deal_core.privacy.distributed_noise import slack_of, trust_in_sum
from deal_core.privacy.events import COUNTS, SET_ASIDE, Budget, LedgerEvent
from deal_core.privacy.interface import UpdateRequest
from deal_core.privacy.policy import Policy, in_sum
from deal_core.wire.instruction import LEARN

NARROWEST = 1e-4
"""Relative width of the interval that a multiplier is known to."""
LEAST_NOISE, MOST_NOISE = 0.1, 64.0
"""Multipliers: below the first nothing is hidden; above the last nothing is learnt, and an update
would only do harm."""
METRICS_NOISE = 10.0
"""Noise multiplier of counts that leave with noise; of one evaluation of all tasks."""
TINY = 1e-12
MOST_ENTRIES = 1_000_000
"""Of the class sums of a task, where a plan is made: what it costs that noise is discrete."""


class ReleaseSchedule(BaseModel):
    """What one task takes.

    Attributes:
        task: its name.
        records: how many the site has of it.
        rounds: in which it is worked on, to learn it.
        sample_rate: of every step.
        steps: of every round.
        sums: class sums beside them, with noise of their own.
    """

    model_config = ConfigDict(frozen=True)

    task: str
    records: int
    rounds: int
    sample_rate: float
    steps: int
    sums: int = 0


class PrivacyPlan(BaseModel):
    """What a site will do in a run; decided once, and kept in its ledger.

    Attributes:
        noise_multiplier: of every step of the run.
        epsilon, delta: the budget that it was solved for, past included.
        disjoint_tasks: how tasks compose.
        max_grad_norm: clipping bound.
        work: tasks with their rates.
        units: records (or groups) of the site, over all its tasks, when it was made.
    """

    model_config = ConfigDict(frozen=True)

    noise_multiplier: float
    epsilon: float
    delta: float
    disjoint_tasks: bool
    max_grad_norm: float
    work: tuple[ReleaseSchedule, ...]
    units: int = 0

    def records(self, task: str) -> int:
        """Number of the task's records (or groups) that the plan was made for."""
        return next(work.records for work in self.work if work.task == task)

    def rounds(self, task: str) -> int:
        """Number of rounds of a task that the plan was made for."""
        return next((work.rounds + work.sums for work in self.work if work.task == task), 0)

    def budget(self, policy: Policy | None) -> Budget:
        """What every charge is checked against: the policy may have become tighter since."""
        if policy is None:
            return Budget(self.epsilon, self.delta, self.disjoint_tasks)
        epsilon = min(self.epsilon, policy.max_epsilon or self.epsilon)
        delta = min(self.delta, policy.max_delta or self.delta)
        disjoint = self.disjoint_tasks and policy.disjoint_tasks
        planned = (self.epsilon, self.delta, self.disjoint_tasks)
        return Budget(
            epsilon=epsilon,
            delta=delta,
            disjoint_tasks=disjoint,
            any_choice=(epsilon, delta, disjoint) != planned,
        )


@dataclass(frozen=True)
class RunSchedule:
    """What a run asks of a site, at most.

    Attributes:
        work: of every task.
        evaluations: of all tasks.
        sums_noise: multiplier of class sums that are taken beside learning; 0: there are none.
        common_noise: multiplier of a round where all sites make the noise of a sum together; 0:
            each site solves its own.
    """

    work: tuple[ReleaseSchedule, ...]
    evaluations: int
    sums_noise: float = 0.0
    common_noise: float = 0.0


class NoFeasibleNoise(Exception):
    """No multiplier that is of use makes it fit."""


def solve_noise_multiplier(epsilon_with: Callable[[float], float], target_epsilon: float) -> float:
    """Return the smallest noise multiplier, to 1e-4, at which the whole stays within the target.

    Args:
        epsilon_with: epsilon of everything, past included, with a multiplier for what is planned.
        target_epsilon: at the same delta.

    Raises:
        NoFeasibleNoise: the past leaves nothing, or nothing that could be learnt with.
    """
    low, high = LEAST_NOISE, 1.0
    while epsilon_with(high) > target_epsilon:
        low, high = high, 2 * high
        if high > MOST_NOISE:
            raise NoFeasibleNoise

    def excess(logarithm: float) -> float:
        """Nearly a straight line."""
        return math.log(max(epsilon_with(math.exp(logarithm)), TINY) / target_epsilon)

    if epsilon_with(low) <= target_epsilon:
        return low
    found = math.exp(brentq(excess, math.log(low), math.log(high), xtol=NARROWEST / 4))
    while epsilon_with(found) > target_epsilon:
        found *= 1 + NARROWEST / 2
    return min(found, high)


@lru_cache(maxsize=64)
def noise_of_sums(sums: int, epsilon: float, delta: float) -> float:
    """Return the multiplier of so many class sums of a record that cost epsilon together.

    Raises:
        NoFeasibleNoise: no multiplier that is of use fits.
    """

    def epsilon_with(noise_multiplier: float) -> float:
        return epsilon_of([DpEvent(1.0, noise_multiplier, sums)], (1 - SET_ASIDE) * delta)

    return solve_noise_multiplier(epsilon_with, epsilon)


@lru_cache(maxsize=64)
def noise_of_rounds(
    rate: float, steps: int, sums: int, counts: int, epsilon: float, delta: float, sums_noise: float
) -> float:
    """Return the multiplier of so many steps of a record that cost epsilon, together with what is
    beside them.

    Args:
        rate: of every step.
        steps: of all rounds.
        sums: class sums of multiplier ``sums_noise``.
        counts: evaluations whose counts have noise.
        epsilon: of the whole, at ``delta``.
        delta: of the budget.
        sums_noise: 0: there are no class sums.

    Raises:
        NoFeasibleNoise: no multiplier that is of use fits.
    """

    def epsilon_with(noise_multiplier: float) -> float:
        spent = [DpEvent(rate, noise_multiplier, steps)]
        spent += [DpEvent(1.0, METRICS_NOISE, counts)] if counts else []
        spent += [DpEvent(1.0, sums_noise, sums)] if sums_noise else []
        return epsilon_of(spent, (1 - SET_ASIDE) * delta)

    return solve_noise_multiplier(epsilon_with, epsilon)


def sensitivity(tasks: int, counts: int) -> float:
    """Return how far one record, or group, moves so many ``counts`` of so many tasks, which may all
    have it."""
    return math.sqrt(counts * tasks)


@dataclass(frozen=True)
class RecordEvents:
    """Events of a run as a ledger holds them.

    Attributes:
        privacy: settings of the run.
        unit: of privacy.
        run: its name in a ledger.
        shares: of so many sites the noise of a sum makes up the whole.
        at_server: whether a round is one sum, for a step at the server.
    """

    privacy: PrivacyConfig
    unit: str
    run: str
    shares: int
    at_server: bool

    def planned(
        self,
        work: ReleaseSchedule,
        noise_multiplier: float,
        delta: float,
        bound: float,
        entries: int = 0,
    ) -> LedgerEvent:
        """Return all rounds of a task as one event."""
        return LedgerEvent(
            run=self.run,
            task=work.task,
            phase="",
            stage=0,
            server_round=0,
            mechanism="record",
            unit=self.unit,
            sample_rate=work.sample_rate,
            noise_multiplier=noise_multiplier,
            steps=work.rounds * work.steps,
            max_grad_norm=bound,
            delta=delta,
            simulation_only=False,
            slack=self._slack(noise_multiplier, entries) if entries else 0.0,
            unit_column=self.privacy.unit_column,
            compared=True,  # where tasks compose in parallel, before each charge
        )

    def planned_sums(self, work: ReleaseSchedule, noise: float, delta: float) -> LedgerEvent:
        """Return the class sums of a task that are taken beside learning, as one event."""
        rounds = work.model_copy(update={"rounds": work.sums, "steps": 1, "sample_rate": 1.0})
        event = self.planned(rounds, noise, delta, self.privacy.max_grad_norm)
        return replace(event, slack=slack_of(noise, self.shares, MOST_ENTRIES))

    def planned_counts(self, evaluations: int, delta: float) -> LedgerEvent:
        """Return all evaluations as one event."""
        work = ReleaseSchedule(task="", records=0, rounds=evaluations, sample_rate=1.0, steps=1)
        return self.planned(work, METRICS_NOISE, delta, sensitivity(1, 1))

    def update(
        self,
        ask: UpdateRequest,
        seeded: bool,
        plan: PrivacyPlan,
        policy: Policy | None,
        sums_noise: float,
    ) -> LedgerEvent:
        """Return the ledger's event of a round.

        Args:
            ask: what is asked.
            seeded: whether its noise is.
            plan: of the run.
            policy: of the site.
            sums_noise: multiplier of class sums beside learning.

        Raises:
            UserError: of a task that was not planned.
        """
        work = next((w for w in plan.work if w.task == ask.task), None)
        if work is None:
            raise UserError(f"task '{ask.task}' is not in the plan of this run")
        rate, steps, noise = work.sample_rate, work.steps, plan.noise_multiplier
        beside = ask.statistics is not None and ask.phase != LEARN
        if beside:
            rate, steps, noise = 1.0, 1, sums_noise
        return LedgerEvent(
            run=self.run,
            task=ask.task,
            phase=ask.phase,
            stage=ask.stage,
            server_round=ask.server_round,
            mechanism="record",
            unit=self.unit,
            sample_rate=rate,
            noise_multiplier=noise,
            steps=steps,
            max_grad_norm=plan.max_grad_norm,
            delta=plan.delta,
            simulation_only=seeded,
            slack=self._slack(noise, ask.entries, beside),
            assumes=trust_in_sum(self.privacy, policy) if in_sum(self.privacy) else "",
            unit_column=self.privacy.unit_column,
        )

    def counting(self, ask: UpdateRequest, seeded: bool, plan: PrivacyPlan) -> LedgerEvent:
        """Return one evaluation of the tasks that are asked for."""
        return LedgerEvent(
            run=self.run,
            task="",
            phase=ask.phase,
            stage=ask.stage,
            server_round=ask.server_round,
            mechanism=COUNTS,
            unit=self.unit,
            sample_rate=1.0,
            noise_multiplier=METRICS_NOISE,
            steps=1,
            max_grad_norm=sensitivity(ask.evaluated, len(ask.counted)),
            delta=plan.delta,
            simulation_only=seeded,
            unit_column=self.privacy.unit_column,
        )

    def _slack(self, noise_multiplier: float, entries: int, summed: bool = False) -> float:
        """Of a round; 0 where a site takes steps of its own, unless records are ``summed``."""
        if not self.at_server and not summed:
            return 0.0
        return slack_of(noise_multiplier, self.shares, entries)

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
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

from pydantic import BaseModel, ConfigDict

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from deal_core.methods import Phase, method_of, sums_beside_learning
from deal_core.privacy.accountant import DpEvent, epsilon_of
from deal_core.privacy.events import SET_ASIDE, Budget
from deal_core.privacy.policy import Policy, at_server
from deal_core.wire.instruction import LEARN

NARROWEST = 1e-4
"""Relative width of the interval that a multiplier is known to."""
LEAST_NOISE, MOST_NOISE = 0.1, 64.0
"""Multipliers: below the first nothing is hidden; above the last nothing is learnt, and an update
would only do harm."""
METRICS_NOISE = 10.0
"""Noise multiplier of counts that leave with noise; of one evaluation of all tasks."""
SUMS_SHARE = 0.5
"""Of the target epsilon that class sums beside learning may cost, taken by themselves."""
NOMINAL_DELTA = 1e-5
"""Where an experiment names no delta; it decides how much noise there is, not what it costs."""
ROOM = 1e-3
"""Share of the target that is left for the slack of noise in a sum."""


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


class NoFeasibleNoise(Exception):
    """No multiplier that is of use makes it fit."""


def planned_work(
    experiment: Experiment, phases: Sequence[Phase], records: Mapping[str, int]
) -> list[ReleaseSchedule]:
    """Return what a client may be asked to do, at most.

    A client that is not sampled, or has fewer tasks than there are, will spend less.

    Args:
        experiment: rounds, epochs, batch size and sample rate.
        phases: of the method, beside learning.
        records: task to the number of the client's own records, all tasks of the stream; none is
            a number like others.
    """
    stream, learning = experiment.stream, experiment.federation.rounds
    sums = sum(phase.rounds for phase in phases if phase.name != LEARN)
    rates = sample_rates(experiment, records)
    return [
        ReleaseSchedule(
            task=task,
            records=records[task],
            rounds=learning * stream.times(task),
            sample_rate=rates[task],
            steps=steps_of(rates[task], experiment),
            sums=sums,
        )
        for task in records
    ]


def evaluations(experiment: Experiment, tasks: int) -> int:
    """How often all tasks are evaluated: at the start, and after every stage."""
    stream, rounds = experiment.stream, experiment.federation.rounds
    until = max([0, *stream.joins.values()]) + rounds * stream.turns(tasks)
    return 1 + math.ceil(until / (stream.consolidate_every or rounds))


def sample_rates(experiment: Experiment, records: Mapping[str, int]) -> dict[str, float]:
    """Return task to sample rate. Where steps are taken at the server all sites have one, 1 unless
    told otherwise. A task without records is sampled like an average one: that there
    are none must not show."""
    if experiment.privacy.sample_rate or at_server(experiment):
        return dict.fromkeys(records, experiment.privacy.sample_rate or 1.0)
    mean = sum(records.values()) / max(1, len(records))
    batch = experiment.train.batch_size
    return {task: min(1.0, batch / max(n or mean, 1)) for task, n in records.items()}


def steps_of(rate: float, experiment: Experiment) -> int:
    """Return the steps of a round: so many that a record is seen ``local_epochs`` times on average,
    at least; one where it is taken at the server."""
    if at_server(experiment):
        return 1
    return experiment.federation.local_epochs * math.ceil(1 / rate - 1e-9)


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
    while high / low > 1 + NARROWEST:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if epsilon_with(middle) <= target_epsilon else (middle, high)
    return high


def common_noise_multiplier(experiment: Experiment, tasks: int) -> float:
    """Return the multiplier of every round of a run, of the sum over all sites.

    What rounding and the shape of the noise cost beside it (the slack of an event) is not in it;
    the budget is met without it to 1e-3.

    Args:
        experiment: rounds, rate, target epsilon and delta.
        tasks: of the run.

    Raises:
        UserError: no target delta, which sites could each choose otherwise.
        NoFeasibleNoise: no multiplier that is of use fits.
    """
    privacy = experiment.privacy
    if not privacy.target_delta:
        raise UserError(
            'privacy.noise_share = "sum" needs one delta for all sites; set privacy.target_delta'
        )
    noised = privacy.metrics == "noised"
    counts = evaluations(experiment, tasks) if noised else 0
    times = 1 if privacy.disjoint_tasks else tasks
    return _solved(
        privacy.sample_rate or 1.0,
        experiment.federation.rounds * times,
        times,
        counts,
        privacy.target_epsilon * (1 - ROOM),
        privacy.target_delta,
        sums_noise_multiplier(experiment, tasks),
    )


def sums_noise_multiplier(experiment: Experiment, tasks: int) -> float:
    """Return the multiplier of class sums that are taken beside learning: it follows from the
    experiment alone. 0: there are none.

    Args:
        experiment: target epsilon and delta.
        tasks: of the run.

    Raises:
        NoFeasibleNoise: no multiplier that is of use fits.
    """
    privacy = experiment.privacy
    if not sums_beside_learning(method_of(experiment)):
        return 0.0
    sums = 1 if privacy.disjoint_tasks else tasks
    budget = SUMS_SHARE * privacy.target_epsilon
    return _of_sums(sums, budget, privacy.target_delta or NOMINAL_DELTA)


@lru_cache(maxsize=64)
def _of_sums(sums: int, epsilon: float, delta: float) -> float:
    def epsilon_with(noise_multiplier: float) -> float:
        return epsilon_of([DpEvent(1.0, noise_multiplier, sums)], (1 - SET_ASIDE) * delta)

    return solve_noise_multiplier(epsilon_with, epsilon)


@lru_cache(maxsize=64)
def _solved(
    rate: float,
    steps: int,
    sums: int,
    counts: int,
    epsilon: float,
    delta: float,
    sums_noise: float,
) -> float:
    def epsilon_with(noise_multiplier: float) -> float:
        spent = [DpEvent(rate, noise_multiplier, steps)]
        spent += [DpEvent(1.0, METRICS_NOISE, counts)] if counts else []
        spent += [DpEvent(1.0, sums_noise, sums)] if sums_noise else []
        return epsilon_of(spent, (1 - SET_ASIDE) * delta)

    return solve_noise_multiplier(epsilon_with, epsilon)

"""One noise multiplier for a whole run: solved from all that it will release, and all before.

A multiplier that fits the budget of one round spends it again in the next. So the site counts
ahead: every round of every task, on top of what its ledger holds. The multiplier that makes the sum
fit is the plan's, once and for all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from pydantic import BaseModel, ConfigDict

from deal_core.config.experiment import Experiment
from deal_core.methods import Phase
from deal_core.privacy.policy import at_server
from deal_core.wire.instruction import LEARN

NARROWEST = 1e-4
"""Relative width of the interval that a multiplier is known to."""
LEAST_NOISE, MOST_NOISE = 0.1, 64.0
"""Multipliers: below the first nothing is hidden; above the last nothing is learnt, and an update
would only do harm."""


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

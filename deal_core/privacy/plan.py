"""What a run will release, planned before its first release, and the noise that makes it fit.

A multiplier that fits the budget of one round spends it again in the next. So the site counts
ahead: every round of every task, on top of what its ledger holds. The multiplier that makes the sum
fit is the plan's, once and for all.

Where noise is in the sum of all sites, shares make up a whole only where all are of one size. So
the multiplier follows from the experiment alone, whatever a site's ledger holds: each site solves
the same, and then looks whether what it has spent before leaves room.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from pydantic import BaseModel, ConfigDict
from scipy.optimize import brentq

from deal_core.errors import UserError
from deal_core.privacy.accountant import DpEvent, epsilon_of
from deal_core.privacy.events import SET_ASIDE, Budget
from deal_core.privacy.policy import BudgetSpent, Policy

NARROWEST = 1e-4
"""Relative width of the interval that a multiplier is known to."""
LEAST_NOISE, MOST_NOISE = 0.1, 64.0
"""Multipliers: below the first nothing is hidden; above the last nothing is learnt, and an update
would only do harm."""
TINY = 1e-12
MOST_ENTRIES = 1_000_000
"""Of the class sums of a task, where a plan is made: what it costs that noise is discrete."""


class ReleaseSchedule(BaseModel):
    """What one task takes."""

    model_config = ConfigDict(frozen=True)

    task: str
    records: int
    """How many records, or groups, the site has of it."""
    rounds: int
    """In which it is worked on, to learn it."""
    sample_rate: float
    """Of every step."""
    steps: int
    """Of every round."""
    sums: int = 0
    """Class sums beside them, with noise of their own."""


class PrivacyPlan(BaseModel):
    """What a site will do in a run; decided once, and kept in its ledger."""

    model_config = ConfigDict(frozen=True)

    noise_multiplier: float
    """Of every step of the run."""
    epsilon: float
    """The budget that it was solved for, past included; at ``delta``."""
    delta: float
    disjoint_tasks: bool
    """How tasks compose."""
    max_grad_norm: float
    work: tuple[ReleaseSchedule, ...]
    units: int
    """Records (or groups) of the site, over all its tasks, when it was made."""

    def of(self, task: str) -> ReleaseSchedule:
        """Return what a task takes.

        Raises:
            UserError: it was not planned.
        """
        for work in self.work:
            if work.task == task:
                return work
        raise UserError(f"task '{task}' is not in the plan of this run")

    def budget(self, policy: Policy | None, most: int) -> Budget:
        """Return what every charge is checked against: the policy may have become tighter since. So
        many releases of the kind were planned at ``most``."""
        epsilon, delta, disjoint = planned = self.epsilon, self.delta, self.disjoint_tasks
        if policy is not None:
            epsilon = min(epsilon, policy.max_epsilon or epsilon)
            delta = min(delta, policy.max_delta or delta)
            disjoint = disjoint and policy.disjoint_tasks
        return Budget(epsilon, delta, disjoint, most, (epsilon, delta, disjoint) != planned)


@dataclass(frozen=True)
class RunSchedule:
    """What a run asks of a site, at most."""

    work: tuple[ReleaseSchedule, ...]
    """Of every task."""
    sums_noise: float = 0.0
    """Multiplier of class sums that are taken beside learning; 0: there are none."""
    common_noise: float = 0.0
    """Multiplier of a round where all sites make the noise of a sum together; 0: each site solves
    its own."""


class NoFeasibleNoise(BudgetSpent):
    """No multiplier that is of use makes it fit."""

    def __init__(self, reason: str = "the ledger's past leaves nothing") -> None:
        super().__init__(reason)


def solve_noise_multiplier(epsilon_with: Callable[[float], float], target_epsilon: float) -> float:
    """Return the smallest noise multiplier, to 1e-4, at which the whole stays within the target:
    ``epsilon_with`` says the epsilon of everything, past included, with a multiplier for what is
    planned.

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
def noise_of_steps(
    rate: float, steps: int, epsilon: float, delta: float, beside: tuple[DpEvent, ...] = ()
) -> float:
    """Return the multiplier of so many steps of a record, all sampled at one rate, that cost
    epsilon at delta together with what is ``beside`` them.

    Raises:
        NoFeasibleNoise: no multiplier that is of use fits.
    """

    def epsilon_with(noise_multiplier: float) -> float:
        spent = [DpEvent(rate, noise_multiplier, steps), *beside]
        return epsilon_of(spent, (1 - SET_ASIDE) * delta)

    return solve_noise_multiplier(epsilon_with, epsilon)

"""The one noise multiplier of all sites, where noise is in their sum.

Shares make up a whole only where all are of one size. So the multiplier follows from the
experiment alone, whatever a site's ledger holds: each site solves the same, and then looks whether
what it has spent before leaves room.
"""

from __future__ import annotations

from functools import lru_cache

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from deal_core.methods import method_of, sums_beside_learning
from deal_core.privacy.accounting.composition import DpEvent, epsilon_of
from deal_core.privacy.accounting.ledger_event import SET_ASIDE
from deal_core.privacy.accounting.plan import evaluations, solve_noise_multiplier


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
        privacy.metrics_noise,
        privacy.target_epsilon * (1 - ROOM),
        privacy.target_delta,
        sums_noise_multiplier(experiment, tasks),
    )


SUMS_SHARE = 0.5
"""Of the target epsilon that class sums beside learning may cost, taken by themselves."""
NOMINAL_DELTA = 1e-5
"""Where an experiment names no delta; it decides how much noise there is, not what it costs."""


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


ROOM = 1e-3
"""Share of the target that is left for the slack."""


@lru_cache(maxsize=64)
def _solved(
    rate: float,
    steps: int,
    sums: int,
    counts: int,
    metrics_noise: float,
    epsilon: float,
    delta: float,
    sums_noise: float,
) -> float:
    def epsilon_with(noise_multiplier: float) -> float:
        spent = [DpEvent(rate, noise_multiplier, steps)]
        spent += [DpEvent(1.0, metrics_noise, counts)] if counts else []
        spent += [DpEvent(1.0, sums_noise, sums)] if sums_noise else []
        return epsilon_of(spent, (1 - SET_ASIDE) * delta)

    return solve_noise_multiplier(epsilon_with, epsilon)

"""A run under secure aggregation against the same without masks: how near its model must come."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from deal_core.config.experiment import Experiment
from deal_core.secure_sum.layout import WEIGHT
from deal_core.wire.secure_layout import update_layout
from tests.simulations.run.secure_runs import POOLED, Ran

Arrays = Mapping[str, NDArray[np.float32]]
PLAIN = "aggregation.secure=false"
RULES: dict[str, tuple[str, ...]] = {
    "fedit": ("aggregation.rule=fedit",),
    "ffa": ("aggregation.rule=ffa",),
    "ffa-a, pooled": POOLED,
}
TRAINED = {"fedit": frozenset({"lora_A", "lora_B"}), "ffa-a, pooled": frozenset({"lora_A"})}
"""Of all other rules ``lora_B``."""


def assert_same_model(experiment: Experiment, secure: Ran, plain: Ran, rule: str) -> None:
    """After one round of a rule; what is allowed is far below what was learnt."""
    trained = TRAINED.get(rule, frozenset({"lora_B"}))
    assert_same_factors(experiment, secure, plain, trained)
    assert changed(secure.factors, plain.factors) < changed_at_all(plain) / 50


def tolerances(experiment: Experiment, ran: Ran, trained: frozenset[str]) -> tuple[float, float]:
    """How far an entry of a mean of factors may be from what it is without masks.

    Each of ``n`` sites rounds each of ``w x`` and ``w`` to a neighbour on its grid, so their sums
    are wrong by less than ``n`` steps, and the mean ``sum w x / sum w`` by less than
    ``n (step + |mean| weight step) / sum w``. All weights are 1: they sum to the number
    of sites, or to one less where one is gone.

    Returns:
        The first part, and the factor of ``|mean|`` in the second; twice the spacing of float32,
        in which both adapters are kept, is in both.
    """
    sites = experiment.federation.clients
    layout = update_layout(ran.state.current, trained, sites)
    steps = {each.name: 1 / (each.scale or 1) for each in layout.fields}
    step = max(value for name, value in steps.items() if name != WEIGHT)
    eps = 2 * float(np.finfo(np.float32).eps)
    share = sites / (sites - 1)
    return share * step + eps, share * steps[WEIGHT] + eps


def assert_same_factors(
    experiment: Experiment, one: Ran, two: Ran, trained: frozenset[str]
) -> None:
    added, times = tolerances(experiment, one, trained)
    first, second = one.factors, two.factors
    assert first.keys() == second.keys()
    for key, value in second.items():
        np.testing.assert_allclose(first[key], value, rtol=times, atol=added, err_msg=key)


def changed(one: Arrays, two: Arrays) -> float:
    """Largest difference of two adapters' factors."""
    return max(float(np.abs(one[key] - two[key]).max()) for key in two)


def changed_at_all(ran: Ran) -> float:
    """Largest entry of what starts at zero."""
    return max(float(np.abs(value).max()) for key, value in ran.factors.items() if "lora_B" in key)

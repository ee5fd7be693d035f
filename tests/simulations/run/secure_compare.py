"""A run under secure aggregation against the same without masks: how near its model must come."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from deal_core.config.experiment import Experiment
from deal_core.wire.secure_layout import LOSS, layout_of
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


def tolerance(experiment: Experiment, ran: Ran, trained: frozenset[str]) -> float:
    """How far an entry of a mean of factors may be from what it is without masks.

    Each of ``n`` sites rounds ``x`` to a neighbour on its grid, so the sum is wrong by less than
    ``n`` steps, and the mean by less than ``n / (n - 1)`` where one is gone. Twice the spacing of
    float32, in which both adapters are kept, is added.
    """
    sites = experiment.federation.clients
    layout = layout_of(experiment, ran.state.current, trained, gradients=False, basis="")
    step = max(1 / (each.scale or 1) for each in layout.fields if not each.name.startswith(LOSS))
    return sites / (sites - 1) * step + 2 * float(np.finfo(np.float32).eps)


def assert_same_factors(
    experiment: Experiment, one: Ran, two: Ran, trained: frozenset[str]
) -> None:
    allowed = tolerance(experiment, one, trained)
    first, second = one.factors, two.factors
    assert first.keys() == second.keys()
    for key, value in second.items():
        np.testing.assert_allclose(first[key], value, rtol=1e-6, atol=allowed, err_msg=key)


def changed(one: Arrays, two: Arrays) -> float:
    """Largest difference of two adapters' factors."""
    return max(float(np.abs(one[key] - two[key]).max()) for key in two)


def changed_at_all(ran: Ran) -> float:
    """Largest entry of what starts at zero."""
    return max(float(np.abs(value).max()) for key, value in ran.factors.items() if "lora_B" in key)

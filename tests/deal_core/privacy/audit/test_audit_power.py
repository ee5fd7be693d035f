"""What an audit says that it would notice, it notices."""

from __future__ import annotations

import numpy as np
import pytest

from deal_core.privacy.accountant import DpEvent
from deal_core.privacy.audit.audit_power import audit_power
from deal_core.privacy.audit.claim_audit import Repetition, claim_p_value
from deal_core.privacy.audit.guesses import guess

EPSILON_1, EPSILON_8 = DpEvent(1.0, 3.73, 1), DpEvent(1.0, 0.6, 1)
"""One step on all records, at delta 1e-5."""


def noticed(spent: DpEvent, scale: float, canaries: int, repetitions: int, audits: int) -> float:
    """Share of audits of a mechanism of its own that refute the claim."""
    rng = np.random.default_rng(1)

    def once() -> Repetition:
        coins = rng.random(canaries) < 0.5
        noise = scale * spent.noise_multiplier * rng.normal(size=canaries)
        return Repetition((spent,), guess(coins + noise, coins))

    p_values = [claim_p_value([once() for _ in range(repetitions)]) for _ in range(audits)]
    return float(np.mean(np.array(p_values) < 0.05))


@pytest.mark.slow
@pytest.mark.parametrize("spent", [EPSILON_1, EPSILON_8])
def test_it_holds_in_audits_of_their_own(spent):
    power = audit_power([spent], 500, 4, seed=0)
    assert 0.3 < power.scale < 0.9
    assert noticed(spent, power.scale, 500, 4, 40) > 0.6
    assert noticed(spent, 1.0, 500, 4, 40) < 0.2
    along = 1 / (2 * spent.noise_multiplier)
    assert power.accuracy == pytest.approx(0.5 + 0.4 * along - 0.066 * along**3, abs=0.02)


def test_it_grows_with_canaries_and_repetitions_and_may_be_none():
    assert audit_power([EPSILON_8], 20, 1, seed=0).scale == 0.0
    few = audit_power([EPSILON_1], 300, 2, seed=0).scale
    assert audit_power([EPSILON_1], 2000, 4, seed=0).scale > few

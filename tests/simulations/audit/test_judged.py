"""What repetitions show together, and that the sizes of the command are enough."""

from __future__ import annotations

import numpy as np
import pytest

from deal_core.privacy.accountant import DpEvent, epsilon_of
from deal_core.privacy.audit.audit_power import audit_power
from deal_core.privacy.audit.guesses import guess
from simulations.audit.command import AuditRequest
from simulations.audit.found import Found, Outcome, Steps, outcomes_of
from simulations.audit.judged import Judged, judged

EPSILON_1, EPSILON_8 = DpEvent(1.0, 3.73, 1), DpEvent(1.0, 0.6, 1)
"""One step on all records, at delta 1e-5."""


def found(spent: DpEvent | None, scale: float, repeat: int, kind="gradients") -> Found:
    """One training of a Gaussian mechanism with so much of the noise that it claims."""
    rng = np.random.default_rng(repeat)
    coins = rng.random(1000) < 0.5
    noise = scale * (spent.noise_multiplier if spent else 0.0) * rng.normal(size=1000)
    private = spent is not None
    steps = (
        Steps(sample_rate=1.0, noise_multiplier=spent.noise_multiplier, steps=1) if spent else None
    )
    return Found(
        kind=kind,
        client=0,
        canaries=1000,
        records=32,
        seed=0,
        repeat=repeat,
        mechanism="record" if private else "none",
        unit="record" if private else None,
        simulation_only=private,
        claimed=epsilon_of([spent], 1e-5) if spent else None,
        delta=1e-5,
        spent=[steps] if steps else [],
        outcomes=outcomes_of(guess(coins + noise, coins)),
    )


def attack(spent: DpEvent | None, scale: float, count: int = 4, kind="gradients") -> Judged:
    return judged([found(spent, scale, k, kind) for k in range(count)])


@pytest.mark.parametrize(("spent", "scale"), [(EPSILON_1, 0.5), (EPSILON_8, 0.25)])
def test_too_little_noise_is_refuted_and_told_how_much(spent, scale):
    weak, honest = attack(spent, scale), attack(spent, 1.0)
    assert weak.refuted
    assert weak.p_value < 0.05
    assert scale < weak.least_refuted.scale < 1
    assert (
        weak.claimed
        < weak.least_refuted.epsilon
        < epsilon_of([DpEvent(1.0, scale * spent.noise_multiplier, 1)], 1e-5)
    )
    assert not honest.refuted
    assert honest.least_refuted.scale > 1
    assert honest.notices.scale >= scale
    assert honest.notices.efficiency == pytest.approx(1.0, abs=0.35)
    assert weak.notices.efficiency > 1.3


def test_without_a_mechanism_there_is_no_claim_and_no_power():
    free = attack(None, 0.0)
    assert (free.p_value, free.least_refuted, free.notices, free.claimed) == (None,) * 4
    assert free.bound.epsilon > 3
    assert not free.refuted


def test_of_texts_nobody_knows_the_best_attack():
    texts = attack(EPSILON_8, 1.0, 1, "texts")
    assert texts.notices is None
    assert texts.p_value == pytest.approx(1.0, abs=0.9)


def test_a_bound_above_the_claim_refutes_it_whatever_the_ledger_holds():
    """A ledger whose noise is right for another epsilon than it tells."""
    told = [found(EPSILON_8, 1.0, k).model_copy(update={"claimed": 0.5}) for k in range(4)]
    assert judged(told).p_value > 0.05
    assert judged(told).refuted


def test_figures_survive_the_file():
    weak = attack(EPSILON_1, 0.5, 2)
    assert Judged.model_validate_json(weak.model_dump_json()) == weak
    assert Outcome.model_validate(weak.trainings[0].outcomes[0]).canaries == 1000


@pytest.mark.slow
@pytest.mark.parametrize(("spent", "half"), [(EPSILON_1, 0.5), (EPSILON_8, 0.25)])
def test_the_sizes_of_the_command_are_enough(spent, half):
    """At epsilon 1 half of the noise, at epsilon 8 a quarter, and much less of a weakening."""
    sizes = AuditRequest("quickstart")
    power = audit_power([spent], sizes.canaries, sizes.repetitions, seed=0)
    assert power.scale >= half + 0.1

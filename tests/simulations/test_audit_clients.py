"""Audits of whole clients: the server's real noise, plan and accountant."""

from __future__ import annotations

import pytest
import torch

from deal_core.ledger import Ledger, composed
from deal_core.privacy import clipped_mean
from deal_core.privacy.noise import SeededNoise
from simulations.audit_found import Training
from simulations.audit_run import carry_out, known

CLIENT = (
    "privacy.mechanism=client",
    "privacy.noise=seeded",
    "privacy.target_delta=1e-5",
    "federation.clients=8",
)
SAMPLED = "federation.clients_per_round=4"


def training(make_experiment, folder, *overrides, epsilon=1.0, canaries=400) -> Training:
    budget = f"privacy.target_epsilon={epsilon}"
    experiment = make_experiment(*CLIENT, f'run.out="{folder}"', budget, *overrides)
    return Training(experiment, "clients", client=0, canaries=canaries, seed=5, delta=1e-5)


@pytest.mark.parametrize("overrides", [(), (SAMPLED,), ("aggregation.rule=alternating",)])
@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_the_mechanism_as_it_is_stays_below_its_claim(
    make_experiment, tmp_path, epsilon, overrides
):
    what = training(make_experiment, tmp_path / "on", *overrides, epsilon=epsilon)
    found = carry_out(what, lambda event: None)
    assert 0.9 * epsilon < found.claimed <= epsilon
    assert (found.unit, found.delta, found.simulation_only) == ("client", 1e-5, True)
    assert found.bound.epsilon < found.claimed
    assert not found.refuted
    assert known(what) == found
    events = Ledger(tmp_path / "on" / "privacy").events()
    assert len(events) == 4  # 2 tasks, 2 rounds
    assert found.claimed == composed(events, 1e-5)


def test_the_attack_is_no_weak_one(make_experiment, tmp_path):
    """Of a claim of 8 it shows a good part: a bound below the claim is not for want of trying."""
    what = training(make_experiment, tmp_path, epsilon=8.0, canaries=1000)
    assert carry_out(what, lambda event: None).bound.epsilon > 2


@pytest.mark.parametrize("overrides", [(), (SAMPLED,)])
def test_noise_switched_off_is_caught(make_experiment, tmp_path, monkeypatch, overrides):
    """The accountant still says epsilon = 1; the models tell otherwise."""
    monkeypatch.setattr(
        SeededNoise, "normal", lambda self, shape: torch.zeros(shape, dtype=torch.float64)
    )
    what = training(make_experiment, tmp_path / "off", *overrides)
    found = carry_out(what, lambda event: None)
    assert 0.9 < found.claimed <= 1.0
    assert found.bound.epsilon > 2 * found.claimed
    assert found.refuted


def test_clipping_switched_off_is_caught(make_experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(clipped_mean, "clipped", lambda change, bound: dict(change))
    found = carry_out(training(make_experiment, tmp_path / "off"), lambda event: None)
    assert found.claimed <= 1.0
    assert found.refuted


def test_without_a_mechanism_whole_clients_are_plain_to_see(make_experiment, tmp_path):
    what = training(make_experiment, tmp_path, SAMPLED, "privacy.mechanism=none")
    found = carry_out(what, lambda event: None)
    assert (found.claimed, found.unit, found.delta) == (None, None, 1e-5)
    assert found.bound.epsilon > 2
    assert not found.refuted

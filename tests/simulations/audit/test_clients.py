"""Audits of whole clients: the server's real noise, plan and accountant."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from deal_core.privacy.accounting.ledger import Ledger
from deal_core.privacy.accounting.ledger_event import composed
from deal_core.privacy.audit.claim_audit import claim_p_value
from deal_core.privacy.mechanisms import clipped_mean
from deal_core.privacy.mechanisms.central_dp import CentralDP
from deal_core.privacy.mechanisms.noise import SeededNoise
from simulations.audit.found import Training
from simulations.audit.judged import Judged, judged
from simulations.audit.run import carry_out, known
from tests.slow import slow_but

CLIENT = (
    "privacy.mechanism=client",
    "privacy.noise=seeded",
    "privacy.target_delta=1e-5",
    "federation.clients=8",
    'adapter.target_modules=["4.attention.self.value","5.attention.self.value"]',
)
SAMPLED = "federation.clients_per_round=4"
EIGHTH = "federation.clients_per_round=1"


def attack(*trainings: Training) -> Judged:
    return judged([carry_out(each, lambda event: None) for each in trainings])


def training(make_experiment, folder, *overrides, epsilon=1.0, canaries=400) -> Training:
    budget = f"privacy.target_epsilon={epsilon}"
    experiment = make_experiment(*CLIENT, f'run.out="{folder}"', budget, *overrides)
    return Training(experiment, "clients", client=0, canaries=canaries, seed=5, delta=1e-5)


@pytest.mark.parametrize("overrides", [(), (SAMPLED,)])
@pytest.mark.parametrize("epsilon", slow_but([1.0, 8.0], 1.0))
def test_the_mechanism_as_it_is_stays_below_its_claim(
    make_experiment, tmp_path, epsilon, overrides
):
    what = training(make_experiment, tmp_path / "on", *overrides, epsilon=epsilon)
    found = carry_out(what, lambda event: None)
    assert 0.9 * epsilon < found.claimed <= epsilon
    assert (found.unit, found.delta, found.simulation_only) == ("client", 1e-5, True)
    verdict = judged([found])
    assert verdict.bound.epsilon < found.claimed
    assert not verdict.refuted
    assert known(what) == found
    events = Ledger(tmp_path / "on" / "privacy").events()
    assert len(events) == 4  # 2 tasks, 2 rounds
    assert found.claimed == composed(events, 1e-5)


def test_the_attack_is_no_weak_one(make_experiment, tmp_path):
    """Of a claim of 8 it shows a good part: a bound below the claim is not for want of trying."""
    what = training(make_experiment, tmp_path, epsilon=8.0, canaries=1000)
    verdict = attack(what)
    assert verdict.bound.epsilon > 2
    assert verdict.notices.efficiency > 0.8


@pytest.mark.parametrize("overrides", [(), (SAMPLED,)])
def test_noise_switched_off_is_caught(make_experiment, tmp_path, monkeypatch, overrides):
    """The accountant still says epsilon = 1; the models tell otherwise."""
    monkeypatch.setattr(
        SeededNoise, "normal", lambda self, shape: torch.zeros(shape, dtype=torch.float64)
    )
    what = training(make_experiment, tmp_path / "off", *overrides)
    found = attack(what)
    assert 0.9 < found.claimed <= 1.0
    assert found.bound.epsilon > 2 * found.claimed
    assert found.refuted


def test_clipping_switched_off_is_caught(make_experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(clipped_mean, "clipped", lambda change, bound: dict(change))
    found = attack(training(make_experiment, tmp_path / "off"))
    assert found.claimed <= 1.0
    assert found.refuted


def test_half_the_noise_is_caught(make_experiment, tmp_path, monkeypatch):
    drawn = SeededNoise.normal
    monkeypatch.setattr(SeededNoise, "normal", lambda self, shape: 0.5 * drawn(self, shape))
    whats = [
        replace(
            training(make_experiment, tmp_path / str(k), f"run.seed={k}", canaries=1500), repeat=k
        )
        for k in range(5)
    ]
    trained = [carry_out(each, lambda event: None) for each in whats]
    assert max(each.claimed for each in trained) <= 1.0
    assert claim_p_value([each.repetition for each in trained]) < 0.05


def test_everybody_drawn_in_every_round_is_caught(make_experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(CentralDP, "sample", lambda self, names, *where: list(names))
    whats = [
        replace(training(make_experiment, tmp_path / str(k), EIGHTH, f"run.seed={k}"), repeat=k)
        for k in range(3)
    ]
    trained = [carry_out(each, lambda event: None) for each in whats]
    assert claim_p_value([each.repetition for each in trained]) < 0.05


def test_without_a_mechanism_whole_clients_are_plain_to_see(make_experiment, tmp_path):
    what = training(make_experiment, tmp_path, SAMPLED, "privacy.mechanism=none")
    found = carry_out(what, lambda event: None)
    assert (found.claimed, found.unit, found.delta) == (None, None, 1e-5)
    assert judged([found]).bound.epsilon > 2
    assert not judged([found]).refuted

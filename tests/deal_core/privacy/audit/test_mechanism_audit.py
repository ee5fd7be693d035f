"""The audit of a mechanism by itself refutes mechanisms that were weakened, and not the real one.

Every weakening is applied where the mechanism does its work; plan, ledger and claim stay as they
are.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from deal_core.config.experiment import Experiment
from deal_core.models import load_model
from deal_core.models.interface import Encoded
from deal_core.privacy import dpsgd
from deal_core.privacy.dpsgd import PrivateGradients
from deal_core.privacy.ledger import Ledger
from deal_core.privacy.noise import SecureNoise, SeededNoise
from tests.deal_core.privacy.audit.harness import MechanismAudit, Records, audit_mechanism
from tests.slow import slow_but

AUDITED = (
    "method.name=sequential",
    'data.tasks=["laboratory"]',
    'adapter.target_modules=["4.attention.self.value","5.attention.self.value"]',
    "train.precision=float32",
    "federation.rounds=2",
    "privacy.mechanism=record",
    "privacy.target_delta=1e-5",
    "privacy.sample_rate=0.5",
)
Audit = Callable[..., MechanismAudit]


@pytest.fixture(scope="module")
def records(make_experiment) -> Records:
    config = make_experiment(*AUDITED)
    model = load_model(config.model, config.adapter, 32, torch.float32)
    data = [Encoded((101, 2540 + i, 102), i % 2) for i in range(6)]
    return Records(model, data, ("heart", "skin"))


@pytest.fixture
def audit(make_experiment, records, tmp_path, one_thread) -> Audit:
    def run(epsilon: float, *overrides: str, **sizes: int) -> MechanismAudit:
        experiment: Experiment = make_experiment(
            *AUDITED, f"privacy.target_epsilon={epsilon}", *overrides
        )
        sizes = {"canaries": 2000, "repetitions": 4, **sizes}
        return audit_mechanism(experiment, records, tmp_path / "audit", **sizes)

    return run


def scale_noise(monkeypatch, scale: float) -> None:
    for source in (SeededNoise, SecureNoise):
        drawn = source.normal
        monkeypatch.setattr(
            source, "normal", lambda self, shape, drawn=drawn: scale * drawn(self, shape)
        )


@pytest.mark.parametrize("overrides", slow_but([(), ("privacy.noise=secure",)], ()))
@pytest.mark.parametrize("epsilon", [1.0, pytest.param(8.0, marks=pytest.mark.slow)])
def test_the_mechanism_as_it_is_is_not_refuted(audit, tmp_path, epsilon, overrides):
    found = audit(epsilon, *overrides, repetitions=2)
    assert 0.9 * epsilon < found.claimed <= epsilon
    assert not found.refuted
    assert found.bound.epsilon < found.claimed
    events = Ledger(tmp_path / "audit" / "repetition-0").events()
    assert [event.steps for event in events] == [2, 2]
    assert {event.sample_rate for event in events} == {0.5}
    assert all(
        event.simulation_only == (overrides != ("privacy.noise=secure",)) for event in events
    )


def test_half_the_noise_is_refuted_at_epsilon_1(audit, monkeypatch):
    scale_noise(monkeypatch, 0.5)
    found = audit(1.0, repetitions=5)
    assert found.claimed <= 1.0
    assert found.p_value < 0.01


@pytest.mark.slow
def test_a_quarter_of_the_noise_is_refuted_at_epsilon_8(audit, monkeypatch):
    scale_noise(monkeypatch, 0.25)
    found = audit(8.0, "privacy.noise=secure")
    assert found.claimed <= 8.0
    assert found.p_value < 0.01


def test_no_noise_is_refuted_by_the_bound_alone(audit, monkeypatch):
    scale_noise(monkeypatch, 0.0)
    found = audit(1.0, repetitions=2)
    assert found.bound.epsilon > 2 * found.claimed
    assert found.refuted


@pytest.mark.slow
def test_no_clipping_is_refuted(audit, monkeypatch):
    clipped = dpsgd.clipped_gradients
    monkeypatch.setattr(
        dpsgd,
        "clipped_gradients",
        lambda module, objective, examples, bound, *rest: clipped(
            module, objective, examples, 1e9, *rest
        ),
    )
    assert audit(1.0, repetitions=2).p_value < 0.01


SAMPLED = ("privacy.sample_rate=0.25",)


@pytest.mark.slow
def test_every_record_in_every_step_is_refuted_and_refused(audit, monkeypatch, caplog):
    def everybody(self):
        for _ in range(self.steps):
            yield list(range(len(self.data)))

    monkeypatch.setattr(PrivateGradients, "batches", everybody)
    assert audit(1.0, *SAMPLED, repetitions=1).p_value > 0.05  # noise alone has left
    assert "larger than the sample rate allows" in caplog.text
    monkeypatch.setattr(dpsgd, "require_sampled", lambda *of: None)
    found = audit(1.0, *SAMPLED, repetitions=3)
    assert {s.sample_rate for r in found.repetitions for s in r.spent} == {0.25}
    assert found.p_value < 0.01


@pytest.mark.slow
def test_a_rate_that_doubles_after_the_first_step_is_refuted(audit, monkeypatch):
    def doubled(self):
        for step in range(self.steps):
            rate = self.sample_rate * (2 if step else 1)
            yield (self.noise.uniform(len(self.data)) <= rate).nonzero().flatten().tolist()

    monkeypatch.setattr(PrivateGradients, "batches", doubled)
    monkeypatch.setattr(dpsgd, "require_sampled", lambda *of: None)
    assert audit(1.0, *SAMPLED, "federation.local_epochs=2", repetitions=6).p_value < 0.05


@pytest.mark.slow
def test_one_draw_of_noise_for_all_layers_of_a_shape_is_refuted(audit, monkeypatch):
    drawn = SeededNoise.normal
    kept: dict[torch.Size, list[torch.Tensor]] = {}

    def shared(self, shape):
        """Two layers have every shape: the second gets what the first got."""
        if kept.get(shape):
            return kept[shape].pop()
        kept[shape] = [drawn(self, shape)]
        return kept[shape][0]

    monkeypatch.setattr(SeededNoise, "normal", shared)
    assert audit(1.0, repetitions=2).p_value < 0.01


@pytest.mark.slow
def test_a_bound_from_the_batch_itself_is_refuted(audit, monkeypatch):
    """The upper quartile of the norms in the place of the bound."""
    clipped = dpsgd.clipped_gradients

    def by_median(module, objective, examples, bound, *rest):
        norms = clipped(module, objective, examples, bound, *rest).norms
        own = float(np.quantile(norms, 0.75)) if norms else bound
        return clipped(module, objective, examples, max(bound, own), *rest)

    monkeypatch.setattr(dpsgd, "clipped_gradients", by_median)
    assert audit(1.0, repetitions=2).p_value < 0.01

"""The audit of a mechanism by itself refutes mechanisms that were weakened, and not the real one.

Every weakening is applied where the mechanism does its work; plan, ledger and claim stay as they
are.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from deal_core.privacy import dpsgd
from deal_core.privacy.dpsgd import PrivateGradients
from deal_core.privacy.ledger import Ledger
from deal_core.privacy.noise import SecureNoise, SeededNoise
from tests.simulations.audit.harness import Records, audit_mechanism, six_records
from tests.slow import slow_but

AUDITED = (
    "method.name=sequential",
    'data.tasks=["laboratory"]',
    "data.max_train=0",
    'adapter.target_modules=["4.attention.self.value","5.attention.self.value"]',
    "train.precision=float32",
    "federation.rounds=1",
    "privacy.mechanism=record",
    "privacy.target_delta=1e-5",
    "privacy.sample_rate=0.5",
)
GROUPS = "privacy.unit_column=patient"


@pytest.fixture(scope="module")
def records(make_experiment) -> Records:
    return six_records(make_experiment(*AUDITED))


@pytest.fixture
def audit(make_experiment, records, tmp_path, one_thread):
    def run(epsilon: float, *overrides: str, canaries: int = 1500, repetitions: int = 3):
        experiment = make_experiment(*AUDITED, f"privacy.target_epsilon={epsilon}", *overrides)
        sizes = {"canaries": canaries, "repetitions": repetitions}
        found = audit_mechanism(experiment, records, tmp_path / "audit", **sizes)
        assert 0.9 * epsilon < found.claimed <= epsilon
        return found

    return run


def scale_noise(monkeypatch, scale: float) -> None:
    for source in (SeededNoise, SecureNoise):
        drawn = source.normal
        monkeypatch.setattr(
            source, "normal", lambda self, shape, drawn=drawn: scale * drawn(self, shape)
        )


@pytest.mark.parametrize("overrides", slow_but([(), ("privacy.noise=secure",)], ()))
@pytest.mark.parametrize("epsilon", slow_but([1.0, 8.0], 1.0))
def test_the_mechanism_as_it_is_is_not_refuted(audit, tmp_path, epsilon, overrides):
    found = audit(epsilon, "federation.rounds=2", *overrides, canaries=1000, repetitions=2)
    assert not found.refuted
    events = Ledger(tmp_path / "audit" / "repetition-0" / "0").events()
    assert [(event.steps, event.sample_rate) for event in events] == [(2, 0.5)] * 2
    seeds = overrides != ("privacy.noise=secure",)
    assert all(event.simulation_only == seeds for event in events)


@pytest.mark.parametrize(
    ("epsilon", "scale", "canaries", "repetitions"),
    [
        (1.0, 0.3, 1000, 2),
        pytest.param(1.0, 0.5, 2000, 5, marks=pytest.mark.slow),
        pytest.param(8.0, 0.25, 1500, 3, marks=pytest.mark.slow),
    ],
)
def test_too_little_noise_is_refuted(audit, monkeypatch, epsilon, scale, canaries, repetitions):
    scale_noise(monkeypatch, scale)
    assert audit(epsilon, canaries=canaries, repetitions=repetitions).p_value < 0.01


@pytest.mark.slow
def test_no_noise_is_refuted_by_the_bound_alone(audit, monkeypatch):
    scale_noise(monkeypatch, 0.0)
    found = audit(1.0, canaries=300, repetitions=1)
    assert found.bound.epsilon > 2 * found.claimed
    assert found.refuted


def clipped_to(monkeypatch, bound_of) -> None:
    """Clip to a bound that is made of the norms of a batch, and of the real one."""
    clipped = dpsgd.clipped_gradients

    def to_another(module, objective, examples, groups, bound, step):
        norms = clipped(module, objective, examples, groups, bound, step).norms
        return clipped(module, objective, examples, groups, bound_of(norms, bound), step)

    monkeypatch.setattr(dpsgd, "clipped_gradients", to_another)


@pytest.mark.slow
@pytest.mark.parametrize(
    "bound_of",
    [
        pytest.param(lambda norms, bound: 1e9, id="no clipping"),
        pytest.param(
            lambda norms, bound: max([bound, *np.quantile(norms or [0.0], [0.75])]),
            id="the upper quartile of the norms of the batch",
        ),
    ],
)
def test_another_bound_is_refuted(audit, monkeypatch, bound_of):
    clipped_to(monkeypatch, bound_of)
    assert audit(1.0, repetitions=2).p_value < 0.01


SAMPLED = ("privacy.sample_rate=0.25", "federation.rounds=2")


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
    sizes = {"canaries": 2000, "repetitions": 6}
    assert audit(1.0, *SAMPLED, "federation.local_epochs=2", **sizes).p_value < 0.05


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


CLIPPED = dpsgd.clipped_gradients


def by_record(module, objective, examples, groups, bound, step):
    """Clip each record by itself, whosever it is."""
    return CLIPPED(module, objective, examples, range(len(groups)), bound, step)


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [1.0, 8.0])
def test_groups_that_are_hidden_are_not_found(audit, tmp_path, monkeypatch, epsilon):
    sizes = set()
    original = PrivateGradients.batches

    def watched(self):
        sizes.add((len(self.data), len(self.groups)))
        return original(self)

    monkeypatch.setattr(PrivateGradients, "batches", watched)
    found = audit(epsilon, GROUPS, repetitions=2)
    assert not found.refuted
    assert sizes == {(6 + 3 * 1500, 3 + 1500)}  # a canary is a group of three
    events = Ledger(tmp_path / "audit" / "repetition-0" / "0").events()
    assert {(event.unit, event.unit_column) for event in events} == {("group", "patient")}


def test_clipping_by_record_is_refuted_where_groups_are_claimed(audit, monkeypatch):
    """A canary of three records shows it, one of a single record does not."""
    monkeypatch.setattr(dpsgd, "clipped_gradients", by_record)
    assert audit(1.0, GROUPS, canaries=800, repetitions=2).p_value < 0.01


@pytest.mark.slow
def test_the_same_mechanism_is_not_refuted_by_canaries_of_one_record(audit, monkeypatch):
    monkeypatch.setattr(dpsgd, "clipped_gradients", by_record)
    monkeypatch.setattr("simulations.audit.planted.GROUP_RECORDS", 1)
    assert audit(1.0, GROUPS).p_value > 0.05

"""The audit of a mechanism by itself refutes mechanisms that were weakened, and not the real one:
of steps at a site, and of noise in the sum, attacked through the sum.

Every weakening is applied where the mechanism does its work; plan, ledger and claim stay as they
are.
"""

from itertools import count

import numpy as np
import pytest
import torch

from deal_core.lora.payload import PREFIX
from deal_core.privacy import dpsgd
from deal_core.privacy.distributed_noise import GRID_BITS, NoisySum
from deal_core.privacy.dpsgd import PrivateGradients
from deal_core.privacy.ledger import Ledger
from deal_core.privacy.noise import SecureNoise, SeededNoise
from deal_core.randomness import seeded
from simulations.audit.canaries import GradientCanaries, Seen, counted_sites
from simulations.audit.claim import SIGNIFICANCE
from tests.simulations.audit.harness import audit_mechanism, six_records
from tests.slow import slow_but

COMMON = (
    'data.tasks=["laboratory"]',
    "data.max_train=0",
    'adapter.target_modules=["4.attention.self.value","5.attention.self.value"]',
    "federation.rounds=1",
    "train.precision=float32",
    "privacy.mechanism=record",
    "privacy.target_delta=1e-5",
)
STEPS = (*COMMON, "method.name=sequential", "privacy.sample_rate=0.5")
SUMS = (
    *COMMON,
    "aggregation.rule=ffa",
    "aggregation.secure=true",
    "federation.clients=4",
    "train.step=server",
    "privacy.noise_share=sum",
)
THREE = "federation.clients=3"
"""Of which one may collude: two shares are the whole noise."""
GROUPS = "privacy.unit_column=patient"
SAMPLED = ("privacy.sample_rate=0.25", "federation.rounds=2")
SECURE = "privacy.noise=secure"
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def records(make_experiment):
    return six_records(make_experiment(*COMMON))


@pytest.fixture
def audit(make_experiment, records, tmp_path, one_thread):
    folders = (tmp_path / f"audit-{number}" for number in count())

    def run(base, epsilon, *overrides, canaries=1500, repetitions=3, silent=0):
        experiment = make_experiment(*base, f"privacy.target_epsilon={epsilon}", *overrides)
        sizes = {"canaries": canaries, "repetitions": repetitions, "silent": silent}
        found = audit_mechanism(experiment, records, next(folders), **sizes)
        assert 0.9 * epsilon < found.claimed <= epsilon
        return found

    return run


@pytest.mark.parametrize("overrides", slow_but([(), (SECURE,)], ()))
@pytest.mark.parametrize("epsilon", slow_but([1.0, 8.0], 1.0))
def test_steps_as_they_are_are_not_refuted(audit, tmp_path, epsilon, overrides):
    sizes = {"canaries": 400, "repetitions": 2}
    found = audit(STEPS, epsilon, "federation.rounds=2", *overrides, **sizes)
    assert found.p_value > SIGNIFICANCE
    events = Ledger(tmp_path / "audit-0" / "repetition-0" / "0").events()
    assert [(event.steps, event.sample_rate) for event in events] == [(2, 0.5)] * 2
    assert all(event.simulation_only == (SECURE not in overrides) for event in events)


def noise_times(scale):
    def weaken(monkeypatch):
        for source in (SeededNoise, SecureNoise):
            drawn = source.normal
            weaker = lambda self, shape, drawn=drawn: scale * drawn(self, shape)  # noqa: E731
            monkeypatch.setattr(source, "normal", weaker)

    return weaken


def clipped_to(bound_of):
    """Clip to a bound that is made of the norms of a batch, and of the real one."""

    def weaken(monkeypatch):
        clipped = dpsgd.clipped_gradients

        def to_another(module, objective, examples, groups, bound, step):
            norms = clipped(module, objective, examples, groups, bound, step).norms
            return clipped(module, objective, examples, groups, bound_of(norms, bound), step)

        monkeypatch.setattr(dpsgd, "clipped_gradients", to_another)

    return weaken


def no_clipping(norms, bound):
    return 1e9


def upper_quartile(norms, bound):
    return max([bound, *np.quantile(norms or [0.0], [0.75])])


def rate_doubled_after_the_first_step(monkeypatch):
    def doubled(self):
        for step in range(self.steps):
            rate = self.sample_rate * (2 if step else 1)
            yield (self.noise.uniform(len(self.record_ids)) <= rate).nonzero().flatten().tolist()

    monkeypatch.setattr(PrivateGradients, "batches", doubled)
    monkeypatch.setattr(dpsgd, "require_sampled", lambda *of: None)


def one_draw_of_noise_for_all_layers_of_a_shape(monkeypatch):
    drawn = SeededNoise.normal
    kept = {}

    def shared(self, shape):
        """Two layers have every shape: the second gets what the first got."""
        if kept.get(shape):
            return kept[shape].pop()
        kept[shape] = [drawn(self, shape)]
        return kept[shape][0]

    monkeypatch.setattr(SeededNoise, "normal", shared)


CLIPPED = dpsgd.clipped_gradients


def clipped_by_record(monkeypatch):
    """Each record by itself, whosever it is: of a group, three records pull as far as it may."""

    def by_record(module, objective, examples, groups, bound, step):
        return CLIPPED(module, objective, examples, range(len(groups)), bound, step)

    monkeypatch.setattr(dpsgd, "clipped_gradients", by_record)


def bound_twice_as_large(monkeypatch):
    monkeypatch.setattr("deal_core.privacy.dpsgd.clipping_bound", lambda bound, *rest: 2 * bound)


@pytest.mark.parametrize(
    ("weaken", "base", "epsilon", "overrides", "sizes", "below"),
    [
        (noise_times(0.3), STEPS, 1.0, (), (400, 2), 0.01),
        pytest.param(noise_times(0.5), STEPS, 1.0, (), (2000, 5), 0.01, marks=slow),
        pytest.param(noise_times(0.25), STEPS, 8.0, (), (1500, 3), 0.01, marks=slow),
        pytest.param(clipped_to(no_clipping), STEPS, 1.0, (), (1500, 2), 0.01, marks=slow),
        pytest.param(clipped_to(upper_quartile), STEPS, 1.0, (), (1500, 2), 0.01, marks=slow),
        pytest.param(
            rate_doubled_after_the_first_step,
            *(STEPS, 1.0, (*SAMPLED, "federation.local_epochs=2"), (2000, 6), 0.05),
            marks=slow,
        ),
        pytest.param(
            one_draw_of_noise_for_all_layers_of_a_shape,
            *(STEPS, 1.0, (), (1500, 2), 0.01),
            marks=slow,
        ),
        (clipped_by_record, STEPS, 1.0, (GROUPS,), (600, 2), 0.01),
        pytest.param(clipped_by_record, SUMS, 2.0, (THREE, GROUPS), (1000, 2), 0.05, marks=slow),
        pytest.param(bound_twice_as_large, SUMS, 4.0, (), (1000, 4), 0.05, marks=slow),
    ],
)
def test_a_weakened_mechanism_is_refuted(
    audit, monkeypatch, weaken, base, epsilon, overrides, sizes, below
):
    weaken(monkeypatch)
    canaries, repetitions = sizes
    found = audit(base, epsilon, *overrides, canaries=canaries, repetitions=repetitions)
    assert found.p_value < below


@slow
def test_no_noise_is_refuted_by_the_bound_alone(audit, monkeypatch):
    noise_times(0.0)(monkeypatch)
    found = audit(STEPS, 1.0, canaries=300, repetitions=1)
    assert found.bound.epsilon > 2 * found.claimed
    assert found.p_value < SIGNIFICANCE


@slow
def test_every_record_in_every_step_is_refuted_and_refused(audit, monkeypatch, caplog):
    def everybody(self):
        for _ in range(self.steps):
            yield list(range(len(self.record_ids)))

    monkeypatch.setattr(PrivateGradients, "batches", everybody)
    assert audit(STEPS, 1.0, *SAMPLED, repetitions=1).p_value > 0.05  # noise alone has left
    assert "larger than the sample rate allows" in caplog.text
    monkeypatch.setattr(dpsgd, "require_sampled", lambda *of: None)
    found = audit(STEPS, 1.0, *SAMPLED)
    assert {s.sample_rate for r in found.repetitions for s in r.spent} == {0.25}
    assert found.p_value < 0.01


@slow
def test_clipping_by_record_is_not_refuted_by_canaries_of_one_record(audit, monkeypatch):
    clipped_by_record(monkeypatch)
    monkeypatch.setattr("simulations.audit.canaries.GROUP_RECORDS", 1)
    assert audit(STEPS, 1.0, GROUPS).p_value > 0.05


@slow
@pytest.mark.parametrize(
    ("base", "epsilon", "overrides", "kind", "method"),
    [
        (STEPS, 1.0, (), PrivateGradients, "batches"),
        (STEPS, 8.0, (), PrivateGradients, "batches"),
        (SUMS, 2.0, (THREE,), NoisySum, "total"),
    ],
)
def test_groups_that_are_hidden_are_not_found(
    audit, tmp_path, monkeypatch, base, epsilon, overrides, kind, method
):
    sizes = set()
    original = getattr(kind, method)

    def watched(self, *given):
        sizes.add((len(self.record_ids), len(self.groups)))
        return original(self, *given)

    monkeypatch.setattr(kind, method, watched)
    found = audit(base, epsilon, *overrides, GROUPS, canaries=1000, repetitions=2)
    assert found.p_value > SIGNIFICANCE
    # a canary is a group of three; of a sum, another site has none
    assert sizes - {(6, 3)} == {(6 + 3 * 1000, 3 + 1000)}
    events = Ledger(tmp_path / "audit-0" / "repetition-0" / "0").events()
    assert {(event.unit, event.unit_column) for event in events} == {("group", "patient")}


def test_the_sum_as_it_is_is_not_refuted(audit):
    assert audit(SUMS, 4.0, canaries=400, repetitions=2).p_value > SIGNIFICANCE


@slow
@pytest.mark.parametrize("epsilon", [1.0, 2.0, 4.0, 8.0])
def test_the_sum_as_it_is_is_below_the_claim(audit, epsilon):
    """As far as so many canaries can tell: half as much noise again is refuted."""
    found = audit(SUMS, epsilon, canaries=3000, repetitions=16)
    assert found.p_value > SIGNIFICANCE
    assert found.bound.epsilon <= found.claimed
    assert found.bound.scale < 1.5


@slow
@pytest.mark.parametrize(
    "overrides", [("privacy.sample_rate=0.5", "federation.rounds=2"), (SECURE,)]
)
def test_so_it_is_with_samples_and_with_noise_that_nobody_can_repeat(audit, overrides):
    found = audit(SUMS, 4.0, *overrides, canaries=1000, repetitions=4)
    assert found.p_value > SIGNIFICANCE


@pytest.mark.parametrize(
    ("epsilon", "canaries", "repetitions", "silent", "overrides"),
    [
        # One more than was planned to fail: one share in the place of two. At least 80 % of audits
        # of these sizes notice it; at epsilon 1, of 8 repetitions of 1,000, 14 %.
        pytest.param(1.0, 3000, 16, 1, (THREE,), marks=slow),
        pytest.param(2.0, 2500, 8, 1, (THREE,), marks=slow),
        pytest.param(4.0, 1000, 8, 1, (THREE,), marks=slow),
        pytest.param(8.0, 1000, 8, 1, (THREE,), marks=slow),
        # One share in the place of three: noise at 0.58 of what is claimed.
        pytest.param(1.0, 1500, 8, 2, (), marks=slow),
        pytest.param(2.0, 1000, 8, 2, (), marks=slow),
        (4.0, 1000, 3, 2, ()),
    ],
)
def test_sites_that_leave_their_noise_out_are_noticed(
    audit, epsilon, canaries, repetitions, silent, overrides
):
    sizes = {"canaries": canaries, "repetitions": repetitions, "silent": silent}
    assert audit(SUMS, epsilon, *overrides, **sizes).p_value < SIGNIFICANCE


@slow
def test_planned_failures_are_counted_on(audit):
    """The same one share, in a plan that counts on no more."""
    sizes = {"canaries": 1000, "repetitions": 8, "silent": 1}
    found = audit(SUMS, 4.0, THREE, "privacy.dropouts=1", **sizes)
    assert found.p_value > SIGNIFICANCE


@pytest.mark.parametrize(
    ("settings", "attacked", "sites"),
    [
        ((), 2, ("2", "0", "1")),
        (("privacy.dropouts=1",), 3, ("3", "0")),
        (("privacy.colluding=3",), 1, ("1",)),
        (("privacy.noise_share=site",), 1, ("1",)),
    ],
)
def test_the_attacker_sees_the_sum_over_those_who_are_counted_on(
    make_experiment, settings, attacked, sites
):
    """Of four: what one colluding site sends is known, and who may fail is not there."""
    assert counted_sites(make_experiment(*SUMS, *settings), attacked) == sites


def test_a_sum_is_scored_when_it_is_whole():
    """One site's part is its own share of the noise: alone it would show more than is claimed."""
    canaries, key = GradientCanaries(4, 0), f"{PREFIX}layer.lora_B.weight"
    parts = [np.arange(8).reshape(4, 2) * 2**GRID_BITS, np.full((4, 2), 5 * 2**GRID_BITS)]
    noise = SeededNoise(seeded(0, "noise"))
    plan = {"sample_rate": 1.0, "noise_multiplier": 2.0, "max_grad_norm": 1.0, "noise": noise}
    sum_of = NoisySum((), (), 2, **plan)
    seen, place = Seen(canaries, ("1", "0")), ("a task", "learn", 1, 1)
    for client in ("2", "1"):
        seen.take(client, place, {key: parts[0]}, sum_of)
    assert not seen.total.any()
    seen.take("0", place, {key: parts[1]}, sum_of)
    both = {"layer.lora_B": torch.tensor((parts[0] + parts[1]) / 2**GRID_BITS)}
    expected = (canaries.scores(both) - 0.5) / 4
    np.testing.assert_allclose(seen.total, expected)
    assert (seen.open, seen.scored) == ({}, 1)

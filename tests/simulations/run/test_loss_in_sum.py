"""Training losses that leave in a secure sum alone: the same mean, nobody's own."""

from __future__ import annotations

import numpy as np
import pytest

from deal_core.privacy.policy import Policy, figures_allowed
from deal_core.randomness import seeded_numpy
from deal_core.secure_sum.layout import Layout
from deal_core.wire.summed_loss import (
    LARGEST_LOSS,
    loss_fields,
    loss_values,
    mean_loss,
    without_loss,
)
from simulations.report.run.log import read_log
from tests.simulations.run.secure_runs import SHORT, rounds

PRIVACY = {
    "record": ("privacy.mechanism=record", "privacy.target_epsilon=8"),
    "client": ("privacy.mechanism=client", "privacy.target_epsilon=8"),
}
ALONE = pytest.mark.usefixtures("one_model")


@ALONE
@pytest.mark.parametrize("rule", ["fedit", "ffa"])
def test_the_mean_is_that_of_losses_in_the_clear(make_experiment, tmp_path, rule):
    asked = (*SHORT, "federation.clients=3", f"aggregation.rule={rule}")
    masked = rounds(make_experiment(*asked), tmp_path / "masked")
    plain = rounds(make_experiment(*asked, "aggregation.secure=false"), tmp_path / "plain")
    losses, weights = (
        plain.told("client_finished", "loss"),
        plain.told("client_finished", "num_examples"),
    )
    assert len(set(losses)) == 3
    (told,) = masked.told("loss_summed", "loss")
    assert told == pytest.approx(np.average(losses, weights=weights), abs=1e-5)
    assert not any("loss" in event for event in masked.events if "client" in event)
    assert [one.loss for one in read_log(masked.events).rounds.values()] == [told]


@ALONE
@pytest.mark.parametrize("protected", ["record", "client"])
def test_no_loss_is_summed_under_a_mechanism(make_experiment, tmp_path, protected):
    asked = (*SHORT, "federation.clients=3", "aggregation.rule=ffa", *PRIVACY[protected])
    ran = rounds(make_experiment(*asked), tmp_path)
    assert ran.told("summed", "sites") == [3]
    assert ran.told("loss_summed", "loss") == []


@pytest.mark.parametrize(
    ("metrics", "masked", "kept"),
    [
        ("clear", False, False),
        ("clear", True, False),
        ("summed", True, False),
        ("summed", False, True),
        ("noised", True, True),
        ("none", True, True),
    ],
)
def test_a_site_lets_its_loss_go_as_its_policy_says(metrics, masked, kept):
    figures = {"num_examples": 7.0, "loss": 1.5}
    left = figures_allowed(figures, Policy(metrics=metrics), masked)
    assert ("loss" not in left) == kept


def test_who_says_nothing_does_not_count_and_nobody_leaves_the_ring():
    sites = [(0.5, 0.25), (None, 1.0), (float("nan"), 1.0), (float("inf"), 1.0), (1e9, 0.75)]
    layout = Layout(loss_fields(32, 5), 32, 5)
    values = [loss_values(loss, weight) for loss, weight in sites]
    words = [layout.encode(each, seeded_numpy("loss")).words for each in values]
    sums = layout.decode(np.sum(words, axis=0, dtype=words[0].dtype))
    expected = (0.5 * 0.25 + LARGEST_LOSS * 0.75) / 1.0
    assert mean_loss(sums) == pytest.approx(expected, abs=1e-4)
    assert mean_loss({**sums, **loss_values(None, 1.0)}) is None
    assert mean_loss({}) is None
    assert without_loss({**sums, "x": np.zeros(2)}).keys() == {"x"}

"""Training losses that leave in a secure sum alone: the same mean, nobody's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from client.egress import check_reply
from deal_core.lora.payload import PayloadError
from deal_core.privacy.policy import Policy, figures_allowed
from deal_core.randomness import seeded_numpy
from deal_core.secure_sum.layout import Layout, SumField
from deal_core.wire.secure_layout import (
    LARGEST_LOSS,
    LOSS,
    LOSS_KEPT,
    loss_fields,
    loss_values,
    mean_loss,
    without_loss,
)
from simulations.engines.worker_pool import assume_identity
from simulations.report.record import RunLog
from tests.simulations.run.secure_runs import SHORT, rounds
from tests.slow import slow_but

ALONE = pytest.mark.usefixtures("one_model")


@ALONE
@pytest.mark.parametrize("rule", slow_but(["fedit", "ffa"], "ffa"))
def test_the_mean_is_that_of_losses_in_the_clear(make_experiment, tmp_path, rule):
    asked = (*SHORT, "federation.clients=3", f"aggregation.rule={rule}")
    masked = rounds(make_experiment(*asked), tmp_path / "masked")
    plain = rounds(make_experiment(*asked, "aggregation.secure=false"), tmp_path / "plain")
    losses = plain.told("client_finished", "loss")
    assert len(set(losses)) == 3
    (told,) = masked.told("loss_summed", "loss")
    assert told == pytest.approx(np.mean(losses), abs=1e-5)
    assert not any("loss" in event for event in masked.events if "client" in event)
    assert [one.loss for one in RunLog(masked.events).rounds] == [told]


@pytest.mark.slow
@ALONE
def test_no_loss_is_summed_under_a_mechanism(make_experiment, tmp_path):
    protected = ("privacy.mechanism=record", "privacy.target_epsilon=8")
    asked = (*SHORT, "federation.clients=3", "aggregation.rule=ffa", *protected)
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
        ("none", True, True),
    ],
)
def test_a_site_lets_its_loss_go_as_its_policy_says(metrics, masked, kept):
    figures = {"num_examples": 7.0, "loss": 1.5}
    left = figures_allowed(figures, Policy(metrics=metrics), masked)
    assert ("loss" not in left) == kept


def summed(losses: list[float | None], bits: int = 32) -> dict[str, NDArray[Any]]:
    """What the server decodes of a value and the losses."""
    count = len(losses)
    layout = Layout((SumField("x", (2,), 1.0, 1024.0), *loss_fields(bits, count)), bits, count)
    vectors = []
    for loss in losses:
        values = {"x": np.ones(2), **loss_values(loss)}
        vectors.append(layout.encode(values, seeded_numpy("loss")).words)
    return layout.decode(np.sum(vectors, axis=0, dtype=vectors[0].dtype))


def test_losses_beyond_the_bound_count_as_the_bound():
    assert mean_loss(summed([0.5, 1e9]), 2) == pytest.approx((0.5 + LARGEST_LOSS) / 2, abs=1e-4)


@pytest.mark.parametrize("kept", [None, float("nan"), float("inf")])
@pytest.mark.parametrize("tellers", [1, 3])
def test_where_one_keeps_its_loss_nothing_can_be_read_of_the_others(kept, tellers):
    """The decoded field is as likely any word of the ring, whatever the others have added."""
    seen = [summed([0.5] * tellers + [kept]) for _ in range(400)]
    assert all(mean_loss(each, tellers + 1) is None for each in seen)
    assert len({int(each[LOSS_KEPT]) for each in seen}) > 390  # how many keep theirs is not told
    bound = max(float(abs(each[LOSS])) for each in seen)
    told = np.array([float(each[LOSS]) for each in seen]) / bound
    assert len(set(told)) > 390
    counts, _ = np.histogram(told, bins=8, range=(-1, 1))
    assert float(((counts - 50) ** 2 / 50).sum()) < 35  # chi-square, 7 degrees: 1 in 100,000
    assert without_loss(seen[0]).keys() == {"x"}  # no sum over a part of the sites


@pytest.mark.parametrize("forged", [-320.0, 320.0])
def test_a_mean_that_no_losses_can_have_is_not_told(forged):
    sums = summed([1.0, 2.0])
    assert mean_loss(sums, 2) == pytest.approx(1.5, abs=1e-4)
    assert mean_loss({**sums, LOSS: sums[LOSS] + forged}, 2) is None
    assert mean_loss({"x": np.zeros(2)}, 2) is None


def test_under_a_mask_the_number_of_examples_goes_into_the_sum_and_no_more():
    figures = {"num_examples": 7.0, "loss": 1.5, "seconds": 2.0}
    none = Policy(metrics="none")
    assert figures_allowed(figures, none, masked=True) == {"num_examples": 7.0}
    assert figures_allowed(figures, none, masked=False) == {"num_examples": 1.0}
    assert figures_allowed(figures, None, masked=True) == figures


@pytest.mark.parametrize(
    "figures", [{"loss": 1.0}, {"seconds": 1.0}, {"num_examples": 89.0}, {"num_examples": 89.0001}]
)
def test_figures_of_an_update_do_not_leave_beside_a_mask(figures):
    """Whoever puts them into the reply: the last look at it keeps them."""
    told = RecordDict({"status": ConfigRecord({"code": "ok"}), "metrics": MetricRecord(figures)})
    asked = RecordDict({"secure": ConfigRecord({"request": b""})})
    with assume_identity(1, 1):
        request = Message(asked, 1, "train")
        with pytest.raises(PayloadError, match="in a secure sum alone"):
            check_reply(Message(told, reply_to=request), request)
        plain = Message(RecordDict({"x": ConfigRecord({})}), 1, "train")
        assert check_reply(Message(told, reply_to=plain), plain)

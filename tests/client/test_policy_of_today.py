"""What a site kept under an earlier policy, when its policy of today is stricter."""

from __future__ import annotations

import pytest
import torch

from tests.client.real_site import RealSite, asked, code, update

pytestmark = pytest.mark.usefixtures("one_model")


def test_a_tighter_clipping_bound_holds_at_once(tmp_path):
    experiment = asked("privacy.max_grad_norm=10.0")
    assert code(RealSite(tmp_path).answer(experiment, {})) == "ok"
    tighter = RealSite(tmp_path, 'mechanism = "record"\nmax_epsilon = 1.0\nmax_grad_norm = 1.0\n')
    assert code(tighter.answer(experiment, {"server_round": 2})) == "policy"


OPEN = 'mechanism = "none"\nmetrics = "clear"\nshare_num_examples = true\n'


@pytest.mark.parametrize(
    ("stricter", "ends"),
    [
        ('mechanism = "record"\nmax_epsilon = 1.0\n', "policy"),
        ('mechanism = "none"\nsecure_aggregation = "required"\n', "policy"),
        ('mechanism = "none"\nmax_rank = 1\n', "policy"),
        ('mechanism = "none"\nmin_records = 100\n', "no-data"),
    ],
)
def test_an_update_that_was_kept_does_not_outlive_a_stricter_policy(tmp_path, stricter, ends):
    """It was made and never sent; the site has thought better of it; the server asks again."""
    site, experiment = RealSite(tmp_path, OPEN), asked("privacy.mechanism=none")
    assert code(site.answer(experiment, {})) == "ok"
    assert list((tmp_path / "state").rglob("update-*.safetensors"))
    reply = RealSite(tmp_path, stricter).answer(experiment, {})
    assert code(reply) == ends
    assert set(reply.content) == {"status"}


def test_figures_that_were_kept_leave_as_the_policy_of_today_says(tmp_path):
    experiment = asked("privacy.mechanism=none")
    first = RealSite(tmp_path, OPEN).answer(experiment, {})
    assert {"loss", "seconds"} <= set(first.content["metrics"])
    assert first.content["metrics"]["num_examples"] == 40
    again = RealSite(tmp_path, 'mechanism = "none"\n').answer(experiment, {})
    assert set(again.content["metrics"]) == {"num_examples"}
    assert again.content["metrics"]["num_examples"] == 1
    one, two = (update(reply) for reply in (first, again))  # the same one, not trained again
    assert torch.equal(one, two)


def test_spending_that_was_kept_leaves_as_the_policy_of_today_says(tmp_path):
    private = 'mechanism = "record"\nmax_epsilon = 1.0\n'
    told = {"epsilon", "delta", "n_delta"}
    first = RealSite(tmp_path, private + "share_num_examples = true\n").answer(asked(), {})
    assert told <= set(first.content["metrics"])
    again = RealSite(tmp_path, private + "spending = false\n").answer(asked(), {})
    assert set(again.content["metrics"]) == set(first.content["metrics"]) - told
    one, two = (update(reply) for reply in (first, again))  # the same one, charged once
    assert torch.equal(one, two)


PRIVATE = 'mechanism = "record"\n'


@pytest.mark.parametrize(
    ("asks", "lax", "stricter", "ends"),
    [
        ("privacy.target_epsilon=50", PRIVATE, PRIVATE + "max_epsilon = 1.0\n", "budget-spent"),
        ("privacy.target_epsilon=50", PRIVATE, PRIVATE + "max_grad_norm = 0.01\n", "policy"),
        ("privacy.target_epsilon=500", PRIVATE, PRIVATE + "min_records = 1000\n", "no-data"),
    ],
)
def test_a_charged_update_does_not_outlive_a_stricter_policy(tmp_path, asks, lax, stricter, ends):
    """It was charged and never left: the ledger keeps it for the same request."""
    experiment = asked(asks, "privacy.metrics=none")
    first = RealSite(tmp_path, lax)
    assert code(first.answer(experiment, {})) == "ok"
    reply = RealSite(tmp_path, stricter).answer(experiment, {})
    assert code(reply) == ends
    assert set(reply.content) == {"status"}
    assert len(first.events) == 1

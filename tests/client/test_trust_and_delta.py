"""δ, whether the server is trusted, and what is told of spending are the site's to say."""

from __future__ import annotations

import pytest

from tests.client.real_site import RealSite, asked, code

pytestmark = pytest.mark.usefixtures("one_model")


@pytest.fixture
def site(tmp_path) -> RealSite:
    return RealSite(tmp_path)


@pytest.mark.parametrize(("asks", "delta"), [("0.9", 1e-3), ("0.0", 1e-3), ("0.00001", 1e-5)])
def test_the_server_sets_no_large_delta(site, asks, delta):
    site.answer(asked(f"privacy.target_delta={asks}"), {})
    assert site.events[0].delta == pytest.approx(delta)


CLIENT = ("privacy.mechanism=client", "privacy.target_epsilon=500")


@pytest.mark.parametrize("asks", ["0.9", "0.0"])
def test_the_server_sets_no_large_delta_of_a_whole_client(tmp_path, asks):
    site = RealSite(tmp_path, policy='mechanism = "client"\n')
    experiment = asked(*CLIENT, "privacy.trusted_server=false", f"privacy.target_delta={asks}")
    assert code(site.answer(experiment, {})) == "ok"
    assert site.events[0].delta <= 1e-5


def test_whether_the_server_is_trusted_is_the_sites_to_say(tmp_path):
    site = RealSite(tmp_path, policy='mechanism = "client"\n')
    assert code(site.answer(asked(*CLIENT, "privacy.trusted_server=true"), {})) == "policy"
    assert site.events == []
    (tmp_path / "trusting").mkdir()
    policy = 'mechanism = "client"\ntrusted_server = true\n'
    trusting = RealSite(tmp_path / "trusting", policy=policy)
    assert code(trusting.answer(asked(*CLIENT, "privacy.trusted_server=true"), {})) == "ok"
    assert [event.mechanism for event in trusting.events] == ["trusted-server"]


def test_what_a_client_has_spent_stays_where_the_policy_says_so(tmp_path):
    site = RealSite(tmp_path, policy='mechanism = "client"\nspending = false\n')
    reply = site.answer(asked(*CLIENT, "privacy.trusted_server=false"), {})
    assert code(reply) == "ok"
    told = reply.content.metric_records["metrics"].keys()
    assert not {"epsilon", "delta"} & set(told)

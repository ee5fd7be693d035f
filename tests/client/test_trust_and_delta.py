"""δ is the site's to say."""

from __future__ import annotations

import pytest

from deal_core.privacy.certificate import certificate
from tests.client.real_site import RealSite, asked, code

pytestmark = pytest.mark.usefixtures("one_model")


@pytest.fixture
def site(tmp_path) -> RealSite:
    return RealSite(tmp_path)


@pytest.mark.parametrize(("asks", "delta"), [("0.0", 1e-4), ("0.0001", 1e-4), ("0.00001", 1e-5)])
def test_the_server_sets_no_large_delta(site, asks, delta):
    site.answer(asked(f"privacy.target_delta={asks}"), {})
    assert site.events[0].delta == pytest.approx(delta)
    signed = certificate(site.ledger)["statement"]
    assert signed["n_delta"] == pytest.approx(120 * delta)


@pytest.mark.parametrize("asks", ["0.9", "0.001"])
def test_a_delta_that_is_large_for_the_number_of_records_is_refused(tmp_path, site, asks):
    """120 records: 0.001 of each is 0.12; a site that names it itself takes part."""
    experiment = asked(f"privacy.target_delta={asks}")
    assert code(site.answer(experiment, {})) == "policy"
    assert site.events == []
    (tmp_path / "own").mkdir()
    policy = 'mechanism = "record"\nmax_epsilon = 1.0\nmax_delta = 0.001\n'
    own = RealSite(tmp_path / "own", policy=policy)
    assert code(own.answer(experiment, {})) == "ok"
    assert own.events[0].delta == 0.001

"""A run without a mechanism: what leaves is listed, of limited size, and of many records."""

from __future__ import annotations

import pytest

from tests.client.real_site import LABELS, RealSite, asked, code, rows

pytestmark = pytest.mark.usefixtures("one_model")


@pytest.fixture
def site(tmp_path) -> RealSite:
    return RealSite(tmp_path)


NONE = ("privacy.mechanism=none",)


def test_unprotected_releases_are_in_the_ledger(tmp_path):
    from deal_core.privacy.certificate import certificate, check_certificate

    site = RealSite(tmp_path, policy='metrics = "clear"\n')
    assert code(site.answer(asked(*NONE), {})) == "ok"
    evaluate = {"task": "", "stage": 0, "server_round": 0, "tasks": ["surgery"]}
    assert code(site.answer(asked(*NONE), evaluate, kind="evaluate")) == "ok"
    assert [event.mechanism for event in site.events] == ["none", "clear-counts"]
    assert not any(event.protected for event in site.events)
    statement = check_certificate(certificate(site.ledger))
    assert statement["unprotected"] == 2
    assert statement["epsilon"] is None
    assert "void" in statement["composed_over"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("adapter.rank=64",), "policy"),
        (('adapter.target_modules=["0.attention.output.dense"]',), "policy"),
        (("adapter.rank=16",), "ok"),
    ],
)
def test_an_unprotected_update_carries_only_so_much(tmp_path, overrides, expected):
    site = RealSite(tmp_path, policy='metrics = "none"\n')
    experiment = asked(*NONE, *overrides)
    assert code(site.answer(experiment, {})) == expected
    assert len(site.events) == (expected == "ok")


def test_an_unprotected_update_is_of_many_records_or_none(tmp_path):
    few = {**{t: rows(t) for t in LABELS}, "surgery": rows("surgery", 5)}
    site = RealSite(tmp_path, policy='metrics = "none"\n', data=few)
    assert code(site.answer(asked(*NONE), {})) == "no-data"
    assert site.events == []

"""What a site's own log says of a request that it declines, and of one that fails."""

from __future__ import annotations

import pytest

from tests.client.real_site import LABELS, RealSite, asked, code

pytestmark = pytest.mark.usefixtures("one_model")
EVALUATION = {"task": "", "stage": -1, "server_round": 0, "tasks": list(LABELS)}


@pytest.mark.parametrize(
    ("kind", "mechanism", "instruction", "ends"),
    [
        ("evaluate", "record", EVALUATION, "withheld"),  # counts stay by default
        ("train", "none", {}, "policy"),
    ],
)
def test_what_a_site_declines_by_its_own_rules_is_no_fault(
    tmp_path, kind, mechanism, instruction, ends
) -> None:
    site = RealSite(tmp_path)
    reply = site.answer(asked(f"privacy.mechanism={mechanism}"), instruction, kind=kind)
    assert code(reply) == ends
    event = site.log()[-1]
    assert event["event"] == f"request_{ends}"
    assert event["reason"]
    assert "traceback" not in event
    assert "Refusal" not in str(event)


def test_what_cannot_be_read_is_logged_with_its_traceback(tmp_path) -> None:
    site = RealSite(tmp_path)
    assert code(site.answer(asked(), {"task": "no such task"})) != "ok"
    event = site.log()[-1]
    assert "Traceback" in event["traceback"]
    assert event["error"]

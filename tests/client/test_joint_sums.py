"""A real site that is asked for the sums of all tasks at once."""

from __future__ import annotations

import shutil

import pytest

from deal_core.privacy.interface import LocalUpdate, Refusal
from deal_core.privacy.policy import OutsidePolicy
from deal_core.wire.instruction import Instruction
from tests.client.real_site import LABELS, RealSite, asked, code, rows

pytestmark = pytest.mark.usefixtures("one_model")

POLICY = 'mechanism = "none"\nmetrics = "clear"\nshare_sums = true\nmin_records = 8\n'
TASKS = ("laboratory", "surgery", "skin")
ASKED = (
    "privacy.mechanism=none",
    "method.name=prototype",
    "stream.schedule=joint",
    "method.prototype.directions=0",
    'federation.sites=["north", "south", "east"]',
    "federation.clients=3",
)


def given(site: RealSite, *overrides: str) -> LocalUpdate:
    """What the site would mask for a sum of three."""
    experiment = asked(*ASKED, *overrides)
    ask = Instruction(task=TASKS[0], tasks=TASKS, stage=0, server_round=1, rank=1, retained_rank=1)
    return site.update(experiment, ask, sites=3)


def test_a_task_of_fewer_records_than_the_policy_lets_go_has_no_part_and_the_ledger_says_of_which(
    tmp_path,
):
    """Each task whose records were read has an entry; of the others noise alone has left."""
    many = {task: rows(task, 400) for task in ("surgery", "skin")}
    data = {"laboratory": rows("laboratory", 7), **many}
    site = RealSite(tmp_path, POLICY, data)
    sums = given(site).arrays
    size = 768 + 1
    assert {key: value.shape for key, value in sums.items()} == {
        f"{place}.class_sums": (2, size) for place in range(3)
    }
    numbers = [sums[f"{place}.class_sums"][:, -1] / 2**16 / 0.25 for place in range(3)]
    noise = 6 * 0.61 / 0.25
    assert numbers[0] == pytest.approx([0, 0], abs=noise)
    for own in numbers[1:]:
        assert own == pytest.approx([200, 200], abs=noise + 10)
    assert [event.task for event in site.events] == ["surgery", "skin"]


def test_a_real_site_draws_its_noise_anew(tmp_path):
    """What the server knows of the run gives it no part of the noise."""
    site, found = RealSite(tmp_path, POLICY), []
    for _ in range(2):
        found.append(given(site).arrays["0.class_sums"])
        shutil.rmtree(tmp_path / "state" / "sums")  # else it gives the same again
    first, second = found
    assert (first != second).mean() > 0.99


def test_where_every_task_has_fewer_nothing_leaves(tmp_path):
    """Though together they have enough."""
    site = RealSite(tmp_path, POLICY, {task: rows(task, 7) for task in LABELS})
    with pytest.raises(Refusal) as refusal:
        given(site)
    assert refusal.value.code == "no-data"
    assert site.events == []


def test_without_masks_nothing_leaves_whatever_is_asked(tmp_path):
    site = RealSite(tmp_path, POLICY)
    reply = site.answer(asked(*ASKED), {"task": TASKS[0], "tasks": list(TASKS)})
    assert (code(reply), set(reply.content)) == ("refused", {"status"})
    assert site.events == []


@pytest.mark.parametrize(
    "setting",
    [
        "method.prototype.noise_multiplier=0",
        "method.prototype.noise_multiplier=0.1",
        "method.name=linear-probe",
    ],
)
def test_sums_with_less_noise_than_they_need_do_not_leave_a_site(tmp_path, setting):
    """They are for simulations; ``share_sums`` is leave to give them with noise."""
    site = RealSite(tmp_path, POLICY)
    with pytest.raises((Refusal, OutsidePolicy)):
        given(site, setting)
    assert site.events == []

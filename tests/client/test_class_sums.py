"""A real site gives the class sums of a task once: in later runs the same again, or none; and of
all tasks at once those that it may give."""

import shutil

import numpy as np
import pytest

from client.gate import Refusal
from deal_core.wire.instruction import Instruction
from tests.client.real_site import LABELS, RealSite, asked, code, rows

pytestmark = pytest.mark.usefixtures("one_model")

POLICY = 'mechanism = "none"\nmetrics = "clear"\nshare_sums = true\nmin_records = 8\n'
TASKS = ("laboratory", "surgery")
PUBLIC = "".join(f"Sentence {n} is about {n % 7} things\n" for n in range(40))


def site_of(folder, **records):
    """A site with so many records of each task."""
    (folder / "public.txt").write_text(PUBLIC)
    numbers = {task: records.get(task, 40) for task in TASKS}
    data = {task: rows(task, n) for task, n in numbers.items()}
    lines = f'public_path = "{folder / "public.txt"}"\n'
    return RealSite(folder, POLICY, data, data_lines=lines)


def given(site, *overrides, sites=3, tasks=(TASKS[0],), **told):
    """What it would mask for a sum of so many sites, in a run of its own."""
    experiment = asked(
        "privacy.mechanism=none",
        "method.name=prototype",
        'federation.sites=["north", "south", "east"]',
        "federation.clients=3",
        "method.prototype.directions=6",
        f'data.public_path="{site.folder / "public.txt"}"',
        *overrides,
    )
    several = {"tasks": tasks} if len(tasks) > 1 else {}
    ask = Instruction(
        task=tasks[0], stage=0, server_round=1, rank=1, retained_rank=1, **several, **told
    )
    return site.update(experiment, ask, sites=sites).arrays


def test_it_gives_the_same_again_whatever_has_become_of_its_data(tmp_path):
    """A second sum, with one record more, would tell that record."""
    first = given(site_of(tmp_path))["0.class_sums"]
    assert first.any()
    for later in (40, 41, 20):
        again = given(site_of(tmp_path, laboratory=later))["0.class_sums"]
        assert np.array_equal(first, again)
    other = given(site_of(tmp_path), tasks=(TASKS[1],))["0.class_sums"]
    assert not np.array_equal(first, other)


def test_another_site_has_noise_of_its_own(tmp_path):
    found = []
    for name in ("north", "south"):
        (tmp_path / name).mkdir()
        found.append(given(site_of(tmp_path / name))["0.class_sums"])
    assert (found[0] != found[1]).mean() > 0.9


def test_it_gives_no_sums_of_another_form(tmp_path):
    """Nor what it gave, where units or noise are not those that the others now count on, or the
    directions are of other texts."""
    site = site_of(tmp_path)
    given(site)
    for setting in (
        "method.prototype.directions=5",
        "method.prototype.layers=2",
        "privacy.max_grad_norm=0.5",
        "method.prototype.noise_multiplier=5",
    ):
        with pytest.raises(Refusal):
            given(site, setting)
    (tmp_path / "public.txt").write_text(PUBLIC.replace("things", "people and their dogs"))
    with pytest.raises(Refusal):
        given(site)


def test_a_share_of_the_noise_among_many_sites_is_too_little_among_few(tmp_path):
    site = site_of(tmp_path)
    given(site, sites=100)
    with pytest.raises(Refusal):
        given(site, sites=3)


def test_noise_of_sums_suffices_against_as_many_sites_as_the_policy_says(tmp_path):
    """Those of a lie: the terms of the masks count on one that colludes, the shares on none."""
    with pytest.raises(Refusal, match="policy wants noise that suffices against 1 other"):
        given(site_of(tmp_path), "privacy.colluding=0")
    assert given(site_of(tmp_path), "privacy.colluding=1")


@pytest.mark.parametrize(
    ("schedule", "told"), [("joint", {}), ("per-client", {"past": (TASKS[0],)})]
)
def test_where_no_record_was_given_a_task_may_be_given_later(tmp_path, schedule, told):
    """Of too few records, or of a task that it has not worked on, noise alone has left."""
    few = site_of(tmp_path, surgery=7)
    at = f"stream.schedule={schedule}"
    noise = given(few, at, tasks=TASKS, **told)["1.class_sums"]
    whole = site_of(tmp_path, surgery=400)
    if schedule == "joint":
        after = given(whole, at, tasks=TASKS)["1.class_sums"]
    else:
        after = given(whole, at, tasks=(TASKS[1],))["0.class_sums"]
    counts = [own[:, -1].sum() / 2**16 / 0.25 for own in (noise, after)]
    assert abs(counts[0]) < 60
    assert counts[1] > 100


THREE = ("laboratory", "surgery", "skin")
JOINT = (
    "privacy.mechanism=none",
    "method.name=prototype",
    "stream.schedule=joint",
    "method.prototype.directions=0",
    'federation.sites=["north", "south", "east"]',
    "federation.clients=3",
)


def given_jointly(site, *overrides):
    """What the site would mask for a sum of three."""
    experiment = asked(*JOINT, *overrides)
    ask = Instruction(task=THREE[0], tasks=THREE, stage=0, server_round=1, rank=1, retained_rank=1)
    return site.update(experiment, ask, sites=3)


def test_a_task_of_fewer_records_than_the_policy_lets_go_has_no_part_and_the_ledger_says_of_which(
    tmp_path,
):
    """Each task whose records were read has an entry; of the others noise alone has left."""
    many = {task: rows(task, 400) for task in ("surgery", "skin")}
    data = {"laboratory": rows("laboratory", 7), **many}
    site = RealSite(tmp_path, POLICY, data)
    sums = given_jointly(site).arrays
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
        found.append(given_jointly(site).arrays["0.class_sums"])
        shutil.rmtree(tmp_path / "state" / "sums")  # else it gives the same again
    first, second = found
    assert (first != second).mean() > 0.99


def test_where_every_task_has_fewer_nothing_leaves(tmp_path):
    """Though together they have enough."""
    site = RealSite(tmp_path, POLICY, {task: rows(task, 7) for task in LABELS})
    with pytest.raises(Refusal) as refusal:
        given_jointly(site)
    assert refusal.value.code == "no-data"
    assert site.events == []


def test_without_masks_nothing_leaves_whatever_is_asked(tmp_path):
    site = RealSite(tmp_path, POLICY)
    reply = site.answer(asked(*JOINT), {"task": THREE[0], "tasks": list(THREE)})
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
    with pytest.raises(Refusal):
        given_jointly(site, setting)
    assert site.events == []

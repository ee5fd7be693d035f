"""A real site gives the class sums of a task once: in later runs the same again, or none."""

from __future__ import annotations

import numpy as np
import pytest

from deal_core.privacy.interface import Refusal
from deal_core.wire.instruction import Instruction
from tests.client.real_site import RealSite, asked, rows

pytestmark = pytest.mark.usefixtures("one_model")

POLICY = 'mechanism = "none"\nmetrics = "clear"\nshare_sums = true\nmin_records = 8\n'
TASKS = ("laboratory", "surgery")
PUBLIC = "".join(f"Sentence {n} is about {n % 7} things\n" for n in range(40))


def site_of(folder, **records: int) -> RealSite:
    """A site with so many records of each task."""
    (folder / "public.txt").write_text(PUBLIC)
    numbers = {task: records.get(task, 40) for task in TASKS}
    data = {task: rows(task, n) for task, n in numbers.items()}
    lines = f'public_path = "{folder / "public.txt"}"\n'
    return RealSite(folder, POLICY, data, data_lines=lines)


def given(site: RealSite, *overrides: str, sites: int = 3, tasks=(TASKS[0],), **told: object):
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


@pytest.mark.parametrize(
    "setting",
    [
        "method.prototype.directions=5",
        "method.prototype.layers=2",
        "privacy.max_grad_norm=0.5",
        "method.prototype.noise_multiplier=5",
    ],
)
def test_it_gives_no_sums_of_another_form(tmp_path, setting):
    """Nor what it gave, where units or noise are not those that the others now count on."""
    site = site_of(tmp_path)
    given(site)
    with pytest.raises(Refusal):
        given(site, setting)


def test_it_gives_no_sums_in_directions_of_other_texts(tmp_path):
    site = site_of(tmp_path)
    given(site)
    (tmp_path / "public.txt").write_text(PUBLIC.replace("things", "people and their dogs"))
    with pytest.raises(Refusal):
        given(site)


def test_a_share_of_the_noise_among_many_sites_is_too_little_among_few(tmp_path):
    site = site_of(tmp_path)
    given(site, sites=100)
    with pytest.raises(Refusal):
        given(site, sites=3)


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

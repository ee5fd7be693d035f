"""A site that is asked for the sums of several tasks at once: what was lost is asked again with the
next ones."""

from __future__ import annotations

import pytest
import torch
from flwr.app import Message

from tests.client.real_site import RealSite, asked, code, rows

POLICY = 'mechanism = "none"\nmetrics = "clear"\nshare_sums = true\nmin_records = 8\n'
SURGERY = {"task": "surgery", "past": ["laboratory"]}


def experiment(*more: str):
    return asked("privacy.mechanism=none", "method.name=prototype", *more)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> RealSite:
    data = {"laboratory": rows("laboratory"), "surgery": rows("surgery"), "skin": rows("skin", 7)}
    return RealSite(tmp_path_factory.mktemp("site"), POLICY, data)


def sums(reply: Message) -> dict[str, torch.Tensor]:
    assert code(reply) == "ok"
    record = reply.content.array_records["sums"]
    return {key: torch.tensor(record[key].numpy()) for key in record}


def test_sums_of_two_tasks_are_those_of_each(site):
    both = sums(site.answer(experiment(), SURGERY | {"tasks": ["surgery", "laboratory"]}))
    for place, task in enumerate(("surgery", "laboratory")):
        alone = sums(site.answer(experiment(), {"task": task}, run=f"run-{task}"))
        for name, part in alone.items():
            assert torch.equal(both[f"{place}.{name.partition('.')[2]}"], part)


def test_a_task_of_fewer_records_than_the_policy_lets_go_has_no_part(site):
    reply = site.answer(
        experiment(), {"task": "skin", "tasks": ["skin", "surgery"], "past": ["surgery"]}, run="few"
    )
    given = sums(reply)
    assert not given["0.count"].any()
    assert not given["0.sum"].any()
    assert not given["0.gram"].any()
    assert float(given["1.count"].sum()) == 40
    assert code(site.answer(experiment(), {"task": "skin"}, run="alone")) == "no-data"


@pytest.mark.parametrize(
    ("change", "config"),
    [
        ({"tasks": ["surgery", "skin"]}, ()),
        ({"tasks": ["laboratory", "surgery"]}, ()),
        ({"tasks": ["surgery", "nowhere"]}, ()),
        ({"tasks": ["surgery", "laboratory"]}, ("method.name=sequential",)),
        ({"tasks": ["surgery", "laboratory"]}, ("method.name=linear-probe",)),
    ],
    ids=["one not worked on", "another first", "no such task", "to be learnt", "in every round"],
)
def test_other_tasks_are_refused(site, change, config):
    reply = site.answer(experiment(*config), SURGERY | change, run=str(change) + str(config))
    assert code(reply) == "failed"
    assert not reply.content.array_records

"""A real site that is asked for the sums of all tasks at once."""

from __future__ import annotations

import torch

from tests.client.real_site import LABELS, RealSite, asked, code, rows

POLICY = 'mechanism = "none"\nmetrics = "clear"\nshare_sums = true\nmin_records = 8\n'
ALL = {"task": "laboratory", "tasks": ["laboratory", "surgery", "skin"]}


def test_a_task_of_fewer_records_than_the_policy_lets_go_has_no_part_and_the_ledger_says_of_which(
    tmp_path,
):
    """Each task whose records were read has an entry; of the others nothing has left."""
    data = {"laboratory": rows("laboratory", 7), "surgery": rows("surgery"), "skin": rows("skin")}
    site = RealSite(tmp_path, POLICY, data)
    config = asked("privacy.mechanism=none", "method.name=prototype", "stream.schedule=joint")
    reply = site.answer(config, ALL)
    assert code(reply) == "ok"
    record = reply.content.array_records["sums"]
    counts = {place: torch.tensor(record[f"{place}.count"].numpy()).sum() for place in range(3)}
    assert counts == {0: 0, 1: 40, 2: 40}
    assert not any(record[f"0.{name}"].numpy().any() for name in ("sum", "gram"))
    assert [event.task for event in site.events] == ["surgery", "skin"]


def test_where_every_task_has_fewer_nothing_leaves(tmp_path):
    """Though together they have enough."""
    site = RealSite(tmp_path, POLICY, {task: rows(task, 7) for task in LABELS})
    config = asked("privacy.mechanism=none", "method.name=prototype", "stream.schedule=joint")
    reply = site.answer(config, ALL)
    assert code(reply) == "no-data"
    assert not reply.content.array_records
    assert site.events == []

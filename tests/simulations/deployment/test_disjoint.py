"""A site learns that its tasks share somebody before it serves, and not by refusing one of them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from deal_core.errors import UserError
from simulations.deployment.keys import make_authority
from simulations.deployment.site.check import check_site
from simulations.deployment.site.folder import init_site, start_site

AGREED = {"triage": ("a", "b"), "ward": ("c", "d")}


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """Two people have the same text, each in one task."""
    data = tmp_path / "data"
    for task, labels in AGREED.items():
        (data / task).mkdir(parents=True)
        rows = [
            {"text": f"{task} case {n}", "label": labels[n % 2], "patient": f"{task} {n}"}
            for n in range(40)
        ]
        rows.append({"text": "no findings", "label": labels[0], "patient": f"{task} 40"})
        for split in ("train", "test"):
            lines = [json.dumps(row) + "\n" for row in rows]
            (data / task / f"{split}.jsonl").write_text("".join(lines))
    authority = tmp_path / "given.crt"
    authority.write_bytes(make_authority().certificate)
    folder = tmp_path / "site"
    init_site(folder, data, "north", "127.0.0.1:1", authority, labels=AGREED)
    return folder


def declare(site: Path, column: str = "", other: str = "") -> None:
    path = site / "site.toml"
    text = path.read_text()
    text = text.replace("[policy]", "[policy]\ndisjoint_tasks = true", 1)
    if column:
        text = text.replace("[data]\n", f'[data]\nid_column = "{column}"\n', 1)
    path.write_text(text)
    if other:  # a patient of the ward is in triage as well
        train = site.parent / "data" / "ward" / "train.jsonl"
        train.write_text(train.read_text().replace("ward 7", other))


def test_who_declares_disjoint_tasks_says_whose_a_record_is(site: Path) -> None:
    declare(site)
    with pytest.raises(UserError, match=r"no column says it; set data\.id_column"):
        check_site(site, offline=True)


def test_equal_texts_of_two_people_are_in_nobodys_way(site: Path) -> None:
    declare(site, "patient")
    report = check_site(site, offline=True)
    assert not report.problems
    assert "policy.disjoint_tasks: no id is in two of 2 tasks" in report.lines


def test_somebody_in_two_tasks_is_a_problem_before_anything_is_served(site: Path) -> None:
    declare(site, "patient", "triage 7")
    said = "tasks 'triage' and 'ward' have 1 ids of training records in common"
    assert [said in each for each in check_site(site, offline=True).problems] == [True]
    with pytest.raises(UserError, match=re.escape(said)):
        start_site(site)


def test_nothing_is_compared_where_nothing_is_declared(site: Path) -> None:
    report = check_site(site, offline=True)
    assert not report.problems
    assert not any("disjoint" in line for line in report.lines)

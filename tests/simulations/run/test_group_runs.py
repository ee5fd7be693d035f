"""Runs where groups of records are the unit of privacy: files with a column, to the last report."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from client.app import make_app
from deal_core.config.run_config import to_run_config
from deal_core.errors import UserError
from deal_core.privacy.events import composed
from deal_core.privacy.ledger import Ledger
from server.results import read_results
from server.run import run
from simulations.engines.inprocess import InProcessGrid
from simulations.engines.worker_pool import assume_identity
from simulations.ledger_command import show
from simulations.run.check import preflight
from simulations.run.progress import Progress
from simulations.run.quick_checks import check_unit
from simulations.run.summary import privacy_text
from tests.sizes import TWO_LAYERS

pytestmark = pytest.mark.usefixtures("one_model")


def write(folder: Path, task: str, labels: tuple[str, str], patients: range) -> None:
    """Two to four records of a patient; tests have the last ones as well, and three others."""
    (folder / task).mkdir(parents=True)
    rows = [
        {"text": f"{task} note {n} of {p}", "label": labels[p % 2], "patient_id": p}
        for p in patients
        for n in range(2 + p % 3)
    ]
    new = [{**row, "patient_id": f"new {row['patient_id']}"} for row in rows[:9]]
    for split, part in (("train", rows), ("test", [*rows[-12:], *new])):
        (folder / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)) + "\n")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("patients")
    write(folder, "triage", ("urgent", "can wait"), range(24))
    write(folder, "referral", ("surgery", "skin"), range(12, 36))
    return folder


@pytest.fixture(scope="module")
def settings(make_experiment, data):
    def make(*overrides: str):
        return make_experiment(
            "data.source=files",
            f'data.path="{data}"',
            "data.tasks=[]",
            "data.max_train=0",
            "train.precision=float32",
            "train.batch_size=4",
            "privacy.mechanism=record",
            "data.partition.kind=iid",
            TWO_LAYERS,
            *overrides,
        )

    return make


GROUPS = "privacy.unit_column=patient_id"


@pytest.fixture(scope="module")
def finished(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("groups")
    experiment = settings(GROUPS, "federation.rounds=1", f'run.out="{folder}"')
    preflight(experiment)
    events: list[dict] = []
    grid = InProcessGrid(make_app(), to_run_config(experiment), 2)
    with assume_identity(1, 1):
        run(grid, experiment, events.append)
    return experiment, folder, events


def test_everything_says_the_unit_and_names_the_column(finished):
    _, folder, events = finished
    privacy = read_results(folder).privacy
    assert (privacy.mechanism, privacy.unit, privacy.unit_column) == (
        *("record", "group", "patient_id"),
    )
    told = json.loads((folder / "results.json").read_text())["privacy"]
    assert (told["unit"], told["unit_column"]) == ("group", "patient_id")
    assert "per group of 'patient_id', over all rounds and tasks" in privacy_text(privacy)
    card = (folder / "adapter" / "README.md").read_text()
    assert "one group, all records of a client with one value of 'patient_id'" in card
    progress = Progress()
    shown = [line for event in events for line in progress.hear(event) if "epsilon" in line]
    assert shown
    assert all("per group of 'patient_id'" in line for line in shown)
    out = io.StringIO()
    show(str(folder / "sites" / "0"), Console(file=out, width=200), False)
    assert "per group of 'patient_id', over all protected releases" in out.getvalue()


def test_ledgers_are_of_the_groups_that_each_client_has(finished):
    experiment, folder, _ = finished
    privacy = read_results(folder).privacy
    assert set(privacy.epsilon) == {str(k) for k in range(experiment.federation.clients)}
    for client, told in privacy.epsilon.items():
        events = Ledger(folder / "sites" / client).events()
        assert told == composed(events, events[0].delta)
        assert 7.5 < told <= 8.0
        assert {(event.unit, event.unit_column) for event in events} == {("group", "patient_id")}
    from deal_core.data import load_for_clients, partition

    parts = partition(load_for_clients(experiment, "triage"), experiment.data.partition, 2, 0)
    for client, part in enumerate(parts):
        groups = len({example.unit for example in part.train})
        assert groups < len(part.train)
        event = Ledger(folder / "sites" / str(client)).events()[0]
        rates = {e.task: e.sample_rate for e in Ledger(folder / "sites" / str(client)).events()}
        assert rates["triage"] == 4 / groups
        assert event.delta <= 1e-1


def warned(experiment) -> list[str]:
    return [finding.text for finding in check_unit(experiment)]


def test_a_column_that_repeats_is_warned_of_where_records_are_the_unit(settings):
    first, second = warned(settings())
    assert second.startswith("column 'patient_id' of task 'triage' has 24 values in 72")
    assert "set privacy.unit_column = 'patient_id'" in first
    assert warned(settings("privacy.mechanism=none")) == []


def test_patients_on_both_sides_or_at_two_clients_are_warned_of(settings):
    found = warned(settings(GROUPS))
    assert [line.split(":")[0] for line in found] == ["task 'referral'", "task 'triage'"]
    assert "groups have training and test records" in found[0]
    skewed = warned(settings(GROUPS, "data.partition.kind=dirichlet", "run.seed=2"))
    assert "groups have records at more than one client" in skewed[-1]


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (("privacy.unit_column=patients",), "no column 'patients'"),
        ((GROUPS, "data.source=medmcqa"), "needs rows with columns"),
        ((GROUPS, "data.max_train=20"), "how many a group has"),
        ((GROUPS, "federation.clients=30"), "24 training groups for 30 clients"),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_starts(settings, overrides, problem):
    with pytest.raises(UserError, match=problem) as error:
        preflight(settings(*overrides))
    assert all("\n" not in line for line in error.value.problems)

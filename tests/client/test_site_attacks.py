"""A server that bends messages and run config, and nothing else, against a real site with a policy.

Each test is one way in which the promise of epsilon could be broken by messages alone.
"""

import numpy as np
import pytest
import torch

from client.runtime import PROBE_TEXTS
from client.site_file import read_site
from deal_core.privacy import record as record_mechanism
from deal_core.privacy.certificate import certificate, check_certificate
from deal_core.privacy.dpsgd import PrivateGradients
from deal_core.privacy.events import composed, is_void
from simulations.deployment.site.check import last_verdict
from tests.client.real_site import LABELS, RealSite, code, rows, update
from tests.client.real_site import small as asked
from tests.slow import slow_but

pytestmark = pytest.mark.usefixtures("one_model")


@pytest.fixture
def site(tmp_path):
    return RealSite(tmp_path)


@pytest.fixture
def read(monkeypatch):
    """Positions of the data that each private step has read."""
    seen = []
    original = PrivateGradients.accumulate

    def watched(self, module, objective, batch):
        seen.extend(batch)
        return original(self, module, objective, batch)

    monkeypatch.setattr(PrivateGradients, "accumulate", watched)
    return seen


@pytest.mark.slow
def test_a_second_run_of_the_same_settings_is_planned_on_its_own(tmp_path):
    """It spends on top of the first, and its noise is solved for that."""
    site = RealSite(tmp_path, 'mechanism = "record"\nmax_epsilon = 4.0\n')
    experiment = asked("privacy.target_epsilon=4")
    assert code(site.answer(experiment, {}, run="run-1")) == "ok"
    reply = site.answer(experiment, {}, run="run-2")
    assert code(reply) == "ok"
    updates = [event for event in site.events if event.task == "surgery"]
    assert len({event.run for event in updates}) == len(site.ledger.plans()) == 2
    assert updates[1].noise_multiplier > 1.05 * updates[0].noise_multiplier
    told = reply.content["metrics"]["epsilon"]
    assert told == pytest.approx(composed(site.events, updates[1].delta))


def test_what_the_site_changes_in_its_file_makes_no_request_new(tmp_path):
    """Asked again after its data have moved, it gives what it charged, and pays once. The server
    may ask for a smaller delta."""
    experiment = asked("privacy.target_delta=1e-5")
    first = RealSite(tmp_path).answer(experiment, {})
    (tmp_path / "data").rename(tmp_path / "moved")
    moved = RealSite(tmp_path, data_lines='id_column = "text"\n')
    (tmp_path / "site.toml").write_text(
        (tmp_path / "site.toml").read_text().replace('path = "data"', 'path = "moved"')
    )
    again = moved.answer(experiment, {})
    assert torch.equal(update(first), update(again))
    assert len(moved.events) == len(moved.ledger.plans()) == 1
    assert moved.events[0].delta == pytest.approx(1e-5)


@pytest.mark.slow
def test_a_site_shares_no_pass_between_records(tmp_path, monkeypatch):
    """Beside others a record's numbers are rounded otherwise."""
    from deal_core.models.encoder import EncoderLabels

    shared, embed = [], EncoderLabels._embed

    def watched(self, ids, layers=1):
        shared.append(len(ids))
        return embed(self, ids, layers)

    monkeypatch.setattr(EncoderLabels, "_embed", watched)
    site = RealSite(tmp_path, 'mechanism = "record"\n')
    experiment = asked("privacy.sample_rate=1.0")
    assert code(site.answer(experiment, {"seen": ["laboratory"]})) == "ok"
    assert len(shared) > 40
    assert max(shared) <= len(PROBE_TEXTS)  # constant texts alone share a pass


@pytest.mark.parametrize("schedule", ["synchronous", "per-client"])
@pytest.mark.parametrize("tasks", [["laboratory"], ["laboratory"] * 20, ["surgery", "laboratory"]])
def test_a_mechanism_learns_the_one_task_that_it_charges(site, read, tasks, schedule):
    reply = site.answer(asked(f"stream.schedule={schedule}"), {"tasks": tasks})
    assert code(reply) == "refused"
    assert site.events == []
    assert read == []


def test_every_record_is_read_at_most_once_a_step(site, read, monkeypatch):
    """Whatever is handed to the mechanism: two positions that hold one record are noticed."""
    from client.runtime import ClientRuntime

    original = ClientRuntime.task

    def doubled(self, task, client):
        data = original(self, task, client)
        twice = {"train": [*data.train, *data.train], "record_ids": [*data.record_ids] * 2}
        return type(data)(**{**vars(data), **twice})

    monkeypatch.setattr(ClientRuntime, "task", doubled)
    reply = site.answer(asked(), {})
    assert code(reply) == "policy"
    assert (site.events, read) == ([], [])


def test_an_honest_request_is_charged_and_more_records_than_were_planned_are_not_read(
    tmp_path, read
):
    """The plan's rate and number of steps are those of so many records; and the attacks fail for
    their own reasons, not because nothing works here. The policy withholds no figure: the mechanism
    lets none go that follows from records."""
    policy = 'mechanism = "record"\nmetrics = "clear"\nshare_num_examples = true\n'
    site = RealSite(tmp_path, policy)
    reply = site.answer(asked(), {})
    assert code(reply) == "ok"
    assert [(event.task, event.delta) for event in site.events] == [("surgery", 1e-4)]
    assert certificate(site.ledger)["statement"]["n_delta"] == pytest.approx(120 * 1e-4)
    assert set(reply.content) == {"status", "lora", "metrics"}
    told = reply.content["metrics"]
    assert set(told) == {"num_examples", "epsilon", "delta", "n_delta", "simulation_only"}
    assert told["num_examples"] == 1.0
    more = RealSite(site.folder, policy, data={**site.data, "surgery": rows("surgery", 400)})
    from client.app import _runtime

    _runtime.cache_clear()
    read.clear()
    assert code(more.answer(asked(), {"server_round": 2})) == "policy"
    assert (len(more.events), read) == (1, [])


@pytest.mark.slow
def test_a_charge_names_the_task_whose_records_were_read(tmp_path, monkeypatch):
    """Under disjoint tasks the ledger is true of every record."""
    policy = 'mechanism = "record"\nmax_epsilon = 3.0\ndisjoint_tasks = true\n'
    site = RealSite(tmp_path, policy=policy)
    experiment, seen = asked("privacy.target_epsilon=3.0"), []
    original = record_mechanism.RecordMechanism._gradients

    def watched(self, ask, *given):
        seen.append((ask.task, {each.task for each in ask.record_ids}))
        return original(self, ask, *given)

    monkeypatch.setattr(record_mechanism.RecordMechanism, "_gradients", watched)
    for stage, task in enumerate(LABELS):
        for read in (task, "surgery"):
            given = {"task": task, "stage": stage, "tasks": [read]}
            assert code(site.answer(experiment, given)) == "refused"
        assert code(site.answer(experiment, {"task": task, "stage": stage})) == "ok"
    assert {task for task, _ in seen} == set(LABELS)
    assert all(read == {task} for task, read in seen)
    assert composed(site.events, site.events[0].delta, disjoint_tasks=True) <= 3.0


@pytest.mark.parametrize(
    "other",
    slow_but(
        [
            "privacy.target_epsilon=0.5",
            "train.learning_rate=0.02",
            "method.name=sequential",
            "same",
        ],
        "same",
    ),
)
@pytest.mark.parametrize("run", slow_but(["run-1", "run-2"], "run-1"))
def test_another_run_gets_an_answer_of_its_own(site, other, run):
    """Also one of equal seed and adapters: the first run's update belongs to the first run."""
    first = site.answer(asked("privacy.target_epsilon=0.9"), {}, run="run-1")
    again = site.answer(asked("privacy.target_epsilon=0.9"), {}, run="run-1")
    np.testing.assert_array_equal(update(first), update(again))
    assert len(site.events) == 1
    settings = ("privacy.target_epsilon=0.9",) if other == "same" else (other,)
    folder = "run-2" if other == "same" else run
    second = site.answer(asked(*settings), {}, run=folder)
    if code(second) == "ok":
        assert not torch.equal(update(second), update(first))
        assert len(site.events) == 2
    else:
        assert code(second) == "budget-spent"


@pytest.mark.parametrize("asks", slow_but(["0.9", "0.001"], "0.001"))
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


NONE = "privacy.mechanism=none"


def test_unprotected_releases_are_in_the_ledger(tmp_path):
    site = RealSite(tmp_path, policy='metrics = "clear"\n')
    assert code(site.answer(asked(NONE), {})) == "ok"
    evaluate = {"task": "", "stage": 0, "server_round": 0, "tasks": ["surgery"]}
    assert code(site.answer(asked(NONE), evaluate, kind="evaluate")) == "ok"
    assert [event.mechanism for event in site.events] == ["none", "clear-counts"]
    assert not any(event.protected for event in site.events)
    statement = check_certificate(certificate(site.ledger))
    assert statement["unprotected"] == 2
    assert statement["epsilon"] is None
    assert "void" in statement["composed_over"]


@pytest.mark.parametrize("shared", [True, False])
def test_what_a_site_says_of_class_means_is_in_its_ledger_and_its_log(tmp_path, shared):
    """One bit a stage, with the class sums and not with the counts; whatever is asked again."""
    site = RealSite(tmp_path, policy=f'metrics = "none"\nshare_sums = {str(shared).lower()}\n')
    config = asked(NONE, "method.prototype.enabled=on")
    ask = {"task": "", "server_round": 0, "tasks": ["surgery"], "phase": "prototypes"}
    told = [site.answer(config, ask, kind="evaluate") for _ in range(2)]
    assert [code(each) for each in told] == ["ok" if shared else "withheld"] * 2
    assert [event.mechanism for event in site.events] == ["verdict"] * shared
    assert is_void(site.events) == shared
    said = [each for each in site.log() if each["event"] == "verdict"]
    assert [(each["tasks"], each["worse"]) for each in said] == [(["surgery"], False)] * shared
    notes = list(last_verdict(read_site(tmp_path / "site.toml")))
    assert [note.endswith("of surgery: they make answers here not worse") for note in notes] == (
        [True] * shared
    )


def test_an_unprotected_update_carries_only_so_much(tmp_path):
    site = RealSite(tmp_path, policy='metrics = "none"\n')
    for more in ("adapter.rank=64", 'adapter.target_modules=["0.attention.output.dense"]'):
        assert code(site.answer(asked(NONE, more), {})) == "policy"
    assert site.events == []


def test_an_unprotected_update_is_of_many_records_or_none(tmp_path):
    few = {**{t: rows(t) for t in LABELS}, "surgery": rows("surgery", 5)}
    site = RealSite(tmp_path, policy='metrics = "none"\n', data=few)
    assert code(site.answer(asked(NONE), {})) == "no-data"
    assert site.events == []

"""What leaves a site under its own policy, whatever the server asks: every field, every message."""

import re
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
from flwr.app import Array

from client.app import make_app
from client.identity import Client
from client.local_training import worked_on
from client.site_file import Connection, Identity, SiteData, SiteFile
from deal_core.config.file import to_run_config
from deal_core.deal.interface import TaskDataset
from deal_core.errors import UserError
from deal_core.models.interface import Encoded
from deal_core.privacy.ledger import Ledger
from deal_core.privacy.policy import Policy, default_delta, figures_allowed, require_delta
from deal_core.protection import make_mechanism
from deal_core.wire.instruction import Instruction
from server.results import read_results
from server.run import run
from simulations.deployment.site.check import what_leaves
from simulations.engines.inprocess import InProcessGrid
from simulations.engines.worker_pool import assume_identity
from simulations.run.summary import print_report
from tests.slow import slow_but

pytestmark = pytest.mark.usefixtures("one_model")

ALWAYS = {
    "site.client": "which of the known sites answers; given by the federation",
    "status.code": "a fixed word",
    "status.stage": "repeats the request",
    "status.phase": "repeats the request",
    "status.server_round": "repeats the request",
}
UPDATE = {
    "lora.*": "clipped, noised and charged to the ledger",
    "metrics.num_examples": "always 1: every site weighs the same",
    "metrics.epsilon": "composed from rates, noise and steps; what the site wants known",
    "metrics.delta": "goes with epsilon",
    "metrics.simulation_only": "goes with epsilon",
}
COUNTS = {
    "metrics.correct": "the policy lets counts of right answers go",
    "metrics.correct_all": "the same",
    "metrics.examples": "the policy lets counts of right answers go",
}
OPEN = {
    "lora.*": "the policy demands no mechanism",
    "metrics.num_examples": "always 1 without leave to send counts",
}


def sent(experiment, folder, policy, stops="", simulated=True):
    """Run with this policy at every site, or that which a function of a request gives; return the
    fields and values that left, and events. ``stops``: with what the run ends before its end."""
    own = experiment.run.model_copy(update={"out": str(folder)})
    experiment = experiment.model_copy(update={"run": own})
    left = {}

    def see(reply):
        for name, record in reply.content.items():
            for key, value in record.items():
                place = f"{name}.{'*' if isinstance(value, Array) else key}"
                left.setdefault(place, set()).add("" if place == "lora.*" else str(value))
        return reply

    events = []
    policy_of = policy if callable(policy) else lambda client: policy
    app = make_app()
    grid = InProcessGrid(app, to_run_config(experiment), experiment.federation.clients)
    grid.interceptor = see
    ends = pytest.raises(UserError, match=stops) if stops else nullcontext()
    with pytest.MonkeyPatch.context() as patch, assume_identity(1, 1), ends:
        patch.setattr(Client, "policy", property(policy_of))
        patch.setattr(Client, "simulated", simulated)
        run(grid, experiment, events.append)
    return left, events


@pytest.fixture
def small(make_experiment):
    def make(*overrides):
        return make_experiment(
            'data.tasks=["surgery"]',
            "federation.rounds=1",
            "train.precision=float32",
            "train.batch_size=4",
            "train.max_length=8",
            *overrides,
        )

    return make


def test_under_a_strict_policy_only_what_is_charged_leaves(small, tmp_path, capsys):
    from rich.console import Console

    policy = Policy(mechanism="record", max_epsilon=2.0)
    left, events = sent(small("privacy.mechanism=record"), tmp_path, policy)
    assert left.keys() == ALWAYS.keys() | UPDATE.keys()
    assert left["metrics.num_examples"] == {"1.0"}
    assert left["status.code"] == {"ok", "withheld"}
    assert not any("loss" in event for event in events)
    results = read_results(tmp_path)
    assert results.accuracy_matrix == []
    assert results.average_accuracy is None
    assert 1.9 < max(results.privacy.epsilon.values()) <= 2.0  # the site's limit, not the 8 asked
    print_report(Console(width=200), tmp_path)
    assert "clients keep their counts" in capsys.readouterr().out


def test_the_delta_that_is_told_does_not_tell_how_many_records_there_are():
    """Nor does what is refused."""
    told = {default_delta(records) for records in range(101, 1001)}
    assert told == {1e-4}
    for records in (2, 37, 225, 1431, 5719, 10**6):
        assert 0.01 / records < default_delta(records) <= 0.1 / records
    for records in (150, 900):
        with pytest.raises(UserError, match=r"0\.0001 or less"):
            require_delta(2e-4, records, "record")


POLICIES = {
    "no policy": (None, "none"),
    "strict": (Policy(min_records=1), "none"),
    "open": (Policy(metrics="clear", share_num_examples=True, min_records=1), "none"),
    "private": (Policy(mechanism="record"), "record"),
    "disjoint": (Policy(mechanism="record", disjoint_tasks=True), "record"),
    "spending": (Policy(mechanism="record", spending=False), "record"),
    "number": (Policy(mechanism="record", share_num_examples=True), "record"),
}
"""Policy, and the mechanism of an experiment that it lets in."""


def site_with(policy):
    own = {"site": Identity(name="north"), "server": Connection(address="here:1")}
    return SiteFile(**own, data=SiteData(path="data"), policy=policy)


@pytest.mark.parametrize("name", slow_but(POLICIES, "open"))
def test_a_site_is_told_before_what_leaves_it_then(small, tmp_path, name):
    policy, mechanism = POLICIES[name]
    site = site_with(policy)
    said = "\n".join(what_leaves(site))
    left, _ = sent(small(f"privacy.mechanism={mechanism}"), tmp_path, policy)
    figures = {place.split(".")[1] for place in left if not place.startswith(("site", "lora"))}
    counted = {"correct", "correct_all", "examples"} & figures
    assert figures <= set(re.findall(r"\w+", said))
    assert ("disjoint_tasks" in figures) == ("disjoint_tasks" in said) == (name == "disjoint")
    assert ("stay here" in said) == (not counted)
    assert ("n_delta" in figures) == (name == "number")
    ordinary = said.split("in a run with")[0]
    if mechanism == "none":
        assert {"loss", "seconds"} & figures == {"loss", "seconds"} & set(
            re.findall(r"\w+", ordinary)
        )
    if "always 1" in said:
        assert left["metrics.num_examples"] == {"1.0"}


def test_the_server_cannot_switch_a_sites_privacy_off(small, tmp_path):
    policy = Policy(mechanism="record", metrics="clear")
    left, events = sent(small(), tmp_path, policy, stops="all clients .* refuse")
    assert left.keys() == ALWAYS.keys() - {
        "status.stage",
        "status.phase",
        "status.server_round",
    }
    assert {e["code"] for e in events if e["event"] == "client_idle"} == {"policy"}
    assert events[-1]["event"] == "run_stopped"
    assert not (tmp_path / "results.json").exists()
    assert Ledger(tmp_path / "sites" / "0").events() == []


def test_a_run_in_secure_sums_that_all_refuse_is_not_called_finished(small, tmp_path):
    config = small("aggregation.secure=true", "federation.clients=3")
    _, events = sent(config, tmp_path, Policy(mechanism="record"), stops="all clients .* refuse")
    assert events[-1]["event"] == "run_stopped"
    assert not (tmp_path / "results.json").exists()


def test_a_run_that_some_refuse_goes_on(small, tmp_path):
    """The others learn."""

    def policy_of(client):
        return Policy(mechanism="record") if client.number == 0 else None

    left, events = sent(small(), tmp_path, policy_of)
    assert events[-1]["event"] == "run_finished"
    assert "lora.*" in left


SUMMED = ("method.name=prototype", "federation.clients=3", "method.prototype.directions=0")


def test_sums_leave_a_site_only_where_its_policy_says_so_and_masked(small, tmp_path):
    def ran(name, **fields):
        policy = Policy(metrics="clear", **fields)
        return sent(small(*SUMMED), tmp_path / name, policy, simulated=False)

    left, events = ran("kept", min_records=1)
    assert "secure.reply" in left  # of the exchanges before
    assert not [e for e in events if e["event"] == "summed"]
    assert {e["code"] for e in events if e["event"] == "client_idle"} == {"policy"}
    left, events = ran("told", min_records=1, share_sums=True)
    assert left.keys() == ALWAYS.keys() | COUNTS.keys() | {"secure.reply", "metrics.num_examples"}
    assert left["metrics.num_examples"] == {"1.0"}
    assert [e["sites"] for e in events if e["event"] == "summed"] == [3]
    left, events = ran("few", min_records=1000, share_sums=True)
    assert {e["code"] for e in events if e["event"] == "client_idle"} == {"no-data"}


TASKS = ("a", "b", "c", "d", "e")


def asked_for(**fields):
    return Instruction(task="a", stage=0, server_round=1, rank=1, retained_rank=1, **fields)


@pytest.mark.parametrize("schedule", ["joint", "per-client"])
def test_of_several_tasks_each_has_the_records_that_the_policy_asks_for(small, schedule):
    """Sums leave for each task: those over one record are that record."""
    policy = Policy(min_records=32, share_sums=True)
    shares = [TaskDataset(("x", "y"), [Encoded((1, 2), 0)] * n) for n in (100, 32, 31, 1, 0)]
    runtime = SimpleNamespace(experiment=small(f"stream.schedule={schedule}"))
    ask = asked_for(tasks=TASKS, past=TASKS[1:])
    assert [len(own.data) for own in worked_on(runtime, ask, shares, policy)] == [100, 32, 0, 0, 0]
    assert worked_on(runtime, ask, shares, None) == shares


def test_of_tasks_that_a_client_has_not_worked_on_it_gives_no_record(small):
    """Per client; all at once, it works on each."""
    shares = [TaskDataset(("x", "y"), [Encoded((1, 2), 0)] * 9) for _ in TASKS]
    ask = asked_for(tasks=TASKS, past=("c",))
    for schedule, sizes in (("per-client", [9, 0, 9, 0, 0]), ("joint", [9] * 5)):
        runtime = SimpleNamespace(experiment=small(f"stream.schedule={schedule}"))
        assert [len(own.data) for own in worked_on(runtime, ask, shares, None)] == sizes


def test_under_a_mechanism_no_exact_sums_are_begun(small):
    for name in ("prototype", "linear-probe"):
        config = small("privacy.mechanism=record", f"method.name={name}")
        with pytest.raises(UserError, match="leave without noise"):
            make_mechanism(config)


def test_figures_leave_one_by_one():
    figures = {"num_examples": 225, "loss": 0.5, "seconds": 3.0}
    assert figures_allowed(figures, None) == figures
    assert figures_allowed(figures, Policy()) == {"num_examples": 1.0}
    assert figures_allowed(figures, Policy(share_num_examples=True)) == {
        "num_examples": 225,
        "seconds": 3.0,
    }
    assert figures_allowed(figures, Policy(metrics="clear")) == {"num_examples": 1.0, "loss": 0.5}

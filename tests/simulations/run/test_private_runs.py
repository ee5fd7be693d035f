"""Runs under differential privacy: the real apps, the site's own ledgers, what leaves."""

from __future__ import annotations

import pytest
from flwr.app import Array, Message

from deal_core.privacy.events import Budget, composed
from deal_core.privacy.ledger import Ledger
from server.results import read_results
from simulations.engines.inprocess import run_inprocess
from simulations.run.progress import Progress
from simulations.run.summary import privacy_text
from tests.simulations.runs import at, no_number, run_in_process
from tests.sizes import TINY

pytestmark = pytest.mark.usefixtures("one_model")

PRIVATE = ("privacy.mechanism=record", "train.precision=float32", "train.batch_size=4", *TINY)


@pytest.fixture(scope="module")
def finished(make_experiment, tmp_path_factory):
    """One private run; every field that left a client, and every event."""
    folder = tmp_path_factory.mktemp("private")
    fields: set[str] = set()

    def see(reply: Message) -> Message:
        for name, record in reply.content.items():
            for key, value in record.items():
                fields.add(f"{name}.{'*' if isinstance(value, Array) else key}")
        return reply

    experiment = make_experiment(*PRIVATE)
    events = run_in_process(at(experiment, folder), see)
    return experiment, folder, events, fields


@pytest.mark.slow
def test_what_an_update_has_cost_is_told_though_the_server_refuses_it(make_experiment, tmp_path):
    events = run_in_process(at(make_experiment(*PRIVATE), tmp_path), no_number)
    assert {event["client"] for event in events if event["event"] == "client_failed"} == {"0"}
    privacy = read_results(tmp_path).privacy
    assert privacy.epsilon.keys() == {"0", "1"}
    assert privacy.silent == 0
    for client, epsilon in privacy.epsilon.items():
        held = Ledger(tmp_path / "sites" / client).events()
        assert epsilon == composed(held, held[0].delta)


def test_the_results_say_what_the_ledgers_hold(finished):
    _, folder, _, _ = finished
    privacy = read_results(folder).privacy
    assert (privacy.mechanism, privacy.unit) == ("record", "record")
    assert privacy.simulation_only
    assert privacy.epsilon.keys() == {"0", "1"}
    for client, told in privacy.epsilon.items():
        events = Ledger(folder / "sites" / client).events()
        assert len(events) == 4  # 2 tasks, 2 rounds
        assert told == composed(events, events[0].delta)
        assert 7.9 < told <= 8.0
        assert privacy.delta >= events[0].delta


def test_epsilon_is_never_shown_without_what_it_means(finished):
    _, folder, events, _ = finished
    text = privacy_text(read_results(folder).privacy)
    for part in ("epsilon", "delta", "per record", "all rounds and tasks", "simulation only"):
        assert part in text
    progress = Progress()
    shown = [line for event in events for line in progress.hear(event) if "epsilon" in line]
    assert len(shown) == 4
    for line in shown:
        for part in ("delta", "per record", "all rounds and tasks", "simulation only"):
            assert part in line


@pytest.mark.slow
def test_simulated_clients_may_declare_disjoint_tasks(finished, make_experiment, tmp_path):
    """Less noise for the same budget, and everything that shows epsilon says what it is of."""
    first = Ledger(finished[1] / "sites" / "0").events()[0]
    experiment = make_experiment(*PRIVATE, "privacy.disjoint_tasks=true")
    events = run_in_process(at(experiment, tmp_path), lambda reply: reply)
    privacy = read_results(tmp_path).privacy
    assert privacy.disjoint_tasks
    for client, told in privacy.epsilon.items():
        held = Ledger(tmp_path / "sites" / client).events()
        assert told == composed(held, held[0].delta, disjoint_tasks=True)
        assert told <= 8.0 < composed(held, held[0].delta)
    assert max(privacy.epsilon.values()) > 7.9
    assert Ledger(tmp_path / "sites" / "0").events()[0].noise_multiplier < first.noise_multiplier
    assert "all rounds, a record being in one task" in privacy_text(privacy)
    progress = Progress()
    shown = [line for event in events for line in progress.hear(event) if "epsilon" in line]
    assert len(shown) == 4
    assert all("all rounds, a record being in one task so far" in line for line in shown)


def test_only_what_is_charged_or_allowed_leaves(finished):
    """Counts of right answers: because the experiment says so (``privacy.metrics``)."""
    _, _, events, fields = finished
    assert fields == {
        "site.client",
        "status.code",
        "status.stage",
        "status.phase",
        "status.server_round",
        "lora.*",
        "metrics.num_examples",
        "metrics.epsilon",
        "metrics.delta",
        "metrics.n_delta",
        "metrics.simulation_only",
        "metrics.correct",
        "metrics.correct_all",
        "metrics.examples",
    }
    weights = {e["num_examples"] for e in events if e["event"] == "client_finished"}
    assert weights == {1.0}


def test_stopped_after_the_charge_and_resumed_spends_what_it_would_have(finished, tmp_path):
    """The update was charged, the answer was lost with the server: it is sent again, for free."""
    experiment, folder, _, _ = finished

    def stop(event: dict) -> None:
        if event["event"] == "client_finished" and event["server_round"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_inprocess(at(experiment, tmp_path), stop)
    assert len(Ledger(tmp_path / "sites" / "0").events()) == 2
    run_inprocess(at(experiment, tmp_path, resume=True), lambda event: None)
    assert read_results(tmp_path).privacy == read_results(folder).privacy
    for client in "01":
        assert len(Ledger(tmp_path / "sites" / client).events()) == 4


def test_a_site_whose_budget_is_spent_takes_no_part_and_the_others_go_on(finished, tmp_path):
    experiment, folder, _, _ = finished
    spent = Ledger(tmp_path / "sites" / "1")
    past = Ledger(folder / "sites" / "1").events()
    for number, event in enumerate([*past, past[0]]):
        spent.charge(event, Budget(100.0, event.delta), f"earlier {number}", b"")
    events: list[dict] = []
    run_inprocess(at(experiment, tmp_path), events.append)
    idle = [e for e in events if e["event"] == "client_idle"]
    assert {(e["client"], e["code"]) for e in idle} == {("1", "budget-spent")}
    assert len(idle) == 4
    finished_by = {e["client"] for e in events if e["event"] == "client_finished"}
    assert finished_by == {"0"}
    assert read_results(tmp_path).privacy.epsilon.keys() == {"0"}
    assert len(spent.events()) == 5

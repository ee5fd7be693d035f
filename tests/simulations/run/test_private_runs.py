"""Runs under differential privacy, of records and of groups of them: the real apps, the site's own
ledgers, what leaves, what all reports say."""

import io

import pytest
from flwr.app import Array
from rich.console import Console

from deal_core.data import load_for_clients
from deal_core.data.partition import partition
from deal_core.errors import UserError
from deal_core.privacy.events import Budget, composed
from deal_core.privacy.ledger import Ledger
from server.results import read_results
from simulations.engines.inprocess import FIRST_CLIENT_NODE
from simulations.report.ledger import verify
from simulations.run.check import preflight
from simulations.run.data_checks import check_data
from simulations.run.run_log import Progress
from simulations.run.summary import privacy_text
from tests.simulations.runs import at, no_number, run_in_process, simulated, stopped, write_tasks
from tests.sizes import TINY, TINY_MODEL

pytestmark = pytest.mark.usefixtures("one_model")

PRIVATE = ("privacy.mechanism=record", "train.precision=float32", "train.batch_size=4", *TINY)


@pytest.fixture(scope="module")
def finished(make_experiment, tmp_path_factory):
    """One private run; every field that left a client, and every event."""
    folder, experiment = tmp_path_factory.mktemp("private"), make_experiment(*PRIVATE)
    fields = set()

    def see(reply):
        for name, record in reply.content.items():
            fields.update(
                f"{name}.{'*' if isinstance(value, Array) else key}"
                for key, value in record.items()
            )
        return reply

    return experiment, folder, run_in_process(at(experiment, folder), see), fields


def epsilons_shown(events):
    progress = Progress()
    return [line for event in events for line in progress.hear(event) if "epsilon" in line]


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


def test_a_site_that_says_less_than_before_has_an_older_ledger_and_is_named(
    make_experiment, tmp_path
):
    """A site restored from a backup charges again what its backup does not know."""
    said = []

    def older(reply):
        figures = reply.content.metric_records.get("metrics", {})
        if reply.metadata.src_node_id == FIRST_CLIENT_NODE and "epsilon" in figures:
            said.append(figures["epsilon"])
            if len(said) == 2:
                figures["epsilon"] = said[0] / 2
        return reply

    experiment = make_experiment(*PRIVATE, 'data.tasks=["surgery"]', "federation.rounds=2")
    events = run_in_process(at(experiment, tmp_path), older)
    (named,) = [event for event in events if event["event"] == "ledger_older"]
    assert (named["client"], named["server_round"]) == ("0", 2)
    assert read_results(tmp_path).privacy.epsilon["0"] == said[0] < said[1]


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
    shown = epsilons_shown(events)
    assert len([line for line in shown if line.startswith("task")]) == 4
    for part in ("delta", "per record", "all rounds and tasks", "simulation only"):
        assert part in shown[1]


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
    assert "all rounds, a record being in one task so far" in epsilons_shown(events)[1]


def test_only_what_is_charged_or_allowed_leaves(finished):
    """Counts of right answers: because the experiment says so (``privacy.metrics``)."""
    _, _, events, fields = finished
    counts = ("num_examples", "correct", "correct_all", "examples")
    spending = ("epsilon", "delta", "n_delta", "simulation_only")
    assert fields == {
        *("site.client", "lora.*"),
        *(f"status.{key}" for key in ("code", "stage", "phase", "server_round")),
        *(f"metrics.{key}" for key in (*counts, *spending)),
    }
    weights = {e["num_examples"] for e in events if e["event"] == "client_finished"}
    assert weights == {1.0}


def test_stopped_after_the_charge_and_resumed_spends_what_it_would_have(finished, tmp_path):
    """The update was charged, the answer was lost with the server: it is sent again, for free."""
    experiment, folder, _, _ = finished

    def in_round_two(event):
        return event["event"] == "client_finished" and event["server_round"] == 2

    stopped(experiment, tmp_path, in_round_two)
    assert len(Ledger(tmp_path / "sites" / "0").events()) == 2
    simulated(experiment, tmp_path, resume=True)
    assert read_results(tmp_path).privacy == read_results(folder).privacy
    for client in "01":
        assert len(Ledger(tmp_path / "sites" / client).events()) == 4


def test_a_site_whose_budget_is_spent_takes_no_part_and_the_others_go_on(finished, tmp_path):
    experiment, folder, _, _ = finished
    spent = Ledger(tmp_path / "sites" / "1")
    past = Ledger(folder / "sites" / "1").events()
    for number, event in enumerate([*past, past[0]]):
        spent.charge(event, Budget(100.0, event.delta), f"earlier {number}", b"")
    events = []
    simulated(experiment, tmp_path, events.append)
    idle = [e for e in events if e["event"] == "client_idle"]
    assert {(e["client"], e["code"]) for e in idle} == {("1", "budget-spent")}
    assert len(idle) == 4
    finished_by = {e["client"] for e in events if e["event"] == "client_finished"}
    assert finished_by == {"0"}
    assert read_results(tmp_path).privacy.epsilon.keys() == {"0"}
    assert len(spent.events()) == 5


def of_patients(task, labels, patients):
    """Two to four records of a patient; tests have the last ones as well, and three others."""
    rows = [
        {"text": f"{task} note {n} of {p}", "label": labels[p % 2], "patient_id": p}
        for p in patients
        for n in range(2 + p % 3)
    ]
    new = [{**row, "patient_id": f"new {row['patient_id']}"} for row in rows[:9]]
    return {"train": rows, "test": [*rows[-12:], *new]}


@pytest.fixture(scope="module")
def settings(make_experiment, tmp_path_factory):
    tasks = {
        "triage": of_patients("triage", ("urgent", "can wait"), range(24)),
        "referral": of_patients("referral", ("surgery", "skin"), range(12, 36)),
    }
    data = write_tasks(tmp_path_factory.mktemp("patients"), tasks)

    def make(*overrides):
        return make_experiment(
            *data,
            "data.tasks=[]",
            "data.max_train=0",
            "train.precision=float32",
            "train.batch_size=4",
            "privacy.mechanism=record",
            "data.partition.kind=iid",
            "data.max_test=8",
            "train.max_length=8",
            *TINY_MODEL,
            *overrides,
        )

    return make


GROUPS = "privacy.unit_column=patient_id"


@pytest.fixture(scope="module")
def grouped(settings, tmp_path_factory):
    folder = tmp_path_factory.mktemp("groups")
    experiment = settings(GROUPS, "federation.rounds=1", f'run.out="{folder}"')
    preflight(experiment)
    return experiment, folder, run_in_process(experiment)


def test_everything_says_the_unit_and_names_the_column(grouped):
    _, folder, events = grouped
    privacy = read_results(folder).privacy
    assert privacy.mechanism == "record"
    assert (privacy.unit, privacy.unit_column) == ("group", "patient_id")
    assert "per group of 'patient_id', over all rounds and tasks" in privacy_text(privacy)
    card = (folder / "adapter" / "README.md").read_text()
    assert "one group, all records of a client with one value of 'patient_id'" in card
    shown = epsilons_shown(events)
    assert shown
    assert "per group of 'patient_id'" in shown[1]
    out = io.StringIO()
    verify(str(folder / "sites" / "0"), "", Console(file=out, width=200), False)
    assert "per group of 'patient_id', over all protected releases" in out.getvalue()


def test_ledgers_are_of_the_groups_that_each_client_has(grouped):
    experiment, folder, _ = grouped
    privacy = read_results(folder).privacy
    assert set(privacy.epsilon) == {str(k) for k in range(experiment.federation.clients)}
    for client, told in privacy.epsilon.items():
        events = Ledger(folder / "sites" / client).events()
        assert told == composed(events, events[0].delta)
        assert 7.5 < told <= 8.0
        assert {(event.unit, event.unit_column) for event in events} == {("group", "patient_id")}
    parts = partition(load_for_clients(experiment, "triage"), experiment.data.partition, 2, 0)
    for client, part in enumerate(parts):
        groups = len({example.unit for example in part.train})
        assert groups < len(part.train)
        event = Ledger(folder / "sites" / str(client)).events()[0]
        rates = {e.task: e.sample_rate for e in Ledger(folder / "sites" / str(client)).events()}
        assert rates["triage"] == 4 / groups
        assert event.delta <= 1e-1


def warned(experiment):
    return [finding.text for finding in check_data(experiment)]


def test_units_that_do_not_fit_are_warned_of(settings):
    """A column that repeats where records are the unit; groups on both sides or at two clients."""
    first, second = warned(settings())
    assert second.startswith("column 'patient_id' of task 'triage' has 24 values in 72")
    assert "set privacy.unit_column = 'patient_id'" in first
    assert warned(settings("privacy.mechanism=none")) == []
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

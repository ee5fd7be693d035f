"""Evaluations at sites: a site that is lost in one is asked once more, and never a third time."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType, SimpleNamespace

import pytest
from flwr.app import ConfigRecord

from deal_core.config.file import to_run_config
from deal_core.errors import UserError
from deal_core.models import adapter_shapes
from server.evaluation import cut, found_worse
from server.folder import RunFolder, read_events
from server.results import read_results
from server.run import run
from simulations.engines.inprocess import InProcessGrid
from simulations.engines.worker_pool import assume_identity
from tests.registered import register
from tests.server.fuzz_grid import FuzzGrid, lost, tiny_app, tiny_model
from tests.server.test_fuzz import settings

pytestmark = pytest.mark.usefixtures("now")
PATIENCE = 100.0
TRAIN, COUNT = "train", "evaluate"


@dataclass
class Away:
    """Bends what clients say, and loses the first ``times`` counts of client 1 in every evaluation,
    or in some.

    Attributes:
        after: looks from the server that pass, once it is lost, before it is connected again.
        told: counts of client 1 that were made, by evaluation.
    """

    times: int = 0
    after: int = 0
    some: range = range(99)
    bend: Callable[..., None] = lambda client, reply, evaluation: None
    evaluation: int = 0
    told: Counter[int] = field(default_factory=Counter)
    absent: int = 0

    def listen(self, event):
        self.evaluation += event["event"] == "evaluated"

    def __call__(self, client, reply):
        self.bend(client, reply, self.evaluation)
        if client != "1" or not tells(reply):
            return [reply]
        self.told[self.evaluation] += 1
        if self.evaluation not in self.some or self.told[self.evaluation] > self.times:
            return [reply]
        self.absent = self.after
        return lost(reply)

    def connected(self, nodes):
        if not self.absent:
            return nodes
        self.absent -= 1
        return {name: node for name, node in nodes.items() if name != "1"}


def tells(reply):
    """Whether a reply has counts."""
    return "metrics" in reply.content and "lora" not in reply.content


class Listed(InProcessGrid):
    """Notes what is sent in one go: of each message its type."""

    def push_messages(self, messages):
        messages = list(messages)
        kinds = [message.metadata.message_type for message in messages]
        self.pushed = [*getattr(self, "pushed", []), kinds]
        return super().push_messages(messages)


def run_with(away, patience, folder, monkeypatch, changes=MappingProxyType({}), **federation):
    """A run of two tasks, a round each; its folder, and what was sent."""
    experiment = settings(folder / "run", tiny_model(folder / "model"), "fedit", "float32")
    few = experiment.federation.model_copy(update={"clients": 3, "rounds": 1, **federation})
    experiment = experiment.model_copy(update={"federation": few}).changed(**changes)
    shapes = adapter_shapes(experiment.model, experiment.adapter)
    inner = Listed(tiny_app(experiment, shapes), to_run_config(experiment), few.clients)
    grid = FuzzGrid(inner, shapes, RunFolder(folder / "run"), away)
    register(monkeypatch, patience, away.connected)
    with assume_identity(1, 1):
        run(grid, experiment, away.listen)
    return folder / "run", inner.pushed[1:]  # without the first: who are you?


def logged(folder, *events):
    return [each for each in read_events(folder / "metrics.jsonl") if each["event"] in events]


def test_a_site_that_was_lost_is_asked_again_when_it_is_back(tmp_path, monkeypatch):
    once = [[TRAIN] * 3, [COUNT] * 3, [COUNT] * 3, [TRAIN] * 3, [COUNT] * 3]
    plain, pushed = run_with(Away(), PATIENCE, tmp_path / "plain", monkeypatch)
    assert pushed == once
    assert len(read_results(plain).accuracy_matrix) == 2
    away = Away(times=1, after=3)
    folder, pushed = run_with(away, PATIENCE, tmp_path, monkeypatch)
    assert away.told == {0: 2, 1: 2, 2: 2}  # zero-shot, and two tasks
    assert pushed == [each for sent in once for each in (sent, [COUNT])[: 1 + (COUNT in sent)]]
    assert [event["client"] for event in logged(folder, "client_failed")] == ["1"] * 3
    results = read_results(folder)
    assert results.per_client["1"].test_examples == [2, 2]
    assert results.per_client == dict.fromkeys("012", results.per_client["1"])
    assert results.wire.received > read_results(plain).wire.received  # what is sent again counts


def test_simulated_clients_are_asked_once(tmp_path, monkeypatch):
    away = Away(times=1)
    folder, _ = run_with(away, 0.0, tmp_path, monkeypatch)
    assert max(away.told.values()) == 1
    assert read_results(folder).per_client.keys() == {"0", "2"}


def hold_alone(client, reply, evaluation):
    """Client 1 alone has test examples of the second task."""
    if client != "1" and tells(reply):
        told = reply.content["metrics"]
        for name in {"correct", "correct_all", "examples"} & set(told):
            told[name] = [told[name][0], 0]


@pytest.mark.parametrize("after", [0, 10**6], ids=["silent twice", "away for good"])
def test_the_run_goes_on_without_the_only_site_with_tests_of_a_task(tmp_path, monkeypatch, after):
    away = Away(times=99, after=after, bend=hold_alone)
    results = read_results(run_with(away, PATIENCE, tmp_path, monkeypatch)[0])
    assert max(away.told.values()) == (1 if after else 2)
    assert results.per_client.keys() == {"0", "2"}
    assert results.average_accuracy is None


def claim(client, reply, evaluation):
    """Client 1 claims a thousand test rows, with none right, after the first evaluation; in that
    it has two rows of which one is right, as all others do."""
    if client == "1" and tells(reply) and evaluation:
        told = reply.content["metrics"]
        told["correct"], told["correct_all"], told["examples"] = [0, 0], [0, 0], [1000, 1000]


def test_a_site_that_claims_test_rows_moves_accuracy_by_its_share_alone(tmp_path, monkeypatch):
    """Three sites have 1 of 2 rows right; one that claims a thousand counts as it first said."""
    folder, _ = run_with(Away(bend=claim), PATIENCE, tmp_path, monkeypatch, clients=4)
    results = read_results(folder)
    assert results.per_client["1"].test_examples == [2, 2]
    assert results.average_accuracy == pytest.approx(3 / 8)
    said = [(event["client"], len(event["tasks"])) for event in logged(folder, "counts_cut")]
    assert said == [("1", 2)] * 2


def test_a_site_is_held_to_what_it_first_said_of_a_task_it_was_asked_about(tmp_path, monkeypatch):
    """Its first evaluation asks about two tasks of three."""
    three = {"tasks": ("laboratory", "surgery", "medicine")}
    changes = {"data": three, "stream": {"evaluate_every": 9}}
    away = Away(times=99, some=range(1))
    folder, _ = run_with(away, PATIENCE, tmp_path, monkeypatch, changes)
    results = read_results(folder)
    assert logged(folder, "counts_cut") == []
    assert results.per_client["1"].test_examples == [2, 2, 2]
    assert [row.count(None) for row in results.accuracy_matrix] == [1, 1, 0]


def test_counts_of_sites_of_about_one_size_stay_as_they_are():
    told = {"0": [[3, 5, 2]], "1": [[8, 10, 8]], "2": [[4, 7, 1]], "3": [[0, 0, 0]]}
    assert cut(told, {}) == (told, {})
    alone = {"0": [[900, 1000]], "1": [[5, 10]]}  # of two, none is the odd one
    assert cut(alone, {}) == (alone, {})
    assert cut(alone, {"0": {0: 10}}) == ({"0": [[9, 10]], "1": [[5, 10]]}, {"0": [0]})
    claimed = {"0": [[1, 2]], "1": [[0, 1000]], "2": [[1, 2]], "3": [[1, 2]]}
    assert cut(claimed, {}) == ({**claimed, "1": [[0, 4]]}, {"1": [0]})
    shares = {"0": [[2.5, 5]], "1": [[50.25, 100]], "2": [[1.0, 3]]}
    assert cut(shares, {})[0]["1"] == [[50.25 * 8 / 100, 8.0]]


def withhold(client, reply, evaluation):
    """All but client 1 keep their counts, as the policy of a new site has it."""
    if client != "1" and tells(reply):
        reply.content["status"] = ConfigRecord({"code": "withheld"})
        del reply.content["metrics"]


def test_a_site_that_is_away_stops_nothing_where_all_others_keep_their_counts(
    tmp_path, monkeypatch
):
    """They have answered, and two of three are a quorum."""
    away = Away(times=99, bend=withhold)
    folder, _ = run_with(away, PATIENCE, tmp_path, monkeypatch, quorum=0.5)
    results = read_results(folder)
    assert results.per_client == {}
    assert results.average_accuracy is None


def refuse(names):
    """The policy of these clients does not allow what the experiment asks of them."""

    def bend(client, reply, evaluation):
        if client in names and "lora" in reply.content:
            reply.content.clear()
            reply.content["status"] = ConfigRecord({"code": "policy"})

    return bend


def run_without(names, rounds, folder, monkeypatch):
    few = {"rounds": rounds, "clients_per_round": 1}
    return run_with(Away(bend=refuse(names)), 0.0, folder, monkeypatch, **few)[0]


def test_some_that_refuse_end_no_run_even_where_they_are_asked_alone(tmp_path, monkeypatch):
    folder = run_without("01", 4, tmp_path, monkeypatch)
    assert len(read_results(folder).accuracy_matrix) == 2
    assert {event["clients"] for event in logged(folder, "round_finished")} == {0, 1}


def test_where_all_have_refused_the_run_ends_and_says_why(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"all clients that train \(3\) refuse"):
        run_without("012", 9, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("said", "rejected"),
    [("", False), ("1", False), ("10", False), ("11", True), ("110", True), ("1100", True)],
)
def test_half_of_the_sites_and_two_at_least_reject_class_means(monkeypatch, said, rejected):
    """1: a site says that its own records are answered worse."""
    replies = [
        SimpleNamespace(client=str(n), answered=lambda bit=b: bit) for n, b in enumerate(said)
    ]
    clients = SimpleNamespace(
        roster=SimpleNamespace(clients=("0",)),
        ask=lambda *given: None,
        replies=lambda sent: replies,
        event=lambda *given, **more: None,
    )
    asked = SimpleNamespace(model_copy=lambda update: None)
    monkeypatch.setattr("server.evaluation.instruction_of", lambda *given: asked)
    monkeypatch.setattr("server.evaluation.wire.read_verdict", lambda bit: bit == "1")
    assert found_worse(clients, None, None, ["a"]) is rejected

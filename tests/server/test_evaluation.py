"""Evaluations at sites: the training request that carries one along, and a site that is lost in
one, which is asked once more, and never a third time."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from client.requests import request_name
from deal_core.config.run_config import to_run_config
from deal_core.errors import UserError
from deal_core.lora.payload import PayloadError
from deal_core.methods import make_method
from deal_core.models import adapter_shapes
from deal_core.randomness import seeded
from deal_core.wire.instruction import read_instruction
from deal_core.wire.records import count_names
from server import clients as rounds
from server import wire
from server.clients import Clients
from server.evaluation import Evaluation, cut
from server.folder import RunFolder
from server.plan import Step
from server.results import read_results
from server.run import run
from server.strategy import start_state
from simulations.engines.inprocess import InProcessGrid
from simulations.engines.worker_pool import assume_identity
from tests.registered import register
from tests.server.fuzz_grid import FuzzGrid, counts, lost, tiny_app, tiny_model
from tests.server.test_fuzz import settings

PATIENCE = 100.0


@pytest.fixture(autouse=True)
def quick_clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Waiting takes no time."""
    now = [0.0]
    clock = SimpleNamespace(
        monotonic=lambda: now[0], sleep=lambda seconds: now.__setitem__(0, now[0] + seconds)
    )
    monkeypatch.setattr(rounds, "time", clock)


@dataclass
class Away:
    """Loses the first ``times`` counts of client 1 in every evaluation.

    Attributes:
        after: looks from the server that pass, once it is lost, before it is connected again.
        told: counts of client 1 that were made, by evaluation.
    """

    times: int
    after: int = 0
    evaluation: int = 0
    told: Counter[int] = field(default_factory=Counter)
    absent: int = 0

    def listen(self, event: dict[str, Any]) -> None:
        self.evaluation += event["event"] == "evaluated"

    def __call__(self, client: str, reply: Message) -> list[Message]:
        if client != "1" or not tells(reply):
            return [reply]
        self.told[self.evaluation] += 1
        if self.told[self.evaluation] > self.times:
            return [reply]
        self.absent = self.after
        return lost(reply)

    def connected(self, nodes: dict[str, int]) -> dict[str, int]:
        if not self.absent:
            return nodes
        self.absent -= 1
        return {name: node for name, node in nodes.items() if name != "1"}


def tells(reply: Message) -> bool:
    """Whether a reply has counts."""
    return "counts" in reply.content or ("metrics" in reply.content and "lora" not in reply.content)


class Listed(InProcessGrid):
    """Notes what is sent in one go: of each message its type, and whether it asks for counts."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        self.pushed = [*getattr(self, "pushed", []), [asked_of(message) for message in messages]]
        return super().push_messages(messages)


def asked_of(message: Message) -> str:
    piggybacked_evaluation = "piggybacked_evaluation" in message.content.config_records.get(
        "instruction", {}
    )
    return message.metadata.message_type + " and count" * piggybacked_evaluation


def run_with(
    away: Away,
    patience: float,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    ranks: tuple[int, ...] = (),
    **federation: Any,
) -> tuple[Path, list[list[str]]]:
    """A run of two tasks, a round each; its folder, and what was sent."""
    rule = "flora" if ranks else "fedit"
    experiment = settings(folder / "run", tiny_model(folder / "model"), rule, "float32")
    adapter = experiment.adapter.model_copy(update={"client_ranks": ranks})
    experiment = experiment.model_copy(update={"adapter": adapter})
    few = {"clients": 3, "rounds": 1, **federation}
    few = experiment.federation.model_copy(update=few)
    experiment = experiment.model_copy(update={"federation": few})
    shapes = adapter_shapes(experiment.model, experiment.adapter)
    inner = Listed(tiny_app(experiment, shapes), to_run_config(experiment), few.clients)
    grid = FuzzGrid(inner, shapes, RunFolder(folder / "run"), away)
    register(monkeypatch, patience, away.connected)
    with assume_identity(1, 1):
        run(grid, experiment, away.listen)  # type: ignore[arg-type]
    return folder / "run", inner.pushed[1:]  # without the first: who are you?


@pytest.mark.parametrize("after", [0, 3])
def test_a_site_that_was_lost_is_asked_again_when_it_is_back(tmp_path, monkeypatch, after):
    away = Away(times=1, after=after)
    results = read_results(run_with(away, PATIENCE, tmp_path, monkeypatch)[0])
    assert away.told == {0: 2, 1: 2, 2: 2}  # zero-shot, and two tasks
    assert results.per_client["1"].test_examples == [2, 2]
    assert results.per_client == dict.fromkeys("012", results.per_client["1"])


@pytest.mark.parametrize(
    ("times", "after", "patience", "asked"),
    [(99, 0, PATIENCE, 2), (1, 10**6, PATIENCE, 1), (1, 0, 0.0, 1)],
    ids=["silent twice", "away for good", "simulated"],
)
def test_the_run_goes_on_without_a_site_that_stays_away(
    tmp_path, monkeypatch, times, after, patience, asked
):
    away = Away(times, after)
    results = read_results(run_with(away, patience, tmp_path, monkeypatch)[0])
    assert max(away.told.values()) == asked
    assert results.per_client.keys() == {"0", "2"}
    assert results.per_client["0"].test_examples == [2, 2]


@dataclass
class Holder(Away):
    """Client 1 alone has test examples of the second task."""

    def __call__(self, client: str, reply: Message) -> list[Message]:
        if client != "1" and tells(reply):
            told = reply.content.get("counts") or reply.content["metrics"]
            for name in {"correct", "correct_all", "examples"} & set(told):
                told[name] = [told[name][0], 0]
        return super().__call__(client, reply)


def test_where_the_only_site_with_tests_of_a_task_is_away_its_accuracy_is_not_known(
    tmp_path, monkeypatch
):
    """And the run goes on, as it does without any other site."""
    folder, _ = run_with(Holder(times=99), PATIENCE, tmp_path, monkeypatch)
    results = read_results(folder)
    assert results.per_client.keys() == {"0", "2"}
    assert results.average_accuracy is None


@dataclass
class Claiming(Away):
    """Client 1 claims so many test rows, with none right, in the evaluations from a first one on;
    in those before two rows of which one is right, as all others do."""

    rows: int = 1000
    start: int = 0

    def __call__(self, client: str, reply: Message) -> list[Message]:
        if client == "1" and tells(reply) and self.evaluation >= self.start:
            told = reply.content.get("counts") or reply.content["metrics"]
            told["correct"], told["correct_all"] = [0, 0], [0, 0]
            told["examples"] = [self.rows, self.rows]
        return super().__call__(client, reply)


@pytest.mark.parametrize(("start", "rows"), [(0, 4), (1, 2)], ids=["from the start", "later"])
def test_a_site_that_claims_test_rows_moves_accuracy_by_its_share_alone(
    tmp_path, monkeypatch, start, rows
):
    """Three sites have 1 of 2 rows right. One that claims a thousand counts as two of them, or as
    the one that it said it was."""
    away = Claiming(0, start=start)
    folder, _ = run_with(away, PATIENCE, tmp_path, monkeypatch, clients=4)
    results = read_results(folder)
    assert results.per_client["1"].test_examples == [rows, rows]
    assert results.average_accuracy == pytest.approx(3 / (6 + rows))
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    said = [event for event in log if event["event"] == "counts_cut"]
    assert [(event["client"], len(event["tasks"])) for event in said] == [("1", 2)] * (3 - start)


def test_counts_of_sites_of_about_one_size_stay_as_they_are():
    counts = {"0": [[3, 5, 2]], "1": [[8, 10, 8]], "2": [[4, 7, 1]], "3": [[0, 0, 0]]}
    assert cut(counts, {}) == (counts, {})
    alone = {"0": [[900, 1000]], "1": [[5, 10]]}  # of two, none is the odd one
    assert cut(alone, {}) == (alone, {})
    shares = {"0": [[2.5, 5]], "1": [[50.25, 100]], "2": [[1.0, 3]]}
    assert cut(shares, {})[0]["1"] == [[50.25 * 8 / 100, 8.0]]


@dataclass
class Withholding(Away):
    """All but client 1 keep their counts, as the policy of a new site has it."""

    def __call__(self, client: str, reply: Message) -> list[Message]:
        if client != "1" and tells(reply):
            kept = ConfigRecord({"code": "withheld"})
            if "counts" in reply.content:
                reply.content["counts"] = kept
            else:
                reply.content["status"] = kept
                del reply.content["metrics"]
        return super().__call__(client, reply)


def test_a_site_that_is_away_stops_nothing_where_all_others_keep_their_counts(
    tmp_path, monkeypatch
):
    """They have answered, and two of three are a quorum."""
    folder, _ = run_with(Withholding(times=99), PATIENCE, tmp_path, monkeypatch, quorum=0.5)
    results = read_results(folder)
    assert results.per_client == {}
    assert results.average_accuracy is None


@dataclass
class Unwilling(Away):
    """Some clients' policy does not allow what the experiment asks of them."""

    names: str = ""

    def __call__(self, client: str, reply: Message) -> list[Message]:
        if client in self.names and "lora" in reply.content:
            for record in ("lora", "metrics", "counts"):
                reply.content.pop(record, None)
            reply.content["status"] = ConfigRecord({"code": "policy"})
        return super().__call__(client, reply)


@pytest.mark.parametrize("few", [{}, {"clients_per_round": 1}], ids=["all", "one a round"])
def test_one_that_refuses_ends_no_run_even_where_it_is_asked_alone(tmp_path, monkeypatch, few):
    for name in "012":
        away = Unwilling(0, names=name)
        folder, _ = run_with(away, 0.0, tmp_path / name, monkeypatch, rounds=2, **few)
        assert len(read_results(folder).accuracy_matrix) == 2


@pytest.mark.parametrize("few", [{}, {"clients_per_round": 1}], ids=["all", "one a round"])
def test_where_all_have_refused_the_run_ends_and_says_why(tmp_path, monkeypatch, few):
    with pytest.raises(UserError, match=r"all clients that train \(3\) refuse"):
        run_with(Unwilling(0, names="012"), 0.0, tmp_path, monkeypatch, rounds=9, **few)


def test_what_is_sent_again_counts_among_the_bytes(tmp_path, monkeypatch):
    received = [
        read_results(run_with(Away(times), PATIENCE, tmp_path / str(times), monkeypatch)[0])
        for times in (0, 1)
    ]
    assert received[1].wire.received > received[0].wire.received


TRAIN, COUNT, BOTH = "train", "evaluate", "train and count"


def test_at_sites_the_first_request_of_a_stage_carries_the_evaluation_of_the_one_before(
    tmp_path, monkeypatch
):
    folder, pushed = run_with(Away(0), PATIENCE, tmp_path, monkeypatch)
    assert pushed == [[BOTH] * 3, [BOTH] * 3, [COUNT] * 3]
    assert len(read_results(folder).accuracy_matrix) == 2


def test_simulated_clients_are_asked_for_one_thing_at_a_time(tmp_path, monkeypatch):
    _, pushed = run_with(Away(0), 0.0, tmp_path, monkeypatch)
    assert pushed == [[TRAIN] * 3, [COUNT] * 3, [COUNT] * 3, [TRAIN] * 3, [COUNT] * 3]


def test_who_does_not_train_in_that_round_is_asked_in_the_same_breath(tmp_path, monkeypatch):
    _, pushed = run_with(Away(0), PATIENCE, tmp_path, monkeypatch, clients_per_round=1)
    assert [sorted(sent) for sent in pushed] == [[COUNT, COUNT, BOTH]] * 2 + [[COUNT] * 3]


def test_a_client_of_a_rank_of_its_own_counts_with_the_whole_model_afterwards(
    tmp_path, monkeypatch
):
    folder, pushed = run_with(Away(0), PATIENCE, tmp_path, monkeypatch, ranks=(3, 2, 1))
    assert pushed == [[BOTH, TRAIN, TRAIN], [COUNT] * 2] * 2 + [[COUNT] * 3]
    assert read_results(folder).per_client.keys() == set("012")


def test_an_update_that_is_lost_takes_no_tests_along(tmp_path, monkeypatch):
    """Its loss is told once, and the counts are asked for alone."""
    folder, pushed = run_with(Away(1), PATIENCE, tmp_path, monkeypatch)
    assert pushed == [[BOTH] * 3, [COUNT], [BOTH] * 3, [COUNT], [COUNT] * 3, [COUNT]]
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [event["client"] for event in log if event["event"] == "client_failed"] == ["1"] * 3
    assert read_results(folder).per_client.keys() == set("012")


@pytest.mark.parametrize("what", ["no counts", "counts that cannot be", "withheld"])
def test_an_update_stands_whatever_becomes_of_the_counts_beside_it(tmp_path, monkeypatch, what):
    spoilt: list[Message] = []

    class Spoilt(Away):
        def __call__(self, client: str, reply: Message) -> list[Message]:
            if client == "1" and "counts" in reply.content:
                spoilt.append(reply)
                if what == "no counts":
                    del reply.content["counts"]
                elif what == "withheld":
                    reply.content["counts"] = ConfigRecord({"code": "withheld"})
                else:
                    reply.content["counts"]["correct"] = [3, 3]
            return super().__call__(client, reply)

    away = Spoilt(0)
    folder, pushed = run_with(away, PATIENCE, tmp_path, monkeypatch)
    again = [[COUNT]] if what == "no counts" else []
    assert pushed == [[BOTH] * 3, *again, [BOTH] * 3, *again, [COUNT] * 3]
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    finished = [event["clients"] for event in log if event["event"] == "round_finished"]
    assert (len(spoilt), finished) == (2, [3, 3])
    kinds = {"no counts": [], "counts that cannot be": ["client_failed"] * 2}
    found = [e["event"] for e in log if e["event"] in ("client_failed", "client_idle")]
    assert found == kinds.get(what, ["client_idle"] * 2)


SPOILT: dict[str, dict[str, Any]] = {
    "a text": {"correct": "patient 17"},
    "a number": {"correct": 1},
    "fractions": {"correct": [0.5, 0.5]},
    "below zero": {"correct": [-1, 1]},
    "more than there are": {"examples": [0, 0]},
    "more among all labels": {"correct_all": [3, 1]},
    "below zero among all labels": {"correct_all": [-1, 1]},
    "a task more among all labels": {"correct_all": [1, 1, 1]},
    "a task more": {"correct": [1, 1, 1], "examples": [2, 2, 2]},
    "beyond belief": {"examples": [10**9, 2]},
    "a field more": {"labels": ["surgery"]},
    "another code": {"code": "failed"},
}


@pytest.mark.parametrize("kind", SPOILT)
def test_spoilt_counts_beside_an_update_are_refused(kind):
    record = ConfigRecord({"code": "ok", **counts(2), **SPOILT[kind]})
    with assume_identity(1, 1):
        message = Message(RecordDict({"counts": record}), 2, "train")
    with pytest.raises(PayloadError) as refusal:
        wire.read_counts_beside(message, 2, count_names(all_labels=True))
    assert "patient" not in str(refusal.value)


def test_counts_that_nobody_asked_for_are_refused(tmp_path, monkeypatch):
    class Chatty(Away):
        def __call__(self, client: str, reply: Message) -> list[Message]:
            if client == "1" and "lora" in reply.content:
                reply.content["counts"] = ConfigRecord({"code": "ok", **counts(2)})
            return [reply]

    folder, _ = run_with(Chatty(0), PATIENCE, tmp_path, monkeypatch, rounds=2)
    log = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    finished = [event["clients"] for event in log if event["event"] == "round_finished"]
    assert finished == [3, 2] * 2  # in the first round of a task they were asked for


def test_an_evaluation_has_one_name_whether_it_is_asked_alone_or_carried_along(tmp_path):
    """A site charges for it, and answers it, by that name: asked again alone, it costs nothing."""
    experiment = settings(tmp_path, tiny_model(tmp_path / "model"), "fedit", "int8")
    shapes = adapter_shapes(experiment.model, experiment.adapter)
    state = make_method(experiment.method, experiment.adapter).begin_task(
        start_state(experiment, shapes), seeded("begin")
    )
    clients = Clients(None, experiment, rounds.Roster(("0",), lambda: {"0": 2}), None)
    tasks, ended, begun = ("laboratory", "surgery"), Step("end-stage", 3), Step("round", 4, 1)
    evaluation = Evaluation(clients, ended, tasks, tasks)
    alone = evaluation.instruction(state)
    training = rounds.instruction_of(begun, state).model_copy(
        update={"task": "surgery", "seen": ("laboratory",), "trained": ("lora_B",)}
    )
    carrying = evaluation.beside(state, {"0": training})["0"]
    with assume_identity(1, 1):
        first = clients.ask(begun, state, {"0": carrying})
        second = clients.ask_again(ended, first, {"0": alone})
    names = set()
    for sent in (first, second):
        message = sent.requests["0"]
        read = read_instruction(dict(message.content.config_records["instruction"]))
        names.add(
            request_name(message, read.evaluation() if read.piggybacked_evaluation else read, "run")
        )
    assert len(names) == 1
    assert request_name(first.requests["0"], carrying, "run") not in names

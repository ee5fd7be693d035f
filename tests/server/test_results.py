from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from server.checkpoint import EVERYBODY, History, commit
from server.measures import clients_that_spend, clients_that_train, make_results
from server.plan import Plan
from server.results import read_results, spending_in, write_results

HISTORY = History(
    evaluations=(
        {"0": [[1, 2], [0, 0]], "1": [[1, 2], [2, 4]]},
        {"0": [[2, 2], [0, 0]], "1": [[2, 2], [1, 4]]},
        {"0": [[1, 2], [0, 0]], "1": [[2, 2], [3, 4]]},
    ),
    bytes_up=(10.0, 20.0),
    bytes_down=(30.0, 40.0),
    aggregation_error=(0.1, 0.2),
    seconds={"train": 2.0, "evaluate": 1.0},
    peak_rss_bytes=7,
)


IN_TURN = Plan(("a", "b"), {"0": ("a", "b"), "1": ("a", "b")}, rounds=1, every=1)


def test_what_clients_say_of_privacy_is_in_the_results():
    good = {"epsilon": 1.0, "delta": 1e-4, "simulation_only": 1.0}
    said = {"0": spending_in({**good, "void": 1.0}), "1": spending_in({**good, "assumes_more": 1})}
    experiment = Experiment(federation={"clients": 5}, privacy={"mechanism": "record"})
    history = HISTORY.model_copy(update={"spent": said})
    privacy = make_results(experiment, IN_TURN, history).privacy
    assert (privacy.void, privacy.assumes_more, privacy.silent) == (True, True, 3)
    assert privacy.epsilon == {"0": 1.0, "1": 1.0}


def test_measures_follow_from_the_counts():
    results = make_results(Experiment(), IN_TURN, HISTORY)
    assert results.accuracy_matrix == [[1.0, 0.25], [0.75, 0.75]]
    assert results.zero_shot == {"a": 0.5, "b": 0.5}
    assert results.average_accuracy == 0.75
    assert results.backward_transfer == -0.25
    assert results.forward_transfer == -0.25
    assert results.forgetting == 0.25
    assert results.seconds["total"] == 3.0
    # a client without a test example of a task is not counted as wrong there
    first = results.per_client["0"]
    assert first.accuracy_matrix == [[1.0, None], [0.5, None]]
    assert first.average_accuracy == 0.5
    assert first.test_examples == [2, 0]
    assert first.zero_shot == [0.5, None]
    assert results.per_client["1"].zero_shot == [0.5, 0.5]
    assert results.per_client["1"].average_accuracy == pytest.approx((1.0 + 0.75) / 2)


BOTH = History(
    evaluations=(
        {"0": [[1, 2, 1], [0, 0, 0]], "1": [[1, 2, 1], [2, 4, 2]]},
        {"0": [[2, 2, 2], [0, 0, 0]], "1": [[2, 2, 2], [1, 4, 0]]},
        {"0": [[1, 2, 0], [0, 0, 0]], "1": [[2, 2, 1], [3, 4, 2]]},
    ),
)


def test_measures_among_all_labels_stand_beside_those_among_a_tasks_own():
    both = make_results(Experiment(), IN_TURN, BOTH)
    one = make_results(Experiment(), IN_TURN, HISTORY)
    assert one.class_incremental is None
    assert both.accuracy_matrix == one.accuracy_matrix
    assert both.per_client == one.per_client
    among_all = both.class_incremental
    assert among_all.accuracy_matrix == [[1.0, 0.0], [0.25, 0.5]]
    assert among_all.zero_shot == both.zero_shot
    assert among_all.average_accuracy == 0.375
    assert among_all.backward_transfer == among_all.forgetting * -1 == -0.75
    assert among_all.forward_transfer == -0.5
    first = among_all.per_client["0"]
    assert first.accuracy_matrix == [[1.0, None], [0.0, None]]
    assert first.average_accuracy == 0.0
    assert first.test_examples == [2, 0]


def test_a_client_that_has_not_counted_among_all_labels_is_left_out_of_those_alone():
    """Its counts are from before there were two protocols, say."""
    rows = [{"0": [[2, 4, 1]], "1": [[4, 4]]}] * 2
    results = make_results(
        Experiment(),
        Plan(("a",), {"0": ("a",), "1": ("a",)}, 1, 1),
        History(evaluations=tuple(rows)),
    )
    assert results.accuracy_matrix == [[0.75]]
    assert results.class_incremental.accuracy_matrix == [[0.25]]
    assert results.class_incremental.per_client["1"].accuracy_matrix == [[None]]


def test_results_from_before_the_second_protocol_can_be_read(tmp_path):
    data = json.loads(make_results(Experiment(), IN_TURN, HISTORY).model_dump_json())
    del data["class_incremental"]
    (tmp_path / "results.json").write_text(json.dumps(data))
    assert read_results(tmp_path).class_incremental is None


def test_no_privacy_means_no_epsilon():
    privacy = make_results(Experiment(), IN_TURN, HISTORY).privacy
    assert privacy.mechanism == "none"
    assert privacy.epsilon == {}


def test_file_round_trip_and_schema(tmp_path):
    results = make_results(Experiment(), IN_TURN, HISTORY)
    write_results(tmp_path / "results.json", results)
    assert read_results(tmp_path) == results
    data = json.loads((tmp_path / "results.json").read_text())
    assert set(data) == {
        *("config", "engine", "seed", "tasks", "stages", "accuracy_matrix", "zero_shot"),
        *("average_accuracy", "backward_transfer", "forward_transfer", "forgetting"),
        *("per_client", "privacy", "wire", "aggregation_error", "seconds"),
        *("peak_rss_bytes", "versions", "schema_version", "class_incremental", "measures"),
        *("labels", "finished", "commit", "unheard"),
    }


def test_labels_date_and_commit_are_in_the_file():
    names = {"a": ("yes", "no"), "b": ()}
    results = make_results(Experiment(), IN_TURN, HISTORY, names)
    assert results.labels == {"a": ["yes", "no"], "b": []}
    age = datetime.now(UTC) - datetime.fromisoformat(results.finished)
    assert timedelta(0) <= age < timedelta(minutes=1)
    assert results.commit == commit()


def test_a_file_of_the_version_before_can_be_read(tmp_path):
    data = json.loads(make_results(Experiment(), IN_TURN, HISTORY).model_dump_json())
    data["schema_version"] = 2
    for name in ("labels", "finished", "commit"):
        del data[name]
    for client in data["per_client"].values():
        del client["zero_shot"]
    (tmp_path / "results.json").write_text(json.dumps(data))
    before = read_results(tmp_path)
    assert (before.schema_version, before.labels, before.finished) == (2, {}, "")
    assert before.per_client["0"].zero_shot == []
    assert before.accuracy_matrix == [[1.0, 0.25], [0.75, 0.75]]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"schema_version": 2, "extra": 2}'])
def test_a_broken_file_is_one_line(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(UserError, match="not a valid results file"):
        read_results(tmp_path)


def test_what_is_no_text_file_is_one_line(tmp_path):
    path = tmp_path / "results.json"
    path.write_bytes(b"\xff\xfe{}")
    with pytest.raises(UserError, match="not a valid results file"):
        read_results(tmp_path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        read_results(tmp_path)


def test_a_file_of_another_version_says_so(tmp_path):
    (tmp_path / "results.json").write_text('{"schema_version": 1, "tasks": []}')
    with pytest.raises(UserError, match="schema version 1, not 3"):
        read_results(tmp_path)


# "a": client 0 in stages 0 and 1, client 1 in stage 2; "b": client 1 in stages 0 and 1;
# "c": client 0 in stages 2 and 3 (two rounds a task, a stage a round)
OWN = Plan(("a", "b", "c"), {"0": ("a", "c"), "1": ("b", "a")}, rounds=2, every=1)
OWN_HISTORY = History(
    evaluations=(
        {"0": [[1, 4], [1, 4], [1, 4]], "1": [[1, 4], [1, 4], [0, 0]]},
        {"0": [[2, 4], [2, 4], [2, 4]], "1": [[2, 4], [2, 4], [0, 0]]},
        {"0": [[3, 4], [4, 4], [3, 4]]},  # the counts of client 1 did not arrive
        {"0": [[4, 4], [2, 4], [3, 4]], "1": [[3, 4], [4, 4], [0, 0]]},
        {"0": [[2, 4], [2, 4], [4, 4]], "1": [[3, 4], [2, 4], [0, 0]]},
    ),
)


def test_measures_where_clients_have_orders_of_their_own():
    """By hand: rows .5 .5 .5 / .75 1 .75 / .875 .75 .75 / .625 .5 1; zero-shot .25 each."""
    results = make_results(Experiment(), OWN, OWN_HISTORY)
    rows = [[0.5, 0.5, 0.5], [0.75, 1.0, 0.75], [0.875, 0.75, 0.75], [0.625, 0.5, 1.0]]
    assert results.accuracy_matrix == rows
    assert [(stage.rounds, stage.work) for stage in results.stages] == [
        (1, {"a": ["0"], "b": ["1"]}),
        (1, {"a": ["0"], "b": ["1"]}),
        (1, {"a": ["1"], "c": ["0"]}),
        (1, {"a": ["1"], "c": ["0"]}),
    ]
    # "b" was learnt after row 1; "a" and "c" only with the last row
    assert results.backward_transfer == 0.5 - 1.0
    assert results.forgetting == 1.0 - 0.5
    # only "c" begins after the first stage: row 1 is the last before it
    assert results.forward_transfer == 0.75 - 0.25
    assert results.average_accuracy == pytest.approx((0.625 + 0.5 + 1.0) / 3)


def test_a_clients_matrix_has_a_row_for_every_stage():
    results = make_results(Experiment(), OWN, OWN_HISTORY)
    nothing = [None, None, None]
    rows = [[0.5, 0.5, None], nothing, [0.75, 1.0, None], [0.75, 0.5, None]]
    assert results.per_client["1"].accuracy_matrix == rows
    assert len(results.per_client["0"].accuracy_matrix) == 4


def test_an_unfinished_run_says_so(tmp_path):
    with pytest.raises(UserError, match="has not finished"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("stream", "participants", "training"),
    [
        ({}, (), 3),
        ({}, (0, 2), 2),
        ({"schedule": "per-client", "orders": {"2": ()}}, (), 2),
        ({"schedule": "per-client", "orders": {"2": (), "1": ("a",)}}, (1, 2), 1),
    ],
)
def test_who_has_nothing_to_learn_is_not_missed(stream, participants, training) -> None:
    experiment = Experiment(federation={"clients": 3, "participants": participants}, stream=stream)
    assert clients_that_train(experiment) == clients_that_spend(experiment) == training
    noised = Experiment(
        federation={"clients": 3, "participants": participants},
        stream=stream,
        privacy={"mechanism": "record", "metrics": "noised"},
    )
    assert clients_that_spend(noised) == 3  # who evaluates is charged, too


ALWAYS = [[9, 10, 9], [9, 10, 9]]
WORSE = [[5, 10, 5], [5, 10, 5]]


@pytest.mark.parametrize("missed", [0, 1, 2])
def test_a_client_that_misses_an_evaluation_is_nothing_learnt_or_forgotten(missed):
    """The model never changes; one of two clients is cut off for a while."""
    rows = [{"0": ALWAYS, "1": WORSE} for _ in range(3)]
    del rows[missed]["1"]
    results = make_results(Experiment(), IN_TURN, HISTORY.model_copy(update={"evaluations": rows}))
    found = results.class_incremental
    assert found is not None
    for each in (results, found):
        assert each.backward_transfer == each.forward_transfer == each.forgetting == 0.0
        assert each.average_accuracy == pytest.approx(0.9 if missed == 2 else 0.7)
        assert each.per_client["1"].average_accuracy == (None if missed == 2 else 0.5)
    assert results.unheard == [int(place == missed) for place in range(3)]
    assert results.per_client["1"].test_examples == [10, 10]


def test_sums_over_other_clients_are_not_compared():
    both, one = {EVERYBODY: [[14, 20], [14, 20]]}, {EVERYBODY: [[9, 10], [9, 10]]}
    for last, known in ((both, True), (one, False)):
        history = HISTORY.model_copy(update={"evaluations": (both, both, last)})
        results = make_results(Experiment(), IN_TURN, history)
        assert (results.backward_transfer is not None) is known
        assert results.average_accuracy is not None

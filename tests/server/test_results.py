import subprocess

import pytest

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from server import measures
from server.measures import EVERYBODY, clients_that_spend, commit, make_results
from server.plan import Plan
from server.results import (
    EARLIER,
    MORE_TRUST,
    VOID,
    History,
    Privacy,
    read_results,
    rounded_up,
    spending_in,
    write_results,
)

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


def test_a_task_that_was_not_asked_about_is_no_lost_count():
    three = Plan(("a", "b", "c"), {"0": ("a", "b", "c")}, rounds=1, every=1, evaluate_every=2)
    asked = [[1, 2], [2, 4]]
    rows = ([*asked, [1, 2]], [*asked, [0, 0]], [*asked, [2, 2]], [*asked, [1, 4]])
    history = HISTORY.model_copy(
        update={"evaluations": tuple({"0": list(row), "1": list(row)} for row in rows)}
    )
    found = make_results(Experiment(), three, history)
    assert found.accuracy_matrix == [[0.5, 0.5, None], [0.5, 0.5, 1.0], [0.5, 0.5, 0.25]]
    assert found.forward_transfer == 0.25
    assert found.per_client["0"].test_examples == [2, 4, 4]
    nobody = [[0, 0], [2, 4], [0, 0]]
    lost = (history.evaluations[0], {"0": nobody, "1": nobody}, *history.evaluations[2:])
    history = history.model_copy(update={"evaluations": lost})
    assert make_results(Experiment(), three, history).accuracy_matrix == []


SPENT = {"epsilon": 1.0, "delta": 1e-4, "simulation_only": 1.0}
FLAGS = ("void", "assumes_more")


def test_what_clients_say_of_privacy_is_in_the_results():
    said = {str(n): spending_in({**SPENT, flag: 1.0}) for n, flag in enumerate(FLAGS)}
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
    assert (both.accuracy_matrix, both.per_client) == (one.accuracy_matrix, one.per_client)
    among_all = both.class_incremental
    assert among_all.accuracy_matrix == [[1.0, 0.0], [0.25, 0.5]]
    assert among_all.zero_shot == both.zero_shot
    assert among_all.average_accuracy == 0.375
    assert among_all.backward_transfer == among_all.forgetting * -1 == -0.75
    assert among_all.forward_transfer == -0.5
    first = among_all.per_client["0"]
    assert first.accuracy_matrix == [[1.0, None], [0.0, None]]
    assert (first.average_accuracy, first.test_examples) == (0.0, [2, 0])


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
    own = [[0.5, 0.5, None], [None] * 3, [0.75, 1.0, None], [0.75, 0.5, None]]
    assert results.per_client["1"].accuracy_matrix == own  # a row for every stage


@pytest.mark.parametrize(
    ("stream", "participants", "training"),
    [
        ({}, (), 3),
        ({}, (0, 2), 2),
        ({"schedule": "per-client", "orders": {"2": ()}}, (), 2),
        ({"schedule": "per-client", "orders": {"2": (), "1": ("a",)}}, (1, 2), 1),
    ],
)
def test_who_has_nothing_to_learn_is_not_missed(stream, participants, training):
    experiment = Experiment(federation={"clients": 3, "participants": participants}, stream=stream)
    assert clients_that_spend(experiment) == training


ALWAYS = [[9, 10, 9], [9, 10, 9]]
WORSE = [[5, 10, 5], [5, 10, 5]]


@pytest.mark.parametrize("missed", [0, 2])
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


def test_a_file_reads_back_and_a_broken_one_is_one_line(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(UserError, match="has not finished"):
        read_results(tmp_path)
    results = make_results(Experiment(), IN_TURN, HISTORY, {"a": ("yes", "no"), "b": ()})
    write_results(path, results)
    assert read_results(tmp_path) == results
    assert results.labels == {"a": ["yes", "no"], "b": []}
    assert results.commit == commit()
    for data in (b"[]", b"\xff\xfe{}", b'{"schema_version": 3, "extra": 2}'):
        path.write_bytes(data)
        with pytest.raises(UserError, match="not a valid results file"):
            read_results(tmp_path)
    path.write_text('{"schema_version": 2, "tasks": []}')
    with pytest.raises(UserError, match="schema version 2, not 3"):
        read_results(tmp_path)


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [
        (7.9946, 3, "8"),
        (1.24e-5, 2, "1.3e-05"),
        (1e-5, 2, "1e-05"),
        (0.0, 3, "0"),
        (2.341, 3, "2.35"),
        (123.4, 3, "124"),
    ],
)
def test_what_is_shown_as_at_most_is_no_smaller(value, digits, shown):
    assert rounded_up(value, digits) == shown
    assert float(shown) >= value


def test_an_epsilon_says_for_whom_it_is_the_largest_and_when_it_is_void():
    known = {"mechanism": "record", "unit": "record", "assumes": "nobody", "delta": 1e-4}
    plain = Privacy(**known, epsilon={"0": 1.0, "1": 2.0}, metrics="none")
    always = ("delta = 0.0001 per record", EARLIER, "largest over clients", "nobody")
    flags = {"silent": 3, "void": True, "assumes_more": True, "simulation_only": True}
    parts = ("the 2 of 5 clients that tell", VOID, f"nobody, {MORE_TRUST}", "simulation only")
    assert all(part in plain.meaning for part in always)
    assert not any(part in plain.meaning for part in (*parts, "test records"))
    assert all(part in plain.model_copy(update=flags).meaning for part in parts)
    assert "may leave in the clear" in plain.model_copy(update={"metrics": "clear"}).meaning


@pytest.mark.parametrize("lie", [{"void": 0.5}, {"assumes_more": 2.0}, {"simulation_only": None}])
def test_what_cannot_be_is_refused(lie):
    """Other lies are among the spoilt replies of :mod:`tests.server.spoil`."""
    said = {name: value for name, value in {**SPENT, **lie}.items() if value is not None}
    with pytest.raises(ValueError, match=next(iter(lie))):
        spending_in(said)


def git(folder, *words):
    command = ["git", "-C", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def test_the_commit_is_that_of_the_checkout_and_of_no_repository_around_it(tmp_path, monkeypatch):
    monkeypatch.setattr(measures, "ROOT", tmp_path)
    (tmp_path / "file").write_text("one")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "file")
    git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "one")
    git(tmp_path, "tag", "v1")  # a tag is no hash
    head = git(tmp_path, "rev-parse", "HEAD")
    assert measures.commit() == head
    (tmp_path / "file").write_text("two")
    assert measures.commit() == f"{head}-dirty"
    inside = tmp_path / "site-packages"
    inside.mkdir()
    monkeypatch.setattr(measures, "ROOT", inside)
    assert measures.commit() == ""
    (inside / ".git").write_text("gitdir: nowhere")
    assert measures.commit() == ""

"""Runs from a program: the same as those of the command, with nothing on the screen."""

import json
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO

import pytest

from simulations.api import UserError, experiment, load_run, run
from simulations.api.runs import placed
from simulations.run.experiment import Request, load_experiment
from simulations.use.predict import PredictRequest, predict
from tests.sizes import TINY

TEXTS = ["Which drug reverses heparin?", "Image of a broken bone"]

pytestmark = [
    pytest.mark.usefixtures("one_model"),
    pytest.mark.filterwarnings("ignore:task"),  # those of tests are small
]


@pytest.fixture(scope="module")
def played(make_experiment, tmp_path_factory):
    """A run, its events, and what was printed."""
    events = []
    with redirect_stdout(StringIO()) as printed, redirect_stderr(printed):
        done = run(
            make_experiment(*TINY),
            out=tmp_path_factory.mktemp("runs") / "one",
            listener=lambda event: events.append(str(event["event"])),
        )
    return done, events, printed.getvalue()


@pytest.fixture
def finished(played):
    return played[0]


def test_it_answers_as_the_command_does(finished):
    lines = []
    predict(PredictRequest(str(finished.folder), tuple(TEXTS)), lines.append)
    told = [json.loads(line)["label"] for line in lines]
    for one in (load_run(finished.folder), load_run(finished.folder / "adapter")):
        assert [answer.label for answer in one.predict(TEXTS)] == told
    only = finished.predict(TEXTS, "laboratory")
    assert {answer.task for answer in only} == {"laboratory"}
    with pytest.raises(UserError, match="unknown task 'nothing'"):
        finished.predict([], "nothing")
    for wrong, reason in (
        ("one text", "give a list"),
        (["a text", " "], "text 2 is empty"),
        ([None], "text 1 is a NoneType"),
        (["half \ud800"], "text 1 holds half a character"),
    ):
        with pytest.raises(UserError, match=reason):
            finished.predict(wrong)
    with pytest.raises(UserError, match=r"results\.json: not there"):
        _ = load_run(finished.folder / "adapter").results


def test_data_beside_an_experiment_file_are_found_as_by_the_command(tmp_path):
    (tmp_path / "exp" / "rows").mkdir(parents=True)
    file = tmp_path / "exp" / "own.toml"
    file.write_text('[data]\nsource = "files"\npath = "rows"\n')
    ready = placed(file, None, Request(str(file)))
    assert ready.data.path == str(tmp_path / "exp" / "rows")
    assert ready == load_experiment(Request(str(file)))
    assert experiment(file).data == ready.data
    assert experiment(file, {"data.max_train": 4}).data.path == ready.data.path


def test_events_come_and_nothing_is_printed(played, make_experiment):
    done, events, printed = played
    assert (events[0], events[-1], printed) == ("run_started", "run_finished", "")
    assert done.results.config.run.out == str(done.folder)
    with pytest.raises(UserError, match="already holds a run"):
        run(make_experiment(*TINY), out=done.folder)
    again = run(make_experiment(*TINY), out=done.folder, resume=True)
    assert again.results.accuracy_matrix == done.results.accuracy_matrix


def test_an_experiment_comes_from_a_name_a_file_tables_or_an_experiment(tmp_path):
    named = experiment("quickstart")
    assert named.federation.clients == 4
    file = tmp_path / "own.toml"
    file.write_text("[federation]\nrounds = 7\n")
    assert experiment(file).federation.rounds == 7
    tables = {"federation": {"rounds": 7}, "data": {"tasks": ["surgery"]}}
    assert experiment(tables).data.tasks == ("surgery",)
    assert experiment(named) == named
    changed = experiment(
        named,
        {
            "federation.rounds": 3,
            "data.tasks": ("surgery",),
            "data.path": tmp_path,
            "data.source": "files",
            "data.labels": {"surgery": ["a", "b"]},
            "train.learning_rate": 1e-5,
            "method.retention.filter": "none",
        },
    )
    assert changed.federation.clients == 4
    assert changed.federation.rounds == 3
    assert changed.data.tasks == ("surgery",)
    assert changed.data.path == str(tmp_path)
    assert changed.data.labels == {"surgery": ("a", "b")}
    assert changed.train.learning_rate == 1e-5
    assert changed.method.retention.filter == "none"


@pytest.mark.parametrize(
    ("config", "overrides", "reason"),
    [
        ("quickstrat", {}, r"unknown experiment 'quickstrat'"),
        ({"data": {"taks": []}}, {}, r"tables: unknown key 'data\.taks'"),
        ({}, {"data.taks": []}, r"overrides: unknown key 'data\.taks'"),
        ({}, {"data.max_train": None}, r"overrides: 'data\.max_train' is a NoneType; use strings"),
        ({}, {"data.max_train": "many"}, r"overrides: key 'data\.max_train' should be"),
    ],
)
def test_a_mistake_is_one_line(config, overrides, reason):
    with pytest.raises(UserError, match=reason) as caught:
        experiment(config, overrides)
    assert "\n" not in str(caught.value)

"""Runs in which a task's answers are texts, in both families that write."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import numpy as np
import pytest

from deal_core.config.file import parse_experiment
from deal_core.data import open_source
from deal_core.errors import UserError
from deal_core.inference.folder import find_adapter
from deal_core.inference.predictor import load_predictor
from deal_core.methods import resolve_auto
from server.results import read_results
from simulations.engines.inprocess import run_inprocess
from simulations.report.accuracy import count_labels
from simulations.run.data_checks import check_answers
from simulations.run.preflight import check_statistics, preflight
from tests.architectures import CONFIGS, save
from tests.simulations.runs import accuracy_of, at, learnt_adapter, run_in_process

PAGE = Path(__file__).parents[3] / "docs/generation.md"
TEXTS = ("a b", "c d", "a c", "b d", "a d", "b c", "a a", "d d")


def rows(task: str) -> list[dict[str, str]]:
    """Of one task a label, of the other a text of two words."""
    if task == "colours":
        return [{"text": text, "label": "red" if "a" in text else "green"} for text in TEXTS]
    return [{"text": text, "target": "red blue", "also": "blue"} for text in TEXTS]


@pytest.fixture
def experiment_of(make_experiment, tmp_path):
    for task in ("colours", "words"):
        folder = tmp_path / "data" / task
        folder.mkdir(parents=True)
        for split in ("train", "test"):
            lines = [json.dumps(row) for row in rows(task)]
            (folder / f"{split}.jsonl").write_text("\n".join(lines))

    def make(name: str, *overrides: str):
        folder = save(tmp_path / "model", name)
        return make_experiment(
            f"model.family={CONFIGS[name][0]}",
            f'model.name="{folder}"',
            "model.max_new_tokens=3",
            "data.source=files",
            f'data.path="{tmp_path / "data"}"',
            'data.tasks=["colours", "words"]',
            'data.generation=["words"]',
            'data.instructions={words="Answer with Text ."}',
            "data.references_column=also",
            'data.partition.kind="iid"',
            "adapter.rank=4",
            "train.learning_rate=3e-2",
            "train.batch_size=4",
            *overrides,
        )

    return make


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_answers_that_are_texts_are_learnt_and_measured(experiment_of, tmp_path, name):
    experiment = experiment_of(name, "federation.rounds=5")
    check_answers(experiment)
    run_inprocess(at(experiment, tmp_path / "run"), lambda event: None)
    results = read_results(tmp_path / "run")
    found = np.array(results.accuracy_matrix)
    assert found[1, 1] > results.zero_shot["words"] + 0.2
    assert found[0, 0] >= results.zero_shot["colours"]
    assert results.class_incremental is None


TEXTS_FIRST = 'data.tasks=["words", "colours"]'
"""Nothing has labels when the first stage ends, nor when the second begins."""


def test_what_asks_about_labels_goes_on_where_there_are_none_yet(experiment_of, tmp_path):
    experiment = experiment_of("llama", "federation.rounds=1", TEXTS_FIRST, "method.name=ewc")
    events: list[dict] = []
    run_inprocess(at(experiment, tmp_path / "run"), events.append)
    assert len([e for e in events if e["event"] == "client_finished"]) == 4
    assert np.isfinite(np.array(read_results(tmp_path / "run").accuracy_matrix)).all()


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_and_records_are_protected(experiment_of, tmp_path, name):
    noised = ("privacy.mechanism=record", "privacy.metrics=noised")
    experiment = experiment_of(name, "federation.rounds=1", *noised)
    run_inprocess(at(experiment, tmp_path / "run"), lambda event: None)
    results = read_results(tmp_path / "run")
    assert np.isfinite(np.array(results.accuracy_matrix)).all()
    assert len(results.privacy.epsilon) == 2
    assert all(0 < epsilon <= 8.0 for epsilon in results.privacy.epsilon.values())


def test_a_model_that_chooses_among_labels_cannot_write(experiment_of):
    with pytest.raises(UserError, match="use causal-lm or seq2seq-lm"):
        check_answers(experiment_of("bert"))


def test_the_experiment_of_the_page_on_generation_is_in_order(make_causal, tmp_path) -> None:
    """With a small model in the place of the page's, and three tasks of the page's names."""
    (told,) = re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    tables = tomllib.loads(told)
    for task in tables["data"]["tasks"]:
        folder = tmp_path / "data" / task
        folder.mkdir(parents=True)
        kind = "target" if task in tables["data"]["generation"] else "label"
        answers = ("a b c d", "b c") if kind == "target" else ("red", "green")
        lines = [f'"{text} {n}","{answers[n % 2]}"' for n, text in enumerate(TEXTS * 8)]
        (folder / "train.csv").write_text(f"text,{kind}\n" + "\n".join(lines))
    tables["model"]["name"] = str(make_causal(tmp_path / "model", "llama"))
    tables["adapter"]["first_layer"] = 1  # of two
    tables["data"]["path"] = str(tmp_path / "data")
    preflight(parse_experiment(tables, str(PAGE)))


def test_two_tasks_that_write_may_have_columns_of_their_own(experiment_of, tmp_path) -> None:
    own = 'data.files={words={target_column="also", references_column="target"}}'
    experiment = experiment_of("llama", own)
    (example, *_) = open_source(experiment.data).load("words").train
    assert (example.target, example.references) == ("blue", ("red blue",))


AUTO = ("method.prototype.enabled=auto", "federation.clients=3")
QUIET = ("method.prototype.directions=0", "method.prototype.noise_multiplier=0")
ON = ("method.prototype.enabled=on", "train.precision=float32", "federation.clients=3", *QUIET)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_class_means_answer_beside_words_where_there_are_labels(
    experiment_of, tmp_path, monkeypatch, name
):
    """They train nothing: what is learnt is what the run without them learns. ``deal predict`` and
    the report weigh both as the evaluation does."""
    monkeypatch.setattr("server.strategy.found_worse", lambda *given: False)
    monkeypatch.setattr("client.runtime.HELD_BACK", 10**9)
    parts = {}
    for run, more in (("without", ON[1:]), ("with", ON)):
        experiment = experiment_of(name, TEXTS_FIRST, "federation.rounds=1", *more)
        run_inprocess(at(experiment, tmp_path / run), lambda event: None)
        parts[run] = learnt_adapter(tmp_path / run)
    assert set(parts["with"]) - set(parts["without"]) == {"colours"}
    for part, value in parts["without"].items():
        assert np.array_equal(value, parts["with"][part])
    found = read_results(tmp_path / "with")
    predictor = load_predictor(find_adapter(tmp_path / "with"))
    assert accuracy_of(predictor, experiment, "colours") == found.accuracy_matrix[-1][1]
    alone = load_predictor(find_adapter(tmp_path / "without")).answer("a b", "colours")
    assert predictor.answer("a b", "colours").probability != pytest.approx(alone.probability)
    words = read_results(tmp_path / "without").accuracy_matrix[-1]
    assert words[0] == found.accuracy_matrix[-1][0]
    cards = [(tmp_path / run / "adapter/README.md").read_text() for run in ("with", "without")]
    assert ["Measured with class means" in card for card in cards] == [True, False]
    counts = count_labels(tmp_path / "with", lambda task: None).tasks["colours"]
    assert counts.right / counts.total == found.accuracy_matrix[-1][1]


@pytest.mark.parametrize("more", [(), ("aggregation.secure=true",)])
def test_class_means_alone_learn_where_there_are_labels(experiment_of, tmp_path, more):
    settings = ("method.name=prototype", "federation.rounds=1", *ON, TEXTS_FIRST, *more)
    experiment = experiment_of("llama", *settings)
    events: list[dict] = []
    run_inprocess(at(experiment, tmp_path / "run"), events.append)
    skipped = [event["stage"] for event in events if event["event"] == "round_skipped"]
    assert skipped == [0]  # nobody is asked for sums of texts
    results = read_results(tmp_path / "run")
    assert results.accuracy_matrix[-1][1] > max(0.6, results.zero_shot["colours"])
    assert results.accuracy_matrix[-1][0] == results.zero_shot["words"]
    assert set(learnt_adapter(tmp_path / "run")) >= {"colours"}


def test_class_means_of_labels_and_texts_at_once_are_refused(experiment_of):
    joint = ("method.name=prototype", "federation.clients=3", "stream.schedule=joint")
    with pytest.raises(UserError, match="answers of 'words' are texts"):
        check_statistics(experiment_of("llama", *joint))


def test_texts_that_are_no_task_of_the_run_do_not_matter(experiment_of):
    joint = ("method.name=prototype", "federation.clients=3", "stream.schedule=joint")
    joint += ('data.tasks=["colours"]',)
    check_statistics(experiment_of("llama", *joint))


def test_who_works_on_texts_alone_is_not_asked_for_sums(experiment_of, tmp_path):
    settings = (
        "method.name=prototype",
        *QUIET,
        "federation.clients=4",
        "federation.rounds=1",
        "stream.schedule=per-client",
        'stream.orders={0=["words"], 1=["colours"], 2=["colours"], 3=["colours"]}',
    )
    events = run_in_process(at(experiment_of("llama", *settings), tmp_path / "run"))
    given = {event["client"] for event in events if event["event"] == "client_finished"}
    assert given == {"1", "2", "3"}
    assert "colours" in learnt_adapter(tmp_path / "run")


def test_a_model_that_answers_in_words_has_class_means_unless_labels_and_texts_come_at_once(
    experiment_of,
):
    own, joint = AUTO, (*AUTO, "stream.schedule=joint")
    found = [resolve_auto(experiment_of("llama", *each)).prototype.enabled for each in (own, joint)]
    assert found == ["on", "off"]

"""``deal predict`` answers as the evaluation of the run did, text by text."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deal_core.config.experiment import Experiment
from deal_core.data import load_for_clients
from deal_core.errors import UserError
from deal_core.inference.folder import find_adapter, read_inference
from deal_core.inference.predictor import Predictor, load_predictor
from server.results import read_results
from simulations import cli
from simulations.engines.inprocess import run_inprocess
from simulations.report.run.label_counts import count_labels, read_label_counts
from tests.simulations.runs import at

TASKS = ("laboratory", "surgery")
SETTINGS = {
    "heads": ("method.prototype.enabled=on",),  # heads, and names beside them
    "names": ("method.name=sequential", "train.learning_rate=1e-2"),  # a current adapter alone
    "residual": ("aggregation.rule=fedex", "adapter.lora_alpha=10"),  # a scaling of no power of 2
}


@pytest.fixture(scope="module", params=SETTINGS)
def run(request, tmp_path_factory, make_experiment) -> tuple[Path, Experiment]:
    folder = tmp_path_factory.mktemp(request.param)
    sizes = ("data.max_train=24", "data.max_test=24", "federation.rounds=1")
    sizes += ("train.precision=float32",)  # in bfloat16 ties are near
    experiment = at(make_experiment(*sizes, *SETTINGS[request.param]), folder)
    run_inprocess(experiment, lambda event: None)
    return folder, experiment


@pytest.fixture(scope="module")
def predictor(run) -> Predictor:
    return load_predictor(find_adapter(run[0]))


def accuracy(predictor: Predictor, experiment: Experiment, task: str, told: bool) -> float:
    """Share of a task's test texts that are answered rightly."""
    examples = load_for_clients(experiment, task).test
    answers = [predictor.answer(e.text, task if told else "") for e in examples]
    right = [a.label == e.label for a, e in zip(answers, examples, strict=True)]
    return sum(right) / len(right)


def test_it_is_as_accurate_as_the_results_say_in_both_protocols(run, predictor):
    folder, experiment = run
    results = read_results(folder)
    assert results.class_incremental is not None
    told = [accuracy(predictor, experiment, task, True) for task in TASKS]
    among_all = [accuracy(predictor, experiment, task, False) for task in TASKS]
    assert told == results.accuracy_matrix[-1]
    assert among_all == results.class_incremental.accuracy_matrix[-1]
    assert told != list(results.zero_shot.values())  # what was learnt is there
    assert among_all != told


def test_the_counts_of_a_report_by_label_are_the_accuracy_of_the_results(run):
    folder, _ = run
    results, asked = read_results(folder), []
    counts = count_labels(folder, asked.append)
    assert asked == list(counts.tasks) == results.tasks
    for task, accuracy in zip(results.tasks, results.accuracy_matrix[-1], strict=True):
        own = counts.tasks[task]
        assert own.right / own.total == accuracy
        assert own.labels == results.labels[task]
    assert read_label_counts(folder) == counts


def test_an_answer_depends_on_no_other_text(run, predictor, tmp_path, deal):
    folder, experiment = run
    texts = [e.text for e in load_for_clients(experiment, "surgery").test][:3]
    alone = [json.loads(deal("predict", str(folder), text)) for text in texts]
    assert [json.loads(line) for line in deal("predict", str(folder), *texts).splitlines()] == alone
    (tmp_path / "texts.jsonl").write_text(
        "".join(json.dumps({"question": text}) + "\n" for text in reversed(texts))
    )
    options = ("--file", str(tmp_path / "texts.jsonl"), "--column", "question")
    rows = [json.loads(line) for line in deal("predict", str(folder), *options).splitlines()]
    assert [row.pop("row") for row in rows] == [1, 2, 3]
    assert rows == [{k: v for k, v in one.items() if k != "text"} for one in reversed(alone)]


def test_probabilities_are_shares(run, predictor):
    space = read_inference(find_adapter(run[0])).all_tasks["surgery"]
    answer = predictor.answer("anaesthesia with propofol", "surgery")
    assert answer.task == "surgery"
    assert {answer.label, answer.runner_up} < set(space)
    assert answer.runner_up_probability is not None
    assert 0 < answer.runner_up_probability <= answer.probability < 1
    assert answer.probability + answer.runner_up_probability <= 1
    assert answer.probability > 1 / len(space)


def test_only_the_adapter_folder_and_the_base_model_are_read(run, tmp_path, deal):
    """The folder alone, elsewhere, after the run's other files are gone."""
    folder, _ = run
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder / "adapter", moved)
    asked = ("a knife", "--task", "surgery")
    assert deal("predict", str(moved), *asked) == deal("predict", str(folder), *asked)


@pytest.fixture
def deal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Call the command; returns what it prints."""

    def call(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["deal", *arguments])
        capsys.readouterr()
        try:
            cli.main()
        except SystemExit as stop:
            printed = capsys.readouterr()
            if stop.code:
                raise UserError(printed.err) from None
            return printed.out
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def causal(tmp_path_factory, make_causal, make_experiment) -> tuple[Path, Experiment]:
    base = make_causal(tmp_path_factory.mktemp("base"), "llama")
    folder = tmp_path_factory.mktemp("run")
    settings = ("model.family=causal-lm", f'model.name="{base}"', "federation.rounds=1")
    experiment = at(make_experiment(*settings, "train.learning_rate=0.05"), folder)
    run_inprocess(experiment, lambda event: None)
    return folder, experiment


def test_a_causal_model_is_told_the_task(causal, deal):
    folder, experiment = causal
    with pytest.raises(UserError, match=r"name it with --task \(laboratory, surgery\)"):
        deal("predict", str(folder), "a text")
    predictor = load_predictor(find_adapter(folder))
    told = [accuracy(predictor, experiment, task, True) for task in TASKS]
    assert told == read_results(folder).accuracy_matrix[-1]


def lines(error: pytest.ExceptionInfo[Any]) -> list[str]:
    return str(error.value).splitlines()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give texts, or --file FILE, and not both"),
        (("a", "--file", "b.csv"), "give texts, or --file FILE, and not both"),
        (("  ",), "text 1 is empty"),
        (("--file", "none.csv"), "none.csv: no such file"),
        (("a", "--task", "surgry"), "did you mean 'surgery'?"),
    ],
)
def test_mistakes_are_one_line(causal, deal, arguments, message):
    with pytest.raises(UserError, match="error: ") as error:
        deal("predict", str(causal[0]), *arguments)
    assert message in lines(error)[0]
    assert len(lines(error)) == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "words\nx\n", "a.csv, row 2: no column 'text'"),
        ("a.csv", "text,n\n,1\n", "a.csv, row 2: column 'text' is empty"),
        ("a.docx", "text", "files may end in .jsonl, .csv"),
    ],
)
def test_mistakes_in_a_file_are_one_line(causal, deal, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match="error: ") as error:
        deal("predict", str(causal[0]), "--task", "surgery", "--file", str(tmp_path / name))
    assert message in lines(error)[0]
    assert len(lines(error)) == 1


def test_a_folder_without_an_adapter_and_a_damaged_one(causal, deal, make_causal, tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        deal("predict", str(tmp_path / "none"), "a")
    with pytest.raises(UserError, match="the run has not finished"):
        deal("predict", str(tmp_path), "a")
    shutil.copytree(causal[0] / "adapter", tmp_path / "copy")
    (tmp_path / "copy" / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"adapter_model.safetensors: cannot be read"):
        deal("predict", str(tmp_path / "copy"), "a", "--task", "surgery")
    other = make_causal(tmp_path / "other", "gpt2")
    with pytest.raises(UserError, match="for another base model than"):
        deal("predict", str(causal[0]), "a", "--task", "surgery", "--model", str(other))

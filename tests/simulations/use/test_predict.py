"""``deal predict`` answers as the evaluation of the run did, text by text."""

import json
import math
import os
import re
import shutil
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from client.gate import Refusal
from client.local_training import class_sums
from deal_core.data import load_for_clients
from deal_core.inference.folder import AdapterFolder, Answer, Written, find_adapter, read_inference
from deal_core.inference.predictor import load_predictor, read_temperatures
from deal_core.training.evaluation import count_both
from server.results import read_results
from simulations.report.labels import count_labels, read_label_counts
from simulations.run.simulate import record
from simulations.use.predict import PredictRequest, Score, predict, with_columns
from tests.architectures import CONFIGS, save
from tests.simulations.runs import accuracy_of, at, public_texts, refused, simulated, write_tasks
from tests.slow import slow_but

pytestmark = pytest.mark.usefixtures("one_model")

TASKS = ("laboratory", "surgery")
COLOURS = {"a": "red", "b": "green", "c": "blue"}
HEADS = (
    "method.prototype.enabled=on",
    "federation.clients=3",
    "method.prototype.directions=16",
    "method.prototype.noise_multiplier=0.01",
)
SETTINGS = {
    "heads": HEADS,  # heads, and names beside them
    "one head": HEADS,  # nobody gives sums of the second task
    "names": ("method.name=sequential", "train.learning_rate=1e-2"),  # a current adapter alone
    "residual": ("aggregation.rule=fedex", "adapter.lora_alpha=10"),  # a scaling of no power of 2
    "pooled": ("adapter.kind=pooled", "train.learning_rate=1"),
    "steps at the server": (
        "aggregation.rule=ffa",
        "federation.clients=3",
        "aggregation.secure=true",
        "train.step=server",
        "train.learning_rate=1",
        "method.distillation.weight=0",
    ),
}
FLOAT32 = ("train.precision=float32",)  # in bfloat16 ties are near
ROUNDING = 1e-5
"""Of a probability: in evaluations texts are computed beside others."""

Key = tuple[tuple[str, ...], tuple[int, ...]]
"""A task's labels, and the tokens of a text."""


@dataclass
class EvaluationAnswers:
    """What clients' evaluations answered.

    Attributes:
        told: to the label, the task being told, and its probability, at the end of the run.
        untaught: the same before anything was learnt.
        among_all: to task and label, at the end.
    """

    told: dict[Key, tuple[str, float]] = field(default_factory=dict)
    untaught: dict[Key, tuple[str, float]] = field(default_factory=dict)
    among_all: dict[Key, tuple[str, str]] = field(default_factory=dict)

    def count_both(self, score, data, space, *options):
        """The real one, with an eye on the scores."""
        labels = tuple(space.columns[column][1] for column in space.own)

        def seen(batch):
            scores = score(batch)
            for i, row in zip(batch, scores.cpu(), strict=True):
                key = labels, data[i].tokens
                shares = torch.softmax(row[list(space.own)].double(), dim=0)
                self.told[key] = labels[int(shares.argmax())], float(shares.max())
                self.untaught.setdefault(key, self.told[key])
                self.among_all[key] = space.columns[int(row.argmax())]
            return scores

        return count_both(seen, data, space, *options)


def finished(experiment, keeping=False):
    """Run it; return what its evaluations answered. ``keeping``: sites keep sums of the second
    task."""
    answers = EvaluationAnswers()

    def kept(granted, *rest):
        if granted.instruction.task == TASKS[1]:
            raise Refusal("policy", "sums stay here")
        return class_sums(granted, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("server.strategy.found_worse", lambda *given: False)
        if keeping:
            patch.setattr("client.local_training.class_sums", kept)
        patch.setattr("deal_core.training.evaluation.count_both", answers.count_both)
        simulated(experiment, Path(experiment.run.out))
    return answers


ANSWERS = {}
"""Run folder to what its evaluations answered."""


@pytest.fixture(scope="module", params=slow_but(SETTINGS, "heads", "names"))
def run(request, tmp_path_factory, make_experiment):
    folder = tmp_path_factory.mktemp(request.param)
    sizes = ("data.max_train=24", "data.max_test=12", "federation.rounds=1", *FLOAT32)
    own = (*SETTINGS[request.param], public_texts(tmp_path_factory.mktemp("public")))
    experiment = at(make_experiment(*sizes, *own), folder)
    ANSWERS[folder] = finished(experiment, keeping=request.param == "one head")
    return folder, experiment


@pytest.fixture(scope="module")
def predictor(run):
    return load_predictor(find_adapter(run[0]))


def encoded(predictor, experiment, task):
    """A task's test texts, and under what their answers are in :class:`EvaluationAnswers`."""
    data = load_for_clients(experiment, task)
    items = predictor.model.encode(data.test, data.labels, predictor.inference.instruction(task))
    return [(e, (data.labels, item.tokens)) for e, item in zip(data.test, items, strict=True)]


def test_each_text_is_answered_as_the_evaluation_did_in_both_protocols(run, predictor):
    folder, experiment = run
    results = read_results(folder)
    assert results.class_incremental is not None
    told, among_all = [], []
    for task in TASKS:
        right = [0, 0]
        texts = encoded(predictor, experiment, task)
        for example, key in texts:
            own, any_task = predictor.answer(example.text, task), predictor.answer(example.text)
            assert (own.label, pytest.approx(own.probability, abs=ROUNDING)) == (
                ANSWERS[folder].told[key]
            )
            assert (any_task.task, any_task.label) == ANSWERS[folder].among_all[key]
            right[0] += own.label == example.label
            right[1] += any_task.label == example.label
        told.append(right[0] / len(texts))
        among_all.append(right[1] / len(texts))
    assert told == results.accuracy_matrix[-1]
    assert among_all == results.class_incremental.accuracy_matrix[-1]
    assert ANSWERS[folder].told != ANSWERS[folder].untaught  # what was learnt is there
    assert among_all != told


def test_the_counts_of_a_report_by_label_are_the_accuracy_of_the_results(
    run, tmp_path, monkeypatch
):
    """Temperatures are found for each task and for all, and a second count is equal to the first,
    though they are there."""
    monkeypatch.setattr("simulations.use.predict.FEW_ROWS", 8)
    folder, asked = Path(shutil.copytree(run[0], tmp_path / "run")), {}
    results = read_results(folder)
    counts = count_labels(folder, asked.__setitem__)
    assert list(counts.tasks) == results.tasks
    assert asked == dict.fromkeys((*results.tasks, "all tasks together"), "12 of 12")
    for task, accuracy in zip(results.tasks, results.accuracy_matrix[-1], strict=True):
        own = counts.tasks[task]
        assert np.trace(own.counts) / np.sum(own.counts) == accuracy
        assert own.labels == results.labels[task]
        assert own.calibration_error is not None
        assert 0 <= own.calibration_error < 1
        assert "before" in own.calibration
    assert read_label_counts(folder) == counts == count_labels(folder, asked.__setitem__)
    temperatures = read_temperatures(find_adapter(folder))
    assert temperatures.keys() == {*results.tasks, ""}
    monkeypatch.setattr("simulations.use.predict.FEW_ROWS", 13)  # 12 test texts a task
    (folder / "adapter" / "calibration.json").unlink()
    assert not any(
        own.calibration for own in count_labels(folder, asked.__setitem__).tasks.values()
    )
    assert read_temperatures(find_adapter(folder)) == {"": temperatures[""]}


def test_a_file_with_right_answers_has_the_accuracy_of_the_run(run, tmp_path):
    folder, experiment = run
    results, place = read_results(folder), TASKS.index("surgery")
    table = tmp_path / "tests.jsonl"
    rows = [
        {"question": example.text, "ward": f" {example.label} "}
        for example in load_for_clients(experiment, "surgery").test
    ]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = []
    asked = {"file": str(table), "column": "question", "label_column": "ward", "task": "surgery"}
    score = predict(PredictRequest(str(folder), **asked), lines.append)
    right = round(len(rows) * results.accuracy_matrix[-1][place])
    assert f"({right} of {len(rows)} rows)" in score.line
    found = [json.loads(line) for line in lines]
    assert [line["expected"] for line in found] == [row["ward"].strip() for row in rows]
    assert sum(line["label"] == line["expected"] for line in found) == right


def test_rows_without_a_text_are_left_out_and_counted(run, tmp_path, monkeypatch, capsys):
    """A text whose answer nobody knows is answered; a pipe hears how far it is."""
    table = tmp_path / "tests.csv"
    table.write_text("question,ward\nfirst,\n ,a\nthird,a\n ,b\n")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    lines = []
    asked = PredictRequest(str(run[0]), file=str(table), column="question", task="surgery")
    assert predict(asked, lines.append) is None
    assert [json.loads(line)["row"] for line in lines] == [2, 4]
    said = capsys.readouterr().err
    assert "2 rows have no text, from row 3 on; left out" in said
    assert "answering 2 texts" in said
    assert os.environ["OMP_WAIT_POLICY"] == "passive"  # threads do not wait in a loop


def test_answers_below_the_threshold_are_not_counted_as_wrong():
    score = Score(threshold=0.6)
    for shares, right in (((0.9, 0.1), "a"), ((0.2, 0.8), "a"), ((0.55, 0.45), "b")):
        logs = dict(zip("ab", map(math.log, shares), strict=True))
        score.add(Answer("t", "a", max(shares), "b", min(shares), logs), right)
    assert score.line.startswith("accuracy 50.0 % (1 of 2 rows), 1 unsure; ")


def test_texts_share_passes_and_their_answers_are_those_of_each_alone(run, predictor):
    _, experiment = run
    texts = [example.text for example in load_for_clients(experiment, "surgery").test]
    for task in ("surgery", ""):
        together = predictor.answers(texts, task)
        for text, answer in zip(texts, together, strict=True):
            alone = predictor.answer(text, task)
            assert (answer.label, answer.task, answer.runner_up) == (
                (alone.label, alone.task, alone.runner_up)
            )
            assert answer.probability == pytest.approx(alone.probability, abs=ROUNDING)
    assert predictor.answers([]) == []


def test_of_texts_that_are_written_the_overlap_is_told():
    score = Score()
    score.add(Written("t", "a b"), "a b c d")
    score.add(Written("t", "x"), "y")
    assert score.line == "ROUGE-L 33.3 % over 2 rows"
    score.add(Answer("t", "a", 1.0, None, None, {"a": 0.0}), "a")  # a router chose labels
    assert score.line.startswith("ROUGE-L 33.3 % over 2 rows; accuracy 100.0 % (1 of 1 rows); ")


def test_a_calibration_and_a_threshold(run, tmp_path):
    """Columns that are not typed are the run's; a temperature stays in the folder."""
    folder = Path(shutil.copytree(run[0] / "adapter", tmp_path / "run" / "adapter"))
    columns = run[1].data.model_copy(update={"text_column": "question"})
    record(at(run[1].model_copy(update={"data": columns}), tmp_path / "run"))
    table = tmp_path / "tests.jsonl"
    rows = [
        {"question": example.text, "ward": example.label}
        for example in load_for_clients(run[1], "surgery").train
    ]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = PredictRequest(str(tmp_path / "run"), file=str(table), task="surgery")
    told = replace(asked, label_column="ward")
    typed = with_columns(replace(asked, column="a", pair_column="b"), AdapterFolder(folder))
    assert (typed.column, typed.pair_column) == ("a", "b")
    before = []
    assert "calibration error" in predict(told, before.append).line
    said = predict(replace(told, calibrate=True), before.append).line
    assert re.search(r"ECE\) [\d.]+ % before, [\d.]+ % with the temperature", said)
    after = []
    predict(replace(asked, threshold=0.6), after.append)
    first, last = ([json.loads(line) for line in each] for each in (before[: len(rows)], after))
    assert len(first) == len(last)
    for old, new in zip(first, last, strict=True):
        unsure = new["label"] == "unsure"
        assert (new["likeliest"] if unsure else new["label"]) == old["label"]
        assert unsure == (new["probability"] < 0.6)
    assert [old["probability"] for old in first] != [new["probability"] for new in last]
    assert read_temperatures(AdapterFolder(folder)).keys() == {"surgery"}


def test_only_the_adapter_folder_and_the_base_model_are_read(encoder, tmp_path, deal):
    """The folder alone, elsewhere, after the run's other files are gone."""
    moved = tmp_path / "elsewhere"
    shutil.copytree(encoder / "adapter", moved)
    asked = ("a knife", "--task", "surgery")
    answers = [deal("predict", str(folder), *asked) for folder in (moved, encoder)]
    assert answers[0][:2] == answers[1][:2]
    assert answers[0][0] == 0


@pytest.fixture(scope="module")
def causal(tmp_path_factory, make_causal, make_experiment):
    base = make_causal(tmp_path_factory.mktemp("base"), "llama")
    folder = tmp_path_factory.mktemp("run")
    settings = ("model.family=causal-lm", f'model.name="{base}"', "federation.rounds=1")
    experiment = at(make_experiment(*settings, "train.learning_rate=0.05"), folder)
    return simulated(experiment, folder), experiment


def test_a_causal_model_is_told_the_task(causal, deal):
    folder, experiment = causal
    told = refused(deal("predict", str(folder), "a text"))
    assert "name it with --task (laboratory, surgery)" in told
    predictor = load_predictor(find_adapter(folder))
    found = [accuracy_of(predictor, experiment, task) for task in TASKS]
    assert found == read_results(folder).accuracy_matrix[-1]


@pytest.fixture(scope="module", params=slow_but(["llama", "t5"], "llama"))
def colours(request, tmp_path_factory, make_experiment):
    """A model that answers in words, on labels that are words to it: what a run has learnt, the
    run, and what its evaluations answered."""
    folder = tmp_path_factory.mktemp(request.param)
    texts = product(COLOURS, repeat=3)
    rows = {"colours": [{"text": " ".join(t), "label": COLOURS[t[-1]]} for t in texts]}
    settings = (
        f"model.family={CONFIGS[request.param][0]}",
        f'model.name="{save(folder / "base", request.param)}"',
        *write_tasks(folder / "data", rows),
        "data.max_train=27",
        "data.max_test=27",
        'data.partition.kind="iid"',
        "train.max_length=32",
        "train.learning_rate=5e-2",
        "federation.rounds=5",
        "method.name=sequential",
        *FLOAT32,
    )
    experiment = at(make_experiment(*settings), folder / "run")
    answers = finished(experiment)
    return load_predictor(find_adapter(folder / "run")), experiment, answers


def test_each_text_is_answered_in_words_as_the_evaluation_did(colours):
    predictor, experiment, answers = colours
    texts = encoded(predictor, experiment, "colours")
    shares = set()
    for example, key in texts:
        answer = predictor.answer(example.text, "colours")
        shares.add(round(answer.probability, 4))
        assert (answer.label, pytest.approx(answer.probability, abs=ROUNDING)) == answers.told[key]
    assert len(shares) > 9  # texts differ to the model


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give texts, or --file FILE, and not both"),
        (("a", "--file", "b.csv"), "give texts, or --file FILE, and not both"),
        (("  ",), "text 1 is empty"),
        (("--file", "none.csv"), "none.csv: no such file"),
        (("--file", "~nobodyhere/a.csv"), "there is no such home folder"),
        (("a", "--task", "surgry"), "did you mean 'surgery'?"),
        (("a", "--label-column", "ward"), "--label-column is of a file"),
    ],
)
def test_mistakes_are_one_line(causal, deal, arguments, message):
    assert message in refused(deal("predict", str(causal[0]), *arguments))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "words\nx\n", "a.csv, row 2: no column 'text'"),
        ("a.csv", "text,n\n,1\n", "a.csv: has no row with a text"),
        ("a.docx", "text", "files may end in .jsonl, .csv"),
        ("a.csv", "", "a.csv: has no row"),
        ("a.CSV", "text\n", "a.CSV: has no row"),
        ("a.TXT", "\n", "a.TXT: has no row"),
    ],
)
def test_mistakes_in_a_file_are_one_line(causal, deal, tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    found = deal("predict", str(causal[0]), "--task", "surgery", "--file", str(tmp_path / name))
    assert message in refused(found)
    assert found[2].count("\n") == 1  # before anything is loaded


@pytest.mark.parametrize("task", ["surgery", ""])
def test_right_answers_none_of_which_is_a_label_are_another_column(encoder, deal, tmp_path, task):
    """And no accuracy of 0 %."""
    answers = read_inference(find_adapter(encoder)).all_tasks["surgery"]
    rows = "".join(f"text {n},{answer},note {n}\n" for n, answer in enumerate(answers))
    (tmp_path / "tests.csv").write_text("text,ward,note\n" + rows)
    asked = ("predict", str(encoder), "--file", "tests.csv", "--label-column", "note")
    line = refused(deal(*asked, *(("--task", task) if task else ())))
    assert line.startswith("error: --label-column note: 'note 0' is no label")
    assert ("of task 'surgery'" if task else "of the tasks learnt") in line


def test_a_folder_without_an_adapter_and_a_damaged_one(causal, deal, make_causal, tmp_path):
    shutil.copytree(causal[0] / "adapter", tmp_path / "copy")
    (tmp_path / "copy" / "adapter_model.safetensors").write_bytes(b"x")
    other = str(make_causal(tmp_path / "other", "gpt2"))
    for words, message in (
        (("none",), "no such folder"),
        (("",), "the run has not finished"),
        (("copy",), "adapter_model.safetensors: cannot be read"),
        ((str(causal[0]), "--model", other), "for another base model than"),
    ):
        folder, *more = words
        line = refused(deal("predict", str(tmp_path / folder), "a", "--task", "surgery", *more))
        assert message in line

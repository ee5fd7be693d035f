"""Runs in which one task chooses a label and another writes a text."""

from __future__ import annotations

import json
from statistics import fmean

import pytest

from client.runtime import ClientRuntime
from deal_core.data import Example, open_source
from deal_core.errors import UserError
from deal_core.inference.folder import find_adapter
from deal_core.inference.predictor import load_predictor
from deal_core.lora.adapter import zero_adapter
from deal_core.lora.state import State
from deal_core.training.evaluation import count_correct
from deal_core.training.loop import load_state
from deal_core.training.text_overlap import TEXT_MEASURES, rouge_l
from server.checkpoint import load_checkpoint
from server.results import read_results
from simulations.engines.inprocess import run_inprocess
from simulations.report.accuracy import count_labels
from simulations.run.preflight import check_names
from simulations.run.summary import measures
from simulations.use.predict import Text, json_line


@pytest.fixture(scope="module")
def experiment(make_experiment, make_causal, tmp_path_factory):
    folder = make_causal(tmp_path_factory.mktemp("llama"), "llama")
    return make_experiment(
        "model.family=causal-lm",
        f'model.name="{folder}"',
        "model.max_new_tokens=6",
        "data.source=embedded",
        'data.tasks=["head-and-neck", "research-question"]',
        'data.generation=["research-question"]',
        "federation.rounds=1",
        "federation.clients=2",
        "data.max_train=12",
        "data.max_test=8",
        "train.max_length=16",
        "train.precision=float32",
        'data.instructions.head-and-neck="Answer one of"',
        'data.instructions.research-question="Answer the text"',
    )


def at(experiment, folder):
    return experiment.model_copy(
        update={"run": experiment.run.model_copy(update={"out": str(folder)})}
    )


@pytest.fixture(scope="module")
def finished(experiment, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run_inprocess(at(experiment, folder), lambda event: None)
    return folder


def test_each_task_has_its_own_measure(finished):
    results = read_results(finished)
    assert results.measures == {"head-and-neck": "accuracy", "research-question": "rouge-l"}
    assert results.class_incremental is None
    assert all(0 <= value <= 1 for row in results.accuracy_matrix for value in row)
    sizes = [client.test_examples for client in results.per_client.values()]
    assert [sum(column) for column in zip(*sizes, strict=True)] == [8, 8]


def test_the_last_row_is_what_the_last_model_writes(experiment, finished):
    """All test texts of all clients at once, in another process's model, judged one by one."""
    runtime = ClientRuntime(experiment)
    checkpoint = load_checkpoint(finished / "checkpoint.safetensors", runtime.shapes)
    load_state(runtime.model, checkpoint.state)
    task = open_source(experiment.data).load("research-question")
    items = runtime.model.encode(
        task.test, (), experiment.data.instructions.get("research-question", "")
    )
    written = [runtime.model.write([item])[0] for item in items]
    expected = fmean(
        rouge_l(text, (example.target,)) for text, example in zip(written, task.test, strict=True)
    )
    found = read_results(finished).accuracy_matrix[-1][1]
    assert found == pytest.approx(expected, abs=1e-9)
    fresh = State(zero_adapter(runtime.shapes, 1), zero_adapter(runtime.shapes, 1))
    load_state(runtime.model, fresh)
    assert written != [runtime.model.write([item])[0] for item in items]


def test_predictions_are_those_of_the_evaluation(experiment, finished):
    predictor = load_predictor(find_adapter(finished))
    source, found = open_source(experiment.data), read_results(finished).accuracy_matrix[-1]
    labels = source.load("head-and-neck").test
    answers = [predictor.answer(e.text, "head-and-neck") for e in labels]
    right = [a.label == e.label for a, e in zip(answers, labels, strict=True)]
    assert fmean(right) == found[0]
    texts = source.load("research-question").test
    written = [predictor.answer(e.text, "research-question") for e in texts]
    shares = [rouge_l(w.answer, (e.target,)) for w, e in zip(written, texts, strict=True)]
    assert fmean(shares) == pytest.approx(found[1], abs=1e-9)
    line = json_line(Text("abc", None), written[0])
    assert set(json.loads(line)) == {"text", "task", "answer"}
    scores = count_labels(finished, lambda task: None).texts["research-question"]
    assert (scores.total, scores.rouge_l) == (len(texts), pytest.approx(found[1], abs=1e-9))
    with pytest.raises(UserError, match="name it with --task"):
        predictor.answer("abc")


def test_an_encoder_does_not_write(experiment):
    model = experiment.model.model_copy(update={"family": "encoder-labels"})
    with pytest.raises(UserError, match="answers of 'research-question' are texts"):
        check_names(experiment.model_copy(update={"model": model}))


def test_a_text_that_the_model_cannot_hold_is_refused(experiment):
    train = experiment.train.model_copy(update={"max_length": 2043})
    with pytest.raises(UserError, match="max_new_tokens = 6: the model reads 2048 tokens"):
        check_names(experiment.model_copy(update={"train": train}))
    fits = experiment.train.model_copy(update={"max_length": 2042})
    check_names(experiment.model_copy(update={"train": fits}))


@pytest.mark.parametrize("template", ["{instruction}", "{text} {text}", "{text} {options}"])
def test_a_template_has_one_place_for_the_text(experiment, template):
    model = experiment.model.model_copy(update={"template": template})
    with pytest.raises(UserError, match=r"model.template: needs \{text\} once"):
        check_names(experiment.model_copy(update={"model": model}))


def test_a_task_is_measured_as_its_experiment_says(experiment, tmp_path):
    """By words in any order: what it wrote, with its words reversed, is right by that alone."""
    data = experiment.data.model_copy(
        update={"measures": {"research-question": "rouge-1"}, "tasks": ("research-question",)}
    )
    run = experiment.model_copy(update={"data": data})
    run_inprocess(at(run, tmp_path), lambda event: None)
    results = read_results(tmp_path)
    assert results.measures == {"research-question": "rouge-1"}
    scores = count_labels(tmp_path, lambda task: None).texts["research-question"]
    assert results.accuracy_matrix[-1][0] == pytest.approx(scores.rouge_1, abs=1e-9)
    assert dict(measures(results))["ROUGE-1"] == "task 1 research-question"
    assert "(ROUGE-1)" in (tmp_path / "adapter" / "README.md").read_text()

    runtime = ClientRuntime(run)
    texts = [Example(text, "", target="x") for text in ("a b", "b c d", "d a", "c")]
    said = runtime.model.write(runtime.model.encode(texts, ()))
    turned = [
        Example(each.text, "", target=" ".join(reversed(words.split())))
        for each, words in zip(texts, said, strict=True)
    ]
    items = runtime.model.encode(turned, ())
    share = {
        name: count_correct(runtime.model, items, (), measure=each) / len(items)
        for name, each in TEXT_MEASURES.items()
    }
    assert any(len(set(words.split())) > 1 for words in said)
    assert share["rouge-1"] == 1
    assert share["exact-match"] < 1
    assert share["exact-match"] <= share["rouge-l"] < 1


def test_a_measure_of_texts_is_for_texts(experiment):
    data = experiment.data.model_copy(update={"measures": {"head-and-neck": "exact-match"}})
    with pytest.raises(UserError, match=r"data\.measures\.head-and-neck: its answers are labels"):
        check_names(experiment.model_copy(update={"data": data}))

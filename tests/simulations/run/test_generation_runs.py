"""Runs in which one task chooses a label and another writes a text, in both families that write."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest

from client.runtime import ClientRuntime
from deal_core.config.file import parse_experiment
from deal_core.data import Example, open_source
from deal_core.errors import UserError
from deal_core.inference.folder import find_adapter
from deal_core.inference.predictor import load_predictor
from deal_core.methods import resolve_auto
from deal_core.training.evaluation import count_correct
from deal_core.training.text_overlap import TEXT_MEASURES, rouge_l
from server.results import read_results
from simulations.engines.inprocess import run_inprocess
from simulations.report.accuracy import count_labels
from simulations.run.check import preflight
from simulations.run.model_checks import check_statistics
from simulations.run.summary import measures
from simulations.use.predict import PredictRequest, Text, line_of
from tests.architectures import CONFIGS, save
from tests.simulations.runs import accuracy_of, at, learnt_adapter
from tests.sizes import QUIET
from tests.slow import slow_but

PAGE = Path(__file__).parents[3] / "docs/generation.md"
TEXTS = ("a b", "c d", "a c", "b d", "a d", "b c", "a a", "d d")
CLASS_MEANS = ("method.prototype.enabled=on", "federation.clients=3", *QUIET)


def rows(task: str) -> list[dict[str, str]]:
    """Of one task a label, of the other a text of two words."""
    if task == "colours":
        return [{"text": text, "label": "red" if "a" in text else "green"} for text in TEXTS]
    return [{"text": text, "target": "red blue", "also": "blue"} for text in TEXTS]


@pytest.fixture(scope="module")
def experiment_of(make_experiment, tmp_path_factory):
    data, models = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("models")
    for task in ("colours", "words"):
        (data / task).mkdir()
        for split in ("train", "test"):
            lines = [json.dumps(row) for row in rows(task)]
            (data / task / f"{split}.jsonl").write_text("\n".join(lines))

    def make(name: str, *overrides: str):
        folder = models / name
        return make_experiment(
            f"model.family={CONFIGS[name][0]}",
            f'model.name="{folder if folder.exists() else save(folder, name)}"',
            "model.max_new_tokens=3",
            "data.source=files",
            f'data.path="{data}"',
            'data.tasks=["words", "colours"]',
            'data.generation=["words"]',
            'data.instructions={words="Answer with Text ."}',
            "data.references_column=also",
            'data.partition.kind="iid"',
            "federation.rounds=1",
            "adapter.rank=4",
            "train.precision=float32",
            "train.learning_rate=3e-2",
            "train.batch_size=4",
            *overrides,
        )

    return make


@pytest.fixture(scope="module")
def sums_of_all_records() -> Iterator[None]:
    """No record is held back, and class means are used whatever they are worth."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("client.runtime.HELD_BACK", 10**9)
        patch.setattr("server.strategy.found_worse", lambda *given: False)
        yield


@pytest.fixture(scope="module", params=slow_but(["llama", "t5"], "llama"))
def finished(request, experiment_of, tmp_path_factory, sums_of_all_records):
    """With class means beside words; nothing has labels when the first stage ends."""
    folder = tmp_path_factory.mktemp(request.param)
    experiment = at(experiment_of(request.param, *CLASS_MEANS), folder)
    run_inprocess(experiment, lambda event: None)
    return experiment, folder


def test_each_task_has_its_own_measure(finished):
    results = read_results(finished[1])
    assert results.measures == {"colours": "accuracy", "words": "rouge-l"}
    assert dict(measures(results))["average ROUGE-L"].endswith(" % (task 1)")
    assert results.class_incremental is None
    assert all(0 <= value <= 1 for row in results.accuracy_matrix for value in row)


def test_predictions_and_the_report_are_those_of_the_evaluation(finished):
    """Those of labels weigh class means and words as the evaluation does."""
    experiment, folder = finished
    predictor, found = load_predictor(find_adapter(folder)), read_results(folder).accuracy_matrix
    texts = open_source(experiment.data).load("words").test
    written = [predictor.answer(e.text, "words") for e in texts]
    shares = [
        rouge_l(w.answer, (e.target, *e.references)) for w, e in zip(written, texts, strict=True)
    ]
    assert fmean(shares) == pytest.approx(found[-1][0], abs=1e-9)
    assert accuracy_of(predictor, experiment, "colours") == found[-1][1]
    line = line_of(Text("abc", None), written[0], PredictRequest(str(folder)))
    assert set(json.loads(line)) == {"text", "task", "answer"}
    with pytest.raises(UserError, match="name it with --task"):
        predictor.answer("abc")
    counted = count_labels(folder, lambda task: None)
    scores, counts = counted.texts["words"], counted.tasks["colours"]
    assert scores["rouge-l"] == pytest.approx(found[-1][0], abs=1e-9)
    assert np.trace(counts.counts) / np.sum(counts.counts) == found[-1][1]


@pytest.mark.slow
def test_class_means_train_nothing(finished, experiment_of, tmp_path):
    """What is learnt is what the run without them learns."""
    experiment, folder = finished
    method = experiment.method
    off = method.prototype.model_copy(update={"enabled": "off"})
    without = method.model_copy(update={"prototype": off})
    run_inprocess(at(experiment.model_copy(update={"method": without}), tmp_path), lambda e: None)
    parts, more = learnt_adapter(tmp_path), learnt_adapter(folder)
    assert set(more) - set(parts) == {"colours"}
    assert all(np.array_equal(value, more[part]) for part, value in parts.items())
    alone, both = (load_predictor(find_adapter(each)) for each in (tmp_path, folder))
    told = [each.answer("a b", "colours").probability for each in (alone, both)]
    assert told[0] != pytest.approx(told[1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_answers_that_are_texts_are_learnt(experiment_of, tmp_path, name):
    order = 'data.tasks=["colours", "words"]'
    experiment = experiment_of(name, "federation.rounds=5", order)
    run_inprocess(at(experiment, tmp_path / "run"), lambda event: None)
    results = read_results(tmp_path / "run")
    found = np.array(results.accuracy_matrix)
    assert found[1, 1] > results.zero_shot["words"] + 0.2
    assert found[0, 0] >= results.zero_shot["colours"]


@pytest.mark.parametrize("name", slow_but(["llama", "t5"], "t5"))
def test_and_records_are_protected(experiment_of, tmp_path, name):
    private = experiment_of(name, "privacy.mechanism=record")
    run_inprocess(at(private, tmp_path), lambda event: None)
    results = read_results(tmp_path)
    assert np.isfinite(np.array(results.accuracy_matrix)).all()
    assert len(results.privacy.epsilon) == 2
    assert all(0 < epsilon <= 8.0 for epsilon in results.privacy.epsilon.values())


def test_a_text_is_measured_as_its_experiment_says(experiment_of):
    """By words in any order: what it wrote, with its words reversed, is right by that alone."""
    runtime = ClientRuntime(experiment_of("llama"))
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


def test_class_means_of_labels_and_texts_at_once_are_refused_or_left_out(experiment_of):
    joint = ("federation.clients=3", "stream.schedule=joint")
    with pytest.raises(UserError, match="answers of 'words' are texts"):
        check_statistics(experiment_of("llama", *joint, "method.name=prototype"))
    auto = ("method.prototype.enabled=auto", "federation.clients=3")
    found = [resolve_auto(experiment_of("llama", *each)) for each in (auto, (*auto, joint[1]))]
    assert [each.prototype.enabled for each in found] == ["on", "off"]

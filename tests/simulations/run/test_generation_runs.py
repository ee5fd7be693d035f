"""Runs in which one task chooses a label and another writes a text, in both families that write;
and in which each task keeps an adapter of its own, and a router chooses among them."""

import json
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch

from client.runtime import ClientRuntime
from deal_core.config.file import parse_experiment
from deal_core.data import Example, open_source
from deal_core.errors import UserError
from deal_core.inference.folder import find_adapter
from deal_core.inference.predictor import load_predictor, read_temperatures
from deal_core.lora.state import Component
from deal_core.methods import resolve_auto
from deal_core.models import adapter_shapes
from deal_core.training.evaluation import count_correct
from deal_core.training.text_overlap import TEXT_MEASURES, rouge_l
from server.results import read_results
from server.run import load_checkpoint
from simulations.report.labels import count_labels
from simulations.run.check import preflight
from simulations.run.model_checks import check_components, check_statistics
from simulations.run.summary import measures
from simulations.use.export import export
from simulations.use.predict import PredictRequest, Text, line_of, predict
from tests.architectures import CONFIGS, save
from tests.simulations.runs import accuracy_of, learnt_adapter, simulated, write_tasks
from tests.sizes import QUIET
from tests.slow import slow_but

PAGE = Path(__file__).parents[3] / "docs/generation.md"
TEXTS = ("a b", "c d", "a c", "b d", "a d", "b c", "a a", "d d")
CLASS_MEANS = ("method.prototype.enabled=on", "federation.clients=3", *QUIET)


ROWS = {
    "words": [{"text": text, "target": "red blue", "also": "blue"} for text in TEXTS],
    "colours": [{"text": text, "label": "red" if "a" in text else "green"} for text in TEXTS],
}
"""Of one task a label, of the other a text of two words."""


@pytest.fixture(scope="module")
def experiment_of(make_experiment, tmp_path_factory):
    models = tmp_path_factory.mktemp("models")
    data = write_tasks(tmp_path_factory.mktemp("data"), ROWS)

    def make(name, *overrides):
        folder = models / name
        return make_experiment(
            f"model.family={CONFIGS[name][0]}",
            f'model.name="{folder if folder.exists() else save(folder, name)}"',
            "model.max_new_tokens=3",
            *data,
            'data.generation=["words"]',
            'data.instructions={words="Answer with Text ."}',
            "data.files.words.references_column=also",
            'data.partition.kind="iid"',
            "federation.rounds=1",
            "adapter.rank=4",
            "train.precision=float32",
            "train.learning_rate=3e-2",
            "train.batch_size=4",
            *overrides,
        )

    return make


@pytest.fixture(scope="module", params=slow_but(["llama", "t5"], "llama"))
def finished(request, experiment_of, tmp_path_factory, sums_of_all_records):
    """With class means beside words; nothing has labels when the first stage ends."""
    experiment = experiment_of(request.param, *CLASS_MEANS)
    return experiment, simulated(experiment, tmp_path_factory.mktemp(request.param))


def test_each_task_has_its_own_measure(finished):
    results = read_results(finished[1])
    assert results.measures == {"colours": "accuracy", "words": "rouge-l"}
    assert dict(measures(results))["average ROUGE-L"].endswith(" % (task 1)")
    assert results.class_incremental is None
    assert all(0 <= value <= 1 for row in results.accuracy_matrix for value in row)


def overlap(answers, texts):
    """Mean ROUGE-L of what was answered with what is right."""
    said = [getattr(each, "label", None) or each.answer for each in answers]
    return fmean(rouge_l(s, (e.target, *e.references)) for s, e in zip(said, texts, strict=True))


def test_predictions_and_the_report_are_those_of_the_evaluation(finished):
    """Those of labels weigh class means and words as the evaluation does."""
    experiment, folder = finished
    predictor, found = load_predictor(find_adapter(folder)), read_results(folder).accuracy_matrix
    texts = open_source(experiment.data).load("words").test
    written = [predictor.answer(e.text, "words") for e in texts]
    assert overlap(written, texts) == pytest.approx(found[-1][0], abs=1e-9)
    assert accuracy_of(predictor, experiment, "colours") == found[-1][1]
    line = line_of(Text("abc", None), written[0], PredictRequest(str(folder)))
    assert set(json.loads(line)) == {"text", "task", "answer"}
    with pytest.raises(UserError, match="name it with --task"):
        predictor.answer("abc")
    counted = count_labels(folder, lambda task, far: None)
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
    simulated(experiment.model_copy(update={"method": without}), tmp_path)
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
    simulated(experiment, tmp_path / "run")
    results = read_results(tmp_path / "run")
    found = np.array(results.accuracy_matrix)
    assert found[1, 1] > results.zero_shot["words"] + 0.2
    assert found[0, 0] >= results.zero_shot["colours"]


@pytest.mark.parametrize("name", slow_but(["llama", "t5"], "t5"))
def test_and_records_are_protected(experiment_of, tmp_path, name):
    private = experiment_of(name, "privacy.mechanism=record")
    simulated(private, tmp_path)
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


def test_the_experiment_of_the_page_on_generation_is_in_order(make_causal, tmp_path):
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


APART = ("method.retention.apart=true", *CLASS_MEANS)
"""An adapter for each task, and a router among them."""


@pytest.fixture(scope="module")
def routed(experiment_of, tmp_path_factory):
    experiment = experiment_of("llama", *APART)
    return experiment, simulated(experiment, tmp_path_factory.mktemp("routed"))


def test_what_a_task_taught_stays_as_it_was(routed):
    """With the task named nothing changes after its stage."""
    results = read_results(routed[1])
    assert results.accuracy_matrix[1][0] == results.accuracy_matrix[0][0]
    assert results.forgetting == 0.0


def test_a_routed_prediction_is_that_of_the_evaluation(routed):
    experiment, folder = routed
    predictor, results = load_predictor(find_adapter(folder)), read_results(folder)
    texts = open_source(experiment.data).load("words").test
    told = [predictor.answer(each.text, "words") for each in texts]
    assert overlap(told, texts) == pytest.approx(results.accuracy_matrix[-1][0], abs=1e-9)
    assert accuracy_of(predictor, experiment, "colours") == results.accuracy_matrix[-1][1]
    # Both tasks have the same texts: the router takes each for one of them, and says which.
    untold = [predictor.answer(each.text) for each in texts]
    assert {each.task for each in untold} <= {"words", "colours"}
    found = results.class_incremental.accuracy_matrix[-1][0]
    assert overlap(untold, texts) == pytest.approx(found, abs=1e-9)


def test_labels_of_a_routed_run_are_calibrated_together(experiment_of, tmp_path, monkeypatch):
    """Though the tasks have unlike many labels."""
    monkeypatch.setattr("simulations.use.predict.FEW_ROWS", 4)
    labels = {"colours": ("red", "green"), "words": ("Text", "Answer", "with")}
    rows = {
        task: [{"text": t, "label": names[i % len(names)]} for i, t in enumerate(TEXTS)]
        for task, names in labels.items()
    }
    data = (*write_tasks(tmp_path / "data", rows), "data.generation=[]", "data.instructions={}")
    folder = simulated(experiment_of("llama", *APART, *data), tmp_path / "run")
    counted, results = count_labels(folder, lambda task, far: None), read_results(folder)
    for task, accuracy in zip(results.tasks, results.accuracy_matrix[-1], strict=True):
        own = counted.tasks[task]
        assert np.trace(own.counts) / np.sum(own.counts) == accuracy
    adapter = find_adapter(folder)
    assert read_temperatures(adapter).keys() == {*labels, ""}
    adapter.calibration.unlink()
    both = tmp_path / "both.jsonl"
    both.write_text("\n".join(json.dumps(row) for own in rows.values() for row in own))
    asked = PredictRequest(str(folder), file=str(both), label_column="label")
    assert "of 16 rows); calibration error" in predict(asked, print).line
    assert "before" in predict(replace(asked, calibrate=True), print).line
    assert read_temperatures(adapter).keys() == {""}


def test_a_checkpoint_keeps_components(routed):
    experiment, folder = routed
    shapes = adapter_shapes(experiment.model, experiment.adapter)
    state = load_checkpoint(folder / "checkpoint.safetensors", shapes).state
    assert state.components == (Component(("words",), 4), Component(("colours",), 4))
    assert state.retained.rank == 8
    assert state.heads.keys() == {"words", "colours"}
    assert state.heads["words"].shape[0] == 1


def test_clients_with_orders_of_their_own_keep_components_too(experiment_of, tmp_path):
    """A task is over, and has its router, when all have learnt it; nothing is asked of a component
    that another task could change."""
    orders = ("stream.schedule=per-client", 'stream.orders.0=["colours", "words"]')
    orders = (*orders, *(f'stream.orders.{n}=["words", "colours"]' for n in ("1", "2")))
    experiment = experiment_of("llama", *APART, *orders)
    simulated(experiment, tmp_path)
    results = read_results(tmp_path)
    assert [list(stage.work) for stage in results.stages] == [
        ["colours"], ["words"], ["words"], ["colours"],
    ]  # fmt: skip
    told = results.accuracy_matrix
    assert told[1][1] == told[0][1]
    assert told[2] == [told[2][0], told[1][1]]
    assert told[3][0] == told[2][0]
    shapes = adapter_shapes(experiment.model, experiment.adapter)
    state = load_checkpoint(tmp_path / "checkpoint.safetensors", shapes).state
    assert {each.tasks for each in state.components} == {("words",), ("colours",)}
    assert state.heads.keys() == {"words", "colours"}
    assert results.class_incremental is not None


def test_peft_answers_with_a_component_as_the_run_does(routed, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    experiment, folder = routed
    export(str(folder), str(tmp_path / "out"))
    predictor = load_predictor(find_adapter(folder))
    predictor.answer("a b", "colours")  # its component is in the model
    base = AutoModelForCausalLM.from_pretrained(experiment.model.name, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, str(tmp_path / "out" / "component-2"))
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        theirs = model(input_ids=ids).logits
        hidden = predictor.model.module.get_base_model().model  # ours reads rows of a forest
    delta = predictor.state.view(1).retained
    layer, factors = next(iter(delta.layers.items()))
    weight = dict(hidden.named_modules())[layer.removeprefix("model.")].base_layer.weight
    plain = AutoModelForCausalLM.from_pretrained(experiment.model.name, dtype=torch.float32)
    before = dict(plain.named_modules())[layer].weight
    assert torch.allclose(weight, before + factors.B @ factors.A, atol=1e-6)
    with torch.no_grad():
        assert not torch.allclose(theirs, plain(input_ids=ids).logits)


def test_the_lines_of_the_card_load_a_component_as_a_pipeline(routed, tmp_path, monkeypatch):
    folder, out = routed[1], tmp_path / "out"
    export(str(folder), str(out))
    card = (out / "README.md").read_text(encoding="utf-8")
    code, said = card.partition("```python\n")[2].partition("```")[0], []
    monkeypatch.chdir(out)
    exec(code.replace("a text", "a b"), {"print": said.append})
    written = load_predictor(find_adapter(folder)).answer("a b", "words").answer
    assert said[0][0]["generated_text"].strip() == written


@pytest.mark.parametrize(
    "overrides",
    [
        ("method.name=lwf",),
        ("stream.schedule=joint", "data.generation=[]"),
        ("method.retention.filter=none",),
    ],
)
def test_what_does_not_go_with_components_is_refused(experiment_of, overrides):
    with pytest.raises(UserError, match=r"retention\.apart"):
        check_components(experiment_of("llama", *APART, *overrides))

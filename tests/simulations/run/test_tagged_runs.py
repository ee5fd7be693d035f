"""Runs whose tasks have tags for words: what is measured, what leaves, what is refused."""

import json
import random
import re

import numpy as np
import pytest

from deal_core.data import load_for_clients
from deal_core.data.partition import partition
from deal_core.data.tags import entities, entity_f1
from deal_core.errors import UserError
from deal_core.inference.folder import find_adapter
from deal_core.inference.predictor import load_predictor
from deal_core.methods import METHODS
from deal_core.training.evaluation import tagged
from server.results import read_results
from simulations.report.labels import count_labels
from simulations.run.check import run_checks
from simulations.run.summary import measures
from simulations.use.export import export
from simulations.use.predict import PredictRequest, predict
from tests.simulations.runs import simulated, write_tasks
from tests.sizes import TINY_MODEL

pytestmark = pytest.mark.usefixtures("one_model")

LABELS = {"people": ("person",), "numbers": ("date", "record")}
WORDS = ("seen", "on", "ward", "the", "and", "was", "well")
LEARNS = ("data.max_train=0", "federation.local_epochs=8", "train.learning_rate=2e-2")
VALUES = {"person": ("ann lee", "ben", "zoe"), "date": ("3 may", "12 may"), "record": ("77x88",)}


def rows(task, count, seed):
    """Words, some of them in an entity of the task."""
    draw, made = random.Random(f"{task} {seed}"), []
    for _ in range(count):
        words, tags = list[str](), list[str]()
        for _ in range(draw.randint(1, 3)):
            words.append(draw.choice(WORDS))
            tags.append("O")
            label = draw.choice((*LABELS[task], ""))
            for place, word in enumerate(draw.choice(VALUES[label]).split() if label else ()):
                words.append(word)
                tags.append(f"{'I' if place else 'B'}-{label}")
        made.append({"tokens": words, "tags": tags})
    return made


@pytest.fixture(scope="module")
def experiment_of(make_experiment, tmp_path_factory):
    sizes = {"train": 40, "test": 20}
    made = {task: {s: rows(task, count, s) for s, count in sizes.items()} for task in LABELS}
    data = write_tasks(tmp_path_factory.mktemp("data"), made)

    def make(*overrides):
        return make_experiment(
            "model.family=token-labels",
            *TINY_MODEL,
            *data,
            'data.measures={people="entity-f1", numbers="entity-f1"}',
            "method.prototype.enabled=auto",
            "federation.rounds=1",
            "train.precision=float32",
            "train.max_length=32",
            *overrides,
        )

    return make


@pytest.fixture(scope="module")
def finished(experiment_of, tmp_path_factory):
    experiment = experiment_of(*LEARNS, "federation.clients=3")
    return experiment, simulated(experiment, tmp_path_factory.mktemp("tagged"))


def shares(experiment, task):
    data, clients = load_for_clients(experiment, task), experiment.federation.clients
    return partition(data, experiment.data.partition, clients, experiment.run.seed)


def test_each_clients_f1_is_measured_and_theirs_is_the_mean_by_entities(finished):
    experiment, folder = finished
    results = read_results(folder)
    assert results.measures == dict.fromkeys(LABELS, "entity-f1")
    assert results.class_incremental is None
    assert dict(measures(results))["average entity F1"].endswith(" %")
    model = load_predictor(find_adapter(folder)).model
    for place, task in enumerate(LABELS):
        found, counts = [], []
        for number, share in enumerate(shares(experiment, task)):
            ours = tagged(model, model.encode(share.test, share.labels), share.labels)
            found.append(entity_f1(zip(ours, (e.tags for e in share.test), strict=True)))
            counts.append(sum(len(entities(e.tags)) for e in share.test))
            own = results.per_client[str(number)]
            assert own.accuracy_matrix[-1][place] == pytest.approx(found[-1], abs=1e-9)
            assert own.test_examples[place] == counts[-1]
        mean = np.average(found, weights=counts)
        assert results.accuracy_matrix[-1][place] == pytest.approx(mean, abs=1e-9)
    assert results.accuracy_matrix[-1][-1] > results.zero_shot["numbers"]


def test_what_was_learnt_marks_texts(finished, tmp_path):
    experiment, folder = finished
    predictor = load_predictor(find_adapter(folder))
    example = next(e for e in load_for_clients(experiment, "numbers").test if entities(e.tags))
    (written,) = predictor.answers([example.text], "numbers")
    assert re.sub(r"\[([^]]*)\]\(\w+\)", r"\1", written.answer) == example.text
    lines = []
    predict(PredictRequest(str(folder), (example.text,), task="numbers"), lines.append)
    assert json.loads(lines[0])["answer"] == written.answer
    with pytest.raises(UserError, match="name it with --task"):
        predictor.answer("ann was well")
    with pytest.raises(UserError, match="leave out --labels"):
        count_labels(folder, lambda task, far: None)
    with pytest.raises(UserError, match="deal predict"):
        export(str(folder), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_records_are_protected_and_counts_hidden_in_a_sum(experiment_of, tmp_path):
    """The masked sum of F1 by entities is what three clients would have told in the clear."""
    private = (
        "privacy.mechanism=record",
        "privacy.target_delta=1e-3",
        "federation.clients=3",
        'data.tasks=["numbers"]',
    )
    hidden = "aggregation.secure=true", "privacy.metrics=summed"
    told, found = (
        read_results(simulated(experiment_of(*private, *more), tmp_path / f"{len(more)}"))
        for more in ((), hidden)
    )
    assert len(found.privacy.epsilon) == 3
    assert all(0 < epsilon <= 8 for epsilon in found.privacy.epsilon.values())
    assert not found.per_client
    assert found.zero_shot == pytest.approx(told.zero_shot, abs=1e-6)


SUMS = "method.prototype.enabled=on", "method.name=prototype", "method.name=ewc"
REFUSED = {
    'data.measures={people="entity-f1"}': "see numbers",
    "model.family=encoder-labels": "does not tag words",
    **dict.fromkeys(
        (*SUMS, "stream.schedule=joint-all-labels", "adapter.kind=pooled"), "leave out class sums"
    ),
}


@pytest.mark.parametrize("override", REFUSED)
def test_what_reads_whole_texts_is_refused_in_a_line(experiment_of, override):
    asked = experiment_of("federation.clients=3", override)
    errors = [found.text for found in run_checks(asked) if found.kind == "error"]
    assert any(REFUSED[override] in error and "\n" not in error for error in errors)


def test_the_check_says_what_is_off(experiment_of):
    found = [each for each in run_checks(experiment_of()) if each.kind != "error"]
    assert all("in training too" in each.text for each in found if each.kind == "warning")
    assert any(each.text.startswith("class means and Class-IL accuracy are off") for each in found)


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted({*METHODS} - {"ewc", "prototype", "linear-probe"}))
def test_every_other_method_takes_such_tasks(experiment_of, tmp_path, method):
    results = read_results(simulated(experiment_of(*LEARNS, f"method.name={method}"), tmp_path))
    assert all(0 <= value <= 1 for row in results.accuracy_matrix for value in row)
    assert results.accuracy_matrix[-1] != [*results.zero_shot.values()]

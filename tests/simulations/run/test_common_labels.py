"""Two tasks that have a label in common, through the real apps: one class."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from deal_core.config.experiment import Experiment
from deal_core.data import open_source
from deal_core.training.evaluation import base_embeddings
from server.results import read_results
from tests.conftest import load_once
from tests.simulations.runs import learnt_adapter, simulated

pytestmark = pytest.mark.usefixtures("one_model")

TEXTS = {
    "ward": {
        "blood": ["a blood count", "anaemia", "low platelets", "clotting factor", "haemoglobin"],
        "other": ["the bed is broken", "visiting hours", "a lost key", "lunch", "a noisy room"],
        "heart": ["chest pain", "a fast pulse", "heart failure", "a murmur", "an infarct"],
    },
    "clinic": {
        "lung": ["a cough", "asthma attack", "short of breath", "pneumonia", "an inhaler"],
        "other": ["the bill", "a new appointment", "parking", "heart of the town", "blood moon"],
        "skin": ["an itching rash", "eczema", "a mole", "acne", "sunburn"],
    },
}
"""Task to label to texts. ``other`` is in both, and of something else; some of the second task's
sound like labels of the first."""
ASKED = {
    "ward": {
        "blood": ["blood loss", "a blood bill"],
        "other": ["a bill for the room", "parking at night", "heart-shaped balloons"],
        "heart": ["pain in the chest", "pulse"],
    },
    "clinic": {
        "lung": ["breathing is hard", "coughing"],
        "other": ["visiting", "lunch with a friend", "a lost key", "the noise of a broken heart"],
        "skin": ["a red rash", "itching"],
    },
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data")
    for split, texts in (("train", TEXTS), ("test", ASKED)):
        for task, labels in texts.items():
            (path / task).mkdir(exist_ok=True)
            rows = [{"text": t, "label": label} for label, own in labels.items() for t in own]
            (path / task / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return path


Heads = dict[str, NDArray[np.float32]]


class ByHand:
    """Answers to the texts of a task, from its head, or else from the names of labels."""

    def __init__(self, experiment: Experiment, task: str) -> None:
        self.model = load_once()(experiment.model, experiment.adapter, experiment.train.max_length)
        source = open_source(experiment.data)
        self.task, self.data = task, {name: source.load(name) for name in experiment.data.tasks}
        own = self.data[task]
        self.right = [example.label for example in own.test]
        self.encoded = self.model.encode(own.test, own.labels)
        layers = experiment.method.prototype.layers
        self.x = base_embeddings(self.model, self.encoded, layers).double().numpy()

    def answers(self, heads: Heads, among: list[str]) -> list[tuple[str, str]]:
        """Task and label of the best score of each text, among the labels of these tasks."""
        columns = [(task, label) for task in among for label in self.data[task].labels]
        found = [self._by_head(heads[t]) if self.task in heads else self._by_name(t) for t in among]
        return [columns[place] for place in np.hstack(found).argmax(1)]

    def _by_head(self, head: NDArray[np.float32]) -> NDArray[np.float64]:
        return self.x @ head[:, :-1].T.astype(np.float64) + head[:, -1]

    def _by_name(self, task: str) -> NDArray[np.float64]:
        with torch.no_grad():
            return self.model.scores(self.encoded, self.data[task].labels).double().numpy()


def test_both_matrices_are_those_of_the_answers(make_experiment, folder, tmp_path):
    """After the first task its own head answers, and the names of labels in the second."""
    experiment = make_experiment(
        'data.source="files"',
        f'data.path="{folder}"',
        f"data.tasks={json.dumps([*TEXTS])}",
        "method.name=prototype",
        "method.prototype.directions=0",
        "method.prototype.noise_multiplier=0",
        "federation.clients=3",
        "federation.rounds=1",
        "train.precision=float32",
    )
    simulated(experiment, tmp_path)
    results, learnt = read_results(tmp_path), learnt_adapter(tmp_path)
    assert results.class_incremental is not None
    for j, task in enumerate(TEXTS):
        hand = ByHand(experiment, task)
        for stage, known in enumerate((["ward"], ["ward", "clinic"])):
            heads = {name: learnt[name] for name in known}
            told = [label for _, label in hand.answers(heads, [task])]
            assert results.accuracy_matrix[stage][j] == share(told, hand.right)
            among = [name for name in TEXTS if name in heads or name == task]
            best = hand.answers(heads, among)
            found = results.class_incremental.accuracy_matrix[stage][j]
            assert found == share([label for _, label in best], hand.right)


def share(answers: list, right: list) -> float:
    return sum(a == b for a, b in zip(answers, right, strict=True)) / len(right)

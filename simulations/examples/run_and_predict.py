"""Run an experiment, look at its results, and label new texts with what was learnt."""

import tempfile
from pathlib import Path

from simulations.api import Answer, load_run, run

SMALL = {
    "data.tasks": ["laboratory", "surgery"],
    "data.max_train": 120,
    "data.max_test": 60,
    "federation.clients": 2,
    "federation.rounds": 1,
    "train.max_length": 48,
}

with tempfile.TemporaryDirectory() as folder:
    results = run("quickstart", SMALL, out=Path(folder) / "run", seed=1).results
    print(f"average accuracy {results.average_accuracy:.3f}")
    for task, row in zip(results.tasks, results.accuracy_matrix, strict=True):
        print(f"after {task}: " + ", ".join(f"{value:.3f}" for value in row))

    learnt = load_run(Path(folder) / "run")
    for answer in learnt.predict(["Which drug reverses heparin?", "Image of a broken bone"]):
        assert isinstance(answer, Answer)  # a model that answers in words may give a Written
        print(f"{answer.task}: {answer.label} ({answer.probability:.2f})")

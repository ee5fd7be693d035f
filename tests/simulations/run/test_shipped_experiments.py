"""Shipped experiments: the orders of public benchmarks, and what the README promises of the
quickstart, on the real thing."""

import json
import shlex
import subprocess
import sys

import pytest

from deal_core.config.file import apply_overrides, parse_experiment, read_toml
from server.results import read_results
from simulations.importing import INSTRUCTIONS, TRACE_ORDER
from simulations.output import shipped_experiments
from simulations.run.data_checks import check_data
from simulations.run.experiment import Request, load_experiment
from simulations.run.model_checks import check_names
from tests.simulations.runs import gain

APPENDIX = {
    1: "dbpedia → amazon → yahoo → ag",
    2: "dbpedia → amazon → ag → yahoo",
    3: "yahoo → amazon → ag → dbpedia",
    4: "mnli → cb → wic → copa → qqp → boolqa → rte → imdb → yelp → amazon → sst-2 → dbpedia → ag"
    " → multirc → yahoo",
    5: "multirc → boolqa → wic → mnli → cb → copa → qqp → rte → imdb → sst-2 → dbpedia → ag → yelp"
    " → amazon → yahoo",
    6: "yelp → amazon → mnli → cb → copa → qqp → rte → imdb → sst-2 → dbpedia → ag → yahoo → "
    "multirc → boolqa → wic",
}
"""As printed there."""


@pytest.mark.parametrize("number", APPENDIX)
def test_the_orders_are_those_of_the_appendix_of_olora(number):
    """The first of three is in the experiment, the others are in its comments."""
    first = shipped_experiments()[f"cl-order{1 if number < 4 else 4}"]
    tasks = parse_experiment(read_toml(first), first.name).data.tasks
    for line in first.read_text().splitlines():
        if line.startswith(f"# order {number}: --set "):
            (override,) = shlex.split(line.partition("--set ")[2])
            tasks = parse_experiment(apply_overrides({}, [override]), "comment").data.tasks
    spelt = {"ag": "ag_news", "sst-2": "sst2", "boolqa": "boolq"}
    names = APPENDIX[number].split(" → ")
    assert tasks == tuple(spelt.get(name, name) for name in names)


@pytest.mark.parametrize("name", ["cl-order1", "cl-order4", "trace"])
def test_a_shipped_order_is_sound_once_its_data_are_there(name, make_causal, tmp_path):
    experiment = parse_experiment(read_toml(shipped_experiments()[name]), name)
    for task in experiment.data.tasks:
        column = "target" if task in experiment.data.generation else "label"
        rows = [json.dumps({"text": f"{label} {n}", column: label}) for label in "ab" for n in "12"]
        for split in ("train", "test"):
            (tmp_path / task).mkdir(exist_ok=True)
            (tmp_path / task / f"{split}.jsonl").write_text("\n".join(rows))
    model = make_causal(tmp_path / "model", "llama")
    overrides = (f"data.path={tmp_path}", "federation.clients=1", f"model.name={model}")
    loaded = load_experiment(Request(name, str(tmp_path / "run"), overrides))
    check_names(loaded)
    assert list(check_data(loaded)) == []
    assert set(experiment.data.instructions) == set(experiment.data.tasks)
    if name == "trace":
        assert experiment.data.tasks == TRACE_ORDER
    else:
        assert set(experiment.data.instructions.values()) <= set(INSTRUCTIONS.values())


def learnt(name, folder, *settings):
    """What a shipped experiment reaches, as the command runs it."""
    arguments = [part for setting in settings for part in ("--set", setting)]
    command = [sys.executable, "-m", "simulations.cli", "simulate", name, "--out", str(folder)]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "forgotten" in done.stdout
    return read_results(folder)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_quickstart_learns_and_hardly_forgets(tmp_path):
    results = learnt("quickstart", tmp_path / "run")
    assert gain(results) >= 0.05
    assert results.forgetting <= 0.03


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_method_beats_sequential_training_on_the_same_budget(tmp_path):
    deal, sequential = (
        learnt("quickstart", tmp_path / method, f"method.name={method}", "data.max_train=400")
        for method in ("deal", "sequential")
    )
    assert deal.average_accuracy > sequential.average_accuracy
    assert deal.forgetting < sequential.forgetting


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_language_model_learns_four_tasks_that_write_and_forgets_none(tmp_path):
    results = learnt("quickstart-llm", tmp_path / "run")
    assert gain(results) >= 0.25
    assert results.backward_transfer == 0.0
    assert sorted(results.measures.values()) == ["exact-match", "rouge-l", "rouge-l", "rouge-l"]
    assert results.class_incremental is not None
    assert results.class_incremental.average_accuracy > results.average_accuracy - 0.05


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_names_are_found_in_texts_and_hardly_forgotten(tmp_path):
    results = learnt("names", tmp_path / "run")
    assert set(results.measures.values()) == {"entity-f1"}
    assert min(results.accuracy_matrix[-1]) > 0.85
    assert results.forgetting < 0.05

"""The shipped orders of public benchmarks, and the settings of published results."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from deal_core.config.experiment import Experiment
from deal_core.config.file import apply_overrides, parse_experiment, read_toml
from deal_core.models.prompt import read_template
from simulations.importing.benchmark import INSTRUCTIONS, TRACE_ORDER
from simulations.importing.command import ImportRequest, import_benchmark
from simulations.run.data_checks import check_data
from simulations.run.experiment import Request, load_experiment
from simulations.run.preflight import check_names
from simulations.run.shipped import shipped_experiments
from simulations.run.simulate import simulate

ORDERS = ["cl-order1", "cl-order4"]
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
PUBLISHED = Path(__file__).parents[3] / "simulations/experiments/published"


def shipped(name: str) -> Experiment:
    return parse_experiment(read_toml(shipped_experiments()[name]), name)


@pytest.mark.parametrize("number", APPENDIX)
def test_the_orders_are_those_of_the_appendix_of_olora(number: int) -> None:
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


SLOW = (pytest.param(name, True, marks=pytest.mark.slow) for name in [*ORDERS, "trace"])
"""With their own model, whose file takes seconds to read, and the same of other tasks; their data
and settings are read in the tests above."""


@pytest.mark.parametrize(("name", "own_model"), [(ORDERS[0], False), *SLOW])
def test_a_shipped_order_runs_once_its_data_are_there(
    name: str, own_model: bool, make_causal: Callable[[Path, str], Path], tmp_path: Path
) -> None:
    experiment = shipped(name)
    for task in experiment.data.tasks:
        column = "target" if task in experiment.data.generation else "label"
        rows = [json.dumps({"text": f"{label} {n}", column: label}) for label in "ab" for n in "12"]
        for split in ("train", "test"):
            (tmp_path / task).mkdir(exist_ok=True)
            (tmp_path / task / f"{split}.jsonl").write_text("\n".join(rows))
    overrides = (f"data.path={tmp_path}", "federation.clients=1")
    if not own_model:
        overrides += (f"model.name={make_causal(tmp_path / 'model', 'llama')}",)
    loaded = load_experiment(Request(name, str(tmp_path / "run"), overrides))
    check_names(loaded)
    check_data(loaded)
    read_template(experiment.model.template)
    assert set(experiment.data.instructions) == set(experiment.data.tasks)
    if name != "trace":
        assert set(experiment.data.instructions.values()) <= set(INSTRUCTIONS.values())
    else:
        assert experiment.data.tasks == TRACE_ORDER


def test_what_was_imported_runs(make_causal: Callable[[Path, str], Path], tmp_path: Path) -> None:
    """A task with labels and one with texts, from TRACE's shape to results."""
    folder, out = tmp_path / "trace", tmp_path / "tasks"
    stance = [{"prompt": f"Which one ?\nText {n}", "answer": n} for n in "abab"]
    text = [{"prompt": f"Text {n} red {n}", "answer": f"blue {n} green"} for n in "abcd"]
    for task, rows in {"FOMC": stance, "MeetingBank": text}.items():
        for split in ("train", "test"):
            (folder / task).mkdir(parents=True, exist_ok=True)
            (folder / task / f"{split}.json").write_text(json.dumps(rows))
    console = Console(record=True, width=160)
    path = import_benchmark(ImportRequest(folder, out, "trace"), console)
    overrides = (
        f"model.name={make_causal(tmp_path / 'model', 'llama')}",
        "model.max_new_tokens=4",
        "adapter.first_layer=1",
        "federation.clients=1",
        "federation.rounds=1",
        "train.max_length=16",
        "run.threads=1",
        "run.workers=1",
    )
    request = Request(str(path), str(tmp_path / "run"), overrides)
    assert simulate(request, console) == 0
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert list(results["zero_shot"]) == ["FOMC", "MeetingBank"]


@pytest.mark.parametrize("path", sorted(PUBLISHED.glob("*.toml")), ids=lambda path: path.stem)
def test_published_settings_say_first_that_nobody_ran_them(path: Path) -> None:
    assert path.read_text().startswith("# NOT RUN HERE")
    experiment = parse_experiment(read_toml(path), path.name)
    assert "not run here" in experiment.description
    assert experiment.data.tasks == shipped("cl-order1").data.tasks
    assert path.stem not in shipped_experiments()

"""The shipped orders of public benchmarks."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from deal_core.config.file import apply_overrides, parse_experiment, read_toml
from simulations.importing import INSTRUCTIONS, TRACE_ORDER
from simulations.output import shipped_experiments
from simulations.run.data_checks import check_data
from simulations.run.experiment import Request, load_experiment
from simulations.run.model_checks import check_names

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


@pytest.mark.parametrize("name", ["cl-order1", "cl-order4", "trace"])
def test_a_shipped_order_is_sound_once_its_data_are_there(
    name: str, make_causal: Callable[[Path, str], Path], tmp_path: Path
) -> None:
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

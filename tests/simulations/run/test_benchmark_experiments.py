"""The shipped orders of public benchmarks, and the settings of published results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deal_core.config.experiment import Experiment
from deal_core.config.file import parse_experiment, read_toml
from deal_core.models.prompt import read_template
from simulations.importing.benchmark import INSTRUCTIONS, TRACE_ORDER
from simulations.run.experiment import Request, load_experiment
from simulations.run.preflight import check_data, check_names
from simulations.run.shipped import shipped_experiments

ORDERS = [f"cl-order{number}" for number in range(1, 7)]
PUBLISHED = Path(__file__).parents[3] / "simulations/experiments/published"


def shipped(name: str) -> Experiment:
    return parse_experiment(read_toml(shipped_experiments()[name]), name)


def test_the_orders_are_permutations_of_four_and_of_fifteen_tasks() -> None:
    tasks = [shipped(name).data.tasks for name in ORDERS]
    assert [len(each) for each in tasks] == [4, 4, 4, 15, 15, 15]
    for group in (tasks[:3], tasks[3:]):
        assert len({frozenset(each) for each in group}) == 1
        assert len(set(group)) == 3
    assert set(tasks[0]) < set(tasks[3])


def test_the_last_order_is_that_of_the_manifest_at_hand() -> None:
    path = Path("/work/shared/data/manifest.json")
    if not path.is_file():
        pytest.skip("the data for development are not here")
    orders = json.loads(path.read_text())["orders"]
    assert list(shipped("cl-order6").data.tasks) == orders["cl15"]
    for number in (1, 2, 3):
        tasks = list(shipped(f"cl-order{number}").data.tasks)
        assert tasks == orders[f"standard-cl-order{number}"]


@pytest.mark.parametrize("name", [*ORDERS, "trace"])
def test_a_shipped_order_runs_once_its_data_are_there(name: str, tmp_path: Path) -> None:
    experiment = shipped(name)
    for task in experiment.data.tasks:
        column = "target" if task in experiment.data.generation else "label"
        rows = [json.dumps({"text": f"{label} {n}", column: label}) for label in "ab" for n in "12"]
        for split in ("train", "test"):
            (tmp_path / task).mkdir(exist_ok=True)
            (tmp_path / task / f"{split}.jsonl").write_text("\n".join(rows))
    overrides = (f"data.path={tmp_path}", "federation.clients=1")
    loaded = load_experiment(Request(name, str(tmp_path / "run"), overrides))
    check_names(loaded)
    check_data(loaded)
    read_template(experiment.model.template)
    assert set(experiment.data.instructions) == set(experiment.data.tasks)
    if name != "trace":
        assert set(experiment.data.instructions.values()) <= set(INSTRUCTIONS.values())
    else:
        assert experiment.data.tasks == TRACE_ORDER


@pytest.mark.parametrize("path", sorted(PUBLISHED.glob("*.toml")), ids=lambda path: path.stem)
def test_published_settings_say_first_that_nobody_ran_them(path: Path) -> None:
    assert path.read_text().startswith("# NOT RUN HERE")
    experiment = parse_experiment(read_toml(path), path.name)
    assert "not run here" in experiment.description
    assert experiment.data.tasks == shipped("cl-order1").data.tasks
    assert path.stem not in shipped_experiments()

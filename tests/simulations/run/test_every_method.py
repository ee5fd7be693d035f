"""Every method through the real apps: a whole run, and one that is stopped and resumed; the
switches of `deal`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.numpy import load_file

from deal_core.config.experiment import Experiment
from deal_core.methods import METHODS
from server.folder import RunEvent
from server.results import read_results
from tests.registered import register
from tests.simulations.runs import learnt_adapter, same, simulated, stopped
from tests.sizes import QUIET, TINY, TWO_LAYERS
from tests.slow import slow_but

pytestmark = pytest.mark.usefixtures("one_model")

RUNS = {
    **{name: (f"method.name={name}",) for name in METHODS},
    "prototype": ("method.name=prototype", *QUIET),
}
STEPS = {"prototype": 2}
"""Rounds and stages before a run is stopped, else 4: the second task's first round has just ended,
and what a method keeps is in use. Of sums that are given once there is no round after the first."""


@pytest.fixture(scope="module", autouse=True)
def sums_of_all_records() -> Iterator[None]:
    """No record is held back, and class means are used whatever they are worth."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("client.runtime.HELD_BACK", 10**9)
        patch.setattr("server.strategy.found_worse", lambda *given: False)
        yield


@pytest.fixture(scope="module")
def whole_run(make_experiment, tmp_path_factory):
    """One run a method; two of three clients a round, so some come first in a second round."""
    finished: dict[str, tuple[Experiment, Path]] = {}

    def run(name: str) -> tuple[Experiment, Path]:
        if name not in finished:
            experiment = make_experiment(
                *RUNS[name],
                "federation.clients=3",
                "federation.clients_per_round=2",
                'data.partition.kind="iid"',
                *TINY,
            )
            folder = tmp_path_factory.mktemp(name)
            simulated(experiment, folder)
            finished[name] = experiment, folder
        return finished[name]

    return run


@pytest.mark.parametrize("name", slow_but(RUNS, "ewc"))
def test_a_run_that_is_stopped_and_resumed_ends_in_the_same_adapter(whole_run, tmp_path, name):
    experiment, folder = whole_run(name)
    assert len(read_results(folder).accuracy_matrix) == 2
    ended: list[str] = []

    def in_use(event: RunEvent) -> bool:
        if event["event"] in {"round_finished", "stage_finished"}:
            ended.append(event["event"])
        return len(ended) >= STEPS.get(name, 4) and event["event"] == "client_finished"

    stopped(experiment, tmp_path, in_use)
    simulated(experiment, tmp_path, resume=True)
    assert same(learnt_adapter(folder), learnt_adapter(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_sites_learn_and_measure_what_simulated_clients_do(whole_run, tmp_path, monkeypatch, name):
    experiment, folder = whole_run(name)
    register(monkeypatch)
    simulated(experiment, tmp_path)
    assert same(learnt_adapter(folder), learnt_adapter(tmp_path))
    clients, sites = read_results(folder), read_results(tmp_path)
    assert sites.accuracy_matrix == clients.accuracy_matrix
    assert sites.class_incremental == clients.class_incremental
    assert sites.per_client == clients.per_client


@pytest.mark.slow
def test_a_new_run_in_an_old_folder_begins_anew(whole_run, tmp_path):
    """What a client of another run kept there is not added to what is kept now."""
    experiment, folder = whole_run("ewc")
    for client in range(3):
        kept = next((folder / "sites").glob("*/kept-*/task-1.safetensors"))
        site = tmp_path / "sites" / str(client) / kept.parent.name
        site.mkdir(parents=True)
        shutil.copy(kept, site / "task-1.safetensors")
    simulated(experiment, tmp_path)
    assert same(learnt_adapter(folder), learnt_adapter(tmp_path))


@pytest.fixture
def run_with(make_experiment, tmp_path):
    def run(name, *overrides):
        return simulated(make_experiment(*overrides), tmp_path / name)

    return run


def model_update(folder) -> torch.Tensor:
    """``dW`` of every layer, in one vector."""
    arrays = load_file(folder / "adapter" / "adapter_model.safetensors")
    keys = sorted(key for key in arrays if "lora_A" in key)
    pairs = [(arrays[key.replace("lora_A", "lora_B")], arrays[key]) for key in keys]
    return torch.cat([torch.from_numpy(B @ A).flatten() for B, A in pairs])


TWO = 'data.tasks=["laboratory", "surgery"]'
SWITCHES = [
    ("method.update.lambda1=1.0",),
    ("method.distillation.weight=0.0",),
    ("method.distillation.future_weight=0.0",),
    ("method.retention.filter=none",),
]
"""Each changes what clients learn, or what the server keeps of it."""


@pytest.mark.slow
def test_every_switch_reaches_the_run(run_with):
    """A switch that a run drops on its way leaves the very same model."""
    short = (TWO, "data.max_train=16", "data.max_test=4")
    short += ("federation.rounds=1", "federation.local_epochs=2", "train.max_length=8", TWO_LAYERS)
    found = {(): model_update(run_with("none", *short))}
    for number, switch in enumerate(SWITCHES):
        found[switch] = model_update(run_with(f"switch{number}", *short, *switch))
    for switch, update in found.items():
        for other, its in found.items():
            assert switch == other or not torch.equal(update, its), (switch, other)


OFF = "method.retention.filter=none"


@pytest.mark.slow
def test_without_retention_and_distillation_deal_is_sequential(run_with):
    """Up to rounding: what clients see of the task's start is put in and taken off again."""
    plain = run_with("plain", "method.name=sequential")
    off = run_with(
        "off", OFF, "method.distillation.weight=0.0", "method.distillation.future_weight=0.0"
    )
    expected, found = model_update(plain), model_update(off)
    assert (found - expected).norm() < 0.01 * expected.norm()

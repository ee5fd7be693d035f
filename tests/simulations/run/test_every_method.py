"""Every method, rule and wire format through the real apps: a whole run, and one that is stopped
and resumed; bytes as sent, exactness as measured; the switches of `deal`."""

import json
import shutil
from itertools import combinations

import pytest
import torch
from safetensors.numpy import load_file

from deal_core.methods import METHODS
from server.results import read_results
from tests.registered import register
from tests.simulations.runs import assert_same_run, learnt_adapter, same, simulated, stopped
from tests.sizes import QUIET, TINY, TWO_LAYERS, WIDTH
from tests.slow import slow_but

pytestmark = pytest.mark.usefixtures("one_model", "sums_of_all_records")

RUNS = {
    **{name: (f"method.name={name}",) for name in METHODS},
    "prototype": ("method.name=prototype", *QUIET),
}
STEPS = {"prototype": 2}
"""Rounds and stages before a run is stopped, else 4: the second task's first round has just ended,
and what a method keeps is in use. Of sums that are given once there is no round after the first."""


@pytest.fixture(scope="module")
def whole_run(make_experiment, tmp_path_factory):
    """One run a method; two of three clients a round, so some come first in a second round."""
    finished = {}

    def run(name):
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
    ended = []

    def in_use(event):
        if event["event"] in {"round_finished", "stage_finished"}:
            ended.append(event["event"])
        return len(ended) >= STEPS.get(name, 4) and event["event"] == "client_finished"

    stopped(experiment, tmp_path, in_use)
    simulated(experiment, tmp_path, resume=True)
    assert_same_run(folder, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_sites_learn_and_measure_what_simulated_clients_do(whole_run, tmp_path, monkeypatch, name):
    experiment, folder = whole_run(name)
    register(monkeypatch)
    simulated(experiment, tmp_path)
    assert_same_run(folder, tmp_path)


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
    assert_same_run(folder, tmp_path)


@pytest.fixture
def run_of(make_experiment, tmp_path):
    def run(*overrides, name="run", listener=lambda event: None):
        experiment = make_experiment(TWO_LAYERS, *overrides)
        return experiment, simulated(experiment, tmp_path / name, listener)

    return run


def model_update(folder):
    """``dW`` of every layer, in one vector."""
    arrays = load_file(folder / "adapter" / "adapter_model.safetensors")
    keys = sorted(key for key in arrays if "lora_A" in key)
    pairs = [(arrays[key.replace("lora_A", "lora_B")], arrays[key]) for key in keys]
    return torch.cat([torch.from_numpy(B @ A).flatten() for B, A in pairs])


SWITCHES = [
    ("method.update.lambda1=1.0",),
    ("method.distillation.weight=0.0",),
    ("method.distillation.future_weight=0.0",),
    ("method.retention.filter=none",),
]
"""Each changes what clients learn, or what the server keeps of it."""


@pytest.mark.slow
def test_every_switch_reaches_the_run(run_of):
    """A switch that a run drops on its way leaves the very same model."""
    short = ("data.max_train=16", "data.max_test=4")
    short += ("federation.rounds=1", "federation.local_epochs=2", "train.max_length=8")
    found = [model_update(run_of(*short, *each, name=f"{each}")[1]) for each in ((), *SWITCHES)]
    for one, two in combinations(found, 2):
        assert not torch.equal(one, two)


@pytest.mark.slow
def test_without_retention_and_distillation_deal_is_sequential(make_experiment, tmp_path):
    """Up to rounding: what clients see of the task's start is put in and taken off again."""
    off = [word for switch in SWITCHES[1:] for word in switch]
    expected, found = (
        model_update(simulated(make_experiment(*words), tmp_path / words[0]))
        for words in (["method.name=sequential"], off)
    )
    assert (found - expected).norm() < 0.01 * expected.norm()


LAYERS, RANK = 2, 8


@pytest.mark.slow
def test_bytes_of_the_exact_pair_and_of_one_factor_in_int8(run_of):
    rules = ("aggregation.rule=fedit",), ("aggregation.rule=ffa", "wire.dtype=int8")
    wide, narrow = (read_results(run_of(*rule, name=rule[0])[1]).wire for rule in rules)
    header = 128  # numpy's own, one for each array
    width = 384
    factor = width * RANK
    assert wide.bytes_up == [LAYERS * 2 * (4 * factor + header)] * 4
    assert narrow.bytes_up == [LAYERS * (factor + 4 * RANK + 2 * header)] * 4
    row = LAYERS * 2 * (4 * width + header)  # nothing is retained yet: once, one row of zeros
    current = LAYERS * 2 * (4 * factor + header)
    assert wide.bytes_down == [current + row, *[current] * 3]
    retained = LAYERS * 2 * (4 * width * 2 * RANK + header)  # two tasks
    assert wide.evaluation_bytes_down[0] == row
    assert wide.evaluation_bytes_down[-1] == row + retained
    spent = sum(narrow.bytes_up) + narrow.received
    assert spent < 0.35 * (sum(wide.bytes_up) + wide.received)


def test_clients_of_their_own_ranks(run_of):
    ranks = (8, 4, 2)
    settings = ("aggregation.rule=flora", "federation.clients=3", *TINY)
    _, folder = run_of(*settings, f"adapter.client_ranks={[*ranks]}")
    results = read_results(folder)
    assert max(results.aggregation_error) < 1e-5
    per_rank = [LAYERS * 2 * (4 * WIDTH * rank + 128) for rank in ranks]
    assert results.wire.bytes_up == [sum(per_rank) / 3] * len(results.wire.bytes_up)


STREAM = (*TINY, "federation.rounds=3")


def resent(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [event for event in lines if event["event"] == "resent"]


@pytest.mark.parametrize("dtype", slow_but(["float32", "int8"], "int8"))
def test_rounds_of_a_stage_carry_the_current_adapter_alone(run_of, dtype):
    experiment, folder = run_of(*STREAM, f"wire.dtype={dtype}")
    results = read_results(folder)
    least = min(results.wire.bytes_down)  # of a round in which nothing else is sent
    first, *rounds = (size - least for size in results.wire.bytes_down)
    start, *evaluations = results.wire.evaluation_bytes_down
    assert first > 0  # nothing is retained yet: one row of zeros
    assert start < least  # of a current adapter that is zero one row is enough
    assert rounds == [0] * 5
    assert start < evaluations[0] < evaluations[1] <= start + 2 * experiment.adapter.rank * first
    assert resent(folder) == []


@pytest.mark.slow
def test_a_client_that_lost_its_folder_is_sent_it_again(run_of, tmp_path):
    sites = tmp_path / "two" / "sites"

    def lose(event):
        if event["event"] == "round_finished" and event["server_round"] == 2:
            shutil.rmtree(sites / "1")
        elif event["event"] == "stage_finished":
            damaged = sites / "0" / "retained.safetensors"
            damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")

    _, one = run_of(*STREAM, name="one")
    _, two = run_of(*STREAM, name="two", listener=lose)
    again = [(e["client"], e["stage"], e["server_round"]) for e in resent(two)]
    assert {("1", 0, 3), ("1", 1, 3), ("0", 1, 1)} <= set(again)
    undisturbed, results = read_results(one), read_results(two)
    assert results.accuracy_matrix == undisturbed.accuracy_matrix
    assert same(learnt_adapter(one), learnt_adapter(two))
    assert sum(results.wire.bytes_down) > sum(undisturbed.wire.bytes_down)

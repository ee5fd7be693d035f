"""Rules and wire formats in whole runs: bytes as sent, exactness as measured; the retained adapter,
which changes once a stage, is sent to a client once."""

from __future__ import annotations

import json
import shutil

import pytest

from server.results import read_results
from tests.simulations.runs import learnt_adapter, same, simulated
from tests.sizes import TINY, TWO_LAYERS
from tests.slow import slow_but

pytestmark = pytest.mark.usefixtures("one_model")


@pytest.fixture
def run_with(make_experiment, tmp_path):
    def run(*overrides, name="run", listener=lambda event: None):
        experiment = make_experiment(TWO_LAYERS, *overrides)
        return experiment, simulated(experiment, tmp_path / name, listener)

    return run


LAYERS, WIDTH, RANK = 2, 384, 8


@pytest.mark.slow
def test_bytes_of_the_exact_pair_and_of_one_factor_in_int8(run_with):
    _, exact = run_with("aggregation.rule=fedit", name="exact")
    _, small = run_with("aggregation.rule=ffa", "wire.dtype=int8", name="small")
    wide, narrow = read_results(exact).wire, read_results(small).wire
    header = 128  # numpy's own, one for each array
    factor = WIDTH * RANK
    assert wide.bytes_up == [LAYERS * 2 * (4 * factor + header)] * 4
    assert narrow.bytes_up == [LAYERS * (factor + 4 * RANK + 2 * header)] * 4
    row = LAYERS * 2 * (4 * WIDTH + header)  # nothing is retained yet: once, one row of zeros
    current = LAYERS * 2 * (4 * factor + header)
    assert wide.bytes_down == [current + row, *[current] * 3]
    retained = LAYERS * 2 * (4 * WIDTH * 2 * RANK + header)  # two tasks
    assert wide.evaluation_bytes_down[0] == row
    assert wide.evaluation_bytes_down[-1] == row + retained
    spent = sum(narrow.bytes_up) + narrow.received
    assert spent < 0.35 * (sum(wide.bytes_up) + wide.received)


def test_clients_of_their_own_ranks(run_with):
    ranks = (8, 4, 2)
    settings = ("aggregation.rule=flora", "federation.clients=3", *TINY)
    _, folder = run_with(*settings, f"adapter.client_ranks={[*ranks]}")
    results = read_results(folder)
    assert max(results.aggregation_error) < 1e-5
    per_rank = [LAYERS * 2 * (4 * WIDTH * rank + 128) for rank in ranks]
    assert results.wire.bytes_up == [sum(per_rank) / 3] * len(results.wire.bytes_up)


STREAM = (*TINY, "federation.rounds=3")


def resent(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [event for event in lines if event["event"] == "resent"]


@pytest.mark.parametrize("dtype", slow_but(["float32", "int8"], "int8"))
def test_rounds_of_a_stage_carry_the_current_adapter_alone(run_with, dtype):
    experiment, folder = run_with(*STREAM, f"wire.dtype={dtype}")
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
def test_a_client_that_lost_its_folder_is_sent_it_again(run_with, tmp_path):
    sites = tmp_path / "two" / "sites"

    def lose(event):
        if event["event"] == "round_finished" and event["server_round"] == 2:
            shutil.rmtree(sites / "1")
        elif event["event"] == "stage_finished":
            damaged = sites / "0" / "retained.safetensors"
            damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")

    _, one = run_with(*STREAM, name="one")
    _, two = run_with(*STREAM, name="two", listener=lose)
    again = [(e["client"], e["stage"], e["server_round"]) for e in resent(two)]
    assert {("1", 0, 3), ("1", 1, 3), ("0", 1, 1)} <= set(again)
    undisturbed, results = read_results(one), read_results(two)
    assert results.accuracy_matrix == undisturbed.accuracy_matrix
    assert same(learnt_adapter(one), learnt_adapter(two))
    assert sum(results.wire.bytes_down) > sum(undisturbed.wire.bytes_down)

"""The retained adapter changes once a stage, and is sent to a client once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from deal_core.config.experiment import Experiment
from server.folder import Listener
from server.results import Results, read_results
from simulations.engines.inprocess import run_inprocess
from tests.simulations.runs import at, learnt_adapter, same
from tests.sizes import TINY
from tests.slow import slow_but

pytestmark = pytest.mark.usefixtures("one_model")

STREAM = (*TINY, "federation.rounds=3")


def events(folder: Path, kind: str) -> list[dict[str, object]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def run(experiment: Experiment, folder: Path, listener: Listener = lambda event: None) -> Results:
    run_inprocess(at(experiment, folder), listener)
    return read_results(folder)


@pytest.mark.parametrize("dtype", slow_but(["float32", "int8"], "int8"))
def test_rounds_of_a_stage_carry_the_current_adapter_alone(
    make_experiment: Callable[..., Experiment], tmp_path: Path, dtype: str
) -> None:
    experiment = make_experiment(*STREAM, f"wire.dtype={dtype}")
    results = run(experiment, tmp_path)
    least = min(results.wire.bytes_down)  # of a round in which nothing else is sent
    first, *rounds = (size - least for size in results.wire.bytes_down)
    start, *evaluations = results.wire.evaluation_bytes_down
    assert first > 0  # nothing is retained yet: one row of zeros
    assert start < least  # of a current adapter that is zero one row is enough
    assert rounds == [0] * 5
    assert start < evaluations[0] < evaluations[1] <= start + 2 * experiment.adapter.rank * first
    assert events(tmp_path, "resent") == []


@pytest.mark.slow
def test_a_client_that_lost_its_folder_is_sent_it_again(
    make_experiment: Callable[..., Experiment], tmp_path: Path
) -> None:
    experiment = make_experiment(*STREAM)
    undisturbed = run(experiment, tmp_path / "one")

    def lose(event: dict[str, object]) -> None:
        if event["event"] == "round_finished" and event["server_round"] == 2:
            shutil.rmtree(tmp_path / "two" / "sites" / "1")
        elif event["event"] == "stage_finished":
            damaged = tmp_path / "two" / "sites" / "0" / "retained.safetensors"
            damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")

    results = run(experiment, tmp_path / "two", lose)
    again = [
        (e["client"], e["stage"], e["server_round"]) for e in events(tmp_path / "two", "resent")
    ]
    assert ("1", 0, 3) in again
    assert ("1", 1, 3) in again
    assert ("0", 1, 1) in again
    assert results.accuracy_matrix == undisturbed.accuracy_matrix
    assert same(learnt_adapter(tmp_path / "one"), learnt_adapter(tmp_path / "two"))
    assert sum(results.wire.bytes_down) > sum(undisturbed.wire.bytes_down)

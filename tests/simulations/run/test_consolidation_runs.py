"""Consolidation through the real apps: what is announced, what travels, what a stop costs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deal_core.config.experiment import Experiment
from server.results import read_results
from simulations.engines.inprocess import run_inprocess
from tests.simulations.runs import at, gain, learnt_adapter, same
from tests.sizes import ENOUGH_TO_LEARN, TWO_LAYERS

pytestmark = pytest.mark.usefixtures("one_model")

LAYERS, WIDTH, RANK = 2, 384, 8
ROWS = 4 * WIDTH * 2
"""Bytes of one direction of one layer, float32, both factors."""
FULL = ("adapter.retained_rank=8",)
"""What is learnt does not fit into what is retained."""
PRIVATE = ("method.consolidation.data=private", *FULL)
"""The first task fits into the retained rank, the second does not."""


def events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run_with(make_experiment, tmp_path_factory):
    """One finished run per setting."""
    finished: dict[tuple[str, ...], tuple[Experiment, Path]] = {}

    def run(*settings: str) -> tuple[Experiment, Path]:
        if settings not in finished:
            folder = tmp_path_factory.mktemp("run")
            experiment = make_experiment("federation.rounds=1", TWO_LAYERS, *settings)
            run_inprocess(at(experiment, folder), lambda event: None)
            finished[settings] = experiment, folder
        return finished[settings]

    return run


def bytes_of(distilled_rows: int, lora_rows: int) -> int:
    """What a request of so many directions weighs, headers aside."""
    return LAYERS * ROWS * (distilled_rows + lora_rows)


@pytest.mark.slow
def test_rounds_are_named_counted_and_weighed(run_with):
    """Where everything fits there is nothing to distil, and no message."""
    _, folder = run_with(*PRIVATE)
    seen = [
        (event["event"], event["stage"], event["phase"], event["server_round"])
        for event in events(folder)
        if event["event"] in ("round_finished", "round_skipped")
    ]
    assert seen == [
        ("round_finished", 0, "learn", 1),
        ("round_skipped", 0, "consolidate", 2),
        ("round_skipped", 0, "consolidate", 3),
        ("round_finished", 1, "learn", 1),
        ("round_finished", 1, "consolidate", 2),
        ("round_finished", 1, "consolidate", 3),
    ]
    results = read_results(folder)
    assert len(results.wire.bytes_up) == len(results.aggregation_error) == 4
    up, down = results.wire.bytes_up, results.wire.bytes_down
    headers = 128 * 2 * LAYERS
    assert up == [bytes_of(0, RANK) + headers] * 4  # the student's factors and no others
    # a row of zeros; nothing; the whole stack once (16 directions); the student
    alone = bytes_of(0, RANK) + headers
    assert down == [
        alone + bytes_of(1, 0) + headers,
        alone,
        alone + bytes_of(16, 0) + headers,
        alone,
    ]
    started = next(e for e in events(folder) if e["event"] == "run_started")
    assert [stage["rounds"] for stage in started["stages"]] == [3, 3]


def test_it_changes_what_is_learnt(run_with):
    _, alone = run_with(*FULL)
    _, distilled = run_with(*PRIVATE)
    assert not same(learnt_adapter(alone), learnt_adapter(distilled))


def test_a_run_that_is_stopped_while_it_consolidates_ends_the_same(run_with, tmp_path):
    """Also: saved and loaded is as never saved."""
    experiment, folder = run_with(*PRIVATE, "method.retention.filter=learned")

    def interrupt(event: dict) -> None:
        last = event["event"] == "client_finished" and event["server_round"] == 3
        if last and event["stage"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_inprocess(at(experiment, tmp_path), interrupt)
    run_inprocess(at(experiment, tmp_path, resume=True), lambda event: None)
    assert same(learnt_adapter(folder), learnt_adapter(tmp_path))


def test_learned_gains_travel_as_lora_b_and_average_exactly(run_with):
    """Under a rule that is not exact where both factors learn."""
    inexact = read_results(run_with(*PRIVATE)[1]).aggregation_error[2:]
    results = read_results(run_with(*PRIVATE, "method.retention.filter=learned")[1])
    assert max(results.aggregation_error[2:]) < 1e-6 < 10 * 1e-6 < min(inexact)
    up = results.wire.bytes_up
    headers = 128 * LAYERS
    assert up[2] == up[3] == bytes_of(0, RANK) / 2 + headers


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        ("aggregation.rule=flora", "adapter.client_ranks=[2, 8]"),
        ("aggregation.rule=fedex", "aggregation.robust=cosine-norm", "wire.dtype=int8"),
    ],
)
def test_exact_rules_and_clients_of_their_own_ranks(run_with, settings):
    """All clients train the whole student; what the rule puts beside it is kept as far as it
    fits."""
    _, folder = run_with(*PRIVATE, *settings, *ENOUGH_TO_LEARN)
    results = read_results(folder)
    assert max(results.aggregation_error) < 1e-5
    if "wire.dtype=int8" not in settings:
        assert results.wire.bytes_up[-1] == bytes_of(0, 8) + 128 * 2 * LAYERS
    assert gain(results) > 0

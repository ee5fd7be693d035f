"""What a tracker draws of a run's events."""

from __future__ import annotations

from typing import Any

import pytest

from server.tracking.run_figures import RunFigures

PLACE = {"time": 0.0, "round": 3, "stage": 1, "phase": "learn", "server_round": 1}


def lines(*events: dict[str, Any]) -> list[dict[str, Any]]:
    figures = RunFigures()
    told = (figures.line({**PLACE, **event}) for event in events)
    return [line for line in told if line is not None]


def client(loss: float, examples: float, name: str = "0") -> dict[str, Any]:
    return {"event": "client_finished", "client": name, "loss": loss, "num_examples": examples}


def test_a_round_has_its_figures_and_the_loss_of_its_examples() -> None:
    finished = {"event": "round_finished", "seconds": 2.0, "clients": 2, "excluded": []}
    refused = {"event": "client_failed", "client": "2", "reason": "far from the others"}
    replies = client(1.0, 30), client(2.0, 10, "1"), client(1e300, 5, "2"), refused
    silent = {"event": "client_failed", "client": "1", "reason": "lost", "server_round": 0}
    one, two = lines(*replies, silent, finished, finished)
    assert one["step"] == 3
    assert one["figures"]["train/loss"] == pytest.approx(1.25)
    assert one["figures"]["round/seconds"] == 2.0
    assert two["figures"] == {"round/seconds": 2.0, "round/clients": 2.0}  # no loss is left over


def test_a_loss_in_a_secure_sum_is_the_round_s() -> None:
    masked = {"event": "client_finished", "client": "0"}
    told = {"event": "loss_summed", "loss": 1.5}
    (line,) = lines(masked, told, {"event": "round_finished", "seconds": 1.0})
    assert line["figures"]["train/loss"] == 1.5


def test_a_client_that_keeps_its_loss_to_itself_has_none() -> None:
    private = {"event": "client_finished", "client": "0", "num_examples": 1.0, "epsilon": 2.0}
    (line,) = lines(private, {"event": "round_finished", "seconds": 1.0})
    assert line["figures"] == {"round/seconds": 1.0}


def test_what_the_base_model_knows_comes_before_the_first_round() -> None:
    evaluated = {"event": "evaluated", "accuracy": {"a": 0.5}, "class_incremental": {"a": 0.25}}
    zero, later = lines({**evaluated, "stage": -1}, evaluated)
    assert (zero["step"], later["step"]) == (0, 3)
    assert later["figures"] == {"accuracy/a": 0.5, "accuracy_all_labels/a": 0.25}


def test_the_end_says_that_it_is_one() -> None:
    (line,) = lines({"event": "run_finished", "average_accuracy": 0.7, "forgetting": None})
    assert line == {"step": 3, "figures": {"final/average_accuracy": 0.7}, "finished": True}


@pytest.mark.parametrize("event", ["run_started", "round_started", "run_stopped", "stage_finished"])
def test_other_events_draw_nothing(event: str) -> None:
    assert lines({"event": event}) == []

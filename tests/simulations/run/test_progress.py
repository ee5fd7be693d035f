from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from simulations.run.live_view import duration, live_view, percent, plain_lines, progress_view
from simulations.run.progress import Progress

START = 1000.0
TASKS = ["heart", "skin"]


def round_events(task: int, number: int, start: float) -> list[dict[str, Any]]:
    where = {"stage": task, "phase": "learn", "server_round": number}
    return [
        {"event": "round_started", "time": start, **where, "clients": 2},
        {"event": "client_finished", "time": start + 3, **where, "client": "0", "loss": 1.0},
        {"event": "client_finished", "time": start + 6, **where, "client": "1", "loss": 2.0},
        {
            "event": "round_finished",
            "time": start + 8,
            **where,
            "clients": 2,
            "aggregation_error": 0.25,
            "seconds": 8.0,
        },
    ]


def evaluated(index: int, time: float, heart: float, skin: float) -> dict[str, Any]:
    accuracy = {"heart": heart, "skin": skin}
    return {"event": "evaluated", "time": time, "stage": index, "accuracy": accuracy}


def run_started(done: int = 0, stages: list[dict[str, Any]] | None = None) -> dict[str, Any]:
    return {
        "event": "run_started",
        "time": START,
        "tasks": TASKS,
        "clients": 2,
        "stages": stages or [{"rounds": 2, "tasks": [task]} for task in TASKS],
        "resumed": done > 0,
        "done_rounds": done,
    }


FIRST_TASK = [
    run_started(),
    evaluated(-1, START + 2, 0.2, 0.4),
    *round_events(0, 1, START + 2),
    *round_events(0, 2, START + 10),
    evaluated(0, START + 20, 0.8, 0.3),
    {"event": "stage_finished", "time": START + 20, "stage": 0},
]


def after(events: list[dict[str, Any]]) -> Progress:
    state = Progress()
    for event in events:
        state = state.update(event)
    return state


def test_before_any_task_the_only_accuracy_is_zero_shot() -> None:
    state = after(FIRST_TASK[:2])
    assert state.zero_shot == pytest.approx(0.3)
    assert state.accuracy_so_far is None
    assert state.seconds_left(START + 2) is None


def test_inside_a_round_clients_are_counted_and_losses_averaged() -> None:
    state = after(FIRST_TASK[:5])
    assert (state.place, state.server_round) == ("task 1/2 heart", 1)
    assert (state.answered, state.asked) == (2, 2)
    assert state.client == "1"
    assert state.loss == pytest.approx(1.5)


def test_accuracy_so_far_is_the_mean_over_tasks_learnt() -> None:
    state = after(FIRST_TASK)
    assert state.accuracy_so_far == pytest.approx(0.8)
    state = state.update(evaluated(1, START + 30, 0.6, 0.9))
    assert state.accuracy_so_far == pytest.approx(0.75)
    assert state.zero_shot == pytest.approx(0.3)


def test_accuracy_among_all_labels_is_of_the_tasks_learnt_too() -> None:
    def both(index: int, heart: float, skin: float) -> dict[str, Any]:
        again = {"class_incremental": {"heart": heart, "skin": skin}}
        return evaluated(index, START + 20, 0.8, 0.3) | again

    state = after([*FIRST_TASK[:-2], both(0, 0.7, 0.1)])
    assert state.among_all_so_far == pytest.approx(0.7)
    assert state.update(both(1, 0.5, 0.4)).among_all_so_far == pytest.approx(0.45)
    assert after(FIRST_TASK).among_all_so_far is None


def test_time_left_is_that_of_the_rounds_and_of_the_evaluations_to_come() -> None:
    state = after(FIRST_TASK)  # 2 of 4 rounds of 8 s, 2 of 3 evaluations of 2 s
    assert state.seconds_left(START + 20) == pytest.approx(2 * 8 + 2)
    assert state.seconds_left(START + 25) == pytest.approx(2 * 8 + 2 - 5)
    assert state.seconds_left(START + 500) == 0.0


def test_before_the_start_is_evaluated_nobody_knows_what_an_evaluation_takes() -> None:
    """In a simulation that follows the first round."""
    state = after([run_started(), *round_events(0, 1, START)])
    assert state.seconds_left(START + 8) is None
    state = state.update(evaluated(-1, START + 18, 0.2, 0.4))
    assert state.seconds_left(START + 18) == pytest.approx(3 * 8 + 2 * 10)


def test_an_evaluation_that_a_round_carries_along_is_in_the_time_of_the_round() -> None:
    begun, *others = round_events(0, 1, START)
    state = after([run_started(), begun, evaluated(-1, START + 5, 0.2, 0.4), *others])
    assert state.seconds_left(START + 8) == pytest.approx(3 * 8)


def test_after_a_resume_only_rounds_of_this_start_count_for_the_time() -> None:
    state = after([run_started(done=2), *round_events(1, 1, START)])
    assert (state.done, state.total, state.learnt) == (3, 4, ["heart"])
    assert state.seconds_left(START + 8) == pytest.approx(8.0)


OWN = [{"rounds": 2, "tasks": ["heart", "skin"]}, {"rounds": 1, "tasks": ["skin"]}]


def test_where_clients_have_their_own_tasks_a_stage_is_named_with_them() -> None:
    state = after([run_started(stages=OWN), *round_events(0, 1, START)])
    assert (state.place, state.rounds, state.total) == ("stage 1/2 heart, skin", 2, 3)
    assert state.phase == "evaluating the start"
    state = after([run_started(stages=OWN), *round_events(0, 1, START), *round_events(1, 1, START)])
    assert (state.place, state.rounds) == ("stage 2/2 skin", 1)
    assert state.phase == "ending the stage"


def test_a_task_is_learnt_when_its_last_learner_is_through() -> None:
    state = after([run_started(stages=OWN), evaluated(0, START + 9, 0.6, 0.9)])
    assert (state.learnt, state.accuracy_so_far) == (["heart"], 0.6)
    assert after([run_started(2, OWN)]).learnt == ["heart"]
    assert after([run_started(1, OWN)]).learnt == []
    state = state.update(evaluated(1, START + 9, 0.6, 0.8))
    assert (state.learnt, state.accuracy_so_far) == (TASKS, pytest.approx(0.7))


def test_a_failed_client_is_remembered_until_the_next_round() -> None:
    failed = {"event": "client_failed", "time": START + 4, "client": "1", "reason": "not finite"}
    state = after([*FIRST_TASK[:3], failed])
    assert state.failures == (("1", "not finite"),)
    assert plain_lines(failed, state) == ["client 1 left out: not finite"]
    assert after([*FIRST_TASK[:3], failed, *round_events(0, 2, START + 10)]).failures == ()


def test_what_is_lost_and_whose_weight_is_cut_is_told() -> None:
    state = after(FIRST_TASK[:3])
    lost = {"event": "round_lost", "time": START + 4, "reason": "LinAlgError: no end"}
    assert plain_lines(lost, state) == ["lost, the model stays as it was: LinAlgError: no end"]
    cut = {"event": "weight_cut", "time": START + 4, "client": "1", "weight": 600.0}
    assert plain_lines(cut, state) == ["client 1 weighs 600, not what it claimed"]


def test_unknown_events_change_nothing_but_the_time() -> None:
    state = after(FIRST_TASK)
    assert state.update({"event": "new", "time": START + 21}).accuracy == state.accuracy


def test_without_a_terminal_there_is_one_line_a_round() -> None:
    output = io.StringIO()
    with progress_view(Console(file=output, width=40), "name") as listener:
        for event in FIRST_TASK:
            listener(event)
    assert output.getvalue().splitlines() == [
        "started: 2 tasks, 2 clients",
        "zero-shot accuracy 30.0 %",
        "task 1/2 heart, round 1/2, 2/2 clients, 8.0 s, loss 1.500, aggregation error 0.25, "
        "about 28 s left",
        "task 1/2 heart, round 2/2, 2/2 clients, 8.0 s, loss 1.500, aggregation error 0.25, "
        "about 20 s left",
        "1 of 2 tasks learnt, accuracy so far 80.0 %",
    ]


def test_the_live_view_says_where_the_run_is() -> None:
    output = io.StringIO()
    state = after([*FIRST_TASK, *round_events(1, 1, START + 20)[:2]])
    Console(file=output, width=120).print(live_view("clinic", state, START + 23))
    shown = output.getvalue()
    assert "clinic · training · task 2/2 skin, round 1/2 · 1/2 clients (last: client 0" in shown
    assert "2/4 rounds" in shown
    assert (
        "accuracy so far 80.0 % (1 of 2 tasks learnt) · zero-shot 30.0 % · aggregation error 0.25"
        in shown
    )


def test_a_terminal_gets_the_live_view() -> None:
    output = io.StringIO()
    with progress_view(Console(file=output, width=100, force_terminal=True), "clinic") as listener:
        for event in FIRST_TASK:
            listener(event)
    assert "clinic" in output.getvalue()


def test_numbers_for_people() -> None:
    assert [duration(s) for s in (0.4, 59, 130, 3 * 3600 + 301)] == [
        "0 s",
        "59 s",
        "2 min 10 s",
        "3 h 5 min",
    ]
    assert [percent(0.5134), percent(None)] == ["51.3 %", "–"]

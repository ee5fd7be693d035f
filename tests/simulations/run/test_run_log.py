"""What people read of a run: line by line while it goes on, and on one screen at its end."""

import io

import pytest
from rich.console import Console

from deal_core.config.data import DataConfig
from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from server.folder import RunFolder
from server.results import (
    ClassIncremental,
    ClientResult,
    Privacy,
    Results,
    Stage,
    Wire,
    write_results,
)
from simulations.output import duration, signed
from simulations.run.run_log import Progress, told_to
from simulations.run.summary import large_delta, measures, print_report, privacy_text, task_table

START = 1000.0
TASKS = ["heart", "skin"]


def round_events(task, number, start, phase="learn"):
    where = {"stage": task, "phase": phase, "server_round": number}
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


def evaluated(index, time, heart, skin, **more):
    accuracy = {"heart": heart, "skin": skin}
    return {"event": "evaluated", "time": time, "stage": index, "accuracy": accuracy, **more}


def run_started(done=0, stages=None):
    return {
        "event": "run_started",
        "time": START,
        "tasks": TASKS,
        "clients": 2,
        "stages": stages or [{"rounds": 3, "learning": 2, "tasks": [task]} for task in TASKS],
        "resumed": done > 0,
        "done_rounds": done,
    }


FIRST_TASK = [
    run_started(),
    evaluated(-1, START + 2, 0.2, 0.4),
    *round_events(0, 1, START + 2),
    *round_events(0, 2, START + 10),
    *round_events(0, 3, START + 18, "prototypes"),
    evaluated(0, START + 20, 0.8, 0.3, class_incremental={"heart": 0.7, "skin": 0.1}),
    {"event": "stage_finished", "time": START + 20, "stage": 0},
]


def after(events):
    progress = Progress()
    for event in events:
        progress.hear(event)
    return progress


def test_there_is_one_line_a_round():
    output = io.StringIO()
    listener = told_to(Console(file=output, width=40), lambda *now: None)
    for event in FIRST_TASK:
        listener(event)
    rounds = [f"{what}, 2/2 clients, 8.0 s" for what in ("round 1/2", "round 2/2", "class sums")]
    assert output.getvalue().splitlines() == [
        "started: 2 tasks, 2 clients",
        "zero-shot accuracy 30.0 %",
        *(f"task 1/2 heart, {each}, loss 1.500" for each in rounds),
        "1 of 2 tasks learnt, accuracy so far 80.0 %, 70.0 % in Class-IL",
    ]
    (line,) = Progress().hear(run_started(done=2))
    assert line == "resumed after 2 of 6 rounds: 2 tasks, 2 clients"


def test_where_clients_have_their_own_tasks_a_stage_is_named_and_a_task_learnt_at_its_end():
    own = [{"rounds": 2, "tasks": ["heart", "skin"]}, {"rounds": 1, "tasks": ["skin"]}]
    progress = after([run_started(stages=own), *round_events(0, 1, START)[:-1]])
    (line,) = progress.hear(round_events(0, 1, START)[-1])
    assert line.startswith("stage 1/2 heart, skin, round 1/2, ")
    told = [progress.hear(evaluated(stage, START, 0.6, 0.8)) for stage in (0, 1)]
    assert told == [
        ["1 of 2 tasks learnt, accuracy so far 60.0 %"],
        ["2 of 2 tasks learnt, accuracy so far 70.0 %"],
    ]


def test_accuracy_so_far_is_of_all_tasks_learnt_as_they_were_last_evaluated():
    progress = after([run_started()])
    progress.hear(evaluated(0, START, 0.6, 0.2))
    later = evaluated(1, START, 0.6, 0.8, class_incremental={"heart": 0.3, "skin": 0.5})
    later["accuracy"].pop("heart")
    (line,) = progress.hear(later)
    assert line == "2 of 2 tasks learnt, accuracy so far 70.0 %, 40.0 % in Class-IL"
    (line,) = progress.hear({**later, "accuracy": {}, "class_incremental": {}})  # lost
    assert "accuracy so far" in line
    assert "70.0" not in line
    assert "Class-IL" not in line


def test_what_is_lost_and_whose_weight_is_cut_is_told():
    progress = after(FIRST_TASK[:3])
    lost = {"event": "round_lost", "time": START + 4, "reason": "LinAlgError: no end"}
    assert progress.hear(lost) == ["lost, the model stays as it was: LinAlgError: no end"]
    cut = {"event": "weight_cut", "time": START + 4, "client": "1", "weight": 600.0}
    assert progress.hear(cut) == ["client 1 weighs 600, not what it claimed"]
    damaged = {"event": "checkpoint_damaged", "time": START, "reason": "no file; start anew"}
    assert progress.hear(damaged) == ["resumed from the checkpoint before the last one: no file"]
    assert progress.hear({"event": "new", "time": START + 21}) == []


def test_clients_have_the_names_of_their_sites_or_of_their_column():
    progress = after([{**run_started(), "sites": ["Klinik München", "Süd"]}])
    failed = {"event": "client_failed", "client": "0", "reason": "slow"}
    assert progress.hear(failed) == ["client Klinik München left out: slow"]
    idle = {"event": "client_idle", "client": "1", "code": "no-data"}
    assert progress.hear(idle) == ["client Süd takes no part: no example of the task"]


def test_what_an_epsilon_means_is_said_once_and_again_where_it_changes():
    progress = after([{**run_started(), "unit": "record", "assumes": "nobody"}])
    told = {"event": "client_finished", "client": "0", "epsilon": 1.234, "delta": 1e-5}
    shown = []
    for void in (False, False, True):
        progress.hear({**told, "void": void})
        shown.append(progress.hear(round_events(0, 1, START)[-1]))
    assert [len(lines) for lines in shown] == [2, 1, 2]
    assert all(lines[0].endswith("s, epsilon 1.24") for lines in shown)
    assert "at delta 1e-05 per record, over all rounds and tasks so far" in shown[0][1]


def test_numbers_for_people():
    times = [duration(s) for s in (0.4, 59, 130, 3 * 3600 + 301)]
    assert times == ["0 s", "59 s", "2 min 10 s", "3 h 5 min"]
    assert [signed(-0.0002), signed(-0.0006)] == ["+0.0", "-0.1"]


def results(**changes):
    fields = {
        "config": Experiment(),
        "engine": "inprocess",
        "seed": 0,
        "tasks": TASKS,
        "stages": [Stage(rounds=2, work={task: ["0"]}) for task in TASKS],
        "accuracy_matrix": [[0.8, 0.25], [0.6, 0.9]],
        "zero_shot": {"heart": 0.2, "skin": 0.3},
        "average_accuracy": 0.75,
        "backward_transfer": -0.2,
        "forward_transfer": -0.05,
        "forgetting": 0.2,
        "per_client": {"0": client(0.9), "1": client(0.6), "2": client(None)},
        "privacy": Privacy(mechanism="none"),
        "wire": Wire(bytes_up=[1000.0, 2000.0], bytes_down=[2.5e6, 2.5e6]),
        "aggregation_error": [0.1, 0.2],
        "seconds": {"total": 130.0},
        "peak_rss_bytes": 1,
        "versions": {"flwr": "1.42.0"},
    }
    return Results(**{**fields, **changes})


def client(average):
    return ClientResult(accuracy_matrix=[], average_accuracy=average, test_examples=[])


def among_all():
    return ClassIncremental(
        accuracy_matrix=[[0.8, 0.05], [0.35, 0.55]],
        zero_shot={"heart": 0.2, "skin": 0.3},
        average_accuracy=0.45,
        backward_transfer=-0.45,
        forward_transfer=-0.25,
        forgetting=0.4,
        per_client={"0": client(0.5), "1": client(0.4)},
    )


def test_accuracy_and_overlap_of_texts_are_never_one_figure():
    assert task_table(results()).caption.startswith("Accuracy in %")
    written = Experiment(data=DataConfig(generation=("skin",)))
    mixed = results(config=written, class_incremental=among_all())
    table, told = task_table(mixed), dict(measures(mixed))
    assert table.caption.startswith("Score in %")
    assert [row[:2] for row in table.rows] == [("1 heart", "accuracy"), ("2 skin", "ROUGE-L")]
    assert told["average accuracy"] == "60.0 % (task 1)"
    assert told["average ROUGE-L"] == "90.0 % (task 2)"
    assert told["Class-IL ROUGE-L"] == "55.0 % (task 2)"
    assert told["zero-shot accuracy"] == "20.0 % (task 1)"
    both = results(config=Experiment(data=DataConfig(generation=("heart", "skin"))))
    assert dict(measures(both))["average ROUGE-L"] == "75.0 %"
    assert task_table(both).caption.startswith("ROUGE-L in %")


def test_a_run_ends_with_a_row_for_each_task_its_measures_and_its_place(tmp_path):
    output = io.StringIO()
    screen = Console(file=output, width=160)
    with pytest.raises(UserError, match="has not finished"):
        print_report(screen, tmp_path)
    write_results(RunFolder(tmp_path).results, results(class_incremental=among_all()))
    print_report(screen, tmp_path)
    assert max(map(len, output.getvalue().partition("average")[0].splitlines())) <= 80
    lines = {" ".join(line.split()) for line in output.getvalue().splitlines()}
    assert lines >= {
        "1 heart 20.0 80.0 60.0 -20.0 35.0",
        "2 skin 30.0 90.0 90.0 +0.0 55.0",
        "average accuracy 75.0 %",
        "zero-shot accuracy 25.0 %",
        "Class-IL accuracy 45.0 %",
        "Class-IL transfer backward -45.0, forgetting 40.0 points",
        "backward transfer -20.0 points",
        "forward transfer -5.0 points",
        "sent per client 3.0 kB by a client that is asked in every round",
        "received per client 5.0 MB by a client that is asked in every round",
        "time 2 min 10 s",
        "learnt 85.0 % when a task was just learnt, 25.0 % before",
        "forgotten 20.0 points of the best that a task had, by the end of the run",
        f"results {tmp_path / 'results.json'}",
    }


def test_an_epsilon_is_never_shown_without_delta_and_unit():
    spent = {"0": 1.5, "1": 2.25}
    whole = Privacy(mechanism="record", unit="record", delta=1e-5, epsilon=spent)
    assert "epsilon <= 2.25 at delta = 1e-05 per record" in privacy_text(whole)
    for part in ({"delta": None}, {"unit": None}, {"epsilon": {}}):
        assert "epsilon" not in privacy_text(whole.model_copy(update=part))


def test_a_large_delta_is_warned_of():
    told = Privacy(mechanism="record", unit="record", delta=0.1, n_delta=4.0, epsilon={"0": 1.0})
    assert "4 records of a client may be told outright" in large_delta(told)
    assert "at delta = 0.1 (n delta <= 4) per record" in privacy_text(told)
    assert large_delta(told.model_copy(update={"n_delta": 0.1})) == ""
    assert large_delta(Privacy(mechanism="none")) == ""

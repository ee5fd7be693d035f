"""What an administrator sees of a run."""

import json
import re

import pytest
from rich.console import Console

from server.folder import TOLD_TO_END, RunFolder
from simulations.deployment.server import status as module
from simulations.deployment.server.folder import ServerFolder
from simulations.deployment.server.status import RunState, described, run_state, state_of, status
from tests.simulations.runs import at, no_number, run_in_process
from tests.sizes import TINY

SITES = ["north", "south"]
STARTED = {"event": "run_started", "time": 990.0, "tasks": ["a"], "clients": 3, "done_rounds": 0}
STARTED |= {"stages": [{"rounds": 3}], "sites": ["x", "y", "z"]}
ROUND = {"stage": 0, "phase": "learn", "server_round": 1, "round": 1}
BEGUN = {"event": "round_started", "time": 1000.0, "clients": 3, "tasks": ["a"], **ROUND}


def said(kind, client="0", **fields):
    event = {"event": kind, "time": 1100.0, "client": client, "task": "a", "reason": "late"}
    return event | ROUND | fields


@pytest.fixture(scope="module")
def run(make_experiment, tmp_path_factory):
    """A finished run whose first client answers with NaN."""
    path = tmp_path_factory.mktemp("server") / "runs" / "one"
    path.mkdir(parents=True)
    run_in_process(at(make_experiment("federation.rounds=1", *TINY), path), no_number)
    metrics = RunFolder(path).metrics
    events = [json.loads(line) for line in metrics.read_text().splitlines()]
    named = [e | {"sites": SITES} if e["event"] == "run_started" else e for e in events]
    metrics.write_text("".join(json.dumps(event) + "\n" for event in named))
    return path


def test_the_state_names_sites_tasks_rounds_and_who_was_left_out(run):
    state = state_of(run)
    assert (state.phase, state.rounds, state.planned) == ("finished", 2, 2)
    assert (state.working, state.left_out) == (["surgery"], ["north"])
    bad, good = (state.sites[name] for name in SITES)
    assert (good.rounds, good.faults) == (2, 0)
    assert (bad.rounds, bad.faults) == (0, 2)
    assert "not finite" in bad.last_fault
    assert bad.last_seen == 0 < good.last_seen
    assert described("one", state)[1] == "round 2 of 2 finished; stage 2 of 2: surgery"


def test_no_run_is_called_finished_without_its_results(run, tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(RunFolder(run).metrics.read_bytes())
    state = state_of(tmp_path)
    assert state.phase == "stopped"
    assert "results.json: not there" in state.reason


def test_a_run_that_stops_says_why_and_goes_on_when_resumed():
    stopped = {"event": "run_stopped", "time": 2.0, "reason": "UserError: quorum\nmore"}
    state = run_state([STARTED, stopped])
    assert (state.phase, state.reason) == ("stopped", "quorum")
    again = run_state([STARTED, stopped, STARTED])
    assert (again.phase, again.reason) == ("running", "")
    assert run_state([]) == RunState()


def test_of_secure_sums_it_is_told_over_how_many_and_why_a_round_was_lost():
    missed = said("exchange_failed", exchange="confirm", reason="no reply before the deadline")
    state = run_state([STARTED, BEGUN, missed, said("summed", sites=3, cohort=4)])
    assert state.left_out == []  # its update is in the sum
    assert state.sites["x"].faults == 1
    told = "\n".join(described("one", state))
    assert "the server sees no site's update; the last sum is over 3 of 4 sites" in told
    unpinned = said("client_failed", exchange="prepare", reason="client reports 'unpinned'")
    lost = said("round_lost", reason="2 of 4 sites prepared")
    state = run_state([STARTED, BEGUN, unpinned, lost, said("round_skipped")])
    assert (state.left_out, state.rounds) == (["x"], 1)
    assert state.sites["x"].last_fault == "a peer's key is not pinned there; its log says whose"
    told = "\n".join(described("one", state))
    assert "the last round was lost, the model stayed as it was: 2 of 4 sites prepared" in told
    assert "lost" not in "\n".join(described("one", run_state([STARTED, BEGUN, lost, BEGUN])))


def test_a_round_that_is_under_way_says_who_was_asked_when_and_who_has_answered(monkeypatch):
    monkeypatch.setattr(module.time, "time", lambda: 1480.0)
    waiting = described("one", run_state([STARTED, BEGUN]), 1800.0)
    assert "round 1: 3 sites asked 8 min ago, 0 replied, deadline in 22 min" in waiting
    heard = [said("client_finished"), said("client_failed", "1")]
    heard.append(said("client_idle", "2", code="policy"))
    state = run_state([STARTED, BEGUN, *heard])
    expected = "1 replied, 1 declined, 1 failed, the deadline has passed"
    assert f"round 1: 3 sites asked 8 min ago, {expected}" in described("one", state, 300.0)
    assert state.sites["z"].last_fault.startswith("its policy refuses the experiment")
    late = said("reply_late", "1", reason="answered 31 s after the deadline of 240 s")
    slow = run_state([STARTED, BEGUN, *heard, late]).sites["y"]
    assert (slow.faults, slow.last_fault) == (1, "answered 31 s after the deadline of 240 s")
    near = said("reply_slow", "0", reason="answered 9 s before the deadline of 240 s")
    narrow = run_state([STARTED, BEGUN, near, *heard]).sites["x"]
    assert (narrow.faults, narrow.last_fault) == (0, "answered 9 s before the deadline of 240 s")
    again = run_state([STARTED, BEGUN, *heard, said("client_finished", "1")])  # asked once more
    assert list(again.answers.values()) == ["replied", "replied", "declined"]
    assert again.left_out == []
    exported = {"event": "adapter_missing", "time": 1200.0, "client": "0", "reason": "left"}
    assert run_state([STARTED, BEGUN, exported]).answers == {}  # of no round
    other = run_state([STARTED, BEGUN, said("client_finished", server_round=0)])
    assert other.answers == {}
    evaluated = run_state([STARTED, said("client_failed", server_round=0)])
    assert evaluated.left_out == []  # of an evaluation that fails


@pytest.mark.parametrize("end", ["round_finished", "round_skipped", "run_stopped"])
def test_no_round_is_under_way_once_it_has_ended(end):
    state = run_state([STARTED, BEGUN, said(end, excluded=[])])
    assert state.asked == 0
    between = "no round is under way: sites evaluate, or the server is at work"
    assert (between in described("one", state)) == (end != "run_stopped")


@pytest.mark.parametrize(("start", "phase"), [(1000.0, "stopped"), (3000.0, "starting")])
def test_a_run_that_was_continued_is_starting_while_it_waits_for_its_sites(
    tmp_path, monkeypatch, capsys, start, phase
):
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    stopped = {"event": "run_stopped", "time": 2000.0, "reason": "SystemExit: 0"}
    lines = [json.dumps(event) + "\n" for event in (STARTED, stopped)]
    RunFolder(run).metrics.write_text("".join(lines))
    (run / "starts.jsonl").write_text(json.dumps({"run": "7", "time": start}) + "\n")
    monkeypatch.setattr(module, "connected", lambda folder: ({"w": "online"}, ""))
    monkeypatch.setattr(module, "flower_status", lambda folder, number: "running")
    monkeypatch.setattr(ServerFolder, "settings", lambda self: None)
    status(ServerFolder(tmp_path), "one", Console(), as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["phase"] == phase
    assert told["reason"] == (TOLD_TO_END if phase == "stopped" else "")
    assert (list(told["sites"]), told["connected"]) == (["x", "y", "z"], {"w": "online"})
    status(ServerFolder(tmp_path), "one", Console(width=200), as_json=False)
    shown = capsys.readouterr().out
    assert f"run one: {phase}" in shown
    assert re.search(r"^w +online +never", shown, re.MULTILINE)

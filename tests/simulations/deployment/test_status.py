"""What an administrator sees of a run."""

import json

import pytest

from server.folder import RunFolder
from simulations.deployment.server.status import RunState, described, run_state, state_of
from tests.simulations.runs import at, no_number, run_in_process
from tests.sizes import TINY

SITES = ["north", "south"]
STARTED = {"event": "run_started", "time": 990.0, "tasks": ["a"], "clients": 3, "done_rounds": 0}
STARTED |= {"stages": [{"rounds": 3}], "sites": ["x", "y", "z"]}


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

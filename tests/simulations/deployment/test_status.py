"""What an administrator sees of a run, from the events of a real one."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from deal_core.config.experiment import Experiment
from deal_core.errors import UserError
from deal_core.privacy.distributed_noise import whom_to_trust
from server.folder import TOLD_TO_END, RunFolder, read_events
from server.results import EARLIER, MORE_TRUST, VOID, Spending
from simulations.deployment.server.folder import ServerFolder
from simulations.deployment.server.status import (
    RunState,
    SiteState,
    described,
    print_sites,
    run_state,
    state_of,
    status,
)
from simulations.deployment.server.submit import _require_ended, stop
from simulations.engines.inprocess import run_inprocess
from tests.sizes import TWO_LAYERS

SITES = ["north", "south"]


@pytest.fixture(scope="module")
def run(make_experiment, tmp_path_factory) -> Path:
    """A finished run whose second client answers with NaN."""
    path = tmp_path_factory.mktemp("server") / "runs" / "one"
    path.mkdir(parents=True)
    bad = ("faults.not-finite=[1]", "federation.rounds=1")
    experiment: Experiment = make_experiment(f'run.out="{path}"', *bad)
    run_inprocess(experiment, lambda event: None)
    metrics = RunFolder(path).metrics
    named = []
    for line in metrics.read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "run_started":
            event["sites"] = SITES
        named.append(json.dumps(event) + "\n")
    metrics.write_text("".join(named))
    return path


def test_the_state_names_sites_tasks_rounds_and_who_was_left_out(run: Path) -> None:
    state = state_of(run)
    assert (state.phase, state.rounds, state.planned) == ("finished", 2, 2)
    assert state.tasks == ["laboratory", "surgery"]
    assert state.working == ["surgery"]
    assert state.quarantined == ["south"]
    assert state.bytes_up > 0
    assert set(state.accuracy) == set(state.tasks)
    north, south = (state.sites[name] for name in SITES)
    assert (north.rounds, north.faults, north.task) == (2, 0, "surgery")
    assert (south.rounds, south.faults) == (0, 2)
    assert "not finite" in south.last_fault
    assert south.last_seen == 0 < north.last_seen


def test_accuracy_is_named_and_tasks_and_stages_are_counted_from_one(run: Path) -> None:
    """Nobody reads task 0 of 2, or an accuracy that does not say of what."""
    state = state_of(run)
    lines = described("one", state)
    assert lines[1] == "round 2 of 2 finished; stage 2 of 2: task 2 surgery of 2"
    at = lines.index("accuracy after stage 2 of 2, in % of all sites' test examples:")
    own, among_all = lines[at + 1 : at + 3]
    first, second = (100 * state.accuracy[task] for task in ("laboratory", "surgery"))
    shown = f"1 laboratory {first:.1f}, 2 surgery {second:.1f}"
    assert own == f"  among the labels of the task: {shown}"
    assert among_all.startswith("  among all labels seen so far: 1 laboratory ")
    start = RunState(tasks=["laboratory"], accuracy={"laboratory": 0.5})
    assert described("one", start)[-2].startswith("accuracy before any training (zero-shot), in %")


def test_no_run_is_called_finished_without_its_results(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "two"
    other.mkdir()
    (other / "metrics.jsonl").write_bytes(RunFolder(run).metrics.read_bytes())
    state = state_of(other)
    assert state.phase == "stopped"
    assert "results.json: not there" in state.reason


def test_a_run_that_stops_says_why_and_goes_on_when_resumed() -> None:
    started = {"event": "run_started", "time": 1.0, "tasks": ["a"], "clients": 1, "sites": ["x"]}
    started |= {"stages": [{"rounds": 3}], "done_rounds": 0}
    stopped = {"event": "run_stopped", "time": 2.0, "reason": "UserError: quorum\nmore"}
    state = run_state([started, stopped])
    assert (state.phase, state.reason) == ("stopped", "quorum")
    again = run_state([started, stopped, {**started, "done_rounds": 2}])
    assert (again.phase, again.reason, again.rounds) == ("running", "", 2)
    assert run_state([]) == RunState()


def test_of_secure_sums_it_is_told_over_how_many_and_why_a_round_was_lost() -> None:
    started = {"event": "run_started", "time": 1.0, "tasks": ["a"], "clients": 3, "sites": ["x"]}
    started |= {"stages": [{"rounds": 3}], "done_rounds": 0}
    where = {"time": 2.0, "stage": 0, "server_round": 1}
    begun = {"event": "round_started", "tasks": ["a"], **where}
    unpinned = {"event": "client_failed", "client": "0", "leg": "prepare", **where}
    unpinned["reason"] = "client reports 'unpinned'"
    missed = {"event": "leg_failed", "client": "0", "leg": "confirm", **where}
    missed["reason"] = "no reply before the deadline"
    summed = {"event": "summed", "sites": 3, "cohort": 4, **where}
    state = run_state([started, begun, missed, summed])
    assert state.quarantined == []  # its update is in the sum
    assert state.sites["x"].faults == 1
    assert "the server sees no site's update; the last sum is over 3 of 4 sites" in "\n".join(
        described("one", state)
    )
    lost = {"event": "round_lost", "reason": "2 of 4 sites prepared", **where}
    skipped = {"event": "round_skipped", **where}
    state = run_state([started, begun, unpinned, lost, skipped])
    assert state.quarantined == ["x"]
    assert state.sites["x"].last_fault == "a peer's key is not pinned there; its log says whose"
    assert state.rounds == 1
    said = "\n".join(described("one", state))
    assert "the last round was lost, the model stayed as it was: 2 of 4 sites prepared" in said
    assert "lost" not in "\n".join(described("one", run_state([started, begun, lost, begun])))


OVER = {False: "all rounds and tasks", True: "all rounds, a record being in one task"}


@pytest.mark.parametrize("disjoint", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_an_epsilon_is_never_shown_without_what_it_means(
    make_experiment, tmp_path, monkeypatch, capsys, disjoint
) -> None:
    path = tmp_path / "runs" / "one"
    path.mkdir(parents=True)
    private = ("privacy.mechanism=record", "privacy.noise=seeded", "train.batch_size=4")
    private += ("federation.rounds=1", TWO_LAYERS)
    private += (f"privacy.disjoint_tasks={str(disjoint).lower()}",)
    private_run = make_experiment(f'run.out="{path}"', *private)
    run_inprocess(private_run, lambda event: None)
    state = state_of(path)
    assert state.unit == "record"
    spent = [site.spent for site in state.sites.values()]
    assert all(each is not None and 0 < each.epsilon <= 8 for each in spent)
    monkeypatch.setattr("simulations.deployment.server.status.connected", lambda folder: ({}, ""))
    monkeypatch.setattr(ServerFolder, "settings", lambda self: None)
    console = Console(width=200, record=True)
    status(ServerFolder(tmp_path), "one", console, as_json=False)
    shown = console.export_text()
    assert "ε per record so far" in shown
    over = OVER[disjoint] + EARLIER
    assert f"ε composes over {over}" in shown
    assert max(map(len, shown.partition("ε composes")[0].splitlines())) <= 120
    assert f"whom ε counts on: {state.assumes}" in shown
    assert state.assumes == whom_to_trust(private_run.privacy)
    assert shown.count(" at δ ") == shown.count("simulation only") == len(spent)
    capsys.readouterr()
    status(ServerFolder(tmp_path), "one", console, as_json=True)
    told = json.loads(capsys.readouterr().out)["sites"]
    assert [site["spent"]["delta"] for site in told.values()] == [each.delta for each in spent]


def test_where_sites_differ_each_epsilon_says_what_holds_for_it(capsys) -> None:
    plain = Spending(epsilon=1.5, delta=1e-5, simulation_only=False)
    apart = plain.model_copy(update={"disjoint_tasks": True, "assumes_more": True})
    void = plain.model_copy(update={"void": True})
    spent = {"north": plain, "south": apart, "west": void}
    state = RunState(unit="record", assumes="nobody", sites={n: SiteState() for n in spent})
    for name, each in spent.items():
        state.sites[name].spent = each
    print_sites(Console(width=200), {}, state, "")
    shown = capsys.readouterr().out
    assert "1.5 at δ 1e-05, void for some" in shown
    assert f"ε of north, west composes over {OVER[False]}{EARLIER}\n" in shown
    assert f"ε of south composes over {OVER[True]}{EARLIER}\n" in shown
    assert "whom ε counts on: nobody\n" in shown
    assert f"ε of south counts on these {MORE_TRUST}\n" in shown
    assert f"ε of west is {VOID}\n" in shown


ROUND = {"stage": 0, "phase": "learn", "server_round": 1}


def under_way(*events: dict[str, object]) -> RunState:
    """A run of two rounds, whose first began at 1000 s."""
    started = {"event": "run_started", "time": 990.0, "tasks": ["a"], "clients": 3}
    started |= {"stages": [{"rounds": 2}], "done_rounds": 0, "sites": ["x", "y", "z"]}
    asked = {"event": "round_started", "time": 1000.0, "clients": 3, "tasks": ["a"], **ROUND}
    return run_state([started, asked, *events])


def said(kind: str, client: str, **fields: object) -> dict[str, object]:
    reason = {"reason": "late"} if kind == "client_failed" else {}
    return {
        "event": kind,
        "time": 1100.0,
        "client": client,
        "task": "a",
        **ROUND,
        **reason,
    } | fields


def test_a_round_that_is_under_way_says_who_was_asked_when_and_who_has_answered(
    monkeypatch,
) -> None:
    monkeypatch.setattr("simulations.deployment.server.status.time.time", lambda: 1480.0)
    waiting = described("one", under_way(), 1800.0)
    assert "round 1: 3 sites asked 8 min ago, 0 replied, deadline in 22 min" in waiting
    heard = [said("client_finished", "0"), said("client_failed", "1"), said("client_idle", "2")]
    some = described("one", under_way(*heard), 300.0)
    expected = "1 replied, 1 declined, 1 failed, the deadline has passed"
    assert f"round 1: 3 sites asked 8 min ago, {expected}" in some
    again = under_way(*heard, said("client_finished", "1"))  # asked once more
    assert again.current is not None
    assert list(again.current.answers.values()) == ["replied", "replied", "declined"]
    other = under_way(said("client_finished", "0", server_round=0))
    assert other.current is not None
    assert other.current.answers == {}


@pytest.mark.parametrize("end", ["round_finished", "round_skipped", "run_stopped"])
def test_no_round_is_under_way_once_it_has_ended(end: str) -> None:
    figures = {"bytes_up": 1.0, "bytes_down": 1.0, "excluded": [], "reason": "UserError: quorum"}
    state = under_way({"event": end, "time": 1200.0, **ROUND, **figures})
    assert state.current is None
    between = "no round is under way: sites evaluate, or the server is at work"
    assert (between in described("one", state)) == (end != "run_stopped")


@pytest.mark.parametrize(
    ("stopped_at", "reason"),
    [(3.0, "by deal stop"), (1.0, TOLD_TO_END), (None, TOLD_TO_END)],
)
def test_a_run_that_deal_stop_has_ended_says_so(
    tmp_path, monkeypatch, capsys, stopped_at: float | None, reason: str
) -> None:
    """Its process knows only that it was told to end; a stop of an earlier start does not count."""
    write_stopped_run(tmp_path, started=2.5, stopped=4.0, reason="SystemExit: 0", start=2.0)
    folder = quiet_server(monkeypatch, tmp_path)
    if stopped_at is not None:
        stop_event = {"event": "run_stopped", "time": stopped_at, "run": "one", "flower": "7"}
        folder.events.path.write_text(json.dumps(stop_event) + "\n")
    status(folder, "one", Console(width=200), as_json=False)
    assert f"run one: stopped ({reason})" in capsys.readouterr().out


def test_an_evaluation_that_fails_leaves_no_update_out() -> None:
    started = {"event": "run_started", "time": 1.0, "tasks": ["a"], "clients": 1, "sites": ["x"]}
    started |= {"stages": [{"rounds": 3}], "done_rounds": 0}
    failed = {"event": "client_failed", "time": 2.0, "client": "0", "reason": "lost"}
    assert run_state([started, {**failed, "server_round": 0}]).quarantined == []
    assert run_state([started, {**failed, "server_round": 1}]).quarantined == ["x"]
    well = {"event": "client_finished", "time": 3.0, "client": "0", "task": "a"}
    assert run_state([started, {**failed, "server_round": 1}, well]).quarantined == []


def test_a_round_that_is_played_again_counts_once(run: Path) -> None:
    """The server was killed between the event and the checkpoint."""
    events = read_events(RunFolder(run).metrics)
    cut = next(i for i, each in enumerate(events) if each["event"] == "round_finished") + 1
    again = {**events[0], "done_rounds": 0}
    once, twice = run_state(events), run_state([*events[:cut], again, *events])
    assert (twice.rounds, twice.bytes_up) == (once.rounds, once.bytes_up) == (2, once.bytes_up)
    assert twice.sites["north"].rounds == once.sites["north"].rounds == 2


def write_stopped_run(
    folder: Path, started: float, stopped: float, reason: str, start: float
) -> None:
    """Write what run ``one`` leaves; ``start``: when it was given to Flower the last time."""
    run = folder / "runs" / "one"
    run.mkdir(parents=True)
    first = {"event": "run_started", "time": started, "tasks": ["a"], "clients": 1, "sites": ["x"]}
    first |= {"stages": [{"rounds": 3}], "done_rounds": 0}
    last = {"event": "run_stopped", "time": stopped, "reason": reason}
    lines = [json.dumps(event) + "\n" for event in (first, last)]
    RunFolder(run).metrics.write_text("".join(lines))
    (run / "starts.jsonl").write_text(json.dumps({"run": "7", "time": start}) + "\n")


def quiet_server(monkeypatch: pytest.MonkeyPatch, folder: Path) -> ServerFolder:
    monkeypatch.setattr("simulations.deployment.server.status.connected", lambda folder: ({}, ""))
    monkeypatch.setattr(ServerFolder, "settings", lambda self: None)
    return ServerFolder(folder)


@pytest.mark.parametrize(("since", "phase"), [(1.0, "stopped"), (3.0, "starting")])
def test_a_run_that_was_continued_is_starting_while_it_waits_for_its_sites(
    tmp_path, monkeypatch, capsys, since: float, phase: str
) -> None:
    write_stopped_run(tmp_path, started=1.0, stopped=2.0, reason="UserError: quorum", start=since)
    said = "simulations.deployment.server.status.flower_status"
    monkeypatch.setattr(said, lambda folder, number: "running")
    status(quiet_server(monkeypatch, tmp_path), "one", Console(), as_json=True)
    told = json.loads(capsys.readouterr().out)
    assert told["phase"] == phase
    assert bool(told["reason"]) == (phase == "stopped")


@pytest.mark.parametrize("found", ["running", "pending", "finished:failed", "unknown", ""])
def test_a_run_that_was_continued_a_moment_ago_is_not_continued_again(
    tmp_path, monkeypatch, found: str
) -> None:
    run = tmp_path / "one"
    run.mkdir()
    (run / "starts.jsonl").write_text(json.dumps({"run": "7", "time": 1.0}) + "\n")
    monkeypatch.setattr(
        "simulations.deployment.server.submit.flower_status", lambda folder, number: found
    )
    if found in ("running", "pending"):
        with pytest.raises(UserError, match="a moment ago"):
            _require_ended(ServerFolder(tmp_path), run, "")
    else:
        _require_ended(ServerFolder(tmp_path), run, "")


def test_the_start_that_lives_is_stopped_and_not_one_that_failed_after_it(
    tmp_path, monkeypatch
) -> None:
    run = tmp_path / "runs" / "one"
    run.mkdir(parents=True)
    lines = [json.dumps({"run": number, "time": 1.0}) + "\n" for number in ("7", "8")]
    (run / "starts.jsonl").write_text("".join(lines))
    asked: list[tuple[str, ...]] = []
    folder = quiet_server(monkeypatch, tmp_path)
    flower = SimpleNamespace(ask=lambda *words: asked.append(words))
    folder.flower = flower
    found = {"7": "running", "8": "finished:failed"}
    monkeypatch.setattr(
        "simulations.deployment.server.submit.flower_status", lambda folder, number: found[number]
    )
    stop(folder, "one")
    assert asked[0][:2] == ("stop", "7")

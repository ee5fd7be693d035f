"""Sites that are slow, die or are cut off: the run goes on, and they catch up."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from simulations.deployment.run_state import state_of
from tests.simulations.deployment.loopback import (
    SITES,
    Cable,
    divide,
    experiment_file,
    federation,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
NORTH, SOUTH, WEST = "0", "1", "2"


def rounds_of(events: list[dict], client: str, event: str) -> list[int]:
    return [
        e["server_round"]
        for e in events
        if e["event"] == event and e.get("client") == client and e["stage"] == 0
    ]


def test_a_straggler_a_dead_site_and_a_cut_cable(tmp_path: Path) -> None:
    data = tmp_path / "data"
    divide(data)
    path = experiment_file(tmp_path / "faults.toml", ["surgery"], rounds=5, deadline=75)
    with federation(tmp_path) as fed:
        cable = Cable(fed.folder.settings().superlink_port)
        for site in SITES:
            address = f"127.0.0.1:{cable.port}" if site == "north" else ""
            fed.add(site, data / site, address=address)
            fed.start_site(site)
        run = fed.submit(str(path), "--set", "federation.quorum=0.3")

        fed.wait_event(run, "round_started", 240, server_round=2)
        fed.wait_asked("south", 2)
        stopped = fed.members("south")
        for process in stopped:
            process.send_signal(signal.SIGSTOP)
        fed.wait_event(run, "client_failed", 120, server_round=2, client=SOUTH)
        for process in stopped:
            process.send_signal(signal.SIGCONT)

        fed.wait_event(run, "round_started", 60, server_round=3)
        fed.wait_asked("west", 3)
        fed.kill("west")
        fed.start_site("west")

        fed.wait_event(run, "round_started", 180, server_round=4)
        cable.cut()
        time.sleep(60)
        cable.mend()

        events = fed.wait_event(run, "run_finished", 400)
        cable.close()
        finished = {e["server_round"]: e for e in events if e["event"] == "round_finished"}
        state = state_of(fed.run(run))
    assert set(finished) == {1, 2, 3, 4, 5}
    assert finished[1]["clients"] == 3
    assert rounds_of(events, SOUTH, "client_failed")[0] == 2
    assert 3 in rounds_of(events, WEST, "client_failed")
    for client in (NORTH, SOUTH, WEST):
        assert 5 in rounds_of(events, client, "client_finished")
    for client in (NORTH, SOUTH, WEST):
        answered = rounds_of(events, client, "client_finished")
        failed = rounds_of(events, client, "client_failed")
        assert sorted(answered + failed) == [1, 2, 3, 4, 5]  # one verdict a round, never two
    assert state.phase == "finished"

"""A server that is killed, and sites that all vanish: the run goes on from its checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulations.deployment.server.status import state_of
from simulations.deployment.server.submit import resume
from tests.simulations.deployment.loopback import Federation, done, federation, wait_for
from tests.simulations.deployment.short_experiment import alone, experiment_file, same_adapter
from tests.simulations.deployment.site_data import divide

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
TWO = {"north": ".csv", "south": ".jsonl"}


def answered(fed: Federation, site: str, server_round: int) -> bool:
    wanted = {"event": "answered", "asked": "train", "server_round": str(server_round)}
    return any(wanted.items() <= each.items() for each in fed.log(site))


def test_a_killed_server_and_lost_sites_change_nothing_of_the_result(tmp_path: Path) -> None:
    data = tmp_path / "data"
    divide(data, TWO)
    path = experiment_file(tmp_path / "resumed.toml", ["surgery"], rounds=4, deadline=90)
    with federation(tmp_path) as fed:
        where = ("--dir", str(fed.folder.path))
        for site in TWO:
            fed.add(site, data / site, path)
            fed.start_site(site)
        run = fed.submit(path, "federation.quorum=1.0")

        wait_for("an answer of round 2", lambda: answered(fed, "north", 2), 240)
        fed.kill("server")
        kept = fed.site("north") / "state" / "runs" / run / "update-0-2.safetensors"
        when = kept.stat().st_mtime_ns
        fed.start_server()
        assert f"run {run}: stopped (its process has ended" in done("status", run, *where)
        resume(fed.folder, run)

        fed.wait_event(run, "round_started", 120, server_round=3)
        assert kept.stat().st_mtime_ns == when  # asked twice, answered once
        for site in TWO:
            fed.kill(site)
        events = fed.wait_event(run, "run_stopped", 240)
        assert "the quorum is 2" in events[-1]["reason"]
        seen = done("status", run, *where)
        assert f"run {run}: stopped" in seen
        assert f"deal submit --resume {run}" in seen
        assert state_of(fed.run(run)).phase == "stopped"

        for site in TWO:
            fed.start_site(site)
        resume(fed.folder, run)
        fed.wait_event(run, "run_finished", 300)
        deployed = fed.run(run)
    same_adapter(deployed, alone(path, data, tmp_path / "alone", list(TWO)))

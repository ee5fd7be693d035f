"""A site that is switched on at the second task, and owns no other."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from server.results import read_results
from tests.simulations.deployment.loopback import federation
from tests.simulations.deployment.short_experiment import experiment_file
from tests.simulations.deployment.site_data import divide

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_it_gets_what_was_learnt_and_works_on_its_task(tmp_path: Path) -> None:
    data = tmp_path / "data"
    divide(data, {"north": ".csv", "late": ".jsonl"})
    shutil.rmtree(data / "late" / "laboratory")
    path = experiment_file(tmp_path / "late.toml", rounds=2, deadline=120, connect=15)
    with federation(tmp_path) as fed:
        for site in ("north", "late"):
            fed.add(site, data / site, path)
        fed.start_site("north")
        run = fed.submit(str(path))
        fed.wait_event(run, "round_started", 200, stage=0, server_round=2)
        fed.start_site("late")
        events = fed.wait_event(run, "run_finished", 400)
        results = read_results(fed.run(run))
    late = [e for e in events if e.get("client") == "1"]
    assert {e["reason"] for e in late if e["event"] == "client_failed"} == {"not connected"}
    finished = [e for e in late if e["event"] == "client_finished"]
    assert {e["task"] for e in finished} == {"surgery"}
    assert (finished[-1]["stage"], finished[-1]["server_round"]) == (1, 2)
    assert results.per_client["1"].test_examples == [0, 9]
    assert results.per_client["0"].test_examples == [9, 9]
    assert events[0]["sites"] == ["north", "late"]
